"""The checks of Group-relative Implicit Fine-Tuning (arXiv 2510.23868) on the tiny base, for docs/results/implicit.md.

    python benchmarks/implicit.py --out runs/implicit                    # everything, three seeds; resumes
    python benchmarks/implicit.py --out runs/implicit --only grpo --only implicit --seeds 1
    python benchmarks/implicit.py --out runs/implicit --show > found.json  # what is there; implicit_figures.py draws it

A cell is a run folder of its own (RL or preference learning, then 4 answers to each of 200 held-out sums at T = 1). A
seed changes prompts, starts and draws alike; the held-out sums are always the same, also where rates were chosen
(--tune). `seconds` is the sum of the steps' own time, held-out answers left out.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from heatbath import models
from heatbath import recipe as recipes
from heatbath.data import sources
from heatbath.data.preferences import pairs_from_samples
from heatbath.data.rendering import prompt_ids
from heatbath.run import Run

LR = {"implicit": 1.5e-4, "grpo": 3e-4, "dpo": 6e-5, "una": 2e-6}  # chosen with --tune, on seed 100
STEPS = 24
GROUPS = (2, 4, 8, 16, 32)
DATA = {"source": "arithmetic", "demos": 0, "validation": 0, "prompts": 768, "test": 200}
RL = {"prompts": 32, "update_prompts": 32, "group_size": 8, "micro_batch": 128, "max_new_tokens": 40, "epochs": 10}
RL |= {"max_steps": STEPS, "eval_every": 4, "eval_prompts": 200, "readiness": 0, "save_every": 0}
EVAL = {"samples": 4, "k": [1, 4], "temperature": 1.0, "max_new_tokens": 40, "batch": 400}
# Starts whose completions differ little, and much, in length within a group.
LENGTHS = {"narrow": ["tens"], "wide": ["bare", "columns"]}
SFT = {"objective": "sft", "lr": 3e-4, "epochs": 2, "batch": 16, "micro_batch": 16, "save_every": 0}


def cells() -> dict[str, dict[str, Any]]:
    """Name → tables of its recipe beside the common ones."""
    made: dict[str, dict[str, Any]] = {
        "grpo": {"rl": {"policy": "grpo"}},
        "implicit": {"rl": {"policy": {"name": "implicit"}}},
        "kl_mean": {"rl": {"policy": {"name": "implicit", "score": "kl_mean"}}},
        "dpo": {"preference": {"method": "dpo", "data": "pairs"}},
        "una": {"preference": {"method": "una", "data": "labels"}},
        "reward_model": {"rl": {"policy": "implicit"}, "reward": {"model": "reward-model"}},
    }
    for n in GROUPS:
        half = {
            "group_size": n,
            "prompts": 24,
            "update_prompts": 24,
            "micro_batch": 48,
            "max_steps": 16,
            "eval_every": 0,
        }
        made[f"n{n}"] = {"rl": {"policy": "implicit", **half}}
    for name, forms in LENGTHS.items():
        for score in ("kl_sum", "kl_mean"):
            made[f"{name}-{score}"] = {
                "data": {"forms": forms, "demos": 192, "validation": 32},
                "sft": SFT,
                "rl": {"policy": {"name": "implicit", "score": score}, "max_steps": 16, "eval_every": 0},
            }
    return made


def recipe(model: str, tables: dict[str, Any], seed: int, beside: Path, lr: dict[str, float]) -> recipes.Recipe:
    made: dict[str, Any] = {"model": model, "seed": seed, "precision": "fp32", "eval": EVAL}
    made["data"] = DATA | tables.get("data", {})
    if "sft" in tables:
        made["sft"] = tables["sft"]
    if "rl" in tables:
        spec = tables["rl"]["policy"]
        name = spec if isinstance(spec, str) else spec["name"]
        made["rl"] = RL | {"lr": lr[name]} | tables["rl"]
    if "preference" in tables:
        own = tables["preference"]
        made["data"]["prompts"] = 0
        made["preference"] = own | {
            "data": str(beside / f"{own['data']}.jsonl"),
            "lr": lr[own["method"]],
            "epochs": 3,
            "batch": 32,
            "micro_batch": 32,
            "save_every": 0,
        }
    if "reward" in tables:
        made["reward"] = {"model": str(beside / tables["reward"]["model"])}
    return recipes.parse(made)


def run(folder: Path, made: recipes.Recipe) -> None:
    """One cell, unless it was done before."""
    if (folder / "results.json").exists():
        return
    path = folder.with_suffix(".toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(recipes.as_toml(made))
    command = [sys.executable, "-m", "heatbath", "run", str(path), "--out", str(folder)]
    command += ["--resume"] if (folder / "env.json").exists() else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{folder.name}: {done.stderr.strip()[-2000:]}")


def samples_of_the_base(model: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    """8 graded answers of the base to each of the problems that RL of this seed trains on."""
    problems = folder / "problems.jsonl"
    if not problems.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rows = sources.load(recipes.parse({"model": model, "seed": seed, "data": DATA}).data, seed).prompts
        problems.write_text("".join(json.dumps({"question": r.question, "answer": r.answer}) + "\n" for r in rows))
    asked = {"source": "files", "folder": str(folder.absolute()), "test_from": "problems.jsonl"}
    made = {
        "model": model,
        "seed": seed,
        "precision": "fp32",
        "data": asked,
        "eval": EVAL | {"samples": 8, "k": [1, 8]},
    }
    run(folder / "base", recipes.parse(made))
    return Run.read(folder / "base").samples("base")


def prepare(model: str, seed: int, folder: Path) -> None:
    """What the offline methods and the reward model learn from: the same samples of the base for all of them."""
    if (folder / "reward-model" / "accuracy.json").exists():
        return
    samples = samples_of_the_base(model, seed, folder)
    lines = [json.dumps(row) for row in pairs_from_samples(samples, per_problem=4, seed=seed)]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    kept = [s for s in samples if s["finished"] and s["status"] in ("right", "wrong") and s["completion"].strip()]
    labels = [{"question": s["question"], "response": s["completion"], "label": s["status"] == "right"} for s in kept]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labels))
    train_reward_model(model, kept, seed, folder / "reward-model")


def train_reward_model(model: str, samples: list[dict[str, Any]], seed: int, folder: Path) -> None:
    """A classifier of right and wrong on the tiny base's body; a fifth of the problems tells its accuracy."""
    torch.manual_seed(seed)
    tokenizer = models.load_tokenizer(model)
    name = models.resolve(model)
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(
        name, num_labels=1, dtype=torch.float32
    )
    classifier.config.pad_token_id = tokenizer.pad_token_id
    problems = sorted({s["problem"] for s in samples})
    random.Random(seed).shuffle(problems)
    held_out = set(problems[: len(problems) // 5])

    def row(sample: dict[str, Any]) -> tuple[list[int], float]:
        asked = prompt_ids(tokenizer, [{"role": "user", "content": sample["question"]}])
        answer = tokenizer.encode(sample["completion"], add_special_tokens=False)
        return [*asked, *answer, tokenizer.eos_token_id], float(sample["status"] == "right")

    train = [row(s) for s in samples if s["problem"] not in held_out]
    test = [row(s) for s in samples if s["problem"] in held_out]

    def scores(rows: list[tuple[list[int], float]]) -> torch.Tensor:
        width = max(len(ids) for ids, _ in rows)
        pad = tokenizer.pad_token_id
        ids = torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids, _ in rows])
        mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
        hidden = classifier.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return classifier.score(hidden[torch.arange(len(rows)), mask.sum(1) - 1])[:, 0]

    epochs, batch = 8, 64
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=5e-4, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, total_steps=epochs * -(-len(train) // batch))
    order = random.Random(seed)
    for _ in range(epochs):
        order.shuffle(train)
        for start in range(0, len(train), batch):
            rows = train[start : start + batch]
            target = torch.tensor([y for _, y in rows])
            loss = torch.nn.functional.binary_cross_entropy_with_logits(scores(rows), target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        found = torch.cat([scores(test[i : i + 256]) for i in range(0, len(test), 256)])
    right = torch.tensor([y for _, y in test])
    accuracy = float(((found > 0) == right.bool()).float().mean())
    classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = {"accuracy": accuracy, "of_always_no": float(1 - right.mean()), "rows": len(train), "held_out": len(test)}
    (folder / "accuracy.json").write_text(json.dumps(facts))


def measured(folder: Path) -> dict[str, Any]:
    """What a finished cell shows: scores, and its curves."""
    results = json.loads((folder / "results.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rl = [row for row in rows if row["stage"] == "rl"]
    steps = [row for row in rl if "reward" in row]
    held = [row for row in rl if "held_out/right" in row]
    final = results["policies"]["final"]
    out: dict[str, Any] = {
        "pass@1": final["pass"]["1"]["mean"],
        "pass@4": final["pass"]["4"]["mean"],
        "start pass@1": results["policies"]["init" if "init" in results["policies"] else "base"]["pass"]["1"]["mean"],
        "tokens": final["mean_tokens"],
        "truncated": final["truncated_share"],
    }
    if steps:
        out["seconds"] = sum(r["step_seconds"] for r in rl if "step_seconds" in r)
        for key in (
            "reward",
            "verdict/right",
            "completion_tokens",
            "grad_norm",
            "score_deviation",
            "kl_init",
            "entropy",
        ):
            out[key] = [r[key] for r in steps if key in r]
        out["held_out"] = [(r["step"], r["held_out/right"], r["held_out/tokens"]) for r in held]
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/implicit"))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--only", action="append", choices=list(cells()))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--tune", action="store_true", help="learning rates on seed 100 instead")
    parser.add_argument("--show", action="store_true", help="print what is there; nothing is run")
    parser.add_argument("--commit", default="", help="written into the result")
    options = parser.parse_args()
    names = options.only or list(cells())
    if not options.show:
        for seed in [100] if options.tune else range(options.first_seed, options.first_seed + options.seeds):
            beside = options.out / f"samples-{seed}"
            for name in names:
                tables = cells()[name]
                if "preference" in tables or "reward" in tables:
                    prepare(options.model, seed, beside)
                for factor in (0.5, 1, 2) if options.tune else (1,):
                    lr = {key: value * factor for key, value in LR.items()}
                    suffix = f"-x{factor:.2g}" if options.tune else ""
                    folder = options.out / f"{name}-{seed}{suffix}"
                    run(folder, recipe(options.model, tables, seed, beside, lr))
                    print(
                        folder.name, {k: v for k, v in measured(folder).items() if not isinstance(v, list)}, flush=True
                    )
        return
    facts = {
        "command": "python benchmarks/implicit.py",
        "commit": options.commit,
        "device": platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "learning rates": LR,
        "reward models": {
            p.parent.parent.name: json.loads(p.read_text()) for p in options.out.glob("*/reward-model/accuracy.json")
        },
        "cells": {p.parent.name: measured(p.parent) for p in sorted(options.out.glob("*/results.json"))},
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
