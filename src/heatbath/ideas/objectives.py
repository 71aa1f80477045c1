"""SFT objectives: a few lines each over per-token statistics, `[N]` in, loss `[N]` out.

An objective names the statistics it `needs`; the engine (`engine.py`) computes just those and turns the objective's
derivatives in them into the gradient of the logits. An objective never reduces, never sees [N, V], never knows about
chunks, ranks or trainers.

N supervised tokens, V vocabulary. All statistics are float32 (float64 for float64 inputs), logarithms natural (nats).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

# Differentiable in the policy's logits.
DIFFERENTIABLE = ("logp", "entropy", "mean_logp", "ref_ce", "rev_ce")
# Constants of the base model.
CONSTANT = ("ref_logp", "ref_entropy")
STATS = DIFFERENTIABLE + CONSTANT
# Statistics that need the base model's view of the token.
REFERENCE_STATS = frozenset({"ref_ce", "rev_ce", "ref_logp", "ref_entropy"})


class TokenStats:
    """What an objective may read about each supervised token; every statistic is [N] and there only if asked for.

    logp         log π(y)                                differentiable
    entropy      H(π) = −Σ_v π(v) log π(v)               differentiable
    mean_logp    (1/V) Σ_v log π(v); its negative is the cross-entropy to the uniform distribution, differentiable
    ref_ce       −Σ_v p_base(v) log π(v)                 differentiable
    rev_ce       −Σ_v π(v) log p_base(v)                 differentiable
    ref_logp     log p_base(y); its negative is the *surprise*, constant
    ref_entropy  H(p_base)                               constant

    Any other attribute is looked up among the caller's `columns` (`old_logp`, `advantage`, `beta`, ...). Reading what
    is not there raises AttributeError with what to do.
    """

    logp: Tensor
    entropy: Tensor
    mean_logp: Tensor
    ref_ce: Tensor
    rev_ce: Tensor
    ref_logp: Tensor
    ref_entropy: Tensor

    def __init__(self, *, vocab_size: int = 0, columns: Mapping[str, Tensor] | None = None, **stats: Tensor):
        self.vocab_size = vocab_size
        self.columns = dict(columns or {})
        for name, value in stats.items():
            if name not in STATS:
                raise TypeError(f"'{name}' is no statistic; pass it in `columns`")
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Tensor:
        if name in STATS:
            raise AttributeError(f"the statistic '{name}' was not computed: add it to the objective's `needs`")
        columns: dict[str, Tensor] = self.__dict__.get("columns", {})
        if name in columns:
            return columns[name]
        raise AttributeError(f"no statistic or column named '{name}' (statistics: {', '.join(STATS)})")


@runtime_checkable
class Objective(Protocol):
    """A frozen set of hyper-parameters that maps token statistics to a per-token loss."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the statistics read by `__call__`, among `STATS`."""

    def __call__(self, stats: TokenStats) -> Tensor:
        """Loss of each token, [N], differentiable in the statistics."""


@dataclass(frozen=True)
class Sft:
    """Negative log-likelihood of the demonstration: the zero-temperature limit (β → ∞) of GIFT."""

    needs: ClassVar[tuple[str, ...]] = ("logp",)

    def __call__(self, stats: TokenStats) -> Tensor:
        return -stats.logp


@dataclass(frozen=True)
class Gift:
    """Cross-entropy to the Gibbs target softmax(log p~ + β·onehot(y)) (arXiv 2601.09233, Algorithm 1).

    p~ = (1 − λ)·p_base + λ/V with λ = `smoothing` (the paper's v1, appendix C; 0 in v2). Because the target is the
    base lifted at one entry, the loss is an exact per-token mixture, no second softmax and no [N, V] target:

        loss = (1 − keep)·nll + keep·[(1 − λ)·H(p_base, π) + λ·H(uniform, π)]      keep = 1 / (1 + (e^β − 1)·p~(y))

    so β (nats) is a surprise threshold: a token with −log p_base(y) above about β is left to the base, any other is
    ordinary SFT. β = 0 is distillation from the base, β → ∞ is SFT. Departures from the authors' code
    (zzy1127/GIFT): no 1e-10 floor inside the logarithm, which there caps the surprise at 23 nats.
    """

    beta: float
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise ValueError(f"beta must be a finite number ≥ 0 (nats), not {self.beta}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), not {self.smoothing}")

    @property
    def needs(self) -> tuple[str, ...]:
        return ("logp", "ref_ce", "ref_logp", *(("mean_logp",) if self.smoothing else ()))

    def __call__(self, stats: TokenStats) -> Tensor:
        keep = self.keep(stats.ref_logp, stats.vocab_size)
        soft = stats.ref_ce
        if self.smoothing:
            soft = (1 - self.smoothing) * soft - self.smoothing * stats.mean_logp
        return (1 - keep) * -stats.logp + keep * soft

    def keep(self, ref_logp: Tensor, vocab_size: int) -> Tensor:
        """Share of the target that is the base's own distribution, [N] in (0, 1]; no overflow at any surprise."""
        if self.beta == 0:
            return torch.ones_like(ref_logp)
        log_gain = self.beta + math.log1p(-math.exp(-self.beta))  # log(e^β − 1)
        return torch.sigmoid(-(self.smoothed(ref_logp, vocab_size) + log_gain))

    def mass(self, ref_logp: Tensor, vocab_size: int) -> Tensor:
        """w = σ(β + logit p~(y)) = (1 − keep) + keep·p~(y): the target's probability of the demonstrated token, [N]."""
        keep = self.keep(ref_logp, vocab_size)
        return (1 - keep) + keep * self.smoothed(ref_logp, vocab_size).exp()

    def smoothed(self, ref_logp: Tensor, vocab_size: int) -> Tensor:
        """log p~(y), [N]."""
        if not self.smoothing:
            return ref_logp
        floor = torch.full_like(ref_logp, math.log(self.smoothing / vocab_size))
        return torch.logaddexp(ref_logp + math.log1p(-self.smoothing), floor)

    def diagnostics(self, stats: TokenStats) -> dict[str, Tensor]:
        """Per-token numbers worth logging beside the loss: `keep`, `w`, and whether the base wins (`left_to_base`)."""
        w = self.mass(stats.ref_logp, stats.vocab_size)
        return {
            "keep": self.keep(stats.ref_logp, stats.vocab_size),
            "w": w,
            "left_to_base": (w < 0.5).to(w.dtype),
        }


OBJECTIVES: dict[str, type] = {"sft": Sft, "gift": Gift}


def objective(name: str, **hyper: float) -> Objective:
    """The objective of that recipe name, e.g. `objective("gift", beta=10.0)`.

    Raises ValueError on an unknown name, an unknown or missing hyper-parameter, or one out of range.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective '{name}'{suggestion(name, OBJECTIVES)}; known: {', '.join(OBJECTIVES)}")
    cls = OBJECTIVES[name]
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in hyper:
        if key not in known:
            takes = ", ".join(known) or "no hyper-parameters"
            raise ValueError(f"objective '{name}' has no '{key}'{suggestion(key, known)}; it takes {takes}")
    for key, f in known.items():
        if f.default is dataclasses.MISSING and key not in hyper:
            raise ValueError(f"objective '{name}' needs '{key}'")
    for key, value in hyper.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"objective '{name}': {key} must be a number, not {value!r}")
    built: Objective = cls(**hyper)
    return built


def suggestion(word: str, known: Mapping[str, object]) -> str:
    """', did you mean 'x'?' for the nearest known word, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f", did you mean '{near[0]}'?" if near else ""


def needs_reference(objective: Objective) -> bool:
    """Whether the objective reads anything of the base model."""
    return bool(REFERENCE_STATS.intersection(objective.needs))
