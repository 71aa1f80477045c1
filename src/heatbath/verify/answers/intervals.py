"""Sets of real numbers: intervals, unions, and the inequalities that describe them."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from fractions import Fraction

from heatbath.verify.answers import values
from heatbath.verify.answers.expressions import Apply, Chain, Group, Name, Node, Quantity, Words
from heatbath.verify.answers.names import free_names, is_name
from heatbath.verify.answers.symbols import UnreadableError
from heatbath.verify.answers.values import Evaluation, precise

FLIPPED = {"<": ">", ">": "<", "le": "ge", "ge": "le", "=": "=", "ne": "ne"}


@dataclass(frozen=True)
class Interval:
    low: Fraction | float
    high: Fraction | float
    low_in: bool
    high_in: bool


WHOLE = Interval(-math.inf, math.inf, False, False)


def is_region(node: Node) -> bool:
    match node:
        case Group("half", items):
            return len(items) == 2
        case Apply("cup" | "cap" | "setminus", _):
            return True
        case Name(name):
            return name.startswith("mathbb")
        case Chain(_, signs):
            return _interval_chain(node) is not None and "=" not in signs
        case Group("list", items, _, "or" | "and" | ","):
            return bool(items) and all(isinstance(i, Chain) and is_region(i) for i in items)
    return False


def region(node: Node) -> list[Interval]:
    """The set of real numbers that `node` writes, as sorted intervals that do not touch. Raises UnreadableError."""
    match node:
        case Group("half" | "paren" | "bracket", (low, high), ends):
            found = Interval(_real(low), _real(high), ends[0] == "[", ends[1] == "]")
            if not (found.low < found.high or (found.low == found.high and ends == "[]")):
                raise UnreadableError("no interval")
            return [found]
        case Group("set", items):
            points = [_real(item) for item in items]
            return _merged([Interval(p, p, True, True) for p in points])
        case Name("emptyset"):
            return []
        case Name("mathbb R"):
            return [WHOLE]
        case Apply("cup", (a, b)):
            return _merged(region(a) + region(b))
        case Apply("cap", (a, b)):
            return _common(region(a), region(b))
        case Apply("setminus", (a, b)):
            return _common(region(a), _complement(region(b)))
        case Group("list", items, _, joint):
            parts = [region(item) for item in items]
            if joint == "or":
                return _merged([interval for part in parts for interval in part])
            found = parts[0]
            for part in parts[1:]:
                found = _common(found, part)
            return found
        case Chain():
            if (intervals := _interval_chain(node)) is not None:
                return intervals
    raise UnreadableError("no set of real numbers")


def _interval_chain(node: Chain) -> list[Interval] | None:
    """The values of the one name in 0 < x < 1, x ≥ 3, ≤ 3 or x ≠ 2; None for any other chain."""
    sides, signs = node.sides, node.signs
    at = next((i for i, s in enumerate(sides) if _bounded(s)), None)
    if at is None or len(sides) > 3 or (len(sides) == 3 and at != 1) or not set(signs) <= set(FLIPPED) - {"="}:
        return None
    found = [WHOLE]
    for i, sign in enumerate(signs):
        other = sides[i + 1] if i >= at else sides[i]
        sign = sign if i >= at else FLIPPED[sign]
        try:
            bound = _real(other)
        except UnreadableError:
            return None
        if sign == "ne":
            found = _common(found, _complement([Interval(bound, bound, True, True)]))
        elif sign in ("<", "le"):
            found = _common(found, [Interval(WHOLE.low, bound, False, sign == "le")])
        else:
            found = _common(found, [Interval(bound, WHOLE.high, sign == "ge", False)])
    return _of_absolute(found) if isinstance(name := sides[at], Apply) and name.head == "abs" else found


def _bounded(side: Node) -> bool:
    """Whether a side of an inequality is what is bounded: a name, |x|, or nothing (≤ 3)."""
    if isinstance(side, Words):
        return side == Words("")
    return is_name(side) or (isinstance(side, Apply) and side.head == "abs" and is_name(side.args[0]))


def _of_absolute(intervals: list[Interval]) -> list[Interval]:
    """The x of which |x| lies in the intervals."""
    right = _common(intervals, [Interval(Fraction(0), WHOLE.high, True, False)])
    return _merged(right + [Interval(-i.high, -i.low, i.high_in, i.low_in) for i in right])


def _real(node: Node) -> Fraction | float:
    """A bound: exact, or 45 digits of it, or ±∞."""
    if free_names(node):
        raise UnreadableError("a bound with a variable")
    if isinstance(node, Quantity) and not node.unit.is_percent:
        node = node.value
    value = values.real(Evaluation()(node))
    if isinstance(value, Fraction):
        return value
    if not precise.isfinite(value):
        return math.inf if value > 0 else -math.inf
    return Fraction(precise.nstr(value, 45))  # so that bounds can be put in order


def _merged(intervals: list[Interval]) -> list[Interval]:
    kept: list[Interval] = []
    finite = [i for i in intervals if i.low < i.high or (i.low == i.high and i.low_in and i.high_in)]
    for found in sorted(finite, key=lambda i: (i.low, not i.low_in)):
        last = kept[-1] if kept else None
        touches = last is not None and found.low == last.high and (found.low_in or last.high_in)
        if last is not None and (touches or found.low < last.high):
            if found.high == last.high:
                high, high_in = last.high, last.high_in or found.high_in
            else:
                high, high_in = max((last.high, last.high_in), (found.high, found.high_in))
            kept[-1] = Interval(last.low, high, last.low_in, high_in)
        else:
            kept.append(found)
    return kept


def _common(a: list[Interval], b: list[Interval]) -> list[Interval]:
    both = []
    for x, y in itertools.product(a, b):
        if x.low == y.low:
            low, low_in = x.low, x.low_in and y.low_in
        else:
            low, low_in = max((x.low, x.low_in), (y.low, y.low_in))
        if x.high == y.high:
            high, high_in = x.high, x.high_in and y.high_in
        else:
            high, high_in = min((x.high, x.high_in), (y.high, y.high_in))
        both.append(Interval(low, high, low_in, high_in))
    return _merged(both)


def _complement(intervals: list[Interval]) -> list[Interval]:
    found, low, low_in = [], WHOLE.low, False
    for interval in intervals:
        found.append(Interval(low, interval.low, low_in, not interval.low_in))
        low, low_in = interval.high, not interval.high_in
    return _merged([*found, Interval(low, WHOLE.high, low_in, False)])
