"""The built-in task: right, deterministic, disjoint."""

import re

import pytest

from heatbath.data import arithmetic
from heatbath.data.arithmetic import PATHS, Sum, problems, rows, solve


def value(expression: str) -> int:
    """Left to right sum of signed integers, e.g. '70 + 15 - 2'."""
    tokens = expression.split()
    total = int(tokens[0])
    for sign, number in zip(tokens[1::2], tokens[2::2], strict=True):
        total += int(number) if sign == "+" else -int(number)
    return total


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("operation", ["+", "-"])
def test_every_step_of_every_solution_is_an_equation(path: str, operation: str) -> None:
    for p in problems(2, (operation,), 400, seed=1):
        steps = solve(p, path).split(" = ")
        assert len(steps) == 3
        assert {value(step) for step in steps} == {p.answer}


def test_problems_are_unique_deterministic_and_extend_each_other() -> None:
    few, many = problems(2, ("+", "-"), 100, seed=0), problems(2, ("+", "-"), 1000, seed=0)
    assert many[:100] == few
    assert problems(2, ("+", "-"), 100, seed=1) != few
    assert len({(p.operation, *sorted((p.a, p.b))) for p in many}) == 1000
    assert all(p.answer >= 0 for p in many)


def test_the_whole_space_can_be_drawn_and_no_more() -> None:
    assert len(problems(1, ("+",), 55, seed=0)) == 55
    with pytest.raises(ValueError, match="only 55 exist"):
        problems(1, ("+",), 56, seed=0)


def test_rows_use_only_the_paths_asked_for() -> None:
    assert all(r.solution == solve_of(r.question, "tens") for r in rows(2, ("+",), ("tens",), 50, seed=0))
    both = rows(2, ("+",), ("tens", "columns"), 200, seed=0)
    shares = [sum(r.solution == solve_of(r.question, path) for r in both) / 200 for path in ("tens", "columns")]
    assert all(0.3 < share < 0.8 for share in shares)


def solve_of(question: str, path: str) -> str:
    a, operation, b = re.fullmatch(r"What is (\d+) ([+-]) (\d+)\?", question).groups()
    return arithmetic.solve(Sum(int(a), int(b), operation), path)
