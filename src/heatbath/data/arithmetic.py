"""The built-in task: sums and differences with worked solutions, deterministic by seed.

Every problem of the chosen size exists once, so splits are disjoint by construction; a + b and b + a count as one
problem. A solution follows one of several valid paths, so that a start can be asked whether it kept more than one.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from heatbath.data.rows import Row

PATHS = ("tens", "columns", "round")
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


def problems(digits: int, operations: tuple[str, ...], count: int, seed: int) -> list[Sum]:
    """The first `count` of all problems with numbers of that many digits, in an order fixed by the seed.

    A longer list begins with the shorter one of the same seed. Raises ValueError when fewer problems exist.
    """
    low, high = (10 ** (digits - 1) if digits > 1 else 0), 10**digits
    numbers = range(low, high)
    total = len(operations) * len(numbers) * (len(numbers) + 1) // 2
    if count > total:
        raise ValueError(f"{count} problems wanted, but only {total} exist with {digits} digits and {operations}")
    rng = random.Random(f"heatbath arithmetic {digits} {operations} {seed}")
    seen: set[Sum] = set()
    out: list[Sum] = []
    while len(out) < count:
        x, y = sorted((rng.randrange(low, high), rng.randrange(low, high)))
        operation = rng.choice(operations)
        key = Sum(y, x, operation)
        swap = rng.random() < 0.5
        if key not in seen:
            seen.add(key)
            out.append(Sum(x, y, operation) if operation == "+" and swap else key)
    return out


def solve(problem: Sum, path: str) -> str:
    """A worked solution along one of `PATHS`, ending in the answer."""
    a, b, o = problem.a, problem.b, problem.operation
    head = f"{a} {o} {b}"
    if path == "tens":  # the tens of b first, then its ones
        return f"{head} = {_apply(a, b - b % 10, o)} {o} {b % 10} = {problem.answer}"
    if path == "columns":  # tens with tens, ones with ones
        tens, ones = _apply(a - a % 10, b - b % 10, o), _apply(a % 10, b % 10, o)
        sign, ones = ("+", ones) if ones >= 0 else ("-", -ones)
        return f"{head} = {tens} {sign} {ones} = {problem.answer}"
    if path == "round":  # b rounded up to tens, then corrected
        up = -(-b // 10) * 10
        back = "-" if o == "+" else "+"
        return f"{head} = {_apply(a, up, o)} {back} {up - b} = {problem.answer}"
    raise ValueError(f"unknown path '{path}'; known: {', '.join(PATHS)}")


def rows(digits: int, operations: tuple[str, ...], paths: tuple[str, ...], count: int, seed: int) -> list[Row]:
    """Problems with one worked solution each, its path drawn by the seed from `paths`."""
    rng = random.Random(f"heatbath paths {paths} {seed}")
    return [
        Row(
            question=f"What is {p.a} {p.operation} {p.b}?",
            solution=solve(p, rng.choice(paths)),
            answer=str(p.answer),
        )
        for p in problems(digits, operations, count, seed)
    ]


def _apply(x: int, y: int, operation: str) -> int:
    return x + y if operation == "+" else x - y
