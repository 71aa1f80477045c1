"""One run as a self-contained HTML page (no request leaves it), as Markdown, and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from heatbath import recipe as recipes
from heatbath.report import figures, findings, tables
from heatbath.run import Run, write_atomically
from heatbath.surprise import reading
from heatbath.verify.verdict import STATUSES

EXAMPLES = 6
TRAINED = ("sft", "preference", "rl")


def write_report(run: Run) -> dict[str, Path]:
    """Writes report.html, report.md and report.json into the run's folder from whatever stages it has finished."""
    found = gather(run)
    paths = {kind: run.folder / f"report.{kind}" for kind in ("html", "md", "json")}
    drawn = {name: Markup(svg) for name, svg in _figures(found).items()}  # our own drawing, not model output
    write_atomically(paths["html"], rendered("page.html", {**found, "figures": drawn}))
    write_atomically(paths["md"], _markdown(found))
    keep = (
        "title",
        "verdict",
        "results",
        "surprise",
        "readiness",
        "findings",
        "unjudged",
        "caveats",
        "command",
        "facts",
    )
    keep += ("sft", "preference", "rl")
    write_atomically(paths["json"], json.dumps({k: found[k] for k in keep}, indent=1, ensure_ascii=False) + "\n")
    return paths


def rendered(template: str, values: dict[str, Any]) -> str:
    """The page of that template; every value is escaped that is not our own drawing."""
    environment = Environment(
        loader=PackageLoader("heatbath", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(template).render(values)


def write_surprise(folder: Path, found: dict[str, Any], command: str) -> Path:
    """Writes surprise.html of a profile with its cache sizes; returns its path."""
    values = {
        "title": f"What β does: {found['model']}",
        "subtitle": f"{found['rows']:,} demonstrations, {found['tokens']:,} supervised tokens",
        "surprise": found,
        "surprise_text": _surprise_text(found),
        "kind_rows": tables.kind_rows(found),
        "cache_rows": tables.cache_rows(found),
        "cache_text": tables.cache_text(found),
        "command": command,
        "open_details": True,
        "figures": {"surprise": Markup(figures.surprise(found))},
    }
    write_atomically(folder / "surprise.html", rendered("surprise.html", values))
    return folder / "surprise.html"


def gather(run: Run) -> dict[str, Any]:
    """Everything the page says, before it is drawn."""
    recipe, results, surprise = run.recipe, run.read_json("results.json"), run.read_json("surprise.json")
    env = run.read_json("env.json")
    sft, preference, rl = (run.metrics(stage) for stage in TRAINED)
    readiness, seen = _readiness(run), findings.Seen.of(run)
    unjudged = findings.unjudged(seen)
    samples = {policy: run.samples(policy) for policy in run.policies}
    return {
        "title": _title(recipe),
        "subtitle": f"{recipe.model} · seed {recipe.seed} · {env['started'][:10]} · {env['device']}",
        "results": results,
        "verdict": _verdict(results) if results else "",
        "conditions": _conditions(recipe, results) if results else "",
        "result_rows": tables.results_rows(results) if results else [],
        "difference_rows": tables.difference_rows(results) if results else [],
        "verdict_rows": _verdict_rows(results) if results else [],
        "surprise": surprise,
        "surprise_text": _surprise_text(surprise) if surprise else "",
        "kind_rows": tables.kind_rows(surprise) if surprise else [],
        "open_details": False,
        "readiness": readiness,
        "readiness_text": _readiness_text(readiness) if readiness else "",
        "readiness_rows": tables.readiness_rows(readiness, readiness["happened"]) if readiness else [],
        "findings": [asdict(found) for found in findings.find(seen)],
        "unjudged": [asdict(found) for found in unjudged],
        "no_findings": "None." if len(unjudged) < len(findings.LOOKS) else "None could be judged.",
        "looked_for": bool(rl),
        "sft": sft,
        "preference": preference,
        "rl": rl,
        "sft_caption": _sft_caption(sft) if sft else "",
        "preference_caption": _preference_caption(preference) if preference else "",
        "rl_caption": _rl_caption(rl) if rl else "",
        "examples": _examples(samples),
        "caveats": _caveats(run, results, surprise),
        "command": env["command"],
        "facts": _facts(run, env),
        "recipe_toml": recipes.as_toml(recipe),
    }


def _figures(found: dict[str, Any]) -> dict[str, str]:
    return {
        "pass_at_k": figures.pass_at_k(found["results"]) if found["results"] else "",
        "surprise": figures.surprise(found["surprise"]) if found["surprise"] else "",
        "sft": figures.sft_curves(found["sft"]) if found["sft"] else "",
        "preference": figures.preference_curves(found["preference"]) if found["preference"] else "",
        "rl": figures.rl_curves(found["rl"]) if found["rl"] else "",
    }


def _title(recipe: recipes.Recipe) -> str:
    start = f"{_objective(recipe)} warm start" if recipe.sft else "no warm start"
    if recipe.preference:
        return f"{start}, then {recipe.preference.method.upper()}"
    return f"{start}, then RL ({recipe.rl.policy.name})" if recipe.rl else start


def _objective(recipe: recipes.Recipe) -> str:
    assert recipe.sft is not None
    spec = recipe.sft.objective
    names = {"beta": "β", "smoothing": "λ"}
    hyper = ", ".join(f"{names.get(k, k)} = {_hyper(v)}" for k, v in spec.hyper.items())
    name = spec.name.upper() if ":" not in spec.name else spec.name.rpartition(":")[2]
    return f"{name} ({hyper})" if hyper else name


def _hyper(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_hyper(v)}" for k, v in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _verdict(results: dict[str, Any]) -> str:
    policies = results["policies"]
    k = next(iter(next(iter(policies.values()))["pass"]))
    chain = " → ".join(f"{name} {found['pass'][k]['mean']:.2f}" for name, found in policies.items())
    said = [f"pass@{k}: {chain}."]
    for d in results["differences"]:
        if str(d["k"]) == k and d["low"] is not None:
            change = tables.interval(d, signed=True, digits=2)
            said.append(f"{d['from']} → {d['to']} {change}: {tables.reading(d)}.")
    return " ".join(said)


def _conditions(recipe: recipes.Recipe, results: dict[str, Any]) -> str:
    first = next(iter(results["policies"].values()))
    return (
        f"{first['problems']} problems × {recipe.eval.samples} samples of each policy, "
        f"T = {recipe.eval.temperature:g}, at most {recipe.eval.max_new_tokens} tokens; pass@k unbiased."
    )


def _verdict_rows(results: dict[str, Any]) -> list[list[str]]:
    seen = [s for s in STATUSES if any(s in found["verdicts"] for found in results["policies"].values())]
    rows = [["policy", *seen]]
    for name, found in results["policies"].items():
        rows.append([name, *(f"{found['verdicts'].get(s, 0):,}" for s in seen)])
    return rows


def _surprise_text(profile: dict[str, Any]) -> str:
    own = profile["objective"]
    tail = f"A share of {profile['suggested_share']:.0%} would be β = {profile['suggested_beta']:.1f}."
    if own is None:
        return f"This start does not use β. {tail}"
    told = reading(own).lstrip("; ")
    told = told or "GIFT differs from SFT here; whether for the better, only a comparison with SFT tells"
    name = "The target" if profile["beta"] is None else f"β = {profile['beta']:.4g}"
    share = f"{own['w_below_0.5']:.2%}"
    return f"{name} leaves {share} of the supervised tokens to the base (w < 0.5): {told}. {tail}"


def _sft_caption(rows: list[dict[str, Any]]) -> str:
    val = [r for r in rows if "val/nll" in r]
    speed = [r["tokens_per_second"] for r in rows if "tokens_per_second" in r]
    parts = [f"{rows[-1]['step']} optimizer steps, {sum(speed) / len(speed):,.0f} tokens per second." if speed else ""]
    if len(val) > 1:
        best = min(val, key=lambda r: r["val/nll"])
        parts.append(
            f"Validation NLL {val[0]['val/nll']:.3f} before training, {val[-1]['val/nll']:.3f} at the end, "
            f"lowest {best['val/nll']:.3f} at step {best['step']}."
        )
    return " ".join(p for p in parts if p)


def _preference_caption(rows: list[dict[str, Any]]) -> str:
    ordered = [row["accuracy"] for row in rows if "accuracy" in row]
    said = f"{rows[-1]['step']} optimizer steps."
    return f"{said} Of the last step's pairs {ordered[-1]:.0%} were in the right order." if ordered else said


def _rl_caption(rows: list[dict[str, Any]]) -> str:
    informative = [r["informative_share"] for r in rows if "informative_share" in r]
    seconds = [r["step_seconds"] for r in rows if "step_seconds" in r]
    parts = [f"{len(seconds)} optimizer steps of {sum(seconds) / len(seconds):.1f} s." if seconds else ""]
    if informative:
        dead = 1 - sum(informative) / len(informative)
        parts.append(f"{dead:.0%} of the groups had no signal (all completions graded alike).")
    penalised = any("kl_reference" in row for row in rows)
    parts.append(f"KL is the k3 estimate on the sampled completions{'' if penalised else ', measured, not penalised'}.")
    return " ".join(p for p in parts if p)


def _readiness(run: Run) -> dict[str, Any] | None:
    """readiness.json, and under `happened` what became of its prediction."""
    found: dict[str, Any] | None = run.read_json("readiness.json")
    if found is None:
        return None
    from heatbath.stages.readiness import compare

    return {**found, "happened": compare(run)}


def _readiness_text(found: dict[str, Any]) -> str:
    said = (
        f"Before the first step {found['prompts']} of the {found['of_prompts']:,} prompts were answered "
        f"{found['group_size']} times each, at T = {found['temperature']:g} and with at most "
        f"{found['max_new_tokens']:,} tokens. A group is informative if it holds two different verdicts; the others "
        "teach nothing."
    )
    return " ".join([said, *(f"{note[0].upper()}{note[1:]}." for note in found["notes"])])


def _examples(samples: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One sample of each policy for the first problems, the first one drawn, not a chosen one."""
    first: dict[str, dict[str, dict[str, Any]]] = {}
    for policy, rows in samples.items():
        for row in rows:
            first.setdefault(row["problem"], {}).setdefault(policy, row)
    picked = sorted(first.items())[:EXAMPLES]
    return [
        {"question": q["question"], "gold": q["gold"], "samples": list(by.values())}
        for _, by in picked
        for q in [next(iter(by.values()))]
    ]


def _caveats(run: Run, results: dict[str, Any] | None, surprise: dict[str, Any] | None) -> list[str]:
    recipe = run.recipe
    late = [stage for stage in TRAINED if getattr(recipe, stage) is not None and not run.metrics(stage)]
    late += [] if results else ["eval"]
    said = [f"Unfinished: {', '.join(late)} did not run yet."] if late else []
    said += ["One training seed. Seeds can differ by more than methods do; compare several before believing a ranking."]
    if recipe.sft and recipe.rl:
        said.append(
            "No RL straight from the base stands beside this run, so it does not show that RL needed this start."
        )
    if results:
        for name, found in results["policies"].items():
            if found["truncated_share"] > 0.05:
                said.append(
                    f"{found['truncated_share']:.0%} of the completions of {name} were cut at "
                    f"{recipe.eval.max_new_tokens} tokens; a longer limit could raise its score."
                )
            if found["grader_failures"]:
                said.append(
                    f"{found['grader_failures']} completions of {name} could not be graded and count as not right."
                )
        if recipe.data.source == "arithmetic":
            said.append("No format is asked for: a box, '####', 'the answer is' or else the last number is graded.")
    if surprise and surprise["rows"] < surprise["demonstrations"]:
        said.append(f"The surprise histogram covers the first {surprise['rows']} demonstrations.")
    said.append("The seed fixes the numbers on this machine only; another one rounds, and so samples, differently.")
    return said


def _facts(run: Run, env: dict[str, Any]) -> list[tuple[str, str]]:
    recipe = run.recipe
    facts = [("model", recipe.model)]
    if recipe.sft:
        s = recipe.sft
        told = f"{_objective(recipe)}, lr {s.lr:g}, {s.epochs:g} epochs, batch {s.batch}, {s.reduction}"
        facts.append(("warm start", told))
    if recipe.rl:
        r = recipe.rl
        told = f"{r.policy.name}, lr {r.lr:g}, {r.prompts} prompts × {r.group_size} completions"
        facts.append(("RL", f"{told}, T = {r.temperature:g}"))
    if recipe.preference:
        p = recipe.preference
        facts.append(
            ("preferences", f"{p.method} on {Path(p.data).name}, lr {p.lr:g}, {p.epochs:g} epochs, batch {p.batch}")
        )
    times = [r["time"] for stage in TRAINED for r in run.metrics(stage)]
    if times:
        facts.append(("training time", f"{(max(times) - min(times)) / 60:.1f} minutes from first to last logged step"))
    facts.append(("precision", env["precision"]))
    facts.append(("machine", f"{env['device']}, {env['cores']} cores, {env['platform']}"))
    facts.append(("versions", ", ".join(f"{k} {v}" for k, v in env["versions"].items())))
    return facts


def _markdown(found: dict[str, Any]) -> str:
    parts = [f"# {found['title']}", found["subtitle"]]
    if found["results"]:
        parts += [found["verdict"], tables.markdown_results(found["results"]), found["conditions"]]
        parts += ["## Verdicts", tables.markdown(found["verdict_rows"])]
    if found["surprise"]:
        parts += ["## Surprise", found["surprise_text"]]
    if found["readiness"]:
        warned = [f"**Warning:** {warning}." for warning in found["readiness"]["warnings"]]
        parts += ["## Readiness", found["readiness_text"], *warned, tables.markdown(found["readiness_rows"])]
    if found["looked_for"]:
        listed = [
            f"- **{f['name']}**: {f['says']}. {f['remedy'][0].upper()}{f['remedy'][1:]}." for f in found["findings"]
        ]
        listed = listed or [f"{found['no_findings']}\n"]
        listed += [f"- not judged: {u['name']} ({u['why']})" for u in found["unjudged"]]
        parts += ["## Findings", "\n".join(listed)]
    parts += ["## Read this with care", "\n".join(f"- {c}" for c in found["caveats"])]
    parts += ["## What was run", f"    {found['command']}", "\n".join(f"- {k}: {v}" for k, v in found["facts"])]
    return "\n\n".join(parts) + "\n"
