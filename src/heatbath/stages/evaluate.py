"""Evaluation: samples of every problem from every policy of the run, graded, with intervals.

Each sample is kept in samples.jsonl.gz with its verdict; results.json holds the estimates and the paired differences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from heatbath import models
from heatbath.data import sources
from heatbath.data.rows import Row
from heatbath.engines.sampling import Completion, Sampler, open_sampler, seed_of
from heatbath.errors import RunError
from heatbath.progress import Progress
from heatbath.recipe import Recipe
from heatbath.run import OWN_TEST, Run
from heatbath.stages import judged, scoring
from heatbath.stages.exams import Exam, exams
from heatbath.verify.graders import Grader, as_gold

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JUDGE = "judge"  # the kind of tasks that a judge model rates
SAMPLING = "sampling.json"  # by task, the conditions that its samples were drawn under


def run_evaluation(run: Run, recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Samples what is still missing of the run's policies, grades it, and returns the content of results.json."""
    splits = sources.load(recipe.data, recipe.seed)
    sources.require(splits, recipe, ("eval",))
    asked = exams(recipe, splits)
    judged.require_judge(recipe, asked)
    for exam in asked:
        _require_same_conditions(run, exam)
    policies = evaluated(run, recipe)
    for policy in policies:
        sample_policy(run, recipe, policy, asked, progress)
    results = write_results(run, recipe, asked)  # a judge who does not answer must not cost the other scores
    for exam in (exam for exam in asked if exam.kind == JUDGE):
        for policy in policies:
            judged.judge_answers(run, recipe, exam, policy, progress)
        results = write_results(run, recipe, asked)
    return results


def evaluated(run: Run, recipe: Recipe) -> list[str]:
    """The policies that are there to be sampled: trained ones, and those that a server has."""
    if recipe.eval.engine == "api":
        return [policy for policy in run.policies if policy in recipe.eval.served]
    return [p for p in run.policies if (p == "base" and recipe.model is not None) or run.checkpoint(p).is_dir()]


def rescore(run: Run, recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Grades the samples that a run has once more, as the grader is today, without sampling anything; returns the new
    content of results.json. Raises RunError when there are none."""
    rows = run.samples()
    if not rows:
        raise RunError("the run has no samples to grade", str(run.folder), "run the eval stage first")
    asked = [exam for exam in exams(recipe, sources.load(recipe.data, recipe.seed)) if exam.kind != JUDGE]
    graded: dict[int, dict[str, Any]] = {}
    for exam in asked:
        own = [i for i, row in enumerate(rows) if row["task"] == exam.name]
        with exam.grader(recipe) as grader:
            verdicts = grader.grade([rows[i]["completion"] for i in own], _golds([rows[i] for i in own], exam))
        graded |= {i: rows[i] | asdict(v) | {"score": v.score} for i, v in zip(own, verdicts, strict=True)}
    changed = sum(rows[i]["status"] != row["status"] for i, row in graded.items())
    run.replace_samples([graded.get(i, row) for i, row in enumerate(rows)])
    progress.say(f"graded {len(graded):,} samples again: {changed} verdicts changed")
    return write_results(run, recipe, exams(recipe, sources.load(recipe.data, recipe.seed)))


def _golds(samples: list[dict[str, Any]], exam: Exam) -> list[Any]:
    """The gold answer of each sample: its own, or for tests, which samples do not hold, that of the problem."""
    if exam.kind != "code":
        return [as_gold(exam.kind, str(sample["gold"])) for sample in samples]
    known = {row.id: as_gold(exam.kind, str(row.answer)) for row in exam.rows}
    if lost := [sample["problem"] for sample in samples if sample["problem"] not in known]:
        raise RunError(f"the data no longer has the problem {lost[0]}", exam.name, "grade with the run's own data")
    return [known[sample["problem"]] for sample in samples]


def write_results(run: Run, recipe: Recipe, asked: list[Exam]) -> dict[str, Any]:
    """results.json of whatever samples the run has of these exams: its own problems' at the top, and under `tasks`
    those of each task."""
    found: dict[str, Any] = {"policies": {}, "differences": [], "tasks": {}}
    rows = run.samples()
    for exam in asked:
        if exam.kind == JUDGE:
            scores = judged.results(run, recipe, exam)
        else:
            problems = {row.id for row in exam.rows}  # an earlier evaluation may have asked more
            own = [row for row in rows if row["task"] == exam.name and row["problem"] in problems]
            of = {policy: [row for row in own if row["policy"] == policy] for policy in run.policies}
            sampled = {policy: drawn for policy, drawn in of.items() if drawn}
            scores = scoring.summarise(sampled, exam.k, votes=exam.kind != "code")
        scores["asked"] = " ".join(dict.fromkeys(row.id for row in exam.rows))  # the report leaves out what is not
        if exam.name == OWN_TEST:
            found |= scores
        elif scores["policies"]:
            found["tasks"][exam.name] = {"version": exam.version, "kind": exam.kind, **scores}
    scoring.correct([d for part in (found, *found["tasks"].values()) for d in part["differences"]])
    run.write_json("results.json", found)
    return found


def sample_policy(run: Run, recipe: Recipe, policy: str, asked: list[Exam], progress: Progress) -> None:
    """Adds to the run's samples what a policy lacks of the graded completions of these exams; its model is loaded only
    if anything is missing.

    Each batch is kept as soon as it is graded: an interrupted evaluation goes on where it stopped.
    """
    there = run.samples(policy)
    lacking = [
        (exam, judged.missing(run, exam, policy) if exam.kind == JUDGE else missing(there, exam)) for exam in asked
    ]
    if not any(rows for _, rows in lacking):
        return
    with _opened(run, recipe, policy) as (sampler, tokenizer):
        for exam, rows in lacking:
            if exam.kind == JUDGE and rows:
                judged.sample_answers(run, exam, policy, sampler, tokenizer, recipe.seed, progress)
            elif rows:
                with exam.grader(recipe) as grader:
                    _sample(run, recipe, exam, policy, rows, sampler, tokenizer, grader, progress)


def missing(there: list[dict[str, Any]], exam: Exam) -> list[tuple[Row, int]]:
    """The samples of an exam that a policy's samples lack: the problem, and which of its samples it is."""
    have = Counter(sample["problem"] for sample in there if sample["task"] == exam.name)
    wanted: Counter[str] = Counter()
    lacking = []
    for row in exam.rows:
        for number in range(wanted[row.id], wanted[row.id] + exam.samples):
            if number >= have[row.id]:
                lacking.append((row, number))
        wanted[row.id] += exam.samples
    return lacking


@contextmanager
def _opened(run: Run, recipe: Recipe, policy: str) -> Iterator[tuple[Sampler, PreTrainedTokenizerBase]]:
    """What samples the policy, and its tokenizer. Raises RunError where the base is no longer the run's."""
    settings = recipe.eval
    name = run.model_of(policy)
    tokenizer = models.load_tokenizer(name, run.template_of(policy))
    served = settings.served.get(policy) if settings.engine == "api" else None  # type: ignore[call-overload]
    with open_sampler(
        settings.engine,
        name,
        tokenizer,
        precision=recipe.precision,
        batch=settings.batch,
        endpoint=settings.endpoint,
        served=served,
    ) as sampler:
        model = getattr(sampler, "model", None)
        if policy == "base" and model is not None:
            run.require_same_base(models.fingerprint(model))
        yield sampler, tokenizer


def _sample(
    run: Run,
    recipe: Recipe,
    exam: Exam,
    policy: str,
    lacking: list[tuple[Row, int]],
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    grader: Grader,
    progress: Progress,
) -> None:
    """Samples, grades and keeps what is missing of an exam.

    A draw depends on its problem and number alone, so that neither what was there before nor the other problems of a
    batch change it."""
    prompts = [exam.prompt_ids(tokenizer, row) for row, _ in lacking]
    seeds = [seed_of(recipe.seed, exam.name, row.id, number) for row, number in lacking]
    right = done = 0
    with progress.bar(f"eval {policy} {exam.name}" if exam.task else f"eval {policy}", len(lacking)):
        for batch in sampler.sample(prompts, exam.sampling, seeds):
            texts = [_text(tokenizer, completion) for completion in batch]
            problems = [lacking[c.prompt][0] for c in batch]
            verdicts = grader.grade(texts, [as_gold(exam.kind, str(row.answer)) for row in problems])  # type: ignore[arg-type]
            run.add_samples(
                [
                    {"task": exam.name, "policy": policy, "seed": seeds[completion.prompt]}
                    | _kept(exam, row, completion, text)
                    | {"score": verdict.score, **asdict(verdict)}
                    for row, completion, text, verdict in zip(problems, batch, texts, verdicts, strict=True)
                ]
            )
            right, done = right + sum(v.status == "right" for v in verdicts), done + len(batch)
            progress.update(done, f"right {right / done:.2f}")


def _text(tokenizer: PreTrainedTokenizerBase, completion: Completion) -> str:
    if completion.text is not None:
        return completion.text
    text: str = tokenizer.decode(completion.ids, skip_special_tokens=True)
    return text


def _kept(exam: Exam, row: Row, completion: Completion, text: str) -> dict[str, Any]:
    """What is kept of a completion beside its verdict."""
    kept = {
        "problem": row.id,
        "question": row.question,
        "gold": row.answer if exam.kind != "code" else None,  # tests may be megabytes
        "completion": text,
        "ids": completion.ids,
        "tokens": len(completion.ids),
        "finish": completion.finish,
        "finished": completion.finished,
    }
    return kept | ({"retokenised": True} if completion.retokenised else {})


def _require_same_conditions(run: Run, exam: Exam) -> None:
    """Raises RunError where samples of the task are there that were drawn under other conditions."""
    known = run.read_json(SAMPLING) or {}
    now = exam.conditions
    before = known.setdefault(exam.name, now)
    if before != now and any(run.samples(task=exam.name)):
        changed = ", ".join(f"{key} {before.get(key)} → {now[key]}" for key in now if before.get(key) != now[key])
        raise RunError(
            f"the samples of {exam.name} were drawn under other conditions: {changed}",
            str(run.folder / SAMPLING),
            "heatbath eval … --fresh samples everything anew, or take another --out",
        )
    run.write_json(SAMPLING, known | {exam.name: now})
