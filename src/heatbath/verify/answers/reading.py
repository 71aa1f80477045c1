"""The tree of an answer's text."""

from __future__ import annotations

import re

from heatbath.verify.answers.expressions import Name, Node, Words, depth
from heatbath.verify.answers.notation import GREEK, latex, letters
from heatbath.verify.answers.parser import Parser
from heatbath.verify.answers.symbols import (
    FUNCTIONS,
    MAX_CHARACTERS,
    MAX_DEPTH,
    STYLES,
    WORDS_ONLY,
    RefusedError,
    UnreadableError,
    lex,
)

BUILDER = re.compile(r"\\\{ ?[a-zA-Z](?: ?\\in ?\\mathbb ?\{?[RZN]\}?)? ?(?:\||\\mid|\\vert|:) ?(.{1,200}) ?\\\}")
SETS = dict.fromkeys(("no solution", "no solutions", "empty set"), Name("emptyset"))
SETS |= dict.fromkeys(("all real numbers", "all reals", "real numbers"), Name("mathbb R"))


def read(text: str) -> Node:
    """The tree of an answer. Raises UnreadableError or RefusedError."""
    text = latex(text)
    if len(text) > MAX_CHARACTERS:
        raise RefusedError(f"longer than {MAX_CHARACTERS} characters")
    if text.endswith(("...", "\\ldots")):
        raise UnreadableError("a number that goes on")
    text = text.rstrip(".,;: ").removeprefix("= ").strip()
    if not text:
        raise UnreadableError("empty")
    if match := BUILDER.fullmatch(text):  # {x | x > 3}
        text = match.group(1)
    found = words(text) or Parser(lex(text)).answer()
    if depth(found) > MAX_DEPTH:
        raise RefusedError("nested deeper than any answer")
    return found


def _is_word(run: str) -> bool:
    return (len(run) > 2 and run[:-1] not in FUNCTIONS) or not run.isascii()


def words(text: str) -> Words | Name | None:
    """`text` as words, unless it may be mathematics."""
    bare = re.sub(r"^(?:the|an?) (?=[a-z]{3})", "", letters(text))
    if bare in SETS:
        return SETS[bare]
    if not WORDS_ONLY.fullmatch(bare):
        return None
    known = {"and", "or", "pi", "infty", "infinity", *FUNCTIONS, *GREEK}
    runs = re.findall(r"[^\W\d_]+", bare)
    # A word of mathematics (a command that is no style) is not one of a text.
    commands = set(re.findall(r"\\([A-Za-z]+)", text)) - STYLES
    if commands or not any(_is_word(run) and run not in known for run in runs):
        return Words(bare) if bare == "no" else None
    return Words(bare)
