"""Scores made of the samples themselves: pass@k at every k, and runs compared on the problems they share."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from heatbath.ideas.intervals import mean_with_interval
from heatbath.ideas.passk import pass_at_k
from heatbath.run import OWN_TEST
from heatbath.stages import scoring
from heatbath.stages.scoring import Counted
from heatbath.verify.verdict import STATUSES

Rows = Sequence[Mapping[str, Any]]
ByTask = dict[str, dict[str, list[dict[str, Any]]]]  # task → policy → samples
Curve = list[tuple[int, float, float, float]]  # k, low, mean, high

MOST_KS = 20
ALL_PAIRS = 4  # runs; of more each is compared with the first only


def scored(samples: Rows, results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The samples that results.json is of: an earlier evaluation may have asked more problems, or others. All of them
    where an earlier version wrote it."""
    parts = {OWN_TEST: results, **results.get("tasks", {})}
    asked = {task: set(part["asked"].split()) for task, part in parts.items() if "asked" in part}
    tasks = [(row, asked.get(row.get("task", OWN_TEST))) for row in samples]
    return [row for row, problems in tasks if problems is None or row["problem"] in problems]


def graded(samples: Rows) -> list[dict[str, Any]]:
    """The samples without the answers for a judge."""
    return [dict(row) for row in samples if row.get("status") in STATUSES]


def by_task(samples: Rows) -> ByTask:
    """Task → policy → its graded samples, each in the order in which they came; answers for a judge are left out."""
    out: ByTask = {}
    for row in graded(samples):
        out.setdefault(row.get("task", OWN_TEST), {}).setdefault(row["policy"], []).append(row)
    return out


def estimate(counted: Counted, k: int) -> dict[str, float | None]:
    """pass@k as `mean`, `low` and `high`; one problem has no interval."""
    _, n, right = counted
    return mean_with_interval(pass_at_k(right, n, k), bounds=(0.0, 1.0)).numbers()


def curve(counted: Counted) -> Curve:
    """pass@k with its interval for every k that all problems have samples for; of many k a choice, evenly on a
    logarithmic scale, with the first and the last. A single problem has a line and no band."""
    _, n, right = counted
    last = int(n.min())
    ks = np.arange(1, last + 1) if last <= MOST_KS else np.unique(np.round(np.geomspace(1, last, MOST_KS)).astype(int))
    out: Curve = []
    for k in ks.tolist():
        found = mean_with_interval(pass_at_k(right, n, k), bounds=(0.0, 1.0))
        low, high = (found.mean if math.isnan(end) else end for end in (found.low, found.high))
        out.append((k, low, found.mean, high))
    return out


@dataclass(frozen=True)
class Contender:
    """A policy of a run with what was counted of each problem of a task, and the k that its recipe reports."""

    run: str
    policy: str
    counted: Counted
    ks: tuple[int, ...]


def compared(contenders: Sequence[Contender]) -> list[dict[str, Any]]:
    """Paired differences of pass@k between runs: `from`, `to`, `policies` of both, `k`, `problems` in common, and what
    `scoring.paired` says. All pairs, or of more than four contenders each with the first; runs without a problem in
    common have none."""
    pairs = list(itertools.combinations(contenders, 2))
    if len(contenders) > ALL_PAIRS:
        pairs = [(contenders[0], other) for other in contenders[1:]]
    found = []
    for a, b in pairs:
        common = sorted(set(a.counted[0]) & set(b.counted[0]))
        for k in [k for k in a.ks if k in b.ks] if common else ():
            before, after = (_only(each.counted, common) for each in (a, b))
            if min(int(before[1].min()), int(after[1].min())) >= k:
                paired = scoring.compared(before, after, k)
                names = {"from": a.run, "to": b.run, "policies": [a.policy, b.policy]}
                found.append({**names, "k": k, "problems": len(common), **paired})
    return found


def _only(counted: Counted, problems: Sequence[str]) -> Counted:
    at = {problem: i for i, problem in enumerate(counted[0])}
    kept = [at[problem] for problem in problems]
    return list(problems), counted[1][kept], counted[2][kept]
