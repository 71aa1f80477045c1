"""Verdicts as reward functions for TRL's GRPOTrainer: `reward_funcs=heatbath.rewards.math`.

Each takes the gold answers from the dataset's column `gold`, else `answer` or `solution` (programs: `tests`, else
`gold`); None (no signal) is returned where a gold answer cannot be read. The share of every status is logged beside the
reward. For other settings than the defaults make one: `rewards.make("math", profile="paper", deadline=5)`.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from heatbath.errors import DataError
from heatbath.stages.rewards import Reward, verdict_reward
from heatbath.verify.graders import Kind, grader

COLUMNS = {"math": ("gold", "answer", "solution"), "choice": ("gold", "answer", "solution"), "code": ("tests", "gold")}


def make(kind: Kind, *, failed_share: float = 1.0, **settings: Any) -> Reward:
    """A reward function with a grader of its own; `settings` are those of `verify.graders.grader`. Above `failed_share`
    of failed verdicts in a call it raises RunError; by default it only logs them."""
    reward = verdict_reward(grader(kind, **settings), kind, failed_share)

    def verdict(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        names = COLUMNS[kind]
        found = next((columns[name] for name in names if columns.get(name) is not None), None)
        if found is None:
            raise DataError("no gold answers", "the reward function", f"a column {' or '.join(names)} in the dataset")
        return reward(completions, found, log_metric=columns.get("log_metric"))

    verdict.__name__ = kind
    return verdict


_DEFAULTS: dict[Kind, Reward] = {}
_MAKING = threading.Lock()


def _default(kind: Kind) -> Reward:
    """One grader of each kind for all threads."""
    with _MAKING:
        if kind not in _DEFAULTS:
            _DEFAULTS[kind] = make(kind)
        return _DEFAULTS[kind]


def math(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """1.0 for a right mathematical answer, else 0.0; exact comparison, then Math-Verify in a killable worker."""
    return _default("math")(completions, **columns)


def choice(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """1.0 for the right option, else 0.0; nothing is guessed where a completion names none."""
    return _default("choice")(completions, **columns)


def code(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """1.0 for a program that passes all tests in the sandbox, else 0.0."""
    return _default("code")(completions, **columns)
