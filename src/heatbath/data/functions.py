"""The built-in programming task: functions of a list of numbers, with hidden tests, deterministic by seed.

A problem names a condition, a change and an end in words ("keep the numbers above 4, multiply each by 3, return the
sum"). Every one exists once, and a quarter of them, chosen by content, is held out: validation and test problems of any
run are trained on in none. A solution is a program in one of several forms; a share of the demonstrations can be wrong.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import operator
import random
from collections.abc import Callable, Iterator
from typing import Any

from heatbath.data.rows import HELD_OUT, Row, position

FORMS = ("expression", "steps", "loop", "chain")
NUMBERS = range(-12, 25)  # what the lists of the tests hold
SHORT_LISTS = 10  # of the tests, beside none, all and each one of `NUMBERS`


@dataclasses.dataclass(frozen=True)
class Step:
    """Part of a problem: in words, as code (of x; an end's has {} for the list), and as what it does."""

    words: str
    code: str
    call: Callable[..., Any] = dataclasses.field(compare=False)

    def of(self, n: int) -> Step:
        """The same with a number for {n}."""
        return Step(self.words.format(n=n), self.code.format(n=n), lambda x: self.call(x, n))


CONDITIONS = [
    *(Step("above {n}", "x > {n}", operator.gt).of(n) for n in range(1, 10)),
    *(Step("below {n}", "x < {n}", operator.lt).of(n) for n in range(1, 10)),
    *(Step("divisible by {n}", "x % {n} == 0", lambda x, n: x % n == 0).of(n) for n in range(3, 10)),
    Step("that are even", "x % 2 == 0", lambda x: x % 2 == 0),
    Step("that are odd", "x % 2 == 1", lambda x: x % 2 == 1),
]
CHANGES = [
    *(Step("add {n} to each", "x + {n}", operator.add).of(n) for n in range(1, 10)),
    *(Step("subtract {n} from each", "x - {n}", operator.sub).of(n) for n in range(1, 10)),
    *(Step("multiply each by {n}", "x * {n}", operator.mul).of(n) for n in range(2, 10)),
    *(Step("take each modulo {n}", "x % {n}", operator.mod).of(n) for n in range(2, 10)),
    Step("square each", "x * x", lambda x: x * x),
    Step("negate each", "-x", operator.neg),
]
ENDS = [
    Step("the sum", "sum({})", sum),
    Step("how many are left", "len({})", len),
    Step("the largest, or 0", "max({}, default=0)", lambda xs: max(xs, default=0)),
    Step("the smallest, or 0", "min({}, default=0)", lambda xs: min(xs, default=0)),
    Step("them sorted", "sorted({})", sorted),
    Step("them in reverse", "{}[::-1]", lambda xs: xs[::-1]),
]
PARTS = {"condition": CONDITIONS, "change": CHANGES, "end": ENDS}


@dataclasses.dataclass(frozen=True)
class Function:
    """Keep what meets the condition and change it, or the other way round; then the end."""

    condition: Step
    change: Step
    end: Step
    changed_first: bool

    @property
    def question(self) -> str:
        keep = f"keep the numbers {self.condition.words}"
        steps = (self.change.words, keep) if self.changed_first else (keep, self.change.words)
        return f"Write f(xs): {steps[0]}, {steps[1]}, return {self.end.words}."

    @property
    def held_out(self) -> bool:
        """Whether the problem is one of those never trained on."""
        return position(self.question) < HELD_OUT

    def __call__(self, xs: list[int]) -> int | list[int]:
        """What a right program returns."""
        condition, change = self.condition.call, self.change.call
        left = filter(condition, map(change, xs)) if self.changed_first else map(change, filter(condition, xs))
        result: int | list[int] = self.end.call(list(left))
        return result

    def tests(self) -> tuple[list[list[int]], list[int | list[int]]]:
        """Inputs and outputs, the same for the same problem. A largest or smallest number shows a slip only where few
        others stand beside it: each number is also a list of its own."""
        rng = random.Random(f"heatbath functions {self.question}")
        lists = [[], rng.sample(NUMBERS, len(NUMBERS)), *([x] for x in NUMBERS)]
        lists += [rng.choices(NUMBERS, k=rng.randint(1, 4)) for _ in range(SHORT_LISTS)]
        return lists, [self(xs) for xs in lists]

    def gold(self) -> str:
        """The tests as `verify.code` reads them."""
        inputs, outputs = self.tests()
        return json.dumps({"entry_point": "f", "inputs": [[xs] for xs in inputs], "outputs": outputs})


def problems(count: int, seed: int, *, held_out: bool) -> list[Function]:
    """The first `count` problems in an order fixed by the seed: a longer list begins with the shorter one. Raises
    ValueError when fewer exist."""
    every = (Function(*parts) for parts in itertools.product(*PARTS.values(), (False, True)))
    found = [function for function in every if function.held_out == held_out]
    if count > len(found):
        kind = "held-out" if held_out else "training"
        raise ValueError(f"{count:,} {kind} problems wanted, but only {len(found):,} exist")
    random.Random(f"heatbath functions {seed}").shuffle(found)
    return found[:count]


def solve(function: Function, form: str) -> str:
    """A right program in one of `FORMS`."""
    test, change, end = function.condition.code, function.change.code, function.end.code
    first = function.changed_first
    if form == "expression":  # one comprehension
        inner = (
            f"[y for y in [{change} for x in xs] if {_in(test, 'y')}]" if first else f"[{change} for x in xs if {test}]"
        )
        return f"def f(xs):\n    return {end.format(inner)}"
    if form == "steps":  # a list after each step
        lines = [f"    xs = [x for x in xs if {test}]", f"    xs = [{change} for x in xs]"]
        return "\n".join(["def f(xs):", *(reversed(lines) if first else lines), f"    return {end.format('xs')}"])
    if form == "loop":  # numbers appended one by one
        own, kept = (test, change) if not first else (_in(test, "y"), "y")
        body = [f"        if {own}:", f"            ys.append({kept})"]
        lines = [f"        y = {change}", *body] if first else body
        head = ["def f(xs):", "    ys = []", "    for x in xs:"]
        return "\n".join([*head, *lines, f"    return {end.format('ys')}"])
    if form == "chain":  # map and filter
        calls = [f"filter(lambda x: {test}, {{}})", f"map(lambda x: {change}, {{}})"]
        one, two = reversed(calls) if first else calls
        return (
            f"def f(xs):\n    ys = {one.format('xs')}\n    ys = list({two.format('ys')})\n    return {end.format('ys')}"
        )
    raise ValueError(f"unknown form '{form}'; known: {', '.join(FORMS)}")


def flawed(function: Function, rng: random.Random) -> Function:
    """The problem that a slip takes this one for: another condition, change, end or order, told apart by the tests."""
    inputs, outputs = function.tests()
    while True:
        part = rng.choice(("condition", "change", "end", "order"))
        if part == "order":
            slip = dataclasses.replace(function, changed_first=not function.changed_first)
        else:
            slip = dataclasses.replace(function, **{part: rng.choice(PARTS[part])})
        if [slip(xs) for xs in inputs] != outputs:
            return slip


def rows(
    functions: list[Function], forms: tuple[str, ...], *, paths: int, label_noise: float, seed: int
) -> Iterator[Row]:
    """`paths` rows of each problem, each solved in another of `forms` drawn by the seed; a share `label_noise` of the
    rows solves another problem. `answer`, the tests, is always right."""
    rng = random.Random(f"heatbath programs {forms} {paths} {label_noise} {seed}")
    for number, function in enumerate(functions, 1):
        question, gold = function.question, function.gold()
        for form in rng.sample(forms, paths):
            shown = flawed(function, rng) if rng.random() < label_noise else function
            yield Row(question, solve(shown, form), gold, origin=f"problem {number}", kind=form)


def _in(code: str, name: str) -> str:
    """An expression in x as one in another name."""
    return code.replace("x", name)
