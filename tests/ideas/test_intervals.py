"""Intervals and tests against scipy, statsmodels, their definition and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from heatbath.ideas import intervals
from heatbath.ideas.intervals import (
    Estimate,
    bootstrap_interval,
    crossed,
    difference,
    holm,
    mean_with_interval,
    minimum_detectable_effect,
    paired_difference,
    paired_test,
)

SIMULATIONS = 10_000


def benchmarks(draw: np.random.Generator, abilities: tuple[float, float] = (0.5, 0.5)) -> np.ndarray:
    """Right answers of 30 questions × 4 runs, [simulations, Q]; abilities differ between questions."""
    return draw.binomial(4, draw.beta(*abilities, size=(SIMULATIONS, 30)))


def test_interval_is_scipys() -> None:
    x = np.random.default_rng(0).normal(size=23)
    found = mean_with_interval(x)
    low, high = stats.t.interval(0.95, len(x) - 1, loc=x.mean(), scale=stats.sem(x))
    assert (found.low, found.high) == pytest.approx((low, high))
    narrow = mean_with_interval(x, confidence=0.8)
    assert (narrow.low, narrow.high) == pytest.approx(stats.t.interval(0.8, 22, loc=x.mean(), scale=stats.sem(x)))


def clustered(draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Values of 60 questions in 13 groups of unequal size, alike within each."""
    group = draw.integers(13, size=60)
    return draw.normal(size=13)[group] + 0.3 * draw.normal(size=60), group


def test_groups_are_statsmodels_clusters() -> None:
    statsmodels = pytest.importorskip("statsmodels.api", reason="statsmodels is the comparison")
    x, group = clustered(np.random.default_rng(1))
    fitted = statsmodels.OLS(x, np.ones(60)).fit(cov_type="cluster", cov_kwds={"groups": group}, use_t=True)
    found = mean_with_interval(x, groups=[f"passage {g}" for g in group])
    assert (found.low, found.high) == pytest.approx(tuple(fitted.conf_int()[0]))
    assert paired_test(np.zeros(60), x, groups=group).p == pytest.approx(fitted.pvalues[0])
    assert paired_difference(np.ones(60), 1 + x, groups=group).high == pytest.approx(found.high)
    assert found.high - found.low > 1.5 * (mean_with_interval(x).high - mean_with_interval(x).low)


def test_groups_of_one_question_are_no_groups() -> None:
    x = np.random.default_rng(2).integers(0, 5, size=20) / 4
    each = np.arange(20)[::-1]
    for found, plain in (
        (mean_with_interval(x, groups=each), mean_with_interval(x)),
        (bootstrap_interval(x, groups=each), bootstrap_interval(x)),
    ):
        assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=1e-12)
    assert minimum_detectable_effect(x, groups=each) == pytest.approx(minimum_detectable_effect(x))
    with pytest.raises(ValueError, match="every question needs its group: 20 questions, 19 groups"):
        mean_with_interval(x, groups=each[:-1])


def test_one_question_or_one_group_decides_nothing() -> None:
    alike = ["a"] * 5
    for found in (
        mean_with_interval([0.5]),
        mean_with_interval([0.1, 0.2, 0.3, 0.4, 0.5], groups=alike),
        bootstrap_interval([0.5]),
        bootstrap_interval([0.1, 0.2, 0.3, 0.4, 0.5], groups=alike),
    ):
        assert math.isnan(found.low) and math.isnan(found.high) and not math.isnan(found.mean)
    assert math.isnan(minimum_detectable_effect([0.5])) and math.isnan(
        minimum_detectable_effect([0.1, 0.9], groups=["a", "a"])
    )
    assert paired_test([0.25], [0.75]).p == 1.0 and paired_test([0.2, 0.3], [0.4, 0.9], groups=["a", "a"]).p == 1.0
    for f in (mean_with_interval, bootstrap_interval, minimum_detectable_effect):
        with pytest.raises(ValueError, match="no questions"):
            f([])
    assert mean_with_interval([0.5]).numbers() == {"mean": 0.5, "low": None, "high": None}


def test_an_interval_of_scores_stays_a_score_and_never_has_no_width() -> None:
    for value, f in itertools.product((0.0, 1.0), (mean_with_interval, bootstrap_interval)):
        found = f([value] * 100, bounds=(0.0, 1.0))
        exact = stats.binomtest(int(value * 100), 100).proportion_ci(0.95, method="exact")
        assert (found.low, found.high) == pytest.approx((exact.low, exact.high))
        alike = f([value] * 100, bounds=(0.0, 1.0), groups=list(range(20)) * 5)  # 20 trials, not 100
        exact = stats.binomtest(int(value * 20), 20).proportion_ci(0.95, method="exact")
        assert (alike.low, alike.high) == pytest.approx((exact.low, exact.high))
    mixed = [1.0] * 9 + [0.0] * 4
    assert bootstrap_interval(mixed, bounds=(0.0, 1.0)) == bootstrap_interval(mixed)
    cut = mean_with_interval([0.0] * 9 + [1.0], bounds=(0.0, 1.0))
    assert cut.low == 0.0 and cut.high == pytest.approx(mean_with_interval([0.0] * 9 + [1.0]).high)
    rated = mean_with_interval([10.0] * 8, bounds=(1.0, 10.0))
    assert rated.high == 10.0 and rated.low == pytest.approx(10 - 9 * (1 - 0.025 ** (1 / 8)))


@pytest.mark.thorough
def test_intervals_cover_when_the_question_is_the_unit() -> None:
    """30 questions × 4 runs at a nominal 95 %: t covers 93 to 96 %, the bootstrap 92 to 96 %; pooling the 120 draws as
    independent, below 90 %."""
    covered = {"t": 0, "bootstrap": 0, "pooled": 0}
    for x in benchmarks(np.random.default_rng(3)) / 4:
        found = mean_with_interval(x)
        covered["t"] += found.low <= 0.5 <= found.high
        found = bootstrap_interval(x, resamples=1000)
        covered["bootstrap"] += found.low <= 0.5 <= found.high
        half = 1.96 * math.sqrt(x.mean() * (1 - x.mean()) / 120)
        covered["pooled"] += abs(x.mean() - 0.5) <= half
    assert 0.93 < covered["t"] / SIMULATIONS < 0.96
    assert 0.92 < covered["bootstrap"] / SIMULATIONS < 0.96
    assert covered["pooled"] / SIMULATIONS < 0.9


def test_paired_intervals_cover_and_paired_tests_keep_their_level_and_power() -> None:
    """Of 30 questions × 4 runs, with a true difference of 0 and of the minimum detectable effect."""
    draw = np.random.default_rng(4)
    ability = draw.beta(2, 2, size=(SIMULATIONS, 30)) * 0.6
    thirty, mde = np.resize([1.0, -1.0], 30), 0.0
    for _ in range(4):  # the scatter depends a little on the difference itself
        scatter = (draw.binomial(4, ability + mde) - draw.binomial(4, ability)).std() / 4
        mde = minimum_detectable_effect(thirty * scatter / thirty.std(ddof=1))
    covered = false = found = 0
    for p in ability:
        before, same, better = (draw.binomial(4, q) / 4 for q in (p, p, p + mde))
        estimate = paired_difference(before, better)
        covered += estimate.low <= mde <= estimate.high
        false += paired_test(before, same).p < 0.05
        found += paired_test(before, better).p < 0.05
    assert 0.93 < covered / SIMULATIONS < 0.96
    assert 0.035 < false / SIMULATIONS < 0.055
    assert found / SIMULATIONS == pytest.approx(0.8, abs=0.03)


def test_mcnemar_keeps_its_level() -> None:
    draw = np.random.default_rng(5)
    p = draw.beta(0.5, 0.5, size=(SIMULATIONS, 100))
    before, after = draw.binomial(1, p), draw.binomial(1, p)
    rejected = sum(paired_test(a, b).p < 0.05 for a, b in zip(before, after, strict=True))
    assert 0.01 < rejected / SIMULATIONS < 0.05


def test_paired_difference_and_t_test_are_scipys() -> None:
    generator = np.random.default_rng(6)
    before, after = generator.random(40), generator.random(40)
    expected = stats.ttest_rel(after, before)
    found, tested = paired_difference(before, after), paired_test(before, after)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert (tested.p, tested.test, tested.questions) == (pytest.approx(expected.pvalue), "paired t", 40)
    assert paired_test(after, before).p == pytest.approx(tested.p)
    for f in (paired_difference, paired_test):
        with pytest.raises(ValueError, match="same questions: 40 before, 39 after"):
            f(before, after[:-1])


def test_zeros_and_ones_are_tested_by_mcnemars_exact_test() -> None:
    mcnemar = pytest.importorskip(
        "statsmodels.stats.contingency_tables", reason="statsmodels is the comparison"
    ).mcnemar
    draw = np.random.default_rng(7)
    for _ in range(50):
        before, after = draw.binomial(1, 0.5, size=(2, int(draw.integers(1, 60))))
        table = [[((before == i) & (after == j)).sum() for j in (0, 1)] for i in (0, 1)]
        found = paired_test(before, after)
        assert found.p == pytest.approx(mcnemar(table, exact=True).pvalue) and found.test == "exact McNemar"
        assert found.differing == table[0][1] + table[1][0]
    assert paired_test([0.0, 1.0, 1.0], [1.0, 0.0, 0.5]).test == "paired t"
    assert (
        paired_test([0, 1, 1, 0], [1, 0, 1, 1], groups=["a", "b", "c", "a"]).test == "paired t"
    )  # its questions are not independent


def test_differences_without_scatter_are_counted() -> None:
    tied = np.array([0.1, 0.3, 0.2, 0.7])
    found = paired_test(tied, tied + 0.1)  # not alike to the last bit
    assert (found.p, found.test, found.differing) == (2 * 0.5**4, "sign test", 4)
    assert paired_test(tied, tied).p == 1.0 and paired_test(tied, tied).differing == 0
    assert math.isnan(minimum_detectable_effect((tied + 0.1) - tied))


def test_minimum_detectable_effect_is_statsmodels() -> None:
    power = pytest.importorskip("statsmodels.stats.power", reason="statsmodels is the comparison").TTestPower()
    draw = np.random.default_rng(8)
    for n, alpha, wanted in ((5, 0.05, 0.8), (30, 0.05, 0.8), (30, 0.01, 0.9), (1319, 0.05, 0.8)):
        d = draw.normal(size=n)
        solved = power.solve_power(nobs=n, alpha=alpha, power=wanted) * d.std(ddof=1)
        assert minimum_detectable_effect(d, alpha=alpha, power=wanted) == pytest.approx(solved, rel=1e-4)


def test_holm_is_statsmodels() -> None:
    multipletests = pytest.importorskip("statsmodels.stats.multitest", reason="the comparison").multipletests
    draw = np.random.default_rng(9)
    for m in (1, 2, 9):
        p = draw.beta(0.3, 1, size=m).round(2)  # with ties
        assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    assert holm([0.02, math.nan, 0.01]) == pytest.approx([0.02, math.nan, 0.02], nan_ok=True)
    assert holm([]).shape == (0,)


def test_bootstrap_is_scipys() -> None:
    draw = np.random.default_rng(10)
    lattices = ((4, 50), (1, 400))  # their means have few values: a bound may be the next one
    data = [(draw.beta(0.3, 1, size=40), 0.0)]
    data += [(draw.binomial(runs, 0.2, size=n) / runs, 1 / runs / n) for runs, n in lattices]
    for x, step in data:
        theirs = stats.bootstrap((x,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(11))
        width = theirs.confidence_interval.high - theirs.confidence_interval.low
        found = bootstrap_interval(x)
        for ours, other in zip((found.low, found.high), theirs.confidence_interval, strict=True):
            assert ours == pytest.approx(other, abs=max(0.03 * width, step + 1e-9))
        assert found.mean == pytest.approx(x.mean()) and found.questions == len(x)


def test_bootstrap_of_a_ratio_is_scipys_and_paired() -> None:
    draw = np.random.default_rng(12)
    before = draw.beta(2, 2, size=60)
    after = before * draw.beta(8, 2, size=60)
    found = bootstrap_interval(np.column_stack([before, after]), lambda m: m[:, 1] / m[:, 0], confidence=0.9)
    theirs = stats.bootstrap(
        (after, before),
        lambda a, b, axis: a.mean(axis) / b.mean(axis),
        paired=True,
        vectorized=True,
        confidence_level=0.9,
        n_resamples=20_000,
        rng=np.random.default_rng(13),
    ).confidence_interval
    assert found.mean == pytest.approx(after.mean() / before.mean())
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=0.04 * (theirs.high - theirs.low))


def test_bootstrap_corrects_for_bias_as_scipys_does() -> None:
    """The variance of 12 values: the draws' is smaller by a twelfth on average."""
    x = np.random.default_rng(17).normal(size=12)
    found = bootstrap_interval(np.column_stack([x, x * x]), lambda m: m[:, 1] - m[:, 0] ** 2)
    theirs = stats.bootstrap((x,), np.var, n_resamples=20_000, rng=np.random.default_rng(18)).confidence_interval
    percentile = stats.bootstrap((x,), np.var, method="percentile", rng=np.random.default_rng(19)).confidence_interval
    width = theirs.high - theirs.low
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=0.04 * width)
    assert theirs.high - percentile.high > 0.2 * width  # the correction matters here


def test_equal_values_drawn_together_are_the_same_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts of equal values or question by question, in one piece or in many."""
    x = np.random.default_rng(14).binomial(2, 0.3, size=200) / 2
    together = bootstrap_interval(x)
    monkeypatch.setattr(intervals, "AT_ONCE", 1000)
    drawn = intervals._resampled(np.ones((200, 2)), np.ones(200, dtype=np.int64), 12, np.random.default_rng(0))
    assert drawn.tolist() == [[200.0, 200.0]] * 12  # in pieces of 5
    one_by_one = bootstrap_interval(x + 1e-9 * np.arange(200))
    assert (together.low, together.high) == pytest.approx((one_by_one.low, one_by_one.high), abs=0.005)
    assert bootstrap_interval(x + 1e-9 * np.arange(200), seed=1) != one_by_one and bootstrap_interval(x) == together
    with_groups = bootstrap_interval(np.repeat(x, 3), groups=np.repeat(np.arange(200), 3))
    assert (with_groups.low, with_groups.high) == pytest.approx((together.low, together.high), abs=0.005)


def test_the_bootstrap_of_groups_draws_groups() -> None:
    """Of clusters of unequal size it is as wide as the cluster-robust t interval, not as the plain one."""
    draw = np.random.default_rng(15)
    group = np.repeat(np.arange(60), draw.integers(1, 9, size=60))
    x = draw.normal(size=60)[group]
    found, robust, plain = (
        bootstrap_interval(x, groups=group),
        mean_with_interval(x, groups=group),
        mean_with_interval(x),
    )
    assert found.high - found.low == pytest.approx(robust.high - robust.low, rel=0.1)
    assert found.high - found.low > 1.5 * (plain.high - plain.low)


def test_the_bootstrap_of_groups_is_scipys_of_their_sums_and_sizes() -> None:
    draw = np.random.default_rng(25)
    group = np.repeat(np.arange(15), 1 + draw.geometric(0.1, size=15))  # sizes are lopsided, values are not
    x = 10 + draw.normal(size=15)[group]
    sums, sizes = (np.bincount(group, weights=w) for w in (x, np.ones(len(x))))
    theirs = stats.bootstrap(
        (sums, sizes),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        rng=np.random.default_rng(21),
    ).confidence_interval
    found = bootstrap_interval(x, groups=group)
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=0.04 * (theirs.high - theirs.low))


def test_a_statistic_that_does_not_exist_has_no_bounds() -> None:
    def ratio(means: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return means[:, 1] / means[:, 0]

    nothing = bootstrap_interval(np.zeros((20, 2)), ratio)
    assert math.isnan(nothing.mean) and math.isnan(nothing.low)
    once = np.zeros((20, 2))
    once[0] = 1.0  # 0/0 in a third of the draws
    found = bootstrap_interval(once, ratio)
    assert found.mean == 1.0 and math.isnan(found.low)
    same = bootstrap_interval(np.full(20, 0.25))
    assert (same.mean, same.low, same.high) == (0.25, 0.25, 0.25)


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


def test_the_difference_of_lopsided_intervals_takes_the_sides_that_face_each_other() -> None:
    gap = difference(Estimate(0.1, 0.05, 0.3, 20), Estimate(0.4, 0.3, 0.45, 30))
    assert (gap.mean, gap.questions) == (pytest.approx(0.3), 20)
    assert gap.low == pytest.approx(0.3 - math.hypot(0.1, 0.2)) and gap.high == pytest.approx(
        0.3 + math.hypot(0.05, 0.05)
    )


def study(draw: np.random.Generator, seeds: int, questions: int, of: tuple[float, float, float]) -> np.ndarray:
    """Values [seeds, questions] of mean 0 with standard deviations of seeds, questions and the rest."""
    rows, columns, rest = of
    shape = (seeds, questions)
    return (
        rows * draw.normal(size=(seeds, 1))
        + columns * draw.normal(size=(1, questions))
        + rest * draw.normal(size=shape)
    )


def test_crossed_is_the_analysis_of_variance_written_out() -> None:
    x = study(np.random.default_rng(3), 4, 9, (0.3, 0.5, 0.4)) + 0.2
    S, Q = x.shape
    mean = sum(x[s, q] for s in range(S) for q in range(Q)) / (S * Q)
    rows = [sum(x[s, q] for q in range(Q)) / Q for s in range(S)]
    columns = [sum(x[s, q] for s in range(S)) / S for q in range(Q)]
    trainings = Q * sum((r - mean) ** 2 for r in rows) / (S - 1)
    questions = S * sum((c - mean) ** 2 for c in columns) / (Q - 1)
    rest = sum((x[s, q] - rows[s] - columns[q] + mean) ** 2 for s in range(S) for q in range(Q)) / ((S - 1) * (Q - 1))
    assert trainings > rest and questions > rest
    variance = (trainings + questions - rest) / (S * Q)
    spread = trainings**2 / (S - 1) + questions**2 / (Q - 1) + rest**2 / ((S - 1) * (Q - 1))
    freedom = (trainings + questions - rest) ** 2 / spread
    found = crossed(x)
    low, high = stats.t.interval(0.95, freedom, loc=mean, scale=math.sqrt(variance))
    assert (found.estimate.mean, found.estimate.low, found.estimate.high) == pytest.approx((mean, low, high))
    assert found.p == pytest.approx(2 * stats.t.sf(mean / math.sqrt(variance), freedom))
    assert found.of_trainings == pytest.approx(math.sqrt((trainings - rest) / (S * Q)))
    assert found.of_questions == pytest.approx(math.sqrt((questions - rest) / (S * Q)))
    assert crossed(x[::-1, ::-1]).estimate.low == pytest.approx(found.estimate.low)


def test_crossed_is_the_t_interval_where_only_one_of_the_two_scatters() -> None:
    a = np.array([0.2, 0.5, 0.35, 0.4])
    for values in (np.repeat(a[:, None], 7, axis=1), np.repeat(a[None, :], 7, axis=0)):
        found, plain = crossed(values), mean_with_interval(a)
        assert (found.estimate.low, found.estimate.high) == pytest.approx((plain.low, plain.high))
        assert found.p == pytest.approx(stats.ttest_1samp(a, 0).pvalue)
        assert found.mde == pytest.approx(minimum_detectable_effect(a))


def test_crossed_says_nothing_of_one_training() -> None:
    found = crossed([[0.2, 0.4, 0.9]])
    assert found.estimate.mean == pytest.approx(0.5) and math.isnan(found.estimate.low) and math.isnan(found.p)
    alike = crossed(np.full((3, 4), 0.25))
    assert (alike.estimate.low, alike.estimate.high) == (0.25, 0.25)
    assert alike.p == pytest.approx(stats.binomtest(4, 4).pvalue)
    assert crossed(np.zeros((3, 4))).p == 1.0
    none = crossed(np.zeros((3, 40)), bounds=(0.0, 1.0)).estimate
    exact = stats.binomtest(0, 40).proportion_ci(method="exact")
    assert (none.low, none.high) == pytest.approx((exact.low, exact.high))
    wide = crossed([[0.0, 0.1], [0.9, 1.0]], bounds=(0.0, 1.0)).estimate
    assert (wide.low, wide.high) == (0.0, 1.0)
    for wrong in ([0.1, 0.2], np.empty((0, 3)), np.empty((2, 0))):
        with pytest.raises(ValueError, match="trainings, questions"):
            crossed(wrong)


@pytest.mark.parametrize(
    ("seeds", "of", "least", "most"),
    [
        (5, (0.02, 0.1, 0.3), 0.93, 0.98),
        (5, (0.0, 0.1, 0.3), 0.94, 0.985),
        (5, (0.05, 0.0, 0.3), 0.93, 0.97),
        (3, (0.05, 0.1, 0.3), 0.90, 0.97),
        (2, (0.05, 0.1, 0.3), 0.85, 0.93),
    ],
)
def test_crossed_covers_other_seeds_and_other_questions(seeds: int, of: tuple, least: float, most: float) -> None:
    """What an interval over questions alone does not: with seeds that scatter by 0.05 it misses more than 1 in 4."""
    draw = np.random.default_rng(0)
    hits, naive = 0, 0
    for _ in range(1500):
        x = study(draw, seeds, 200, of)
        hits += crossed(x).estimate.low <= 0 <= crossed(x).estimate.high
        alone = mean_with_interval(x.mean(axis=0))
        naive += alone.low <= 0 <= alone.high
    assert least <= hits / 1500 <= most
    if of[0] >= 0.05:
        assert naive / 1500 < 0.75
