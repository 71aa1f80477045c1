"""The sentences of the report: what the numbers say, in words that claim no more than they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from heatbath import recipe as recipes
from heatbath.report import tables
from heatbath.run import CHECKPOINTS, Run
from heatbath.stages import scoring

Rows = Sequence[Mapping[str, Any]]
TRAINED = ("sft", "preference", "rl")
TITLES = {
    "pretrain": "Pretraining",
    "sft": "Warm start",
    "preference": "Preferences",
    "rl": "Reinforcement learning",
}


def title(recipe: recipes.Recipe) -> str:
    """What the run is, in a line."""
    if all(getattr(recipe, stage) is None for stage in TRAINED):
        return "evaluation of the base" if recipe.pretrain is None else "a base, pretrained"
    start = f"{objective(recipe)} warm start" if recipe.sft else "no warm start"
    if recipe.preference:
        return f"{start}, then {recipe.preference.method.upper()}"
    return f"{start}, then RL ({_policy(recipe)})" if recipe.rl else start


def _policy(recipe: recipes.Recipe) -> str:
    assert recipe.rl is not None
    spec = recipe.rl.policy
    return ", ".join([spec.name, *(f"{key} {_hyper(value)}" for key, value in spec.hyper.items())])


def objective(recipe: recipes.Recipe) -> str:
    """The objective of the warm start with its numbers."""
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


def first_scored(results: Mapping[str, Any]) -> tuple[str | None, Mapping[str, Any]] | None:
    """The results that the first screen is about: the run's own problems', else the first task's with pass@k. With the
    task's name, None of one's own."""
    if results.get("policies"):
        return None, results
    for name, found in results.get("tasks", {}).items():
        if found["policies"] and found.get("kind") != "judge":
            return name, found
    return None


def headline(results: Mapping[str, Any]) -> list[dict[str, str]]:
    """Each policy's first pass@k, to be set large."""
    scored = first_scored(results)
    out = []
    for policy, found in scored[1]["policies"].items() if scored else ():
        k, e = next(iter(found["pass"].items()))
        within = "" if e["low"] is None else f"{e['low']:.2f}–{e['high']:.2f}"
        out.append({"policy": policy, "value": f"{e['mean']:.2f}", "metric": f"pass@{k}", "interval": within})
    return out


def verdict(results: Mapping[str, Any]) -> str:
    """Whether it helped: each difference of the first k, the whole way first."""
    scored = first_scored(results)
    if scored is None:
        return ""
    task, found = scored
    k = next(iter(next(iter(found["policies"].values()))["pass"]))
    differences = [d for d in found["differences"] if str(d["k"]) == k and d["low"] is not None]
    asked = next(iter(found["policies"].values()))["problems"]
    where = f" of {task}" if task else ""
    whole_first = sorted(differences, key=lambda d: d is not differences[-1])
    decided = [_decided(d) for d in whole_first if tables.decided(d)]
    open_ = [_change(d) for d in whole_first if not tables.decided(d)]
    told = [f"pass@{k} on the same {asked:,} problems{where}: {'; '.join(decided)}."] if decided else []
    if open_:
        told.append(f"Not decided{'' if decided else f' by these {asked:,} problems{where}, pass@{k}'}: ")
        told[-1] += f"{', '.join(open_)}."
    return " ".join(told)


def _change(d: Mapping[str, Any]) -> str:
    p = f" (p = {tables.p_value(d['p'])})" if tables.doubtful(d) else ""
    return f"{d['from']} → {d['to']} {tables.interval(d, signed=True, digits=2)}{p}"


def _decided(d: Mapping[str, Any]) -> str:
    how = "better" if d["low"] > 0 else "worse"
    doubt = " (not after Holm's correction)" if (d.get("p_holm") or 0) > 0.05 else ""
    return f"{d['to']} is {how} than {d['from']}, {tables.interval(d, signed=True, digits=2)}{doubt}"


def conditions(results: Mapping[str, Any], drawn: Mapping[str, Any]) -> str:
    """How the scores were sampled: T and the limit of `drawn`."""
    first = next(iter(results["policies"].values()))
    return (
        f"{first['problems']:,} problems × {first['samples'] / first['problems']:g} samples of each policy, "
        f"T = {drawn['temperature']:g}, at most {drawn['max_new_tokens']:,} tokens; pass@k unbiased. Intervals: "
        "Student t over problems, 95 %; they say nothing about another training seed."
    )


def pretrain(rows: Rows) -> str:
    return sft(rows)


def sft(rows: Rows) -> str:
    val = [r for r in rows if "val/nll" in r]
    speed = [r["tokens_per_second"] for r in rows if "tokens_per_second" in r]
    parts = [f"{rows[-1]['step']} optimizer steps, {sum(speed) / len(speed):,.0f} tokens per second." if speed else ""]
    if len(val) > 1:
        best = min(val, key=lambda r: r["val/nll"])
        parts.append(
            f"Validation NLL {val[0]['val/nll']:.3f} before training, {val[-1]['val/nll']:.3f} at the end, "
            f"lowest {best['val/nll']:.3f} at step {best['step']} (marked dots)."
        )
    return " ".join(p for p in parts if p)


def preference(rows: Rows) -> str:
    ordered = [row["accuracy"] for row in rows if "accuracy" in row]
    said = f"{rows[-1]['step']} optimizer steps."
    return f"{said} Of the last step's pairs {ordered[-1]:.0%} were in the right order." if ordered else said


def rl(rows: Rows) -> str:
    informative = [r["informative_share"] for r in rows if "informative_share" in r]
    seconds = [r["step_seconds"] for r in rows if "step_seconds" in r]
    parts = [f"{len(seconds)} optimizer steps of {sum(seconds) / len(seconds):.1f} s." if seconds else ""]
    if informative:
        dead = 1 - sum(informative) / len(informative)
        parts.append(f"{dead:.0%} of the groups had no signal (all completions graded alike).")
    penalised = any("kl_reference" in row for row in rows)
    parts.append(f"KL is the k3 estimate on the sampled completions{'' if penalised else ', measured, not penalised'}.")
    return " ".join(p for p in parts if p)


def readiness(found: Mapping[str, Any]) -> str:
    said = (
        f"Before the first step {found['prompts']} of the {found['of_prompts']:,} prompts were answered "
        f"{found['group_size']} times each, at T = {found['temperature']:g} and with at most "
        f"{found['max_new_tokens']:,} tokens. A group is informative if it holds two different verdicts; the others "
        "teach nothing."
    )
    return " ".join([said, *(f"{note[0].upper()}{note[1:]}." for note in found["notes"])])


def caveats(
    run: Run, results: Mapping[str, Any] | None, profile: Mapping[str, Any] | None, left_out: int = 0
) -> list[str]:
    """What a reader must know who would conclude something from the run, of which `left_out` samples are not shown."""
    recipe = run.recipe
    said = unfinished(run, results)
    if any(getattr(recipe, stage) is not None for stage in TRAINED):
        said += ["One training seed. Seeds can differ by more than methods do; compare several before believing a "]
        said[-1] += "ranking."
    if recipe.sft and recipe.rl:
        said.append(
            "No RL straight from the base stands beside this run, so it does not show that RL needed this start."
        )
    if results:
        for name, found in results["policies"].items():
            said += of_scores(found, name)
        for task, one in results.get("tasks", {}).items():
            for name, found in one["policies"].items():
                said += of_scores(found, f"{name} in {task}")
        said += [f"{scoring.unscored(one)}." for one in results.get("incomplete", ())]
        said += [f"{scoring.drawn_alike(one)}." for one in results.get("alike", ())]
        if recipe.data.source == "arithmetic":
            said.append("No format is asked for: a box, '####', 'the answer is' or else the last number is graded.")
    if left_out:
        said.append(f"{left_out:,} samples are left out: the last evaluation did not ask their problems.")
    if profile and profile.get("rows", 0) < profile.get("demonstrations", 0):
        said.append(f"The surprise histogram covers the first {profile['rows']} demonstrations.")
    said.append("The seed fixes the numbers on this machine only; another one rounds, and so samples, differently.")
    return said


def unfinished(run: Run, results: Mapping[str, Any] | None) -> list[str]:
    """Which stages have not ended, and which policies are there that the evaluation did not sample."""
    parts = [results, *results.get("tasks", {}).values()] if results else []
    scored = {policy for part in parts for policy in part["policies"]}
    late = []
    for stage in TITLES:
        if getattr(run.recipe, stage) is None or run.finished(stage) or CHECKPOINTS[stage] in scored:
            continue
        steps = max((row["step"] for row in run.metrics(stage)), default=0)
        most = getattr(getattr(run.recipe, stage), "max_steps", None)
        of = f" of {most:,}" if most else ""
        late.append(f"{stage} has come to step {steps:,}{of}" if steps else f"{stage} did not run yet")
    late += [] if results else ["eval did not run yet"]
    said = [f"Unfinished: {', '.join(late)}."] if late else []
    there = [policy for policy in run.policies if policy not in scored and run.checkpoint(policy).is_dir()]
    if results and there:
        said.append(f"Without a score: {', '.join(there)}, of which the evaluation has no samples (heatbath eval).")
    return said


def of_scores(found: Mapping[str, Any], name: str) -> list[str]:
    """What is to be known about a policy's score beside the findings: completions not graded, answers not rated."""
    said = []
    if found.get("grader_failures"):
        said.append(f"{found['grader_failures']} completions of {name} could not be graded and count as not right.")
    if found.get("failures"):
        said.append(f"{found['failures']} answers of {name} have no rating and are left out of its mean.")
    return said


def settings(recipe: recipes.Recipe) -> list[tuple[str, str]]:
    """The choices that a reader asks for first."""
    facts = [("model", recipe.model or "made by [pretrain]")]
    if recipe.sft:
        s = recipe.sft
        told = f"{objective(recipe)}, lr {s.lr:g}, {s.epochs:g} epochs, batch {s.batch}, {s.reduction}"
        if s.replay:
            told += f", {s.replay.samples} answers of the base {'alone' if s.replay.alone else 'beside'}"
            told += f" (lifted by {s.replay.lift:g})" if s.replay.lift else ""
        facts.append(("warm start", told))
    if recipe.rl:
        r = recipe.rl
        told = f"{_policy(recipe)}, lr {r.lr:g}, {r.prompts} prompts × {r.group_size} completions"
        facts.append(("RL", f"{told}, T = {r.temperature:g}"))
    if recipe.preference:
        p = recipe.preference
        facts.append(
            ("preferences", f"{p.method} on {Path(p.data).name}, lr {p.lr:g}, {p.epochs:g} epochs, batch {p.batch}")
        )
    return facts
