"""The final answer of a completion, by rules tried in order. Linear in the length of the text."""

from __future__ import annotations

import re

MAX_CHARACTERS = 20_000  # of the end of a completion; the answer stands at its end
NUMBER = re.compile(r"-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?")
STATED = re.compile(r"answer(?: is|:)[ \t:]*([^\n]+)", re.IGNORECASE)


def extract(text: str) -> tuple[str | None, str]:
    """The answer and the rule that found it; `(None, "none")` when no rule did.

    Rules: the last `\\boxed{…}` (a correction counts), what follows the last `####`, what follows the last
    "answer is", else the last number of the last line.
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
        return _first_number_or_all(stated[-1]), "stated"
    lines = text.strip().splitlines()
    numbers = NUMBER.findall(lines[-1]) if lines else []
    return (numbers[-1], "last_number") if numbers else (None, "none")


def last_boxed(text: str) -> str | None:
    """The content of the last complete `\\boxed{…}`, braces balanced, or None."""
    end = len(text)
    while (start := text.rfind("\\boxed{", 0, end)) >= 0:
        depth = 0
        for position in range(start + len("\\boxed"), end):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : position].strip()
        end = start
    return None


def _first_number_or_all(phrase: str) -> str:
    phrase = phrase.strip().rstrip(".").strip()
    plain = NUMBER.match(phrase.lstrip("$"))
    return plain.group() if plain else phrase
