"""Tests of a coding problem, read from a gold of one of the forms in docs/code.md: what to run, and what must come out.

Nothing here runs code of a model or of a data set; `ast` reads assertions, which are the data set's.
"""

from __future__ import annotations

import ast
import builtins
import cmath
import hashlib
import json
import keyword
import math
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from heatbath.verify.inside import NotPlainError, decode, encode, spread

MAX_SOURCE = 1 << 20  # characters of any one code or text field of a gold
DEFAULT_ATOL = 1e-6  # where the expected value is a float and no tolerance is given, as EvalPlus has it
RTOL = 1e-7
ROOM_FACTOR, ROOM = 20, 10_000  # a value may have this many times the items of the right one, and this many more
FREE_ROOM = 1_000_000  # items of all values that the right value says nothing of, together


class BadGoldError(Exception):
    """The gold is at fault: its tests cannot be read, or would say nothing about a program."""


@dataclass(frozen=True)
class FunctionTests:
    """`inputs` are encoded argument lists; `outputs` the values expected, or `reference` the code that has them."""

    entry_point: str
    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...] | None = None
    reference: str = ""
    prompt: str = ""
    atol: float = 0.0
    rule: str = ""  # a name in RULES, or of what is left out

    @property
    def names(self) -> tuple[str, ...]:
        return (self.entry_point,)

    @cached_property
    def key(self) -> str:
        text = json.dumps([self.entry_point, self.inputs, self.reference, self.rule])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def reduce(self) -> str:
        return "not none" if self.rule == "matched or not" else ""

    @cached_property
    def room(self) -> tuple[int, ...]:
        """The most items of each value, where `outputs` says what is right."""
        return tuple(room_of(json.dumps(encode(value)).encode()) for value in self.outputs or ())

    def agrees(self, index: int, value: Any, expected: Any) -> bool:
        """Whether `value` is right for input `index`: by the named rule, else by `same`."""
        special = RULES.get(self.rule)
        try:
            if special is not None:
                return special(decode(self.inputs[index]), value, expected, self.atol)
            return same(value, expected, self.atol or DEFAULT_ATOL, json_lists=self.outputs is not None)
        except (TypeError, ValueError, OverflowError, ArithmeticError):  # a value of another type than the rule's
            return False


def room_of(right: bytes) -> int:
    """The most items of a value, from the JSON text of the right one."""
    return ROOM_FACTOR * (right.count(b"[") + right.count(b",")) + ROOM


@dataclass(frozen=True)
class Assertion:
    """`assert remainder`, whose names _0, _1, … stand for the values of `calls`, which the program computes."""

    calls: tuple[str, ...]
    remainder: str
    names: tuple[str, ...] = ()  # of the program's, which `calls` begin with
    literal: tuple[str, Any] | None = None  # ("==", value), ("is", value) or ("truth", bool): of _0 alone

    def agrees(self, value: Any, atol: float) -> bool:
        """Of an assertion with a `literal`: decided on plain data, with no code run."""
        assert self.literal is not None
        kind, expected = self.literal
        if kind == "truth":
            return bool(value) is expected
        return value is expected if kind == "is" else same(value, expected, atol)


@dataclass(frozen=True)
class Assertions:
    items: tuple[Assertion, ...]
    names: tuple[str, ...]  # that the program must define
    setup: tuple[str, ...] = ()  # run after the program, and before the remainders
    modules: tuple[str, ...] = ()  # of the standard library, which the remainders use without importing them
    atol: float = 0.0

    @cached_property
    def room(self) -> tuple[int, ...]:
        """The most items of the value of each call: `assert f()` alone says nothing of them."""
        free = ROOM + FREE_ROOM // max(1, sum(len(item.calls) for item in self.items))
        known = [item.literal for item in self.items for _ in item.calls]
        return tuple(
            free if literal is None or literal[0] == "truth" else room_of(json.dumps(encode(literal[1])).encode())
            for literal in known
        )


@dataclass(frozen=True)
class Streams:
    stdin: tuple[str, ...]
    stdout: tuple[str, ...]
    atol: float = 0.0
    names: tuple[str, ...] = ()


Tests = FunctionTests | Assertions | Streams


def read_tests(gold: Mapping[str, Any] | str) -> Tests:
    """The tests of a gold (a mapping, or its JSON text); BadGoldError with the reason if there are none to judge by."""
    if isinstance(gold, str):
        try:
            gold = json.loads(gold)
        except (ValueError, RecursionError) as error:
            raise BadGoldError(f"the gold is not JSON: {error}") from error
    if not isinstance(gold, Mapping):
        raise BadGoldError(f"the gold is {json.dumps(gold, default=repr)[:80]}, not a mapping")
    try:
        return _read(gold)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        raise BadGoldError(f"the gold cannot be read: {type(error).__name__}: {str(error)[:120]}") from error


def _read(gold: Mapping[str, Any]) -> Tests:
    if "base_input" in gold:
        return _evalplus(gold)
    if "inputs" in gold:
        return _function(gold)
    if "test_list" in gold:
        return _assertions(gold)
    if "stdin" in gold:
        return _streams(gold)
    if "test" in gold:
        raise BadGoldError(
            "`test` would run beside the program, which could change it; give inputs, test_list or stdin"
        )
    raise BadGoldError("no tests: one of inputs, test_list, stdin or base_input is needed")


def _text(gold: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = gold.get(key, default)
    if not isinstance(value, str) or len(value) > MAX_SOURCE:
        raise BadGoldError(f"{key} must be a text of at most {MAX_SOURCE} characters")
    return value


def _texts(gold: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = gold.get(key) or ()
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Sequence) or not all(isinstance(item, str) and len(item) <= MAX_SOURCE for item in value):
        raise BadGoldError(f"{key} must be a list of texts")
    return tuple(value)


def _atol(gold: Mapping[str, Any]) -> float:
    value = gold.get("atol") or 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise BadGoldError("atol must be a number of at least 0")
    return float(value)


def _encoded(values: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise BadGoldError(f"{key} must be a list, and not empty")
    try:
        return tuple(encode(value) for value in values)
    except NotPlainError as error:
        raise BadGoldError(f"{key} holds {error}") from error


def _function(gold: Mapping[str, Any]) -> FunctionTests:
    inputs = gold["inputs"]
    if not isinstance(inputs, list | tuple) or not all(isinstance(row, list | tuple) for row in inputs):
        raise BadGoldError("inputs must be a list, and each of them the list of one call's arguments")
    outputs = None
    if "outputs" in gold:
        outputs = tuple(decode(wire) for wire in _encoded(gold["outputs"], "outputs"))
        if len(outputs) != len(inputs):
            raise BadGoldError(f"{len(inputs)} inputs, but {len(outputs)} outputs")
    elif not gold.get("reference"):
        raise BadGoldError("inputs need outputs, or a reference solution to compute them")
    entry_point = unicodedata.normalize("NFKC", _text(gold, "entry_point"))  # as Python reads a name
    if not entry_point.isidentifier() or keyword.iskeyword(entry_point):
        raise BadGoldError("entry_point must be the name of a function")
    prompt = _text(gold, "prompt", "")
    reference = "" if outputs is not None else prompt + "\n" + _text(gold, "reference")
    return FunctionTests(entry_point, _encoded(inputs, "inputs"), outputs, reference, prompt, _atol(gold))


def _streams(gold: Mapping[str, Any]) -> Streams:
    stdin, stdout = _texts(gold, "stdin"), _texts(gold, "stdout")
    if not stdin or len(stdin) != len(stdout):
        raise BadGoldError(f"{len(stdin)} texts in stdin, but {len(stdout)} in stdout")
    return Streams(stdin, stdout, _atol(gold))


# HumanEval+ and MBPP+ ------------------------------------------------------------------------------------------------


def _evalplus(gold: Mapping[str, Any]) -> FunctionTests:
    """A row of either set as it is published, with the types that its JSON could not hold restored."""
    task = _text(gold, "task_id")
    name, _, number = task.partition("/")
    if name not in ("HumanEval", "Mbpp") or not number.isdecimal():
        raise BadGoldError(f"task_id {task[:40]!r} is of neither HumanEval+ nor MBPP+")
    base, plus = gold["base_input"], gold.get("plus_input") or []  # one row of MBPP+ has {} for "none"
    if not isinstance(base, list | tuple) or not isinstance(plus, list | tuple):
        raise BadGoldError(f"base_input and plus_input of {task} must be lists")
    rows = [*base, *plus]
    prompt = _text(gold, "prompt") if name == "HumanEval" else ""  # MBPP's prompt is prose, not code
    try:
        rows = [_restored(int(number), row) for row in rows] if name == "Mbpp" else rows
        rows = [row for i, row in enumerate(rows) if (task, i) not in _LEFT_OUT]
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise BadGoldError(f"an input of {task} is not of its published form: {error}") from error
    tests = _function(
        {
            "entry_point": gold.get("entry_point"),
            "inputs": rows,
            "prompt": prompt,
            "reference": gold.get("canonical_solution"),
            "atol": gold.get("atol"),
        }
    )
    return replace(tests, rule=_RULE_OF.get(task, ""))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _each(value: Any) -> list[Any]:
    return [tuple(item) for item in value]


_EVERY_ARGUMENT_A_TUPLE = {2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470, 560, 579, 596, 616, 630}
_EVERY_ARGUMENT_A_TUPLE |= {726, 740, 744, 809}
_EVERY_ARGUMENT_A_LIST_OF_TUPLES = {63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780}
_FIRST_ARGUMENT_A_LIST_OF_TUPLES = {75, 413, 444, 753}
_FIRST_ARGUMENT_A_TUPLE = {250, 307, 405, 446, 617, 720, 763, 808}
_SECOND_ARGUMENT_A_TUPLE = {106, 750}
_TUPLES_OF_TUPLES = {259, 401, 445}
_TUPLES_ALL_THROUGH = {580, 615, 791}


def _restored(number: int, row: list[Any]) -> list[Any]:
    """Arguments of MBPP+ task `number`: tuples, sets and complex numbers are stored there as lists and texts."""
    if number in _EVERY_ARGUMENT_A_TUPLE:
        return _each(row)
    if number in _EVERY_ARGUMENT_A_LIST_OF_TUPLES:
        return [_each(argument) for argument in row]
    if number in _FIRST_ARGUMENT_A_LIST_OF_TUPLES:
        return [_each(row[0]), *row[1:]]
    if number in _FIRST_ARGUMENT_A_TUPLE:
        return [tuple(row[0]), *row[1:]]
    if number in _SECOND_ARGUMENT_A_TUPLE:
        return [row[0], tuple(row[1]), *row[2:]]
    if number in _TUPLES_OF_TUPLES:
        return [tuple(_each(argument)) for argument in row]
    if number in _TUPLES_ALL_THROUGH:
        return [_tuples(argument) for argument in row]
    if number == 115:  # sets, of which an empty one is stored as, and stays, an empty dict
        return [[set(item) if isinstance(item, list) and item else {} for item in row[0]]]
    if number == 124:
        return [float(row[0]), complex(row[1])]
    if number == 252:
        return [complex(row[0])]
    if number == 278:
        return [tuple(tuple(item) if isinstance(item, list) else item for item in row[0])]
    if number == 722:
        return [{key: tuple(value) for key, value in row[0].items()}, *row[1:]]
    return row


# Agreement of plain values -------------------------------------------------------------------------------------------


def same(value: Any, expected: Any, atol: float, *, json_lists: bool = False) -> bool:
    """Python's equality, but a float within `atol` + 1e-7·|expected| of one, wherever it stands, and nan equal to nan.

    With atol 0 it is exact. `json_lists`: a list of the gold also stands for a tuple, which JSON does not have.
    """
    pair = (type(value), type(expected))
    if pair in ((float, float), (complex, complex)):
        if value == expected or not atol:
            return bool(value == expected)
        if cmath.isnan(value) or cmath.isnan(expected):
            return cmath.isnan(value) and cmath.isnan(expected)
        return not cmath.isinf(expected) and abs(value - expected) <= atol + RTOL * abs(expected)
    if pair in ((list, list), (tuple, tuple)) or (json_lists and pair == (tuple, list)):
        return len(value) == len(expected) and all(
            same(a, b, atol, json_lists=json_lists) for a, b in zip(value, expected, strict=True)
        )
    if pair == (dict, dict):
        return value.keys() == expected.keys() and all(
            same(value[key], expected[key], atol, json_lists=json_lists) for key in expected
        )
    return bool(value == expected)


def _root(inputs: list[Any], value: Any, _: Any, atol: float) -> bool:
    """HumanEval/32: any zero of the polynomial will do; the stored solution finds another one than most."""
    return type(value) in (int, float) and abs(sum(c * math.pow(value, i) for i, c in enumerate(inputs[0]))) <= atol


def _surface(inputs: list[Any], value: Any, expected: Any, atol: float) -> bool:
    """Mbpp/581: its text leaves open whether the slant height or the height is given."""
    edge, height = inputs
    other = round(edge**2 + 2 * edge * math.sqrt((edge / 2) ** 2 + height**2))
    return same(value, expected, atol or DEFAULT_ATOL) or (type(value) in (int, float) and abs(value - other) <= atol)


def _digits(inputs: list[Any], value: Any, expected: Any, _: float) -> bool:
    """Mbpp/558: numbers of unequal length may be aligned at either end."""
    width = max(len(str(number)) for number in inputs)
    first, second = (str(number).zfill(width) for number in inputs)
    return value in (expected, sum(abs(int(a) - int(b)) for a, b in zip(first, second, strict=True)))


def _members(inputs: list[Any], value: Any, expected: Any, _: float) -> bool:
    """A value may repeat members; one of many more than are right, or whose hashes collide, is not made a set of."""
    if type(value) not in (list, tuple, set, frozenset, dict, str) or len(value) > ROOM_FACTOR * (len(expected) + 10):
        return False
    return set(spread(list(value))) == set(expected)


RULES: dict[str, Callable[[list[Any], Any, Any, float], bool]] = {
    "any root": _root,
    "any boolean": lambda inputs, value, expected, atol: type(value) is bool,
    "same members": _members,
    "matched or not": lambda inputs, value, expected, atol: value is expected,
    "zero too": lambda inputs, value, expected, atol: same(value, expected, DEFAULT_ATOL) or value == 0,
    "height or slant height": _surface,
    "digits aligned at either end": _digits,
}
_RULE_OF = {
    "HumanEval/32": "any root",
    "Mbpp/164": "any boolean",
    **dict.fromkeys((f"Mbpp/{n}" for n in (2, 7, 111, 140, 232, 249, 579, 769)), "same members"),
    **dict.fromkeys((f"Mbpp/{n}" for n in (737, 787, 794)), "matched or not"),
    "Mbpp/295": "zero too",
    "Mbpp/581": "height or slant height",
    "Mbpp/558": "digits aligned at either end",
    "Mbpp/255": "five inputs left out",
}
# Their values have 6 to 128 million items: too large to hand over.
_LEFT_OUT = {("Mbpp/255", i) for i in (88, 89, 93, 99, 103)}


# Assertions ----------------------------------------------------------------------------------------------------------


def _assertions(gold: Mapping[str, Any]) -> Assertions:
    lines = _texts(gold, "test_list")
    if not lines:
        raise BadGoldError("test_list is empty")
    setup = tuple(text for key in ("test_imports", "test_setup_code") for text in _texts(gold, key) if text.strip())
    known = set(dir(builtins)).union(*(_bound(_parsed(text)) for text in setup))
    known.discard(_text(gold, "entry_point", ""))
    if not any(_loaded(line) - known for line in lines):  # the function has the name of a builtin
        known -= set[str].intersection(*(_loaded(line) for line in lines))
    items = tuple(_assertion(line, known) for line in lines)
    used = {part.id for item in items for part in ast.walk(ast.parse(item.remainder)) if isinstance(part, ast.Name)}
    names = tuple(sorted({name for item in items for name in item.names}))
    return Assertions(items, names, setup, tuple(sorted((used - known) & sys.stdlib_module_names)), _atol(gold))


def _parsed(text: str) -> ast.Module:
    try:
        return ast.parse(text.strip())
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadGoldError(f"not Python: {text[:80]!r}") from error


def _bound(tree: ast.AST) -> set[str]:
    """Every name that `tree` gives a value to."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return names


def _loaded(line: str) -> set[str]:
    return {node.id for node in ast.walk(_parsed(line)) if isinstance(node, ast.Name)}


def _assertion(line: str, known: set[str]) -> Assertion:
    body = _parsed(line).body
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        raise BadGoldError(f"not one assertion: {line[:80]!r}")
    lift = _Lift(known, _bound(body[0].test))
    try:
        remainder = lift.visit(body[0].test)
        if not lift.calls:
            raise BadGoldError("it calls nothing of the program")
        calls, names = tuple(lift.calls), tuple(lift.names)
        return Assertion(calls, ast.unparse(remainder), names, _literal(remainder, len(calls)))
    except BadGoldError as error:
        raise BadGoldError(f"{error}: {line[:80]!r}") from error
    except RecursionError as error:
        raise BadGoldError(f"nested too deeply: {line[:80]!r}") from error


class _Lift(ast.NodeTransformer):
    """Takes the calls of the program out of an assertion: the rest, such as `abs(…) < 1e-6`, is never run beside it."""

    def __init__(self, known: set[str], bound: set[str]) -> None:
        self.known, self.local = known | bound, bound
        self.calls, self.names = list[str](), list[str]()

    def visit(self, node: ast.AST) -> Any:
        root, called, within = node, False, None
        while isinstance(root, ast.Call | ast.Attribute | ast.Subscript):
            called, within = called or isinstance(root, ast.Call), root
            root = root.func if isinstance(root, ast.Call) else root.value
        if not isinstance(root, ast.Name) or root.id in self.known:
            return self.generic_visit(node)
        if root.id in sys.stdlib_module_names and not isinstance(within, ast.Call):  # math.isclose(…), not math(…)
            return self.generic_visit(node)
        if not called:
            raise BadGoldError(f"{root.id} is used, but not called")
        if {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} & self.local:
            raise BadGoldError("the program is called inside a loop of the assertion")
        self.calls.append(ast.unparse(node))
        self.names.append(root.id)
        return ast.Name(f"_{len(self.calls) - 1}", ast.Load())


def _literal(test: ast.expr, calls: int) -> tuple[str, Any] | None:
    """What `_0` must be, where the remainder says no more than that."""
    if calls != 1:
        return None
    if isinstance(test, ast.Name):
        return "truth", True
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not) and isinstance(test.operand, ast.Name):
        return "truth", False
    if not isinstance(test, ast.Compare) or len(test.ops) != 1:
        return None
    left, right = test.left, test.comparators[0]
    if not isinstance(left, ast.Name):
        left, right = right, left
    if not isinstance(left, ast.Name) or left.id != "_0":
        return None
    try:
        value = ast.literal_eval(right)
        encode(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, NotPlainError):
        return None
    if isinstance(test.ops[0], ast.Is) and (value is None or isinstance(value, bool)):
        return "is", value
    return ("==", value) if isinstance(test.ops[0], ast.Eq) else None
