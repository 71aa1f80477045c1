"""The final answer of a completion, by rules tried in order. Linear in the length of the text."""

from __future__ import annotations

import re

MAX_CHARACTERS = 20_000  # of the end of a completion; the answer stands at its end
# A number that stands alone: no letter, digit, power or brace touches it (5x, 1e5 and 2^{10} hold none); a minus after
# a digit or a bracket is a subtraction. Possessive, so that a long run of digits is read once.
NUMBER = re.compile(
    r"(?<![0-9A-Za-z_.^{\\/])(?:(?<![0-9)\]}] )(?<![)\]}])[-−])?"
    r"(?:[0-9]++(?:,[0-9]{3})*+(?:\.[0-9]++)?+|\.[0-9]++)(?:/[0-9]++)?+(?![0-9A-Za-z_^{/\\])"
)
STATED = re.compile(r"answer(?: is|:)[ \t:]*([^\n]+)", re.IGNORECASE)
WORDS_AFTER = re.compile(r"(?:[ %]+[A-Za-z%]++)*+[ .,;:!?]*+")


def extract(text: str) -> tuple[str | None, str]:
    """The answer and the rule that found it; `(None, "none")` when no rule did.

    Rules: the last `\\boxed{…}` (a correction counts), what follows the last `####`, what follows the last
    "answer is", else the last number of the last line that has one.
    """
    text = text[-MAX_CHARACTERS:]
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed, "boxed"
    if "####" in text:
        after = text.rpartition("####")[2].strip().split("\n")[0].strip()
        if after:
            return after, "hashes"
    stated = STATED.findall(text)
    if stated:
        return _stated_answer(stated[-1]), "stated"
    for line in reversed(text.splitlines()):
        if numbers := NUMBER.findall(line):
            return numbers[-1], "last_number"
    return None, "none"


def last_boxed(text: str) -> str | None:
    """The content of the last complete `\\boxed{…}`, braces balanced, or None."""
    # Read from the right: a `\\boxed{` belongs to the brace that closes at its own depth.
    closing: list[int] = []
    for position in range(len(text) - 1, -1, -1):
        character = text[position]
        if character == "}":
            closing.append(position)
        elif character == "{" and closing:
            end = closing.pop()
            if text.endswith("\\boxed", 0, position):
                return text[position + 1 : end].strip()
    return None


def _stated_answer(phrase: str) -> str:
    """A number followed by nothing but words (`85 dollars.`) is that number; an equation counts by its last side."""
    phrase = phrase.rpartition("=")[2].strip(" \t*\"'`$.")
    number = NUMBER.match(phrase)
    if number and WORDS_AFTER.fullmatch(phrase, number.end()):
        return number.group()
    return phrase
