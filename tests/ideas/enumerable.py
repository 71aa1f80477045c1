"""A task so small that every answer is listed: V tokens, T positions, all V^T sequences with their probabilities.

A distribution is the tensor of its log-probabilities, [V, …, V] with T dimensions, float64; −inf where it has none. Its
conditionals are T tensors, the t-th [V, …, V] with t + 1 dimensions: log p(token t | tokens before it).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from heatbath.ideas.gift import Gift, GiftSequence
from heatbath.ideas.statistics import TokenStats

Answer = tuple[int, ...]
Mass = Callable[
    [TokenStats], Tensor
]  # an objective's target: how much of it lies on each demonstrated token of one answer


def random_base(vocab: int, length: int, spread: float, draw: torch.Generator) -> Tensor:
    """Every next-token logit normal with standard deviation `spread`."""
    shapes = [(vocab,) * (t + 1) for t in range(length)]
    return joined([(spread * torch.randn(s, generator=draw, dtype=torch.float64)).log_softmax(-1) for s in shapes])


def joined(conditionals: Sequence[Tensor]) -> Tensor:
    length = len(conditionals)
    return reduce(torch.add, (c.reshape(c.shape + (1,) * (length - c.dim())) for c in conditionals))


def marginals(joint: Tensor) -> list[Tensor]:
    """log p of each beginning of t + 1 tokens."""
    T = joint.dim()
    return [joint.logsumexp(tuple(range(t + 1, T))) if t + 1 < T else joint for t in range(T)]


def conditionals(joint: Tensor) -> list[Tensor]:
    """Raises ValueError where a beginning has no probability: nothing follows it then."""
    if not bool(torch.isfinite(joint).all()):
        raise ValueError("a distribution without full support has no conditionals after what it rules out")
    return [m.log_softmax(-1) for m in marginals(joint)]


def reward(valid: Sequence[Answer], like: Tensor) -> Tensor:
    """1 at the valid answers."""
    r = torch.zeros_like(like)
    for y in valid:
        r[y] = 1.0
    return r


def gibbs(start: Tensor, r: Tensor, strength: float) -> Tensor:
    """start·exp(strength·R)/Z: the start of the first paper's equation 5, and where RL with a KL of 1/strength ends."""
    return (start + strength * r).flatten().log_softmax(0).view_as(start)


def soft_advantage(start: Tensor, r: Tensor, strength: float) -> list[Tensor]:
    """A*(token | beginning) = log E[e^{strength·R} | beginning, token] − log E[e^{strength·R} | beginning]."""
    plain, lifted = marginals(start), marginals(start + strength * r)
    values = [a - b for a, b in zip(lifted, plain, strict=True)]
    before = [(start + strength * r).flatten().logsumexp(0) - start.flatten().logsumexp(0), *values[:-1]]
    return [after - at[..., None] if at.dim() else after - at for after, at in zip(values, before, strict=True)]


def token_mass(goal: Gift) -> Mass:
    return goal.target_mass


def sequence_mass(goal: GiftSequence) -> Mass:
    def mass(stats: TokenStats) -> Tensor:
        one = torch.zeros(len(stats.ref_logp), dtype=torch.long)
        stats.columns["sequence_weight"] = goal.sequence_weights(stats, one)
        return goal.target_mass(stats)

    return mass


def learned(base: Tensor, demos: Sequence[Answer], target_mass: Mass) -> Tensor:
    """The policy at which the token losses of an objective are least: after each beginning of a demonstration the mean
    of the targets of the demonstrations that begin so, and the base's own conditional elsewhere."""
    own = conditionals(base)
    sums = [torch.zeros_like(c) for c in own]
    seen = [torch.zeros(c.shape[:-1], dtype=c.dtype) for c in own]
    for y in demos:
        logp = torch.stack([c[y[: t + 1]] for t, c in enumerate(own)])
        stats = TokenStats(vocab_size=base.shape[0], ref_logp=logp)
        mass = target_mass(stats)
        for t, c in enumerate(own):
            row = c[y[:t]].exp()
            rest = row * (1 - mass[t]) / (1 - row[y[t]])  # every objective here leaves the others in proportion
            rest[y[t]] = mass[t]
            sums[t][y[:t]] += rest
            seen[t][y[:t]] += 1
    mixed = []
    for c, total, count in zip(own, sums, seen, strict=True):
        there = (count > 0)[..., None]
        mixed.append(torch.where(there, (total / count.clamp(min=1)[..., None]).log(), c))
    return joined(mixed)


def descended(base: Tensor, demos: Sequence[Answer], nll: float, rate: float = 0.5) -> Tensor:
    """SFT by gradient descent on next-token logits until the demonstrations cost `nll` nats an answer in the mean; of
    several, until they cost `nll` more than their own distribution does."""
    logits = [c.clone() for c in conditionals(base)]
    shares = [torch.zeros_like(c) for c in logits]
    for y in demos:
        for t, share in enumerate(shares):
            share[y[: t + 1]] += 1 / len(demos)
    best = torch.log(torch.tensor(float(len(set(demos))), dtype=base.dtype))
    for _ in range(1_000_000):
        logp = [z.log_softmax(-1) for z in logits]
        if -sum((s * c).sum() for s, c in zip(shares, logp, strict=True)) - best < nll:
            return joined(logp)
        for z, c, share in zip(logits, logp, shares, strict=True):
            z += rate * (share - share.sum(-1, keepdim=True) * c.exp())
    raise AssertionError("gradient descent has not fitted the demonstrations")


def maximised(start: Tensor, r: Tensor, strength: float) -> Tensor:
    """The maximum of E[R] − KL(π ‖ start)/strength over next-token logits, found by L-BFGS and not by the formula."""
    logits = [c.clone().requires_grad_() for c in conditionals(start)]
    search = torch.optim.LBFGS(
        logits, max_iter=2000, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe", history_size=30
    )

    def closure() -> Tensor:
        search.zero_grad()
        joint = joined([z.log_softmax(-1) for z in logits])
        loss = (joint.exp() * (joint - start - strength * r)).sum()
        loss.backward()
        return loss

    search.step(closure)
    return joined([z.detach().log_softmax(-1) for z in logits])


def climbed(start: Tensor, r: Tensor, success: float, rate: float = 1.0) -> Tensor:
    """Policy gradient on next-token logits without any KL, exact instead of sampled, until E[R] is `success`."""
    logits = [c.clone() for c in conditionals(start)]
    for _ in range(1_000_000):
        joint = joined([z.log_softmax(-1) for z in logits])
        p = joint.exp()
        if (p * r).sum() >= success:
            return joint
        for z, up, all_ in zip(logits, marginals((p * r).log()), marginals(joint), strict=True):
            # ∂E[R]/∂z(v | beginning) = P(beginning, v, right) − π(v | beginning)·P(beginning, right)
            right = up.exp()
            z += rate * (right - (all_.log_softmax(-1)).exp() * right.sum(-1, keepdim=True))
    raise AssertionError("the policy gradient has not come to the wanted reward")


def distance(p: Tensor, q: Tensor) -> float:
    """KL(p ‖ q) in nats; inf where q rules out what p allows."""
    there = torch.isfinite(p)
    return float((p[there].exp() * (p[there] - q[there])).sum())


def paths(p: Tensor, r: Tensor) -> float:
    """How many valid answers a distribution takes, as e to the entropy among them."""
    right = p[r > 0].log_softmax(0)
    return float(torch.exp(-(right.exp() * right.clamp(min=-1e4)).sum()))
