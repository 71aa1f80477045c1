"""The built-in task: right, deterministic, disjoint."""

import re

import pytest

from heatbath.data import arithmetic
from heatbath.data.arithmetic import FORMS, Sum, flawed, problems, rows, solve


def value(expression: str) -> int:
    """Left to right sum of signed integers, e.g. '70 + 15 - 2'."""
    tokens = expression.split()
    total = int(tokens[0])
    for sign, number in zip(tokens[1::2], tokens[2::2], strict=True):
        total += int(number) if sign == "+" else -int(number)
    return total


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operation", ["+", "-"])
def test_every_step_of_every_solution_is_an_equation(form: str, operation: str) -> None:
    for p in problems(2, (operation,), 400, seed=1, held_out=False):
        steps = solve(p, form).split(" = ")
        assert len(steps) == (2 if form == "bare" else 3)
        assert {value(step) for step in steps} == {p.answer}


def test_problems_are_unique_deterministic_and_extend_each_other() -> None:
    few, many = (problems(2, ("+", "-"), count, seed=0, held_out=False) for count in (100, 1000))
    assert many[:100] == few
    assert problems(2, ("+", "-"), 100, seed=1, held_out=False) != few
    assert len({(p.operation, *sorted((p.a, p.b))) for p in many}) == 1000
    assert all(p.answer >= 0 for p in many)


def test_the_whole_space_is_split_once_and_for_all_seeds() -> None:
    space = {(a, b) for a in range(10, 100) for b in range(10, a + 1)}
    sizes = {False: 3054, True: len(space) - 3054}
    drawn = {}
    for held_out, size in sizes.items():
        with pytest.raises(ValueError, match=f"only {size:,} exist"):
            problems(2, ("+",), size + 1, seed=0, held_out=held_out)
        drawn[held_out] = {
            tuple(sorted((p.a, p.b), reverse=True)) for p in problems(2, ("+",), size, 5, held_out=held_out)
        }
    assert drawn[False] | drawn[True] == space and not drawn[False] & drawn[True]


def test_rows_use_only_the_forms_asked_for_and_as_many_as_asked_for() -> None:
    sums = problems(2, ("+",), 200, 0, held_out=False)

    def made(forms: tuple[str, ...], paths: int = 1) -> list:
        return list(rows(sums, forms, paths=paths, label_noise=0.0, seed=0))

    assert all(r.solution == solve_of(r.question, "tens") for r in made(("tens",)))
    both = made(("tens", "columns"))
    shares = [sum(r.solution == solve_of(r.question, form) for r in both) / 200 for form in ("tens", "columns")]
    assert all(0.3 < share < 0.8 for share in shares)
    every = made(("tens", "columns", "bare"), paths=3)
    assert len(every) == 600
    for first in range(0, 600, 3):
        question = every[first].question
        assert {r.solution for r in every[first : first + 3]} == {
            solve_of(question, form) for form in ("tens", "columns", "bare")
        }


def test_label_noise_makes_that_share_wrong_and_leaves_the_gold_alone() -> None:
    sums = problems(2, ("+",), 2000, 0, held_out=False)
    noisy = list(rows(sums, ("tens",), paths=1, label_noise=0.3, seed=3))
    wrong = [r for r in noisy if r.solution.rpartition("= ")[2] != r.answer]
    assert abs(len(wrong) / 2000 - 0.3) < 0.04  # 4 standard deviations
    assert all(int(r.answer) == p.answer for r, p in zip(noisy, sums, strict=True))
    assert all(r.solution.split(" = ")[:2] == solve_of(r.question, "tens").split(" = ")[:2] for r in wrong)


def test_a_flaw_is_never_right_nor_negative() -> None:
    import random

    rng = random.Random(0)
    found = [flawed("1 + 0 = 1", 1, rng) for _ in range(500)]
    assert all(re.fullmatch(r"1 \+ 0 = \d+", text) and text != "1 + 0 = 1" for text in found)


def solve_of(question: str, form: str) -> str:
    a, operation, b = re.fullmatch(r"What is (\d+) ([+-]) (\d+)\?", question).groups()
    return arithmetic.solve(Sum(int(a), int(b), operation), form)
