"""What an equation names: x = 5 is 5, f(x) = 2x is 2x, (p, q) = (3, 2) is (3, 2)."""

from __future__ import annotations

import operator

from heatbath.verify.answers.expressions import Apply, Chain, Group, Matrix, Name, Node, Quantity, Words

CONSTANTS = ("pi", "e", "i", "infty", "emptyset")


def named_value(node: Node) -> tuple[Node | None, Node]:
    """`node` as (name, value) where it says what something is: x = 5, f(x) = 2x, x ∈ {1, 2}, AB = 3 + 4 = 7."""
    if isinstance(node, Group) and node.kind == "list" and node.joint != ";":
        return _named_list(node)
    if not isinstance(node, Chain):
        return None, node
    sides, signs = list(node.sides), list(node.signs)
    if "approx" in signs:
        cut = signs.index("approx")
        if cut or not is_name(sides[0]):  # 1/3 ≈ 0.33 is 1/3
            sides, signs = sides[: cut + 1], signs[:cut]
            if not signs:
                return None, sides[0]
    if not set(signs) <= {"=", "approx", "in", "equiv"}:
        return None, node
    if is_name(sides[0]):
        if signs[0] == "in" and not isinstance(sides[-1], Group | Apply | Name):
            return None, node  # 5 is no set
        return sides[0], sides[-1]
    if len(sides) == 2 and free_names(sides[0]) == set() and isinstance(sides[1], Name) and is_name(sides[1]):
        return sides[1], sides[0]  # 3 = s
    if len(sides) > 2 and not free_names(sides[-1]) and (inner := next(filter(is_name, sides), None)) is not None:
        return inner, sides[-1]  # 2y = x = 4
    if not any(free_names(side) for side in sides):
        return None, sides[-1]  # 47 + 38 = 85
    return None, Chain(tuple(sides), tuple(signs))


def _named_list(node: Group) -> tuple[Node | None, Node]:
    """n = 1, 2, 3 names the whole list."""
    first, *others = node.items
    alone = not any(isinstance(item, Chain) for item in others)
    if alone and isinstance(first, Chain) and first.signs in (("=",), ("in",)) and is_name(first.sides[0]):
        return first.sides[0], Group("list", (first.sides[1], *others), joint=node.joint)
    return None, node


def is_name(node: Node) -> bool:
    """Whether a side of an equation names something: x, f(x), AB, |AB|, (x, y), A:B, NO/BO, a word."""
    match node:
        case Name(name):
            return name not in CONSTANTS
        case Words(text):
            return bool(text)
        case Apply("mul", (a, b)):
            return _capitals(a) and _capitals(b)
        case Apply("abs", (inner,)):
            return isinstance(inner, Apply) and _capitals(inner)  # |AB|, but |x| = 1 is an equation
        case Apply("overline" | "angle" | "triangle" | "widehat" | "vec" | "overrightarrow", (inner,)):
            return is_name(inner)
        case Apply("ratio" | "div", args):
            return all(map(_capitals, args))
        case Apply(head, _):
            return head.startswith("call ")
        case Group("paren", items):
            return all(map(is_name, items))
    return False


def _capitals(node: Node) -> bool:
    match node:
        case Name(name):
            return name[0].isupper()
        case Apply("mul", (a, b)):
            return _capitals(a) and _capitals(b)
    return False


def same_name(a: Node, b: Node) -> bool:
    """Names that may stand for the same: only a variable or a function excludes another."""
    if isinstance(a, Apply) and isinstance(b, Apply) and a.head.startswith("call ") and b.head.startswith("call "):
        variables = all(isinstance(arg, Name) for arg in (*a.args, *b.args)) and len(a.args) == len(b.args)
        return a.head == b.head and (variables or a.args == b.args)
    return a == b or not (isinstance(a, Name) and isinstance(b, Name))


def bound(name: Node, like: Node, value: Node) -> Node:
    """`value` with the arguments of `name` called as those of `like`: f(t) = t² is f(x) = x²."""
    if not (isinstance(name, Apply) and isinstance(like, Apply) and name.head == like.head and name.args != like.args):
        return value
    new: dict[str, Node] = {b.name: Name(b.name + "'") for b in like.args if isinstance(b, Name)}  # free in `value`
    new |= {a.name: b for a, b in zip(name.args, like.args, strict=False) if isinstance(a, Name)}
    return _renamed(value, new)


def _renamed(node: Node, new: dict[str, Node]) -> Node:
    match node:
        case Name(name):
            return new.get(name, node)
        case Apply(head, args):
            return Apply(head, tuple(_renamed(arg, new) for arg in args))
        case Group(kind, items, ends, joint):
            return Group(kind, tuple(_renamed(item, new) for item in items), ends, joint)
        case Chain(sides, signs):
            return Chain(tuple(_renamed(side, new) for side in sides), signs)
    return node


def assignments(node: Node) -> list[tuple[Node, Node]] | None:
    """(name, value) of each part of x = 1, y = 2 or (x, y) = (1, 2); None for what does not name several values."""
    if isinstance(node, Group) and node.kind != "half":
        named = [named_value(item) for item in node.items]
        pairs = [(name, value) for name, value in named if name is not None]
        if len(pairs) == len(named) > 1:
            return pairs
    name, value = named_value(node)
    several = isinstance(name, Group) and isinstance(value, Group) and value.kind in ("paren", "list")
    if several and len(name.items) == len(value.items):
        return list(zip(name.items, value.items, strict=True))
    return None


def paired(names: list[Node], others: list[Node]) -> list[int] | None:
    """The place in `others` of each of `names`: the same name, else one that begins as it does (A for Amelia), else,
    where either is a word, the next that is left. None where a name has no partner."""
    found: dict[int, int] = {}
    for alike in (operator.eq, _called, _begins):
        for i, name in enumerate(names):
            free = [j for j, other in enumerate(others) if j not in found.values() and alike(name, other)]
            if i not in found and len(free) == 1:
                found[i] = free[0]
    left = [j for j in range(len(others)) if j not in found.values()]
    for i in (i for i in range(len(names)) if i not in found):
        if not left or not (isinstance(names[i], Words) or isinstance(others[left[0]], Words)):
            return None
        found[i] = left.pop(0)
    return None if left else [found[i] for i in range(len(names))]


def distinct(names: list[Node]) -> bool:
    return len(set(names)) == len(names)


def _called(a: Node, b: Node) -> bool:
    """Whether both are the same function: f(x) and f(t)."""
    return isinstance(a, Apply) and isinstance(b, Apply) and a.head.startswith("call ") and same_name(a, b)


def _begins(a: Node, b: Node) -> bool:
    """Whether one name is the beginning of the other: a word, and letters or another word."""
    if not (isinstance(a, Words) or isinstance(b, Words)):
        return False
    one, other = _written(a), _written(b)
    return bool(one and other) and (one.startswith(other) or other.startswith(one))


def _written(name: Node) -> str:
    match name:
        case Words(text) | Name(text):
            return text.casefold()
        case Apply("mul", (a, b)):
            return _written(a) + _written(b)
    return ""


def numbered(names: list[Node]) -> bool:
    """Whether names differ in their number only (x_1, x_2), so that which is which says nothing."""
    letters = {name.name.partition("_")[0] for name in names if isinstance(name, Name) and "_" in name.name}
    return len(letters) == 1 and all(isinstance(name, Name) for name in names)


def free_names(node: Node) -> set[str]:
    match node:
        case Name(name):
            return set() if name in CONSTANTS else {name}
        case Apply(head, args):
            found = {head} if head.startswith("call ") else set()
            return found.union(*map(free_names, args))
        case Group(_, items):
            return set().union(*map(free_names, items))
        case Chain(sides, _):
            return set().union(*map(free_names, sides))
        case Matrix(rows):
            return set().union(*(free_names(cell) for row in rows for cell in row))
        case Quantity(value, _):
            return free_names(value)
    return set()
