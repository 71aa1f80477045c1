"""pass@k against brute force over subsets, intervals against their definition and against simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from heatbath.ideas.passk import (
    difference,
    informative_share,
    mean_with_interval,
    paired_difference,
    pass_at_k,
)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n: int) -> None:
    for right, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([i < right for i in range(n)], k))
        brute = sum(any(draw) for draw in draws) / len(draws)
        assert pass_at_k(right, n, k)[0] == pytest.approx(brute, abs=1e-12)


@pytest.mark.parametrize("n", [2, 5, 7])
def test_informative_share_is_that_of_subsets_with_a_right_and_a_wrong_sample(n: int) -> None:
    for right, group in itertools.product(range(n + 1), range(2, n + 1)):
        draws = list(itertools.combinations([i < right for i in range(n)], group))
        brute = sum(len(set(draw)) == 2 for draw in draws) / len(draws)
        assert informative_share(right, n, group)[0] == pytest.approx(brute, abs=1e-12)
    assert informative_share([0, 1, n], n, n).tolist() == [0.0, 1.0, 0.0]  # of one group: whether it was


def test_pass_at_k_takes_questions_with_different_samples() -> None:
    found = pass_at_k([0, 3, 8], [8, 4, 8], 2)
    assert found == pytest.approx([0.0, 1 - math.comb(1, 2) / math.comb(4, 2), 1.0])
    with pytest.raises(ValueError, match="pass@5 needs at least 5"):
        pass_at_k([0, 3, 8], [8, 4, 8], 5)
    with pytest.raises(ValueError, match="between 0 and"):
        pass_at_k([9], [8], 1)


def test_interval_is_scipys() -> None:
    x = np.random.default_rng(0).normal(size=23)
    found = mean_with_interval(x)
    low, high = stats.t.interval(0.95, len(x) - 1, loc=x.mean(), scale=stats.sem(x))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_paired_difference_is_scipys() -> None:
    generator = np.random.default_rng(1)
    before, after = generator.random(40), generator.random(40)
    found = paired_difference(before, after)
    expected = stats.ttest_rel(after, before).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    with pytest.raises(ValueError, match="same questions"):
        paired_difference(before, after[:-1])


def test_interval_covers_when_the_question_is_the_unit() -> None:
    """30 questions × 4 draws, 4,000 simulations: 93-96 %; pooling the 120 draws as independent falls below 90 %."""
    generator = np.random.default_rng(2)
    truth, covered, pooled = 0.5, 0, 0
    for _ in range(4000):
        ability = generator.beta(0.5, 0.5, size=30)
        draws = generator.binomial(4, ability)
        e = mean_with_interval(draws / 4)
        covered += e.low <= truth <= e.high
        p = draws.sum() / 120
        half = 1.96 * math.sqrt(p * (1 - p) / 120)
        pooled += p - half <= truth <= p + half
    assert 0.93 < covered / 4000 < 0.965
    assert pooled / 4000 < 0.9


def test_an_interval_of_scores_stays_a_score_and_never_has_no_width() -> None:
    for value in (0.0, 1.0):
        found = mean_with_interval([value] * 100, bounds=(0.0, 1.0))
        exact = stats.binomtest(int(value * 100), 100).proportion_ci(0.95, method="exact")
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
    cut = mean_with_interval([0.0] * 9 + [1.0], bounds=(0.0, 1.0))
    assert cut.low == 0.0 and cut.high == pytest.approx(mean_with_interval([0.0] * 9 + [1.0]).high)


def test_one_question_has_no_interval() -> None:
    assert math.isnan(mean_with_interval([0.5]).low)
    with pytest.raises(ValueError, match="no questions"):
        mean_with_interval([])


def test_difference_of_independent_estimates_covers() -> None:
    """32 against 24 trials of shares 0.1 and 0.4, 2,000 simulations: 93 to 98 % at a nominal 95 %."""
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(2000):
        a, b = (
            mean_with_interval((generator.random(n) < p).astype(float), bounds=(0.0, 1.0))
            for n, p in ((32, 0.1), (24, 0.4))
        )
        gap = difference(a, b)
        assert gap.mean == pytest.approx(b.mean - a.mean)
        covered += gap.low <= 0.3 <= gap.high
    assert 0.93 < covered / 2000 < 0.98


def test_an_estimate_of_one_question_has_no_bounds_in_json() -> None:
    assert mean_with_interval([0.5]).numbers() == {"mean": 0.5, "low": None, "high": None}
