"""The symbols of a mathematical answer: numbers, letters, commands, words and the signs between them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from heatbath.verify.answers.notation import GREEK, SAME
from heatbath.verify.answers.units import BASE, UnreadableError

MAX_CHARACTERS = 1_000
MAX_TOKENS = 600
MAX_DEPTH = 100  # of the tree, and of the calls that read it
MAX_DIGITS = 400


class RefusedError(ValueError):
    """The text asks for more than any answer needs."""


FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh", "arcsin", "arccos", "arctan"}
FUNCTIONS |= {"asin", "acos", "atan", "ln", "log", "lg", "exp", "sqrt"}
STYLES = {"text", "textbf", "textit", "textrm", "textnormal", "textsf", "texttt", "mathrm", "mathbf", "mathit", "mbox"}
STYLES |= {"operatorname", "rm", "emph", "hbox", "mathsf", "underline", "bm"}
TOKEN = re.compile(
    r"(?P<number>[0-9]+(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+(?![0-9A-Za-z]))?|\.[0-9]+)"
    r"|(?P<command>\\[A-Za-z]+)|(?P<escaped>\\.)|(?P<letters>[A-Za-z]+)|(?P<operator><=|>=|!=|==|\*\*|:=)"
    r"|(?P<space> )|(?P<sign>.)",
    re.DOTALL,
)
THOUSANDS = re.compile(r"[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?:\.[0-9]+)?(?![0-9/]|[, ][0-9])")
OPERATORS = {"<=": "le", ">=": "ge", "!=": "ne", "==": "=", ":=": "=", "**": "^"}
WORDS_ONLY = re.compile(r"[^\W\d_]+(?:[ ',./()\-]+[^\W\d_]+)*[ .!]*")
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
            letter = inner.strip("() .")
            behind = bool(tokens) and tokens[-1].kind in ("number", ")", "}", "/", "text")
            tokens.extend([Token("text", letter, spaced)] if behind and letter in BASE else lex(letter))
        elif inner and re.match(r"[-+]?[0-9.]", inner):
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
    elif run[:-1] in FUNCTIONS and run[-1] in "xyztabn":  # sinx
        tokens.append(Token(run[:-1], run[:-1], spaced))
        tokens.append(Token("letters", run[-1], False))
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
