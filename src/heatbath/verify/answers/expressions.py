"""Answers as trees. Nothing is computed here; `parser.py` makes them, `values.py` and `equality.py` read them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeGuard

from heatbath.verify.answers.units import Unit


@dataclass(frozen=True)
class Number:
    value: Fraction
    percent: bool = False


@dataclass(frozen=True)
class Name:
    """A variable or a constant (`pi`, `e`, `i`, `infty`)."""

    name: str


@dataclass(frozen=True)
class Apply:
    """An operator or a function on its arguments."""

    head: str
    args: tuple[Node, ...]


@dataclass(frozen=True)
class Group:
    """Several values. `paren`, `bracket` (and `half` for a bracket that opens and closes differently) have an order;
    `set` and `list` (values without brackets) have none; `joint` is how a list was joined, `ends` its brackets."""

    kind: Literal["paren", "bracket", "half", "set", "list"]
    items: tuple[Node, ...]
    ends: str = ""
    joint: Literal[",", ";", "and", "or"] = ","


@dataclass(frozen=True)
class Matrix:
    rows: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True)
class Chain:
    """Expressions with relations between them: `0 < x < 1`, `x = 5`. A missing first side is a Words('')."""

    sides: tuple[Node, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True)
class Words:
    text: str


@dataclass(frozen=True)
class Based:
    """A number written in another base, which is part of the answer: 1011_2."""

    digits: str
    base: int


@dataclass(frozen=True)
class Quantity:
    value: Node
    unit: Unit


Node = Number | Name | Apply | Group | Matrix | Chain | Words | Based | Quantity


def listed(items: list[Node], joint: str) -> Node:
    """Several values without brackets; one is itself."""
    if len(items) == 1:
        return items[0]
    return Group("list", tuple(items), joint=joint)  # type: ignore[arg-type]


def signed(sign: str, node: Node) -> Node:
    """A value with the sign before it."""
    if sign == "+":
        return node
    if isinstance(node, Number) and sign == "-":
        return Number(-node.value, node.percent)
    if isinstance(node, Quantity):
        return Quantity(signed(sign, node.value), node.unit)
    if isinstance(node, Based) and sign == "-":
        return Based("-" + node.digits, node.base)
    return Apply({"-": "neg"}.get(sign, sign), (node,))


def is_integer(node: Node) -> bool:
    """A whole number without a percent sign."""
    return isinstance(node, Number) and node.value.denominator == 1 and not node.percent


def is_proper_fraction(node: Node) -> bool:
    """a/b with 0 < a < b."""
    return is_plain_fraction(node) and 0 < node.args[0].value < node.args[1].value


def is_plain_fraction(node: Node) -> TypeGuard[Apply]:
    """a/b of whole numbers."""
    return isinstance(node, Apply) and node.head == "div" and all(map(is_integer, node.args))


def is_constant(node: Node) -> bool:
    """An expression without variables."""
    match node:
        case Name(name):
            return name in ("pi", "e")
        case Apply(_, args):
            return all(map(is_constant, args))
    return isinstance(node, Number)


def depth(node: Node) -> int:
    """How deep a tree is; found without recursion."""
    deepest, waiting = 0, [(node, 1)]
    while waiting:
        found, level = waiting.pop()
        deepest = max(deepest, level)
        match found:
            case Apply(_, parts) | Group(_, parts) | Chain(parts, _):
                waiting += [(part, level + 1) for part in parts]
            case Matrix(rows):
                waiting += [(cell, level + 1) for row in rows for cell in row]
            case Quantity(value, _):
                waiting.append((value, level + 1))
    return deepest
