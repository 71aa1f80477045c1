"""How far the math grader agrees with published and hand-written verdicts, and every case where it does not.

    python benchmarks/agreement.py --data ../shared/data --out benchmarks/results/agreement.json

The folders `mathverify_cases` (the tests of Math-Verify), `verdicts_gsm8k` (labelled GSM8K responses, in their raw
form) and `adversarial_math` are read under --data. Math-Verify's cases are graded twice: with `strict` as it is, and
with each row's own `compare_args` as the options of MathGrader that mean the same.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from heatbath.run import environment
from heatbath.verify.answers.equality import Rules
from heatbath.verify.math import MathGrader

Case = tuple[str, str, bool]  # gold, response, expected


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--data", type=Path, default=Path("../shared/data"))
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    results = []
    for name, cases, options in suites(given.data):
        with MathGrader(**options) as grader:
            verdicts = grader.grade([case[1] for case in cases], [case[0] for case in cases])
        results.append(report(name, cases, verdicts))
    results = merged(results)
    for found in results:
        show(found)
    if given.out:
        about = {"command": "python " + " ".join(sys.argv), "environment": environment("fp32")}
        given.out.write_text(json.dumps(about | {"suites": results}, indent=1, ensure_ascii=False) + "\n")
    return 0


def suites(data: Path) -> Iterable[tuple[str, list[Case], dict[str, Any]]]:
    """Name, cases and options of each suite; several of one name are parts of it."""
    rows = list(lines(data / "mathverify_cases" / "math_verify.jsonl"))
    yield "Math-Verify's cases, strict", [case(row, "prediction") for row in rows], {}
    parts: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        parts[json.dumps(row["compare_args"], sort_keys=True)].append(row)
    for options, part in parts.items():
        name = "Math-Verify's cases, with their own options"
        yield name, [case(row, "prediction") for row in part], mapped(json.loads(options))
    yield (
        "GSM8K labels, raw",
        [case(row) for row in lines(data / "verdicts_gsm8k" / "model_solutions_labelled.jsonl.gz")],
        {},
    )
    yield "adversarial", [case(row) for row in lines(data / "adversarial_math" / "cases.jsonl")], {}


def mapped(arguments: dict[str, Any]) -> dict[str, Any]:
    """Math-Verify's arguments as ours. It takes unfinished arithmetic; `latex` alone is answers in LaTeX only."""
    return {
        "policy": "latex" if arguments.get("match_types") == ["latex"] else "any",
        "finished": False,
        "rules": Rules(
            decimals=arguments.get("precision"),
            same_variables=arguments.get("strict", True),
            relations_as_sets=arguments.get("allow_set_relation_comp", True),
        ),
    }


def lines(path: Path) -> Iterable[dict[str, Any]]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as stream:
        yield from map(json.loads, stream)


def case(row: dict[str, Any], response: str = "response") -> Case:
    return str(row["gold"]), row[response], bool(row["expected"])


def report(name: str, cases: list[Case], verdicts: list[Any]) -> dict[str, Any]:
    wrong = [(c, v) for c, v in zip(cases, verdicts, strict=True) if (v.status == "right") != c[2]]
    return {
        "suite": name,
        "cases": len(cases),
        "agree": len(cases) - len(wrong),
        "false_accepts": sum(not c[2] for c, _ in wrong),
        "statuses": dict(Counter(v.status for v in verdicts)),
        "differences": [
            {"gold": c[0][-200:], "response": c[1][-200:], "expected": c[2], "status": v.status, "rule": v.rule}
            | {"answer": v.answer}
            for c, v in wrong
        ],
    }


def merged(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parts of one suite as one."""
    found: dict[str, dict[str, Any]] = {}
    for part in results:
        whole = found.setdefault(part["suite"], part)
        if whole is not part:
            for key in ("cases", "agree", "false_accepts"):
                whole[key] += part[key]
            whole["statuses"] = dict(Counter(whole["statuses"]) + Counter(part["statuses"]))
            whole["differences"] += part["differences"]
    return list(found.values())


def show(found: dict[str, Any]) -> None:
    counts = ", ".join(f"{status} {n:,}" for status, n in found["statuses"].items())
    accepted = f"{found['false_accepts']} false accepts"
    print(f"{found['suite']}: {found['agree']:,} of {found['cases']:,}, {accepted} ({counts})")
    for row in found["differences"]:
        expected = "right" if row["expected"] else "not right"
        print(f"  {row['gold']!r} ~ {row['answer']!r}: {row['status']} by {row['rule']}, expected {expected}")


if __name__ == "__main__":
    sys.exit(main())
