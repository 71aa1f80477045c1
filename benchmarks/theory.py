"""How far the starts are from the exact Gibbs start, and what RL makes of them, where all answers are listed.

    python benchmarks/theory.py --bases 40 --out benchmarks/results/theory-NAME.json [--figures docs/images]

Bases of 4 tokens × 4 positions with random next-token logits; n of the 256 answers are valid. The exact start is the
base lifted so that it takes a valid answer half of the time. Every other start learns from one of the valid answers or
from all of them, to the least of its loss, and at the setting, of a grid, that brings it nearest to the exact start:
GIFT's β, gift_sequence's mass, the point at which SFT is stopped. "sft, fitted" goes on until the answers cost 0.05
nats more than they must. The formulas are those of tests/ideas/enumerable.py. About fifteen minutes on one core.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from made_with import made_with

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "ideas"))

import numpy as np
import torch
from enumerable import (
    climbed,
    descended,
    distance,
    gibbs,
    learned,
    paths,
    random_base,
    reward,
    sequence_mass,
    token_mass,
)

from heatbath.ideas.gift import Gift, GiftSequence
from heatbath.ideas.intervals import mean_with_interval
from heatbath.report.drawing import frame, label_ends, run_looks, standalone, style, svg

VOCAB, LENGTH, SPREAD = 4, 4, 1.5
VALID = (1, 2, 4, 8, 16, 32)
HALF, STRENGTH = 0.5, 3.0  # how often the exact start is right; 1/KL of the RL after it, in nats
BETAS = [b / 4 for b in range(61)]
MASSES = [m / 40 for m in range(1, 40)]
STOPS = [8.0, 6.0, 5.0, 4.0, 3.0, 2.5, 2.0, 1.5, 1.0, 0.7, 0.5, 0.3, 0.2, 0.1]  # nats an answer above the least
RIGHT = 0.99  # where RL without KL ends
WARM = ("sft", "gift", "gift_sequence")
SHORT = {"gift_sequence": "sequence"}


def of_base(seed: int, valid: int) -> list[dict[str, Any]]:
    """One row for each start: its gap, its right answers, its paths; the same after RL with KL and without."""
    base = random_base(VOCAB, LENGTH, SPREAD, torch.Generator().manual_seed(seed))
    right = random.Random(seed).sample(list(itertools.product(range(VOCAB), repeat=LENGTH)), valid)
    r = reward(right, base)
    success = float((base.exp() * r).sum())
    beta = max(0.0, math.log(HALF / (1 - HALF)) - math.log(success / (1 - success)))
    exact, end = gibbs(base, r, beta), gibbs(base, r, beta + STRENGTH)
    starts = {("none", "base"): base, ("none", "exact"): exact}
    for shown, demos in (("one", right[:1]), ("all", right)):
        fitted = descended(base, demos, 0.05)
        stopped = [base, *(descended(base, demos, nll) for nll in STOPS), fitted]
        starts[shown, "sft"] = min(stopped, key=lambda start: distance(exact, start))
        starts[shown, "sft, fitted"] = fitted
        tokens = {b: learned(base, demos, token_mass(Gift(b))) for b in BETAS}
        whole = {m: learned(base, demos, sequence_mass(GiftSequence(m))) for m in MASSES}
        starts[shown, "gift"] = min(tokens.values(), key=lambda start: distance(exact, start))
        starts[shown, "gift_sequence"] = min(whole.values(), key=lambda start: distance(exact, start))
        starts[shown, "gift, same β"] = learned(base, demos, token_mass(Gift(beta)))
    return [
        {"seed": seed, "valid": valid, "demonstrations": shown, "start": name}
        | {"gap": distance(exact, start), "right": float((start.exp() * r).sum()), "paths": paths(start, r)}
        | {"gap after RL": distance(end, gibbs(start, r, STRENGTH))}
        | {"paths after RL without KL": paths(climbed(start, r, RIGHT), r)}
        for (shown, name), start in starts.items()
    ]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the bases with 95 % t intervals."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["demonstrations"], row["start"], row["valid"]].append(row)
    out = []
    for (shown, name, valid), own in groups.items():
        found: dict[str, Any] = {"demonstrations": shown, "start": name, "valid": valid}
        for key in ("gap", "gap after RL", "right", "paths", "paths after RL without KL"):
            e = mean_with_interval(np.array([row[key] for row in own]))
            found[key] = {
                "mean": e.mean,
                "low": e.low,
                "high": e.high,
                "median": statistics.median(r[key] for r in own),
            }
        out.append(found)
    return out


def drawn(found: list[dict[str, Any]], key: str, ylabel: str, lines: dict[str, tuple[str, str]]) -> str:
    """A number over the count of valid answers, one line for each (demonstrations, start)."""
    with style():
        figure, axes = frame((4.9, 3.1))
        ends = []
        for look in run_looks(list(lines)):
            own = [row for row in found if (row["demonstrations"], row["start"]) == lines[look.label]]
            x = [row["valid"] for row in own]
            axes.fill_between(
                x, [row[key]["low"] for row in own], [row[key]["high"] for row in own], color=look.colour, alpha=0.12
            )
            axes.plot(x, [row[key]["mean"] for row in own], color=look.colour, linestyle=look.dash, marker=look.marker)
            ends.append((x[-1], own[-1][key]["mean"], look))
        axes.set_xscale("log", base=2)
        axes.set_xticks(VALID, [str(n) for n in VALID])
        axes.set(xlabel="valid answers of 256", ylabel=ylabel)
        label_ends(figure, axes, ends)
        return standalone(svg(figure, f"{ylabel} over the number of valid answers, 95 % bands over bases"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bases", type=int, default=40)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figures", type=Path)
    parser.add_argument("--read", type=Path, help="a file of --out, whose figures are drawn again")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.read:
        return draw(json.loads(asked.read.read_text())["summary"], asked.figures)
    started = time.monotonic()
    rows = [row for seed, valid in itertools.product(range(asked.bases), VALID) for row in of_base(seed, valid)]
    found = summary(rows)
    for row in found:
        print(
            f"{row['demonstrations']:5} {row['start']:14} n={row['valid']:<3}",
            *(f"{key} {row[key]['mean']:.3f} [{row[key]['low']:.3f}, {row[key]['high']:.3f}]" for key in KEYS),
        )
    if asked.out:
        record = {
            **made_with(f"python benchmarks/theory.py --bases {asked.bases}", "torch"),
            "seconds": round(time.monotonic() - started, 1),
            "summary": found,
            "rows": rows,
        }
        asked.out.write_text(json.dumps(rounded(record)) + "\n")
    if asked.figures:
        draw(found, asked.figures)


def draw(found: list[dict[str, Any]], folder: Path) -> None:
    """The figures of docs/results/theory.md."""
    gaps = {f"{SHORT.get(name, name)}, {shown}": (shown, name) for shown in ("one", "all") for name in WARM}
    kept = {"exact": ("none", "exact"), "base": ("none", "base")}
    kept |= {label: which for label, which in gaps.items() if which[0] == "all"}
    kept["sft fitted, all"] = ("all", "sft, fitted")
    for name, key, said, lines in (
        ("gap", "gap", "KL(exact ‖ start), nats", gaps),
        ("gap-after-rl", "gap after RL", "KL(exact end ‖ end), nats", gaps),
        ("paths", KEYS[-1], "valid answers kept, RL without KL", kept),
    ):
        (folder / f"theory-{name}.svg").write_text(drawn(found, key, said, lines))


def rounded(value: Any) -> Any:
    """The same with six digits of every number."""
    if isinstance(value, dict):
        return {key: rounded(own) for key, own in value.items()}
    if isinstance(value, list):
        return [rounded(own) for own in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


KEYS = ("gap", "gap after RL", "right", "paths", "paths after RL without KL")

if __name__ == "__main__":
    main()
