"""Evaluation: samples of every test problem from every policy of the run, graded, with intervals.

Each sample is kept in samples.jsonl with its verdict; results.json holds the estimates and the paired differences.
"""

from __future__ import annotations

import gc
import itertools
import math
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from heatbath import models
from heatbath.data import rendering, sources
from heatbath.data.rows import Row
from heatbath.engines import local
from heatbath.errors import RunError
from heatbath.ideas.passk import Estimate, mean_with_interval, paired_difference, pass_at_k
from heatbath.progress import Progress
from heatbath.recipe import Recipe
from heatbath.run import Run
from heatbath.stages.rewards import grader_of
from heatbath.verify.graders import Grader, as_gold
from heatbath.verify.verdict import JUDGED


def run_evaluation(run: Run, recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Samples what is still missing of the run's policies, grades it, and returns the content of results.json."""
    splits = sources.load(recipe.data, recipe.seed)
    sources.require(splits, recipe, ("eval",))
    with grader_of(recipe.reward) as grader:
        for policy in run.policies:
            if (policy == "base" and recipe.model is not None) or run.checkpoint(policy).is_dir():
                sample_policy(run, recipe, policy, splits.test, grader, progress)
    return _write_results(run, recipe)


def rescore(run: Run, recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Grades the samples that a run has once more, as the grader is today, without sampling anything; returns the new
    content of results.json. Raises RunError when there are none."""
    rows = run.samples()
    if not rows:
        raise RunError("the run has no samples to grade", str(run.folder / "samples.jsonl"), "run the eval stage first")
    with grader_of(recipe.reward) as grader:
        golds = _golds(rows, recipe)
        verdicts = grader.grade([row["completion"] for row in rows], golds)
    new = [row | {"score": v.score, **asdict(v)} for row, v in zip(rows, verdicts, strict=True)]
    changed = sum(old["status"] != row["status"] for old, row in zip(rows, new, strict=True))
    run.replace_samples(new)
    progress.say(f"graded {len(new):,} samples again: {changed} verdicts changed")
    return _write_results(run, recipe)


def _golds(samples: list[dict[str, Any]], recipe: Recipe) -> list[Any]:
    """The gold answer of each sample: its own, or for tests, which samples do not hold, that of the problem."""
    kind = recipe.reward.kind
    if kind != "code":
        return [as_gold(kind, str(sample["gold"])) for sample in samples]
    known = {row.id: as_gold(kind, str(row.answer)) for row in sources.load(recipe.data, recipe.seed).test}
    if lost := [sample["problem"] for sample in samples if sample["problem"] not in known]:
        raise RunError(f"the data no longer has the problem {lost[0]}", "[data]", "grade with the run's own data")
    return [known[sample["problem"]] for sample in samples]


def _write_results(run: Run, recipe: Recipe) -> dict[str, Any]:
    sampled = {policy: rows for policy in run.policies if (rows := run.samples(policy))}
    results = summarise(sampled, recipe.eval.k)
    run.write_json("results.json", results)
    return results


def sample_policy(run: Run, recipe: Recipe, policy: str, test: list[Row], grader: Grader, progress: Progress) -> None:
    """Adds to the run's samples what is missing of `eval.samples` graded completions of every test problem.

    Each batch is kept as soon as it is graded: an interrupted evaluation goes on where it stopped.
    """
    settings = recipe.eval
    have = Counter(sample["problem"] for sample in run.samples(policy))
    missing: list[Row] = []
    for row in test:
        there = min(have[row.id], settings.samples)
        have[row.id] -= there
        missing += [row] * (settings.samples - there)
    if not missing:
        return
    name = run.model_of(policy)
    tokenizer = models.load_tokenizer(name, run.template_of(policy))
    model = models.load_model(name, models.autocast_dtype(recipe.precision) or torch.float32)
    if policy == "base":
        run.require_same_base(models.fingerprint(model))
    batches = local.sample(
        model,
        [rendering.prompt_ids(tokenizer, rendering.messages(row, recipe.data.system)) for row in missing],
        temperature=settings.temperature,
        max_new_tokens=settings.max_new_tokens,
        eos_ids=local.eos_ids_of(model, tokenizer.eos_token_id),
        pad_id=tokenizer.pad_token_id,
        batch=settings.batch,
        seed=recipe.seed + len(test) * settings.samples - len(missing),  # a resumed draw must not repeat the first
    )
    right = done = 0
    with progress.bar(f"eval {policy}", len(missing)):
        for batch in batches:
            texts = tokenizer.batch_decode([c.ids for c in batch], skip_special_tokens=True)
            problems = [missing[c.prompt] for c in batch]
            verdicts = grader.grade(texts, [as_gold(recipe.reward.kind, str(row.answer)) for row in problems])
            run.add_samples(
                [
                    {
                        "policy": policy,
                        "problem": row.id,
                        "question": row.question,
                        "gold": row.answer if recipe.reward.kind != "code" else None,  # tests may be megabytes
                        "completion": text,
                        "tokens": len(completion.ids),
                        "finished": completion.finished,
                        "score": verdict.score,
                        **asdict(verdict),
                    }
                    for row, completion, text, verdict in zip(problems, batch, texts, verdicts, strict=True)
                ]
            )
            right, done = right + sum(v.status == "right" for v in verdicts), done + len(batch)
            progress.update(done, f"right {right / done:.2f}")
    del model
    gc.collect()


def summarise(samples: dict[str, list[dict[str, Any]]], ks: list[int]) -> dict[str, Any]:
    """pass@k of each policy with intervals over problems, and the paired differences between successive policies.

    A sample the grader failed on counts as not right, and their number is reported: leaving them out would let a policy
    gain by breaking the grader.
    """
    per_problem = {policy: _by_problem(rows) for policy, rows in samples.items()}
    policies = {}
    for policy, rows in samples.items():
        n, right = per_problem[policy]
        done = [r for r in rows if r["finished"]]
        policies[policy] = {
            "problems": len(n),
            "samples": len(rows),
            "pass": {str(k): _as_dict(mean_with_interval(pass_at_k(right, n, k), bounds=(0.0, 1.0))) for k in ks},
            "truncated_share": 1 - len(done) / len(rows),
            "right_of_finished": float(np.mean([r["status"] == "right" for r in done])) if done else None,
            "mean_tokens": float(np.mean([r["tokens"] for r in rows])),
            "verdicts": dict(Counter(r["status"] for r in rows)),
            "grader_failures": sum(r["status"] not in JUDGED for r in rows),
        }
    return {"policies": policies, "differences": _differences(per_problem, ks)}


def _differences(per_problem: dict[str, tuple[Any, Any]], ks: list[int]) -> list[dict[str, Any]]:
    names = list(per_problem)
    pairs = list(itertools.pairwise(names))
    if len(names) == 3:
        pairs.append((names[0], names[2]))
    return [
        {
            "from": a,
            "to": b,
            "k": k,
            **_as_dict(paired_difference(*(pass_at_k(per_problem[p][1], per_problem[p][0], k) for p in (a, b)))),
        }
        for a, b in pairs
        for k in ks
    ]


def _by_problem(rows: list[dict[str, Any]]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Samples and right samples of each problem, in order of problem id."""
    n = Counter(r["problem"] for r in rows)
    right = Counter(r["problem"] for r in rows if r["status"] == "right")
    problems = sorted(n)
    return np.array([n[p] for p in problems]), np.array([right[p] for p in problems])


def _as_dict(estimate: Estimate) -> dict[str, float | None]:
    """Mean and bounds; a bound that does not exist (a single problem) is None, since JSON has no NaN."""
    bounds = {"mean": estimate.mean, "low": estimate.low, "high": estimate.high}
    return {k: None if math.isnan(v) else v for k, v in bounds.items()}
