"""pass@k, distinct@k, maj@k and the informative share against brute force over subsets."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from heatbath.ideas.passk import distinct_at_k, informative_share, majority_at_k, pass_at_k


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
    found = pass_at_k([0, 3, 8, 3], [8, 4, 8, 4], 2)
    assert found == pytest.approx([0.0, 1 - math.comb(1, 2) / math.comb(4, 2), 1.0, 1.0])
    assert pass_at_k([1, 3, 6], [4, 4, 8], 1) == pytest.approx([0.25, 0.75, 0.75])  # avg@n
    with pytest.raises(ValueError, match="pass@5 needs at least 5"):
        pass_at_k([0, 3, 8], [8, 4, 8], 5)
    with pytest.raises(ValueError, match="pass@0"):
        pass_at_k([0], [8], 0)


@pytest.mark.parametrize("right", [9, -1])
def test_counts_are_counts(right: int) -> None:
    with pytest.raises(ValueError, match="between 0 and"):
        pass_at_k([3, right], [8, 8], 1)
    with pytest.raises(ValueError, match="whole numbers"):
        informative_share([0.5], [8], 2)


def test_pass_at_k_is_exact_where_binomial_coefficients_overflow() -> None:
    for c, n, k in ((3, 5000, 1000), (1, 4096, 4095), (2000, 4096, 1)):
        exact = 1 - math.comb(n - c, k) / math.comb(n, k)  # of whole numbers of any size
        assert pass_at_k([c, 0], n, k).tolist() == pytest.approx([exact, 0.0], abs=1e-12)


def brute_majority(answers: list, right: list[bool], k: int) -> float:
    """The mean over all subsets of k of 1/t where the right answer is one of t leaders, and else 0."""
    total = count = 0
    for picked in itertools.combinations(range(len(answers)), k):
        voting = [i for i in picked if right[i] or answers[i] is not None]
        votes = Counter("right" if right[i] else ("wrong", answers[i]) for i in voting)
        leaders = [a for a in votes if votes[a] == max(votes.values())]
        total += ("right" in leaders) / len(leaders) if leaders else 0.0
        count += 1
    return total / count


def test_distinct_at_k_is_the_mean_over_subsets() -> None:
    draw = np.random.default_rng(2)
    for _ in range(60):
        n = int(draw.integers(1, 9))
        written = draw.choice(["a", "b", "c", "d"], size=n).tolist()
        right = [one in "abc" and bool(draw.integers(0, 2)) for one in written]
        for k in range(1, n + 1):
            sets = [{written[i] for i in chosen if right[i]} for chosen in itertools.combinations(range(n), k)]
            brute = sum(map(len, sets)) / len(sets)
            assert distinct_at_k([written], [right], k)[0] == pytest.approx(brute, abs=1e-12)


def test_distinct_at_k_at_its_ends() -> None:
    """All alike: pass@k. All different: k times pass@1."""
    right = [[True, True, False, True, False], [False] * 5]
    alike, different = [["x"] * 5] * 2, [list("abcde")] * 2
    for k in (1, 3, 5):
        assert distinct_at_k(alike, right, k) == pytest.approx(pass_at_k([3, 0], 5, k))
        assert distinct_at_k(different, right, k) == pytest.approx([k * 3 / 5, 0])
    with pytest.raises(ValueError, match=r"distinct@6 needs at least 6 samples \(question 0: 5\)"):
        distinct_at_k(alike, right, 6)
    with pytest.raises(ValueError, match="question 1 has 5 completions and 4 verdicts"):
        distinct_at_k(alike, [right[0], right[1][:4]], 2)


def test_majority_at_k_is_the_mean_over_subsets_and_ties() -> None:
    """With right answers in several notations, samples without an answer, and up to 9 samples."""
    draw = np.random.default_rng(0)
    for _ in range(120):
        n = int(draw.integers(1, 10))
        answers = [[None, "5", "5.0", "7", "8", "9"][i] for i in draw.integers(0, 6, size=n)]
        right = [a in ("5", "5.0") for a in answers]
        for k in range(1, n + 1):
            found = majority_at_k([answers], [right], k)[0]
            assert found == pytest.approx(brute_majority(answers, right, k), abs=1e-12)


def test_majority_at_k_of_every_kind_of_question() -> None:
    answers = [
        ["1", "1", "2"],
        ["2", "2", "1"],
        ["1", "2", "3"],
        [None, None, "1"],
        [None, None, None],
        ["1", "one", "2"],
    ]
    right = [[a in ("1", "one") for a in own] for own in answers]
    assert majority_at_k(answers, right, 3).tolist() == pytest.approx([1, 0, 1 / 3, 1, 0, 1])
    shares = [sum(own) / 3 for own in right]
    assert majority_at_k(answers, right, 1) == pytest.approx(shares)  # one vote decides: avg@n
    with pytest.raises(ValueError, match=r"maj@4 needs at least 4 samples of every question \(question 0: 3\)"):
        majority_at_k(answers, right, 4)
    with pytest.raises(ValueError, match="maj@0"):
        majority_at_k(answers, right, 0)
    with pytest.raises(ValueError, match="question 1 has 3 answers and 2 verdicts"):
        majority_at_k(answers[:2], [right[0], right[1][:2]], 2)


def test_majority_at_k_of_many_samples_is_a_simulation() -> None:
    """48 of 128 samples right, 40 and 20 and 10 agree on other answers, 10 are silent; k = 32."""
    answers = ["r"] * 48 + ["a"] * 40 + ["b"] * 20 + ["c"] * 10 + [None] * 10
    right = [a == "r" for a in answers]
    draw = np.random.default_rng(1)
    drawn = draw.multivariate_hypergeometric([48, 40, 20, 10, 10], 32, size=200_000)[:, :4]
    most = drawn.max(axis=1)
    simulated = np.where(drawn[:, 0] == most, 1 / (drawn == most[:, None]).sum(axis=1), 0.0).mean()
    assert majority_at_k([answers], [right], 32)[0] == pytest.approx(simulated, abs=0.004)
    huge = majority_at_k([answers * 16], [right * 16], 1024)[0]
    assert simulated < huge < 1.0  # C(2048, 1024) has no float
