"""The clipped surrogate against its cases written out one token at a time."""

import math

import pytest
import torch

from heatbath.ideas.policy import kl_k3, policy


def one_token(logp: float, old: float, advantage: float, clip: float) -> tuple[float, bool]:
    ratio = math.exp(logp - old)
    if advantage >= 0:
        return -min(ratio, 1 + clip) * advantage, advantage > 0 and ratio > 1 + clip
    return -max(ratio, 1 - clip) * advantage, ratio < 1 - clip


def test_token_loss_is_the_clipped_surrogate() -> None:
    g = torch.Generator().manual_seed(0)
    logp = -2 * torch.rand(6, 9, generator=g, dtype=torch.float64)
    old = -2 * torch.rand(6, 9, generator=g, dtype=torch.float64)
    advantages = torch.tensor([0.7, -0.3, 0.0, 1.0, -1.0, 0.25], dtype=torch.float64)
    loss, clipped = policy("paper", clip_low=0.2, clip_high=0.2).token_loss(logp, old, advantages)
    for b in range(6):
        for t in range(9):
            expected = one_token(logp[b, t].item(), old[b, t].item(), advantages[b].item(), 0.2)
            assert (loss[b, t].item(), clipped[b, t].item()) == pytest.approx(expected)


def test_k3_is_never_negative_and_unbiased() -> None:
    g = torch.Generator().manual_seed(1)
    p = torch.randn(11, generator=g, dtype=torch.float64).log_softmax(-1)
    q = torch.randn(11, generator=g, dtype=torch.float64).log_softmax(-1)
    per_token = kl_k3(p, q)
    assert (per_token >= 0).all()
    assert (p.exp() * per_token).sum().item() == pytest.approx((p.exp() * (p - q)).sum().item())


def test_unknown_policies_are_named() -> None:
    with pytest.raises(ValueError, match="known: paper"):
        policy("grop")
    with pytest.raises(ValueError, match="clip_lo"):
        policy("paper", clip_lo=0.1)
    with pytest.raises(ValueError, match="clip_low"):
        policy("paper", clip_low=1.5)
