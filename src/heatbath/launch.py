"""Starting the processes of a run: torchrun on a CPU, accelerate on GPUs, one line that is printed before it runs."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from heatbath import ranks
from heatbath.errors import RecipeError
from heatbath.recipe import Recipe, shipped_folder

OPTIONS = ("--gpus", "--nodes", "--sharding")
ACCELERATE, TORCHRUN = ("accelerate", "launch"), ("torchrun",)
PORT = "29500"  # torchrun's own default
KINDS = {"NO": "ddp", "MULTI_GPU": "ddp", "FSDP": "fsdp2", "DEEPSPEED": "zero2"}


@dataclass(frozen=True)
class Launch:
    """What the command line asks for: processes on each machine, machines, and how the weights are sharded over them:
    the name of a shipped configuration of accelerate (recipes/launch), or a file."""

    gpus: int = 1
    nodes: int = 1
    sharding: str = "ddp"

    @property
    def processes(self) -> int:
        return self.gpus * self.nodes

    @property
    def several(self) -> bool:
        """Whether a launcher is needed."""
        return self.processes > 1 or self.sharding != "ddp"

    @property
    def kind(self) -> str:
        """How the weights are laid out: "ddp", "fsdp2" or "zero2"."""
        return kind_of(configuration(self.sharding))

    def require_recipe(self, recipe: Recipe, stages: Sequence[str]) -> None:
        """Raises RecipeError where the recipe or its stages do not go with so many processes, on any machine."""
        require_sharding(recipe, stages, self.kind)
        require_shares(recipe, stages, self.processes)

    def require(self, recipe: Recipe, stages: Sequence[str]) -> None:
        """Raises RecipeError where this machine, the recipe or its stages do not go with so many processes."""
        import torch

        self.require_recipe(recipe, stages)
        if self.sharding != "ddp" and not torch.cuda.is_available():
            raise RecipeError(
                "accelerate shards weights on GPUs only; on a CPU it would run DDP without a word",
                "--sharding",
                "leave it out on this machine",
            )
        if torch.cuda.is_available() and self.gpus > torch.cuda.device_count():
            raise RecipeError(
                f"{self.gpus} GPUs are asked for and {torch.cuda.device_count()} visible",
                "--gpus",
                "as many as there are, or look at CUDA_VISIBLE_DEVICES",
            )
        if self.kind == "zero2" and importlib.util.find_spec("deepspeed") is None:
            raise RecipeError("DeepSpeed is not installed", "--sharding", "pip install deepspeed, or fsdp2")
        if "eval" in stages and evaluates_alone(recipe) and importlib.util.find_spec("vllm") is None:
            raise RecipeError(
                "vLLM, which is to evaluate after the training, is not installed",
                "eval.engine",
                "pip install 'heatbath[vllm]', or eval.engine = \"transformers\"",
            )
        if self.nodes > 1 and "MASTER_ADDR" not in os.environ:
            raise RecipeError(
                "several machines need one that the others find",
                "--nodes",
                "export MASTER_ADDR=<host of the first machine> on each (docs/scale.md has it for SLURM and Ray)",
            )
        if self.nodes > 1 and node() is None:
            raise RecipeError(
                "several machines need to be told apart",
                "--nodes",
                "export NODE_RANK=0 on the first, 1 on the next, … (SLURM does it itself; docs/scale.md)",
            )

    def require_started(self, recipe: Recipe, stages: Sequence[str]) -> None:
        """Raises RecipeError where processes that somebody else has started are not those that are asked for here."""
        if ranks.LAUNCHED not in os.environ and self.several and self.processes != ranks.count():
            raise RecipeError(
                f"{ranks.count()} processes are running already (RANK and WORLD_SIZE are set)",
                "--gpus, --nodes",
                "leave them out where torchrun or accelerate has started heatbath",
            )
        sharded = {"ACCELERATE_USE_FSDP": "fsdp2", "ACCELERATE_USE_DEEPSPEED": "zero2"}
        for variable, kind in sharded.items():
            if os.environ.get(variable, "false").lower() == "true":
                require_sharding(recipe, stages, kind)
        require_shares(recipe, stages, ranks.count())

    def command(self, arguments: Sequence[str], *, gpu: bool) -> list[str]:
        """The line that starts heatbath with these arguments, on machines with GPUs or without."""
        own = without_options(arguments)
        if not self.several:
            return ["heatbath", *own]
        host, port = os.environ.get("MASTER_ADDR", "$MASTER_ADDR"), os.environ.get("MASTER_PORT", PORT)
        if gpu:
            line = [*ACCELERATE, "--config_file", str(configuration(self.sharding))]
            line += ["--num_processes", str(self.processes), "--num_machines", str(self.nodes)]
            if self.nodes == 1:
                line += ["--main_process_port", "0"]  # a free one
            else:
                line += ["--machine_rank", str(node() or 0), "--rdzv_backend", "c10d"]
                line += ["--main_process_ip", host, "--main_process_port", port]
            return [*line, "-m", "heatbath", *own]
        line = [*TORCHRUN, "--nproc-per-node", str(self.gpus)]
        if self.nodes == 1:
            line += ["--standalone"]
        else:
            line += ["--nnodes", str(self.nodes), "--rdzv-backend", "c10d", "--rdzv-id", "heatbath"]
            line += ["--rdzv-endpoint", f"{host}:{port}"]
        return [*line, "-m", "heatbath", *own]

    def run(self, arguments: Sequence[str], say: Callable[[str], None]) -> int:
        """Starts the processes and waits for them; returns the exit code: 0, 1, or 130 where they were interrupted."""
        import torch

        line = self.command(arguments, gpu=torch.cuda.is_available())
        say(f"starting {self.gpus} processes{' on this machine' * (self.nodes > 1)}: {shlex.join(line)}")
        line = [sys.executable, "-m", "heatbath.starting", *line]  # the launcher of this very Python
        environment = os.environ | {ranks.LAUNCHED: str(self.processes)}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.gpus)))
        with _Interruptible(line, environment) as started:
            code = started.process.wait()
        return 0 if code == 0 else 130 if started.interrupted else 1


class _Interruptible:
    """A launcher that passes an interruption on to its processes (`starting.py`) and is waited for."""

    def __init__(self, line: list[str], environment: dict[str, str]):
        self.interrupted = False
        self._former: dict[int, Any] = {}
        # Out of reach of a terminal's ^C, but not left behind where this process is killed.
        self.process = subprocess.Popen(line, env=environment, start_new_session=True, preexec_fn=_end_with_parent)

    def __enter__(self) -> _Interruptible:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._former[number] = signal.signal(number, self._pass_on)
        return self

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True
        self.process.terminate()

    def __exit__(self, *_: object) -> None:
        for number, former in self._former.items():
            signal.signal(number, former)


def _end_with_parent() -> None:
    if sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGTERM)


def require_sharding(recipe: Recipe, stages: Sequence[str], kind: str) -> None:
    """Raises RecipeError where the recipe or its stages do not go with weights that lie so over the processes."""
    if recipe.lora is not None and kind == "fsdp2":
        raise RecipeError(
            "adapters of sharded weights cannot be merged yet",
            "--sharding",
            "leave it out: with [lora] gradients and optimizer are small, and the base needs no second copy",
        )
    if kind == "fsdp2" and "preference" in stages:
        raise RecipeError(
            "TRL gathers the reference of [preference] as a whole, and adds up in 16 bits",
            "--sharding",
            "leave it out; with [lora] the reference is the adapters off",
        )
    if kind == "zero2" and recipe.precision != "fp32":
        raise RecipeError(
            "DeepSpeed keeps the weights themselves in 16 bits, which loses small steps",
            "precision",
            'precision = "fp32", or --sharding fsdp2',
        )
    if kind == "fsdp2" and "sft" in stages and recipe.sft is not None and recipe.sft.objective.name == "psft":
        raise RecipeError("psft keeps no old policy of sharded weights", "sft.objective", "train it under DDP")
    if kind != "ddp" and "rl" in stages and recipe.rl is not None and recipe.rl.policy.name == "relift":
        raise RecipeError("ReLIFT's second optimizer is not sharded", "rl.policy", "train it under DDP")


def require_shares(recipe: Recipe, stages: Sequence[str], processes: int) -> None:
    """Raises RecipeError where the steps of a stage cannot be shared by so many processes."""
    if processes == 1:
        return
    if "pretrain" in stages:
        raise RecipeError("a base is made by one process", "pretrain", "make it first, without --gpus: heatbath run …")
    if recipe.sft is not None and "sft" in stages:
        ranks.micro_batches(recipe.sft.batch, recipe.sft.micro_batch, processes, "sft.batch")
    if recipe.preference is not None and "preference" in stages:
        ranks.micro_batches(recipe.preference.batch, recipe.preference.micro_batch, processes, "preference.batch")
    if recipe.rl is not None and "rl" in stages:
        rows = recipe.rl.update_prompts * recipe.rl.group_size
        ranks.micro_batches(rows, recipe.rl.micro_batch, processes, "rl.update_prompts")
    if tuple(stages) == ("eval",) and evaluates_alone(recipe):
        raise RecipeError(
            "vLLM samples from one process of ours, not from several",
            "eval.engine",
            'leave out --gpus, or eval.engine = "transformers"',
        )


def evaluates_alone(recipe: Recipe) -> bool:
    """Whether the evaluation is done by the launcher, after its processes have trained: vLLM starts its own."""
    return recipe.eval.engine == "vllm"


def node() -> int | None:
    """This machine's number among several, as the user or SLURM says."""
    said = os.environ.get("NODE_RANK", os.environ.get("SLURM_NODEID"))
    return None if said is None else int(said)


def configuration(sharding: str) -> Path:
    """The file of accelerate's configuration. Raises RecipeError where there is none."""
    if (named := shipped_folder() / "launch" / f"{sharding}.yaml").is_file():
        return named
    if (given := Path(sharding)).is_file():
        return given
    known = ", ".join(sorted(path.stem for path in named.parent.glob("*.yaml")))
    raise RecipeError(f"no configuration is called '{sharding}'", "--sharding", f"{known}, or a file of accelerate's")


def kind_of(path: Path) -> str:
    """How a configuration of accelerate lays out the weights: "ddp", "fsdp2" or "zero2". Raises RecipeError where it
    does so in another way, or is none."""
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
        kind = KINDS[read["distributed_type"]]
        sharded = read.get("fsdp_config") or {}
        stage = int((read.get("deepspeed_config") or {}).get("zero_stage", 0))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError, AttributeError, KeyError, ValueError):
        raise RecipeError(
            f"no configuration of accelerate for {', '.join(KINDS)}", f"--sharding {path}", "accelerate config"
        ) from None
    if kind == "zero2" and stage != 2:
        why = "ZeRO-3 shards the head, which the engine reads as a whole" if stage == 3 else "no zero_stage is given"
        raise RecipeError(why, f"--sharding {path}", "zero_stage: 2 under deepspeed_config, or fsdp2")
    if kind == "fsdp2" and int(sharded.get("fsdp_version", 1)) != 2:
        raise RecipeError("FSDP1 is not covered", f"--sharding {path}", "fsdp_version: 2 under fsdp_config")
    return kind


def without_options(arguments: Sequence[str]) -> list[str]:
    """The arguments without those that only the launcher reads."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in OPTIONS:
            skip = True
        elif not argument.startswith(tuple(f"{option}=" for option in OPTIONS)):
            kept.append(argument)
    return kept
