"""RL with demonstrations inside the groups: LUFFY, TRAPO and UFT as policies, ReLIFT as a policy with a buffer.

Some completions of a group begin with the first tokens of the problem's demonstration (all of them: an expert trace).
Those tokens have a loss of their own; what the policy wrote after them is trained as in any other group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from heatbath.ideas.objectives import objective
from heatbath.ideas.statistics import Objective, TokenStats
from heatbath.ideas.surrogates import Counts, Policy, Rows, at_least_one


@dataclass(frozen=True)
class Guided(Policy):
    """A policy whose groups are sampled in rounds, each with a share of the demonstration in front. The entropy term is
    over demonstrated tokens too, as in the code of LUFFY and TRAPO."""

    needs_demonstrations: ClassVar[bool] = True
    entropy_everywhere: ClassVar[bool] = True

    reads_rewards: ClassVar[bool] = False  # of the earlier rounds, which are then graded in between

    def rounds_of(self, group_size: int) -> tuple[int, ...]:
        """Completions of a group sampled in each round; they add up to the group. Raises ValueError."""
        raise NotImplementedError

    def share(self, round: int, rewards: Sequence[float], step: int, draw: float) -> float:
        """The share of the demonstration that the completions of a round begin with (1: all of it, nothing is sampled).

        `rewards` are those of the group's earlier rounds, `step` counts optimizer steps, `draw` is uniform in [0, 1)
        and the same for the whole group.
        """
        raise NotImplementedError

    @property
    def expert_objective(self) -> Objective:
        """The loss of a demonstrated token; it may read `logp` and the column `advantage`."""
        raise NotImplementedError

    def expert_loss(self, logp: Tensor, rows: Rows) -> Tensor:
        """Of each token, [B, T], as if it were demonstrated."""
        assert rows.advantage is not None
        a = rows.advantage.detach().to(logp.dtype)[:, None].expand_as(logp)
        stats = TokenStats(logp=logp.flatten(), columns={"advantage": a.flatten()})
        return self.expert_objective(stats).view_as(logp)

    def loss(self, logp: Tensor, rows: Rows, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
        """Own and demonstrated tokens under one reduction."""
        token, decided = self.token_loss(logp, rows)
        if rows.expert is not None:
            token = torch.where(rows.expert.bool(), self.expert_loss(logp, rows), token)
        everything = at_least_one(counts.tokens + counts.expert)
        total = self.reduced(token, rows.mask, everything, counts.sequences)
        extra, measured = self.regularised(logp, rows, counts)
        return total + extra, {"clip_share": decided.to(logp.dtype), **measured}

    @property
    def takes(self) -> frozenset[str]:
        own = {f.name for f in fields(self)} - {f.name for f in fields(Policy)}
        return (super().takes | own) - {"dynamic_sampling"}


@dataclass(frozen=True)
class Luffy(Guided):
    """`traces` completions of each group are the demonstration itself, graded like the others; its tokens have the
    shaped loss −A·π/(π + `gamma`) (arXiv 2504.14945; behaviour probability 1, no clip)."""

    gamma: float = 0.1
    traces: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.traces < 0:
            raise ValueError(f"traces must be ≥ 0, not {self.traces}")
        objective("luffy", gamma=self.gamma)

    def rounds_of(self, group_size: int) -> tuple[int, ...]:
        if group_size - self.traces < 1:
            raise ValueError(f"{self.traces} traces leave no rollout in a group of {group_size}")
        return (group_size - self.traces, self.traces) if self.traces else (group_size,)

    def share(self, round: int, rewards: Sequence[float], step: int, draw: float) -> float:
        return float(round == 1)

    @property
    def expert_objective(self) -> Objective:
        return objective("luffy", gamma=self.gamma)


@dataclass(frozen=True)
class Trapo(Guided):
    """Micro-groups: a round whose predecessors' mean reward stays below its threshold begins with a longer share of the
    demonstration, whose tokens have the TrSFT loss −π/max(sg π, `alpha`), advantage 1 (arXiv 2512.17636, the paper's
    form). Of the authors' code left out: the search for a paragraph break, and that in the second round only one of
    two completions is taught its prefix."""

    reads_rewards: ClassVar[bool] = True

    alpha: float = 0.1
    rounds: tuple[int, ...] = (4, 2, 1, 1)
    shares: tuple[float, ...] = (0.0, 0.2, 0.5, 1.0)
    thresholds: tuple[float, ...] = (-1.0, 0.5, 0.7, 0.9)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rounds", "shares", "thresholds"):  # a recipe's lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not len(self.rounds) == len(self.shares) == len(self.thresholds):
            raise ValueError("rounds, shares and thresholds have one number for each micro-group")
        if not self.rounds or not all(isinstance(x, int) and x >= 1 for x in self.rounds):
            raise ValueError(f"rounds must be whole numbers ≥ 1, not {list(self.rounds)}")
        if not all(0 <= x <= 1 for x in self.shares) or not all(math.isfinite(x) for x in self.thresholds):
            raise ValueError(f"need shares in [0, 1] and finite thresholds, not {self.shares} and {self.thresholds}")
        objective("trsft", alpha=self.alpha)

    def rounds_of(self, group_size: int) -> tuple[int, ...]:
        if sum(self.rounds) != group_size:
            raise ValueError(f"rounds {list(self.rounds)} add up to {sum(self.rounds)}, the group has {group_size}")
        return self.rounds

    def share(self, round: int, rewards: Sequence[float], step: int, draw: float) -> float:
        known = [r for r in rewards if not math.isnan(r)]
        return self.shares[round] if not known or sum(known) / len(known) < self.thresholds[round] else 0.0

    @property
    def expert_objective(self) -> Objective:
        return objective("trsft", alpha=self.alpha)


@dataclass(frozen=True)
class Uft(Guided):
    """Every completion of a group begins with a hint: the first k of `chunks` equal parts of the demonstration, k ~
    Binomial(`chunks`, p), p falling from `high` to `low` along a cosine over `hint_steps` optimizer steps; afterwards
    none. Hint tokens have the loss `hint_loss`·nll, a token mean of its own (arXiv 2505.16984). The authors' chunks are
    the sentences of the solution."""

    entropy_everywhere: ClassVar[bool] = False

    hint_steps: int = 300
    hint_loss: float = 0.001
    chunks: int = 5
    low: float = 0.05
    high: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (0 <= self.low <= self.high <= 1 and self.chunks >= 1):
            raise ValueError(f"need 0 ≤ low ≤ high ≤ 1 and chunks ≥ 1, not {self.low}, {self.high} and {self.chunks}")
        if not (self.hint_steps >= 0 and self.hint_loss >= 0):
            raise ValueError(f"hint_steps and hint_loss must be ≥ 0, not {self.hint_steps} and {self.hint_loss}")

    def rounds_of(self, group_size: int) -> tuple[int, ...]:
        return (group_size,)

    def probability(self, step: int) -> float:
        """That of each chunk at an optimizer step, counted from 0."""
        if step >= self.hint_steps:
            return 0.0
        return self.low + 0.5 * (self.high - self.low) * (1 + math.cos(math.pi * step / self.hint_steps))

    def share(self, round: int, rewards: Sequence[float], step: int, draw: float) -> float:
        p, below = self.probability(step), 0.0
        for k in range(self.chunks):
            below += math.comb(self.chunks, k) * p**k * (1 - p) ** (self.chunks - k)
            if draw < below:
                return k / self.chunks
        return 1.0

    @property
    def expert_objective(self) -> Objective:
        return objective("sft")

    def loss(self, logp: Tensor, rows: Rows, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
        """The hint belongs to the prompt: its tokens count in no mean but their own."""
        total, measured = Policy.loss(self, logp, rows, counts)
        if rows.expert is not None:
            hint = torch.where((rows.mask * rows.expert).bool(), self.expert_loss(logp, rows), 0.0)
            total = total + self.hint_loss * hint.sum() / at_least_one(counts.expert)
        return total, measured


@dataclass(frozen=True)
class Relift(Policy):
    """RL interleaved with fine-tuning on the hardest questions (arXiv 2506.07527): prompts whose completions all got 0
    go to the front of a buffer with their demonstrations; when it holds `sft_batch` of them, the RL step is followed by
    one SFT step on the newest `sft_batch`: mean nll − `sft_entropy`·mean H(π), with an AdamW of its own."""

    sft_batch: int = 128
    sft_lr: float = 1e-6
    sft_entropy: float = 0.001
    sft_max_grad_norm: float = 1.0

    needs_demonstrations: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sft_batch < 1 or not (self.sft_lr > 0 and self.sft_max_grad_norm > 0 and self.sft_entropy >= 0):
            raise ValueError(f"need sft_batch ≥ 1, sft_lr > 0, sft_max_grad_norm > 0 and sft_entropy ≥ 0, not {self}")

    @property
    def takes(self) -> frozenset[str]:
        own = {f.name for f in fields(self)} - {f.name for f in fields(Policy)}
        return super().takes | own
