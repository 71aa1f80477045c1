"""Units of measure and scale words behind a number: read as powers of base units, so that 10 m/s is not 10 km/h."""

from __future__ import annotations

import re
from dataclasses import dataclass


class UnreadableError(ValueError):
    """The text is no answer in a notation known here."""


CURRENCIES = {"$": "dollar", "\\$": "dollar", "€": "euro", "£": "pound sterling", "¥": "yen"}
# Each line: the one name, and what else is written for it (in small letters, but for single letters).
NAMES = """meter m meters metre metres | gram g grams gm gms | second s sec secs seconds | liter l L liters litre litres
inch in inches | foot ft feet | yard yd yards yds | mile mi miles | acre acres | pound lb lbs pounds
ounce oz ounces | ton tons | minute min mins minutes | hour h hr hrs hours | day days | week weeks
month months | year yr yrs years
gallon gal gallons | quart qt quarts | pint pt pints | cup cups | hectare ha hectares | newton N newtons
joule J joules | watt W watts | volt V volts | ampere A amp amps | ohm ohms | pascal Pa pa pascals | hertz Hz hz
kelvin K | mole mol moles
byte B bytes | bit bits | degree degrees deg circ | radian radians rad rads | dollar dollars usd | euro euros eur
cent cents | yen | am | pm | unit units | percent pct percentage % | celsius C | fahrenheit F"""
SHORT = {"k": "kilo", "c": "centi", "m": "milli", "M": "mega", "G": "giga", "n": "nano", "μ": "micro", "d": "deci"}
PREFIXED = {"meter", "gram", "second", "liter", "watt", "pascal", "hertz", "joule", "volt", "ampere", "mole", "byte"}
SPECIAL = {"min": "minute", "mph": "mile/hour", "kph": "kilometer/hour", "kmh": "kilometer/hour", "KB": "kilobyte"}


def _base() -> dict[str, str]:
    """Every way to write a unit, with its one name."""
    families = [names.split() for line in NAMES.split("\n") for names in line.split("|")]
    table = {alias: family[0] for family in families for alias in family}
    for family in families:
        for alias in family if family[0] in PREFIXED else ():
            for short, long in SHORT.items():
                table.setdefault((long if len(alias) > 3 else short) + alias, long + family[0])
    return table | SPECIAL


BASE = _base()
SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
    "dozen": 12,
}
# Words behind a value that make it another value, or none at all.
CHANGING = {"not", "no", "never", "none", "wrong", "incorrect", "false", "if", "when", "unless", "otherwise"}
CHANGING |= {"where", "less", "more", "fewer", "than", "least", "most", "or", "and", "but", "minus", "plus"}
CHANGING |= {"times", "half", "halves", "third", "thirds", "quarter", "quarters", "fourth", "fourths", "fifth"}
CHANGING |= {"fifths", "tenth", "tenths", "hundredths", "thousandths", "squared", "cubed", "factorial"}
CHANGING |= {"dozens", "hundreds", "thousands", "millions", "negative", "approximately"}
POWER = re.compile(r"\^ ?\{? ?(-?[0-9])[ }]*")


@dataclass(frozen=True)
class Unit:
    """Base units by their exponent, and the words that are no unit (7 apples)."""

    powers: tuple[tuple[str, int], ...] = ()
    nouns: frozenset[str] = frozenset()

    @property
    def is_percent(self) -> bool:
        return self.powers == (("percent", 1),)

    @property
    def is_degree(self) -> bool:
        return self.powers == (("degree", 1),)

    def differs(self, other: Unit) -> bool:
        """Whether two units cannot be the same: other powers, or nouns that have nothing in common."""
        if self.powers and other.powers and self.powers != other.powers:
            return True
        return bool(self.nouns and other.nouns and not self.nouns & other.nouns)


PERCENT_UNIT, DEGREE = Unit((("percent", 1),)), Unit((("degree", 1),))


def read_unit(text: str) -> tuple[int, Unit]:
    """The factor of a scale word (5 million) and the unit. Raises UnreadableError for words that change the value."""
    scale, powers, nouns = 1, {}, set()
    sign, raised = 1, 1
    text = POWER.sub(r"^\1 ", re.sub(r"\\(?:text|mathrm|textbf|mbox|cdot|,|;| )", " ", text))
    text = re.sub(r"\s+\^", "^", text)
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", re.sub(r"\bper\b|/", " / ", text))
    for word in re.sub(r"[{}().,;$~]|\\", " ", text).split():
        low = word.casefold()
        name, _, exponent = word.partition("^")
        known = BASE.get(name, BASE.get(name.casefold()))
        if low in CHANGING or re.search(r"[0-9]", name):
            raise UnreadableError(f"{word!r} behind a value")
        if word == "/":
            sign = -1
        elif low in SCALES:
            scale *= SCALES[low]
        elif low in ("square", "sq", "cubic"):
            raised = 3 if low == "cubic" else 2
        elif known is not None:
            for part, each in zip(known.split("/"), (1, -1), strict=False):
                powers[part] = powers.get(part, 0) + sign * each * int(exponent or raised)
            raised = 1
        elif low in ("of", "the", "a", "an", "about", "in"):
            continue
        else:
            nouns.add(low.rstrip("s"))
    return scale, Unit(tuple(sorted((name, n) for name, n in powers.items() if n)), frozenset(nouns))
