"""RL with demonstrations on the tiny base, from recipes/guided.toml: what docs/results/guided.md quotes.

    python benchmarks/guided.py --out runs/guided            # luffy, relift, trapo, uft and RL without demonstrations
    python benchmarks/guided.py --out runs/guided --show     # what is there

8 answers to each of 200 held-out sums at T = 1, before and after; differences are paired over problems.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

# The same loss on the policy's own tokens, with and without demonstrations.
PLAIN = [
    "rl.policy.name=paper",
    "rl.policy.surrogate=linear",
    "rl.policy.reduction=sum_over_width",
    "rl.policy.entropy=0.001",
]
CELLS = {
    "none": PLAIN,
    "luffy": ["rl.policy.name=luffy"],
    "relift": ["rl.policy.name=relift", "rl.policy.sft_batch=16", "rl.policy.sft_lr=3e-4"],
    "trapo": ["rl.policy.name=trapo"],
    "uft": ["rl.policy.name=uft", "rl.policy.hint_steps=18"],
}
LOGGED = (
    "reward",
    "expert_share",
    "expert_reward",
    "buffer",
    "sft_nll",
    "sft_grad_norm",
    "grad_norm",
    "entropy",
    "kl_init",
)


def run(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run, or what it left when it was done before."""
    folder = options.out / f"{name}-{seed}"
    if not (folder / "results.json").exists():
        command = [
            sys.executable,
            "-m",
            "heatbath",
            "run",
            "guided",
            f"model={options.model}",
            f"seed={seed}",
            *CELLS[name],
        ]
        command += ["precision=fp32", "rl.readiness=0", "--out", str(folder)]
        command += ["--resume"] if (folder / "env.json").exists() else []
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{folder.name}: {done.stderr.strip()[-2000:]}")
    results = json.loads((folder / "results.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rl = [row for row in rows if row["stage"] == "rl"]
    return {
        "pass": {policy: found["pass"] for policy, found in results["policies"].items()},
        "differences": results["differences"],
        "seconds": max(r["time"] for r in rl) - min(r["time"] for r in rl),
        "steps": max(r["step"] for r in rl),
        "held_out": [(r["step"], r["held_out/right"]) for r in rl if "held_out/right" in r],
        **{key: [r[key] for r in rl if key in r] for key in LOGGED if any(key in r for r in rl)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/guided"))
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--only", action="append", choices=list(CELLS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--show", action="store_true", help="print what is there; nothing is run")
    parser.add_argument("--commit", default="", help="written into the result")
    options = parser.parse_args()
    found = {}
    for seed in range(options.seeds):
        for name in options.only or CELLS:
            if options.show and not (options.out / f"{name}-{seed}" / "results.json").exists():
                continue
            found[f"{name}-{seed}"] = made = run(name, seed, options)
            one = {policy: round(passed["1"]["mean"], 3) for policy, passed in made["pass"].items()}
            print(f"{name}-{seed} {one} {made['seconds']:.0f} s", file=sys.stderr, flush=True)
    facts = {
        "command": " ".join(["python", "benchmarks/guided.py", *sys.argv[1:]]),
        "commit": options.commit,
        "device": platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__},
        "cells": found,
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
