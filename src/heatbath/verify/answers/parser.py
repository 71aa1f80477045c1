"""A parser for the common notations of mathematical answers. Nothing is computed here.

The grammar knows numbers (decimals, fractions, mixed numbers, thousands separators, other bases), constants, variables,
functions, units, tuples, sets, intervals, matrices, equations, inequalities, lists and words. What it does not know
raises `UnreadableError`; what no answer needs (depth, length) raises `RefusedError`.
"""

from __future__ import annotations

import re
from fractions import Fraction

from heatbath.verify.answers.expressions import (
    Apply,
    Based,
    Chain,
    Group,
    Matrix,
    Name,
    Node,
    Number,
    Quantity,
    Words,
    is_integer,
    is_plain_fraction,
    is_proper_fraction,
    listed,
    signed,
)
from heatbath.verify.answers.notation import GREEK, letters
from heatbath.verify.answers.symbols import (
    FUNCTIONS,
    MAX_DEPTH,
    RefusedError,
    Token,
    UnreadableError,
)
from heatbath.verify.answers.tokens import Tokens
from heatbath.verify.answers.units import CURRENCIES, Unit

SIGNS = ("+", "-", "pm", "mp")
RELATIONS = frozenset(["=", "<", ">", "le", "ge", "ne", "approx", "in", "equiv", "sim", "cong", "simeq"])
CLOSERS = frozenset([")", "]", "\\}", "}", "|", "rfloor", "rceil", "&", "\\\\", "end"])

# What computer algebra knows and the trees here have no place for.
UNREAD = {
    "sum",
    "prod",
    "int",
    "iint",
    "oint",
    "lim",
    "to",
    "pmod",
    "bmod",
    "mod",
    "circ",
    "end",
    "partial",
    "det",
    "cases",
}


class Parser(Tokens):
    """Recursive descent over the tokens; the depth is counted, every token is read a bounded number of times."""

    def __init__(self, tokens: list[Token]):
        super().__init__(tokens)
        self.depth = 0

    def answer(self) -> Node:
        found = self.listed(stop="")
        if self.at < len(self.tokens):
            raise UnreadableError(f"{self.text!r} does not fit")
        return found

    def listed(self, stop: str) -> Node:
        """Values between commas, semicolons, "and" and "or", up to the token `stop`, which is left."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise RefusedError("nested deeper than any answer")
        rows: list[list[Node]] = [[]]
        joints: set[str] = set()
        while self.kind != stop:
            if self.kind == "joint":
                joint = self.next().text
                joints.add(joint)
                if joint == ";" and rows[-1]:
                    rows.append([])
                continue
            rows[-1].append(self.relation())
            if self.kind not in ("joint", stop):
                raise UnreadableError(f"{self.text!r} does not fit")
        self.depth -= 1
        rows = [row for row in rows if row]
        if not rows:
            raise UnreadableError("no value")
        joint = next((j for j in ("or", "and", ";", ",") if j in joints), ",")
        if len(rows) > 1 and any(len(row) > 1 for row in rows):
            return Group("list", tuple(listed(row, ",") for row in rows), joint=";")
        return listed([item for row in rows for item in row], joint)

    def relation(self) -> Node:
        """One value, or several with relations between them."""
        first: Node = Words("") if self.kind in RELATIONS else self.ratio()
        sides, signs = [first], []
        while self.kind in RELATIONS:
            signs.append(self.next().kind)
            sides.append(self.ratio())
        return Chain(tuple(sides), tuple(signs)) if signs else first

    def ratio(self) -> Node:
        parts = [self.union()]
        while self.take(":"):
            parts.append(self.union())
        return parts[0] if len(parts) == 1 else Apply("ratio", tuple(parts))

    def union(self) -> Node:
        found = self.sum()
        while self.kind in ("cup", "cap", "setminus"):
            found = Apply(self.next().kind, (found, self.sum()))
        return found

    def sum(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise RefusedError("nested deeper than any answer")
        sign = self.next().kind if self.kind in SIGNS else "+"
        found = signed(sign, self.term())
        for _ in range(MAX_DEPTH):
            if self.kind not in SIGNS:
                self.depth -= 1
                return found
            sign = self.next().kind
            found = Apply({"+": "add", "-": "sub"}.get(sign, sign), (found, self.term()))
        raise RefusedError(f"a sum of more than {MAX_DEPTH} terms")

    def term(self) -> Node:
        if self.kind in SIGNS:  # --(-5)
            return signed(self.next().kind, self.unsigned_term())
        return self.unsigned_term()

    def unsigned_term(self) -> Node:
        if (text := self.running_words()) is not None:
            return Words(text)
        found = self.power()
        for _ in range(MAX_DEPTH):
            if self.kind in ("*", "cdot", "times"):
                self.at += 1
                found = Apply("mul", (found, self.signed_power()))
            elif self.kind in ("/", "div"):
                self.at += 1
                found = Apply("div", (found, self.signed_power()))
            elif (quantity := self.quantity(found)) is not None:
                found = quantity
            elif self.starts_value() or (self.kind == "number" and self.tokens[self.at - 1].kind == ")"):
                beside = self.kind == "frac" and self.tokens[self.at - 1].kind == "number" and is_integer(found)
                following = self.power()
                if beside and is_proper_fraction(following):
                    found = Apply("mixed", (found, following))
                elif beside and is_plain_fraction(following):
                    raise UnreadableError("a number beside a fraction above one")
                else:
                    found = Apply("mul", (found, following))
            elif self.spaced() and is_integer(found) and self.kind == "number":
                found = self.mixed(found)
            else:
                return found
        raise RefusedError(f"a product of more than {MAX_DEPTH} factors")

    def mixed(self, whole: Node) -> Node:
        """3 1/2 is three and a half; two numbers side by side are otherwise no value."""
        over = self.next()
        if self.kind == "/" and not self.spaced():
            self.at += 1
            under = self.next()
            part = Apply("div", (_number(over), _number(under)))
            if under.kind == "number" and is_proper_fraction(part):
                return Apply("mixed", (whole, part))
        raise UnreadableError("two numbers side by side")

    def signed_power(self) -> Node:
        if self.kind in ("+", "-"):
            return signed(self.next().kind, self.power())
        return self.power()

    def starts_value(self) -> bool:
        if self.kind in ("|", "joint", "text", "%", "", "^", "_", "!", ":", "*", "/", "number", "div", "times", "cdot"):
            return False
        return self.kind not in CLOSERS | RELATIONS | {*SIGNS, "cup", "cap", "setminus", "'", "circ"}

    def running_words(self) -> str | None:
        """A run of words up to the next separator, where a value would start."""
        if self.at and self.tokens[self.at - 1].kind in ("+", "-", "*", "/", "cdot", "times", "{", "pm", "mp"):
            return None
        if self.kind != "text" and not (self.kind == "letters" and len(self.text) > 2 and self._in_text()):
            return None
        parts = []
        while self.kind in ("text", "letters"):
            parts.append(self.next().text)
        return letters(" ".join(parts))

    def _in_text(self) -> bool:
        following = self.tokens[self.at + 1 : self.at + 2]
        return not following or following[0].kind in ("letters", "text", "joint", "=")

    def power(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise RefusedError("nested deeper than any answer")
        found = self.with_powers(self.atom())
        self.depth -= 1
        return found

    def with_powers(self, found: Node) -> Node:
        while True:
            if self.take("!"):
                found = self.factorial(found)
            elif self.kind == "'" and isinstance(found, Name):
                self.at += 1
                found = Name(found.name + "'")
            elif self.kind == "^" and not self._degrees():
                self.at += 1
                return self._after_power(Apply("pow", (found, self.exponent())))
            else:
                return found

    def _after_power(self, found: Node) -> Node:
        return self.factorial(found) if self.take("!") else found

    def factorial(self, found: Node) -> Node:
        if self.kind == "!":
            raise UnreadableError("a double factorial")
        return Apply("factorial", (found,))

    def exponent(self) -> Node:
        """What is raised: a braced group, or in plain text a signed value with its own power (2^-99, 2^3^2)."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise RefusedError("nested deeper than any answer")
        if self.kind == "letters" and len(self.text) > 1 and self.text.casefold() not in FUNCTIONS:
            found = self.first_letter()
        else:
            found = self.signed_power()
        self.depth -= 1
        return found

    def first_letter(self) -> Name:
        """a^nb is a^n times b: without braces one letter is raised, or lowered."""
        letters_run = self.tokens[self.at]
        self.tokens[self.at] = Token("letters", letters_run.text[1:], False)
        return Name(letters_run.text[0])

    def argument(self) -> Node:
        """The argument of a command: a group in braces, or one digit or letter."""
        if self.kind == "{":
            return self.atom()
        if self.kind == "number" and len(self.text) > 1 and self.text.isdigit():
            digits = self.tokens[self.at]  # \frac12: one digit is taken, the others stay
            self.tokens[self.at] = Token("number", digits.text[1:], False)
            return Number(Fraction(int(digits.text[0])))
        return self.atom()

    def atom(self) -> Node:
        token = self.next()
        match token.kind:
            case "number":
                return self.after_digits(token)
            case "letters":
                return self.names(token)
            case "{" | "(" | "[" | "\\{":
                return self.group(token.kind)
            case "|":
                return self.absolute()
            case "frac":
                return Apply("div", (self.argument(), self.argument()))
            case "binom":
                return Apply("binom", (self.argument(), self.argument()))
            case "sqrt":
                return self.root()
            case "lfloor" | "lceil":
                inner = self.listed(stop="r" + token.kind[1:])
                self.at += 1
                return Apply("floor" if token.kind == "lfloor" else "ceil", (inner,))
            case "begin":
                return self.matrix()
            case "infty" | "pi" | "emptyset":
                return Name(token.kind)
            case "overline" | "bar" | "hat" | "vec" | "angle" | "triangle" | "widehat" | "overrightarrow":
                return Apply(token.kind, (Name(self.next().text) if self.kind == "letters" else self.argument(),))
            case "mathbb":
                return Name(f"mathbb {_text_of(self.argument())}")
            case "%":
                raise UnreadableError("a percent sign without a number")
        if token.kind in CURRENCIES:
            return Quantity(self.signed_power(), Unit(((CURRENCIES[token.kind], 1),)))
        if token.kind in FUNCTIONS:
            return self.function(token.kind)
        if token.kind.casefold() in GREEK:
            return self.subscripted(token.kind)
        if token.kind.isalpha() and token.kind not in UNREAD and token.kind not in ("text", "joint"):
            return self.subscripted(token.kind)  # a command that nobody knows is a name of its own
        raise UnreadableError(f"{token.text!r} is not known")

    def after_digits(self, token: Token) -> Node:
        if self.kind == "_":
            self.at += 1
            base = self.atom()
            if isinstance(base, Number) and base.value.denominator == 1 and re.fullmatch(r"[0-9.]+", token.text):
                return Based(token.text.lstrip("0") or "0", int(base.value))
            raise UnreadableError("a subscript to a number")
        number = _number(token)
        return Number(number.value, percent=True) if self.take("%") else number

    def names(self, token: Token) -> Node:
        """Letters side by side are variables to be multiplied; the last may have a subscript or an argument."""
        if token.text.casefold() in FUNCTIONS:
            return self.function(token.text.casefold())
        first, others = token.text[0], token.text[1:]
        if others:  # only the last letter of a run takes a power, a subscript or an argument
            self.at -= 1
            self.tokens[self.at] = Token("letters", others, False)
            return Name(first)
        found = self.subscripted(first)
        alone = self.at < 2 or self.tokens[self.at - 2].kind != "letters"
        if first in "fghFGHWP" and alone and self.kind == "(" and not self.spaced():
            self.at += 1
            inner = self.group("(")
            return Apply(f"call {_text_of(found)}", inner.items if isinstance(inner, Group) else (inner,))
        return found

    def subscripted(self, name: str) -> Name:
        if not self.take("_"):
            return Name(name)
        if self.kind == "letters" and len(self.text) > 1:
            return Name(f"{name}_{self.first_letter().name}")
        start = self.at
        if self.take("{"):
            while self.kind not in ("}", ""):
                self.at += 1
        self.next()
        return Name(name + "_" + "".join(t.text for t in self.tokens[start : self.at] if t.kind not in "{}"))

    def group(self, opening: str) -> Node:
        """What stands in brackets. `{…}` only groups, unless it holds several values."""
        if opening == "\\{" and self.take("\\}"):
            return Name("emptyset")
        closing = self._closed_by(opening)
        inner = self.listed(stop=closing)
        self.need(closing)
        several = isinstance(inner, Group) and inner.kind == "list"
        items = inner.items if several and isinstance(inner, Group) else (inner,)
        if opening == "\\{":
            return Group("set", items)
        if opening == "{" or (not several and (opening == "(" or isinstance(inner, Matrix))):
            return inner
        if opening + closing not in ("()", "[]"):
            return Group("half", items, opening + closing)
        return Group("paren" if opening == "(" else "bracket", items, opening + closing)

    def _closed_by(self, opening: str) -> str:
        """The bracket that closes the one just read."""
        depth = 0
        pairs = {"{": "}", "\\{": "\\}"}
        openers = (opening,) if opening in pairs else ("(", "[")
        closers = (pairs[opening],) if opening in pairs else (")", "]")
        for token in self.tokens[self.at :]:
            if token.kind in openers:
                depth += 1
            elif token.kind in closers:
                if depth == 0:
                    return token.kind
                depth -= 1
        raise UnreadableError("a bracket that does not close")

    def absolute(self) -> Node:
        inner = self.sum()
        self.need("|")
        return Apply("abs", (inner,))

    def root(self) -> Node:
        degree: Node = Number(Fraction(2))
        if self.kind == "[":
            self.at += 1
            degree = self.listed(stop="]")
            self.need("]")
        if self.kind == "number":  # \sqrt 12, as people mean it
            return Apply("root", (_number(self.next()), degree))
        return Apply("root", (self.atom(), degree))

    def function(self, name: str) -> Node:
        """sin x, \\sin^2 2x, \\log_{10} 2, sqrt(2): the argument ends at a sign or at the next function."""
        if name == "sqrt":
            return self.root()
        base: Node | None = None
        exponent: Node | None = None
        while self.kind in ("_", "^"):
            if self.next().kind == "_":
                base = self.argument()
            else:
                exponent = self.argument() if self.kind == "{" else self.signed_power()
        inner = self.power() if self.kind == "(" else self.bare_argument()
        found: Node = Apply(name, (inner,) if base is None else (inner, base))
        if exponent is None:
            return found
        if exponent == Number(Fraction(-1)):
            return Apply(f"arc{name}", (inner,))
        return Apply("pow", (found, exponent))

    def bare_argument(self) -> Node:
        """The argument of a function without brackets: a product, with a number to divide it by."""
        inner = self.signed_power()
        inner = self.quantity(inner) or inner
        for _ in range(MAX_DEPTH):
            if (
                self.kind == "/"
                and self.tokens[self.at + 1 : self.at + 2]
                and self.tokens[self.at + 1].kind == "number"
            ):
                self.at += 1
                inner = Apply("div", (inner, self.power()))
            elif self.starts_value() and self.kind != "(" and self.kind not in FUNCTIONS:
                inner = Apply("mul", (inner, self.power()))
            else:
                return inner
        raise RefusedError(f"a product of more than {MAX_DEPTH} factors")

    def matrix(self) -> Node:
        self.need("{")
        name = ""
        while self.kind not in ("}", ""):
            name += self.next().text
        self.need("}")
        if name.rstrip("*") not in ("pmatrix", "bmatrix", "matrix", "smallmatrix", "Bmatrix", "array"):
            raise UnreadableError(f"the environment {name}")
        if name == "array":
            self.need("{")
            while not self.take("}"):
                self.next()
        rows: list[list[Node]] = [[]]
        while self.kind != "end":
            if self.take("\\\\"):
                rows.append([])
            elif not self.take("&"):
                rows[-1].append(self.sum())
        self.at += 1
        self.need("{")
        while not self.take("}"):
            self.next()
        rows = [row for row in rows if row]
        if not rows or len({len(row) for row in rows}) > 1:
            raise UnreadableError("rows of different lengths")
        return Matrix(tuple(tuple(row) for row in rows))


def _number(token: Token) -> Number:
    if token.kind != "number":
        raise UnreadableError(f"{token.text!r} is no number")
    mantissa, _, exponent = token.text.lower().partition("e")
    if len(exponent) > 5:
        raise RefusedError("an exponent of more than four digits")
    return Number(Fraction(mantissa) * Fraction(10) ** int(exponent or 0))


def _text_of(node: Node) -> str:
    match node:
        case Name(name):
            return name
        case Number(value) if value.denominator == 1 and abs(value) < 10**6:
            return str(value.numerator)
    raise UnreadableError("a name expected")
