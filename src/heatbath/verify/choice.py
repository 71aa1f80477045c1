"""Verdicts on multiple-choice answers: the options of a question, which of them is right, and the grader.

An answer is asserted or there is none: nothing is guessed or filled in (`choice_rules.py`).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from heatbath.verify.choice_rules import extract_choice, plain, worded
from heatbath.verify.verdict import Status, Verdict

MAX_OPTION = 5_000  # characters of an option's text; of a longer one only the label can be stated
MAX_NUMBER = 10**30  # of an option or a gold that is a number; no question has a larger one, and text has a limit
ASSUMED = 10  # A..J, the labels assumed where no options are given
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Choices:
    """`texts` are (label, as written, casefolded) of the options whose text can be stated."""

    labels: tuple[str, ...]
    gold: str
    texts: tuple[tuple[str, str, str], ...] = ()

    @property
    def reach(self) -> int:
        """Characters after a cue that may belong to the answer."""
        return 300 + max((2 * len(t) for _, t, _ in self.texts), default=0)

    def find(self, token: str) -> str | None:
        """The label that a token names, or None."""
        token = _label(token)
        if self.texts and self.labels[0].isdigit() and token.isalpha() and LETTERS.index(token) < len(self.labels):
            return self.labels[LETTERS.index(token)]
        return token if token in self.labels else None

    def named(self, words: str) -> list[str]:
        """The options whose text is exactly this; of several that differ in case only, the one written so."""
        fitting = [(label, exact) for label, exact, folded in self.texts if folded == words.casefold()]
        exactly = [label for label, exact in fitting if exact == words]
        return exactly if len(exactly) == 1 else [label for label, _ in fitting]

    def text(self, label: str | None) -> str:
        """The casefolded text of an option, "" where it has none."""
        return next((folded for known, _, folded in self.texts if known == label), "")


def read_options(options: Any) -> tuple[tuple[str, ...] | None, tuple[str, ...]] | None:
    """Labels (None for a plain list) and texts of options written as [texts], {label: text} or, as ARC has them,
    {"text": [texts], "label": [labels]}; None where they are written otherwise."""
    labels, texts = None, options
    if isinstance(options, Mapping):
        arc = set(options) == {"text", "label"} and _is_list(options["text"]) and _is_list(options["label"])
        labels, texts = (options["label"], options["text"]) if arc else (tuple(options), tuple(options.values()))
        if len(labels) != len(texts):
            return None
    if not _is_list(texts) or not all(_is_text(value) for value in (*texts, *(labels or ()))):
        return None
    return None if labels is None else tuple(map(str, labels)), tuple(map(str, texts))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int | float) and abs(value) < MAX_NUMBER)  # no NaN


def _choices(gold: Any) -> Choices | str:
    """The choices of a row, or the reason why its gold is none of them."""
    if isinstance(gold, str) and gold.lstrip().startswith("{"):
        try:
            gold = json.loads(gold)
        except (ValueError, RecursionError):
            return "gold_is_no_json"
    gold, options = (gold.get("gold"), gold.get("options")) if isinstance(gold, Mapping) else (gold, None)
    if isinstance(gold, bool) or not isinstance(gold, str | int) or (isinstance(gold, str) and len(gold) > MAX_OPTION):
        return "gold_is_no_label"
    if options is not None:
        read = read_options(options)
        return "options_have_no_labels" if read is None else _given(gold, *read)
    token = _token(gold) if isinstance(gold, str) else ""
    if token in ("", "0"):
        return "gold_is_no_label"
    last = int(token) if token.isdigit() else LETTERS.index(token) + 1
    labels = [str(i + 1) if token.isdigit() else LETTERS[i] for i in range(max(ASSUMED, last))]
    return Choices(tuple(labels), token)


def _token(text: str) -> str:
    """`(c)`, `C.` and `c` are C."""
    match = re.fullmatch(r"\s*\(?\s*([A-Za-z]|[0-9]{1,2})\s*[).:]?\s*", plain(text[:100]))
    return _label(match[1]) if match else ""


def _label(token: str) -> str:
    return token.upper().lstrip("0") or "0"


@lru_cache(maxsize=64)
def _given(gold: str | int, labels: tuple[str, ...] | None, options: tuple[str, ...]) -> Choices | str:
    """The choices among these options. In a plain list, labelled A.., a gold "2" is the index 2 like the int, unless it
    is the text of another option: which of the two is meant, no row can tell. Among labels, "2" is the label."""
    words = [worded(plain(t)) if len(t) <= MAX_OPTION else "" for t in options]
    wanted = worded(plain(gold)) if isinstance(gold, str) else ""
    fitting = [i for i, w in enumerate(words) if w == wanted]
    fitting = fitting or [i for i, w in enumerate(words) if w.casefold() == wanted.casefold()]
    if labels is None:
        labels = tuple(LETTERS[i : i + 1] for i in range(len(options)))
        if isinstance(gold, str) and gold.strip() in map(str, range(len(options))):
            gold = int(gold)
            if len(fitting) == 1 and fitting != [gold]:
                return "gold_fits_two_options"  # the text of one, the index of another
    tokens = tuple(map(_token, labels))
    if not tokens or "" in tokens or len(set(tokens)) < len(tokens) or len({t.isdigit() for t in tokens}) > 1:
        return "options_have_no_labels"
    token = _token(gold) if isinstance(gold, str) else ""
    if isinstance(gold, int):
        if not 0 <= gold < len(tokens) or (tokens[0].isdigit() and tokens[gold] != str(gold)):
            return "gold_is_no_label"  # among 1, 2, 3, a 2 may be the third option or the one called 2
        token = tokens[gold]
    elif token not in tokens:
        if len(fitting) != 1 or not wanted:
            return "gold_fits_two_options" if wanted and fitting else "gold_is_no_label"
        token = tokens[fitting[0]]
    texts = tuple((t, w, w.casefold()) for t, w in zip(tokens, words, strict=True) if w)
    return Choices(tokens, token, texts)


class ChoiceGrader:
    """Grades completions by the label of the right option, in this process: no rule here can hang or run code."""

    def __init__(self, **_: Any):
        """Needs nothing: the keywords of other graders (`workers`, `deadline`) are let by."""

    def __enter__(self) -> ChoiceGrader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is held."""

    def grade(self, completions: Sequence[str], golds: Sequence[str | Mapping[str, Any]]) -> list[Verdict]:
        """A verdict for each completion, in order. A gold is a label (`C`, `3`), or `{"gold": a label, an index from 0
        or an option's text, "options": [texts], {label: text} or {"text": [texts], "label": [labels]}}`, also as JSON.
        """
        return [_verdict(c, g) for c, g in zip(completions, golds, strict=True)]


def _verdict(completion: Any, gold: Any) -> Verdict:
    started = time.perf_counter()
    choices = _choices(gold)
    if isinstance(choices, str):
        return Verdict("bad_gold", None, choices, time.perf_counter() - started)
    if not isinstance(completion, str):
        return Verdict("no_answer", None, "completion_is_no_text", time.perf_counter() - started)
    label, rule = extract_choice(completion, choices)
    status: Status = "right" if label == choices.gold else "wrong" if label in choices.labels else "no_answer"
    return Verdict(status, label, rule, time.perf_counter() - started)
