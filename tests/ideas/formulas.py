"""The objectives as their papers and codes write them, over full logits, and the problems they are tried on.

Independent of the package: every formula is literal torch over [N, V] (sequence weights are python loops), so that
autograd of it is the truth for loss and gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from heatbath.ideas.engine import dense_loss
from heatbath.ideas.gift import Column, Gift, GiftSequence
from heatbath.ideas.objectives import (
    Asft,
    ChordPhi,
    Dft,
    Eaft,
    Entropy,
    Idft,
    IwSft,
    Kd,
    LabelSmoothing,
    Luffy,
    Pear,
    Power,
    Psft,
    Sed,
    Sft,
    TrSft,
)
from heatbath.ideas.statistics import Objective

EXACT = {"rtol": 1e-11, "atol": 1e-12}


@dataclass
class Tokens:
    """N tokens with their logits: z the policy's, r the base's, y the labels."""

    z: Tensor
    r: Tensor
    y: Tensor
    segments: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)

    @property
    def log_pi(self) -> Tensor:
        return self.z.log_softmax(-1)

    @property
    def log_base(self) -> Tensor:
        return self.r.log_softmax(-1)

    @property
    def logp(self) -> Tensor:
        return self.label(self.log_pi)

    @property
    def ref_logp(self) -> Tensor:
        return self.label(self.log_base)

    def label(self, x: Tensor) -> Tensor:
        return x.gather(-1, self.y[:, None]).squeeze(-1)


def tokens(lengths: tuple[int, ...] = (7, 1, 12, 4), vocab: int = 31, scale: float = 3.0, seed: int = 0) -> Tokens:
    """Ragged sequences in float64; the columns lie on both sides of every clip of `CASES`."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    z = scale * torch.randn(n, vocab, generator=g, dtype=torch.float64)
    r = z + 2.0 * torch.randn(n, vocab, generator=g, dtype=torch.float64)
    y = torch.where(torch.rand(n, generator=g) < 0.5, z.argmax(-1), torch.randint(vocab, (n,), generator=g))
    r[2::4] += 5.0 * F.one_hot(y[2::4], vocab)  # tokens that the base likes better than the policy
    z[n // 2] -= 40.0 * F.one_hot(y[n // 2], vocab)  # one that is next to impossible
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    made = Tokens(z.requires_grad_(), r, y, segments)
    made.columns = columns(made.logp.detach())
    return made


def columns(logp: Tensor) -> dict[str, Tensor]:
    """Every column some objective reads, about the policy's own log-probabilities [N]."""
    step = torch.arange(len(logp), device=logp.device)
    old = torch.tensor([-0.7, 0.1, 0.8, 0.0], dtype=torch.float64)[step % 4]  # log-ratios; ln 1.28 = 0.247
    generator = torch.tensor([-0.5, -0.05, 0.1, 0.6, 0.0], dtype=torch.float64)[step % 5]
    return {
        "old_logp": logp.double() - old,
        "generator_logp": logp.double() - generator,
        "advantage": torch.tensor([0.875, -0.125, 1.0], dtype=torch.float64)[step % 3],
        "beta": torch.tensor([0.0, 0.5, 3.0, 8.0, 30.0], dtype=torch.float64)[step % 5],
    }


def cross_entropy(target: Tensor, log_pi: Tensor) -> Tensor:
    return -(target.detach() * log_pi).sum(-1)


def forward_kl(t: Tokens) -> Tensor:
    """KL(p_base ‖ π)."""
    return (t.log_base.exp() * (t.log_base - t.log_pi)).sum(-1)


def reverse_kl(t: Tokens) -> Tensor:
    """KL(π ‖ p_base)."""
    return (t.log_pi.exp() * (t.log_pi - t.log_base)).sum(-1)


def entropy(log_p: Tensor) -> Tensor:
    return -(log_p.exp() * log_p).sum(-1)


def smoothed_ce(t: Tokens, epsilon: float) -> Tensor:
    return (1 - epsilon) * -t.logp + epsilon * (1 / t.z.shape[-1]) * (-t.log_pi).sum(-1)


def dft(t: Tokens) -> Tensor:
    return -t.logp.exp().detach() * t.logp


def psft(t: Tokens, low: float, high: float) -> Tensor:
    ratio = (t.logp - t.columns["old_logp"]).clamp(-20, 20).exp()
    return -torch.min(ratio, torch.clamp(ratio, 1 - low, 1 + high))


def gift_target(t: Tokens, beta: float | Tensor, smoothing: float = 0.0, floor: float = 0.0) -> Tensor:
    """The authors' order: softmax, uniform mix, log(p + floor), β at the label, softmax."""
    V = t.r.shape[-1]
    p = (1 - smoothing) * t.r.softmax(-1) + smoothing / V
    lift = torch.as_tensor(beta, dtype=p.dtype).expand(len(t.y))
    return ((p + floor).log() + lift[:, None] * F.one_hot(t.y, V).to(p.dtype)).softmax(-1)


def gift(t: Tokens, beta: float | Tensor, smoothing: float = 0.0, floor: float = 0.0) -> Tensor:
    return cross_entropy(gift_target(t, beta, smoothing, floor), t.log_pi)


def gift_sequence(t: Tokens, mass: float, memory: float) -> Tensor:
    """Target ρ·onehot(y) + (1 − ρ)·p_base, ρ = σ(logit m + γ·S), S ← γ·S + s along each sequence."""
    losses, spent, before = [], 0.0, None
    for i, segment in enumerate(t.segments.tolist()):
        spent = spent if segment == before else 0.0
        rho = 1 / (1 + (1 - mass) / mass * math.exp(-memory * spent))
        onehot = F.one_hot(t.y[i], t.z.shape[-1]).to(t.z.dtype)
        target = rho * onehot + (1 - rho) * t.log_base[i].exp()
        losses.append(cross_entropy(target, t.log_pi[i]))
        spent, before = memory * spent - t.ref_logp[i].item(), segment
    return torch.stack(losses)


def iw_sft(t: Tokens, tau: float, cap: float = 16.0) -> Tensor:
    weight = torch.empty_like(t.ref_logp)
    for segment in set(t.segments.tolist()):
        here = t.segments == segment
        weight[here] = min(math.exp(tau * (t.logp - t.ref_logp)[here].mean().item()), cap)
    return weight * -t.logp


def iw_sft_token(t: Tokens) -> Tensor:
    return torch.clamp(t.logp.exp() / t.ref_logp.exp(), 0.2, 1.8).detach() * -t.logp


def eaft(t: Tokens, alpha: float, k: int, norm: float) -> Tensor:
    best = t.log_pi.detach().exp().sort(descending=True).values[:, :k]
    best = best / best.sum(-1, keepdim=True)
    return (-(best * best.log()).sum(-1) / norm) ** alpha * -t.logp


def chord_phi(t: Tokens) -> Tensor:
    p = t.logp.exp().detach()
    return p * (1 - p) * -t.logp


def idft(t: Tokens, strength: float, tau: float) -> Tensor:
    phi = t.logp + entropy(t.log_pi)
    gamma = 1 + strength * ((-phi / tau).exp().clamp(0.1, 2.0) - 1)
    return -(t.logp.exp().clamp(min=1e-10) ** gamma).detach() * t.logp


def sed(t: Tokens, weight: float, k: int, threshold: float) -> Tensor:
    p, full = t.logp.exp(), t.log_pi.exp()
    undecided = (full.sort(descending=True).values[:, :k].sum(-1) < threshold).to(p.dtype)
    return -t.logp + weight * undecided.detach() * (p * (p - 1) + 0.25)


def pear(t: Tokens, gamma: float, low: float, high: float) -> Tensor:
    delta = (t.logp - t.columns["generator_logp"]).clamp(low, high).tolist()
    segment = t.segments.tolist()
    weight = []
    for i in range(len(segment)):
        log_g, j = 0.0, i + 1
        while j < len(segment) and segment[j] == segment[i]:
            log_g += math.log(gamma) + delta[j]
            j += 1
        weight.append(math.exp(min(max(log_g, -10.0), 5.0)))
    return torch.tensor(weight, dtype=t.z.dtype) * -t.logp


def trsft(t: Tokens, alpha: float) -> Tensor:
    p = t.logp.exp()
    return -p / p.detach().clamp(min=alpha)


def luffy(t: Tokens, gamma: float) -> Tensor:
    p = t.logp.exp()
    return -t.columns["advantage"] * p / (p + gamma)


@dataclass(frozen=True)
class Case:
    name: str
    objective: Objective
    literal: Callable[[Tokens], Tensor]


CASES = [
    Case("sft", Sft(), lambda t: -t.logp),
    Case("entropy", Entropy(0.3), lambda t: -t.logp - 0.3 * entropy(t.log_pi)),
    Case("label_smoothing", LabelSmoothing(0.2), lambda t: smoothed_ce(t, 0.2)),
    Case("kd", Kd(0.3), lambda t: 0.7 * -t.logp + 0.3 * forward_kl(t)),
    Case("kd reverse", Kd(0.3, "reverse"), lambda t: 0.7 * -t.logp + 0.3 * reverse_kl(t)),
    Case("kd additive", Kd(0.3, "forward", "additive"), lambda t: -t.logp + 0.3 * forward_kl(t)),
    Case("kd additive reverse", Kd(0.3, "reverse", "additive"), lambda t: -t.logp + 0.3 * reverse_kl(t)),
    Case("dft", Dft(), dft),
    Case("asft", Asft(0.2), lambda t: dft(t) + 0.2 * forward_kl(t)),
    Case("asft reverse", Asft(0.2, "reverse"), lambda t: dft(t) + 0.2 * reverse_kl(t)),
    Case("psft", Psft(0.2, 0.28), lambda t: psft(t, 0.2, 0.28)),
    Case("gift", Gift(4.0), lambda t: gift(t, 4.0)),
    Case("gift smoothed", Gift(4.0, smoothing=0.05), lambda t: gift(t, 4.0, 0.05)),
    Case("gift floor", Gift(4.0, 0.01, floor=1e-10), lambda t: gift(t, 4.0, 0.01, 1e-10)),
    Case("gift column", Gift(Column("beta")), lambda t: gift(t, t.columns["beta"])),
    Case("gift_sequence", GiftSequence(0.3), lambda t: gift_sequence(t, 0.3, 1.0)),
    Case("gift_sequence memory", GiftSequence(0.3, memory=0.5), lambda t: gift_sequence(t, 0.3, 0.5)),
    Case("iw_sft", IwSft(tau=1.5), lambda t: iw_sft(t, 1.5)),
    Case("iw_sft token", IwSft(level="token"), iw_sft_token),
    Case("eaft", Eaft(alpha=1.5, topk=5), lambda t: eaft(t, 1.5, 5, 3.0)),
    Case("power", Power(0.4), lambda t: (1 - t.logp.exp() ** 0.4) / 0.4),
    Case("chord_phi", ChordPhi(), chord_phi),
    Case("idft", Idft(0.7, 0.4), lambda t: idft(t, 0.7, 0.4)),
    Case("sed", Sed(weight=1.5, topk=3, threshold=0.9), lambda t: sed(t, 1.5, 3, 0.9)),
    Case("pear", Pear(0.99), lambda t: pear(t, 0.99, -0.08, 0.3)),
    Case("trsft", TrSft(0.2), lambda t: trsft(t, 0.2)),
    Case("luffy", Luffy(0.1), lambda t: luffy(t, 0.1)),
]


def case(name: str) -> Case:
    return next(c for c in CASES if c.name == name)


def loss(target: Objective, t: Tokens) -> Tensor:
    """The package's loss of each token, from full logits."""
    return dense_loss(target, t.z, t.y, ref_logits=t.r, columns=t.columns, segments=t.segments)


def gradient(of: Tensor, t: Tokens) -> Tensor:
    """d(sum of the losses)/dz, [N, V]."""
    return torch.autograd.grad(of.sum(), t.z, retain_graph=True)[0]


def same(found: Tensor, expected: Tensor, t: Tokens, **tolerance: float) -> None:
    """Same loss of each token and same gradient in the logits."""
    torch.testing.assert_close(found, expected, **(tolerance or EXACT))
    torch.testing.assert_close(gradient(found, t), gradient(expected, t), **(tolerance or EXACT))
