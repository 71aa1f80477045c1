"""How the sums of a comparison are written: the grader reads the last number, here every equation has to hold.

    python benchmarks/chains.py runs/paths runs/noise … --commit COMMIT --out benchmarks/results/chains-cpu2.json
    python benchmarks/chains.py benchmarks/results/chains-cpu2.json
    python benchmarks/chains.py benchmarks/results/chains-cpu2.json --pair "paths: paths=1 sft" "paths: paths=4 sft"

An answer is right throughout if it is a chain of equations that begins with the question's own sum, ends in a bare
number and has the same value on each side of each `=`; a bare `23 + 45 = 68` is one. For each policy and seed, as
shares of all answers: `right`, the grader's verdict; `throughout`; `known` and `new`, right throughout and written in a
form of the base's own, or in `round`, which the base has never seen; `shape`, written in that form, right or not (of
sums; a difference shows it not); `swapped`, the right solution in it but for its sign, so that a step is false. As
shares of the problems: `any`, with an answer right throughout. `ways`: how many different ones of these a problem has.
`differ`: the probability that two of a problem's differ, over the problems that have two, others in each setting.

`--commit` is the one that the cells ran at. `--pair` compares two settings seed by seed: t intervals for other seeds on
the same problems, not corrected for how many are asked.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from made_with import made_with
from study import apart, number, rounded, spread

from heatbath.data.arithmetic import FORMS, Sum, solve
from heatbath.run import Run
from heatbath.stages.grid import slug

NEW = "round"
COLUMNS = ("right", "throughout", "known", "new", "shape", "swapped", "any", "ways", "differ")


def asked(question: str) -> Sum:
    a, operation, b = re.fullmatch(r"What is (\d+) ([+-]) (\d+)\?", question).groups()
    return Sum(int(a), int(b), operation)


def holds(problem: Sum, text: str) -> bool:
    """Whether the text is a chain of equations, each of them true, from the sum to its answer."""
    sides = [re.fullmatch(r"(\d+)(?: ([+-]) (\d+))?", side.strip()) for side in text.strip().split("=")]
    if len(sides) < 2 or None in sides or sides[-1][2]:
        return False
    values = {int(x) + (int(y) if sign == "+" else -int(y or 0)) for x, sign, y in (side.groups() for side in sides)}
    return sides[0][0] == f"{problem.a} {problem.operation} {problem.b}" and values == {problem.answer}


def form_of(problem: Sum, text: str) -> str | None:
    """The form that would write exactly this, one of the base's own first; None where none would."""
    known = [form for form in FORMS if form != NEW]
    return next((form for form in (*known, NEW) if solve(problem, form) == text.strip()), None)


def has_new_shape(problem: Sum, text: str) -> bool:
    """Whether a sum goes over a number that is too large."""
    head = re.escape(f"{problem.a} + {problem.b}")
    return problem.operation == "+" and re.fullmatch(rf"{head} = \d+ - \d+ = \d+", text) is not None


def read(samples: list[dict[str, Any]]) -> dict[str, float | None]:
    """`COLUMNS` of one policy of one run."""
    counts: Counter[str] = Counter()
    ways: dict[str, list[str]] = defaultdict(list)
    for one in samples:
        problem, text = asked(one["question"]), one["completion"].strip()
        own, form = ways[one["problem"]], form_of(problem, text)
        counts["right"] += one["status"] == "right"
        counts["known"] += form not in (NEW, None)
        counts["new"] += form == NEW
        counts["shape"] += has_new_shape(problem, text)
        if holds(problem, text):
            own.append(text)
        else:
            counts["swapped"] += text == solve(problem, NEW).replace(" - ", " + ")
    found: dict[str, float | None] = {
        name: counts[name] / len(samples) for name in ("right", "known", "new", "shape", "swapped")
    }
    found["throughout"] = sum(map(len, ways.values())) / len(samples)
    found["any"] = sum(map(bool, ways.values())) / len(ways)
    found["ways"] = sum(len(set(own)) for own in ways.values()) / len(ways)
    return found | {"differ": apart(ways.values())}


def record(folders: list[Path], commit: str) -> dict[str, Any]:
    """Setting → policy → column → a value for each seed."""
    settings: dict[str, Any] = {}
    for folder in folders:
        for name, own in json.loads((folder / "compare.json").read_text())["settings"].items():
            runs = [Run.read(folder / slug(name) / str(seed)) for seed in own["seeds"]]
            settings[f"{folder.name}: {name}"] = {
                policy: columns([read(run.samples(policy)) for run in runs]) for policy in runs[0].policies
            } | {"seeds": own["seeds"]}
    command = f"benchmarks/chains.py {' '.join(folder.name for folder in folders)}"
    return made_with(command, "torch") | {"commit": commit, "settings": rounded(settings)}


def columns(found: list[dict[str, float | None]]) -> dict[str, list[float | None]]:
    return {name: [one[name] for one in found] for name in COLUMNS}


def table(settings: dict[str, Any]) -> str:
    lines = ["| " + " | ".join(("setting", "policy", *COLUMNS)) + " |"]
    for name, own in settings.items():
        for policy in (policy for policy in own if policy != "seeds"):
            cells = [
                "–" if None in own[policy][name] else number(spread(own[policy][name]), 2 if name == "ways" else 3)
                for name in COLUMNS
            ]
            lines.append(f"| {name} | {policy} | " + " | ".join(cells) + " |")
    return "\n".join(lines).replace("-0.", "−0.")


def paired(one: dict[str, Any], other: dict[str, Any]) -> str:
    if one["seeds"] != other["seeds"]:
        raise SystemExit(f"the settings have other seeds: {one['seeds']} and {other['seeds']}")
    lines = []
    for policy in (policy for policy in one if policy in other and policy != "seeds"):
        changes = []
        for column in COLUMNS:
            both = list(zip(one[policy][column], other[policy][column], strict=True))
            if any(None in pair for pair in both):
                continue
            changes.append(f"{column} {number(spread([y - x for x, y in both]))}".replace("-", "−"))
        lines.append(f"{policy}: " + "; ".join(changes))
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("sources", type=Path, nargs="+", help="--out folders of comparisons, or one record")
    arguments.add_argument("--commit", default="")
    arguments.add_argument("--out", type=Path)
    arguments.add_argument("--pair", nargs=2, action="append", default=[], metavar="SETTING")
    given = arguments.parse_args()
    first = given.sources[0]
    found = json.loads(first.read_text()) if first.is_file() else record(given.sources, given.commit)
    if given.out:
        given.out.write_text(json.dumps(found) + "\n")
    if not given.pair:
        print(table(found["settings"]))
    for one, other in given.pair:
        print(f"{one} → {other}\n{paired(found['settings'][one], found['settings'][other])}")


if __name__ == "__main__":
    main()
