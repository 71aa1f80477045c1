"""The built-in programming task: words, programs and tests say the same, and the tests tell a slip."""

import dataclasses
import json
import random
import re
from collections.abc import Callable
from typing import Any

import pytest

from heatbath.data.functions import CONDITIONS, FORMS, Function, flawed, problems, rows, solve
from heatbath.verify.code import CodeGrader, available


def read(words: str) -> tuple[str, Callable[[int], Any]]:
    """What a person reads in one step: whether it keeps or changes, and how."""
    [n] = map(int, re.findall(r"\d+", words)) if re.search(r"\d", words) else [0]
    kinds: dict[str, tuple[str, Callable[[int], Any]]] = {
        "keep the numbers above": ("keep", lambda x: x - n >= 1),
        "keep the numbers below": ("keep", lambda x: n - x >= 1),
        "keep the numbers divisible by": ("keep", lambda x: x // n * n == x),
        "keep the numbers that are even": ("keep", lambda x: x // 2 * 2 == x),
        "keep the numbers that are odd": ("keep", lambda x: x // 2 * 2 != x),
        "add": ("change", lambda x: n + x),
        "subtract": ("change", lambda x: x + -n),
        "multiply": ("change", lambda x: n * x),
        "take each modulo": ("change", lambda x: x - x // n * n),
        "square each": ("change", lambda x: x**2),
        "negate each": ("change", lambda x: 0 - x),
    }
    return next(kinds[start] for start in sorted(kinds, key=len, reverse=True) if words.startswith(start))


def answer(question: str, xs: list[int]) -> Any:
    """The sentence, carried out."""
    sentence = re.fullmatch(r"Write f\(xs\): (.*?), (.*?), return (.*)\.", question)
    assert sentence, question
    *steps, end = sentence.groups()
    for words in steps:
        kind, call = read(words)
        xs = [x for x in xs if call(x)] if kind == "keep" else [call(x) for x in xs]
    ordered = sorted(xs)
    ends = {
        "the sum": sum(xs),
        "how many are left": len(xs),
        "them sorted": ordered,
        "them in reverse": [*reversed(xs)],
    }
    ends |= {"the largest, or 0": [0, *ordered][-1], "the smallest, or 0": (ordered or [0])[0]}
    return ends[end]


def run(program: str, xs: list[int]) -> Any:
    names: dict[str, Any] = {}
    exec(program, names)  # noqa: S102 - our own text
    return names["f"](list(xs))


def test_words_tests_and_every_form_agree() -> None:
    for function in problems(150, 3, held_out=False):
        gold = json.loads(function.gold())
        for [xs], output in zip(gold["inputs"], gold["outputs"], strict=True):
            assert answer(function.question, xs) == output
            assert [run(solve(function, form), xs) for form in FORMS] == [output] * len(FORMS), function.question


def test_a_longer_list_begins_with_the_shorter_one() -> None:
    for held_out in (False, True):
        assert problems(900, 7, held_out=held_out)[:30] == problems(30, 7, held_out=held_out)
        assert problems(30, 8, held_out=held_out) != problems(30, 7, held_out=held_out)


def test_a_threshold_off_by_one_shows_in_every_end() -> None:
    """Also where only the largest or the smallest number is returned."""
    told = 0
    for function in problems(200, 9, held_out=False):
        near = dataclasses.replace(function, condition=CONDITIONS[CONDITIONS.index(function.condition) - 1])
        wrong = [near(xs) for xs in function.tests()[0]] != function.tests()[1]
        told += wrong
        everywhere = [[x, y] for x in range(-12, 25) for y in range(-12, 25)]
        assert wrong or all(near(xs) == function(xs) for xs in everywhere), function.question
    assert told > 160  # the others are the same function, as after a multiplication by 9


def test_every_problem_has_words_of_its_own_and_one_side() -> None:
    with pytest.raises(ValueError, match="only 8,") as told:
        problems(10**6, 0, held_out=False)
    training = int(str(told.value).split("only ")[1].split(" ")[0].replace(",", ""))
    seen = {f.question for f in problems(training, 0, held_out=False)}
    with pytest.raises(ValueError, match="held-out problems wanted, but only 2,") as told:
        problems(10**6, 0, held_out=True)
    held = int(str(told.value).split("only ")[1].split(" ")[0].replace(",", ""))
    unseen = {f.question for f in problems(held, 1, held_out=True)}
    assert len(seen) == training and len(unseen) == held and not seen & unseen
    assert 0.23 < held / (training + held) < 0.27


def test_a_slip_is_another_problem_that_the_tests_tell() -> None:
    rng = random.Random(0)
    for function in problems(80, 4, held_out=False):
        slip = flawed(function, rng)
        parts = [getattr(slip, part) != getattr(function, part) for part in Function.__dataclass_fields__]
        assert sum(parts) == 1
        gold = json.loads(function.gold())
        assert any(
            run(solve(slip, "steps"), xs) != out for [xs], out in zip(gold["inputs"], gold["outputs"], strict=True)
        )


def test_rows_show_as_many_forms_as_asked_for_and_as_many_slips() -> None:
    functions = problems(300, 0, held_out=False)
    made = list(rows(functions, ("steps", "loop", "chain"), paths=2, label_noise=0.2, seed=0))
    assert len(made) == 600 and {row.kind for row in made} == {"steps", "loop", "chain"}
    assert made == list(rows(functions, ("steps", "loop", "chain"), paths=2, label_noise=0.2, seed=0))
    right = [
        row.solution == solve(f, row.kind) for f, row in zip([f for f in functions for _ in "12"], made, strict=True)
    ]
    assert 0.75 < sum(right) / 600 < 0.85


@pytest.mark.skipif(bool(available("bubblewrap")), reason="needs bubblewrap")
def test_the_sandbox_judges_them_as_the_tests_do() -> None:
    rng, functions = random.Random(1), problems(4, 5, held_out=True)
    slips = [flawed(function, rng) for function in functions]
    programs = [solve(f, form) for f, form in zip([*functions, *slips], [*FORMS, *FORMS], strict=True)]
    with CodeGrader() as grader:
        verdicts = grader.grade(programs, [f.gold() for f in functions] * 2)
    assert [v.status for v in verdicts] == ["right"] * 4 + ["wrong"] * 4
