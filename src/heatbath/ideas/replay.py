"""An objective on demonstrations, and likelihood on answers of the base's own beside them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from heatbath.ideas.statistics import Objective, TokenStats

WEIGHT = "replay"  # the column: 0 on a demonstration, on an answer of the base its weight


@dataclass(frozen=True)
class Replayed:
    """`goal` on demonstrations, weight·nll on the base's own answers (docs/replay.md).

    The sequence-level Gibbs target (1 − m)·p_base + m·δ has the cross-entropy m·nll(demonstration) + (1 − m)·E[nll(y)],
    y drawn from the base. Demonstrations alone never show what follows after their prefixes are left: that is the
    second part, estimated from samples drawn once. Where a verifier R weighs them by e^{βR} it is the target for that
    reward. Everything else that `goal` has (sequence weights, schedule, columns) is the whole's.
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
        return torch.where(weight > 0, weight * -stats.logp, self.goal(stats))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "goal":
            raise AttributeError(name)
        found = getattr(self.goal, name)
        if name in ("at", "most_cautious"):
            return lambda *step: dataclasses.replace(self, goal=found(*step))
        if name == "target_mass":  # all of it on the answer's tokens: there the base is not needed
            return lambda stats: torch.where(getattr(stats, WEIGHT) > 0, 1.0, found(stats))
        return found
