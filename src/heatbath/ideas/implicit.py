"""Group-relative Implicit Fine-Tuning (arXiv 2510.23868), "the other GIFT", and GVPO (arXiv 2504.19599).

Both regress the *implicit* reward of a completion, its score r̂ = Σ_t (ℓ − ℓ_ref), on the explicit one within each group
of N completions. log Z(x) is the same for a whole group and drops out. No clip, no importance ratio, no critic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from heatbath.ideas.surrogates import PARTS, Counts, Groups, Policy, Rows


@dataclass(frozen=True)
class Implicit(Policy):
    """mean over informative groups of mean_i (t_i − `scale`·z_i)², t and z the explicit and implicit rewards of a group
    after subtraction of their mean and division by their standard deviation (arXiv 2510.23868, eq. for L; β there is
    `scale`, applied after normalisation).

    `score` "kl_sum" is r̂ as above, "kl_mean" divides it by the completion's tokens. `std` "attached" lets gradient
    through the deviation s of r̂, "detached" does not (the authors' code, verl PR 4933): with ρ Pearson's correlation
    of t and z, the gradient of a group's loss in r̂ is −(2·scale/(N·s))·(t − ρ·z), detached −(2·scale/(N·s))·(t −
    scale·z). `reference` is the policy at the start ("init"), the base, or the policy that sampled ("old", their code).
    `ddof` is that of both deviations; at scale 1 the loss is 2(1 − ρ)(N − ddof)/N. Groups whose rewards are all equal
    carry no signal: they are masked and do not count in the mean.

    Where the policy equals the reference every r̂ is 0, s is 0 and z is not defined. s is therefore held at `std_floor`
    at least, in nats per completion (for "kl_mean" divided by the group's mean length): below it the loss is the
    regression of t on r̂ / `std_floor`, that is GVPO with a fixed scale, whose gradient at the start is that of
    REINFORCE, −(2·scale/(N·floor))·t; above it the loss is the paper's. The two meet where s = `std_floor`.
    """

    score: Literal["kl_sum", "kl_mean"] = "kl_sum"
    std: Literal["attached", "detached"] = "attached"
    scale: float = 1.0
    std_floor: float = 0.1

    couples_groups: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.std_floor > 0 and self.scale > 0):
            raise ValueError(f"std_floor and scale must be > 0, not {self.std_floor} and {self.scale}")

    @property
    def takes(self) -> frozenset[str]:
        parts = {*PARTS, "clip_low", "clip_high", "dual_clip"} - ({"reduction", "length"} if self.kl else set())
        return super().takes - parts | {"score", "std", "scale", "std_floor", "ddof", "reference"}

    @property
    def reads_old(self) -> bool:
        return self.reference == "old"

    @property
    def needs_reference(self) -> bool:
        return self.reference != "old" or self.kl > 0

    def scores(self, logp: Tensor, rows: Rows) -> Tensor:
        """r̂ of each completion, [B], in nats; the log-ratios are summed in at least float32."""
        ref = rows.old_logp if self.reference == "old" else rows.ref_logp
        if self.reference == "old" and ref is None:
            ref = logp
        if ref is None:
            raise ValueError(f"the implicit reward is relative to '{self.reference}', and no ref_logp is given")
        difference = torch.where(rows.own.bool(), logp - ref.detach(), 0.0)
        total = (difference if difference.dtype == torch.float64 else difference.float()).sum(1)
        return total / rows.own.sum(1).clamp(min=1) if self.score == "kl_mean" else total

    def group_loss(self, scores: Tensor, rewards: Tensor, groups: Tensor, lengths: Tensor) -> Tensor:
        """The loss as a function of the scores [B] of whole groups; rewards and groups are [B], NaN no reward."""
        g = Groups(groups, ~rewards.isnan())
        counted = g.present & g.differ(rewards)
        if not bool(counted.any()):
            return scores.sum() * 0.0
        t = g.centred(rewards) / torch.where(counted, g.variance(rewards, self.ddof), 1.0).sqrt()
        variance = g.variance(scores, self.ddof)
        floor = self._floor(g, lengths, scores)
        # inside sqrt: its slope at 0 is infinite, and 0·inf is NaN
        s = torch.where(variance > floor**2, variance, floor**2).sqrt()
        z = g.centred(scores) / (s if self.std == "attached" else s.detach())
        return self._mean((t - self.scale * z) ** 2, counted, g)

    def coefficients(self, scores: Tensor, rewards: Tensor, groups: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """∂loss/∂score of each completion, [B], in float64; and the loss. With them Σ_i a_i·r̂_i has the gradient of
        the loss however the completions are split into batches."""
        with torch.enable_grad():
            leaf = scores.detach().double().requires_grad_()
            loss = self.group_loss(leaf, rewards.double(), groups, lengths)
            (a,) = torch.autograd.grad(loss, leaf)
        return a, loss.detach()

    def deviation(self, scores: Tensor, rewards: Tensor, groups: Tensor) -> Tensor:
        """Mean over the informative groups of the standard deviation of r̂, in nats, which `std_floor` holds up."""
        g = Groups(groups, ~rewards.isnan())
        counted = g.present & g.differ(rewards)
        if not bool(counted.any()):
            return scores.new_zeros(())
        return self._mean(g.variance(scores, self.ddof).sqrt(), counted, g)

    def loss(self, logp: Tensor, rows: Rows, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
        """Σ_i a_i·r̂_i of a batch, whose value is not the loss but whose gradient is."""
        assert rows.coefficient is not None
        total = (rows.coefficient.to(logp.dtype) * self.scores(logp, rows)).sum()
        extra, measured = self.regularised(logp, rows, counts)
        return total + extra, measured

    def _floor(self, g: Groups, lengths: Tensor, scores: Tensor) -> Tensor:
        floor = torch.full_like(scores, self.std_floor)
        if self.score == "kl_mean":
            floor = floor / (g.sum(lengths.to(scores.dtype)) / g.count.clamp(min=1).to(scores.dtype)).clamp(min=1)
        return floor

    def _mean(self, values: Tensor, counted: Tensor, g: Groups) -> Tensor:
        """Mean over the groups that count of the mean over their completions."""
        per_group = torch.where(counted, values / g.count.clamp(min=1).to(values.dtype), 0.0).sum()
        return per_group / len(torch.unique(g.index[counted]))


@dataclass(frozen=True)
class Gvpo(Implicit):
    """mean over informative groups of mean_i (`scale`·(r̂_i − mean) − (r_i − mean))²: the relative without any standard
    deviation, which has one optimum, π ∝ π_ref·exp(r / `scale`), and no singular start (arXiv 2504.19599; there the
    sum over a group is divided by N − 1, here by N)."""

    @property
    def takes(self) -> frozenset[str]:
        return super().takes - {"std", "std_floor", "ddof"}

    def group_loss(self, scores: Tensor, rewards: Tensor, groups: Tensor, lengths: Tensor) -> Tensor:
        g = Groups(groups, ~rewards.isnan())
        counted = g.present & g.differ(rewards)
        if not bool(counted.any()):
            return scores.sum() * 0.0
        return self._mean((self.scale * g.centred(scores) - g.centred(rewards)) ** 2, counted, g)
