"""The line through a run's numbers: least squares where they are independent, wider where neighbours are alike."""

import numpy as np
import pytest
from scipy import stats

from heatbath.ideas.trend import trend


def test_it_is_the_regression_line_and_its_interval_where_residuals_alternate() -> None:
    x = np.arange(12.0) * 3
    y = 0.2 * x + np.resize([1.0, -1.0], 12)  # negatively correlated: nothing is widened
    found, expected = trend(x, y), stats.linregress(x, y)
    half = stats.t.ppf(0.975, 10) * expected.stderr * x[-1]
    assert found.start == pytest.approx(expected.intercept)
    assert (found.change, found.low, found.high) == pytest.approx(
        (expected.slope * x[-1], expected.slope * x[-1] - half, expected.slope * x[-1] + half)
    )


def test_a_straight_line_has_no_width_and_a_constant_no_change() -> None:
    found = trend([1, 2, 4], [3.0, 5.0, 9.0])
    assert (found.start, found.low, found.change, found.high) == pytest.approx((3.0, 6.0, 6.0, 6.0), abs=1e-6)
    assert trend([1, 2, 3], [2.0, 2.0, 2.0]).change == 0.0
    for steps, values in (([1, 2], [0.0, 1.0]), ([1, 1, 1], [0.0, 1.0, 2.0]), ([1, 2, 3], [0.0, 1.0])):
        with pytest.raises(ValueError, match="at least 3 values"):
            trend(steps, values)


@pytest.mark.parametrize(("memory", "most"), [(0.0, 0.02), (0.3, 0.035), (0.6, 0.075)])
@pytest.mark.parametrize("n", [8, 20, 60])
def test_false_alarms_of_correlated_noise(memory: float, most: float, n: int) -> None:
    """One-sided at a nominal 1.25 %; an ordinary interval raises 13 % at a correlation of 0.6."""
    generator = np.random.default_rng(4)
    raised = 0
    for _ in range(1000):
        shocks, y = generator.normal(size=n + 30), np.zeros(n + 30)
        for t in range(1, n + 30):
            y[t] = memory * y[t - 1] + shocks[t]
        raised += trend(range(n), y[30:], 0.975).low > 0
    assert raised / 1000 < most
