"""A whole SFT step (forward, backward, AdamW) on real text: TRL's own, ours, and GIFT under each reference source.

    python benchmarks/sft_step.py                        # SmolLM2-135M, 8 rows of GSM8K, 2 CPU cores: minutes
    python benchmarks/sft_step.py --precision bf16

Rounds alternate between the variants; a ratio is the median over rounds of one variant's time to another's in the same
round, its `cpu` twin the same in CPU-seconds, which other processes disturb less. `base bodies` is the number of models
in memory beside the policy.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import trl
from datasets import Dataset

from heatbath import models
from heatbath.allocator import keep_freed_memory
from heatbath.cache import CachedBase, NeededBy, ReferenceCache, everything
from heatbath.data import rendering, tables
from heatbath.data_sections import Fields
from heatbath.ideas.objectives import objective
from heatbath.reference import FrozenBase, Reference
from heatbath.stages.objective_trainer import ObjectiveTrainer
from heatbath.stages.training import RowCollator

ROWS = Path(__file__).parents[1] / "tests" / "fixtures" / "gsm8k.jsonl"
FIELDS = Fields(solution="answer", answer_after="####")


def rows(tokenizer: Any, count: int) -> list[rendering.Rendered]:
    found = []
    for record, where in list(tables.read_file(ROWS, "fixture"))[:count]:
        (row,) = tables._rows(record, where, FIELDS, ("solution",), 1)
        found.append(rendering.render(tokenizer, row))
    return found


def arguments(folder: str) -> trl.SFTConfig:
    return trl.SFTConfig(
        output_dir=folder,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        report_to="none",
        max_length=None,
        loss_type="nll",
        learning_rate=1e-6,
        dataset_kwargs={"skip_prepare_dataset": True},
    )


def step(trainer: Any, batch: dict[str, Any], tokens: int, precision: torch.dtype | None) -> Callable[[], None]:
    """One optimizer step of a trainer on the batch."""
    trainer.create_optimizer_and_scheduler(num_training_steps=1000)
    trainer.model.train()
    device = trainer.model.device

    def call() -> None:
        inputs = {k: v.to(device) for k, v in batch.items()}
        with torch.autocast(device.type, dtype=precision, enabled=precision is not None):
            loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(tokens, device=device))
        loss.backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return call


def trainers(
    options: argparse.Namespace,
    tokenizer: Any,
    made: list[rendering.Rendered],
    policy: Any,
    base: FrozenBase,
    folder: Path,
    precision: torch.dtype | None,
) -> tuple[dict[str, tuple[Any, int]], int]:
    """Name → trainer and the number of base bodies beside it; and how many tokens' hidden states the cache holds."""
    gift = objective("gift", beta=options.beta)
    hidden = ReferenceCache.of(policy, folder / "hidden", precision)
    hidden.fill(base, made, everything, pad_id=tokenizer.pad_token_id, autocast=precision)
    needed = NeededBy(gift, hidden.vocab_size, options.epsilon)
    known = ReferenceCache.of(policy, folder / "surprise", precision)
    known.fill(base, made, needed, pad_id=tokenizer.pad_token_id, autocast=precision)
    held = sum(len(known.row(r.input_ids, r.labels).held) for r in made)
    given: dict[str, Any] = {
        "train_dataset": Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}]),
        "processing_class": tokenizer,
        "args": arguments(str(folder)),
    }

    def ours(goal: Any, reference: Reference | None) -> ObjectiveTrainer:
        return ObjectiveTrainer(model=copy.deepcopy(policy), objective=goal, reference=reference, **given)

    variants = {
        "TRL SFT (nll)": (trl.SFTTrainer(model=copy.deepcopy(policy), **given), 0),
        "sft": (ours(objective("sft"), None), 0),
        "gift, frozen model": (ours(gift, base), 1),
        "gift, hidden cache": (ours(gift, CachedBase(hidden)), 0),
        "gift, surprise cache": (ours(gift, CachedBase(known)), 0),
    }
    return variants, held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", action="append", help="only this variant; may be repeated")
    parser.add_argument("--beta", type=float, default=10.0)
    parser.add_argument("--epsilon", type=float, default=1e-3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--commit", default="", help="written into the result")
    options = parser.parse_args()
    keep_freed_memory()
    precision = torch.bfloat16 if options.precision == "bf16" else None
    tokenizer = models.load_tokenizer(options.model)
    made = rows(tokenizer, options.rows)
    batch = RowCollator(tokenizer.pad_token_id)([{"input_ids": r.input_ids, "labels": r.labels} for r in made])
    tokens = sum(r.supervised for r in made)
    policy = models.load_model(options.model, torch.float32)
    base = FrozenBase(copy.deepcopy(policy))
    policy.requires_grad_(True)
    with tempfile.TemporaryDirectory() as folder:
        variants, held = trainers(options, tokenizer, made, policy, base, Path(folder), precision)
        variants = {name: v for name, v in variants.items() if not options.only or name in options.only}
        calls = {name: step(trainer, batch, tokens, precision) for name, (trainer, _) in variants.items()}
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        busy: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(options.rounds + 1):  # the first warms up
            for name, call in calls.items():
                started, used = time.perf_counter(), time.process_time()
                call()
                if number:
                    seconds[name].append(time.perf_counter() - started)
                    busy[name].append(time.process_time() - used)
                print(f"round {number} {name}: {time.perf_counter() - started:.2f} s", file=sys.stderr)

    def ratio(times: dict[str, list[float]], name: str, to: str) -> float | None:
        if to not in times:
            return None
        return round(statistics.median(a / b for a, b in zip(times[name], times[to], strict=True)), 3)

    facts = {
        "command": " ".join(["python", "benchmarks/sft_step.py", *sys.argv[1:]]),
        "commit": options.commit,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "trl": trl.__version__},
        "batch": {"rows": len(made), "shape": list(batch["input_ids"].shape), "supervised": tokens, "held": held},
        "rows": [
            {
                "variant": name,
                "seconds": round(statistics.median(times), 3),
                "to TRL": ratio(seconds, name, "TRL SFT (nll)"),
                "to sft": ratio(seconds, name, "sft"),
                "cpu to TRL": ratio(busy, name, "TRL SFT (nll)"),
                "cpu to sft": ratio(busy, name, "sft"),
                "base bodies": variants[name][1],
            }
            for name, times in seconds.items()
        ],
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
