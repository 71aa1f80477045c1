"""One process against two on the same cores: the same losses to 5 digits, and tokens per second.

    python benchmarks/scaling.py [--model tiny] [--rounds 3] [--out benchmarks/results/scaling-NAME.json]

Rounds alternate between one process with all threads and two with half of them each, on `heatbath sft` of 20 steps
under GIFT. A ratio is the median over rounds of the two's tokens per second to the one's in the same round, each the
median over its steps but the first three.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from made_with import made_with

STEPS, WARM = 20, 3
RECIPE = """
model = "{model}"
precision = "fp32"
[data]
source = "arithmetic"
demos = {rows}
validation = 0
prompts = 0
test = 0
[sft]
objective = {{ name = "gift", beta = 8.0 }}
lr = 1e-4
epochs = 100
max_steps = {steps}
batch = {batch}
micro_batch = {micro}
save_every = 0
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--micro", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    text = RECIPE.format(model=asked.model, rows=8 * asked.batch, steps=STEPS, batch=asked.batch, micro=asked.micro)
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "r.toml").write_text(text)
        for number in range(asked.rounds):
            found = {processes: measured(Path(folder), processes, number) for processes in (1, 2)}
            rounds.append(found)
            print(
                f"round {number + 1}: 1 process {found[1]['tokens_per_second']:,.0f} tokens/s, 2 processes "
                f"{found[2]['tokens_per_second']:,.0f}; losses differ by {furthest(found):.1e} at most"
            )
    ratios = [found[2]["tokens_per_second"] / found[1]["tokens_per_second"] for found in rounds]
    record = {
        **made_with(
            f"python benchmarks/scaling.py --model {asked.model} --batch {asked.batch} --micro {asked.micro} "
            f"--rounds {asked.rounds}"
        ),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "largest relative difference of a loss": max(map(furthest, rounds)),
        "rounds": rounds,
    }
    print(f"tokens/s of 2 processes to 1: {record['ratio']:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    if asked.out:
        asked.out.write_text(json.dumps(record, indent=1) + "\n")


def measured(folder: Path, processes: int, number: int) -> dict[str, Any]:
    """Losses of a run of so many processes, and its tokens per second."""
    out = f"{processes}-{number}"
    threads = max(1, (os.cpu_count() or 1) // processes)
    line = [sys.executable, "-m", "heatbath", "sft", "r.toml", "--gpus", str(processes), "--out", out]
    subprocess.run(
        line, cwd=folder, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True, capture_output=True
    )
    rows = [json.loads(row) for row in (folder / out / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "objective" in row]
    return {
        "losses": [row["objective"] for row in rows],
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in rows[WARM:]),
    }


def furthest(found: dict[int, dict[str, Any]]) -> float:
    return max(abs(b / a - 1) for a, b in zip(found[1]["losses"], found[2]["losses"], strict=True))


if __name__ == "__main__":
    main()
