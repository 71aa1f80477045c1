"""Verdicts: extraction rules, exact comparison, the worker, and answers that try to hang or harm it."""

import time
from fractions import Fraction

import pytest

from heatbath.verify.extract import extract, last_boxed
from heatbath.verify.math import MathGrader, plain_number
from heatbath.verify.verdict import JUDGED, STATUSES, Verdict


@pytest.fixture(scope="module")
def grader():
    with MathGrader(workers=2, deadline=3.0) as g:
        yield g


@pytest.mark.parametrize(
    ("text", "answer", "rule"),
    [
        (r"first \boxed{5}, no: \boxed{7}.", "7", "boxed"),
        (r"\boxed{\frac{1}{2}} and \boxed{unclosed", r"\frac{1}{2}", "boxed"),
        ("48/2 = 24\n#### 1,024", "1,024", "hashes"),
        ("The answer is 85.", "85", "stated"),
        ("The answer is: x + 1.", "x + 1", "stated"),
        ("47 + 38 = 77 + 8 = 85", "85", "last_number"),
        ("It is 5.\nSo: 6 or 7", "7", "last_number"),
        ("The answer is 3/4.", "3/4", "stated"),
        ("The answer is 5x + 2", "5x + 2", "stated"),
        ("The answer is 1e5", "1e5", "stated"),
        ("The answer is 2^{10}", "2^{10}", "stated"),
        ("The answer is 47 + 38 = 85.", "85", "stated"),
        ("The answer is **85**.", "85", "stated"),
        ("the answer is $1,024 dollars.", "1,024", "stated"),
        ("so .5", ".5", "last_number"),
        ("so -5", "-5", "last_number"),
        ("x = −5", "−5", "last_number"),
        ("77 - 8", "8", "last_number"),
        ("3-7", "7", "last_number"),
        ("it is 2^10", None, "none"),
        ("about 1e5", None, "none"),
        ("72 + 67 = 139.\nThat is all there is to it", "139", "last_number"),
        ("no idea", None, "none"),
        ("", None, "none"),
    ],
)
def test_extraction(text: str, answer: str | None, rule: str) -> None:
    assert extract(text) == (answer, rule)


def test_extraction_is_linear_on_hostile_text() -> None:
    for text in (
        r"\boxed{" * 20_000,
        "{" * 100_000,
        "####" * 50_000,
        "answer is " * 30_000,
        "1," * 100_000,
        "answer is" + "\n" * 20_000,
    ):
        started = time.perf_counter()
        extract(text)
        assert time.perf_counter() - started < 5  # a hang guard, not a speed claim
    assert last_boxed(r"\boxed{" * 20_000) is None


def test_plain_numbers_are_exact() -> None:
    assert plain_number("1,024.50") == Fraction(2049, 2)
    assert plain_number("-0.1") == Fraction(-1, 10)
    assert plain_number("$3/4$") == Fraction(3, 4)
    assert plain_number("85.") == 85 and plain_number(".5") == Fraction(1, 2) and plain_number("−5") == -5
    for text in ("1e5", "1/0", "١٢", "0x10", "1,02", "", "9" * 61):
        assert plain_number(text) is None


@pytest.mark.parametrize(
    ("completion", "gold", "status"),
    [
        ("so 85", "85", "right"),
        ("so 85.0", "85", "right"),
        ("so 8500", "85", "wrong"),
        ("so 0.85", "85", "wrong"),
        (r"\boxed{\frac{1}{2}}", "0.5", "right"),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", "right"),
        (r"\boxed{x^2 + 1}", "(x+1)^2", "wrong"),
        ("nothing", "85", "no_answer"),
        (r"\boxed{}", "85", "no_answer"),
        (r"\boxed{" + "1+" * 400 + "1}", "401", "refused"),
        ("so 85", " ", "bad_gold"),
    ],
)
def test_verdicts(grader: MathGrader, completion: str, gold: str, status: str) -> None:
    (verdict,) = grader.grade([completion], [gold])
    assert verdict.status == status


def test_a_bomb_is_killed_and_delays_nobody_for_good(grader: MathGrader) -> None:
    started = time.perf_counter()
    bombs = [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{(10^9)!}"]
    verdicts = grader.grade([*bombs, r"\boxed{\sqrt{4}}", "so 85"], ["5", "5", "2", "85"])
    assert [v.status for v in verdicts] == ["timeout", "timeout", "right", "right"]
    assert time.perf_counter() - started < 3.0 * 2 + 20  # both deadlines, and the workers' start on a busy machine
    assert grader.grade([r"\boxed{\sqrt{4}}"], ["2"])[0].status == "right"


def test_model_text_is_never_run(grader: MathGrader, tmp_path) -> None:
    target = tmp_path / "owned"
    attacks = [
        rf"\boxed{{__import__('pathlib').Path('{target}').touch()}}",
        rf"\boxed{{exec(\"open('{target}', 'w')\")}}",
        rf"\boxed{{(lambda: open('{target}', 'w'))()}}",
    ]
    verdicts = grader.grade(attacks, ["1"] * len(attacks))
    assert not target.exists() and "right" not in {v.status for v in verdicts}


def test_no_completion_gains_by_breaking_the_grader() -> None:
    scores = {s: Verdict(s).score for s in STATUSES}
    assert scores.pop("right") == 1.0 and scores.pop("bad_gold") is None
    assert set(scores.values()) == {0.0} and set(JUDGED) < set(STATUSES)
