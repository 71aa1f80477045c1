"""A GRPO generation (sampling, grading, log-probabilities, updates): ours and plain TRL's with the same settings.

    python benchmarks/rl_step.py                       # SmolLM2-135M, 4 prompts × 8 completions, 2 CPU cores: minutes
    python benchmarks/rl_step.py --memory              # peak resident memory of each, in processes of their own

Both start from the same weights with the same seed and so train on the same completions. Rounds alternate between the
two; a ratio is the median over rounds of ours to TRL's in the same round, its `cpu` twin the same in CPU-seconds, which
other processes disturb less.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import trl
from datasets import Dataset
from transformers import PrinterCallback

from heatbath import models
from heatbath.allocator import keep_freed_memory
from heatbath.data import arithmetic
from heatbath.ideas.policy import policy
from heatbath.stages.policy_trainer import PolicyTrainer
from heatbath.stages.rewards import verdict_reward
from heatbath.verify.math import MathGrader

PHASES = {"_generate_single_turn": "sampling", "_calculate_rewards": "grading"}
LOGPS = {"TRL": "_get_per_token_logps_and_entropies", "heatbath": "logps"}


def arguments(options: argparse.Namespace, folder: str) -> trl.GRPOConfig:
    per_step = options.prompts * options.group // options.updates // options.micro
    return trl.GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=options.micro,
        gradient_accumulation_steps=per_step,
        steps_per_generation=per_step * options.updates,
        num_generations=options.group,
        max_completion_length=options.tokens,
        max_steps=options.updates,
        scale_rewards="none",
        beta=0.0,
        learning_rate=1e-6,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )


def build(name: str, options: argparse.Namespace, model: Any, tokenizer: Any, grader: MathGrader, folder: str) -> Any:
    sums = arithmetic.problems(2, ("+",), 4 * options.prompts, 0, held_out=False)
    rows = list(arithmetic.rows(sums, ("tens",), paths=1, label_noise=0.0, seed=0))
    # Prompts of different length, as real ones are: every other one says where it stands.
    texts = [f"{'Take your time. ' * (i % 4)}{row.question}" for i, row in enumerate(rows)]
    prompts = [[{"role": "user", "content": text}] for text in texts]
    cls, own = (PolicyTrainer, {"policy": policy("paper")}) if name == "heatbath" else (trl.GRPOTrainer, {})
    trainer = cls(
        model=copy.deepcopy(model),
        args=arguments(options, folder),
        train_dataset=Dataset.from_dict({"prompt": prompts, "gold": [row.answer for row in rows]}),
        processing_class=tokenizer,
        reward_funcs=[verdict_reward(grader)],
        **own,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def generation(name: str, trainer: Any) -> dict[str, float]:
    """Seconds of one generation with its updates, by phase; and its completion tokens."""
    spent: dict[str, float] = defaultdict(float)

    def timed(method: str, phase: str) -> None:
        call: Callable[..., Any] = getattr(trainer, method)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if name == "TRL" and torch.is_grad_enabled() and phase == "log-probs":  # its training forward pass
                return call(*args, **kwargs)
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                spent[phase] += time.perf_counter() - started

        setattr(trainer, method, wrapped)

    for method, phase in {**PHASES, LOGPS[name]: "log-probs"}.items():
        timed(method, phase)
    started, used = time.perf_counter(), time.process_time()
    trainer.train()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    spent["total"], spent["cpu"] = time.perf_counter() - started, time.process_time() - used
    spent["update"] = spent["total"] - spent["sampling"] - spent["grading"] - spent["log-probs"]
    spent["tokens"] = float(sum(int(batch["completion_mask"].sum()) for batch in trainer._buffered_inputs))
    return dict(spent)


def peak(name: str, options: argparse.Namespace) -> float:
    """Peak resident GiB of a process that runs one generation (on a GPU: peak allocated)."""
    command = [sys.executable, __file__, "--child", name]
    command += [
        f"--{key}={getattr(options, key)}" for key in ("model", "prompts", "group", "micro", "updates", "tokens")
    ]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1])


def child(name: str, options: argparse.Namespace) -> None:
    model, tokenizer = models.load_model(options.model, torch.float32), models.load_tokenizer(options.model)
    with tempfile.TemporaryDirectory() as folder, MathGrader(workers=1) as grader:
        generation(name, build(name, options, model, tokenizer, grader, folder))
    if torch.cuda.is_available():
        print(torch.cuda.max_memory_allocated() / 2**30)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prompts", type=int, default=4, help="of one generation")
    parser.add_argument("--group", type=int, default=8, help="completions of a prompt")
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--updates", type=int, default=2, help="optimizer steps of one generation")
    parser.add_argument("--tokens", type=int, default=48, help="most of a completion")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--commit", default="", help="written into the result")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep_freed_memory()
    if options.child:
        child(options.child, options)
        return
    facts: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/rl_step.py", *sys.argv[1:]]),
        "commit": options.commit,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "trl": trl.__version__},
    }
    names = list(LOGPS)
    if options.memory:
        found = {name: peak(name, options) for name in names}
        facts |= {"peak GiB": found, "ratio": round(found["heatbath"] / found["TRL"], 3)}
        print(json.dumps(facts, indent=1))
        return
    model, tokenizer = models.load_model(options.model, torch.float32), models.load_tokenizer(options.model)
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with MathGrader(workers=1) as grader:
        for number in range(options.rounds + 1):  # the first warms up
            for name in names if number % 2 else names[::-1]:
                with tempfile.TemporaryDirectory() as folder:
                    found = generation(name, build(name, options, model, tokenizer, grader, folder))
                print(f"round {number} {name}: {found['total']:.2f} s", file=sys.stderr)
                if number:
                    measured[name].append(found)
    keys = ("total", "cpu", "sampling", "grading", "log-probs", "update")
    pairs = list(zip(measured["heatbath"], measured["TRL"], strict=True))
    facts |= {
        "completion tokens": {name: rows[0]["tokens"] for name, rows in measured.items()},
        "seconds": {
            n: {k: round(statistics.median(r[k] for r in rows), 3) for k in keys} for n, rows in measured.items()
        },
        "ratio": {k: round(statistics.median(a[k] / b[k] for a, b in pairs), 3) for k in keys if pairs[0][1][k] > 0},
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
