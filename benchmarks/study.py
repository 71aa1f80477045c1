"""Keeps the numbers of a comparison, and prints them as the tables of docs/results.

    python benchmarks/study.py runs/theory --commit COMMIT --out benchmarks/results/study-theory-cpu2.json
    python benchmarks/study.py benchmarks/results/study-theory-cpu2.json --tables

`--commit` is the one that the cells ran at; `--note` says what else the machine did.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from made_with import made_with

KEPT = ("recipe", "overrides", "cells", "seeds", "vary", "tuned", "baseline", "settings", "differences")


def record(folder: Path, commit: str, note: str) -> dict[str, Any]:
    """compare.json with six digits, and what made it."""
    found = json.loads((folder / "compare.json").read_text())
    command = " ".join(["heatbath compare", Path(found["recipe"]).stem, *found["overrides"]])
    head = made_with(command, "torch", "transformers", "trl") | {"commit": commit, "seconds_note": note}
    return head | {key: rounded(found[key]) for key in KEPT}


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def number(found: dict[str, Any], digits: int = 3) -> str:
    return f"{found['mean']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"


def signed(found: dict[str, Any]) -> str:
    text = f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
    return (text + (" **decided**" if found["p_holm"] < 0.05 else "")).replace("-", "−")


def tables(found: dict[str, Any]) -> str:
    """Scores before and after RL of each setting, and what they differ by from the baseline after it."""
    lines = [f"baseline {found['baseline']}; {found['cells']} cells, seeds {found['seeds']}, at {found['commit']}"]
    for name, own in found["settings"].items():
        if "test" not in own["tasks"]:
            lines.append(f"| {name} | no cell is done |")
            continue
        test, different = own["tasks"]["test"], own["distinct"]["test"]
        row = [f"{name} ({len(own['seeds'])})"]
        for policy in ("base", "init", "final"):
            if scores := test.get(policy):
                most = max(scores, key=int)
                row += [number(scores["1"]), number(scores[most]), number(different[policy][most], 2)]
            else:
                row += ["–"] * 3
        ready = [value for value in own["readiness"] if value is not None]
        nll = own["validation"][-1][1] if own["validation"] else []
        row += [f"{sum(x) / len(x):.3f}" if (x := list(values)) else "–" for values in (ready, nll)]
        row += [f"{sum(part['seconds'] for part in own['cost'].values()):.0f} s"]
        lines.append("| " + " | ".join(row) + " |")
    lines.append(
        "columns: pass@1, pass@most, distinct@most of base, init, final; informative groups; last NLL; seconds"
    )
    for one in found["differences"].get("test", []):
        lines.append(
            f"k={one['k']}: {one['from']} → {one['to']}: {signed(one)} (p {one['p']:.3f}, mde {one['mde']:.3f})"
        )
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("source", type=Path, help="the --out folder of a comparison, or a record of it")
    arguments.add_argument("--commit", default="")
    arguments.add_argument("--note", default="two cells at a time on two cores, other jobs beside: no speeds")
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--tables", action="store_true")
    given = arguments.parse_args()
    found = (
        record(given.source, given.commit, given.note)
        if given.source.is_dir()
        else json.loads(given.source.read_text())
    )
    if given.out:
        given.out.write_text(json.dumps(found) + "\n")
    if given.tables:
        print(tables(found))


if __name__ == "__main__":
    main()
