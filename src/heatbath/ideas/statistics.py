"""What an objective may read about each supervised token, and what it is: the two protocols everything is built on.

N supervised tokens, V vocabulary. All statistics are float32 (float64 for float64 inputs), logarithms natural (nats).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

IGNORE = -100
# Differentiable in the policy's logits.
DIFFERENTIABLE = ("logp", "entropy", "mean_logp", "ref_ce", "rev_ce")
# Constants: of the base model, and of the policy's likeliest tokens.
CONSTANT = ("ref_logp", "ref_entropy", "topk_entropy", "topk_mass")
STATS = DIFFERENTIABLE + CONSTANT
# Statistics that need the base model's view of the token.
REFERENCE_STATS = frozenset({"ref_ce", "rev_ce", "ref_logp", "ref_entropy"})
TOPK = 20  # of `topk_*`, where an objective names no other


class TokenStats:
    """What an objective may read about each supervised token; every statistic is [N] and there only if asked for.

    logp          log π(y)                                differentiable
    entropy       H(π) = −Σ_v π(v) log π(v)               differentiable
    mean_logp     (1/V) Σ_v log π(v); its negative is the cross-entropy to the uniform distribution, differentiable
    ref_ce        −Σ_v p_base(v) log π(v)                 differentiable
    rev_ce        −Σ_v π(v) log p_base(v)                 differentiable
    ref_logp      log p_base(y); its negative is the *surprise*, constant
    ref_entropy   H(p_base)                               constant
    topk_entropy  entropy of the policy's `topk` likeliest tokens, renormalised, constant
    topk_mass     their probability, constant

    `sequence_weight` is what the objective's own `sequence_weights` returned. Any other attribute is looked up among
    the caller's `columns` (`old_logp`, `advantage`, `beta`, ...). Reading what is not there raises AttributeError with
    what to do.
    """

    logp: Tensor
    entropy: Tensor
    mean_logp: Tensor
    ref_ce: Tensor
    rev_ce: Tensor
    ref_logp: Tensor
    ref_entropy: Tensor
    topk_entropy: Tensor
    topk_mass: Tensor
    sequence_weight: Tensor

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
    """A frozen set of hyper-parameters that maps token statistics to a per-token loss.

    Beside these two an objective may have any of:

    topk: int                              how many tokens `topk_entropy` and `topk_mass` are taken over
    columns: tuple[str, ...]               the columns it cannot do without
    diagnostics(stats) -> dict             per-token numbers [N] to be logged beside the loss
    sequence_weights(stats, segments)      numbers [N] that need a whole sequence, without gradient; they reach
                                           `__call__` as `stats.sequence_weight`. `stats` holds what the tuple
                                           `sequence_needs` names (of `logp`, `ref_logp`) and the columns, from one
                                           cheap pass; `segments` [N] numbers the sequence of each token
    calibrate(stats) -> dict               hyper-parameters estimated once on the base, as the policy, before training
    at(step) -> Objective                  the objective of an optimizer step, where it changes
    refresh: int                           the trainer makes the column `old_logp`, from a copy of the weights taken
                                           anew every so many optimizer steps
    target_mass(stats) -> Tensor           where its target is the base lifted at y: that target's probability w of y,
                                           by which the surprise cache knows where the base is needed
    most_cautious() -> Objective           with `at`: the objective of the step at which w is smallest
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the statistics read by `__call__`, among `STATS`."""

    def __call__(self, stats: TokenStats) -> Tensor:
        """Loss of each token, [N], differentiable in the statistics."""


def needs_reference(objective: Objective) -> bool:
    """Whether the objective reads anything of the base model."""
    read = {*objective.needs, *getattr(objective, "sequence_needs", ())}
    return bool(REFERENCE_STATS & read)


def discounted_sum(values: Tensor, segments: Tensor, memory: float = 1.0) -> Tensor:
    """Σ_{j ≤ t} memory^(t−j)·values_j within each segment, [N] float64; a segment's tokens stand next to each other.

    By doubling: after the round of stride k each entry covers the 2k values up to itself.
    """
    total = values.double()
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[1:] = segments[1:] != segments[:-1]
    position = torch.arange(len(values), device=values.device)
    depth = position - torch.where(starts, position, 0).cummax(0).values  # tokens before it in its segment
    stride, longest = 1, int(depth.max()) if len(values) else 0
    while stride <= longest:
        shifted = torch.zeros_like(total)
        shifted[stride:] = total[:-stride]
        total = total + memory**stride * torch.where(depth >= stride, shifted, 0.0)
        stride *= 2
    return total
