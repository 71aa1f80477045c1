"""What the cells of a comparison say together: scores of every setting over seeds and problems, paired differences,
and which of them the data decide.

A score is a mean over S seeds × Q problems; its interval is for other seeds and other problems of the same kind
(`ideas.intervals.crossed`). A difference is paired in both: the same seed, the same problem.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from heatbath.errors import RunError
from heatbath.ideas.intervals import Floats, crossed, holm
from heatbath.ideas.passk import pass_at_k
from heatbath.report import costs
from heatbath.report.scores import scored
from heatbath.run import OWN_TEST, Run
from heatbath.stages import scoring

Runs = Mapping[str, Mapping[int, Run]]  # setting → seed → run
LEVEL = 0.05
SHIFT = ("cosine", "l2", "kl_from_to", "kl_to_from", "entropy_to")  # of shift.json


def summarise(runs: Runs, baseline: str | None) -> dict[str, Any]:
    """Settings with their scores at every policy and task, differences to the baseline and between the others, learning
    curves, losses of each epoch, shift and cost. Settings without a finished cell have no scores."""
    done = {name: dict(sorted(own.items())) for name, own in runs.items()}
    settings = {name: _setting(own) for name, own in done.items()}
    first = baseline if baseline is not None else next(iter(runs), None)
    tasks = list(dict.fromkeys(task for own in settings.values() for task in own["tasks"]))
    values = {name: {task: _values(own, task) for task in tasks} for name, own in done.items()}
    compared = {}
    for task in tasks:
        ends = {name: found[task] for name, found in values.items() if found[task]}
        compared[task] = _compared(ends, first)
    return {"baseline": first, "settings": settings, "differences": compared}


def _setting(runs: Mapping[int, Run]) -> dict[str, Any]:
    scores: dict[str, dict[str, Any]] = {}
    different: dict[str, dict[str, Any]] = {}
    for task in _tasks(runs):
        values = _values(runs, task)
        scores[task] = {policy: {str(k): _numbers(x) for k, x in own.values.items()} for policy, own in values.items()}
        different[task] = {
            policy: {str(k): _numbers(x, float(k)) for k, x in own.distinct.items()} for policy, own in values.items()
        }
    return {
        "seeds": list(runs),
        "tasks": scores,
        "distinct": different,
        "last": _last(runs),
        "readiness": [_informative(run) for run in runs.values()],
        "truncated": _truncated(runs),
        "curve": curves(runs, "rl", "held_out/right"),
        "validation": curves(runs, "sft", "val/nll"),
        "shift": shifts(runs),
        "cost": cost(runs),
    }


def _numbers(values: Floats, most: float = 1.0) -> dict[str, Any]:
    """Of [S, Q]: mean with interval, the mean of each seed, and what seeds and problems contribute to the error."""
    found = crossed(values, bounds=(0.0, most))
    parts = {"of_seeds": found.of_trainings, "of_problems": found.of_questions}
    each = {key: None if math.isnan(value) else value for key, value in parts.items()}
    return found.estimate.numbers() | {"seeds": values.mean(axis=1).tolist(), "problems": values.shape[1]} | each


def _tasks(runs: Mapping[int, Run]) -> list[str]:
    found = []
    for run in runs.values():
        results = run.read_json("results.json")
        own = [OWN_TEST] if results["policies"] else []
        found += own + [name for name, part in results["tasks"].items() if part.get("kind") != "judge"]
    return list(dict.fromkeys(found))


@dataclass(frozen=True)
class Scored:
    """pass@k of a policy, [S, Q] by k, of these seeds and problems; and distinct@k of the largest k, if above 1."""

    seeds: list[int]
    problems: list[str]
    values: dict[int, Floats]
    distinct: dict[int, Floats]

    def of(self, seeds: Sequence[int], problems: Sequence[str], k: int) -> Floats:
        rows, columns = [self.seeds.index(s) for s in seeds], [self.problems.index(p) for p in problems]
        return self.values[k][np.ix_(rows, columns)]


Values = dict[str, Scored]  # by policy


def _values(runs: Mapping[int, Run], task: str) -> Values:
    """pass@k of every problem in every seed, by policy. Raises RunError where seeds were asked different problems."""
    found: dict[str, dict[int, Any]] = {}
    different: dict[str, dict[int, dict[int, Floats]]] = {}
    asked: dict[str, list[str]] = {}
    for seed, run in runs.items():
        results = run.read_json("results.json")
        part = results if task == OWN_TEST else results["tasks"].get(task)
        if part is None:
            continue
        for policy, scores in part["policies"].items():
            rows = scored(run.samples(policy, task), results)
            problems, n, right = scoring.per_problem(rows)
            if asked.setdefault(policy, problems) != problems:
                raise RunError("the cells were not asked the same problems", str(run.folder), "evaluate them alike")
            ks = [int(k) for k in scores["pass"]]
            found.setdefault(policy, {})[seed] = {k: pass_at_k(right, n, k) for k in ks}
            most = max(ks)
            different.setdefault(policy, {})[seed] = {most: scoring.distinct(rows, most)} if most > 1 else {}
    out: Values = {}
    for policy, by_seed in found.items():
        shared = sorted(set.intersection(*(set(ks) for ks in by_seed.values())))
        values = {k: np.stack([ks[k] for ks in by_seed.values()]) for k in shared}
        own = list(different[policy].values())
        distinct = {k: np.stack([each[k] for each in own]) for k in own[0] if all(k in each for each in own)}
        out[policy] = Scored(list(by_seed), asked[policy], values, distinct)
    return out


def _last(runs: Mapping[int, Run]) -> str | None:
    """The policy that a setting ends with."""
    return next((run.policies[-1] for run in runs.values()), None)


def _compared(values: Mapping[str, Values], baseline: str | None) -> list[dict[str, Any]]:
    """Differences of the last policies over the seeds and problems that both have, first to the baseline, then between
    the others; p is corrected (Holm) within each k and each of the two families, and `mde` is for its hardest step."""
    found: list[tuple[dict[str, Any], Floats]] = []
    for a, b in itertools.combinations(values, 2):
        first, second = (b, a) if b == baseline else (a, b)
        before, after = (list(values[name].values())[-1] for name in (first, second))
        seeds = [seed for seed in before.seeds if seed in after.seeds]
        problems = [problem for problem in before.problems if problem in set(after.problems)]
        for k in [k for k in before.values if k in after.values] if seeds and problems else ():
            row = {"from": first, "to": second, "k": k, "seeds": seeds, "to_baseline": first == baseline}
            found.append((row, after.of(seeds, problems, k) - before.of(seeds, problems, k)))
    for k, family in itertools.product(sorted({row["k"] for row, _ in found}), (True, False)):
        own = [(row, values) for row, values in found if row["k"] == k and row["to_baseline"] == family]
        for row, values_of in own:
            row |= _difference(values_of, len(own))
        tested = [row for row, _ in own if row["p"] is not None]
        for row, p in zip(tested, holm([row["p"] for row in tested]) if tested else (), strict=True):
            row["p_holm"] = float(p)
    return sorted((row for row, _ in found), key=lambda row: not row["to_baseline"])


def _difference(values: Floats, tests: int) -> dict[str, Any]:
    """Of [S, Q], one of so many tests: mean, interval and p as they stand alone, `mde` at a level divided by all."""
    found, strict = crossed(values), crossed(values, confidence=1 - LEVEL / tests)
    numbers = {"p": found.p, "mde": strict.mde, "of_seeds": found.of_trainings, "of_problems": found.of_questions}
    known = {key: None if math.isnan(value) else value for key, value in numbers.items()}
    return found.estimate.numbers() | known | {"each": values.mean(axis=1).tolist(), "problems": values.shape[1]}


def decided(row: Mapping[str, Any]) -> bool:
    """Whether a difference is one, also after correction for how many were looked at."""
    p = row.get("p_holm", row.get("p"))
    return p is not None and p <= LEVEL


def verdict(found: Mapping[str, Any], task: str = OWN_TEST) -> list[str]:
    """Sentences on the first k: what is better or worse than the baseline, and whether one setting is ahead of all."""
    rows = found["differences"].get(task, [])
    if not rows:
        return ["Nothing can be compared yet."]
    k, baseline = min(row["k"] for row in rows), found["baseline"]
    own = [row for row in rows if row["k"] == k and row["to_baseline"]]
    if all(row["p"] is None for row in rows):
        return ["One seed: how far another training of the same setting would lie from these is unknown."]
    if not own:
        return [f"The baseline, {baseline}, has no results yet.", _ahead(found, rows, k, task)]
    said = []
    for word, sign in (("better", 1), ("worse", -1)):
        names = [f"{row['to']} ({_signed(row['mean'])})" for row in own if decided(row) and row["mean"] * sign > 0]
        if names:
            said.append(f"At pass@{k} {word} than {baseline}: {', '.join(names)}.")
    open_ = [row for row in own if not decided(row)]
    if open_:
        least = max((row["mde"] or 0.0) for row in open_)
        missed = f"a true difference below {least:.3f} may well be missed"
        said.append(f"Not decided against {baseline}: {', '.join(row['to'] for row in open_)}; {missed}.")
    return [*said, _ahead(found, rows, k, task)]


def _ahead(found: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], k: int, task: str) -> str:
    """Whether the highest setting is ahead of every other."""
    scores = {}
    for name, own in found["settings"].items():
        policies = own["tasks"].get(task, {})
        if policies and str(k) in (last := list(policies.values())[-1]):
            scores[name] = last[str(k)]["mean"]
    best = max(scores, key=lambda name: scores[name])
    against = {row["from"] if row["to"] == best else row["to"]: row for row in rows if best in (row["from"], row["to"])
               and row["k"] == k}  # fmt: skip
    missing = [name for name in found["settings"] if name != best and name not in against]
    level = [name for name, row in against.items() if not decided(row)]
    if level:
        return f"The highest mean is that of {best}, which these data do not tell from {', '.join(level)}."
    if missing:
        return f"{best} is ahead of the others so far; not compared yet: {', '.join(missing)}."
    return f"{best} is ahead of every other setting."


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def curves(runs: Mapping[int, Run], stage: str, column: str) -> list[list[Any]]:
    """Step, or for a loss of validation the epoch, and the value in every seed, of the rows that all seeds have."""
    at = "epoch" if stage == "sft" else "step"
    found: list[dict[float, float]] = []
    for run in runs.values():
        rows = [row for row in run.metrics(stage) if column in row]
        found.append({float(row.get(at, row["step"])): float(row[column]) for row in rows})
    steps = sorted(set.intersection(*(set(one) for one in found))) if found else []
    return [[step, [one[step] for one in found]] for step in steps]


def crossing(own: Sequence[Any], other: Sequence[Any]) -> float | None:
    """The step of RL from which on the mean curve of one setting stays above the other's, having begun below; None
    where it does not. `own` and `other` are curves, whose shared steps count."""
    means = {step: float(np.mean(values)) for step, values in other}
    ahead = [(step, float(np.mean(values)) - means[step]) for step, values in own if step in means]
    if len(ahead) < 2 or ahead[0][1] >= 0 or ahead[-1][1] <= 0:
        return None
    behind = max(i for i, (_, gap) in enumerate(ahead) if gap <= 0)
    return float(ahead[behind + 1][0])


def shifts(runs: Mapping[int, Run]) -> dict[str, dict[str, list[float]]]:
    """Transition → measure → the mean over sequences in every seed that has measured it; top-K overlaps by their K."""
    out: dict[str, dict[str, list[float]]] = {}
    for run in runs.values():
        for measured in (run.read_json("shift.json") or {}).get("transitions", []):
            arrow = out.setdefault(f"{measured['from']} → {measured['to']}", {})
            flat = {name: measured[name] for name in SHIFT} | {f"top-{k}": o for k, o in measured["overlap"].items()}
            for name, value in flat.items():
                arrow.setdefault(name, []).append(value["mean"])
    return out


def cost(runs: Mapping[int, Run]) -> dict[str, dict[str, float]]:
    """Stage → mean seconds and tokens of a cell; what a cell took over from another counts as its own."""
    found: dict[str, list[tuple[float, float]]] = {}
    for run in runs.values():
        for spent in costs.costs(run, run.samples()):
            found.setdefault(spent.stage, []).append((spent.seconds, spent.tokens))
    return {
        stage: {"seconds": float(np.mean([s for s, _ in own])), "tokens": float(np.mean([t for _, t in own]))}
        for stage, own in found.items()
    }


def _informative(run: Run) -> float | None:
    found = run.read_json("readiness.json")
    return None if found is None else found.get("informative_share", {}).get("mean")


def _truncated(runs: Mapping[int, Run]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for run in runs.values():
        for policy, scores in run.read_json("results.json")["policies"].items():
            found.setdefault(policy, []).append(scores["truncated_share"])
    return {policy: float(np.mean(own)) for policy, own in found.items()}
