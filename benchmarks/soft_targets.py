"""Objectives of the studies graded and adaptive, as a user would add them (docs/objectives/your-own.md)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from heatbath.ideas.gift import Gift
from heatbath.ideas.statistics import TokenStats


@dataclass(frozen=True)
class Mixture:
    """expert·nll + keep·H(p, π): the soft target expert·onehot(y) + keep·p, whose two shares the rows bring.

    `benchmarks/graded.py` writes them for several `target`s. expert + keep is 1 where the demonstration stands alone;
    a negative expert is a target that gives y less than the base does.
    """

    target: str
    needs: ClassVar[tuple[str, ...]] = ("logp", "ref_ce")

    @property
    def columns(self) -> tuple[str, ...]:
        return (f"{self.target}_expert", f"{self.target}_keep")

    def __call__(self, stats: TokenStats) -> Tensor:
        expert, keep = (stats.columns[name].to(stats.logp.dtype) for name in self.columns)
        return expert * -stats.logp + keep * stats.ref_ce


@dataclass(frozen=True)
class Quantile:
    """GIFT whose β follows the policy: of a micro-batch's tokens the share `share` surprises it by more than β nats."""

    share: float = 0.02
    needs: ClassVar[tuple[str, ...]] = ("logp", "ref_ce", "ref_logp")

    def __call__(self, stats: TokenStats) -> Tensor:
        return self._gift(stats)(stats)

    def diagnostics(self, stats: TokenStats) -> dict[str, Tensor]:
        gift = self._gift(stats)
        assert isinstance(gift.beta, float)
        return gift.diagnostics(stats) | {"beta": torch.full_like(stats.logp, gift.beta)}

    def _gift(self, stats: TokenStats) -> Gift:
        return Gift(beta=max(float((-stats.logp.detach()).quantile(1 - self.share)), 0.0))


@dataclass(frozen=True)
class Difficulty:
    """GIFT with a β for each problem, from `easy` where the base solves it always to `hard` where it never does."""

    easy: float
    hard: float
    needs: ClassVar[tuple[str, ...]] = ("logp", "ref_ce", "ref_logp")
    columns: ClassVar[tuple[str, ...]] = ("solved",)

    def __call__(self, stats: TokenStats) -> Tensor:
        return Gift(beta={"column": "beta"})(self._with_beta(stats))

    def diagnostics(self, stats: TokenStats) -> dict[str, Tensor]:
        return Gift(beta={"column": "beta"}).diagnostics(self._with_beta(stats))

    def _with_beta(self, stats: TokenStats) -> TokenStats:
        beta = self.hard + (self.easy - self.hard) * stats.columns["solved"]
        own = copy.copy(stats)
        own.columns = {**stats.columns, "beta": beta}
        return own
