"""GIFT against literal Algorithm 1 (arXiv 2601.09233) in float64, and against its limits."""

import math

import pytest
import torch
import torch.nn.functional as F

from heatbath.ideas.engine import dense_loss
from heatbath.ideas.gift import Gift
from heatbath.ideas.objectives import Sft, objective
from heatbath.ideas.statistics import TokenStats

N, V = 64, 97


def logits(seed: int, scale: float = 4.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(N, V, generator=generator, dtype=torch.float64)


def labels() -> torch.Tensor:
    return torch.randint(V, (N,), generator=torch.Generator().manual_seed(9))


def algorithm_1(z: torch.Tensor, z_base: torch.Tensor, y: torch.Tensor, beta: float, smoothing: float) -> torch.Tensor:
    """Target softmax(log p~ + β·onehot(y)), cross-entropy of the policy to it, written out over the vocabulary."""
    p = (1 - smoothing) * z_base.softmax(-1) + smoothing / V
    target = (p.log() + beta * F.one_hot(y, V).to(p.dtype)).softmax(-1)
    return -(target * z.log_softmax(-1)).sum(-1)


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0, 5.0, 10.0, 20.0, 40.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.01])
def test_gift_is_algorithm_1(beta: float, smoothing: float) -> None:
    z, y = logits(0).requires_grad_(), labels()
    literal = algorithm_1(z, logits(1), y, beta, smoothing)
    ours = dense_loss(Gift(beta, smoothing), z, y, ref_logits=logits(1))
    torch.testing.assert_close(ours, literal, rtol=1e-12, atol=1e-12)
    (expected,) = torch.autograd.grad(literal.sum(), z)
    (found,) = torch.autograd.grad(ours.sum(), z)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_large_beta_is_sft_and_zero_beta_is_distillation() -> None:
    z, base, y = logits(0), logits(1), labels()
    torch.testing.assert_close(dense_loss(Gift(300.0), z, y, ref_logits=base), dense_loss(Sft(), z, y))
    distilled = F.kl_div(z.log_softmax(-1), base.softmax(-1), reduction="none").sum(-1)
    entropy = torch.distributions.Categorical(logits=base).entropy()
    torch.testing.assert_close(dense_loss(Gift(0.0), z, y, ref_logits=base), distilled + entropy)


def test_gradient_at_the_base_is_sft_times_one_minus_keep() -> None:
    y, target = labels(), Gift(6.0)
    z = logits(1).requires_grad_()
    (gift,) = torch.autograd.grad(dense_loss(target, z, y, ref_logits=z.detach()).sum(), z)
    (sft,) = torch.autograd.grad(dense_loss(Sft(), z, y).sum(), z)
    logp = z.detach().log_softmax(-1).gather(-1, y[:, None]).squeeze(-1)
    base = TokenStats(vocab_size=V, ref_logp=logp)
    torch.testing.assert_close(gift, (1 - target.keep(base))[:, None] * sft)
    # and anywhere, the distance between the two gradients is what the target leaves off the token
    z = logits(2).requires_grad_()
    (gift,) = torch.autograd.grad(dense_loss(target, z, y, ref_logits=logits(1)).sum(), z)
    (sft,) = torch.autograd.grad(dense_loss(Sft(), z, y).sum(), z)
    torch.testing.assert_close((gift - sft).abs().sum(-1), 2 * (1 - target.target_mass(base)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keep_and_mass_hold_at_extreme_surprise(dtype: torch.dtype) -> None:
    logp = -torch.tensor([1e-12, 1e-3, 1.0, 10.0, 20.0, 100.0, 1e4], dtype=dtype)
    for beta in (0.0, 5.0, 20.0, 300.0):
        base = TokenStats(vocab_size=V, ref_logp=logp)
        keep, mass = Gift(beta).keep(base), Gift(beta).target_mass(base)
        assert torch.isfinite(keep).all() and ((keep >= 0) & (keep <= 1)).all()
        p = logp.double().exp()
        odds = beta + torch.where(p < 1, (p / (1 - p)).log(), math.inf)
        torch.testing.assert_close(mass.double(), odds.sigmoid(), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("gitf", {}, "did you mean 'gift'"),
        ("gift", {}, "needs 'beta'"),
        ("gift", {"beta": -1.0}, "beta must be"),
        ("gift", {"beta": math.nan}, "beta must be"),
        ("gift", {"beta": 1.0, "smothing": 0.1}, "did you mean 'smoothing'"),
        ("gift", {"beta": 1.0, "smoothing": 1.0}, "smoothing must lie"),
        ("gift", {"beta": "high"}, "must be a finite number"),
        ("sft", {"beta": 1.0}, "takes no hyper-parameters"),
    ],
)
def test_wrong_objectives_are_named(name: str, hyper: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        objective(name, **hyper)


def test_a_statistic_nobody_asked_for_is_an_error_not_a_zero() -> None:
    with pytest.raises(AttributeError, match="needs"):
        _ = TokenStats(logp=torch.zeros(3)).entropy
    with pytest.raises(AttributeError, match="no statistic or column"):
        _ = TokenStats(logp=torch.zeros(3)).advantage
    assert TokenStats(columns={"advantage": torch.ones(3)}).advantage.sum() == 3
