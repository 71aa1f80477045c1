"""An objective on demonstrations, and likelihood on answers of the base's own beside them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heatbath.ideas.statistics import Objective, TokenStats

WEIGHT = "replay"  # the column: `DEMONSTRATION`, or the weight (≥ 0) of an answer of the base
DEMONSTRATION = -1.0


@dataclass(frozen=True)
class Replayed:
    """`goal` on demonstrations, weight·nll on the base's own answers (docs/replay.md).

    The sequence-level Gibbs target (1 − m)·p_base + m·δ has the cross-entropy m·nll(demonstration) + (1 − m)·E[nll(y)],
    y drawn from the base: with SFT as `goal`, weight (1 − m)/m estimates it from samples drawn once. An objective that
    holds the base's share itself along the demonstration (`holds_the_base`) is shown only what follows where an answer
    has left it. Everything else that `goal` has (sequence weights, schedule, columns) is the whole's.
    """

    goal: Objective

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("logp", *self.goal.needs)))

    @property
    def columns(self) -> tuple[str, ...]:
        return (*getattr(self.goal, "columns", ()), WEIGHT)

    def __call__(self, stats: TokenStats) -> Tensor:
        weight = getattr(stats, WEIGHT).to(stats.logp.dtype)
        return torch.where(weight >= 0, weight * -stats.logp, self.goal(stats))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "goal":
            raise AttributeError(name)
        found = getattr(self.goal, name)
        if name in ("at", "most_cautious"):
            return lambda *step: dataclasses.replace(self, goal=found(*step))
        if name == "target_mass":  # all of it on the answer's tokens: there the base is not needed
            return lambda stats: torch.where(getattr(stats, WEIGHT) >= 0, 1.0, found(stats))
        return found


def holds_the_base(goal: Objective) -> bool:
    """Whether an objective's target on a demonstration is partly the base's own distribution."""
    return "ref_ce" in goal.needs
