"""pass@k without bias, and intervals in which the question is the sampling unit.

Q questions, n samples of a question, c of them right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

Floats = NDArray[np.float64]


def pass_at_k(right: ArrayLike, samples: ArrayLike, k: int) -> Floats:
    """Probability that at least one of k samples drawn without replacement is right, [Q].

    Unbiased (Chen et al. 2107.03374, eq. 1): 1 − C(n − c, k) / C(n, k), as the product of 1 − k/i for
    i = n − c + 1 … n. `right` and `samples` are [Q] (or one number for all). Raises ValueError where n < k, where
    the estimate does not exist, or where not 0 ≤ c ≤ n.
    """
    c, n = np.broadcast_arrays(np.atleast_1d(np.asarray(right)), np.asarray(samples))
    if k < 1 or (n < k).any():
        raise ValueError(f"pass@{k} needs at least {k} samples of every question (fewest here: {n.min()})")
    if (c < 0).any() or (c > n).any():
        raise ValueError("right answers must lie between 0 and the number of samples")
    pairs, where = np.unique(np.stack([c, n]), axis=1, return_inverse=True)
    table = np.array([_pass_at_k(int(ci), int(ni), k) for ci, ni in pairs.T])
    return table[where.reshape(-1)]


def _pass_at_k(right: int, samples: int, k: int) -> float:
    if samples - right < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(samples - right + 1, samples + 1))


def informative_share(right: ArrayLike, samples: ArrayLike, group: int) -> Floats:
    """Probability that `group` samples drawn without replacement hold a right and a wrong one, [Q]: without both, a
    group-relative advantage is 0.

    Unbiased: 1 − C(n − c, G) / C(n, G) − C(c, G) / C(n, G); with n = G whether 0 < c < n. Raises ValueError as
    `pass_at_k`.
    """
    c, n = np.broadcast_arrays(np.atleast_1d(np.asarray(right)), np.asarray(samples))
    return pass_at_k(c, n, group) + pass_at_k(n - c, n, group) - 1.0


@dataclass(frozen=True)
class Estimate:
    """A mean over questions with its interval; `low` and `high` are NaN for a single question."""

    mean: float
    low: float
    high: float
    questions: int
    confidence: float = 0.95

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def numbers(self) -> dict[str, float | None]:
        """Mean and bounds for a JSON file, which has no NaN: a bound that does not exist is None."""
        bounds = {"mean": self.mean, "low": self.low, "high": self.high}
        return {key: None if math.isnan(value) else value for key, value in bounds.items()}


def mean_with_interval(
    values: Sequence[float] | Floats, *, confidence: float = 0.95, bounds: tuple[float, float] | None = None
) -> Estimate:
    """Mean of per-question values and its Student-t interval over questions.

    `bounds` are those of a value, (0, 1) for a score: the interval is cut there, and where every question sits on the
    same bound (0 of 100), where the t interval has no width, it is the exact binomial one (Clopper-Pearson), as if each
    question were one trial.

    The samples of one question are not independent draws of the benchmark, so they enter as their mean: pooling all
    draws as if independent covers 80 % at a nominal 95 % (30 questions × 4 draws), this covers 94 %.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.size == 0:
        raise ValueError("no questions")
    mean = float(x.mean())
    if x.size == 1:
        return Estimate(mean, math.nan, math.nan, 1, confidence)
    if bounds is not None and x.min() == x.max() and x[0] in bounds:
        reach = (bounds[1] - bounds[0]) * (1 - ((1 - confidence) / 2) ** (1 / x.size))
        low, high = (mean, mean + reach) if x[0] == bounds[0] else (mean - reach, mean)
        return Estimate(mean, low, high, int(x.size), confidence)
    half = float(stdtrit(x.size - 1, 0.5 + confidence / 2)) * float(x.std(ddof=1)) / math.sqrt(x.size)
    low, high = mean - half, mean + half
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    return Estimate(mean, low, high, int(x.size), confidence)


def paired_difference(
    before: Sequence[float] | Floats, after: Sequence[float] | Floats, *, confidence: float = 0.95
) -> Estimate:
    """Mean of `after − before` over the same questions with its interval. Raises ValueError on unequal lengths."""
    a, b = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired values need the same questions: {a.size} before, {b.size} after")
    return mean_with_interval(b - a, confidence=confidence)


def difference(before: Estimate, after: Estimate) -> Estimate:
    """`after − before` of two independent estimates. The interval is made of theirs (MOVER, Zou and Donner 2008): they
    need not be symmetric, as those of shares near 0 or 1 are not. `questions` are those of the smaller one."""
    mean = after.mean - before.mean
    low = mean - math.hypot(after.mean - after.low, before.high - before.mean)
    high = mean + math.hypot(after.high - after.mean, before.mean - before.low)
    return Estimate(mean, low, high, min(before.questions, after.questions), after.confidence)
