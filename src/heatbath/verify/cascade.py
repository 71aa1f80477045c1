"""The verdict on one answer without computer algebra: text, choice letters, then values, each exact and bounded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from heatbath.verify.answers.equality import EXACT, Rules, same
from heatbath.verify.answers.expressions import Apply, Based, Node, Number, Quantity, Words
from heatbath.verify.answers.notation import latex, letters
from heatbath.verify.answers.reading import read
from heatbath.verify.answers.symbols import RefusedError, UnreadableError
from heatbath.verify.extract import ANCHOR, all_boxed, extract

Found = Literal["right", "wrong", "refused", "bad_gold"]
MAX_GOLD = 1_000  # characters
PLAIN = re.compile(r"-?[0-9]{1,18}")
LETTER = re.compile(r"\(?([A-J])\)?")
LETTER_WITH_TEXT = re.compile(r"\(?([A-J])(?:\)[.:]?|[.:])(?:\s.*)?", re.DOTALL)
DECIMAL_COMMA = re.compile(r"([+-]?)([0-9]+),([0-9]{1,2}|[0-9]{4,}|(?<=^0,)[0-9]+)")
# What would make a computer algebra system work without end: towers, factorials and products of large numbers.
BOMB = re.compile(
    r"[0-9]{5,}[ )}]*!|!!|\^[ {(]*[0-9]{5,}|[0-9)][)} ]*\^[ {(]*[0-9]+[)} ]*\^|10\^[{(]?[0-9]+[})]*!"
    r"|\\(?:prod|sum|int|binom)[^a-z].{0,40}(?:[0-9]{5,}|10 ?\^)|[0-9][eE][+-]?[0-9]{4,}"
)
CODE = re.compile(r"__|[\"`#@?]|\('")  # no mathematical answer has these


@dataclass(frozen=True)
class Gold:
    """A gold answer as it is compared: the answer alone, its tree where it can be read, and its letter if it is one."""

    text: str
    node: Node | None
    letter: str | None
    comma: Node | None  # with a decimal comma read as a point
    integer: int | None  # of a plain integer


@lru_cache(maxsize=4096)
def gold_answer(gold: str) -> Gold | None:
    """What a gold answer says; None for one that says nothing. A box, a formula or "answer is" in it is looked for."""
    text = latex(_stripped(gold)) if gold.strip() and len(gold) <= 20_000 else ""
    if len(text) > MAX_GOLD or not (any(map(str.isalnum, text)) or "{" in text) or not _balanced(text):
        return None
    letter = LETTER.fullmatch(letters(text).upper()) if len(text) < 30 else None
    integer = int(text) if PLAIN.fullmatch(text) else None
    return Gold(text, _tree(text), letter.group(1) if letter else None, _comma(text), integer)


def _balanced(text: str) -> bool:
    braces = re.sub(r"\\\\|\\[{}]", "", text)
    return braces.count("{") == braces.count("}")


def _stripped(gold: str) -> str:
    """The answer in a gold text: what it boxes or states, or all of it."""
    gold = gold.replace("\\\\boxed", "\\boxed").replace("\\n", "\n") if "\\\\boxed" in gold else gold
    if all_boxed(gold) is None:  # a box that is never closed, in a text that nobody generated
        gold += "}"
    if "\\boxed" in gold or "\\fbox" in gold or ANCHOR.search(gold) or len(gold) > 200 or "$" in gold:
        answer, rule = extract(gold, "latex")
        if answer and (rule != "stated" or len(gold) > 40):
            return answer
    return gold


def _tree(text: str) -> Node | None:
    try:
        return read(text)
    except (UnreadableError, RefusedError):
        return None


def _comma(text: str) -> Node | None:
    match = DECIMAL_COMMA.fullmatch(text.strip(" $").removesuffix("\\$").strip())
    return _tree(f"{match[1]}{match[2]}.{match[3]}") if match else None


def compare(gold: Gold, answer: str, rules: Rules = EXACT, finished: bool = True) -> tuple[Found | None, str]:
    """The verdict and what decided; (None, why) where computer algebra has to be asked.

    `finished`: an answer that leaves plain arithmetic to the reader (47 + 38 for 85) is wrong.
    """
    if gold.integer is not None and PLAIN.fullmatch(answer):
        return ("right" if int(answer) == gold.integer else "wrong"), "number"
    text = latex(answer)
    if text == gold.text:
        return "right", "text"
    if gold.letter and (match := LETTER_WITH_TEXT.fullmatch(_unstyled(answer)) or LETTER.fullmatch(_unstyled(answer))):
        return ("right" if match.group(1) == gold.letter else "wrong"), "letter"
    try:
        node = read(text)
    except RefusedError as error:
        # A model that repeats itself writes no bomb: endless digits or words are no answer of any length.
        return ("refused", str(error)) if re.search(r"[\\^!+*/]", text) else ("wrong", "too long")
    except UnreadableError:
        return _unread(gold, text)
    if gold.node is None:
        return ("refused", "bounds") if BOMB.search(text) else (None, "gold")
    if finished and isinstance(gold.node, Number) and gold.node.value.denominator in (1, 10, 100) and unfinished(node):
        return "wrong", "unfinished"
    try:
        found = same(gold.node, node, rules)
        if not found and (other := gold.comma or _comma(text)) is not None and _decimal(gold.comma or gold.node):
            found = same(gold.comma or gold.node, other if not gold.comma else (_comma(text) or node), rules)
    except RefusedError as error:
        return "refused", str(error)
    if found is None and BOMB.search(text):
        return "refused", "bounds"
    return (None if found is None else "right" if found else "wrong"), "value"


def _unread(gold: Gold, text: str) -> tuple[Found | None, str]:
    if isinstance(gold.node, Words):
        return ("right" if letters(text) == gold.node.text else "wrong"), "words"
    if BOMB.search(text):
        return "refused", "bounds"
    if gold.node is not None and (CODE.search(text) or not re.search(r"[0-9\\^_=<>]", text)):
        return "wrong", "no mathematics"
    return None, "answer"


def _unstyled(text: str) -> str:
    return re.sub(r"\\(?:text|textbf|mathrm|mathbf|textit|mbox)\b ?|[{}$*]", "", text).strip(" .")


def _decimal(node: Node) -> bool:
    return isinstance(node, Number) and node.value.denominator != 1


def unfinished(node: Node) -> bool:
    """Whether `node` is a sum, difference, product or quotient of plain numbers that nobody worked out.

    A fraction a/b, a mixed number, a power, a root, a factorial and scientific notation are values.
    """
    match node:
        case Quantity(value, _):
            return unfinished(value)
        case Apply("add" | "sub", args):
            return all(map(_plain, args))
        case Apply("mul", (a, b)):
            scientific = isinstance(b, Apply) and b.head == "pow" and b.args[0] == Number(Fraction(10))
            return _plain(a) and _plain(b) and not scientific
        case Apply("div", (a, b)):
            return (_plain(a) and unfinished(b)) or (unfinished(a) and _plain(b))
        case Apply("neg", (a,)):
            return unfinished(a)
    return False


def _plain(node: Node) -> bool:
    match node:
        case Number() | Based():
            return True
        case Apply("add" | "sub" | "mul" | "div" | "neg", args):
            return all(map(_plain, args))
    return False
