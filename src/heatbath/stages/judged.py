"""Judged tasks (MT-Bench): the policy answers both turns of every question, then a judge model rates the answers.

Answers are samples of the run like any others, kept batch by batch. Judging comes afterwards and needs no model of
ours: every reply of the judge is kept the moment it arrives (`judgments/`), so that a dead server costs only what was
in flight, and judgments.jsonl says what became of each answer.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from heatbath import samples
from heatbath.data import rendering
from heatbath.data.rows import Row
from heatbath.engines.sampling import LeftOutError, Sampler, seed_of
from heatbath.errors import RecipeError
from heatbath.ideas.intervals import Estimate
from heatbath.progress import Progress
from heatbath.recipe import Recipe
from heatbath.run import Run, read_jsonl, write_atomically
from heatbath.stages import scoring
from heatbath.verify.endpoint import Endpoint
from heatbath.verify.judge import Answers, Judgment, MtBench, Prompts, Question, mt_bench

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from heatbath.stages.exams import Exam

KIND = "judge"
JUDGMENTS = "judgments"  # the folder of replies; with .jsonl the file of ratings
ANSWERED = "answered"  # the status of an answer that no grader has a verdict on
TURNS = (1, 2)

Given = dict[str, dict[int, dict[str, Any]]]  # problem → turn → the sample that answers it


def require_judge(recipe: Recipe, exams: Sequence[Exam]) -> None:
    """Raises RecipeError where a judged task has no judge, or more than one answer of a turn is asked for."""
    for exam in exams:
        if exam.kind != KIND:
            continue
        if recipe.eval.judge is None:
            remedy = '[eval] judge = { endpoint = "http://localhost:8000/v1", model = "its name there" }'
            raise RecipeError(f"nobody rates the answers of {exam.name}", "eval.judge", remedy)
        if exam.samples != 1:
            remedy = f'{{ name = "{exam.name}", samples = 1, k = [1] }}'
            raise RecipeError(f"{exam.samples} samples of {exam.name}: one answer is rated", "eval.tasks", remedy)
        _endpoint(recipe, None)


def missing(run: Run, exam: Exam, policy: str) -> list[Row]:
    """The questions of which a turn lacks its answer."""
    given = _given(run, exam, policy)
    return [row for row in exam.rows if len(given.get(row.id, {})) < len(_question(row).turns)]


def sample_answers(
    run: Run,
    exam: Exam,
    policy: str,
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    progress: Progress,
) -> None:
    """Adds the policy's missing answers to the run's samples, batch by batch: first turns, then second ones, which have
    the first in their history. Raises LeftOutError, after all others, where the engine does not take a prompt."""
    left_out: list[LeftOutError] = []
    for turn in TURNS:
        try:
            _sample_turn(run, exam, policy, turn, sampler, tokenizer, seed, progress)
        except LeftOutError as error:
            left_out.append(error)
    if left_out:
        raise left_out[0]


def _sample_turn(
    run: Run,
    exam: Exam,
    policy: str,
    turn: int,
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    progress: Progress,
) -> None:
    """The answers of one turn, of the questions whose earlier turns are answered."""
    given = _given(run, exam, policy)
    asked = [row for row in exam.rows if len(given.get(row.id, {})) == turn - 1 < len(_question(row).turns)]
    if not asked:
        return
    prompts = [rendering.prompt_ids(tokenizer, _conversation(row, given.get(row.id, {}), turn, exam)) for row in asked]
    seeds = [seed_of(seed, exam.name, row.id, turn) for row in asked]
    done = 0
    with progress.bar(f"eval {policy} {exam.name}, turn {turn}", len(asked)):
        for batch in sampler.sample(prompts, exam.sampling, seeds):
            rows = []
            for completion in batch:
                row, text = asked[completion.prompt], completion.text
                if text is None:
                    text = str(tokenizer.decode(completion.ids, skip_special_tokens=True))
                rows.append(
                    {
                        "task": exam.name,
                        "policy": policy,
                        "seed": seeds[completion.prompt],
                        "problem": row.id,
                        "question": _question(row).turns[turn - 1],
                        "turn": turn,
                        "category": row.kind,
                        "gold": None,
                        "completion": text,
                        "ids": completion.ids,
                        "tokens": len(completion.ids),
                        "finish": completion.finish,
                        "finished": completion.finished,
                        "score": None,
                        "status": ANSWERED,
                        "answer": None,
                        "rule": "",
                    }
                )
            run.add_samples(rows)
            done += len(batch)
            progress.update(done)


def judge_answers(run: Run, recipe: Recipe, exam: Exam, policy: str, progress: Progress) -> MtBench:
    """Has the policy's answers rated, and writes what was missing of it to judgments.jsonl. Raises RunError where the
    server fails; what it said until then is not asked for again."""
    given = _given(run, exam, policy)
    answers: Answers = {row.id: _texts(given.get(row.id, {})) for row in exam.rows}
    questions = [_question(row) for row in exam.rows]
    endpoint = _endpoint(recipe, run)
    with progress.bar(f"judge {policy} {exam.name}", sum(len(texts) for texts in answers.values())):
        found = mt_bench(
            endpoint,
            questions,
            answers,
            prompts=_prompts(recipe, exam),
            progress=lambda done, _: progress.update(done),
        )
    endpoint.close()
    rows = [
        {
            "task": exam.name,
            "policy": policy,
            "problem": j.question,
            "category": j.category,
            "turn": j.turn,
            "rating": j.rating,
            "problem_with_it": j.problem,
            "text": j.text,
            "judge": found.judge,
            "prompts": found.prompts,
            "of": digest(answers[j.question][: j.turn]),
        }
        for j in found.judgments
    ]
    path = run.folder / f"{JUDGMENTS}.jsonl"
    kept = [row for row in read_jsonl(path) if (row["task"], row["policy"]) != (exam.name, policy)]
    write_atomically(path, samples.lines([*kept, *rows]))
    return found


def results(run: Run, recipe: Recipe, exam: Exam) -> dict[str, Any]:
    """Ratings of each policy and their paired differences, from what has been judged; nobody is asked.

    A judgment counts where it is of the answers that the run has now, by the recipe's judge.
    """
    given = {policy: _given(run, exam, policy) for policy in run.policies}
    found = {policy: _judged(run, recipe, exam, policy, answers) for policy, answers in given.items()}
    rated = {policy: judgments for policy, judgments in found.items() if judgments is not None}
    policies = {policy: _entry(judgments, _flat(given[policy])) for policy, judgments in rated.items()}
    return {"policies": policies, "differences": _differences(rated)}


def _judged(run: Run, recipe: Recipe, exam: Exam, policy: str, given: Given) -> MtBench | None:
    """What judgments.jsonl has of a policy's present answers, or None."""
    judge, prompts = recipe.eval.judge, _prompts(recipe, exam).name
    texts = {row.id: _texts(given.get(row.id, {})) for row in exam.rows}
    rows = [
        row
        for row in read_jsonl(run.folder / f"{JUDGMENTS}.jsonl")
        if (row["task"], row["policy"]) == (exam.name, policy)
        and row["of"] == digest(texts.get(row["problem"], ())[: row["turn"]])
        and (judge is None or (row["judge"], row["prompts"]) == (judge.model, prompts))
    ]
    if not rows:
        return None
    judgments = [
        Judgment(row["problem"], row["category"], row["turn"], row["rating"], row["problem_with_it"], row["text"])
        for row in rows
    ]
    done = {(j.question, j.turn) for j in judgments}
    wanted = [(row.id, turn) for row in exam.rows for turn in range(1, len(_question(row).turns) + 1)]
    lacking = tuple(turn for turn in wanted if turn not in done)
    return MtBench(rows[0]["judge"], rows[0]["prompts"], tuple(judgments), lacking)


def _entry(found: MtBench, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A policy's part of results.json."""
    return {
        "rating": _numbers(found.mean()),
        "categories": {name: _numbers(found.mean(name)) for name in found.categories},
        "turns": {str(turn): _numbers(found.mean(turn=turn)) for turn in TURNS},
        "failures": found.missing,
        "problems": len({j.question for j in found.judgments}),
        "samples": len(samples),
        "truncated_share": sum(not s["finished"] for s in samples) / len(samples),
        "mean_tokens": sum(s["tokens"] for s in samples) / len(samples),
        "judge": found.judge,
        "prompts": found.prompts,
    }


def _differences(rated: Mapping[str, MtBench]) -> list[dict[str, Any]]:
    """Of successive policies and of the last to the first, over the questions that both have a rating of."""
    names = list(rated)
    pairs = [*itertools.pairwise(names), *([(names[0], names[2])] if len(names) == 3 else [])]
    found = []
    for before, after in pairs:
        a, b = rated[before].scores(), rated[after].scores()
        both = [question for question in a if question in b]
        if both:
            found.append(
                {"from": before, "to": after, "k": 1, **scoring.paired([a[q] for q in both], [b[q] for q in both])}
            )
    return found


def _numbers(estimate: Estimate | None) -> dict[str, float | None] | None:
    return None if estimate is None else estimate.numbers()


def _given(run: Run, exam: Exam, policy: str) -> Given:
    """The answers there are, of a question the first turns without a gap."""
    found: Given = {}
    for sample in run.samples(policy, exam.name):
        turns = found.setdefault(sample["problem"], {})
        if sample["turn"] == len(turns) + 1:
            turns[sample["turn"]] = sample
    return found


def _flat(given: Given) -> list[dict[str, Any]]:
    return [sample for turns in given.values() for sample in turns.values()]


def _texts(turns: Mapping[int, Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(turns[turn]["completion"] for turn in sorted(turns))


def _question(row: Row) -> Question:
    """The question of a judged task's row, under the row's id."""
    stored = json.loads(str(row.answer))
    reference = stored["reference"]
    return Question(row.id, row.kind, tuple(stored["turns"]), tuple(reference) if reference is not None else None)


def _conversation(row: Row, turns: Mapping[int, Mapping[str, Any]], turn: int, exam: Exam) -> list[dict[str, str]]:
    """What the policy is asked at that turn."""
    asked, said = _question(row).turns[:turn], _texts(turns)
    history = [
        (role, text)
        for question, answer in zip(asked, said, strict=False)
        for role, text in (("user", question), ("assistant", answer))
    ]
    return rendering.messages(Row(asked[-1], history=tuple(history), origin=row.origin), exam.system)


def _prompts(recipe: Recipe, exam: Exam) -> Prompts:
    assert exam.task is not None
    return exam.task.prompts_of_judge(recipe.eval.data_dir)


def _endpoint(recipe: Recipe, run: Run | None) -> Endpoint:
    """The judge, whose replies are kept in the run's folder. Raises RecipeError for what is no address."""
    judge = recipe.eval.judge
    assert judge is not None
    cache = None if run is None else run.folder / JUDGMENTS
    return Endpoint(judge.endpoint, judge.model, key_env=judge.key_env, cache=cache)


def digest(texts: Sequence[str]) -> str:
    """By which a judgment is known to be of these answers, the judged one last."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]
