"""Evaluation: samples of every problem from every policy of the run, graded, with intervals.

Each sample is kept in samples.jsonl.gz with its verdict; results.json holds the estimates and the paired differences.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from heatbath import models, ranks
from heatbath.data import sources
from heatbath.data.rows import Row
from heatbath.engines.sampling import Completion, LeftOutError, Sampler, open_sampler, seed_of
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
    """Samples what is still missing of the run's policies, grades it, and returns the content of results.json. Raises
    LeftOutError, after everything else is done and written, where an engine takes a prompt not at all."""
    splits = sources.of(recipe)
    sources.require(splits, recipe, ("eval",))
    asked = exams(recipe, splits)
    judged.require_judge(recipe, asked)
    for exam in asked:
        _require_same_conditions(run, exam)
    policies = evaluated(run, recipe)
    left_out = [error for policy in policies for error in sample_policy(run, recipe, policy, asked, progress)]
    results = ranks.agreed(lambda: _scored(run, recipe, asked, policies, progress))
    if left_out:
        raise left_out[0]
    return results


def _scored(run: Run, recipe: Recipe, asked: list[Exam], policies: list[str], progress: Progress) -> dict[str, Any]:
    results = write_results(run, recipe, asked)  # a judge who does not answer must not cost the other scores
    _tell_incomplete(results, progress)
    for exam in (exam for exam in asked if exam.kind == JUDGE):
        for policy in policies:
            judged.judge_answers(run, recipe, exam, policy, progress)
        results = write_results(run, recipe, asked)
    return results


def _tell_incomplete(results: dict[str, Any], progress: Progress) -> None:
    for one in results["incomplete"]:
        progress.say(scoring.unscored(one))
    for one in results.get("alike", ()):
        progress.say(f"warning: {scoring.drawn_alike(one)}")


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
    asked = exams(recipe, sources.of(recipe))
    graded: dict[int, dict[str, Any]] = {}
    for exam in (exam for exam in asked if exam.kind != JUDGE):
        own = [i for i, row in enumerate(rows) if row["task"] == exam.name]
        with exam.grader(recipe) as grader:
            verdicts = grader.grade([rows[i]["completion"] for i in own], _golds([rows[i] for i in own], exam))
        graded |= {i: rows[i] | asdict(v) | {"score": v.score} for i, v in zip(own, verdicts, strict=True)}
    changed = sum(rows[i]["status"] != row["status"] for i, row in graded.items())
    run.replace_samples([graded.get(i, row) for i, row in enumerate(rows)])
    progress.say(f"graded {len(graded):,} samples again: {changed} verdicts changed")
    results = write_results(run, recipe, asked)
    _tell_incomplete(results, progress)
    return results


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
    those of each task. A policy that lacks samples of some problems (cut off, refused, or no longer served) would be
    scored on easier or harder ones: it is named under `incomplete` instead."""
    found: dict[str, Any] = {"policies": {}, "differences": [], "tasks": {}, "incomplete": []}
    rows = run.samples()
    for exam in asked:
        if exam.kind == JUDGE:
            scores = judged.results(run, recipe, exam)
        else:
            whole, partial = _sampled(rows, run.policies, exam)
            scores = scoring.summarise(whole, exam.k, votes=exam.kind != "code")
            found["incomplete"] += partial
            if same := _alike(whole, exam):
                found["alike"] = found.get("alike", []) + same
        scores["asked"] = " ".join(dict.fromkeys(row.id for row in exam.rows))  # the report leaves out what is not
        if exam.name == OWN_TEST:
            found |= scores
        elif scores["policies"]:
            found["tasks"][exam.name] = {"version": exam.version, "kind": exam.kind, **scores}
    scoring.correct([d for part in (found, *found["tasks"].values()) for d in part["differences"]])
    run.write_json("results.json", found)
    return found


def _sampled(
    rows: list[dict[str, Any]], policies: list[str], exam: Exam
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """The samples of the policies that have enough of every problem of the exam; and what the others lack."""
    problems = dict.fromkeys(row.id for row in exam.rows)  # an earlier evaluation may have asked more
    own = [row for row in rows if row["task"] == exam.name and row["problem"] in problems]
    whole, partial, most = {}, [], max(exam.k)
    for policy in policies:
        drawn = [row for row in own if row["policy"] == policy]
        if lacking := scoring.lacking(drawn, [*problems], most):
            counts = {"lacking": lacking, "problems": len(problems), "samples": most}
            partial += [{"task": exam.name, "policy": policy, **counts}] if drawn else []
        else:
            whole[policy] = drawn
    return whole, partial


def _alike(whole: dict[str, list[dict[str, Any]]], exam: Exam) -> list[dict[str, Any]]:
    """Policies of an exam whose samples do not differ although they were drawn at a temperature."""
    t = exam.sampling.temperature
    counts = {policy: scoring.alike(rows) for policy, rows in whole.items()} if t else {}
    return [{"task": exam.name, "policy": p, "problems": n, "temperature": t} for p, n in counts.items() if n]


def sample_policy(run: Run, recipe: Recipe, policy: str, asked: list[Exam], progress: Progress) -> list[LeftOutError]:
    """Adds to the run's samples what a policy lacks of the graded completions of these exams; its model is loaded only
    if anything is missing. Returns what was said of prompts that the engine does not take.

    Each batch is kept as soon as it is graded: an interrupted evaluation goes on where it stopped.
    """
    ranks.wait()  # until what the first process has written is there for all to read
    there = run.samples(policy)
    lacking = [
        (exam, judged.missing(run, exam, policy) if exam.kind == JUDGE else missing(there, exam, recipe.seed))
        for exam in asked
    ]
    ranks.wait()  # all have read before the first of them writes
    left_out: list[LeftOutError] = []
    if not any(rows for _, rows in lacking):
        return left_out
    with _opened(run, recipe, policy) as (sampler, tokenizer):
        for exam, rows in lacking:
            if not rows:
                continue
            try:
                if exam.kind != JUDGE:
                    with exam.grader(recipe) as grader:
                        _sample(run, recipe, exam, policy, rows, sampler, tokenizer, grader, progress)
                elif ranks.first():
                    judged.sample_answers(run, exam, policy, sampler, tokenizer, recipe.seed, progress)
            except LeftOutError as error:
                progress.say(f"{policy}, {exam.name}: {error.what}")
                left_out.append(error)
    return left_out


def missing(there: list[dict[str, Any]], exam: Exam, seed: int) -> list[tuple[Row, int]]:
    """The samples of an exam that a policy's samples lack: the problem, and which of its samples it is.

    A sample is known by its seed, since servers answer in any order. Earlier versions, which stored none, drew a
    problem's samples in order: so many of the first are there.
    """
    own = [sample for sample in there if sample["task"] == exam.name]
    drawn = {(sample["problem"], sample["seed"]) for sample in own if "seed" in sample}
    first = Counter(sample["problem"] for sample in own if "seed" not in sample)
    wanted: Counter[str] = Counter()
    lacking = []
    for row in exam.rows:
        for number in range(wanted[row.id], wanted[row.id] + exam.samples):
            if number >= first[row.id] and (row.id, seed_of(seed, exam.name, row.id, number)) not in drawn:
                lacking.append((row, number))
        wanted[row.id] += exam.samples
    return lacking


@contextmanager
def _opened(run: Run, recipe: Recipe, policy: str) -> Iterator[tuple[Sampler, PreTrainedTokenizerBase]]:
    """What samples the policy, and its tokenizer. Raises RunError where the base is no longer the run's; the weights of
    a server (the engine "api") cannot be checked."""
    settings = recipe.eval
    name = run.model_of(policy)
    tokenizer = models.load_tokenizer(name, run.template_of(policy))
    if policy == "base" and settings.engine == "vllm":  # whose weights cannot be read
        run.require_same_base(models.fingerprint_of(name))
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
    """Samples, grades and keeps what is missing of an exam, each process its share.

    A draw depends on its problem and number alone, so that neither what was there before nor the other problems of a
    batch change it."""
    alone = recipe.eval.engine != "transformers"  # a server is asked by one process
    own = (lacking if ranks.first() else []) if alone else ranks.share(lacking)
    left_out: list[LeftOutError] = []
    right = done = 0
    with progress.bar(f"eval {policy} {exam.name}" if exam.task else f"eval {policy}", len(lacking)):
        graded = _graded(recipe, exam, policy, own, sampler, tokenizer, grader, left_out)
        for parts in ranks.together(graded):
            rows = [row for part in parts for row in part]
            run.add_samples(rows)
            right, done = right + sum(row["status"] == "right" for row in rows), done + len(rows)
            progress.update(done, f"right {right / done:.2f}")
    for error in (error for errors in ranks.gathered(left_out) for error in errors):
        raise error


def _graded(
    recipe: Recipe,
    exam: Exam,
    policy: str,
    lacking: list[tuple[Row, int]],
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    grader: Grader,
    left_out: list[LeftOutError],
) -> Iterator[list[dict[str, Any]]]:
    """The graded samples of each batch; what is said of prompts that the engine does not take goes into `left_out`."""
    prompts = [exam.prompt_ids(tokenizer, row) for row, _ in lacking]
    seeds = [seed_of(recipe.seed, exam.name, row.id, number) for row, number in lacking]
    try:
        for batch in sampler.sample(prompts, exam.sampling, seeds):
            texts = [_text(tokenizer, completion) for completion in batch]
            problems = [lacking[c.prompt][0] for c in batch]
            verdicts = grader.grade(texts, [as_gold(exam.kind, str(row.answer)) for row in problems])  # type: ignore[arg-type]
            yield [
                {"task": exam.name, "policy": policy, "seed": seeds[completion.prompt]}
                | _kept(exam, row, completion, text)
                | {"score": verdict.score, **asdict(verdict)}
                for row, completion, text, verdict in zip(problems, batch, texts, verdicts, strict=True)
            ]
    except LeftOutError as error:
        left_out.append(error)


def _text(tokenizer: PreTrainedTokenizerBase, completion: Completion) -> str:
    if completion.text is not None:
        return completion.text
    text: str = tokenizer.decode(completion.ids, skip_special_tokens=True)
    return text


def _kept(exam: Exam, row: Row, completion: Completion, text: str) -> dict[str, Any]:
    """What is kept of a completion beside its verdict. A stop text of the task ends it, wherever the policy ended."""
    stopped = not completion.finished and exam.task is not None and any(stop in text for stop in exam.task.stops)
    kept = {
        "problem": row.id,
        "question": row.question,
        "gold": row.answer if exam.kind != "code" else None,  # tests may be megabytes
        "completion": text,
        "ids": completion.ids,
        "tokens": len(completion.ids),
        "finish": "stop" if stopped else completion.finish,
        "finished": stopped or completion.finished,
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
