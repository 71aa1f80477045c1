"""The tree of an answer's text."""

from __future__ import annotations

import re

from heatbath.verify.answers.expressions import Node, Words
from heatbath.verify.answers.notation import GREEK, latex, letters
from heatbath.verify.answers.parser import Parser
from heatbath.verify.answers.symbols import (
    FUNCTIONS,
    MAX_CHARACTERS,
    STYLES,
    WORDS_ONLY,
    RefusedError,
    UnreadableError,
    lex,
)


def read(text: str) -> Node:
    """The tree of an answer. Raises UnreadableError or RefusedError."""
    text = latex(text)
    if len(text) > MAX_CHARACTERS:
        raise RefusedError(f"longer than {MAX_CHARACTERS} characters")
    text = text.rstrip(".,;: ").removeprefix("= ").strip()
    if not text:
        raise UnreadableError("empty")
    return words(text) or Parser(lex(text)).answer()


def words(text: str) -> Words | None:
    """`text` as words, unless it may be mathematics."""
    bare = letters(text)
    if not WORDS_ONLY.fullmatch(bare):
        return None
    known = {"and", "or", "pi", "infty", "infinity", *FUNCTIONS, *GREEK}
    runs = re.findall(r"[^\W\d_]+", bare)
    # A word of mathematics (a command that is no style) is not one of a text.
    commands = set(re.findall(r"\\([A-Za-z]+)", text)) - STYLES
    if commands or not any((len(run) > 2 or not run.isascii()) and run not in known for run in runs):
        return Words(bare) if bare == "no" else None
    return Words(bare)
