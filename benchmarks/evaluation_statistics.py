"""How long the statistics of an evaluation take for 12,032 questions (MMLU-Pro's number), beside what is usual.

    python benchmarks/evaluation_statistics.py [--rounds 7] [--out benchmarks/results/statistics-NAME.json]

Usual are: for pass@k the loop over questions of human-eval's estimator, which most harnesses carry; for the bootstrap
scipy's (percentile, which spares it the jackknife), and resampling in Python as lm-evaluation-harness does it, timed
for a few draws and scaled. Both sides are given the same counts, and their results are compared before they are timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from made_with import commit
from scipy import stats

from heatbath.ideas.intervals import (
    RESAMPLES,
    bootstrap_interval,
    holm,
    mean_with_interval,
    minimum_detectable_effect,
    paired_difference,
    paired_test,
)
from heatbath.ideas.passk import informative_share, majority_at_k, pass_at_k

SAMPLES, K = 8, 4
PYTHON_DRAWS = 20  # of the RESAMPLES, since one takes a millisecond


def loop_pass_at_k(right: np.ndarray, samples: int, k: int) -> np.ndarray:
    """One question after the other."""

    def estimate(n: int, c: int) -> float:
        return 1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))

    return np.array([estimate(samples, int(c)) for c in right])


def loop_majority(answers: list[list[str]], right: list[list[bool]]) -> np.ndarray:
    """maj@n by a Counter for each question, ties to the answer that came first."""
    out = []
    for given, verdicts in zip(answers, right, strict=True):
        votes = Counter("right" if r else a for a, r in zip(given, verdicts, strict=True))
        out.append(float(votes.most_common(1)[0][0] == "right"))
    return np.array(out)


def python_bootstrap(values: list[float]) -> float:
    """Seconds of RESAMPLES draws of all questions, from a few of them."""
    draw, started = random.Random(0), time.perf_counter()
    for _ in range(PYTHON_DRAWS):
        again = draw.choices(values, k=len(values))
        sum(again) / len(again)
    return (time.perf_counter() - started) * RESAMPLES / PYTHON_DRAWS


def milliseconds(work: Callable[[], Any], rounds: int) -> float:
    """The median of so many rounds."""
    taken = []
    for _ in range(rounds):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return 1000 * float(np.median(taken))


def measured(questions: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each statistic, ours and usual, and their ratio."""
    draw = np.random.default_rng(0)
    ability = draw.beta(0.5, 0.5, size=questions)
    before, after = (draw.binomial(SAMPLES, ability) for _ in range(2))
    answers = [[str(a) for a in row] for row in draw.integers(0, 6, size=(questions, SAMPLES))]
    right = [[a == "0" for a in row] for row in answers]
    shares, greedy = before / SAMPLES, draw.binomial(1, ability).astype(float)
    assert np.allclose(loop_pass_at_k(before, SAMPLES, K), pass_at_k(before, SAMPLES, K), rtol=0, atol=1e-12)

    def scipy_bootstrap(values: np.ndarray) -> Any:
        return stats.bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", batch=100)

    def scipy_interval() -> Any:
        return stats.t.interval(0.95, questions - 1, loc=shares.mean(), scale=stats.sem(shares))

    def compared() -> None:
        paired_difference(shares, after / SAMPLES)
        paired_test(shares, after / SAMPLES)
        minimum_detectable_effect(after / SAMPLES - shares)

    few = max(1, rounds // 4)
    table: dict[str, tuple[float, float | None]] = {
        f"pass@{K}": (
            milliseconds(lambda: pass_at_k(before, SAMPLES, K), rounds),
            milliseconds(lambda: loop_pass_at_k(before, SAMPLES, K), rounds),
        ),
        f"maj@{SAMPLES}": (
            milliseconds(lambda: majority_at_k(answers, right, SAMPLES), rounds),
            milliseconds(lambda: loop_majority(answers, right), rounds),
        ),
        f"maj@{K}": (milliseconds(lambda: majority_at_k(answers, right, K), rounds), None),
        "informative groups": (milliseconds(lambda: informative_share(before, SAMPLES, K), rounds), None),
        "t interval": (milliseconds(lambda: mean_with_interval(shares), rounds), milliseconds(scipy_interval, rounds)),
        "bootstrap, 0 or 1 each": (
            milliseconds(lambda: bootstrap_interval(greedy), rounds),
            milliseconds(lambda: scipy_bootstrap(greedy), few),
        ),
        f"bootstrap, c/{SAMPLES} each": (
            milliseconds(lambda: bootstrap_interval(shares), rounds),
            milliseconds(lambda: scipy_bootstrap(shares), few),
        ),
        f"the same against Python's choices, {PYTHON_DRAWS} draws scaled": (
            milliseconds(lambda: bootstrap_interval(shares), rounds),
            1000 * python_bootstrap(shares.tolist()),
        ),
        "paired difference, p and MDE": (milliseconds(compared, rounds), None),
        "Holm over 1,000": (milliseconds(lambda: holm(draw.random(1000)), rounds), None),
    }
    out = {}
    for name, (ours, usual) in table.items():
        out[name] = {"ms": round(ours, 3)}
        if usual is not None:
            out[name] |= {"usual ms": round(usual, 3), "ratio": round(ours / usual, 5)}
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--questions", type=int, default=12_032)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    record = {
        "command": "python benchmarks/evaluation_statistics.py "
        f"--questions {arguments.questions} --rounds {arguments.rounds}",
        "commit": commit(),
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "questions": arguments.questions,
        "samples": SAMPLES,
        "resamples": RESAMPLES,
        "found": measured(arguments.questions, arguments.rounds),
    }
    print(json.dumps(record, indent=1))
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
