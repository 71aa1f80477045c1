"""RL objectives made of four parts: advantage × ratio × surrogate × reduction (+ KL to a reference, + entropy).

B completions of T tokens at most, G of them answer one prompt (a group). π the policy, ℓ its log-probability of a token
at the sampling temperature, A the advantage of a completion, n_i its tokens. All losses are minimised. The named
combinations are the table of `policy.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from heatbath.ideas.importing import module_of

Reference = Literal["init", "base", "old"]
Estimator = Literal["k1", "k2", "k3"]
LARGEST_LOG_RATIO = 20.0


@dataclass(frozen=True)
class Rows:
    """What a policy reads beside ℓ about the completions of a batch; [B, T] unless said otherwise.

    mask         1 on the tokens that count: those the policy wrote, EOS included, and those of an expert
    advantage    [B]
    old_logp     ℓ of the policy that sampled; None where it was this very policy (every ratio is 1)
    ref_logp     ℓ of the reference, for the KL
    entropy      H(π) at each token
    expert       1 on tokens copied from a demonstration
    correction   factor of each token's loss, [B, T] or [B, 1]: how much likelier the trainer finds it than the sampler
    coefficient  [B]: derivative of a group's loss in the completion's score (`implicit.py`)
    """

    mask: Tensor
    advantage: Tensor | None = None
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    entropy: Tensor | None = None
    expert: Tensor | None = None
    correction: Tensor | None = None
    coefficient: Tensor | None = None

    @property
    def own(self) -> Tensor:
        """1 on the tokens that the policy wrote itself."""
        return self.mask if self.expert is None else self.mask * (1 - self.expert)


@dataclass(frozen=True)
class Counts:
    """The size of the whole optimizer step, over all its micro-batches and ranks: every mean is over these.

    `tokens` the policy wrote itself, `expert` ones copied from demonstrations, `sequences` completions; each a number
    or a scalar tensor.
    """

    tokens: Any
    sequences: Any
    expert: Any = 0

    @classmethod
    def of(cls, rows: Rows) -> Counts:
        """Those of a batch that is the whole step."""
        return cls(rows.own.sum(), rows.mask.shape[0], (rows.mask - rows.own).sum())


@dataclass(frozen=True)
class Policy:
    """An RL objective: how the rewards of a group become a loss of its tokens.

    `advantage`, `ratio`, `surrogate` and `reduction` name parts of the tables below; an advantage or a surrogate may be
    a function of one's own, "package.module:function" or "file.py:function", with the signature of those here.

    Ratios are clipped to [1 − `clip_low`, 1 + `clip_high`] (surrogate "cap": at the absolute value `clip_high`);
    `dual_clip` bounds the loss of a negative advantage by that many times |A| (arXiv 1912.09729). Group standard
    deviations divide by G − `ddof`, and `std_epsilon` is added to them. `kl` times the `kl_estimator` of KL(π ‖
    reference) is added to each token's loss; `entropy` times the token mean of H(π) is subtracted. `length` is the most
    tokens a completion may have (default: the trainer's). `overlong` is the last share of that length in which a reward
    falls linearly by `overlong_penalty` (arXiv 2503.14476, eq. 13); `sqrt_length` divides a reward by the square root
    of the completion's tokens. `dynamic_sampling` asks the trainer to replace groups whose rewards are all equal.
    """

    advantage: str = "centred"
    ratio: str = "token"
    surrogate: str = "clip"
    reduction: str = "token_mean"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    ddof: int = 1
    std_epsilon: float = 1e-4
    kl: float = 0.0
    kl_estimator: Estimator = "k3"
    reference: Reference = "init"
    entropy: float = 0.0
    length: int | None = None
    overlong: float = 0.0
    overlong_penalty: float = 1.0
    sqrt_length: bool = False
    dynamic_sampling: bool = False

    couples_groups: ClassVar[bool] = False  # the loss of one completion depends on the log-probabilities of others
    needs_demonstrations: ClassVar[bool] = False
    entropy_everywhere: ClassVar[bool] = False  # the entropy term is over demonstrated tokens too

    def __post_init__(self) -> None:
        for part, table in PARTS.items():
            component(part, getattr(self, part), table)
        if self.ratio == "none" and self.surrogate in ("clip", "linear"):
            raise ValueError(f"ratio 'none' leaves surrogate '{self.surrogate}' no gradient; 'score' needs no ratio")
        if self.surrogate == "clip" and not (0 <= self.clip_low < 1 and self.clip_high >= 0):
            raise ValueError(f"need 0 ≤ clip_low < 1 and clip_high ≥ 0, not {self.clip_low} and {self.clip_high}")
        if self.surrogate == "cap" and not self.clip_high > 0:
            raise ValueError(f"clip_high is an absolute cap of the ratio and must be > 0, not {self.clip_high}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be > 1, not {self.dual_clip}")
        if self.ddof not in (0, 1) or not self.std_epsilon >= 0:
            raise ValueError(f"ddof must be 0 or 1 and std_epsilon ≥ 0, not {self.ddof} and {self.std_epsilon}")
        if not (self.kl >= 0 and self.entropy >= 0):
            raise ValueError(f"kl and entropy must be ≥ 0, not {self.kl} and {self.entropy}")
        if self.length is not None and self.length < 1:
            raise ValueError(f"length must be ≥ 1, not {self.length}")
        if not 0 <= self.overlong < 1:
            raise ValueError(f"overlong is a share of the length and must lie in [0, 1), not {self.overlong}")
        if not self.overlong_penalty >= 0:
            raise ValueError(f"overlong_penalty is subtracted and must be ≥ 0, not {self.overlong_penalty}")
        if self.kl and self.reference == "old":
            raise ValueError("the KL is to 'init' or to 'base'; the clip holds the policy near the old one")

    @property
    def takes(self) -> frozenset[str]:
        """The hyper-parameters that have an effect in this combination."""
        used = {*PARTS, "kl", "entropy", "overlong", "sqrt_length", "dynamic_sampling"}
        for part, table in PARTS.items():
            used |= set(table[name][1]) if (name := getattr(self, part)) in table else set()
        used |= {"kl_estimator", "reference"} if self.kl else set()
        used |= {"overlong_penalty", "length"} if self.overlong else set()
        return frozenset(used - {"ratio"} if self.surrogate == "score" else used)

    @property
    def needs_reference(self) -> bool:
        return self.kl > 0

    @property
    def reads_old(self) -> bool:
        """Whether the loss reads ℓ of the policy that sampled."""
        return self.ratio != "none" and self.surrogate != "score"

    @property
    def needs_entropy(self) -> bool:
        return self.entropy > 0

    def at_length(self, tokens: int) -> Policy:
        """With `length` filled in where it was left open."""
        return dataclasses.replace(self, length=tokens) if self.length is None else self

    def shaped(self, rewards: Tensor, lengths: Tensor) -> Tensor:
        """Rewards [B] after what this policy makes of the completions' `lengths` [B] in tokens."""
        if self.sqrt_length:
            rewards = rewards / lengths.clamp(min=1).to(rewards.dtype).sqrt()
        if self.overlong:
            assert self.length is not None
            buffer = self.overlong * self.length
            over = (lengths - (self.length - buffer)) / buffer
            rewards = rewards - self.overlong_penalty * over.clamp(0, 1).to(rewards.dtype)
        return rewards

    def advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        """Advantage of each completion, [B], from rewards [B] (NaN: none) and the number of its group [B].

        A completion without a reward has advantage 0 and does not count in its group. Where all rewards of a group are
        equal, 0/0 is 0 too. Raises ValueError for what a function of one's own gets wrong.
        """
        made: Tensor = component("advantage", self.advantage, ADVANTAGES)(rewards, groups, self)
        if made.shape != rewards.shape:
            raise ValueError(f"{self.advantage} returned shape {tuple(made.shape)} for rewards {tuple(rewards.shape)}")
        silent = rewards.isnan() | ~(made.isfinite() | informative(rewards, groups))
        made = made.masked_fill(silent, 0.0)
        if not bool(made.isfinite().all()):
            bad = int((~made.isfinite()).sum())
            raise ValueError(f"{self.advantage} returned NaN or inf for {bad} of {len(made)} completions with a reward")
        return made

    def token_loss(self, logp: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        """Loss of each token before any reduction and whether a clip decided it, both [B, T]."""
        assert rows.advantage is not None
        old = logp.detach() if rows.old_logp is None else on(rows.own, rows.old_logp, logp)
        ratio = RATIOS[self.ratio][0](logp, old, rows.own)
        a = rows.advantage.detach().to(logp.dtype)[:, None]
        loss: Tensor = component("surrogate", self.surrogate, SURROGATES)(ratio, a, logp, self)
        if loss.shape not in (logp.shape, ratio.shape):
            raise ValueError(f"{self.surrogate} returned shape {tuple(loss.shape)} for logp {tuple(logp.shape)}")
        decided = torch.zeros_like(logp, dtype=torch.bool)
        if self.surrogate == "clip":
            decided = ((ratio < 1 - self.clip_low) & (a < 0)) | ((ratio > 1 + self.clip_high) & (a > 0))
            if self.dual_clip is not None:
                decided = decided | ((ratio > self.dual_clip) & (a < 0))
        elif self.surrogate == "cap":
            decided = (ratio > self.clip_high).expand_as(logp)
        if rows.correction is not None:
            loss = loss * rows.correction
        return loss.expand_as(logp), decided.expand_as(logp)

    def loss(self, logp: Tensor, rows: Rows, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
        """This batch's part of the optimizer step's loss, a scalar whose sum over the batches of the step is the loss;
        and per-token numbers [B, T] worth logging. `logp` is [B, T], differentiable."""
        loss, decided = self.token_loss(logp, rows)
        total = self.reduced(loss, rows.own, counts.tokens, counts.sequences)
        extra, measured = self.regularised(logp, rows, counts)
        return total + extra, {"clip_share": decided.to(logp.dtype), **measured}

    def regularised(self, logp: Tensor, rows: Rows, counts: Counts) -> tuple[Tensor, dict[str, Tensor]]:
        """The KL and the entropy terms of a batch, and the KL of each token where there is one."""
        total, measured = logp.new_zeros(()), {}
        if self.kl:
            if rows.ref_logp is None:
                raise ValueError(f"a KL to '{self.reference}' is asked for, and no ref_logp is given")
            per_token = ESTIMATORS[self.kl_estimator](logp, on(rows.own, rows.ref_logp, logp))
            total = total + self.kl * self.reduced(per_token, rows.own, counts.tokens, counts.sequences)
            measured["kl_reference"] = per_token.detach()
        if self.entropy:
            if rows.entropy is None:
                raise ValueError("an entropy term is asked for, and no entropy is given")
            mask, tokens = rows.own, counts.tokens
            if self.entropy_everywhere:
                mask, tokens = rows.mask, counts.tokens + counts.expert
            bonus = torch.where(mask.bool(), rows.entropy, 0.0).sum() / at_least_one(tokens)
            total = total - self.entropy * bonus
        return total, measured

    def reduced(self, values: Tensor, mask: Tensor, tokens: Any, sequences: Any) -> Tensor:
        """A batch's part of the reduction of per-token values [B, T] over a step of so many tokens and sequences."""
        values = torch.where(mask.bool(), values, 0.0)  # 0·inf is NaN
        mine: Tensor = REDUCTIONS[self.reduction][0](values, mask, tokens, sequences, self.length)
        return mine


def component(part: str, name: str, table: dict[str, tuple[Any, tuple[str, ...]]]) -> Callable[..., Any]:
    """A part by its name in the table, or the user's own function. Raises ValueError where there is none."""
    if isinstance(name, str) and name in table:
        found: Callable[..., Any] = table[name][0]
        return found
    if part not in OWN or not isinstance(name, str) or ":" not in name:
        own = " or a function of your own, 'file.py:function'" if part in OWN else ""
        raise ValueError(f"{part} must be one of {', '.join(table)}{own}, not '{name}'")
    function, passed = _imported(name), OWN[part]

    def own_function(*given: Any) -> Tensor:
        try:
            made = function(*given[:passed])
        except Exception as error:
            raise ValueError(f"{name} raised {type(error).__name__}: {error}") from error
        if not isinstance(made, Tensor):
            raise ValueError(f"{name} returned {type(made).__name__}, not a tensor")
        return made

    return own_function


@functools.cache
def _imported(name: str) -> Callable[..., Any]:
    module, _, attribute = name.rpartition(":")
    try:
        found = getattr(module_of(module), attribute)
    except Exception as error:  # noqa: BLE001 - whatever a user's own file raises while it is read
        raise ValueError(f"cannot import '{name}': {type(error).__name__}: {error}") from None
    if not callable(found):
        raise ValueError(f"'{name}' is not a function")
    made: Callable[..., Any] = found
    return made


class Groups:
    """The groups of a batch: sums, means and deviations over the completions that have a value. Shapes [B]."""

    def __init__(self, groups: Tensor, present: Tensor):
        self.ids, self.index = torch.unique(groups, return_inverse=True)
        self.present = present
        self.count = self.sum(torch.ones_like(groups, dtype=torch.float64))

    def sum(self, values: Tensor) -> Tensor:
        """Of each completion's group."""
        kept = torch.where(self.present, values, torch.zeros_like(values))
        total = kept.new_zeros(len(self.ids)).index_add_(0, self.index, kept)
        return total[self.index]

    def centred(self, values: Tensor) -> Tensor:
        kept = torch.where(self.present, values, torch.zeros_like(values))
        return kept - self.sum(kept) / self.count.clamp(min=1).to(values.dtype)

    def variance(self, values: Tensor, ddof: int) -> Tensor:
        """0 where a group has no more than `ddof` values."""
        return self.sum(self.centred(values) ** 2) / (self.count - ddof).clamp(min=1).to(values.dtype)

    def differ(self, values: Tensor) -> Tensor:
        """Whether two values of the completion's group differ: exact, where a deviation of equal ones may round."""
        high, low = (
            torch.full((len(self.ids),), end, dtype=values.dtype, device=values.device).scatter_reduce_(
                0, self.index, torch.where(self.present, values, torch.full_like(values, end)), reduce=how
            )
            for end, how in ((-torch.inf, "amax"), (torch.inf, "amin"))
        )
        return (high > low)[self.index]


def informative(rewards: Tensor, groups: Tensor) -> Tensor:
    """Of each completion, [B]: whether two rewards of its group differ, without which the group carries no signal."""
    return Groups(groups, ~rewards.isnan()).differ(rewards)


def _centred(rewards: Tensor, groups: Tensor, policy: Policy) -> Tensor:
    return Groups(groups, ~rewards.isnan()).centred(rewards)


def _normalised(rewards: Tensor, groups: Tensor, policy: Policy) -> Tensor:
    g = Groups(groups, ~rewards.isnan())
    deviation = g.variance(rewards, policy.ddof).sqrt()
    return torch.where(g.differ(rewards), g.centred(rewards) / (deviation + policy.std_epsilon), 0.0)  # 0/0 at ε = 0


def _leave_one_out(rewards: Tensor, groups: Tensor, policy: Policy) -> Tensor:
    g = Groups(groups, ~rewards.isnan())
    others = (g.count - 1).clamp(min=1).to(rewards.dtype)
    return g.centred(rewards) * g.count.to(rewards.dtype) / others


def _sequence(logp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    log_ratio = torch.where(mask.bool(), logp - old, 0.0).sum(1, keepdim=True)
    return _exp(log_ratio / mask.sum(1, keepdim=True).clamp(min=1))


def _product(logp: Tensor, old: Tensor, mask: Tensor) -> Tensor:
    return _exp(torch.where(mask.bool(), logp - old, 0.0).sum(1, keepdim=True))


def _exp(log_ratio: Tensor) -> Tensor:
    """A ratio, its logarithm held in ±20 as verl does: an infinite one may be clipped away, its gradient is NaN."""
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()


def _clip(ratio: Tensor, a: Tensor, logp: Tensor, policy: Policy) -> Tensor:
    loss = -torch.minimum(ratio * a, ratio.clamp(1 - policy.clip_low, 1 + policy.clip_high) * a)
    if policy.dual_clip is not None:
        loss = torch.where(a < 0, torch.minimum(loss, -policy.dual_clip * a), loss)
    return loss


def _cap(ratio: Tensor, a: Tensor, logp: Tensor, policy: Policy) -> Tensor:
    return -ratio.detach().clamp(max=policy.clip_high) * a * logp


def _token_mean(values: Tensor, mask: Tensor, tokens: Any, sequences: Any, length: int | None) -> Tensor:
    mine: Tensor = values.sum() / at_least_one(tokens)
    return mine


def _seq_mean_token_mean(values: Tensor, mask: Tensor, tokens: Any, sequences: Any, length: int | None) -> Tensor:
    mine: Tensor = (values.sum(1) / mask.sum(1).clamp(min=1)).sum() / at_least_one(sequences)
    return mine


def _seq_mean_token_sum(values: Tensor, mask: Tensor, tokens: Any, sequences: Any, length: int | None) -> Tensor:
    mine: Tensor = values.sum() / at_least_one(sequences)
    return mine


def _seq_mean_token_sum_norm(values: Tensor, mask: Tensor, tokens: Any, sequences: Any, length: int | None) -> Tensor:
    mine: Tensor = values.sum() / (at_least_one(sequences) * (length or mask.shape[1]))
    return mine


def _sum_over_width(values: Tensor, mask: Tensor, tokens: Any, sequences: Any, length: int | None) -> Tensor:
    return values.sum() / (length or mask.shape[1])


def on(mask: Tensor, given: Tensor, logp: Tensor) -> Tensor:
    """Log-probabilities given for the tokens of a mask; elsewhere, where they may hold anything, the policy's own: a
    ratio there would overflow, and 0·inf is NaN."""
    return torch.where(mask.bool(), given, logp).detach()


def at_least_one(count: Any) -> Any:
    return count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1)


# Each part: its function, and the hyper-parameters that it reads.
ADVANTAGES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "centred": (_centred, ()),  # r − mean of the group
    "normalised": (_normalised, ("ddof", "std_epsilon")),  # (r − mean) / (std + ε)
    "leave_one_out": (_leave_one_out, ()),  # r − mean of the others
    "reward": (lambda rewards, groups, policy: rewards, ()),  # r
}
RATIOS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "token": (lambda logp, old, mask: _exp(logp - old), ()),  # π/π_old of each token, [B, T]
    "sequence": (_sequence, ()),  # its geometric mean over the completion, [B, 1]
    "product": (_product, ()),  # its product over the completion, [B, 1]
    "none": (lambda logp, old, mask: torch.ones_like(logp), ()),  # 1: the policy that sampled is taken for this one
}
SURROGATES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "clip": (_clip, ("clip_low", "clip_high", "dual_clip")),  # −min(r·A, clip(r)·A)
    "cap": (_cap, ("clip_high",)),  # −sg(min(r, clip_high))·A·ℓ
    "linear": (lambda ratio, a, logp, policy: -ratio * a, ()),  # −r·A
    "score": (lambda ratio, a, logp, policy: -a * logp, ()),  # −A·ℓ
}
REDUCTIONS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "token_mean": (_token_mean, ()),  # Σ_i Σ_t / tokens
    "seq_mean_token_mean": (_seq_mean_token_mean, ()),  # mean over completions of the mean over their tokens
    "seq_mean_token_sum": (_seq_mean_token_sum, ()),  # mean over completions of the sum over their tokens
    "seq_mean_token_sum_norm": (_seq_mean_token_sum_norm, ("length",)),  # the same, over `length`
    "sum_over_width": (_sum_over_width, ("length",)),  # Σ_i Σ_t / length, not divided by the completions
}
PARTS = {"advantage": ADVANTAGES, "ratio": RATIOS, "surrogate": SURROGATES, "reduction": REDUCTIONS}
# Parts that may be a function of one's own, and how many arguments it is given: advantage(rewards [B], groups [B]) →
# [B]; surrogate(ratio [B, T], advantage [B, 1], logp [B, T]) → [B, T].
OWN = {"advantage": 2, "surrogate": 3}
# Of KL(π ‖ reference) at a token sampled from π, d = ℓ − ℓ_ref (Schulman, "Approximating KL divergence"). As a term of
# the loss k1 has a gradient of mean 0; k3's and k2's pull towards the reference.
ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "k1": lambda logp, ref: logp - ref,
    "k2": lambda logp, ref: (logp - ref) ** 2 / 2,
    "k3": lambda logp, ref: torch.expm1(ref - logp) - (ref - logp),
}
