"""The RL objectives as their papers write them: Python loops over groups, completions and tokens, one number at a time.

Independent of the package: numbers are float64 scalars, so that autograd of the loops is the truth for loss and
gradient. `BY_HAND` is our own reading of the papers' settings, not the package's table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NONE = math.nan  # a completion that could not be graded
JUNK = 1e4  # what padding holds: a ratio of two of them overflows


@dataclass
class Batch:
    """An optimizer step of B completions in groups; all [B, T] but `rewards` and `groups` [B]."""

    logp: Tensor
    entropy: Tensor
    old: Tensor
    ref: Tensor
    mask: Tensor
    expert: Tensor
    rewards: Tensor
    groups: Tensor

    def given(self, expert: bool) -> dict[str, Tensor | None]:
        """What `policy_loss` takes beside the policy and `logp`."""
        return {
            "old_logp": self.old,
            "mask": self.mask,
            "rewards": self.rewards,
            "groups": self.groups,
            "ref_logp": self.ref,
            "entropy": self.entropy,
            "expert": self.expert if expert else None,
        }

    def differentiable(self) -> tuple[Tensor, Tensor]:
        return self.logp, self.entropy


# (group, reward, tokens written by the policy, tokens of a demonstration in front of them)
ROWS = [
    (7, 1.0, 4, 0),
    (3, 0.25, 1, 0),
    (7, 0.0, 6, 1),
    (12, 0.1, 3, 0),
    (3, -1.0, 7, 0),
    (7, NONE, 2, 2),
    (12, 0.1, 5, 2),
    (40, 1.0, 2, 0),
    (7, 0.9, 3, 4),
    (12, 0.1, 2, 0),
    (3, 2.0, 0, 5),
    (40, NONE, 4, 0),
    (51, NONE, 2, 0),
    (51, NONE, 1, 1),
]
WIDTH = 9


def batch(seed: int = 0, guided: bool = False) -> Batch:
    """Ragged groups in mixed order: one with an ungraded completion, one of equal rewards, one in which a single
    completion was graded, one in which none was; a token in the middle of a completion that does not count. With
    `guided` nobody sampled the demonstrated tokens, else they are tokens like the others."""
    g = torch.Generator().manual_seed(seed)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(len(ROWS), WIDTH, generator=g, dtype=torch.float64)

    logp = -2.5 * torch.rand(len(ROWS), WIDTH, generator=g, dtype=torch.float64) - 0.05
    old, ref, entropy = logp + noise(0.7), logp + noise(0.5), noise(1.0).abs()
    old[0] = logp[0]  # sampled by this very policy: a clip of 3e-4 does not bind
    for i, t in ((4, 1), (6, 3), (10, 2)):
        old[i, t] = logp[i, t] - 2  # beyond a cap of 5
    mask, expert = torch.zeros(2, len(ROWS), WIDTH, dtype=torch.float64)
    for i, (_, _, own, demonstrated) in enumerate(ROWS):
        mask[i, : own + demonstrated] = 1
        expert[i, :demonstrated] = 1
    mask[4, 3] = 0
    for tensor, inside in ((old, JUNK), (ref, JUNK), (entropy, math.nan)):
        tensor[mask == 0] = inside
    logp[mask == 0] = -JUNK
    if guided:
        old[expert == 1], ref[expert == 1] = -JUNK, JUNK
    rewards = torch.tensor([r for _, r, _, _ in ROWS], dtype=torch.float64)
    groups = torch.tensor([i for i, _, _, _ in ROWS])
    return Batch(logp.requires_grad_(), entropy.requires_grad_(), old, ref, mask, expert, rewards, groups)


def small_steps(b: Batch) -> Batch:
    """The same with ratios near 1, where a clip decides some completions and not others."""
    inside = b.mask.bool() & ~b.expert.bool()
    old = torch.where(inside, b.logp.detach() + 0.17 * (b.old - b.logp.detach()), b.old)
    return Batch(b.logp, b.entropy, old, b.ref, b.mask, b.expert, b.rewards, b.groups)


BY_HAND: dict[str, dict[str, Any]] = {
    "paper": {},
    "grpo": {"advantage": "normalised", "reduction": "seq_mean_token_mean"},
    "dr_grpo": {"reduction": "seq_mean_token_sum_norm"},
    "dapo": {"advantage": "normalised", "clip_high": 0.28, "overlong": 0.2},
    "gspo": {
        "advantage": "normalised",
        "ratio": "sequence",
        "reduction": "seq_mean_token_mean",
        "clip_low": 0.0003,
        "clip_high": 0.0004,
    },
    "cispo": {"advantage": "normalised", "surrogate": "cap", "clip_high": 5.0},
    "rloo": {"advantage": "leave_one_out", "ratio": "product", "reduction": "seq_mean_token_mean"},
    "reinforce": {"advantage": "reward", "ratio": "none", "surrogate": "score", "reduction": "seq_mean_token_sum"},
    "luffy": {"surrogate": "linear", "reduction": "sum_over_width", "entropy": 0.001, "gamma": 0.1},
    "relift": {"surrogate": "linear", "reduction": "sum_over_width", "entropy": 0.001},
    "trapo": {"surrogate": "linear", "reduction": "sum_over_width", "entropy": 0.001, "alpha": 0.1},
    "uft": {"advantage": "normalised", "kl": 0.001, "entropy": 0.001, "hint_loss": 0.001},
    "implicit": {},
    "gvpo": {},
}
GUIDED = ("luffy", "trapo", "uft")


def by_hand(name: str, b: Batch, **options: Any) -> Tensor:
    """The loss of an optimizer step."""
    o = {"length": WIDTH, "kl": 0.0, "kl_estimator": "k3", "entropy": 0.0} | BY_HAND[name] | options
    inside = tokens(b, everything=True)
    own = tokens(b, everything=name not in GUIDED)
    rewards = [shaped(float(r), len(t), o) for r, t in zip(b.rewards, inside, strict=True)]
    if name in ("implicit", "gvpo"):
        loss = regression(name, b, rewards, o)
    else:
        of = advantages(rewards, b.groups.tolist(), o)
        loss = surrogate_loss(name, b, of, inside if name in ("luffy", "trapo") else own, o)
    if name == "uft":
        hints = [(i, t) for i, ts in enumerate(inside) for t in ts if b.expert[i, t]]
        loss = loss + o["hint_loss"] * sum(-b.logp[i, t] for i, t in hints) / len(hints)
    if o["kl"]:
        loss = loss + o["kl"] * reduced([[kl(b.logp[i, t], b.ref[i, t], o) for t in ts] for i, ts in enumerate(own)], o)
    if o["entropy"]:
        raised = [b.entropy[i, t] for i, ts in enumerate(own if name == "uft" else inside) for t in ts]
        loss = loss - o["entropy"] * sum(raised) / len(raised)
    return loss


def tokens(b: Batch, everything: bool) -> list[list[int]]:
    """Of each completion, the positions that count; those of demonstrations only where asked for."""
    return [
        [t for t in range(WIDTH) if b.mask[i, t] == 1 and (everything or b.expert[i, t] == 0)] for i in range(len(ROWS))
    ]


def shaped(reward: float, length: int, o: dict[str, Any]) -> float:
    if o.get("sqrt_length"):
        reward /= math.sqrt(length)
    if o.get("overlong"):  # arXiv 2503.14476, eq. 13
        buffer = o["overlong"] * o["length"]
        if length > o["length"]:
            reward -= o.get("overlong_penalty", 1.0)
        elif length > o["length"] - buffer:
            reward -= o.get("overlong_penalty", 1.0) * (length - (o["length"] - buffer)) / buffer
    return reward


def advantages(rewards: list[float], groups: list[int], o: dict[str, Any]) -> list[float]:
    found = []
    for mine, group in zip(rewards, groups, strict=True):
        others = [r for r, g in zip(rewards, groups, strict=True) if g == group and not math.isnan(r)]
        kind = o.get("advantage", "centred")
        if math.isnan(mine) or (kind == "normalised" and len(set(others)) < 2):
            found.append(0.0)
        elif callable(kind):
            found.append(kind(mine, others))
        elif kind == "reward":
            found.append(mine)
        elif kind == "leave_one_out":
            rest = (sum(others) - mine) / (len(others) - 1) if len(others) > 1 else mine
            found.append(mine - rest)
        else:
            mean = sum(others) / len(others)
            deviation = math.sqrt(sum((r - mean) ** 2 for r in others) / max(len(others) - o.get("ddof", 1), 1))
            scale = deviation + o.get("std_epsilon", 1e-4) if kind == "normalised" else 1.0
            found.append((mine - mean) / scale)
    return found


def surrogate_loss(name: str, b: Batch, of: list[float], inside: list[list[int]], o: dict[str, Any]) -> Tensor:
    losses: list[list[Tensor]] = []
    for i, (a, positions) in enumerate(zip(of, inside, strict=True)):
        written = [t for t in positions if name not in GUIDED or b.expert[i, t] == 0]
        mine = []
        for t in positions:
            p = b.logp[i, t].exp()
            if t not in written and name == "luffy":
                mine.append(-a * p / (p + o["gamma"]))
            elif t not in written and name == "trapo":
                mine.append(-p / max(p.item(), o["alpha"]))
            else:
                mine.append(one_token(ratio_of(b, i, t, written, o.get("ratio", "token")), a, b.logp[i, t], o))
        losses.append(mine)
    return reduced(losses, o)


def ratio_of(b: Batch, i: int, t: int, written: list[int], kind: str) -> Tensor:
    if kind == "none":
        return torch.ones((), dtype=torch.float64)
    if kind == "token":
        return (b.logp[i, t] - b.old[i, t]).exp()
    whole = torch.ones((), dtype=torch.float64)
    for j in written:
        whole = whole * b.logp[i, j].exp() / b.old[i, j].exp()
    return whole if kind == "product" else whole ** (1 / len(written))


def one_token(ratio: Tensor, a: float, logp: Tensor, o: dict[str, Any]) -> Tensor:
    """One case after the other, as the papers' figures draw them."""
    low, high = 1 - o.get("clip_low", 0.2), 1 + o.get("clip_high", 0.2)
    kind = o.get("surrogate", "clip")
    if callable(kind):
        return kind(ratio, a, logp)
    if kind == "linear":
        return -ratio * a
    if kind == "score":
        return -a * logp
    if kind == "cap":
        return -min(ratio.item(), o["clip_high"]) * a * logp
    flat = torch.zeros((), dtype=torch.float64)
    if a >= 0:
        return -ratio * a if ratio <= high else flat - high * a
    if o.get("dual_clip") and ratio > o["dual_clip"]:
        return flat - o["dual_clip"] * a
    return -ratio * a if ratio >= low else flat - low * a


def reduced(losses: list[list[Tensor]], o: dict[str, Any]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for mine in losses:
        share = {
            "token_mean": 1 / sum(len(each) for each in losses),
            "seq_mean_token_mean": 1 / (max(len(mine), 1) * len(losses)),
            "seq_mean_token_sum": 1 / len(losses),
            "seq_mean_token_sum_norm": 1 / (o["length"] * len(losses)),
            "sum_over_width": 1 / o["length"],
        }[o.get("reduction", "token_mean")]
        for loss in mine:
            total = total + share * loss
    return total


def kl(logp: Tensor, ref: Tensor, o: dict[str, Any]) -> Tensor:
    if o["kl_estimator"] == "k1":
        return logp - ref
    if o["kl_estimator"] == "k2":
        return 0.5 * (logp - ref) * (logp - ref)
    return (ref - logp).exp() - 1 - (ref - logp)


def regression(name: str, b: Batch, rewards: list[float], o: dict[str, Any]) -> Tensor:
    """Group-relative Implicit Fine-Tuning (gift.md 2.2) with a floor under the deviation, and GVPO."""
    ddof, scale, floor = o.get("ddof", 1), o.get("scale", 1.0), o.get("std_floor", 0.1)
    per_group = []
    for group in sorted(set(b.groups.tolist())):
        rows = [i for i in range(len(ROWS)) if b.groups[i] == group and not math.isnan(rewards[i])]
        explicit = [rewards[i] for i in rows]
        if len(set(explicit)) < 2:
            continue
        implicit, lengths = [], []
        for i in rows:
            inside = [t for t in range(WIDTH) if b.mask[i, t] == 1]
            ref = b.old if o.get("reference") == "old" else b.ref
            score = sum(b.logp[i, t] - ref[i, t] for t in inside)
            implicit.append(score / len(inside) if o.get("score") == "kl_mean" else score)
            lengths.append(len(inside))
        n = len(rows)
        r_mean, s_mean = sum(explicit) / n, sum(implicit) / n
        if name == "gvpo":
            errors = [scale * (s - s_mean) - (r - r_mean) for s, r in zip(implicit, explicit, strict=True)]
        else:
            r_std = math.sqrt(sum((r - r_mean) ** 2 for r in explicit) / (n - ddof))
            s_std = torch.sqrt(sum((s - s_mean) ** 2 for s in implicit) / (n - ddof))
            held = floor / (sum(lengths) / n) if o.get("score") == "kl_mean" else floor
            s_std = s_std if s_std > held else torch.tensor(held, dtype=torch.float64)
            s_std = s_std.detach() if o.get("std") == "detached" else s_std
            errors = [
                (r - r_mean) / r_std - scale * (s - s_mean) / s_std for s, r in zip(implicit, explicit, strict=True)
            ]
        per_group.append(sum(e * e for e in errors) / n)
    return sum(per_group) / len(per_group)
