"""Every objective as a warm start of the tiny base, then the same RL from each: what docs/objectives quotes.

    python benchmarks/objectives.py --out runs/objectives            # all objectives, seeds 0 and 1; resumes
    python benchmarks/objectives.py --out runs/objectives --only sft --only gift

Each run is recipes/smoke.toml with another objective and a longer RL; 100 held-out sums × 16 samples at T = 1. Two
seeds tell how far a seed alone moves these numbers, not which objective is the better one.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

from heatbath.ideas.objectives import OBJECTIVES

RECIPE = ["data.test=100", "eval.samples=16", "eval.k=[1,16]", "rl.epochs=2"]
HYPER = {
    "gift": ["sft.objective.beta=8.0"],
    "power": ["sft.objective.a=1.0"],
}
SKIPPED = {"pear": "needs the log-probabilities of whoever wrote the demonstrations; these are written by rule"}
NONE = "none"  # RL straight from the base


def run(name: str, seed: int, out: Path) -> dict:
    """One run, or what it left when it was done before."""
    folder = out / f"{name}-{seed}"
    if not (folder / "results.json").exists():
        objective = [f"sft.objective.name={name}", *HYPER.get(name, [])]
        recipe = without_sft(out) if name == NONE else "smoke"
        command = [sys.executable, "-m", "heatbath", "run", recipe, *RECIPE, f"seed={seed}", "--out", str(folder)]
        command += [] if name == NONE else objective
        command = [c for c in command if not (name == NONE and c.startswith("sft."))]
        command += ["--resume"] if folder.exists() else []
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return {"objective": name, "seed": seed, "failed": done.stderr.strip().splitlines()[-3:]}
    results = json.loads((folder / "results.json").read_text())["policies"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validated = [row["val/nll"] for row in rows if "val/nll" in row]
    entropy = [row["entropy"] for row in rows if row["stage"] == "rl"]
    return {
        "objective": name,
        "seed": seed,
        "val_nll": round(validated[-1], 4) if validated else None,
        "entropy_at_rl_start": round(entropy[0], 4),
        **{
            f"{policy}_pass@{k}": round(found["pass"][k]["mean"], 4)
            for policy, found in results.items()
            for k in ("1", "16")
        },
    }


def without_sft(out: Path) -> str:
    """The smoke recipe without its warm start."""
    from heatbath.recipe import as_toml, load

    path = out / "none.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_toml(load("smoke").model_copy(update={"sft": None})))
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--only", action="append", choices=[NONE, *OBJECTIVES])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--commit", default="", help="written into the result")
    options = parser.parse_args()
    names = options.only or [NONE, *(name for name in OBJECTIVES if name not in SKIPPED)]
    rows = []
    for seed in range(options.seeds):
        for name in names:
            rows.append(run(name, seed, options.out))
            print(rows[-1], file=sys.stderr, flush=True)
    facts = {
        "command": " ".join(["python", "benchmarks/objectives.py", *sys.argv[1:]]),
        "commit": options.commit,
        "machine": platform.processor() or platform.machine(),
        "recipe": ["smoke", *RECIPE],
        "skipped": SKIPPED,
        "rows": rows,
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
