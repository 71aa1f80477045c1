"""Published scores beside those of a run, for a recipe that names a table of them (`published`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heatbath import published
from heatbath.published import Score
from heatbath.recipe import Recipe
from heatbath.report import tables

CAUTION = (
    "Printed scores are of a single run or of a few, without intervals, and some fit no number of runs; AIME has 30 "
    "problems. The intervals of this run are over problems and say nothing about another training seed. Anchors, not "
    "targets (docs/paper.md)."
)


def section(recipe: Recipe, results: Mapping[str, Any]) -> dict[str, Any] | None:
    """Text, table and numbers of the section; None for a recipe without published scores."""
    if recipe.published is None or recipe.name is None:
        return None
    source = f"arXiv {recipe.published.partition('/')[0]}"
    found = [_beside(score, recipe, results) for score in published.scores(recipe.published, recipe.name)]
    if not found:
        return {"text": f"{source} prints no score for '{recipe.name}'.", "rows": [], "scores": []}
    rows = [[source, "of", "task", "metric", "published", "this run"]]
    for one in found:
        printed = f"{one['published'] / 100:.4f}" if one["share"] else f"{one['published']:g}"
        task = one["tasks"][0] if len(one["tasks"]) == 1 else f"mean of {', '.join(one['tasks'])}"
        rows.append([one["table"], one["policy"], task, one["metric"], printed, _shown(one["ours"])])
    return {"text": f"{source}, '{recipe.name}'. {CAUTION}", "rows": rows, "scores": found}


def _beside(score: Score, recipe: Recipe, results: Mapping[str, Any]) -> dict[str, Any]:
    trained = "final" if recipe.rl or recipe.preference else "init"
    policy = "init" if score.policy == "init" else trained
    estimates = [_estimate(results, task, policy, metric) for task, metric in score.measured]
    if len(estimates) == 1:
        ours = estimates[0]
    else:  # of several tasks no interval: they are no sample of anything
        means = [e["mean"] for e in estimates if e is not None]
        ours = {"mean": sum(means) / len(means)} if len(means) == len(estimates) else None
    return {
        "table": score.table,
        "policy": policy,
        "tasks": [task for task, _ in score.measured],
        "metric": ", ".join(dict.fromkeys(metric for _, metric in score.measured)),
        "share": score.share,
        "published": score.printed,
        "ours": ours,
    }


def _estimate(results: Mapping[str, Any], task: str, policy: str, metric: str) -> Mapping[str, Any] | None:
    entry = results.get("tasks", {}).get(task, {}).get("policies", {}).get(policy, {})
    kind, at, k = metric.partition("@")
    if at:
        found = entry.get(kind, {}).get(k)
    else:
        found = entry.get("rating") if metric == "rating of 10" else entry.get("categories", {}).get(metric)
    estimate: Mapping[str, Any] | None = found
    return estimate


def _shown(ours: Mapping[str, Any] | None) -> str:
    if ours is None:
        return "–"
    return tables.interval(ours) if "low" in ours else f"{ours['mean']:.3f}"
