"""Several runs as one self-contained HTML page that compares them, as Markdown, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from heatbath import recipe as recipes
from heatbath.report import (
    browser,
    captions,
    comparison,
    costs,
    profile_figures,
    score_figures,
    scores,
    tables,
    training_figures,
)
from heatbath.report.comparison import Compared
from heatbath.report.drawing import POLICY_LOOKS, Look, run_looks, swatch
from heatbath.report.page import browsing, paths_of
from heatbath.report.rendering import rendered
from heatbath.run import OWN_TEST, write_atomically
from heatbath.stages import scoring

KEPT = ("title", "verdict", "runs", "differences", "recipe", "findings", "caveats")


def write_comparison(folders: Sequence[Path], out: Path | None = None) -> dict[str, Path]:
    """Writes one page of several runs, with Markdown and JSON beside it; returns their paths. Without `out` it is
    report-<n>-runs.html beside the first run's folder. Raises RecipeError for what is no run, or given twice."""
    runs = comparison.read(folders)
    found = gather(runs)
    paths = paths_of(out or folders[0].resolve().parent / f"report-{len(runs)}-runs.html")
    write_atomically(paths["html"], rendered("runs.html", found))
    write_atomically(paths["md"], _markdown(found))
    kept = json.dumps({key: found["json"][key] for key in KEPT}, indent=1, ensure_ascii=False)
    write_atomically(paths["json"], kept + "\n")
    return paths


def gather(runs: Sequence[Compared]) -> dict[str, Any]:
    """Everything the page says."""
    looks = {each.name: look for each, look in zip(runs, run_looks([each.name for each in runs]), strict=True)}
    tasks = comparison.tasks_of(runs)
    found = {task: comparison.differences(runs, task) for task in tasks}
    scoring.correct([d for rows in found.values() for d in rows])
    shown = [_task(runs, looks, task, found[task]) for task in tasks]
    said = comparison.verdict(runs, found[tasks[0]], tasks[0]) if tasks else comparison.without_scores(runs)
    listed = comparison.findings_of(runs)
    title = f"{len(runs)} runs compared"
    caveats = comparison.caveats(runs, tasks[0] if tasks else None)
    values: dict[str, Any] = {
        "title": title,
        "subtitle": _subtitle(runs),
        "verdict": said,
        "legend": [_legend(each, looks[each.name], tasks[0] if tasks else None) for each in runs],
        "css": {name: look.css for name, look in looks.items()} | {p: f"policy-{p}" for p in POLICY_LOOKS},
        "tasks": shown,
        "ratings": comparison.rating_rows(runs),
        "shift": _shift(runs, looks),
        "training": [t for stage in captions.TITLES if (t := _training(runs, looks, stage))],
        "findings": [(name, f) for name, f in listed],
        "recipe_rows": comparison.recipe_rows(runs),
        "recipes": [(each.name, recipes.as_toml(each.run.recipe)) for each in runs],
        "costs": _cost_rows(runs),
        "environments": _environment_rows(runs),
        "browser": _browser(runs, looks),
        "caveats": caveats,
    }
    values["json"] = {
        "title": title,
        "verdict": said,
        "runs": [_entry(each) for each in runs],
        "differences": [{"task": task, **d} for task, rows in found.items() for d in rows],
        "recipe": _recipe_json(values["recipe_rows"]),
        "findings": [{"run": name, "name": f.name, "number": f.number, "says": f.says} for name, f in listed],
        "caveats": caveats,
    }
    return {**values, "sections": _sections(values)}


def _sections(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    listed = [
        *((task["id"], task["title"], True) for task in values["tasks"]),
        ("judged", "Judged answers", len(values["ratings"]) > 1),
        ("findings", "Findings", values["findings"]),
        ("shift", "Shift", values["shift"]),
        *((stage["id"], stage["title"], True) for stage in values["training"]),
        ("recipes", "Recipes", True),
        ("samples", "Samples", values["browser"]),
        ("care", "Caveats", values["caveats"]),
        ("cost", "Environment and cost", True),
    ]
    return [(anchor, name) for anchor, name, there in listed if there]


def _subtitle(runs: Sequence[Compared]) -> str:
    models = list(dict.fromkeys(each.run.recipe.model or "a new base" for each in runs))
    started = sorted((each.run.read_json("env.json").get("started") or "")[:10] for each in runs)
    days = started[0] if started[0] == started[-1] else f"{started[0]} to {started[-1]}"
    return f"{', '.join(models)} · {days}"


def _legend(each: Compared, look: Look, task: str | None) -> dict[str, Any]:
    """A run's name and look, what it is, the first score it ends with, and what that is over its own base."""
    own = {"name": each.name, "css": look.css, "swatch": Markup(swatch(look)), "title": captions.title(each.run.recipe)}
    ended = comparison.contender(each, task, each.last) if task is not None else None
    if ended is None and task is None and (rated := comparison.ratings(each)):
        return {**own, **_rated(each, *next(iter(rated.items())))}
    if ended is None:
        return {**own, "value": "–", "interval": "no samples", "gain": ""}
    found = scores.estimate(ended.counted, 1)
    base = comparison.contender(each, str(task), "base") if each.last != "base" else None
    gain = scores.compared([base, ended]) if base is not None else []
    return {
        **own,
        "value": f"{found['mean']:.2f}",
        "interval": f"{each.last} pass@1 {_between(found)}".strip(),
        "gain": f"over its base {tables.interval(gain[0], signed=True, digits=2)}" if gain else "",
    }


def _rated(each: Compared, task: str, found: Mapping[str, Any]) -> dict[str, str]:
    """The same of a run that has answers for a judge alone: its last policy's rating."""
    rating = found[str(each.last)]["rating"] if each.last in found else None
    if rating is None:
        return {"value": "–", "interval": f"no rating in {task}", "gain": ""}
    told = f"{each.last} rating of 10 in {task} {_between(rating)}"
    return {"value": f"{rating['mean']:.2f}", "interval": told.strip(), "gain": ""}


def _between(estimate: Mapping[str, Any]) -> str:
    return "" if estimate["low"] is None else f"{estimate['low']:.2f}–{estimate['high']:.2f}"


def _task(
    runs: Sequence[Compared], looks: Mapping[str, Look], task: str, found: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """One task's part of the page: curves, differences, tables."""
    drawn = _curves(runs, looks, task)
    for of, told in (("end", "what the runs end with"), ("start", "the starts of RL")):
        groups: dict[str, list[tuple[str, Mapping[str, Any], str]]] = {}
        for d in sorted((d for d in found if d["of"] == of), key=lambda d: d["k"]):
            label = f"{looks[d['from']].short} → {looks[d['to']].short}"
            groups.setdefault(f"pass@{d['k']}", []).append((label, d, looks[d["to"]].colour))
        if groups:
            said = f"paired differences of pass@k, {told}, with 95 % intervals around 0 ({task})"
            drawn.append(score_figures.forest(groups, "difference on the same problems", said, title=told))
    own = task == OWN_TEST
    return {
        "id": "scores" if own else f"task-{task}",
        "title": "Held-out problems" if own else task,
        "figures": [Markup(svg) for svg in drawn],
        "rows": comparison.score_rows(runs, task),
        "differences": comparison.difference_rows(found),
        "of": comparison.differences_of(found) if found else "",
    }


def _curves(runs: Sequence[Compared], looks: Mapping[str, Look], task: str) -> list[str]:
    """pass@k over k of the policies that the runs end with, with the base; and of their starts, where two have one."""
    out = []
    ends = [(each, each.last) for each in runs]
    starts = [(each, "init") for each in runs if each.last not in ("init", "base", None)]
    for told, policies in (("what the runs end with", ends), ("the starts of RL", starts)):
        lines = [
            (looks[each.name], scores.curve(each.counted[task][policy]))
            for each, policy in policies
            if policy in each.counted.get(task, {}) and policy is not None
        ]
        if len(lines) < 2:
            continue
        base = next((r.counted[task]["base"] for r in runs if "base" in r.counted.get(task, {})), None)
        if base is not None and comparison.same_base(runs) and all(policy != "base" for _, policy in policies):
            lines.append((POLICY_LOOKS["base"], scores.curve(base)))
        if all(len(curve) > 1 for _, curve in lines):
            name = "" if task == OWN_TEST else f", {task}"
            description = f"pass@k over k with 95 % bands: {told}{name}; the table below holds the numbers"
            out.append(score_figures.pass_curves(lines, description, title=told))
    return out


def _shift(runs: Sequence[Compared], looks: Mapping[str, Look]) -> dict[str, Any] | None:
    """The transitions that the runs have measured, side by side."""
    from heatbath.stages import shift_summary

    found = {each.name: shift for each in runs if (shift := each.run.read_json("shift.json"))}
    if not found:
        return None
    pairs = dict.fromkeys((t["from"], t["to"]) for shift in found.values() for t in shift["transitions"])
    drawn, listed = [], []
    for start, end in pairs:
        own = {
            name: t
            for name, shift in found.items()
            for t in shift["transitions"]
            if (t["from"], t["to"]) == (start, end)
        }
        arrow = f"{start} → {end}"
        lines = [(looks[name], t["overlap"]) for name, t in own.items()]
        drawn.append(Markup(profile_figures.overlap(lines, arrow, f"top-K overlap over K, {arrow}, of each run")))
        listed.append((arrow, tables.shift_rows(own)))
    texts = {name: shift_summary.described(shift) for name, shift in found.items()}
    measured = {json.dumps([s["options"], s["data"].get("fingerprint")], sort_keys=True) for s in found.values()}
    return {
        "figures": drawn,
        "tables": listed,
        "texts": texts if len(measured) > 1 else {"": next(iter(texts.values()))},
        "alike": len(measured) == 1,
    }


def _training(runs: Sequence[Compared], looks: Mapping[str, Look], stage: str) -> dict[str, Any] | None:
    logged = [(looks[each.name], rows) for each in runs if (rows := each.run.metrics(stage))]
    if not logged:
        return None
    drawn = [Markup(svg) for svg in training_figures.overlaid_curves(stage, logged)]
    longest = max(len(rows) for _, rows in logged)
    caption = f"{len(logged)} of {len(runs)} runs have this stage." if len(logged) < len(runs) else ""
    if len(logged) > 1 and longest > training_figures.OVERLAID:
        caption += f" Long curves are means of neighbouring steps, {training_figures.OVERLAID} points each."
    caption += training_figures.unseen(stage, [rows for _, rows in logged])
    return {"id": stage, "title": captions.TITLES[stage], "figures": drawn, "caption": caption.strip()}


def _cost_rows(runs: Sequence[Compared]) -> list[list[str]]:
    rows: list[list[str]] = []
    for each in runs:
        head, *stages = costs.stage_rows(each.run, each.drawn)
        rows = rows or [["run", *head]]
        rows += [[each.name, *row] for row in stages]
    return rows


def _environment_rows(runs: Sequence[Compared]) -> list[tuple[str, str]]:
    """What all runs share once, and of the rest each run's own."""
    facts = {each.name: dict(costs.environment(each.run.read_json("env.json"))) for each in runs}
    out = []
    for key in dict.fromkeys(key for own in facts.values() for key in own):
        values = {name: own.get(key, comparison.MISSING) for name, own in facts.items()}
        if len(set(values.values())) == 1:
            out.append((key, next(iter(values.values()))))
        else:
            out += [(f"{key}, {name}", value) for name, value in values.items()]
    return out


def _browser(runs: Sequence[Compared], looks: Mapping[str, Look]) -> dict[str, Any] | None:
    given = []
    for each in runs:
        by_policy = {p: [row for row in each.samples if row["policy"] == p] for p in each.run.policies}
        given.append((each.name, looks[each.name].css, by_policy))
    voices = browser.voices(given)
    if not voices:
        return None
    values = browsing(voices, "Run and policy")
    ends = {f"{each.name} {each.last}" for each in runs}
    last = [i for i, voice in enumerate(voices) if voice.label in ends]
    return values | ({"from": last[0], "to": last[-1]} if len(last) > 1 else {})


def _entry(each: Compared) -> dict[str, Any]:
    return {
        "name": each.name,
        "folder": str(each.run.folder),
        "title": captions.title(each.run.recipe),
        "ends_with": each.last,
        "results": each.results,
    }


def _recipe_json(rows: Sequence[Sequence[str]]) -> dict[str, dict[str, str]]:
    head, *keys = rows
    return {key: dict(zip(head[1:], values, strict=True)) for key, *values in keys}


def _markdown(found: Mapping[str, Any]) -> str:
    parts = [f"# {found['title']}", found["subtitle"], found["verdict"]]
    parts.append("\n".join(f"- {run['name']}: {run['title']}" for run in found["legend"]))
    for task in found["tasks"]:
        shown = [task[key] for key in ("rows", "differences") if len(task[key]) > 1]
        parts += [f"## {task['title']}", *map(tables.markdown, shown)]
    if len(found["ratings"]) > 1:
        parts += ["## Judged answers", tables.markdown(found["ratings"])]
    if found["findings"]:
        parts += ["## Findings", "\n".join(f"- {name}, **{f.name}**: {f.says}" for name, f in found["findings"])]
    if found["shift"]:
        parts.append("## Shift")
        for arrow, rows in found["shift"]["tables"]:
            parts += [f"{arrow}:", tables.markdown(rows)]
    parts += ["## Recipes", _differing(found)]
    parts += ["## Read this with care", "\n".join(f"- {c}" for c in found["caveats"])]
    if len(found["costs"]) > 1:
        parts += ["## Environment and cost", tables.markdown(found["costs"])]
    parts.append("\n".join(f"- {key}: {value}" for key, value in found["environments"]))
    return "\n\n".join(part for part in parts if part) + "\n"


def _differing(found: Mapping[str, Any]) -> str:
    rows = found["recipe_rows"]
    return tables.markdown(rows) if len(rows) > 1 else "The recipes are the same."
