"""Pairwise win rates, and the length-controlled rate on planted preferences."""

import hashlib
import json
import re

import numpy as np
import pytest
from judge_server import (
    endpoint,
    rates,
    said,
    script_server,  # noqa: F401 - the fixture `serving`
)
from scipy.special import expit

from heatbath.errors import DataError
from heatbath.verify import judge as mt
from heatbath.verify import win_rate as wr
from heatbath.verify.endpoint import Reply
from heatbath.verify.win_rate import Pair, label, length_controlled, weighted_rate, win_rate


def shown(request: dict) -> tuple[str, str]:
    text = request["messages"][-1]["content"]
    return tuple(re.findall(r"<answer [AB]>\n(.*?)\n</answer", text, flags=re.DOTALL))


def pairs_of(lengths: list[int], reference: int = 100) -> list[Pair]:
    return [Pair(i, f"question {i}", "p" * n, "r" * reference) for i, n in enumerate(lengths)]


@pytest.mark.parametrize(
    ("text", "margin"),
    [
        ("so: [[A>>B]]", 2),
        ("[[A>B]] indeed, [[A>B]]", 1),
        ("[[A=B]]", 0),
        ("[[B>A]]", -1),
        ("[[B>>A]]", -2),
        ("[[A<B]]", -1),
        ("[[B]]", -1),
        ("[[C]]", 0),
        ("[[A>B]] no, [[B>A]]", None),
        ("A>B", None),
        ("[[A>A]]", None),
        ("", None),
    ],
)
def test_labels(text: str, margin: int | None) -> None:
    got, problem = label(Reply(text))
    assert got == margin and bool(problem) == (margin is None)


def test_a_judge_with_a_favourite_place_gives_ties(serving) -> None:
    server = serving(lambda request, number: said("[[A>>B]]"))
    pairs = pairs_of([50, 100, 150, 200])
    for rule in ("agree", "battles"):
        result = win_rate(endpoint(server), pairs, rule=rule)
        assert (result.wins, result.ties, result.losses, result.disagreements) == (0, 4, 0, 4)
        assert result.rate.mean == 0.5 and result.first_preferred == 1.0
        assert result.controlled.rate.mean == pytest.approx(0.5)


def test_both_orders_are_asked_and_the_better_answer_wins(serving) -> None:
    def script(request: dict, number: int) -> tuple[int, dict, str]:
        a, _ = shown(request)
        wins, i = a.startswith("p"), int(re.search(r"question (\d+)", request["messages"][-1]["content"]).group(1))
        if i % 4 == 0:
            return said("[[B>A]]" if wins else "[[A>B]]")  # the reference wins
        return said("[[A=B]]" if i % 4 == 1 else "[[A>B]]" if wins else "[[B>>A]]")

    server = serving(script)
    pairs = pairs_of([90, 110] * 20)
    result = win_rate(endpoint(server), pairs)
    assert (result.wins, result.ties, result.losses) == (20, 10, 10) and result.rate.mean == pytest.approx(0.625)
    assert len(server.requests) == 80 and result.rate.questions == 40
    assert {shown(r)[0][0] for r in server.requests} == {"p", "r"}
    battles = win_rate(endpoint(server), pairs, rule="battles", strong=3)
    # per pair: 1 + 3 battles won (20 pairs), 2 ties, 2 lost
    assert battles.rate.mean == pytest.approx((20 * 4 + 10 * 1) / (20 * 4 + 10 * 2 + 10 * 2))
    assert "wins ties losses   20 10 10" in str(result) and "length-controlled" in str(result)
    assert json.loads(json.dumps(result.report()))["controlled"]["rate"]["questions"] == 40


def test_pairs_without_a_label_in_both_orders_are_left_out_and_counted(serving) -> None:
    def script(request: dict, number: int) -> tuple[int, dict, str]:
        a, _ = shown(request)
        bad = "question 2" in request["messages"][-1]["content"] and a.startswith("p")
        return said("hard to say") if bad else said("[[A>B]]" if a.startswith("p") else "[[B>A]]")

    result = win_rate(endpoint(serving(script)), pairs_of([90, 110, 120, 130]))
    assert [(g.id, g.policy_first, g.problem) for g in result.failed] == [(2, True, "no label")]
    assert result.wins == 3 and result.rate.mean == 1.0 and 0.2 < result.rate.low < 1.0
    assert "3 of 4 pairs" in str(result) and "1 games, first 2: no label in '…hard to say'" in str(result)
    silent = win_rate(endpoint(serving(lambda request, number: said("?"))), pairs_of([90, 110]))
    assert silent.rate is None and silent.controlled is None and len(silent.failed) == 4 and str(silent)


def test_pairs_need_ids_of_their_own_and_prompts_known_fields(serving) -> None:
    client = endpoint(serving(rates))
    with pytest.raises(DataError, match="same id"):
        win_rate(client, [*pairs_of([1]), *pairs_of([2])])
    with pytest.raises(DataError, match="unknown fields: 'reference'"):
        win_rate(client, pairs_of([1]), prompts=mt.Prompts("x", {"pair": mt.Template("", "{question} {reference}")}))


def test_a_judge_of_length_alone_is_seen_through(serving) -> None:
    """The policy writes more on most questions, the judge takes the longer answer: raw far above, controlled at ½."""

    def script(request: dict, number: int) -> tuple[int, dict, str]:
        a, b = shown(request)
        chance = expit((len(a) - len(b)) / 60)
        digest = hashlib.sha256("".join(sorted((a, b))).encode()).digest()
        drawn = int.from_bytes(digest[:4], "big") / 2**32  # one draw per pair, the same in both orders
        longer_first = len(a) >= len(b)
        prefers_longer = drawn < max(chance, 1 - chance)
        return said("[[A>B]]" if prefers_longer == longer_first else "[[B>A]]")

    lengths = np.random.default_rng(0).normal(360, 90, 200).round().astype(int).tolist()
    pairs = [
        Pair(i, f"question {i}", f"{i:04d}" + "p" * (n - 4), f"{i:04d}" + "r" * 296) for i, n in enumerate(lengths)
    ]
    result = win_rate(endpoint(serving(script), concurrency=4), pairs)
    assert result.rate.low > 0.6
    assert result.controlled.rate.low < 0.5 < result.controlled.rate.high
    assert abs(result.controlled.rate.mean - 0.5) < 0.08 and result.controlled.length_effect > 1


# --- the length-controlled rate, on planted preferences ---


def planted(
    theta: float, phi: float, *, shift: float = 0.8, count: int = 4000, seed: int = 0, psi: float | None = None
):
    """Outcomes drawn from the very model; `shift` standard deviations by which the policy is longer."""
    rng = np.random.default_rng(seed)
    delta = rng.normal(300 * shift, 300, count).round()
    gamma = rng.normal(0, 1, count)
    z = theta + phi * np.tanh(delta / delta.std(ddof=1)) + (psi or 0.0) * gamma
    return (rng.random(count) < expit(z)).astype(float), delta, gamma


def test_planted_coefficients_are_recovered() -> None:
    for theta, phi in [(0.0, 0.0), (0.5, 1.5), (-1.0, 2.0), (0.7, -1.0)]:
        s, delta, _ = planted(theta, phi)
        found = length_controlled(s, delta)
        assert found.ability == pytest.approx(theta, abs=0.2) and found.length_effect == pytest.approx(phi, abs=0.25)
        assert found.rate.low < expit(theta) < found.rate.high


def test_a_judge_that_ignores_length_has_controlled_equal_raw() -> None:
    for theta in (-1.0, 0.0, 1.2):
        s, delta, _ = planted(theta, 0.0, count=6000)
        assert length_controlled(s, delta).rate.mean == pytest.approx(s.mean(), abs=0.02)


def test_a_judge_of_length_alone_has_half_even_where_it_never_errs() -> None:
    s, delta, _ = planted(0.0, 2.0, shift=1.0)
    found = length_controlled(s, delta)
    assert s.mean() > 0.7 and found.rate.mean == pytest.approx(0.5, abs=0.03)
    sure = (delta > 0).astype(float)  # separable: without the ridge φ would be infinite
    found = length_controlled(sure, delta)
    assert sure.mean() > 0.8 and found.rate.mean == pytest.approx(0.5, abs=0.08) and np.isfinite(found.length_effect)


def test_difficulty_is_a_term_of_its_own() -> None:
    s, delta, gamma = planted(0.4, 1.0, psi=-1.5)
    found = length_controlled(s, delta, difficulty=gamma)
    assert found.difficulty_effect == pytest.approx(-1.5, abs=0.2) and found.ability == pytest.approx(0.4, abs=0.15)
    assert found.rate.low < expit(0.4 - 1.5 * gamma).mean() < found.rate.high
    assert length_controlled(s, delta).difficulty_effect is None


def test_the_fit_is_the_maximum_of_the_penalised_likelihood() -> None:
    s, delta, gamma = planted(0.3, 1.0, count=50, psi=0.5)
    w = np.where(gamma > 0, 4.0, 1.0)
    found = length_controlled(s, delta, weights=w, difficulty=gamma)
    beta = np.array([found.ability, found.length_effect, found.difficulty_effect])
    X = np.stack([np.ones(50), np.tanh(delta / delta.std(ddof=1)), gamma], 1)
    np.testing.assert_allclose(X.T @ (w * (s - expit(X @ beta))), wr.RIDGE * beta, atol=1e-4)
    doubled = length_controlled(*(np.concatenate([x, x]) for x in (s, delta)))
    single = length_controlled(s, delta)
    assert doubled.rate.high - doubled.rate.low < 0.8 * (single.rate.high - single.rate.low)


def test_intervals_cover_the_truth() -> None:
    theta, phi, hits, raw_hits, draws = 0.4, 1.2, 0, 0, 300
    truth = expit(theta)
    everything = planted(theta, phi, count=200_000)[0].mean()
    for seed in range(draws):
        s, delta, _ = planted(theta, phi, count=150, seed=seed + 1)
        found, raw = length_controlled(s, delta).rate, weighted_rate(s, np.ones(150))
        hits += found.low <= truth <= found.high
        raw_hits += raw.low <= everything <= raw.high
    assert 0.91 <= hits / draws <= 0.985 and 0.91 <= raw_hits / draws <= 0.985


def test_lengths_without_spread_or_on_one_side() -> None:
    same = length_controlled([1, 1, 0, 1], [5, 5, 5, 5])
    assert same.rate.mean == pytest.approx(0.75, abs=0.01) and same.length_effect == 0 and same.extrapolated
    equal = length_controlled([1, 0, 0, 1], [0, 0, 0, 0])
    assert not equal.extrapolated and equal.rate.mean == pytest.approx(0.5)
    assert length_controlled([1, 1, 1, 1], [-5, 5, 9, -9]).rate.mean > 0.95
    for scores, delta in (([1], [3]), ([1, 0], [3])):
        with pytest.raises(ValueError, match="needs two questions"):
            length_controlled(scores, delta)
