"""Verdicts under fuzzing: nothing escapes, nothing hangs, no number is taken for another. More: HEATBATH_FUZZ=50000."""

from __future__ import annotations

import os
import random
from typing import get_args

import pytest
import strategies as made
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from strategies import HungError, guard, verdict

from heatbath.verify.answers.reading import read
from heatbath.verify.answers.symbols import RefusedError, UnreadableError
from heatbath.verify.answers.values import Evaluation
from heatbath.verify.cascade import compare, gold_answer
from heatbath.verify.extract import POLICIES, UNCLOSED, extract

EXAMPLES = int(os.environ.get("HEATBATH_FUZZ", "2000"))
POOLED = int(os.environ.get("HEATBATH_FUZZ_POOL", "2000"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    database=None,
    suppress_health_check=list(HealthCheck),
)


@fuzzed
@given(made.drawn(made.case))
def test_no_text_breaks_a_verdict(case: tuple[str, str]) -> None:
    verdict(*case)


# These shrink: what hypothesis makes itself, piece by piece.
PIECES = st.lists(st.sampled_from(made.MATHS + made.SIGNS + made.WORDS) | st.characters(), max_size=30).map("".join)


@settings(fuzzed, max_examples=max(EXAMPLES // 4, 1))
@given(PIECES, PIECES)
def test_no_pieces_break_a_verdict(answer: str, gold: str) -> None:
    verdict(answer, gold)
    verdict(f"\\boxed{{{answer}}}", gold)


@settings(fuzzed, max_examples=max(EXAMPLES // 4, 1))
@given(made.drawn(made.completion), st.sampled_from(sorted(POLICIES)))
def test_a_policy_finds_an_answer_by_its_own_rules(text: str, policy: str) -> None:
    with guard():
        answer, rule = extract(text, policy)
    assert rule in {*POLICIES[policy], "none", UNCLOSED} and (answer is None) == (rule in ("none", UNCLOSED))


@fuzzed
@given(st.integers(0, 2**64 - 1))
@example(0)
def test_equal_numbers_are_right_and_others_never(seed: int) -> None:
    r = random.Random(seed)
    number = made.value(r)
    gold, same, other = (made.written(r, n) for n in (number, number, made.other_value(r, number)))
    assert verdict(f"So \\boxed{{{same}}}", gold) == "right", (gold, same)
    assert verdict(f"So \\boxed{{{other}}}", gold) == "wrong", (gold, other)


@settings(fuzzed, max_examples=max(EXAMPLES // 4, 1))
@given(st.integers(0, 2**64 - 1))
def test_numbers_of_any_two_values_compare_as_fractions_do(seed: int) -> None:
    r = random.Random(seed)
    a, b = (made.value(r) for _ in range(2))
    assert (verdict(f"\\boxed{{{made.written(r, a)}}}", made.written(r, b)) == "right") == (a == b)


@pytest.mark.thorough
def test_the_pool_gives_every_fuzzed_text_a_verdict_in_time() -> None:
    from heatbath.verify.math import MathGrader
    from heatbath.verify.verdict import Status

    r, deadline = random.Random(20_260), 2.0
    cases = [made.case(r) for _ in range(POOLED)]
    with MathGrader(workers=2, deadline=deadline) as grader:
        verdicts = grader.grade([completion for completion, _ in cases], [gold for _, gold in cases])
    assert len(verdicts) == POOLED
    assert {v.status for v in verdicts} <= set(get_args(Status))
    assert max(v.seconds for v in verdicts) < deadline + 5  # a worker's end and a busy machine
    crashed = [(c, v.rule) for c, v in zip(cases, verdicts, strict=True) if v.status == "crashed"]
    assert not crashed, crashed[:3]


def compared(gold: str, answer: str) -> str | None:
    expected = gold_answer(gold)
    return "bad_gold" if expected is None else compare(expected, answer)[0]


def test_the_guard_stops_what_hangs() -> None:
    with pytest.raises(HungError), guard(0.05):
        while True:
            pass


# -- bounds

TOO_MUCH = [
    *made.words(r"""
9^{9^{9}} 9^{9^{9^{9}}} (10^9)! 100000000! ((9!)!)! \binom{10^9}{5\cdot10^8} 2^{10^{9}} 10^{-10^{9}} (1/3)^{10^8}
e^{10^{12}} \pi^{\pi^{\pi^{\pi}}} 1e999999999 1e-999999999 (2^{100000})^{100000} (1.5)!^{10^{9}} 2^{2^{2^{2^{2^{2}}}}}
\sin(10^{1000}) \prod_{k=1}^{10^9}k 10^{100000}+1 \sqrt[1000000000]{2}^{10^{20}} 5000.5!!
"""),
    *("9" * 100_000, "1" + "0" * 900, "1." + "3" * 500, "1+" * 400 + "1", "x" * 2_000),
    *("(1+" * 60 + "1" + ")" * 60, "{1+" * 60 + "1" + "}" * 60, "\\sqrt{" * 60 + "2" + "}" * 60),
]


@pytest.mark.parametrize("text", TOO_MUCH, ids=lambda t: t[:24])
def test_what_no_answer_needs_is_refused_at_once(text: str) -> None:
    with guard(2):
        found = compared("5", text)
    assert found in ("refused", None, "wrong")
    if found != "refused":
        with pytest.raises((RefusedError, UnreadableError)):
            Evaluation()(read(text))


def test_a_bomb_is_not_handed_to_computer_algebra() -> None:
    unreadable = "\\int_0^x \\sin(t^2)\\,dt"
    assert compared(unreadable, "9^{9^{9^{9}}}") == "refused" and compared(unreadable, "(10^9)!") == "refused"
    assert compared("5", "\\prod_{k=1}^{10^9} k") == "refused"


def test_what_answers_need_is_not_refused() -> None:
    for gold, answer in [
        ("2^{100}", str(2**100)),
        ("50!", "50\\cdot 49!"),
        ("\\binom{100}{50}", "\\frac{100!}{50!\\cdot50!}"),
        ("10^{1000}", "100^{500}"),
        ("(" * 12 + "x" + ")" * 12, "x"),
        ("3" * 60, "3" * 60 + ".0"),
    ]:
        assert compared(gold, answer) == "right", gold


# -- what was found broken

BUGS = r"""
\text{no solution} ~ 0 ~ wrong ; \text{Monday} ~ 5 ~ wrong ; \frac{7}{2} ~ 3(\frac{1}{2}) ~ wrong
\frac{3}{2} ~ (3)(\frac12) ~ wrong ; \frac{3}{2} ~ 3(1/2) ~ wrong ; xy^2 ~ x^2y^2 ~ wrong
xy^2 ~ x\cdot y^2 ~ right ; 2ab^2 ~ 2a\cdot b^2 ~ right ; xy! ~ x\cdot y! ~ right
0.1\overline{5} ~ 0.1\overline{05} ~ wrong ; \frac{1}{11} ~ 0.0\overline{90} ~ right ; (3,2) ~ (5,4] ~ wrong
(3,2) ~ x<1 and x>2 ~ wrong ; [2,1] ~ (9,8] ~ wrong ; x ~ |x| ~ wrong None ; x ~ \sqrt{x^2} ~ wrong None
|y| ~ y ~ wrong None ; 0 ~ \lfloor x/9 \rfloor ~ wrong None ; 123 ~ 0,123 ~ wrong ; 8.5 ~ 2 125/250 ~ wrong
2.5 ~ 2 125/250 ~ right ; \{0,1\} ~ \{0,1,9\}\cap((-5,1]\cup[2,3)) ~ right
[0,1]\cup[3,4) ~ [0,4)\setminus((1,2]\cup[2,3)) ~ right ; \emptyset ~ \{0\}\cap((1,2]\cup(-1,0)) ~ right
5 ~ \lfloor\infty\rfloor ~ wrong refused None ; 5 ~ \lceil\infty-\infty\rceil ~ wrong refused None
5 ~ f(10^{5000}) ~ wrong refused None ; 5 ~ 0.1\overline{1e9999} ~ wrong refused None
5 ~ 1.5e999999999\overline{3} ~ wrong refused None ; 5 ~ \sinh(\sinh(\sinh(100))) ~ refused
(0,1) ~ 0<x<\sinh(10^9) ~ refused None wrong ; 5 ~ \lfloor\sinh(10^9)\rfloor ~ refused
5 ~ \cosh(10^{50000}) ~ refused ; 0 ~ \sin\pi ~ right ; 0 ~ \cos\frac{\pi}{2} ~ right
1 ~ \sqrt[3]{2+\sqrt5}+\sqrt[3]{2-\sqrt5} ~ right ; -\sqrt[3]{\sqrt5-2} ~ \sqrt[3]{2-\sqrt5} ~ right
6\text{ m}^2 ~ 6 ~ right ; 6\text{ m}^2 ~ 6\text{ square meters} ~ right ; \frac13 ~ 0.\overline{3} ~ right
0.5 ~ 0.2+0.3 ~ wrong ; \boxed{} ~ \boxed{} ~ bad_gold ; x-1 ~ \lceil x-1\rceil ~ wrong None
"""
BROKEN = [tuple(row.split(" ~ ")) for row in made.listed(BUGS)]
BROKEN += [
    (gold, answer, "wrong refused None")
    for gold, answer in [
        *(("5", "\\$" * 490 + "5"), ("5", "5" + "!" * 590), ("x", "x+" * 290 + "y"), ("x", "2" + "AB" * 490)),
        *(("x", "x_{\ud800}"), ("5", "sin " * 240 + "x"), ("5", "\\sqrt" * 190 + "5"), ("5", "2/" * 299 + "3")),
    ]
]


@pytest.mark.parametrize(("gold", "answer", "allowed"), BROKEN, ids=lambda text: ascii(text)[:40])
def test_what_was_broken_once(gold: str, answer: str, allowed: str) -> None:
    with guard(3):
        assert str(compared(gold, answer)) in allowed.split()
