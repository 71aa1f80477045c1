"""Reading tokens one after the other, and what may stand behind a value: units, scale words, percent signs."""

from __future__ import annotations

from fractions import Fraction

from heatbath.verify.answers.expressions import Apply, Name, Node, Number, Quantity, is_constant
from heatbath.verify.answers.symbols import Token, UnreadableError
from heatbath.verify.answers.units import BASE, CURRENCIES, DEGREE, PERCENT_UNIT, Unit, read_unit


class Tokens:
    """The tokens of an answer, and how far they are read."""

    def __init__(self, tokens: list[Token]):
        self.tokens, self.at = tokens, 0

    @property
    def kind(self) -> str:
        return self.tokens[self.at].kind if self.at < len(self.tokens) else ""

    @property
    def text(self) -> str:
        return self.tokens[self.at].text if self.at < len(self.tokens) else ""

    def spaced(self) -> bool:
        return self.at < len(self.tokens) and self.tokens[self.at].spaced

    def next(self) -> Token:
        if self.at >= len(self.tokens):
            raise UnreadableError("it ends too early")
        self.at += 1
        return self.tokens[self.at - 1]

    def take(self, kind: str) -> bool:
        if self.kind == kind:
            self.at += 1
            return True
        return False

    def need(self, kind: str) -> None:
        if not self.take(kind):
            raise UnreadableError(f"{kind} expected, not {self.text!r}")

    def quantity(self, value: Node) -> Node | None:
        """`value` with the unit or scale word behind it; None where none follows."""
        if self.kind in CURRENCIES:
            return Quantity(value, Unit(((CURRENCIES[self.next().kind], 1),)))
        if self.take("%"):
            return Quantity(value, PERCENT_UNIT)
        if self.kind == "^" and self._degrees():
            while self.next().kind != "circ":
                continue
            self.take("}")
            scale = self.next().text if self.kind == "letters" and self.text in ("C", "F") else ""
            return Quantity(value, Unit((("degree " + scale, 1),)) if scale else DEGREE)
        if self.kind != "text" and not (self.kind == "letters" and self._letters_are_unit(value)):
            return None
        parts = []
        while self.kind in ("text", "letters") or (parts and self._goes_on_as_unit()):
            parts.append("".join(t.text for t in self.tokens[self.at : self.at + self._width()]))
            self.at += self._width()
        factor, unit = read_unit(" ".join(parts))
        if factor != 1:
            plain = isinstance(value, Number)
            value = Number(value.value * factor) if plain else Apply("mul", (value, Number(Fraction(factor))))
        return Quantity(value, unit) if unit != Unit() else value

    def _goes_on_as_unit(self) -> bool:
        """cm^2, m/s: a power of a unit, or one divided by another."""
        if self.kind == "^":
            return self._width() > 1
        following = self.tokens[self.at + 1 : self.at + 2]
        return self.kind == "/" and bool(following) and following[0].kind in ("text", "letters")

    def _width(self) -> int:
        """How many tokens belong to a power (^2, ^{2}, ^{-1}); 1 for anything else."""
        if self.kind != "^":
            return 1
        kinds = "".join(t.kind[0] for t in self.tokens[self.at : self.at + 5])
        return next((n for n, start in ((5, "^{-n}"), (4, "^{n}"), (2, "^n")) if kinds.startswith(start)), 1)

    def _letters_are_unit(self, value: Node) -> bool:
        if isinstance(value, Name | Quantity) or not is_constant(value):
            return False
        if self.text in BASE and len(self.text) > 1:
            return True
        if self.text in BASE and self.spaced():  # 5 m is metres at the end of an answer only
            following = self.tokens[self.at + 1 : self.at + 2]
            return not following or following[0].kind in ("joint", "^", "/", "text")
        return len(self.text) > 2 and self.spaced()

    def _degrees(self) -> bool:
        inner = [t.kind for t in self.tokens[self.at + 1 : self.at + 3]]
        return inner[:1] == ["circ"] or inner == ["{", "circ"]
