"""Samples to scores: pass@k with intervals, what was cut or could not be graded, and paired differences."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from heatbath.ideas.intervals import (
    Floats,
    holm,
    mean_with_interval,
    minimum_detectable_effect,
    paired_difference,
    paired_test,
)
from heatbath.ideas.passk import distinct_at_k, majority_at_k, pass_at_k
from heatbath.run import OWN_TEST
from heatbath.verify.verdict import JUDGED

Samples = Sequence[dict[str, Any]]


def summarise(samples: Mapping[str, Samples], ks: Sequence[int], *, votes: bool = True) -> dict[str, Any]:
    """pass@k of each policy with intervals over problems, and the paired differences between successive policies; with
    `votes` maj@k too, for answers that can be alike (those of programs cannot).

    A sample the grader failed on counts as not right, and their number is reported: leaving them out would let a policy
    gain by breaking the grader.
    """
    policies = {policy: _scores(rows, ks, votes) for policy, rows in samples.items()}
    return {"policies": policies, "differences": differences(samples, ks)}


def lacking(rows: Samples, problems: Sequence[str], k: int) -> int:
    """Of how many of the problems there are fewer than the k samples that pass@k takes."""
    n = Counter(r["problem"] for r in rows)
    return sum(n[problem] < k for problem in dict.fromkeys(problems))


def unscored(one: Mapping[str, Any]) -> str:
    """An entry of `incomplete` in results.json, in words."""
    where = "" if one["task"] == OWN_TEST else f" in {one['task']}"
    return (
        f"{one['policy']}{where} is not scored: {one['lacking']:,} of {one['problems']:,} problems have fewer than the "
        f"{one['samples']} samples that pass@{one['samples']} takes"
    )


REPEATED = 5  # problems whose samples must all be alike before it is said


def alike(samples: Samples) -> int:
    """How many problems were sampled more than once, where every sample of each of them is the same; else 0. An engine
    that draws greedily whatever temperature it is asked for makes pass@k of that temperature a fiction."""
    answers: dict[str, list[tuple[int, ...]]] = {}
    for row in samples:
        answers.setdefault(row["problem"], []).append(tuple(row["ids"]))
    repeated = [ids for ids in answers.values() if len(ids) > 1]
    return len(repeated) if len(repeated) >= REPEATED and all(len(set(ids)) == 1 for ids in repeated) else 0


def drawn_alike(one: Mapping[str, Any]) -> str:
    """An entry of `alike` in results.json, in words."""
    where = "" if one["task"] == OWN_TEST else f" in {one['task']}"
    return (
        f"All samples of each of {one['problems']:,} problems are the same ({one['policy']}{where}, temperature "
        f"{one['temperature']:g}): the engine seems to draw greedily. A server may follow the model's own "
        "generation_config.json (do_sample)"
    )


def _scores(rows: Samples, ks: Sequence[int], votes: bool) -> dict[str, Any]:
    problems, n, right = per_problem(rows)
    done = [r for r in rows if r["finished"]]
    return {
        "problems": len(problems),
        "samples": len(rows),
        "pass": {str(k): mean_with_interval(pass_at_k(right, n, k), bounds=(0.0, 1.0)).numbers() for k in ks},
        "maj": _majorities(rows, ks) if votes else {},
        "distinct": {
            str(k): mean_with_interval(distinct(rows, k), bounds=(0.0, float(k))).numbers() for k in ks if k > 1
        },
        "truncated_share": 1 - len(done) / len(rows),
        "right_of_finished": float(np.mean([r["status"] == "right" for r in done])) if done else None,
        "mean_tokens": float(np.mean([r["tokens"] for r in rows])),
        "verdicts": dict(Counter(r["status"] for r in rows)),
        "grader_failures": sum(r["status"] not in JUDGED for r in rows),
    }


def differences(samples: Mapping[str, Samples], ks: Sequence[int]) -> list[dict[str, Any]]:
    """Paired differences of pass@k between successive policies, and of the last to the first, on the same problems.

    `p` is two-sided; `mde` the smallest difference that these problems would show 4 times in 5.
    """
    counted = {policy: per_problem(rows) for policy, rows in samples.items()}
    names = list(counted)
    pairs = list(itertools.pairwise(names))
    if len(names) == 3:
        pairs.append((names[0], names[2]))
    return [{"from": a, "to": b, "k": k, **compared(counted[a], counted[b], k)} for a, b in pairs for k in ks]


Counted = tuple[list[str], np.ndarray[Any, Any], np.ndarray[Any, Any]]


def compared(before: Counted, after: Counted, k: int) -> dict[str, Any]:
    """The paired difference of pass@k of two samples of the same problems. Raises ValueError for other problems."""
    if before[0] != after[0]:
        raise ValueError("the two were not asked the same problems")
    return paired(*(pass_at_k(right, n, k) for _, n, right in (before, after)))


def paired(a: Sequence[float] | Floats, b: Sequence[float] | Floats) -> dict[str, Any]:
    """The mean of b − a over the same problems, with its interval, test and the smallest effect they would show."""
    a, b = np.asarray(a), np.asarray(b)
    tested, mde = paired_test(a, b), minimum_detectable_effect(b - a)
    p = {"p": None if math.isnan(tested.p) else tested.p, "test": tested.test}
    return paired_difference(a, b).numbers() | p | {"mde": None if math.isnan(mde) else mde}


def correct(found: Sequence[dict[str, Any]]) -> None:
    """Puts `p_holm` into each of these differences: p corrected for how many there are (Holm 1979)."""
    tested = [row for row in found if row.get("p") is not None]
    for row, value in zip(tested, holm([row["p"] for row in tested]) if tested else (), strict=True):
        row["p_holm"] = float(value)


def per_problem(rows: Samples) -> Counted:
    """Problem ids in order, samples and right samples of each."""
    n = Counter(r["problem"] for r in rows)
    right = Counter(r["problem"] for r in rows if r["status"] == "right")
    problems = sorted(n)
    return problems, np.array([n[p] for p in problems]), np.array([right[p] for p in problems])


def distinct(rows: Samples, k: int) -> Floats:
    """distinct@k of each problem, in order of their ids, [Q]; white space tells no two completions apart."""
    written: dict[str, list[str]] = {}
    right: dict[str, list[bool]] = {}
    for row in sorted(rows, key=lambda row: row["problem"]):
        written.setdefault(row["problem"], []).append(" ".join(row["completion"].split()))
        right.setdefault(row["problem"], []).append(row["status"] == "right")
    return distinct_at_k([*written.values()], [*right.values()], k)


def _majorities(rows: Samples, ks: Sequence[int]) -> dict[str, Any]:
    """maj@k; of one sample it is pass@1, and not repeated."""
    answers: dict[str, list[str | None]] = {}
    right: dict[str, list[bool]] = {}
    for row in rows:
        said = row["answer"]
        answers.setdefault(row["problem"], []).append(None if said is None else said.strip().casefold())
        right.setdefault(row["problem"], []).append(row["status"] == "right")
    return {
        str(k): mean_with_interval(
            majority_at_k([*answers.values()], [*right.values()], k), bounds=(0.0, 1.0)
        ).numbers()
        for k in ks
        if k > 1
    }
