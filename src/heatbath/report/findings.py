"""Findings: what a run's own numbers show to have gone wrong, each with a name, a number and a remedy.

Pure functions of what was logged. A look is a function in `LOOKS`: it returns a Finding, the reason why these data
cannot show one (Unjudged), or None; one more finding is one more function. The false alarms that a look names are of
thousands of simulated runs; those of RL are 2,000 runs of 12 to 200 steps, white noise or noise correlated up to 0.6
from step to step.
"""

from __future__ import annotations

from collections.abc import Callable

from heatbath.report.rl_findings import exploding_gradient, length_without_reward, nothing_to_learn, train_eval_gap
from heatbath.report.seen import Finding, Seen, Unjudged
from heatbath.report.start_findings import (
    late_checkpoint,
    over_constrained,
    target_underflow,
    truncation,
    under_constrained,
)

__all__ = ["LOOKS", "Finding", "Seen", "Unjudged", "find", "look", "unjudged"]

LOOKS: tuple[Callable[[Seen], Finding | Unjudged | None], ...] = (
    target_underflow,
    late_checkpoint,
    over_constrained,
    under_constrained,
    nothing_to_learn,
    train_eval_gap,
    length_without_reward,
    exploding_gradient,
    truncation,
)


def look(seen: Seen) -> tuple[list[Finding], list[Unjudged]]:
    """Every finding of the run, none for a stage that the recipe has not or that has not begun; and what could not be
    looked for."""
    found = [each(seen) for each in LOOKS]
    return [f for f in found if isinstance(f, Finding)], [u for u in found if isinstance(u, Unjudged)]


def find(seen: Seen) -> list[Finding]:
    return look(seen)[0]


def unjudged(seen: Seen) -> list[Unjudged]:
    return look(seen)[1]
