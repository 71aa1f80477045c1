"""Preference data: pairs, scored and labelled completions, read from a file; and pairs made of graded samples."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from heatbath.data import checks, rendering
from heatbath.data.contamination import contamination_note, read_problems, without_shared_ngrams
from heatbath.data.rendering import Rendered
from heatbath.data.rows import Row
from heatbath.data.tables import as_text, read_file
from heatbath.errors import DataError
from heatbath.sections import SHIPPED_PREFERENCES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from heatbath.recipe import Recipe

Kind = Literal["pair", "score", "label"]
KEY = "preference.data"
SHIPPED = Path(__file__).parent / "shipped"
QUESTIONS, RESPONSES = ("question", "prompt"), ("response", "completion")
FORMS = (
    "a row has a question and either chosen and rejected, or a response and its score (0 to 1) or label (true, false)"
)
LABELS = {"true": 1.0, "1": 1.0, "1.0": 1.0, "false": 0.0, "0": 0.0, "0.0": 0.0}


@dataclass(frozen=True)
class Preference:
    """What somebody thinks of completions of a question: the first of two is preferred, or the only one has a `target`
    in [0, 1], a score or a label. `names` are the fields that the completions came from."""

    row: Row
    kind: Kind
    completions: tuple[str, ...]
    target: float | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class RenderedPreference:
    """Token ids of the prompt and of each completion, EOS included."""

    kind: Kind
    prompt_ids: list[int]
    completion_ids: list[list[int]]
    target: float | None
    truncated: bool

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest completion."""
        return len(self.prompt_ids) + max(map(len, self.completion_ids))


def load(recipe: Recipe, test: Sequence[Row]) -> tuple[list[Preference], tuple[str, ...]]:
    """The rows of a recipe's preference file, decontaminated like its demonstrations, and notes about them.

    Raises DataError naming file, row and remedy: no such form, a score outside [0, 1], a question that is also one of
    `test`, or for DPO anything but pairs.
    """
    settings = recipe.preference
    assert settings is not None
    path = SHIPPED / f"{settings.data}.jsonl" if settings.data in SHIPPED_PREFERENCES else Path(settings.data)
    rows = [_preference(record, where) for record, where in read_file(path, KEY)]
    kinds = Counter(row.kind for row in rows)
    notes = [f"{path.name}: " + ", ".join(f"{kinds[k]:,} {k}{'s' * (kinds[k] > 1)}" for k in sorted(kinds))]
    if settings.method == "dpo" and (other := next((row for row in rows if row.kind != "pair"), None)):
        raise DataError(
            f"DPO learns from pairs, and the row is a {other.kind}",
            other.row.origin,
            'give each row chosen and rejected, or take preference.method = "una"',
        )
    if recipe.data.decontaminate:
        problems = read_problems(recipe.data)
        problems += [(row.asked, f"data.test, {row.origin}") for row in test]
        kept, removed = without_shared_ngrams([row.row for row in rows], problems, recipe.data.ngram)
        notes.append(contamination_note(KEY, len(rows), removed, recipe.data.ngram, len(problems)))
        clean = {id(row) for row in kept}
        rows = [row for row in rows if id(row.row) in clean]
        if not rows:
            raise DataError("decontamination left no preference", str(path), "give other rows, or raise data.ngram")
    _require_held_out(rows, test)
    return rows, tuple(notes)


def rendered(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Preference], recipe: Recipe
) -> list[RenderedPreference]:
    """Token ids of every row, prompts as they are asked and completions as demonstrations end, in EOS. Raises DataError
    for what would fail in silence: an end token inside a completion, BOS twice, unknown characters, two completions
    with the same tokens, a prompt that leaves room for none, more than 1 % of the completions cut without leave."""
    settings = recipe.preference
    assert settings is not None
    made: list[RenderedPreference] = []
    longest: list[Rendered] = []  # of each row
    for row in rows:
        parts = [
            _rendered(tokenizer, row, name, text, recipe) for name, text in zip(row.names, row.completions, strict=True)
        ]
        longest.append(max(parts, key=lambda part: (part.truncated, len(part.input_ids))))
        prompt = len(parts[0].labels) - parts[0].supervised
        completions = [part.input_ids[prompt:] for part in parts]
        cut = longest[-1].truncated
        if len(completions) == 2 and completions[0] == completions[1]:
            raise DataError(
                "chosen and rejected are the same" + f" in the first {settings.max_length} tokens" * cut,
                rendering.place(row.row),
                "drop the row: it prefers nothing" + ", or raise preference.max_length" * cut,
            )
        made.append(RenderedPreference(row.kind, parts[0].input_ids[:prompt], completions, row.target, cut))
    sources = [row.row for row in rows]
    ids = [[*row.prompt_ids, *itertools.chain(*row.completion_ids)] for row in made]
    checks.require_known_tokens(tokenizer, ids, sources, KEY)
    if not settings.truncate:
        checks.require_few_truncated(longest, sources, settings.max_length, KEY, "preference")
    return made


def _rendered(tokenizer: PreTrainedTokenizerBase, row: Preference, name: str, text: str, recipe: Recipe) -> Rendered:
    """One completion of a row, `name` the field that it came from."""
    assert recipe.preference is not None
    answered = Row(row.row.question, text, origin=row.row.origin)
    where, longest = rendering.place(answered), recipe.preference.max_length
    if tokenizer.eos_token and tokenizer.eos_token in text:
        raise DataError(
            f"'{name}' contains the end token {tokenizer.eos_token}; what follows it would not be learned",
            where,
            "remove the token from the text: it is added when the row is rendered",
        )
    made = rendering.render(tokenizer, answered, system=recipe.data.system, max_length=longest)
    checks.require_supervised(made, where, longest, "preference")
    checks.require_one_bos(made.input_ids, tokenizer.bos_token_id, where)
    checks.require_end_supervised(made, tokenizer.eos_token_id, where)
    return made


def pairs_from_samples(
    samples: Iterable[Mapping[str, Any]], per_problem: int = 1, seed: int = 0
) -> list[dict[str, str]]:
    """Rows `question, chosen, rejected` of a run's samples: a right completion of a problem against a wrong one.

    Up to `per_problem` pairs of a problem, none of whose texts is used twice, drawn by `seed` and the problem alone.
    Completions that the grader failed on are left out, and those cut at the limit: the end that they would be given in
    training is not theirs. Problems that were always or never solved give no pair.
    """
    found: dict[str, tuple[str, list[str], list[str]]] = {}
    for sample in samples:
        text = str(sample["completion"])
        if not sample.get("finished", True) or not text.strip():
            continue
        _, right, wrong = found.setdefault(str(sample["problem"]), (str(sample["question"]), [], []))
        group = {"right": right, "wrong": wrong, "no_answer": wrong}.get(sample["status"])
        if group is not None and text not in group:
            group.append(text)
    rows = []
    for problem, (question, right, wrong) in sorted(found.items()):
        order = random.Random(f"{seed} {problem}")
        chosen, rejected = (order.sample(group, len(group)) for group in (sorted(right), sorted(wrong)))
        pairs = list(zip(chosen, rejected, strict=False))[:per_problem]
        rows += [{"question": question, "chosen": good, "rejected": bad} for good, bad in pairs]
    return rows


def _preference(record: dict[str, Any], where: str) -> Preference:
    """The form of a record, told by the fields that it fills in."""
    filled = {name for name, value in record.items() if not _empty(value)}
    question = _text_of(record, QUESTIONS, where)
    if question is None:
        raise DataError(f"no question or prompt in the row (it has {_listed(record)})", where, FORMS)
    row = Row(question, origin=where)
    response = next((name for name in RESPONSES if name in filled), None)
    judged = sorted({"score", "label"} & filled)
    if {"chosen", "rejected"} & filled:
        if missing := {"chosen", "rejected"} - filled:
            raise DataError(f"no '{missing.pop()}' in the row (it has {_listed(record)})", where, FORMS)
        if response or judged:
            raise DataError(f"the row is a pair, and has '{response or judged[0]}' too", where, FORMS)
        texts = [as_text(record[name], name, where) or "" for name in ("chosen", "rejected")]
        return Preference(row, "pair", tuple(texts), names=("chosen", "rejected"))
    if response is None or len(judged) != 1:
        both = " both a score and a label" if len(judged) == 2 else ""
        raise DataError(f"no preference in the row: it has{both or f' {_listed(record)}'}", where, FORMS)
    text = as_text(record[response], response, where) or ""
    target = _score(record["score"], where) if judged == ["score"] else _label(record["label"], where)
    return Preference(row, "score" if judged == ["score"] else "label", (text,), target, (response,))


def _empty(value: Any) -> bool:
    """What a table holds where a row has no such field."""
    return (
        value is None or (isinstance(value, str) and not value.strip()) or (isinstance(value, float) and value != value)
    )


def _text_of(record: dict[str, Any], names: tuple[str, ...], where: str) -> str | None:
    return next((text for name in names if (text := as_text(record.get(name), name, where)) is not None), None)


def _listed(record: dict[str, Any]) -> str:
    return ", ".join(name for name, value in record.items() if not _empty(value)) or "no fields"


def _score(value: Any, where: str) -> float:
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not 0 <= score <= 1:
        raise DataError(
            f"the score {value!r} is not a number from 0 to 1",
            where,
            "map the scale: (score - lowest) / (highest - lowest)",
        )
    return score


def _label(value: Any, where: str) -> float:
    label = LABELS.get(str(value).strip().lower())
    if label is None:
        raise DataError(f"the label {value!r} is neither true nor false", where, "write true or false, or a score")
    return label


def _require_held_out(rows: Sequence[Preference], test: Sequence[Row]) -> None:
    problems = {row.problem: row for row in test}
    shared = [row for row in rows if row.row.problem in problems]
    if shared:
        first = shared[0].row
        raise DataError(
            f"{len(shared)} preference row(s) ask a test problem, first: {first.question[:80]!r}",
            f"{first.origin}, and data.test, {problems[first.problem].origin}",
            "remove them from one of the two: a problem seen in training measures nothing",
        )
