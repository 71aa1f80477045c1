"""The symbols of a mathematical answer: numbers, letters, commands, words and the signs between them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from heatbath.verify.answers.notation import GREEK, SAME, letters

MAX_CHARACTERS = 1_000
MAX_TOKENS = 600
MAX_DEPTH = 40
MAX_DIGITS = 400


class UnreadableError(ValueError):
    """The text is no answer in a notation known here."""


class RefusedError(ValueError):
    """The text asks for more than any answer needs."""


FUNCTIONS = frozenset(
    [
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "sinh",
        "cosh",
        "tanh",
        "arcsin",
        "arccos",
        "arctan",
        "asin",
        "acos",
        "atan",
        "ln",
        "log",
        "exp",
        "sqrt",
        "lg",
    ]
)
STYLES = frozenset(
    [
        "text",
        "textbf",
        "textit",
        "textrm",
        "textnormal",
        "textsf",
        "texttt",
        "mathrm",
        "mathbf",
        "mathit",
        "mbox",
        "operatorname",
        "rm",
        "emph",
        "hbox",
        "mathsf",
        "underline",
    ]
)
TOKEN = re.compile(
    r"(?P<number>[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+(?![0-9A-Za-z]))?|\.[0-9]+)"
    r"|(?P<command>\\[A-Za-z]+)|(?P<escaped>\\.)|(?P<letters>[A-Za-z]+)|(?P<operator><=|>=|!=|==|\*\*|:=)"
    r"|(?P<space> )|(?P<sign>.)",
    re.DOTALL,
)
THOUSANDS = re.compile(r"[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?:\.[0-9]+)?(?![0-9]|[, ][0-9])")
OPERATORS = {"<=": "le", ">=": "ge", "!=": "ne", "==": "=", ":=": "=", "**": "^"}
WORDS_ONLY = re.compile(r"[^\W\d_]+(?:[ ',./()\-]+[^\W\d_]+)*[ .!]*")
# Units are told apart from variables and, where both sides have one, from each other. Currency signs are dollars.
UNITS = {
    alias: names.split()[0]
    for names in (
        "cm centimeter centimeters centimetre centimetres",
        "mm millimeter millimeters millimetre millimetres",
        "km kilometer kilometers kilometre kilometres",
        "meter m meters metre metres",
        "in inch inches",
        "ft foot feet",
        "yd yard yards",
        "mi mile miles",
        "kg kilogram kilograms",
        "mg milligram milligrams",
        "gram g grams",
        "lb lbs pound pounds",
        "oz ounce ounces",
        "second s sec secs seconds",
        "minute min mins minutes",
        "hour h hr hrs hours",
        "day days",
        "week weeks",
        "month months",
        "year years yr yrs",
        "ml milliliter milliliters",
        "liter L liters litre litres",
        "mph",
        "kph",
        "dollar dollars usd euro euros",
        "cent cents",
        "degree degrees deg",
        "radian radians rad",
        "hz",
        "joule J joules",
        "newton N newtons",
        "watt W watts",
        "volt V volts",
        "kelvin K",
    )
    for alias in names.split()
}
UNITS_OF = {alias.casefold(): name for alias, name in UNITS.items()}
PERCENT = ("%", "percent", "pct", "percentage", "per cent")


@dataclass(frozen=True)
class Token:
    kind: str  # number, letters, text, joint, or the sign or command itself
    text: str
    spaced: bool  # after a space


def lex(text: str) -> list[Token]:
    tokens: list[Token] = []
    position = depth = 0
    spaced = False
    while position < len(text):
        if depth == 0 and (match := THOUSANDS.match(text, position)):
            tokens.append(Token("number", re.sub("[ ,]", "", match.group()), spaced))
            position, spaced = match.end(), False
            continue
        match = TOKEN.match(text, position)
        assert match is not None and match.lastgroup is not None
        kind, found, position = match.lastgroup, match.group(), match.end()
        if kind == "space":
            spaced = True
            continue
        if kind == "number":
            if len(found) > MAX_DIGITS:
                raise RefusedError(f"a number of more than {MAX_DIGITS} digits")
            tokens.append(Token("number", found, spaced))
        elif kind == "command":
            position = _command(text, found[1:], position, spaced, tokens)
        elif kind == "letters":
            _letters(found, spaced, tokens)
        else:
            sign = "%" if found == "\\%" else OPERATORS.get(found, found)
            depth += (sign in ("(", "[", "\\{")) - (sign in (")", "]", "\\}"))
            tokens.append(Token("joint" if sign in (",", ";") else sign, sign, spaced))
        spaced = False
        if len(tokens) > MAX_TOKENS:
            raise RefusedError(f"more than {MAX_TOKENS} symbols")
    return tokens


def _command(text: str, name: str, position: int, spaced: bool, tokens: list[Token]) -> int:
    """Adds the token of `\\name`, with its argument where that is words; returns where reading goes on."""
    for spacing in ("qquad", "quad"):  # \quadx, as it is often written
        if name.startswith(spacing) and name != spacing:
            _letters(name.removeprefix(spacing), True, tokens)
            return position
    name = SAME.get(name, name)
    if name in STYLES and text.startswith("{", position := _skip_space(text, position)):
        end = _closing(text, position)
        inner = text[position + 1 : end].strip()
        low = inner.casefold().strip(" ,")
        if low in ("and", "or"):
            tokens.append(Token("joint", low, spaced))
        elif low in PERCENT:
            tokens.append(Token("%", "%", spaced))
        elif len(inner.strip("() .")) == 1 and inner.strip("() .").isalnum():
            tokens.extend(lex(inner.strip("() .")))
        elif inner and re.fullmatch(r"[0-9.,]+", inner):
            tokens.extend(lex(inner))
        elif inner:
            tokens.append(Token("text", inner, spaced))
        return end + 1
    if name in STYLES or name in ("displaystyle",):
        return position
    tokens.append(Token("joint" if name in ("and", "or") else name, name, spaced))
    return position


def _letters(run: str, spaced: bool, tokens: list[Token]) -> None:
    low = run.casefold()
    after_value = bool(tokens) and tokens[-1].kind in ("number", ")", "}", "]")
    if low in ("and", "or"):
        tokens.append(Token("joint", low, spaced))
    elif after_value and not spaced and low.startswith("or") and len(run) in (3, 4):  # W(x)=1orW(x)=-1
        tokens.append(Token("joint", "or", False))
        tokens.append(Token("letters", run[2:], False))
    elif low in PERCENT and tokens:
        tokens.append(Token("%", "%", spaced))
    elif low in FUNCTIONS or low in GREEK:
        tokens.append(Token(low, low, spaced))
    elif low in ("infinity", "inf"):
        tokens.append(Token("infty", "infty", spaced))
    else:
        tokens.append(Token("letters", run, spaced))


def _skip_space(text: str, position: int) -> int:
    return position + 1 if text.startswith(" ", position) else position


def _closing(text: str, start: int) -> int:
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return position
    raise UnreadableError("a brace that does not close")


def unit_name(text: str) -> str:
    """A unit by one name; words that are no unit by themselves (7 days of work) by none."""
    bare = letters(text)
    if bare in PERCENT:
        return "%"
    parts = bare.replace("square ", "").replace("cubic ", "").replace(" units", "").split()
    power = "^2" if "square" in bare or "^2" in bare else "^3" if "cubic" in bare or "^3" in bare else ""
    known = [UNITS_OF[part.partition("^")[0]] for part in parts if part.partition("^")[0] in UNITS_OF]
    return " ".join(known) + power if known else ""
