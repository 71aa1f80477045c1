"""The verdict on one answer without computer algebra: text, choice letters, then values, each exact and bounded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from heatbath.verify.answers.equality import EXACT, Rules, same
from heatbath.verify.answers.expressions import Apply, Based, Chain, Group, Matrix, Node, Number, Quantity, Words
from heatbath.verify.answers.names import free_names, named_value
from heatbath.verify.answers.notation import GREEK, SAME, latex, letters
from heatbath.verify.answers.parser import UNREAD
from heatbath.verify.answers.reading import read
from heatbath.verify.answers.symbols import FUNCTIONS, MAX_DIGITS, STYLES, RefusedError, UnreadableError
from heatbath.verify.answers.values import Evaluation, mp, same_number
from heatbath.verify.extract import all_boxed, extract

Found = Literal["right", "wrong", "refused", "bad_gold"]
MAX_GOLD = 1_000  # characters
PLAIN = re.compile(r"-?[0-9]{1,18}")
LETTER = re.compile(r"(?:[Oo]ption |[Cc]hoice )?\(?([A-J])\)?")
LETTER_WITH_TEXT = re.compile(r"(?:[Oo]ption |[Cc]hoice )?\(?([A-J])(?:\)[.:]?|[.:])(?:\s(.*))?", re.DOTALL)
DECIMAL_COMMA = re.compile(r"([+-]?)([0-9]+),([0-9]{1,2}|[0-9]{4,}|(?<=^0,)[0-9]+)")
COMMA_IN_GOLD = re.compile(r"-?(?:0,|[0-9],[0-9]{2}(?![0-9]))")  # 0,4 and 1,22; but 3,4 and 11,13 are two numbers
# What would make a computer algebra system work without end: towers, factorials and products of large numbers.
BOMB = re.compile(
    r"[0-9]{5,}+[ )}]*+!|!!|\^[ {(]*[0-9]{5,}|[0-9)][)} ]*\^[ {(]*[0-9]+[)} ]*\^|10\^[{(]?[0-9]+[})]*!"
    r"|\\(?:prod|sum|int|binom)[^a-z].{0,40}(?:[0-9]{5,}|10 ?\^)|[0-9][eE][+-]?[0-9]{4,}"
)
# What Math-Verify computes and the parser here does not know.
ALGEBRA = {"sum", "prod", "int", "lim", "to", "infty", "pmod", "bmod", "mod", "begin", "end", "frac", "sqrt", "binom"}
ALGEBRA |= {"cdot", "times", "cup", "cap", "setminus", "in", "pm", "mp", "le", "ge", "ne", "equiv", "partial", "mathbb"}
ALGEBRA |= {
    "lfloor",
    "rfloor",
    "lceil",
    "rceil",
    "log",
    "ln",
    "circ",
    "overline",
    "emptyset",
    "div",
    "approx",
    "det",
    "pi",
}


@dataclass(frozen=True)
class Gold:
    """A gold answer as it is compared: the answer alone, its tree where it can be read, and its letter if it is one.
    `whole` is the text it was found in: an answer that repeats all of it is right however it is written."""

    text: str
    node: Node | None
    letter: str | None
    comma: Node | None  # with a decimal comma read as a point
    integer: int | None  # of a plain integer
    whole: str = ""


@lru_cache(maxsize=4096)
def gold_answer(gold: str) -> Gold | None:
    """What a gold answer says; None for one that says nothing. A box, a formula or "answer is" in it is looked for."""
    text = latex(_stripped(gold)) if gold.strip() and len(gold) <= 20_000 else ""
    if len(text) > MAX_GOLD or not (any(map(str.isalnum, text)) or "\\{" in text) or not _balanced(text):
        return None
    letter = LETTER.fullmatch(_unstyled(text)) if len(text) < 30 else None
    integer = int(text) if PLAIN.fullmatch(text) else None
    return Gold(
        text,
        _tree(text),
        letter.group(1) if letter else None,
        _comma(text) if COMMA_IN_GOLD.match(text) else None,
        integer,
        latex(gold) if len(gold) <= MAX_GOLD else text,
    )


def _balanced(text: str) -> bool:
    braces = re.sub(r"\\\\|\\[{}]", "", text)
    return braces.count("{") == braces.count("}")


def _stripped(gold: str) -> str:
    """The answer in a gold text: what it boxes or states, or all of it."""
    gold = gold.replace("\\\\boxed", "\\boxed").replace("\\n", "\n") if "\\\\boxed" in gold else gold
    if all_boxed(gold) is None:  # a box that is never closed, in a text that nobody generated
        gold += "}"
    if re.search(r"\\boxed|\\fbox|####|\$|answer|答案", gold, re.IGNORECASE) or len(gold) > 200:
        for policy in ("marked", "latex"):
            answer, _ = extract(gold, policy)  # type: ignore[arg-type]
            if answer:
                return answer
        if "boxed" in gold:
            return ""
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
    if text in (gold.text, gold.whole):
        return "right", "text"
    if gold.letter and (letter := _letter(_unstyled(text))):
        return ("right" if letter == gold.letter else "wrong"), "letter"
    try:
        node = read(text)
    except RefusedError as error:
        # A model that repeats itself writes no bomb: endless digits or words are no answer of any length.
        endless = len(text) > MAX_DIGITS and not re.search(r"[\\^!+*/]", text)
        return ("wrong", "too long") if endless else ("refused", str(error))
    except UnreadableError:
        return _unread(gold, text)
    if gold.node is None:
        return _undecided(gold, text)
    if finished and unfinished(node) and not unfinished(gold.node):
        return "wrong", "unfinished"
    if not _consistent(node):
        return "wrong", "contradiction"
    try:
        found = same(gold.node, node, rules)
        if not found and gold.comma is not None:
            found = same(gold.comma, _comma(text) or node, rules)
        elif not found and (point := _comma(text)) is not None and _decimal(gold.node):
            found = same(gold.node, point, rules)
    except RefusedError as error:
        return "refused", str(error)
    except RecursionError:
        return "refused", "nested deeper than any answer"
    if found is None:
        return _undecided(gold, text)
    return ("right" if found else "wrong"), "value"


def _undecided(gold: Gold, text: str) -> tuple[Found | None, str]:
    """What neither the text nor the values decide is asked of computer algebra, where that is what is missing and it
    knows every symbol: it passes over what it does not know, and 5 would be \\notin 5."""
    if BOMB.search(text):
        return "refused", "bounds"
    if gold.node is None and not _algebra(gold.text):
        return "bad_gold", "no mathematics"
    needed = any(set(re.findall(r"\\([A-Za-z]+)", side)) & UNREAD for side in (gold.text, text))
    return (None, "algebra") if needed and _algebra(text) else ("wrong", "not known")


def _algebra(text: str) -> bool:
    """Whether Math-Verify knows every command of `text`, and no word is left over."""
    known_here = STYLES | FUNCTIONS | {*GREEK, *SAME, *SAME.values()}
    commands = set(re.findall(r"\\([A-Za-z]+)", text)) - known_here
    words = re.findall(r"(?<![A-Za-z\\])[A-Za-z]{3,}", re.sub(r"\\(?:begin|end) ?\{[a-zA-Z*]+\}", "", text))
    known = all(word.casefold() in FUNCTIONS | {"and"} for word in words)
    return known and commands <= ALGEBRA and not re.search(r"[0-9] ?['_]|\\ldots|__|[\"`#@?]|\('", text)


def _letter(text: str) -> str | None:
    """The option that an answer names, alone or with its text; none where it names another or takes it back."""
    if match := LETTER.fullmatch(text):
        return match.group(1)
    match = LETTER_WITH_TEXT.fullmatch(text)
    if match is None or re.search(
        r"\b(?:or|and|not|wrong|incorrect|false|no)\b|(?<![A-Za-z])[A-J](?:[).:]|$)", match.group(2) or ""
    ):
        return None
    return match.group(1)


def _unread(gold: Gold, text: str) -> tuple[Found | None, str]:
    """The verdict on an answer that cannot be read."""
    if isinstance(gold.node, Words):
        return ("right" if letters(text) == gold.node.text else "wrong"), "words"
    if gold.node is not None and not re.search(r"[0-9\\^_=<>]", text):
        return "wrong", "no mathematics"
    return _undecided(gold, text)


def _unstyled(text: str) -> str:
    return re.sub(r"\\(?:text|textbf|mathrm|mathbf|textit|mbox)\b ?|[{}$*]", "", text).strip(" .")


def _decimal(node: Node) -> bool:
    return isinstance(node, Number) and node.value.denominator != 1


def _consistent(node: Node) -> bool:
    """Whether an equation of plain values holds: 6 = 5 is no way to say 5. What only nears (≈) may be a little off."""
    if not isinstance(node, Chain) or not set(node.signs) <= {"=", "approx"} or free_names(node):
        return True
    try:
        values = [Evaluation()(side) for side in node.sides]
    except (UnreadableError, RefusedError):
        return True
    exact = [a for a, sign in zip(values, ("=", *node.signs), strict=True) if sign == "="]
    near = max(abs(mp(value)) for value in values) / 20
    return all(same_number(exact[0], a) for a in exact) and all(abs(mp(values[0]) - mp(a)) <= near for a in values)


def unfinished(node: Node) -> bool:
    """Whether `node` is, or holds, a sum, difference, product or quotient of plain numbers that nobody worked out.

    A fraction a/b, a mixed number, a power, a root, a factorial and scientific notation are values.
    """
    match node:
        case Quantity(value, _):
            return unfinished(value)
        case Chain(sides, _):
            value = named_value(node)[1]  # 14 + 47 = x leaves it as 14 + 47 does
            return unfinished(sides[-1] if isinstance(value, Chain) else value)
        case Group(_, items):
            return any(map(unfinished, items))
        case Matrix(rows):
            return any(unfinished(cell) for row in rows for cell in row)
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
        case Quantity(value, _):
            return _plain(value)
        case Apply("add" | "sub" | "mul" | "div" | "neg", args):
            return all(map(_plain, args))
    return False
