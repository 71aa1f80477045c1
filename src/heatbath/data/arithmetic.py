"""The built-in task: sums and differences with worked solutions, deterministic by seed.

Every problem of the chosen size exists once (a + b and b + a count as one problem), and a quarter of them, chosen by
content, is held out: validation and test problems of any run are trained on in none, the pretraining of the tiny base
included. A solution takes one of several forms, so that a start can be asked whether it kept more than one; a share
of the demonstrations can be made wrong.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from heatbath.data.rows import HELD_OUT, Row, position

FORMS = ("tens", "columns", "round", "ones", "bare")
OPERATIONS = ("+", "-")


@dataclass(frozen=True)
class Sum:
    """a ∘ b for ∘ in `OPERATIONS`; for a difference a ≥ b."""

    a: int
    b: int
    operation: str

    @property
    def answer(self) -> int:
        return self.a + self.b if self.operation == "+" else self.a - self.b

    @property
    def held_out(self) -> bool:
        """Whether the problem is one of those never trained on; the order of the summands does not matter."""
        low, high = sorted((self.a, self.b))
        return position(f"{low} {self.operation} {high}") < HELD_OUT


def problems(digits: int, operations: tuple[str, ...], count: int, seed: int, *, held_out: bool) -> list[Sum]:
    """The first `count` problems with numbers of that many digits, in an order fixed by the seed.

    A longer list begins with the shorter one of the same seed. Raises ValueError when fewer problems exist.
    """
    low, high = (10 ** (digits - 1) if digits > 1 else 0), 10**digits
    numbers = range(low, high)
    total = len(operations) * len(numbers) * (len(numbers) + 1) // 2
    if total > 20_000:  # too many to count; drawn without replacement, the last few would take for ever
        total = int(0.9 * total * (HELD_OUT if held_out else 1 - HELD_OUT))
    else:
        every = (Sum(max(a, b), min(a, b), o) for o in operations for a in numbers for b in numbers if b <= a)
        total = sum(p.held_out == held_out for p in every)
    if count > total:
        kind = "held-out" if held_out else "training"
        raise ValueError(
            f"{count:,} {kind} problems wanted, but only {total:,} exist with {digits} digit{'s' * (digits > 1)} and "
            f"{' '.join(operations)}"
        )
    rng = random.Random(f"heatbath arithmetic {digits} {operations} {seed}")
    seen: set[Sum] = set()
    out: list[Sum] = []
    while len(out) < count:
        x, y = sorted((rng.randrange(low, high), rng.randrange(low, high)))
        operation = rng.choice(operations)
        key = Sum(y, x, operation)
        swap = rng.random() < 0.5
        if key not in seen and key.held_out == held_out:
            seen.add(key)
            out.append(Sum(x, y, operation) if operation == "+" and swap else key)
    return out


def solve(problem: Sum, form: str) -> str:
    """A worked solution in one of `FORMS`, ending in the answer."""
    a, b, o = problem.a, problem.b, problem.operation
    head = f"{a} {o} {b}"
    if form == "tens":  # the tens of b first, then its ones
        return f"{head} = {_apply(a, b - b % 10, o)} {o} {b % 10} = {problem.answer}"
    if form == "columns":  # tens with tens, ones with ones
        tens, ones = _apply(a - a % 10, b - b % 10, o), _apply(a % 10, b % 10, o)
        sign, ones = ("+", ones) if ones >= 0 else ("-", -ones)
        return f"{head} = {tens} {sign} {ones} = {problem.answer}"
    if form == "round":  # b rounded up to tens, then corrected
        up = -(-b // 10) * 10
        back = "-" if o == "+" else "+"
        return f"{head} = {_apply(a, up, o)} {back} {up - b} = {problem.answer}"
    if form == "ones":  # the ones of b first, then its tens
        return f"{head} = {_apply(a, b % 10, o)} {o} {b - b % 10} = {problem.answer}"
    if form == "bare":  # no intermediate step
        return f"{head} = {problem.answer}"
    raise ValueError(f"unknown form '{form}'; known: {', '.join(FORMS)}")


def flawed(solution: str, answer: int, rng: random.Random) -> str:
    """The solution with a wrong last number, of the kind a slip makes: off by one, by ten, or by a lost carry."""
    wrong = answer
    while wrong == answer or wrong < 0:
        wrong = answer + rng.choice((1, -1, 2, -2, 10, -10, 9, -9))
    return f"{solution.rpartition('= ')[0]}= {wrong}"


def rows(sums: list[Sum], forms: tuple[str, ...], *, paths: int, label_noise: float, seed: int) -> Iterator[Row]:
    """`paths` rows of each problem, each solved in another of `forms` drawn by the seed; a share `label_noise` of the
    rows ends in a wrong number. `answer` is always right."""
    rng = random.Random(f"heatbath forms {forms} {paths} {label_noise} {seed}")
    for number, problem in enumerate(sums, 1):
        for form in rng.sample(forms, paths):
            solution = solve(problem, form)
            if rng.random() < label_noise:
                solution = flawed(solution, problem.answer, rng)
            question = f"What is {problem.a} {problem.operation} {problem.b}?"
            yield Row(question, solution, str(problem.answer), origin=f"problem {number}", kind=form)


def _apply(x: int, y: int, operation: str) -> int:
    return x + y if operation == "+" else x - y
