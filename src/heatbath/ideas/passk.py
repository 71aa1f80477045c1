"""pass@k, distinct@k, maj@k and the share of informative groups, each without bias from one set of samples.

Q questions, n samples of a question, c of them right; n may differ by question.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln, xlog1py, xlogy

from heatbath.ideas.intervals import Floats

Counts = NDArray[np.int64]


def pass_at_k(right: ArrayLike, samples: ArrayLike, k: int) -> Floats:
    """Probability that at least one of k samples drawn without replacement is right, [Q].

    Unbiased (Chen et al. 2107.03374, eq. 1): 1 − C(n − c, k) / C(n, k), as the product of 1 − k/i for
    i = n − c + 1 … n. For k = 1 it is c/n, whose mean over questions is known as avg@n. `right` and `samples` are [Q]
    (or one number for all). Raises ValueError where n < k, where the estimate does not exist, or where not 0 ≤ c ≤ n.
    """
    c, n = _counted(right, samples)
    if k < 1 or (n < k).any():
        raise ValueError(f"pass@{k} needs at least {k} samples of every question (fewest here: {n.min()})")
    pairs, where = np.unique(c * (int(n.max()) + 1) + n, return_inverse=True)
    kinds = [divmod(int(pair), int(n.max()) + 1) for pair in pairs]
    return np.array([_pass_at_k(ci, ni, k) for ci, ni in kinds])[where]


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
    c, n = _counted(right, samples)
    return pass_at_k(c, n, group) + pass_at_k(n - c, n, group) - 1.0


def distinct_at_k(completions: Sequence[Sequence[Hashable]], right: Sequence[Sequence[bool]], k: int) -> Floats:
    """distinct@k: how many different right completions k samples drawn without replacement hold, in the mean, [Q].

    Each one that was seen c times of n is among the k with probability pass@k of c, so that their sum has no bias from
    n; where every right completion is written differently it is k·pass@1. `completions` holds each question's samples,
    `right` whether each was graded so. Raises ValueError where n < k, and where the two do not fit together.
    """
    out = []
    for question, (written, verdicts) in enumerate(zip(completions, right, strict=True)):
        if len(written) != len(verdicts):
            raise ValueError(f"question {question} has {len(written)} completions and {len(verdicts)} verdicts")
        if k < 1 or len(written) < k:
            raise ValueError(f"distinct@{k} needs at least {k} samples (question {question}: {len(written)})")
        seen = Counter(one for one, is_right in zip(written, verdicts, strict=True) if is_right)
        out.append(sum(_pass_at_k(count, len(written), k) for count in seen.values()))
    return np.array(out, dtype=float)


def majority_at_k(answers: Sequence[Sequence[Hashable]], right: Sequence[Sequence[bool]], k: int) -> Floats:
    """maj@k (Wang et al. 2203.11171): probability that the most frequent answer among k samples drawn without
    replacement is right, [Q].

    `answers` holds each question's samples (None: no answer, which does not vote), `right` whether each was graded so.
    Right samples are one answer, however they are written: all equal the gold answer. Ties are broken by lot: one of t
    leaders wins with probability 1/t. Exact for every k ≤ n, a sum over how often the right answer is drawn; for k = n
    it is 1, 1/t or 0. Raises ValueError where n < k, and where the two do not fit together.
    """
    out = []
    for question, (given, verdicts) in enumerate(zip(answers, right, strict=True)):
        if len(given) != len(verdicts):
            raise ValueError(f"question {question} has {len(given)} answers and {len(verdicts)} verdicts")
        if k < 1 or len(given) < k:
            raise ValueError(
                f"maj@{k} needs at least {k} samples of every question (question {question}: {len(given)})"
            )
        wrong = Counter(a for a, is_right in zip(given, verdicts, strict=True) if not is_right and a is not None)
        out.append(_majority_at_k(sum(map(bool, verdicts)), tuple(sorted(wrong.values())), len(given), k))
    return np.array(out)


@functools.lru_cache(maxsize=100_000)
def _majority_at_k(right: int, wrong: tuple[int, ...], n: int, k: int) -> float:
    """Of a question with so many right samples and so many of each wrong answer; the other samples do not vote.

    Drawing each sample on its own with probability k/n, given that k are drawn, is drawing k without replacement. So
    the number drawn of each answer is binomial, and independent until the sum is fixed: polynomials in that sum, whose
    coefficients stay near 1 where those of Π C(m, i) overflow.
    """
    total = 0.0
    for votes in range(1, min(right, k) + 1):
        rivals = [m for m in wrong if m >= votes]
        # answers that cannot reach the votes of the right one, and samples without one, are drawn freely
        ways = _drawn(n - right - sum(rivals), k, n)[None, : k - votes + 1]  # [tied rivals, drawn so far]
        for m in rivals:
            chance = _drawn(m, k, n)
            tied = np.zeros((len(ways) + 1, k - votes + 1))
            for drawn in range(votes + 1):
                row = 1 if drawn == votes else 0
                width = min(ways.shape[1], k - votes + 1 - drawn)
                if width > 0:
                    tied[row : row + len(ways), drawn : drawn + width] += chance[drawn] * ways[:, :width]
            ways = tied[: (k - votes) // votes + 1]
        if ways.shape[1] == k - votes + 1:
            total += _drawn(right, k, n)[votes] * float(ways[:, -1] @ (1 / np.arange(1, len(ways) + 1)))
    return min(1.0, total / float(_drawn(n, k, n)[k]))


@functools.lru_cache(maxsize=10_000)
def _drawn(m: int, k: int, n: int) -> Floats:
    """Binomial probabilities of 0 … m of m samples, each drawn with probability k/n, [m + 1]."""
    i = np.arange(m + 1)
    choose = gammaln(m + 1) - gammaln(i + 1) - gammaln(m - i + 1)
    return np.asarray(np.exp(choose + xlogy(i, k / n) + xlog1py(m - i, -k / n)))


def _counted(right: ArrayLike, samples: ArrayLike) -> tuple[Counts, Counts]:
    """Both as whole numbers, [Q]."""
    c, n = np.broadcast_arrays(np.atleast_1d(np.asarray(right)), np.asarray(samples))
    whole = c.astype(np.int64), n.astype(np.int64)
    if (whole[0] != c).any() or (whole[1] != n).any():
        raise ValueError("right answers and samples must be whole numbers")
    if (c < 0).any() or (c > n).any():
        raise ValueError("right answers must lie between 0 and the number of samples")
    return whole
