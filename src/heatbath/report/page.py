"""One run as a self-contained HTML page (no request leaves it), as Markdown, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from markupsafe import Markup

from heatbath import recipe as recipes
from heatbath.errors import RecipeError
from heatbath.report import (
    beside,
    browser,
    captions,
    costs,
    findings,
    profile_figures,
    score_figures,
    scores,
    surprise_section,
    tables,
    training_figures,
)
from heatbath.report.drawing import POLICY_LOOKS, transition_look
from heatbath.report.rendering import rendered
from heatbath.report.surprise_section import write_surprise
from heatbath.run import OWN_TEST, Run, write_atomically
from heatbath.stages import scoring
from heatbath.stages.evaluate import SAMPLING
from heatbath.verify.verdict import STATUSES

__all__ = ["gather", "paths_of", "section_list", "write_report", "write_surprise"]

KEPT = (
    *("title", "verdict", "results", "surprise_profile", "shift_found", "readiness", "findings", "unjudged"),
    *("published", "caveats", "command", "facts", "costs", *captions.TITLES),
)


def write_report(run: Run, out: Path | None = None) -> dict[str, Path]:
    """Writes report.html, report.md and report.json of whatever stages a run has finished, into its folder or beside
    `out`; returns their paths."""
    found = gather(run)
    paths = paths_of(out or run.folder / "report.html")
    write_atomically(paths["html"], rendered("page.html", found))
    write_atomically(paths["md"], _markdown(found))
    names = {"surprise_profile": "surprise", "shift_found": "shift"}
    kept = {names.get(key, key): found[key] for key in KEPT}
    write_atomically(paths["json"], json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    return paths


def paths_of(page: Path) -> dict[str, Path]:
    """The three files of a report, by kind, given that of the page. Raises RecipeError where that is no .html file."""
    if page.is_dir() or page.suffix != ".html":
        raise RecipeError("the page is a file that ends in .html", f"--out {page}", "name such a file")
    page.parent.mkdir(parents=True, exist_ok=True)
    return {"html": page, **{kind: page.with_suffix(f".{kind}") for kind in ("md", "json")}}


def gather(run: Run) -> dict[str, Any]:
    """Everything the page says."""
    recipe, results, profile = run.recipe, run.read_json("results.json"), run.read_json("surprise.json")
    env = run.read_json("env.json")
    logged = {stage: run.metrics(stage) for stage in captions.TITLES}
    drawn = run.samples()
    samples = browser.rated(run, scores.scored(drawn, results or {}))
    graded = scores.by_task(samples)
    readiness, shift = _readiness(run), run.read_json("shift.json")
    note = surprise_section.note(profile) if profile else ""
    listed, unjudged = findings.look(findings.Seen.of(run, scores.graded(samples)))
    found = {
        "title": captions.title(recipe),
        "subtitle": f"{recipe.model or 'a new base'} · seed {recipe.seed} · {env['started'][:10]} · {env['device']}",
        "results": results,
        "headline": captions.headline(results) if results else [],
        "verdict": captions.verdict(results) if results else "",
        "scores": _scores(run, OWN_TEST, results, graded) if results and results["policies"] else None,
        "tasks": _tasks(run, results, graded) if results and results.get("tasks") else None,
        "published": beside.section(recipe, results) if results else None,
        "surprise_profile": profile,
        "surprise": surprise_section.section(profile) if profile and not note else None,
        "surprise_note": note,
        "shift": _shift(shift) if shift else None,
        "shift_found": {k: v for k, v in shift.items() if k != "sequences"} if shift else None,
        "readiness": readiness,
        "readiness_text": captions.readiness(readiness) if readiness else "",
        "readiness_rows": tables.readiness_rows(readiness, readiness["happened"]) if readiness else [],
        "findings": [asdict(found) for found in listed],
        "unjudged": [asdict(found) for found in unjudged],
        "no_findings": "None of those that could be judged." if unjudged else "None.",
        "looked_for": bool(results or any(logged[stage] for stage in captions.TRAINED)),
        **logged,
        "training": [stage for name in logged if (stage := _training(name, logged[name]))],
        "browser": _browser(run.policies, samples),
        "caveats": captions.caveats(run, results, profile, len(drawn) - len(samples)),
        "command": env["command"],
        "facts": captions.settings(recipe) + costs.environment(env),
        "costs": costs.stage_rows(run, drawn),
        "recipe_toml": recipes.as_toml(recipe),
    }
    return {**found, "sections": section_list(found)}


def section_list(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Anchor and name of every section that the page has."""
    listed = [
        ("scores", "Held-out problems", found["scores"]),
        ("tasks", "Tasks", found["tasks"]),
        ("published", "Published scores", found["published"]),
        ("findings", "Findings", found["looked_for"]),
        ("shift", "Shift", found["shift"]),
        ("surprise", "Surprise", found["surprise"] or found["surprise_note"]),
        ("readiness", "Readiness", found["readiness"]),
        *((stage["id"], stage["title"], True) for stage in found["training"]),
        ("samples", "Samples", found["browser"]),
        ("care", "Caveats", True),
        ("run", "What was run", True),
    ]
    return [(anchor, name) for anchor, name, there in listed if there]


def _scores(run: Run, task: str, results: Mapping[str, Any], graded: scores.ByTask) -> dict[str, Any]:
    """A task's part of the page, of its part of the results."""
    rows = tables.difference_rows(results)
    of = "" if task == OWN_TEST else f" of {task}"
    drawn = [_curves(results["policies"], graded.get(task, {}), of)]
    if forest := _forest(results["differences"], of):
        drawn.append(forest)
    conditions = (run.read_json(SAMPLING) or {}).get(task, run.recipe.eval.model_dump())
    return {
        "of": of,
        "figures": drawn,
        "caption": captions.conditions(results, conditions)
        + (" A hollow dot marks a difference whose interval holds 0." if len(rows) > 1 else ""),
        "rows": tables.results_rows(results),
        "differences": rows,
        "tested": any(d.get("p") is not None for d in results["differences"]),
        "verdicts": _verdict_rows(results),
    }


def _curves(policies: Mapping[str, Any], samples: Mapping[str, Any], of: str) -> Markup:
    """pass@k over k from the samples, or dots where there are none, or only one of each problem."""
    curves = {p: scores.curve(scoring.per_problem(rows)) for p, rows in samples.items() if p in policies}
    named = ", ".join(policies)
    if len(curves) == len(policies) and all(len(curve) > 1 for curve in curves.values()):
        told = f"pass@k of {named}{of} over k with 95 % bands; the table below holds the numbers"
        return Markup(score_figures.pass_curves([(POLICY_LOOKS[p], curves[p]) for p in policies], told))
    rows = _dots(policies)
    told = f"pass@k of {named}{of} with 95 % intervals; the table below holds the numbers"
    return Markup(score_figures.dots(rows, "share of problems (95 % interval)", told))


def _dots(policies: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    ks = list(dict.fromkeys(k for found in policies.values() for k in found["pass"]))
    return [(f"pass@{k}", {p: f["pass"][k] for p, f in policies.items() if k in f["pass"]}) for k in ks]


def _forest(differences: Sequence[Mapping[str, Any]], of: str) -> Markup | None:
    if not differences:
        return None
    groups: dict[str, list[tuple[str, Mapping[str, Any], str]]] = {}
    for d in sorted(differences, key=lambda d: d["k"]):
        row = (f"{d['from']} → {d['to']}", d, POLICY_LOOKS[d["to"]].colour)
        groups.setdefault(f"pass@{d['k']}", []).append(row)
    told = f"paired differences of pass@k{of} with 95 % intervals around 0; the table below holds the numbers"
    return Markup(score_figures.forest(groups, "difference on the same problems", told))


def _tasks(run: Run, results: Mapping[str, Any], graded: scores.ByTask) -> dict[str, Any]:
    tasks = results["tasks"]
    scored = {name: found for name, found in tasks.items() if found.get("kind") != "judge" and found["policies"]}
    rows = []
    for name, found in scored.items():
        k = next(iter(next(iter(found["policies"].values()))["pass"]))
        rows.append((f"{name}\npass@{k}", {p: f["pass"][k] for p, f in found["policies"].items()}))
    judged = [(name, tables.category_rows(found)) for name, found in tasks.items() if found.get("kind") == "judge"]
    drawn = []
    if rows:
        told = f"scores of {', '.join(scored)} with 95 % intervals; the table below holds the numbers"
        drawn.append(Markup(score_figures.dots(rows, "share of problems (95 % interval)", told)))
    return {
        "figures": drawn,
        "caption": "The first pass@k of each task with its 95 % interval over problems.",
        "rows": tables.task_rows(tasks),
        "differences": tables.task_difference_rows(tasks),
        "each": [(name, _scores(run, name, found, graded)) for name, found in scored.items()],
        "categories": judged,
    }


def _verdict_rows(results: Mapping[str, Any]) -> list[list[str]]:
    seen = [s for s in STATUSES if any(s in found["verdicts"] for found in results["policies"].values())]
    rows = [["policy", *seen]]
    for name, found in results["policies"].items():
        rows.append([name, *(f"{found['verdicts'].get(s, 0):,}" for s in seen)])
    return rows


def _shift(found: Mapping[str, Any]) -> dict[str, Any]:
    from heatbath.stages import shift_summary

    lines = [(transition_look(t["from"], t["to"]), t["overlap"]) for t in found["transitions"]]
    drawn = profile_figures.overlap(lines, "top-K overlap", "top-K overlap over K of each transition")
    text = shift_summary.described(dict(found))
    return {
        "text": f"{text[0].upper()}{text[1:]}.",
        "figures": [Markup(drawn)],
        "rows": tables.shift_rows({f"{t['from']} → {t['to']}": t for t in found["transitions"]}),
    }


def _training(stage: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not rows:
        return None
    drawn = [Markup(svg) for svg in training_figures.learning_curves(stage, rows)]
    caption = getattr(captions, stage)(rows) + training_figures.unseen(stage, [rows])
    return {"id": stage, "title": captions.TITLES[stage], "figures": drawn, "caption": caption}


def _browser(policies: Sequence[str], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not samples:
        return None
    by_policy = {p: [row for row in samples if row["policy"] == p] for p in policies}
    return browsing(browser.voices([("", "", by_policy)]), "Policy")


def browsing(found: Sequence[browser.Voice], who: str) -> dict[str, Any]:
    """The values of the samples' section; `who` names what a voice is."""
    data = browser.embedded(found)
    return {
        "data": data,
        "json": Markup(browser.as_json(data)),
        "told": browser.told(data),
        "examples": browser.examples(found),
        "who": who,
        "from": 0,
        "to": len(found) - 1,
    }


def _readiness(run: Run) -> dict[str, Any] | None:
    """readiness.json, and under `happened` what became of its prediction."""
    found: dict[str, Any] | None = run.read_json("readiness.json")
    if found is None:
        return None
    from heatbath.stages.readiness import compare

    return {**found, "happened": compare(run)}


def _markdown(found: Mapping[str, Any]) -> str:
    parts = [f"# {found['title']}", found["subtitle"]]
    if found["results"]:
        parts += [found["verdict"], tables.markdown_results(found["results"])]
    if found["scores"]:
        parts += [found["scores"]["caption"], "## Verdicts", tables.markdown(found["scores"]["verdicts"])]
    if found["tasks"]:
        parts += [f"## {name} by category\n\n{tables.markdown(rows)}" for name, rows in found["tasks"]["categories"]]
    if found["published"]:
        shown = tables.markdown(found["published"]["rows"]) if found["published"]["rows"] else ""
        parts += ["## Published scores", found["published"]["text"], shown]
    if found["shift"]:
        parts += ["## Shift", found["shift"]["text"], tables.markdown(found["shift"]["rows"])]
    if found["surprise"] or found["surprise_note"]:
        parts += ["## Surprise", found["surprise"]["text"] if found["surprise"] else found["surprise_note"]]
    if found["readiness"]:
        warned = [f"**Warning:** {warning}." for warning in found["readiness"]["warnings"]]
        parts += ["## Readiness", found["readiness_text"], *warned, tables.markdown(found["readiness_rows"])]
    if found["looked_for"]:
        listed = [
            f"- **{f['name']}**: {f['says']}. {f['remedy'][0].upper()}{f['remedy'][1:]}." for f in found["findings"]
        ]
        listed = listed or ["None.\n"]
        listed += [f"- not judged: {u['name']} ({u['why']})" for u in found["unjudged"]]
        parts += ["## Findings", "\n".join(listed)]
    parts += ["## Read this with care", "\n".join(f"- {c}" for c in found["caveats"])]
    parts += ["## What was run", f"    {found['command']}", "\n".join(f"- {k}: {v}" for k, v in found["facts"])]
    if len(found["costs"]) > 1:
        parts.append(tables.markdown(found["costs"]))
    return "\n\n".join(part for part in parts if part) + "\n"
