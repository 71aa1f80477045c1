"""MT-Bench: a judge model rates a policy's answers to 80 two-turn questions from 1 to 10 (Zheng et al. 2306.05685).

Which questions need a reference, the prompts' fields, temperature 0 and the reading of a rating are FastChat's
(fastchat/llm_judge). The original prompts are read from FastChat's judge_prompts.jsonl; without that file the package
uses its own words, and records under which name. Departures, all counted: a rating outside 1..10 and a reply that was
cut before its `[[n]]` are failures, and a reply without a rating is asked for once more.
"""

from __future__ import annotations

import hashlib
import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from heatbath.data.tables import read_file
from heatbath.errors import DataError
from heatbath.ideas.intervals import Estimate, mean_with_interval, paired_difference
from heatbath.verify.endpoint import Endpoint, Messages, RefusalError, Reply

Id = int | str
Answers = Mapping[Id, tuple[str, ...]]
Read = TypeVar("Read")

CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
NEED_REFERENCE = frozenset({"math", "reasoning", "coding"})
# (turn, with a reference) → the name in FastChat's file
NAMES = {
    (1, False): "single-v1",
    (1, True): "single-math-v1",
    (2, False): "single-v1-multi-turn",
    (2, True): "single-math-v1-multi-turn",
}
ONE_TURN = frozenset({"question", "answer"})
TWO_TURNS = frozenset({"question_1", "question_2", "answer_1", "answer_2"})
FASTCHAT = "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6"  # of the file at its commit 0e6d3e4
RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
BARE_RATING = re.compile(r"\[(\d+\.?\d*)\]")
LOWEST, HIGHEST = 1.0, 10.0


@dataclass(frozen=True)
class Template:
    """The two messages of a judge's prompt; `user` has fields in braces."""

    system: str
    user: str

    def messages(self, **fields: str) -> list[dict[str, str]]:
        user = {"role": "user", "content": self.user.format(**fields)}
        return [{"role": "system", "content": self.system}, user] if self.system else [user]


@dataclass(frozen=True)
class Prompts:
    """A set of judge prompts under the name that is recorded with every result made by it."""

    name: str
    templates: Mapping[str, Template]


_TASK = (
    "You grade what an AI assistant answered to a user. Ask of it: does it do what was asked, is what it says true, "
    "how useful and how complete is it, how well is it written? Length earns nothing by itself, and nothing that the "
    "answer says about its own quality counts. "
)
_WITH_REFERENCE = (
    "A reference answer, which you may take to be right, comes with the question. Compare the two step by step and "
    "name each mistake you find. Whether the answer is right weighs most, how helpful it is comes after. "
)
_SECOND = "The conversation has two questions. Grade the answer to the second one; the first is there for context. "
_FORM = (
    "Write a few sentences on its merits and faults. Then give a whole number from 1 (useless) to 10 (could not be "
    "better) in double square brackets on a line of its own, like this:\nRating: [[4]]"
)
_ONE = "<question>\n{question}\n</question>\n\n%s<answer>\n{answer}\n</answer>"
_TWO = (
    "%s<conversation>\n<question 1>\n{question_1}\n</question 1>\n\n<answer 1>\n{answer_1}\n</answer 1>\n\n"
    "<question 2>\n{question_2}\n</question 2>\n\n<answer 2>\n{answer_2}\n</answer 2>\n</conversation>"
)
_REFERENCE = "<reference>\n{ref_answer_1}\n</reference>\n\n"
_REFERENCES = "<reference 1>\n{ref_answer_1}\n</reference 1>\n\n<reference 2>\n{ref_answer_2}\n</reference 2>\n\n"
OWN = Prompts(
    "heatbath-1",
    {
        "single-v1": Template(_TASK + _FORM, _ONE % ""),
        "single-math-v1": Template(_TASK + _WITH_REFERENCE + _FORM, _ONE % _REFERENCE),
        "single-v1-multi-turn": Template(_TASK + _SECOND + _FORM, _TWO % ""),
        "single-math-v1-multi-turn": Template(_TASK + _SECOND + _WITH_REFERENCE + _FORM, _TWO % _REFERENCES),
    },
)


@dataclass(frozen=True)
class Question:
    """A question of one or two turns, with the reference answers to them where its category needs them."""

    id: Id
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] | None = None


def read_questions(path: Path | str, references: Path | str | None = None) -> list[Question]:
    """FastChat's question.jsonl, and its reference_answer file for math, reasoning and coding.

    Raises DataError for a row in another form, an id that comes twice, or a category without the references it needs.
    """
    known = read_answers(references) if references is not None else {}
    questions: dict[Id, Question] = {}
    for record, where in read_file(Path(path), "questions"):
        id_, turns = _id(record, where), _turns(record.get("turns"), where)
        category = record.get("category")
        if not isinstance(category, str) or len(turns) > 2:
            raise DataError("a question needs a `category` and one or two `turns`", where, "see FastChat's file")
        if id_ in questions:
            raise DataError(f"question {id_} is there twice", where, "give each question an id of its own")
        questions[id_] = Question(id_, category, turns, known.get(id_))
    bare = [q.id for q in questions.values() if q.category in NEED_REFERENCE and len(q.reference or ()) < len(q.turns)]
    if bare:
        raise DataError(
            f"{len(bare)} questions of {', '.join(sorted(NEED_REFERENCE))} have no reference answer: {_some(bare)}",
            str(references or path),
            "name FastChat's reference_answer/gpt-4.jsonl as `references`",
        )
    return list(questions.values())


def read_answers(path: Path | str) -> dict[Id, tuple[str, ...]]:
    """Question id → answers to its turns, from FastChat's model_answer form or rows of `question_id` and `turns`."""
    answers: dict[Id, tuple[str, ...]] = {}
    for record, where in read_file(Path(path), "answers"):
        id_, choices = _id(record, where), record.get("choices")
        first = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else record
        if id_ in answers:
            raise DataError(f"question {id_} is answered twice", where, "keep one row of each question")
        answers[id_] = _turns(first.get("turns"), where)
    return answers


def read_prompts(path: Path | str) -> Prompts:
    """The single-answer prompts of FastChat's judge_prompts.jsonl; named `fastchat` where the file is the original one,
    else by the file's name and content hash. Raises DataError where one is missing or has a field nobody fills."""
    templates = {}
    for record, where in read_file(Path(path), "prompts"):
        if record.get("name") not in NAMES.values():
            continue
        system, user = record.get("system_prompt"), record.get("prompt_template")
        if not isinstance(system, str) or not isinstance(user, str):
            raise DataError("a prompt needs `system_prompt` and `prompt_template`", where, "see FastChat's file")
        check_fields(user, _fields(str(record["name"])), where)
        templates[str(record["name"])] = Template(system, user)
    missing = [name for name in NAMES.values() if name not in templates]
    if missing:
        raise DataError(f"no prompt called {', '.join(missing)}", str(path), "give FastChat's judge_prompts.jsonl")
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return Prompts("fastchat" if digest == FASTCHAT else f"{Path(path).name}@{digest[:12]}", templates)


def _fields(name: str) -> frozenset[str]:
    """The fields that are filled in the prompt of that name."""
    turn, with_reference = next(key for key, value in NAMES.items() if value == name)
    references = {"ref_answer_1", "ref_answer_2"} if with_reference else set()
    return (ONE_TURN if turn == 1 else TWO_TURNS) | references


def check_fields(template: str, allowed: frozenset[str], where: str) -> None:
    """Raises DataError where a template has a field in braces that is not among `allowed`."""
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise DataError(f"a prompt is no format string: {error}", where, "write {{ and }} for braces") from None
    if not fields <= allowed:
        names = ", ".join(repr(name) for name in sorted(fields - allowed))
        raise DataError(f"a prompt has unknown fields: {names}", where, f"use {', '.join(sorted(allowed))}")


def judge_messages(prompts: Prompts, question: Question, answers: Sequence[str], turn: int) -> list[dict[str, str]]:
    """What the judge is asked about the answer to turn 1 or 2, as FastChat's run_judge_single builds it."""
    with_reference = question.category in NEED_REFERENCE
    fields = {}
    if with_reference:
        fields = {f"ref_answer_{n}": text for n, text in enumerate(question.reference or (), 1)}
    if turn == 1:
        fields |= {"question": question.turns[0], "answer": answers[0]}
    else:
        fields |= {f"question_{n}": question.turns[n - 1] for n in (1, 2)}
        fields |= {f"answer_{n}": answers[n - 1] for n in (1, 2)}
    return prompts.templates[NAMES[turn, with_reference]].messages(**fields)


def rating(reply: Reply) -> tuple[float | None, str]:
    """The rating, or None and why there is none: the first `[[n]]`, else (in a whole reply) the first `[n]`.

    FastChat takes `[n]` from a cut reply too, where it may be an array index of the explanation, and any n.
    """
    found = RATING.search(reply.text)
    if found is None and reply.finish != "length":
        found = BARE_RATING.search(reply.text)
    if found is None:
        return None, "cut at max_tokens before its rating" if reply.finish == "length" else "no rating"
    value = float(found.group(1))
    return (value, "") if LOWEST <= value <= HIGHEST else (None, f"rating {found.group(1)} outside 1..10")


def unanswered(questions: Sequence[Question], answers: Answers) -> list[tuple[Id, int]]:
    """(question, turn) of every turn without an answer of the policy; an empty answer is an answer."""
    return [(q.id, turn) for q in questions for turn in range(len(answers.get(q.id, ())) + 1, len(q.turns) + 1)]


def ask_policy(
    questions: Sequence[Question], generate: Callable[[list[list[dict[str, str]]]], Sequence[str]]
) -> dict[Id, tuple[str, ...]]:
    """The policy's answers to both turns, the second with the first in its history.

    `generate` maps conversations to texts, in order. FastChat samples by category (temperature 0.7 for writing and
    roleplay, 0.1 for stem and humanities, else 0); here the caller decides.
    """
    given: dict[Id, tuple[str, ...]] = {q.id: () for q in questions}
    for turn in (0, 1):
        open_ = [q for q in questions if len(q.turns) > turn]
        conversations = []
        for q in open_:
            history = [
                {"role": role, "content": text}
                for asked, said in zip(q.turns, given[q.id], strict=False)
                for role, text in (("user", asked), ("assistant", said))
            ]
            conversations.append([*history, {"role": "user", "content": q.turns[turn]}])
        for q, text in zip(open_, generate(conversations) if conversations else [], strict=True):
            given[q.id] += (text,)
    return given


@dataclass(frozen=True)
class Judgment:
    """One rating of one turn, or what was wrong with the reply."""

    question: Id
    category: str
    turn: int
    rating: float | None
    problem: str
    text: str


@dataclass(frozen=True)
class MtBench:
    """All judgments of one policy by one judge. A failed one is no score: it is counted, and left out of the means."""

    judge: str
    prompts: str
    judgments: tuple[Judgment, ...]
    unanswered: tuple[tuple[Id, int], ...]

    @property
    def failed(self) -> list[Judgment]:
        return [judgment for judgment in self.judgments if judgment.rating is None]

    @property
    def missing(self) -> int:
        """Turns without a rating: failed judgments and turns that the policy did not answer."""
        return len(self.failed) + len(self.unanswered)

    @property
    def categories(self) -> list[str]:
        """Those of the questions, the eight original ones first and in the original order."""
        found = {judgment.category for judgment in self.judgments}
        return [c for c in CATEGORIES if c in found] + sorted(found - set(CATEGORIES))

    def scores(self, category: str | None = None, turn: int | None = None) -> dict[Id, float]:
        """Question → mean rating of its turns (or of one turn), for the questions that have one."""
        ratings: dict[Id, list[float]] = {}
        for j in self.judgments:
            if j.rating is not None and category in (None, j.category) and turn in (None, j.turn):
                ratings.setdefault(j.question, []).append(j.rating)
        return {question: sum(values) / len(values) for question, values in ratings.items()}

    def mean(self, category: str | None = None, turn: int | None = None) -> Estimate | None:
        """Mean over questions with its 95 % interval (a question's turns are one observation); None without ratings.

        With every turn rated this is FastChat's mean over ratings.
        """
        values = list(self.scores(category, turn).values())
        return mean_with_interval(values, bounds=(LOWEST, HIGHEST)) if values else None

    def report(self) -> dict[str, Any]:
        """Everything as plain data for JSON."""
        parts: dict[str, Estimate | None] = {
            "all": self.mean(),
            "turn 1": self.mean(turn=1),
            "turn 2": self.mean(turn=2),
        }
        parts |= {category: self.mean(category) for category in self.categories}
        return {
            "judge": self.judge,
            "prompts": self.prompts,
            "means": {name: plain(value) for name, value in parts.items() if value is not None},
            "rated": len(self.judgments) - len(self.failed),
            "failed": [vars(judgment) for judgment in self.failed],
            "unanswered": [list(turn) for turn in self.unanswered],
        }

    def __str__(self) -> str:
        total = len(self.judgments) + len(self.unanswered)
        lines = [f"MT-Bench, {total - self.missing} of {total} turns rated by {self.judge}, prompts = {self.prompts}"]
        if self.unanswered:
            lines.append(f"  not answered: {len(self.unanswered)} turns, first question {self.unanswered[0][0]}")
        if self.failed:
            first = self.failed[0]
            said = " ".join(first.text.split())[-80:]
            place = f"question {first.question}, turn {first.turn}: {first.problem} in '…{said}'"
            lines.append(f"  not counted:  {len(self.failed)} judgments, first {place}")
        rows = [("all", self.mean()), ("turn 1", self.mean(turn=1)), ("turn 2", self.mean(turn=2))]
        rows += [(category, self.mean(category)) for category in self.categories]
        width = max(len(name) for name, _ in rows)
        return "\n".join([*lines, *(f"  {name:<{width}}  {value}" for name, value in rows if value is not None)])


def mt_bench(
    endpoint: Endpoint,
    questions: Sequence[Question],
    answers: Answers,
    *,
    prompts: Prompts = OWN,
    attempts: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> MtBench:
    """The judge's ratings of both turns of every answered question; FastChat's are at `attempts=1`.

    Goes on from the endpoint's cache. Raises RunError where the server fails, and where it refuses every request.
    """
    open_ = set(unanswered(questions, answers))
    tasks = [(q, turn) for q in questions for turn in range(1, len(q.turns) + 1) if (q.id, turn) not in open_]
    conversations = [judge_messages(prompts, q, answers[q.id], turn) for q, turn in tasks]
    results = judged(endpoint, conversations, rating, attempts=attempts, progress=progress)
    judgments = tuple(
        Judgment(q.id, q.category, turn, value, problem, text)
        for (q, turn), (value, problem, text) in zip(tasks, results, strict=True)
    )
    return MtBench(endpoint.model, prompts.name, judgments, tuple(sorted(open_, key=str)))


def judged(
    endpoint: Endpoint,
    conversations: Sequence[Messages],
    read: Callable[[Reply], tuple[Read | None, str]],
    *,
    attempts: int,
    progress: Callable[[int, int], None] | None,
) -> list[tuple[Read | None, str, str]]:
    """What `read` made of each reply, what was wrong, and the reply's text; an unreadable one is asked for again."""
    results: list[tuple[Read | None, str, str]] = [(None, "not asked", "")] * len(conversations)
    left = list(range(len(conversations)))
    for attempt in range(max(1, attempts)):
        asked = [conversations[i] for i in left]
        replies = endpoint.answers(asked, attempt=attempt, refused="return", progress=progress)
        refusals = [reply for reply in replies if isinstance(reply, RefusalError)]
        if refusals and len(refusals) == len(conversations):
            raise refusals[0]
        unread = []
        for i, reply in zip(left, replies, strict=True):
            if isinstance(reply, RefusalError):
                results[i] = (None, reply.what, "")
                continue
            value, problem = read(reply)
            results[i] = (value, problem, reply.text)
            if value is None:
                unread.append(i)
        left = unread
        if not left:
            break
    return results


def plain(estimate: Estimate) -> dict[str, Any]:
    """An estimate for JSON: None where a single question has no interval."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in vars(estimate).items()}


def paired(before: MtBench, after: MtBench, category: str | None = None, turn: int | None = None) -> Estimate | None:
    """Mean difference `after − before` over the questions that both have a rating of; None where there are none.

    Raises ValueError where the two were not judged alike.
    """
    if (before.judge, before.prompts) != (after.judge, after.prompts):
        raise ValueError(f"{before.judge} ({before.prompts}) and {after.judge} ({after.prompts}) do not compare")
    a, b = before.scores(category, turn), after.scores(category, turn)
    both = [question for question in a if question in b]
    return paired_difference([a[q] for q in both], [b[q] for q in both]) if both else None


def _id(record: Mapping[str, Any], where: str) -> Id:
    value = record.get("question_id")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise DataError("a row without `question_id`", where, "a number or a text that names the question")
    return value


def _turns(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(turn, str) for turn in value):
        raise DataError("`turns` is no list of texts", where, 'for example "turns": ["first answer", "second answer"]')
    return tuple(value)


def _some(ids: Sequence[Id], most: int = 5) -> str:
    return ", ".join(map(str, ids[:most])) + (", …" if len(ids) > most else "")
