"""Whole stages of real recipes, run by one process or by each of several: what they leave must not tell which.

As a program it is one rank of the second kind: `torchrun --nproc-per-node 2 whole_stages.py FOLDER BASE COMPLETIONS`,
with `fsdp2` or `zero2` behind it one of those that share the weights, or gradients and optimizer, too.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import sharding_on_cpu
import torch

from heatbath import ranks
from heatbath import recipe as recipes
from heatbath.progress import Progress
from heatbath.recipe import Recipe
from heatbath.run import Run
from heatbath.stages.evaluate import run_evaluation
from heatbath.stages.policy_trainer import PolicyTrainer
from heatbath.stages.rl import run_rl
from heatbath.stages.sft import run_sft

STEPS = 20
GIFT = {"name": "gift", "beta": 4.0}
STARTS = {
    "sft": {"objective": "sft"},
    "gift, model": {"objective": GIFT},
    "gift, hidden": {"objective": GIFT, "reference": "hidden"},
    "gift, surprise": {"objective": GIFT, "reference": "surprise"},
    "gift, lora": {"objective": GIFT},
}
SHARDED = ("sft", "gift, model", "gift, surprise")


def warm_start(name: str, base: str) -> Recipe:
    return recipes.parse(
        {
            "model": base,
            "precision": "fp32",
            "data": {"source": "arithmetic", "digits": 3, "demos": 32, "validation": 6, "prompts": 0, "test": 6},
            "sft": {"lr": 3e-3, "epochs": 10, "batch": 16, "micro_batch": 4, "save_every": 0, **STARTS[name]},
            "lora": {"rank": 4, "alpha": 8} if name.endswith("lora") else None,
            "eval": {"samples": 2, "k": [1, 2], "max_new_tokens": 12},
        }
    )


def reinforcement(base: str) -> Recipe:
    return recipes.parse(
        {
            "model": base,
            "precision": "fp32",
            "data": {"source": "arithmetic", "digits": 3, "demos": 0, "validation": 0, "prompts": 40, "test": 6},
            "sft": None,
            "rl": {
                "policy": "grpo",
                "lr": 1e-3,
                "epochs": 2,
                "prompts": 4,
                "update_prompts": 4,
                "group_size": 4,
                "micro_batch": 4,
                "max_new_tokens": 12,
                "readiness": 0,
                "save_every": 0,
            },
        }
    )


@contextmanager
def replayed(kept: list) -> Iterator[None]:
    """Completions of each generation are those in `kept`, [generation][row]; where it is empty they are sampled and
    put there. An answer to learn from is among them: each group's first row gets the gold solution."""
    sample, recording, seen = PolicyTrainer._generate_single_turn, not kept, iter(range(10**6))

    def turn(trainer, prompt_ids, *args, **kwargs):
        if recording:
            ids, logps = sample(trainer, prompt_ids, *args, **kwargs)
            for row in range(0, len(ids), trainer.num_generations):
                answer = str(trainer._asked[row]["gold"])
                ids[row] = [*trainer.processing_class.encode(f"#### {answer}", add_special_tokens=False), 1]
            kept.append([list(map(int, one)) for one in ids])
            return ids, logps
        generation, size = kept[next(seen)], len(prompt_ids)
        return generation[ranks.rank() * size : (ranks.rank() + 1) * size], None

    PolicyTrainer._generate_single_turn = turn
    try:
        yield
    finally:
        PolicyTrainer._generate_single_turn = sample


def run_in_16_bits(folder: Path, base: str) -> None:
    """A warm start in bf16, and two steps of RL on completions of its own, of which some end early."""
    quiet, short = Progress(quiet=True), {"precision": "bf16"}
    recipe = recipes.parse(warm_start("gift, model", base).model_dump() | short)
    run = Run(folder / "bf16", recipe).write()
    ranks.wait()
    run_sft(run, recipe, quiet)
    table = reinforcement(base).model_dump() | short
    recipe = recipes.parse(table | {"rl": table["rl"] | {"max_steps": 2, "max_new_tokens": 60}})
    run = Run(folder / "bf16-rl", recipe).write()
    ranks.wait()
    run_rl(run, recipe, quiet)


def run_all(folder: Path, base: str, kept: list, starts: Sequence[str] = tuple(STARTS)) -> None:
    """Warm starts, one of them with its evaluation, and RL on the completions kept (where there are none, its own)."""
    quiet = Progress(quiet=True)
    for name in starts:
        recipe = warm_start(name, base)
        run = Run(folder / name, recipe).write()
        ranks.wait()
        run_sft(run, recipe, quiet)
        if name == "sft":
            run_evaluation(run, recipe, quiet)
    recipe = reinforcement(base)
    run = Run(folder / "rl", recipe).write()
    ranks.wait()
    with replayed(kept):
        run_rl(run, recipe, quiet)


if __name__ == "__main__":
    if sharded := sys.argv[4:]:
        sharding_on_cpu.allow(*sharded)
    ranks.join()
    completions = json.loads(Path(sys.argv[3]).read_text())
    run_all(Path(sys.argv[1]), sys.argv[2], completions, SHARDED if sharded else tuple(STARTS))
    if sharded == ["fsdp2"]:
        run_in_16_bits(Path(sys.argv[1]), sys.argv[2])
        assert not sharding_on_cpu.DEFERRED, "whole gradients were kept from micro-batch to micro-batch"
    torch.distributed.destroy_process_group()
