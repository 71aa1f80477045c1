"""Keeps the numbers of a comparison, and prints them as the tables of docs/results.

    python benchmarks/study.py runs/theory --commit COMMIT --out benchmarks/results/study-theory-cpu2.json
    python benchmarks/study.py benchmarks/results/study-theory-cpu2.json --tables
    python benchmarks/study.py benchmarks/results/study-noise-cpu2.json --beside OTHER.json

`--commit` is the one that the cells ran at; `--note` says what else the machine did. Beside what compare.json holds the
record has `differ`: the probability that two right answers to a problem are written differently, which unlike
distinct@k does not grow with pass@k. It is the mean over the problems with two right samples or more, for each seed,
and null where a seed has no such problem.
`--holding TEXT` adds how many of all samples hold that text and how many are no answer to the grader, for each seed.
"Against the base" and `--beside`, which compares the settings of two records, go seed by seed: t intervals for other
seeds on these problems, which are not corrected for how many there are. The other differences of `--tables` are those
of compare.json: for other problems, too.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from made_with import made_with

from heatbath.ideas.intervals import mean_with_interval
from heatbath.run import Run
from heatbath.stages.grid import slug

KEPT = ("recipe", "overrides", "cells", "seeds", "vary", "tuned", "baseline", "settings", "differences")


def record(folder: Path, commit: str, note: str, text: str = "") -> dict[str, Any]:
    """compare.json with six digits, what made it, and what is read from the samples."""
    found = json.loads((folder / "compare.json").read_text())
    command = " ".join(["heatbath compare", Path(found["recipe"]).stem, *found["overrides"]])
    head = made_with(command, "torch", "transformers", "trl") | {"commit": commit, "seconds_note": note}
    differ = {name: differing(folder / slug(name), own["seeds"]) for name, own in found["settings"].items()}
    found = head | {key: rounded(found[key]) for key in KEPT} | {"differ": rounded(differ)}
    if text:
        own = {name: holding(folder / slug(name), found["settings"][name]["seeds"], text) for name in differ}
        found["holding"] = {"text": text, "settings": rounded(own)}
    return found


def holding(folder: Path, seeds: list[int], text: str) -> dict[str, dict[str, list[float]]]:
    """Policy → of each seed, the share of samples with the text in them, and of those that are no answer."""
    found: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        run = Run.read(folder / str(seed))
        for policy in run.policies:
            samples, own = run.samples(policy), found.setdefault(policy, {"holding": [], "no answer": []})
            own["holding"].append(sum(text in one["completion"] for one in samples) / len(samples))
            own["no answer"].append(sum(one["status"] == "no_answer" for one in samples) / len(samples))
    return found


def differing(folder: Path, seeds: list[int]) -> dict[str, list[float | None]]:
    """Policy → of each seed, how often two right answers to one problem differ."""
    found: dict[str, list[float | None]] = defaultdict(list)
    for seed in seeds:
        run = Run.read(folder / str(seed))
        for policy in run.policies:
            written: dict[str, list[str]] = defaultdict(list)
            for one in run.samples(policy):
                if one["status"] == "right":
                    written[one["problem"]].append(one["completion"].strip())
            found[policy].append(apart(written.values()))
    return found


def apart(answers: Iterable[list[str]]) -> float | None:
    """How often two answers to one problem differ, over the problems with two or more; None where there are none."""
    pairs = [
        1 - sum(n * (n - 1) for n in Counter(own).values()) / (len(own) * (len(own) - 1))
        for own in answers
        if len(own) > 1
    ]
    return sum(pairs) / len(pairs) if pairs else None


def rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list) else value


def spread(values: list[float]) -> dict[str, Any]:
    """Mean and t interval over seeds."""
    return mean_with_interval(np.array(values)).numbers()


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
        differ = [values for policy, values in found["differ"].get(name, {}).items() if policy != "base"]
        row += [" → ".join("–" if None in values else number(spread(values), 2) for values in differ)]
        row += [f"{sum(part['seconds'] for part in own['cost'].values()):.0f} s"]
        lines.append("| " + " | ".join(row) + " |")
    lines.append(
        "columns: pass@1, pass@most, distinct@most of base, init, final; informative groups; last NLL; differ; seconds"
    )
    lines += [line for name, own in found["settings"].items() for line in against_base(name, own)]
    whole = found["differ"]
    for one, other in itertools.combinations((name for name in whole if "final" in whole[name]), 2):
        both = [*whole[one]["final"], *whole[other]["final"]]
        if len(whole[one]["final"]) == len(whole[other]["final"]) > 1 and None not in both:
            change = spread([y - x for x, y in zip(whole[one]["final"], whole[other]["final"], strict=True)])
            lines.append(f"differ: {one} → {other}: {number(change)}")
    for name, policies in found.get("holding", {}).get("settings", {}).items():
        for policy, own in policies.items():
            shares = ", ".join(f"{what} {number(spread(values))}" for what, values in own.items())
            lines.append(f"{found['holding']['text']!r}: {name}, {policy}: {shares}")
    for one in found["differences"].get("test", []):
        lines.append(
            f"k={one['k']}: {one['from']} → {one['to']}: {signed(one)} (p {one['p']:.3f}, mde {one['mde']:.3f})"
        )
    return "\n".join(lines)


def against_base(name: str, own: dict[str, Any]) -> list[str]:
    """What a setting has gained on the base at k = 1 and the largest k, before RL and after it, seed by seed."""
    test = own["tasks"].get("test", {})
    changes = []
    for policy in (policy for policy in ("init", "final") if policy in test and "base" in test):
        for k in (min(test["base"], key=int), max(test["base"], key=int)):
            both = zip(test["base"][k]["seeds"], test[policy][k]["seeds"], strict=True)
            changes.append(f"{policy} pass@{k} {number(spread([y - x for x, y in both])).replace('-', '−')}")
    return [f"against the base: {name}: " + "; ".join(changes)] if changes else []


def beside(found: dict[str, Any], other: dict[str, Any]) -> str:
    """What the settings of two records differ by at k = 1 and the largest k, before RL and after it."""
    lines = []
    for (one, own), (another, theirs) in itertools.product(other["settings"].items(), found["settings"].items()):
        if own["seeds"] != theirs["seeds"]:
            continue
        changes = []
        for policy in ("init", "final"):
            x, y = (setting["tasks"]["test"].get(policy, {}) for setting in (own, theirs))
            for k in dict.fromkeys((min(x, key=int), max(x, key=int))) if x and y else ():
                gains = [after - before for before, after in zip(x[k]["seeds"], y[k]["seeds"], strict=True)]
                changes.append(f"{policy} pass@{k} {number(spread(gains)).replace('-', '−')}")
        lines.append(f"{one} → {another}: " + "; ".join(changes))
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("source", type=Path, help="the --out folder of a comparison, or a record of it")
    arguments.add_argument("--commit", default="")
    arguments.add_argument("--note", default="two cells at a time on two cores, other jobs beside: no speeds")
    arguments.add_argument("--holding", metavar="TEXT", default="")
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--tables", action="store_true")
    arguments.add_argument("--beside", type=Path, help="another record, whose settings are compared with these")
    given = arguments.parse_args()
    found = (
        record(given.source, given.commit, given.note, given.holding)
        if given.source.is_dir()
        else json.loads(given.source.read_text())
    )
    if given.out:
        given.out.write_text(json.dumps(found) + "\n")
    if given.tables:
        print(tables(found))
    if given.beside:
        print(beside(found, json.loads(given.beside.read_text())))


if __name__ == "__main__":
    main()
