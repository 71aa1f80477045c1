"""RL objectives as rows of a table: advantage × ratio × surrogate × reduction.

B completions, T tokens of the longest, G completions of one prompt (a group).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Policy:
    """One RL method: how a completion's advantage becomes a loss of its tokens.

    Defaults are the first paper's setting (arXiv 2601.09233, appendix E.2): ratio clipped at 0.2, advantages centred
    in the group and not divided by its standard deviation. The reduction (token mean over the optimizer step) and the
    absence of a KL term, an entropy bonus and a dual clip are our reading: the paper leaves them unstated.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        if not (0 <= self.clip_low < 1 and self.clip_high >= 0):
            raise ValueError(f"need 0 ≤ clip_low < 1 and clip_high ≥ 0, not {self.clip_low} and {self.clip_high}")

    def token_loss(self, logp: Tensor, old_logp: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """Clipped surrogate −min(r·A, clip(r)·A) of each token and whether the clip decided it, both [B, T].

        `logp` and `old_logp` are [B, T] (the latter constant), `advantages` [B].
        """
        ratio = (logp - old_logp.detach()).exp()
        a = advantages.detach()[:, None]
        clipped = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        loss = -torch.minimum(ratio * a, clipped * a)
        decided = ((ratio < 1 - self.clip_low) & (a < 0)) | ((ratio > 1 + self.clip_high) & (a > 0))
        return loss, decided


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """k3 estimate of KL(π ‖ π_ref) per token sampled from π: e^{−d} − 1 + d, d = log π − log π_ref; never < 0."""
    d = logp - ref_logp
    return torch.expm1(-d) + d


POLICIES: dict[str, type[Policy]] = {"paper": Policy}


def policy(name: str, **hyper: float) -> Policy:
    """The policy of that recipe name. Raises ValueError on an unknown name or hyper-parameter."""
    if name not in POLICIES:
        raise ValueError(f"unknown policy '{name}'; known: {', '.join(POLICIES)}")
    try:
        return POLICIES[name](**hyper)
    except TypeError as error:
        raise ValueError(f"policy '{name}': {error}") from None
