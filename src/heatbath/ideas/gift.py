"""GIFT, token by token and exact over the sequence: cross-entropy to the base lifted at the demonstrated token.

Both are one mixture, loss = (1 − keep)·nll + keep·H(p_base, π), and differ in where `keep` comes from.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from heatbath.ideas.statistics import TokenStats, discounted_sum


@dataclass(frozen=True)
class Schedule:
    """β over optimizer steps: from `start` to `end` in `steps`, then constant."""

    start: float
    end: float
    steps: int
    shape: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        _require_beta(self.start)
        _require_beta(self.end)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ValueError(f"beta.steps must be a whole number ≥ 1, not {self.steps!r}")
        if self.shape not in ("linear", "cosine"):
            raise ValueError(f"beta.shape must be 'linear' or 'cosine', not {self.shape!r}")

    def at(self, step: int) -> float:
        done = min(step / self.steps, 1.0)
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True)
class Column:
    """β of each token, from the column of that name."""

    column: str

    def __post_init__(self) -> None:
        if not isinstance(self.column, str):
            raise ValueError(f"beta.column must be the name of a column, not {self.column!r}")


@dataclass(frozen=True)
class LeftToBase:
    """The β at which this share of the supervised tokens keeps w < 0.5; known once the surprise is measured."""

    left_to_base: float

    def __post_init__(self) -> None:
        if isinstance(self.left_to_base, bool) or not isinstance(self.left_to_base, int | float):
            raise ValueError(f"beta.left_to_base must be a number, not {self.left_to_base!r}")
        if not 0 < self.left_to_base < 1:
            raise ValueError(f"beta.left_to_base must lie in (0, 1), not {self.left_to_base}")


Beta = float | Schedule | Column | LeftToBase


@dataclass(frozen=True)
class Gift:
    """Cross-entropy to the Gibbs target softmax(log p~ + β·onehot(y)) (arXiv 2601.09233, Algorithm 1).

    p~ = (1 − λ)·p_base + λ/V with λ = `smoothing` (the paper's v1, appendix C; 0 in v2). Because the target is the
    base lifted at one entry, the loss is an exact per-token mixture, no second softmax and no [N, V] target:

        loss = (1 − keep)·nll + keep·[(1 − λ)·H(p_base, π) + λ·H(uniform, π)]      keep = 1 / (1 + (e^β − 1)·p~(y))

    so β (nats) is a surprise threshold: a token with −log p_base(y) above about β is left to the base, any other is
    ordinary SFT. β = 0 is distillation from the base, β → ∞ is SFT. `beta` is a number, or a table: `{column = "beta"}`
    reads it for each token, `{start = 20.0, end = 5.0, steps = 300}` moves it over the optimizer steps,
    `{left_to_base = 0.005}` is the value at which that share of the supervised tokens keeps w < 0.5.

    Departures from the authors' code (zzy1127/GIFT): theirs adds 1e-10 inside the logarithm, which caps the surprise at
    23 nats. `floor = 1e-10` reproduces it: adding f to every p~ is smoothing with λ' = (λ + V·f) / (1 + V·f).
    """

    beta: Beta
    smoothing: float = 0.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "beta", _beta(self.beta))
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), not {self.smoothing}")
        if not 0 <= self.floor < 1:
            raise ValueError(f"floor must lie in [0, 1), not {self.floor}")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("logp", "ref_ce", "ref_logp", *(("mean_logp",) if self.smoothing or self.floor else ()))

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.beta.column,) if isinstance(self.beta, Column) else ()

    def at(self, step: int) -> Gift:
        """The same with β of that optimizer step."""
        return dataclasses.replace(self, beta=self.beta.at(step)) if isinstance(self.beta, Schedule) else self

    def most_cautious(self) -> Gift:
        """The same at the smallest β it will come to, where most tokens are left to the base."""
        b = self.beta
        return dataclasses.replace(self, beta=min(b.start, b.end)) if isinstance(b, Schedule) else self

    def __call__(self, stats: TokenStats) -> Tensor:
        odds, smoothing = self.log_odds(stats), self.whole_smoothing(stats.vocab_size)
        soft = stats.ref_ce
        if smoothing:
            soft = (1 - smoothing) * soft - smoothing * stats.mean_logp
        return odds.sigmoid() * -stats.logp + (-odds).sigmoid() * soft  # 1 − keep cancels where keep is nearly 1

    def keep(self, stats: TokenStats) -> Tensor:
        """Share of the target that is the base's own distribution, [N] in (0, 1]; no overflow at any surprise."""
        return torch.sigmoid(-self.log_odds(stats))

    def log_odds(self, stats: TokenStats) -> Tensor:
        """−logit keep = log((e^β − 1)·p~(y)), [N]; −inf at β = 0, where keep is 1."""
        beta = self.beta_of(stats)
        return (self.smoothed(stats) + beta + torch.log(-torch.expm1(-beta))).to(stats.ref_logp.dtype)

    def target_mass(self, stats: TokenStats) -> Tensor:
        """w = σ(β + logit p~(y)) = (1 − keep) + keep·p~(y): the target's probability of the demonstrated token, [N]."""
        keep = self.keep(stats)
        return (1 - keep) + keep * self.smoothed(stats).exp()

    def beta_of(self, stats: TokenStats) -> Tensor:
        """β of each token, [N] or a scalar, in nats. Raises ValueError where a column holds a negative one."""
        if isinstance(self.beta, Column):
            beta: Tensor = getattr(stats, self.beta.column).to(stats.ref_logp.dtype)
            if beta.device.type == "cpu" and not bool((torch.isfinite(beta) & (beta >= 0)).all()):  # no wait for a GPU
                raise ValueError(f"the column '{self.beta.column}' must hold finite numbers ≥ 0 (nats)")
            return beta
        if not isinstance(self.beta, float):
            raise ValueError(f"beta = {self.beta} is not a number yet: {_resolution(self.beta)}")
        return torch.tensor(self.beta, dtype=stats.ref_logp.dtype, device=stats.ref_logp.device)

    def smoothed(self, stats: TokenStats) -> Tensor:
        """log p~(y), [N]."""
        smoothing = self.whole_smoothing(stats.vocab_size)
        if not smoothing:
            return stats.ref_logp
        lowest = torch.full_like(stats.ref_logp, math.log(smoothing / stats.vocab_size))
        return torch.logaddexp(stats.ref_logp + math.log1p(-smoothing), lowest)

    def whole_smoothing(self, vocab_size: int) -> float:
        """λ with the floor in it."""
        return (self.smoothing + vocab_size * self.floor) / (1 + vocab_size * self.floor)

    def diagnostics(self, stats: TokenStats) -> dict[str, Tensor]:
        """Per-token numbers worth logging beside the loss: `keep`, `w`, and whether the base wins (`left_to_base`)."""
        w = self.target_mass(stats)
        return {"keep": self.keep(stats), "w": w, "left_to_base": (w < 0.5).to(w.dtype)}


@dataclass(frozen=True)
class GiftSequence:
    """Cross-entropy to the exact sequence-level Gibbs target (derived in docs/objectives/gift_sequence.md; no paper).

    For the reward 1[answer = demonstration] the target over whole answers is (1 − m)·p_base + m·δ, m = `mass`: the
    probability with which the start follows the expert's answer rather than the base's own. Its conditional on the
    expert's prefix is GIFT's own mixture with a `keep` that shrinks with the surprise S already spent in the sequence:

        loss = (1 − keep)·nll + keep·H(p_base, π)      keep_t = σ(−(logit m + S_{<t}))

    m → 1 is SFT, m → 0 the base. S_{<t} sums the surprises before t, each discounted by `memory` per token: below 1 the
    mixture re-opens where recent tokens are plausible again, at 0 it is KD with α = 1 − m.
    """

    mass: float = 0.5
    memory: float = 1.0
    needs: ClassVar[tuple[str, ...]] = ("logp", "ref_ce", "ref_logp")
    sequence_needs: ClassVar[tuple[str, ...]] = ("ref_logp",)

    def __post_init__(self) -> None:
        if not 0 < self.mass < 1:
            raise ValueError(f"mass must lie in (0, 1), not {self.mass}")
        if not 0 <= self.memory <= 1:
            raise ValueError(f"memory must lie in [0, 1], not {self.memory}")

    def sequence_weights(self, stats: TokenStats, segments: Tensor) -> Tensor:
        """keep of each token, [N]."""
        surprise = -stats.ref_logp
        spent = discounted_sum(surprise, segments, self.memory) - surprise.double()  # memory·S_{t−1}
        odds = math.log(self.mass) - math.log1p(-self.mass)
        return torch.sigmoid(-(odds + spent)).to(surprise.dtype)

    def __call__(self, stats: TokenStats) -> Tensor:
        keep = stats.sequence_weight
        return (1 - keep) * -stats.logp + keep * stats.ref_ce

    def target_mass(self, stats: TokenStats) -> Tensor:
        """w = (1 − keep) + keep·p_base(y), [N]."""
        keep = stats.sequence_weight
        return (1 - keep) + keep * stats.ref_logp.exp()

    def diagnostics(self, stats: TokenStats) -> dict[str, Tensor]:
        w = self.target_mass(stats)
        return {"keep": stats.sequence_weight, "w": w, "left_to_base": (w < 0.5).to(w.dtype)}


def _beta(given: Any) -> Beta:
    """β as a recipe writes it: a number, or a table of one of the three forms. Raises ValueError."""
    if isinstance(given, Schedule | Column | LeftToBase):
        return given
    if isinstance(given, Mapping):
        for form in (Schedule, Column, LeftToBase):
            required = {f.name for f in dataclasses.fields(form) if f.default is dataclasses.MISSING}
            if required <= given.keys() <= {f.name for f in dataclasses.fields(form)}:
                return form(**given)
        raise ValueError(
            f"beta = {dict(given)} has none of the forms {{column = …}}, {{start = …, end = …, steps = …}}, "
            "{left_to_base = …}"
        )
    _require_beta(given)
    return float(given)


def _require_beta(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
        raise ValueError(f"beta must be a finite number ≥ 0 (nats), not {value!r}")


def _resolution(beta: Beta) -> str:
    if isinstance(beta, Schedule):
        return "take objective.at(step)"
    return "measure the surprise (heatbath.surprise.resolve)"
