"""What findings are read from, and what a finding is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from heatbath.recipe import Recipe
from heatbath.run import OWN_TEST, Run
from heatbath.stages.scoring import Counted, per_problem
from heatbath.verify.verdict import STATUSES

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Finding:
    """`number` is in the unit that `says` names."""

    name: str
    number: float
    says: str
    remedy: str


@dataclass(frozen=True)
class Unjudged:
    """A finding that these data can neither show nor exclude, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Seen:
    """The recipe, the logged rows of the stages, the surprise profile, the evaluation's results, and by policy what was
    counted of each problem."""

    recipe: Recipe
    rl: Rows = ()
    sft: Rows = ()
    results: Mapping[str, Any] = field(default_factory=dict)
    surprise: Mapping[str, Any] | None = None
    right: Mapping[str, Counted] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Run, samples: Rows | None = None) -> Seen:
        """What a run holds; `samples` where they have been read already."""
        return cls(
            run.recipe,
            run.metrics("rl"),
            run.metrics("sft"),
            run.read_json("results.json") or {},
            run.read_json("surprise.json"),
            counted(run.samples() if samples is None else samples),
        )


def counted(samples: Rows) -> dict[str, Counted]:
    """By policy the problems with their samples and right samples: of the run's own test problems, or where it has none
    of the task of which it has most samples."""
    graded = [row for row in samples if row.get("status") in STATUSES]  # answers for a judge are not
    tasks = Counter(row.get("task", OWN_TEST) for row in graded)
    if not tasks:
        return {}
    task = OWN_TEST if OWN_TEST in tasks else tasks.most_common(1)[0][0]
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in graded:
        if row.get("task", OWN_TEST) == task:
            rows.setdefault(row["policy"], []).append(row)
    return {policy: per_problem(own) for policy, own in rows.items()}


def series(rows: Rows, key: str) -> list[tuple[int, float]]:
    """(step, value) of the rows that have the number."""
    return [(row["step"], row[key]) for row in rows if key in row and math.isfinite(row[key])]


def too_few(count: int, least: int, what: str) -> str:
    """Why something could not be judged."""
    return f"it takes {least} {what}, the run has {count}"
