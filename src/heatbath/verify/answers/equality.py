"""Whether two answers are the same: numbers by value, lists without order, tuples with it, sets, intervals, equations.

`same` says True, False, or None where it cannot tell; it never takes the benefit of a doubt for True.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from heatbath.verify.answers import values
from heatbath.verify.answers.expressions import Apply, Based, Chain, Group, Matrix, Name, Node, Number, Quantity, Words
from heatbath.verify.answers.intervals import FLIPPED, Interval, is_region, region
from heatbath.verify.answers.names import (
    assignments,
    bound,
    distinct,
    free_names,
    named_value,
    numbered,
    paired,
    same_name,
)
from heatbath.verify.answers.symbols import RefusedError, UnreadableError
from heatbath.verify.answers.values import Evaluation, mp, precise

POINTS = 8  # two with positive variables, then with signs that differ from letter to letter
MOST_PAIRS = 1_000  # comparisons of the elements of two lists


@dataclass(frozen=True)
class Rules:
    """What counts as the same.

    `decimals`: numbers may differ by half a unit of that decimal (None: they are exact). `same_variables`: x + 1 is not
    y + 1. `relations_as_sets`: an inequality is an answer where a set is asked for (the other way round always is).
    """

    decimals: int | None = None
    same_variables: bool = True
    relations_as_sets: bool = True


EXACT = Rules()


def same(gold: Node, answer: Node, rules: Rules = EXACT) -> bool | None:
    """Whether `answer` is `gold`; None where it cannot be told. Raises RefusedError for what is too large."""
    if gold == answer:
        return True
    named = _same_assignments(gold, answer, rules)
    if named is not None:
        return named
    whole, whole_answer = gold, answer
    name, gold = named_value(gold)
    other, answer = named_value(answer)
    if (_equation(gold) and other is not None) or (_equation(answer) and name is not None):  # 2x + 4y = 3 and y = …
        return _same_relation(whole, whole_answer, rules)
    if name is not None and other is not None:
        if rules.same_variables and not same_name(name, other):
            return False
        answer = bound(other, name, answer)
    gold, answer = _spread(computed(gold)), _spread(computed(answer))
    if isinstance(gold, Words) or isinstance(answer, Words):
        return gold == answer
    if isinstance(gold, Based) or isinstance(answer, Based):
        return gold == answer
    if isinstance(gold, Quantity) or isinstance(answer, Quantity):
        return _same_quantity(gold, answer, rules)
    if is_region(gold) or is_region(answer):
        return _same_region(gold, answer, rules)
    if isinstance(gold, Chain) or isinstance(answer, Chain):
        return _same_relation(gold, answer, rules)
    if isinstance(gold, Group | Matrix) or isinstance(answer, Group | Matrix):
        return _same_group(gold, answer, rules)
    return _same_value(gold, answer, rules)


# -- ± and lists


def _spread(node: Node) -> Node:
    """`node` with every value that holds ± as two, and a group of one value as that value."""
    if isinstance(node, Group) and node.kind in ("set", "list"):
        items = tuple(part for item in node.items for part in _signs(named_value(item)[1] if _has_sign(item) else item))
        node = Group(node.kind, items, node.ends, node.joint)
    elif _has_sign(node) and not isinstance(node, Group | Matrix):
        node = Group("list", tuple(_signs(node)))
    if isinstance(node, Group) and len(node.items) == 1 and node.kind not in ("half", "set"):
        return node.items[0]
    return node


def _has_sign(node: Node) -> bool:
    match node:
        case Apply(head, args):
            return head in ("pm", "mp") or any(map(_has_sign, args))
        case Chain(sides, _):
            return any(map(_has_sign, sides))
        case Quantity(value, _):
            return _has_sign(value)
    return False


def _signs(node: Node) -> Iterator[Node]:
    if not _has_sign(node):
        yield node
        return
    yield _signed(node, 1)
    yield _signed(node, -1)


def _signed(node: Node, sign: int) -> Node:
    match node:
        case Apply("pm" | "mp" as head, args):
            plus = (sign > 0) == (head == "pm")
            parts = tuple(_signed(arg, sign) for arg in args)
            if len(parts) == 1:
                return parts[0] if plus else Apply("neg", parts)
            return Apply("add" if plus else "sub", parts)
        case Apply(head, args):
            return Apply(head, tuple(_signed(arg, sign) for arg in args))
        case Chain(sides, signs):
            return Chain(tuple(_signed(side, sign) for side in sides), signs)
        case Quantity(value, unit):
            return Quantity(_signed(value, sign), unit)
    return node


def computed(node: Node) -> Node:
    """Sums and products of matrices as one matrix of sums and products."""
    if not isinstance(node, Apply) or node.head not in ("add", "sub", "mul", "neg") or not _holds_matrix(node):
        return node
    parts = [computed(arg) for arg in node.args]
    if len(parts) == 1 and isinstance(parts[0], Matrix):
        return Matrix(tuple(tuple(Apply("neg", (cell,)) for cell in row) for row in parts[0].rows))
    left, right = parts if len(parts) == 2 else (node, node)
    if node.head == "mul":
        return _product(left, right) or node
    if isinstance(left, Matrix) and isinstance(right, Matrix) and _shape(left) == _shape(right):
        rows = zip(left.rows, right.rows, strict=True)
        return Matrix(tuple(tuple(Apply(node.head, pair) for pair in zip(*row, strict=True)) for row in rows))
    return node


def _product(left: Node, right: Node) -> Matrix | None:
    if isinstance(left, Matrix) and isinstance(right, Matrix):
        if len(left.rows[0]) != len(right.rows):
            return None
        columns = list(zip(*right.rows, strict=True))
        return Matrix(tuple(tuple(_dot(row, column) for column in columns) for row in left.rows))
    matrix, factor = (left, right) if isinstance(left, Matrix) else (right, left)
    if not isinstance(matrix, Matrix) or _holds_group(factor):
        return None
    return Matrix(tuple(tuple(Apply("mul", (factor, cell)) for cell in row) for row in matrix.rows))


def _dot(row: Sequence[Node], column: Sequence[Node]) -> Node:
    return functools.reduce(
        lambda total, term: Apply("add", (total, term)),
        [Apply("mul", pair) for pair in zip(row, column, strict=True)],
    )


def _shape(matrix: Matrix) -> tuple[int, int]:
    return len(matrix.rows), len(matrix.rows[0])


def _holds_matrix(node: Node) -> bool:
    return isinstance(node, Matrix) or (isinstance(node, Apply) and any(map(_holds_matrix, node.args)))


def _same_group(gold: Node, answer: Node, rules: Rules) -> bool | None:
    if isinstance(gold, Matrix) and isinstance(answer, Matrix):
        if [len(row) for row in gold.rows] != [len(row) for row in answer.rows]:
            return False
        cells = [(g, a) for pair in zip(gold.rows, answer.rows, strict=True) for g, a in zip(*pair, strict=True)]
        return _all(same(g, a, rules) for g, a in cells)
    gold_kind, golds = _items(gold)
    kind, answers = _items(answer)
    if golds is None or answers is None:
        return None if _undecided(gold, answer) else False  # None: the sum of two matrices
    kinds = {gold_kind, kind}
    if kinds <= {"set", "list"}:
        return _same_set(golds, answers, rules)
    if "set" in kinds or (kinds == {"paren", "bracket"} and len(golds) == 2):
        return False
    if "half" in kinds and (not isinstance(gold, Group) or not isinstance(answer, Group) or gold.ends != answer.ends):
        return False
    if len(golds) != len(answers):
        return False
    return _all(same(g, a, rules) for g, a in zip(golds, answers, strict=True))


def _holds_group(node: Node) -> bool:
    """Whether `node` is, or is made of, more than single values."""
    return isinstance(node, Group | Matrix | Chain) or (isinstance(node, Apply) and any(map(_holds_group, node.args)))


def _undecided(gold: Node, answer: Node) -> bool:
    """Whether two things of several values may be the same after an operation that is not known here."""
    unknown = any(isinstance(node, Apply) and node.head not in ("cup", "cap", "setminus") for node in (gold, answer))
    return unknown and _holds_group(gold) and _holds_group(answer)


def _items(node: Node) -> tuple[str, Sequence[Node] | None]:
    if isinstance(node, Matrix):  # one row or one column is a tuple
        if len(node.rows) == 1 or len(node.rows[0]) == 1:
            return "paren", [cell for row in node.rows for cell in row]
        return "matrix", None
    if isinstance(node, Group):
        return node.kind, node.items
    return "", None


def _same_set(golds: Sequence[Node], answers: Sequence[Node], rules: Rules) -> bool | None:
    """Each of one side is one of the other. How often counts only where the gold answer repeats a value (2, 1, 1)."""
    if len(golds) * len(answers) > MOST_PAIRS:
        raise RefusedError(f"more than {MOST_PAIRS} pairs of elements")
    if len(golds) != len(answers) and len(set(golds)) < len(golds):
        return False
    own = {named_value(g)[0] for g in golds} & {named_value(a)[0] for a in answers}
    table = [[not _crossed(g, a, own) and same(g, a, rules) for a in answers] for g in golds]
    there = _all(_any(row) for row in table)
    back = _all(_any(row[i] for row in table) for i in range(len(answers)))
    return _all([there, back])


def _crossed(gold: Node, answer: Node, own: set[Node | None]) -> bool:
    """Whether two values have different names of which one (`own`) is on both sides: it has its value there."""
    name, other = named_value(gold)[0], named_value(answer)[0]
    return name is not None and other is not None and name != other and (name in own or other in own)


def _all(found: Any) -> bool | None:
    results = list(found)
    return False if False in results else None if None in results else True


def _any(found: Any) -> bool | None:
    results = list(found)
    return True if True in results else None if None in results else False


# -- units and percents


def _same_quantity(gold: Node, answer: Node, rules: Rules) -> bool | None:
    """A unit counts where both sides have one; a percent and a bare number may be the same share or percent."""
    gold_unit, gold_value = (gold.unit, gold.value) if isinstance(gold, Quantity) else (None, gold)
    unit, value = (answer.unit, answer.value) if isinstance(answer, Quantity) else (None, answer)
    if gold_unit and unit and gold_unit.differs(unit):
        return False
    percents = [bool(u and u.is_percent) for u in (gold_unit, unit)]
    if percents[0] != percents[1]:
        hundredth = Apply("div", (gold_value if percents[0] else value, Number(Fraction(100))))
        pairs = [(gold_value, value), (hundredth, value) if percents[0] else (gold_value, hundredth)]
        return _any(same(g, a, rules) for g, a in pairs)
    return same(gold_value, value, rules)


# -- sets of real numbers


def _same_region(gold: Node, answer: Node, rules: Rules) -> bool | None:
    if not rules.relations_as_sets and _related(answer) and not _related(gold):
        return False
    if _related(gold) and _related(answer):
        names = [free_names(gold), free_names(answer)]
        if rules.same_variables and all(names) and names[0] != names[1]:
            return False
    try:
        return _same_intervals(region(gold), region(answer), rules)
    except UnreadableError:
        if isinstance(gold, Apply) and isinstance(answer, Apply) and gold.head == answer.head == "cup":
            return _same_set(_parts(gold), _parts(answer), rules)
        if isinstance(gold, Chain) and isinstance(answer, Chain):
            return _same_relation(gold, answer, rules)
        if isinstance(gold, Group) and isinstance(answer, Group):
            if (gold.kind, gold.ends) != (answer.kind, answer.ends) or len(gold.items) != len(answer.items):
                return False
            return _all(same(g, a, rules) for g, a in zip(gold.items, answer.items, strict=True))
        return None if _undecided(gold, answer) else False


def _parts(union: Node) -> list[Node]:
    if isinstance(union, Apply) and union.head == "cup":
        return [part for arg in union.args for part in _parts(arg)]
    return [union]


def _same_intervals(golds: list[Interval], answers: list[Interval], rules: Rules) -> bool:
    if rules.decimals is None or len(golds) != len(answers):
        return golds == answers
    return all(
        (g.low_in, g.high_in) == (a.low_in, a.high_in)
        and values.close(g.low, a.low, rules.decimals)
        and values.close(g.high, a.high, rules.decimals)
        for g, a in zip(golds, answers, strict=True)
    )


def _same_assignments(gold: Node, answer: Node, rules: Rules) -> bool | None:
    """x = 1, y = 2 by name against other names, by place against values without names; None where nothing is named."""
    golds, answers = assignments(gold), assignments(answer)
    names, others = ([name for name, _ in pairs or ()] for pairs in (golds, answers))
    if golds and answers and distinct(names):
        if distinct(others):
            return _same_by_name(golds, answers, rules)
        if not set(names).isdisjoint(others):
            return False  # y is given two values, or x none
    if golds and distinct(names) and _placed(gold):
        pairs, other = golds, answer
    elif answers and distinct(others) and _placed(answer) and not any(isinstance(name, Words) for name in others):
        pairs, other = answers, gold  # a word may explain a value of a list in any order
    else:
        return None
    name, value = named_value(other)
    if isinstance(name, Name):
        if not any(isinstance(own, Words) for own in names):
            return False
        other = value  # x = 1, 2 for first = 1, second = 2
    items = _items(other)[1]
    if items is None or len(items) != len(pairs):
        return False
    values_named = Group("paren", tuple(value for _, value in pairs), "()")
    if numbered([name for name, _ in pairs]):
        values_named = Group("list", values_named.items)
    rest = Group("paren", tuple(items), "()") if values_named.kind == "paren" else other
    return same(values_named, rest, rules) if pairs is golds else same(rest, values_named, rules)


def _same_by_name(golds: list[tuple[Node, Node]], answers: list[tuple[Node, Node]], rules: Rules) -> bool | None:
    """Each value against that of its own name, in any order of the names."""
    places = paired([name for name, _ in golds], [name for name, _ in answers])
    if places is None:
        return False
    return _all(
        same(value, bound(answers[place][0], name, answers[place][1]), rules)
        for (name, value), place in zip(golds, places, strict=True)
    )


def _placed(node: Node) -> bool:
    """Whether the order of the values says which is which: of x = 1 or y = 2, and of a set, it does not."""
    return not isinstance(node, Group) or (node.kind in ("list", "paren") and node.joint != "or")


def _equation(node: Node) -> bool:
    return isinstance(node, Chain) and node.signs == ("=",)


def _related(node: Node) -> bool:
    return isinstance(node, Chain) or (isinstance(node, Group) and any(isinstance(i, Chain) for i in node.items))


# -- equations and inequalities


def _same_relation(gold: Node, answer: Node, rules: Rules) -> bool | None:
    """Two relations that hold at the same places: their differences are proportional."""
    if not (isinstance(gold, Chain) and isinstance(answer, Chain)):
        return False  # an equation is not one of its sides
    sides = zip(gold.sides, answer.sides, strict=False)
    if gold.signs == answer.signs and _all(same(g, a, rules) for g, a in sides):
        return True
    if len(gold.signs) != 1 or len(answer.signs) != 1:
        return None if len(gold.signs) == len(answer.signs) else False
    (sign, first), (other, second) = _difference(gold), _difference(answer)
    if sign != other:
        return False
    ratios = []
    for point in range(POINTS):
        try:
            a, b = Evaluation(point)(first), Evaluation(point)(second)
        except UnreadableError:
            return None
        if a == 0 or b == 0:
            return None
        ratios.append(mp(b) / mp(a))
    if not all(values.same_number(ratios[0], ratio) for ratio in ratios):
        return False
    if sign in ("=", "ne"):
        return True
    return bool(precise.im(ratios[0]) == 0 and precise.re(ratios[0]) > 0)


def _difference(chain: Chain) -> tuple[str, Node]:
    """The relation as (sign, what is compared with zero), greater turned into less."""
    (left, right), (sign,) = chain.sides, chain.signs
    if sign in (">", "ge"):
        left, right, sign = right, left, FLIPPED[sign]
    if isinstance(left, Words) or isinstance(right, Words):
        return sign, Words("")
    return sign, Apply("sub", (left, right))


# -- numbers and expressions


def _same_value(gold: Node, answer: Node, rules: Rules) -> bool | None:
    if isinstance(gold, Number) and isinstance(answer, Number):
        return _same_plain(gold, answer, rules)
    if isinstance(gold, Apply) and isinstance(answer, Apply) and gold.head == answer.head == "ratio":
        return _same_ratio(gold.args, answer.args, rules)
    names, others = free_names(gold), free_names(answer)
    renamed: dict[str, str] = {}
    if not rules.same_variables and len(names) == len(others):
        renamed = dict(zip(sorted(others), sorted(names), strict=True))
    agree = []
    for point in range(POINTS if names or others else 1):
        try:
            a, b = Evaluation(point)(gold), Evaluation(point, renamed=renamed)(answer)
        except UnreadableError:
            return None if _holds_group(gold) == _holds_group(answer) and all(agree) else False
        if not (_finite(a) and _finite(b)):
            agree.append(bool(mp(a) == mp(b)))
        elif rules.decimals is not None and not names | others:
            agree.append(values.close(a, b, rules.decimals))
        else:
            agree.append(values.same_number(a, b))
        if not agree[-1]:
            return False
    return True


def _finite(value: Any) -> bool:
    return isinstance(value, Fraction) or bool(precise.isfinite(value))


def _same_plain(gold: Number, answer: Number, rules: Rules) -> bool:
    """A percent and a number without a sign may be the same share or the same percent."""
    if gold.percent == answer.percent:
        pairs = [(gold.value, answer.value)]
    elif gold.percent:
        pairs = [(gold.value, answer.value), (gold.value / 100, answer.value)]
    else:
        pairs = [(gold.value, answer.value), (gold.value, answer.value / 100)]
    if rules.decimals is not None:
        return any(values.close(a, b, rules.decimals) for a, b in pairs)
    return any(a == b for a, b in pairs)


def _same_ratio(golds: Sequence[Node], answers: Sequence[Node], rules: Rules) -> bool | None:
    """7:32 is 14:64; a ratio with a zero (12:00) is a time or a score and has to be the same in every part."""
    if len(golds) != len(answers):
        return False
    try:
        a, b = ([Evaluation()(part) for part in parts] for parts in (golds, answers))
    except UnreadableError:
        return _all(same(g, x, rules) for g, x in zip(golds, answers, strict=True))
    if any(part == 0 for part in [*a, *b]):
        return all(values.same_number(x, y) for x, y in zip(a, b, strict=True))
    scale = mp(a[0]) / mp(b[0])
    return all(values.same_number(mp(x), mp(y) * scale) for x, y in zip(a, b, strict=True))
