"""Several runs beside each other: what they scored, how they differ on the same problems, and in which keys."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heatbath import recipe as recipes
from heatbath.errors import RecipeError
from heatbath.report import browser, captions, findings, scores, tables
from heatbath.run import OWN_TEST, Run
from heatbath.stages import scoring
from heatbath.stages.scoring import Counted

Rows = Sequence[Mapping[str, Any]]
MISSING = "–"


@dataclass(frozen=True)
class Compared:
    """A run with what it says, read once. `last` is the policy that it ends with and has samples of, if any."""

    name: str
    run: Run
    results: Mapping[str, Any]
    drawn: Rows
    samples: Rows  # of what was drawn those that the results are of
    counted: Mapping[str, Mapping[str, Counted]]  # task → policy → counts

    @property
    def last(self) -> str | None:
        there = {policy for policies in self.counted.values() for policy in policies}
        there = there or {policy for policies in ratings(self).values() for policy in policies}
        return next((policy for policy in reversed(self.run.policies) if policy in there), None)


def read(folders: Sequence[Path]) -> list[Compared]:
    """The runs under names that tell them apart. Raises RecipeError for what is no run, or given twice."""
    whole = [folder.resolve() for folder in folders]
    if twice := next((str(f) for f in whole if whole.count(f) > 1), None):
        raise RecipeError("the run is given twice", twice, "name each run once")
    out = []
    for name, folder in zip(distinct_names(whole), folders, strict=True):
        run = Run.read(folder)
        results, drawn = run.read_json("results.json") or {}, run.samples()
        samples = browser.rated(run, scores.scored(drawn, results))
        counted = {
            task: {policy: scoring.per_problem(rows) for policy, rows in policies.items()}
            for task, policies in scores.by_task(samples).items()
        }
        out.append(Compared(name, run, results, drawn, samples, counted))
    return out


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as it takes to tell them apart."""
    for parts in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-parts:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def tasks_of(runs: Sequence[Compared]) -> list[str]:
    """The tasks that at least two runs have samples of, the runs' own problems first."""
    every = list(dict.fromkeys(task for run in runs for task in run.counted))
    shared = [task for task in every if sum(task in run.counted for run in runs) > 1]
    return sorted(shared, key=lambda task: task != OWN_TEST)


def ratings(run: Compared) -> dict[str, Mapping[str, Any]]:
    """Judged task → policy → what results.json says of it."""
    tasks = run.results.get("tasks", {})
    return {task: part["policies"] for task, part in tasks.items() if part.get("kind") == "judge" and part["policies"]}


def without_scores(runs: Sequence[Compared]) -> str:
    """What can be said of runs without a graded task in common."""
    every = list(dict.fromkeys(task for run in runs for task in ratings(run)))
    shared = [task for task in every if sum(task in ratings(run) for run in runs) > 1]
    if not shared:
        return "The runs have no task in common."
    return f"The runs have only judged tasks in common: {', '.join(shared)}. Their mean ratings stand below, untested."


def differences(runs: Sequence[Compared], task: str) -> list[dict[str, Any]]:
    """Paired differences of a task between the runs' last policies, and then between their starts of RL where two or
    more have one."""
    found = scores.compared([c for run in runs if (c := contender(run, task, run.last))])
    starts = [run for run in runs if run.last not in ("init", "base", None)]
    of_starts = scores.compared([c for run in starts if (c := contender(run, task, "init"))])
    return [{**d, "of": "end"} for d in found] + [{**d, "of": "start"} for d in of_starts]


def contender(run: Compared, task: str, policy: str | None) -> scores.Contender | None:
    """A policy's counts of a task, with the k that its run reports; None where there are none."""
    counted = run.counted.get(task, {}).get(policy or "")
    if counted is None or policy is None:
        return None
    reported = run.results if task == OWN_TEST else run.results.get("tasks", {}).get(task, {})
    ks = reported.get("policies", {}).get(policy, {}).get("pass", {})
    return scores.Contender(run.name, policy, counted, tuple(int(k) for k in ks) or (1,))


def difference_rows(found: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and one row per difference of two runs; what is the same in all rows stands in `differences_of`."""
    head, *rows = tables.difference_rows({"differences": list(found)})
    extra = {"policies": [_policies(d) for d in found], "problems": [f"{d['problems']:,}" for d in found]}
    extra = {name: column for name, column in extra.items() if len(set(column)) > 1}
    out = [[head[0], *extra, *head[1:]]]
    return out + [[row[0], *(column[i] for column in extra.values()), *row[1:]] for i, row in enumerate(rows)]


def differences_of(found: Sequence[Mapping[str, Any]]) -> str:
    """What the differences are of, as far as that is the same for all."""
    policies, problems = {_policies(d) for d in found}, {d["problems"] for d in found}
    of = f" of {policies.pop()} policies" if len(policies) == 1 else ""
    return f"Paired differences{of} between the runs" + (f", {problems.pop():,} problems" if len(problems) == 1 else "")


def _policies(d: Mapping[str, Any]) -> str:
    first, second = d["policies"]
    return str(first) if first == second else f"{first} → {second}"


def score_rows(runs: Sequence[Compared], task: str) -> list[list[str]]:
    """Header and one row per run and policy: what results.json says of a task."""
    entries: dict[tuple[str, str], Mapping[str, Any]] = {}
    for run in runs:
        part = run.results if task == OWN_TEST else run.results.get("tasks", {}).get(task, {})
        entries |= {(run.name, policy): found for policy, found in part.get("policies", {}).items()}
    if not entries:
        return []
    head, *rows = tables.results_rows({"policies": {f"{i}": found for i, found in enumerate(entries.values())}})
    out = [["run", "policy", "problems", *head[1:]]]
    for (name, policy), found, row in zip(entries, entries.values(), rows, strict=True):
        out.append([name, policy, f"{found['problems']:,}", *row[1:]])
    return out


def rating_rows(runs: Sequence[Compared]) -> list[list[str]]:
    """Header and one row per run, judged task and policy: the mean rating of 10, as results.json has it."""
    rows = [["run", "task", "policy", "rating of 10", "questions"]]
    for each in runs:
        for task, policies in ratings(each).items():
            for policy, found in policies.items():
                rating = MISSING if found["rating"] is None else tables.interval(found["rating"], digits=2)
                rows.append([each.name, task, policy, rating, f"{found['problems']:,}"])
    return rows


def verdict(runs: Sequence[Compared], found: Sequence[Mapping[str, Any]], task: str) -> str:
    """Which run ends highest at the first k, of those that are compared with another, and which of its differences to
    the others are decided."""
    ended = [c for run in runs if (c := contender(run, task, run.last))]
    if len(ended) < 2:
        return "Fewer than two runs have scores to compare."
    k = min((d["k"] for d in found if d["of"] == "end"), default=0)
    paired = [d for d in found if d["k"] == k and d["of"] == "end"]
    named = {name for d in paired for name in (d["from"], d["to"])}
    within = [(c, scores.estimate(c.counted, k)) for c in ended if c.run in named]
    apart = [c for c in ended if c.run not in named]
    shared = any(set(a.counted[0]) & set(b.counted[0]) for a in apart for b in ended if a is not b)
    why = "no pass@k in common" if shared else "no problem in common"
    if not within:
        return f"Not compared: {why}."
    best, score = max(within, key=lambda each: each[1]["mean"] or 0.0)
    others = [d for d in paired if best.run in (d["from"], d["to"])]
    beaten = [_other(d, best.run) for d in others if _ahead(d, best.run)]
    rest = [_other(d, best.run) for d in others if not _ahead(d, best.run)]
    of = "" if task == OWN_TEST else f" of {task}"
    said = f"{best.run} ends highest: pass@{k}{of} {tables.interval(score, digits=2)}."
    if beaten:
        said += f" It is better than {', '.join(beaten)} on the same problems."
    if rest:
        said += f" Against {', '.join(rest)} these data decide nothing."
    if apart:
        said += f" Not compared: {', '.join(c.run for c in apart)} ({why})."
    return said


def _ahead(d: Mapping[str, Any], name: str) -> bool:
    """Whether the named run is the better one, also after correction for the number of differences."""
    if d["low"] is None:
        return False
    ahead = d["low"] > 0 if d["to"] == name else d["high"] < 0
    return bool(ahead) and (d.get("p_holm") is None or d["p_holm"] <= 0.05)


def _other(d: Mapping[str, Any], name: str) -> str:
    return str(d["from"] if d["to"] == name else d["to"])


def recipe_rows(runs: Sequence[Compared]) -> list[list[str]]:
    """Header and one row per key in which the recipes differ; header alone where they do not. Of a table that some lack
    one row says who has it, and the others are the keys in which those differ."""
    first, *others = (each.run.recipe for each in runs)
    changes = [recipes.changes(first, other) for other in others]
    own = {key: before for found in changes for key, (before, _) in found.items()}
    rows = [["key", *(each.name for each in runs)]]
    told = set()
    for key in sorted(own):
        values = [own[key], *(found[key][1] if key in found else own[key] for found in changes)]
        table = key.partition(".")[0]
        has = [getattr(each.run.recipe, table) is not None for each in runs]
        if "." in key and not all(has):
            if table not in told:
                rows.append([f"[{table}]", *("yes" if there else MISSING for there in has)])
                told.add(table)
            if len({repr(value) for value, there in zip(values, has, strict=True) if there}) < 2:
                continue
        rows.append([key, *(MISSING if value is None else _shown(value) for value in values)])
    return rows


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def caveats(runs: Sequence[Compared], task: str | None) -> list[str]:
    """What forbids, or weakens, a comparison of these runs."""
    said = []
    if (same := same_base(runs)) is not True:
        said.append("The runs do not start from the same base: differences are not of the methods alone.")
        if same is None:
            said[-1] = "Whether the runs start from the same base is not known: not all of them noted which it was."
    sampled = [each.run.recipe.eval for each in runs]
    if len({(s.temperature, s.max_new_tokens, s.top_p) for s in sampled}) > 1:
        said.append("The runs were sampled under different conditions ([eval] in the recipes).")
    asked = {tuple(next(iter(r.counted[task].values()))[0]) for r in runs if task is not None and task in r.counted}
    if len(asked) > 1:
        said.append("The runs were not asked the same problems; each difference is over those that both were asked.")
    if not _repeated(runs):
        said.append("One training seed each. Seeds can differ by more than methods do.")
    if len(runs) > scores.ALL_PAIRS:
        said.append(f"Of more than {scores.ALL_PAIRS} runs each is compared with the first only.")
    for each in runs:
        said += [f"{each.name}: {line}" for line in captions.unfinished(each.run, each.results)]
        for name, found in each.results.get("policies", {}).items():
            if name == "base" and same and each is not runs[0]:
                continue
            said += captions.of_scores(found, f"{each.name} {name}")
    return said


def same_base(runs: Sequence[Compared]) -> bool | None:
    """Whether all runs started from the same weights, by their fingerprints; where one noted none, by the base's name.
    None where that is not known either."""
    noted = [(each.run.read_json("base.json") or {}).get("fingerprint") for each in runs]
    if None not in noted or len({*noted} - {None}) > 1:
        return len({*noted}) == 1
    models = {each.run.recipe.model for each in runs}
    return None if None in models else len(models) == 1


def _repeated(runs: Sequence[Compared]) -> bool:
    """Whether two of the runs differ in nothing but the training seed."""
    pairs = itertools.combinations((each.run.recipe for each in runs), 2)
    return any(set(recipes.changes(first, second)) == {"seed"} for first, second in pairs)


def findings_of(runs: Sequence[Compared]) -> list[tuple[str, findings.Finding]]:
    """Every finding of every run, with the run's name."""
    seen = ((each.name, findings.Seen.of(each.run, scores.graded(each.samples))) for each in runs)
    return [(name, found) for name, one in seen for found in findings.look(one)[0]]
