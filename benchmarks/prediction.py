"""What of a start, measured before RL, orders where RL ends: over the settings of a study, and over a setting's seeds.

    python benchmarks/prediction.py benchmarks/results/study-*-cpu2.json --out benchmarks/results/prediction-NAME.json

Reads what `heatbath compare` wrote (compare.json). Over settings: Spearman's rank correlation of means over seeds, with
a 95 % bootstrap interval over settings. Over seeds: of what each cell differs by from its setting and its seed, pooled.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from made_with import made_with
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
DRAWS = 4000
FEWEST = 4  # settings of which a rank correlation says anything


def cells(found: dict[str, Any]) -> dict[str, dict[str, Floats]]:
    """Setting → number → its value in each seed, of the settings that start RL from a policy of their own."""
    out = {}
    for name, own in found["settings"].items():
        scores = own["tasks"].get("test", {})
        if not {"init", "final"} <= scores.keys():
            continue
        least, most = (sorted(scores["init"], key=int)[i] for i in (0, -1))
        numbers = {
            "pass@1 before": scores["init"][least]["seeds"],
            f"pass@{most} before": scores["init"][most]["seeds"],
            "informative groups": own["readiness"],
            "validation NLL": own["validation"][-1][1] if own["validation"] else [None],
            "end": scores["final"][least]["seeds"],
        }
        if different := own.get("distinct", {}).get("test", {}).get("init", {}):
            numbers[f"distinct@{most} before"] = different[most]["seeds"]
        if moved := own["shift"].get("base → init"):
            numbers |= {"KL(start ‖ base)": moved["kl_to_from"], "L2 from the base": moved["l2"]}
        out[name] = {
            key: np.array(values, dtype=float)
            for key, values in numbers.items()
            if len(values) == len(own["seeds"]) and None not in values
        }
    return out


def rank(x: Floats, y: Floats) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return float(stats.spearmanr(x, y).statistic)


def over_settings(x: Floats, y: Floats) -> dict[str, float]:
    """Of means [S, seeds] of as many settings."""
    a, b = x.mean(1), y.mean(1)
    draw = np.random.default_rng(0)
    drawn = [rank(a[i], b[i]) for i in draw.integers(0, len(a), (DRAWS, len(a)))]
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return {"rank": rank(a, b), "low": float(low), "high": float(high), "settings": len(a)}


def over_seeds(x: Floats, y: Floats) -> dict[str, float]:
    """Pearson's correlation of residuals [S, seeds], without the means of settings and of seeds, and its p."""
    a, b = (v - v.mean(1, keepdims=True) - v.mean(0, keepdims=True) + v.mean() for v in (x, y))
    free = (a.shape[0] - 1) * (a.shape[1] - 1) - 1
    r = float((a * b).sum() / np.sqrt((a**2).sum() * (b**2).sum()))
    t = r * np.sqrt(free / max(1e-12, 1 - r**2))
    return {"r": r, "p": float(2 * stats.t.sf(abs(t), free)), "cells": a.size}


def measured(found: dict[str, dict[str, Floats]]) -> dict[str, Any]:
    out = {}
    for key in dict.fromkeys(key for own in found.values() for key in own if key != "end"):
        there = [own for own in found.values() if key in own]
        if len(there) >= FEWEST:
            x, y = (np.stack([own[name] for own in there]) for name in (key, "end"))
            out[key] = {"settings": over_settings(x, y), "seeds": over_seeds(x, y)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("studies", type=Path, nargs="+")
    parser.add_argument("--without", action="append", default=[], help="a word of the names of settings to leave out")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    record: dict[str, Any] = {}
    for path in asked.studies:
        found = cells(json.loads(path.read_text()))
        found = {name: own for name, own in found.items() if not any(word in name.split() for word in asked.without)}
        record[path.stem] = measured(found)
        for key, row in record[path.stem].items():
            s, r = row["settings"], row["seeds"]
            print(
                f"{path.stem:32} {key:20} over {s['settings']:2} settings {s['rank']:+.2f} [{s['low']:+.2f}, "
                f"{s['high']:+.2f}]   over {r['cells']} cells {r['r']:+.2f} (p {r['p']:.3f})"
            )
    if asked.out:
        words = [*map(str, asked.studies), *(f"--without {part}" for part in asked.without)]
        head = made_with(f"python benchmarks/prediction.py {' '.join(words)}", "numpy", "scipy")
        asked.out.write_text(json.dumps({**head, "found": record}, indent=1) + "\n")


if __name__ == "__main__":
    main()
