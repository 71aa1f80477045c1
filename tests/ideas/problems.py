"""Hidden states and heads to try the engine on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import formulas
import torch
from torch import Tensor

from heatbath.ideas.engine import dense_loss, linear_loss, linear_stats
from heatbath.ideas.objectives import Sed
from heatbath.ideas.statistics import Objective, TokenStats, needs_reference

IGNORE = -100


@dataclass
class Problem:
    """What the engine takes; the dense truth is computed in the dtype of the hidden states."""

    hidden: Tensor
    head: Tensor
    ref_hidden: Tensor
    ref_head: Tensor
    labels: Tensor
    segments: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.columns:  # about the policy's own log-probabilities, on both sides of every clip
            z = self.hidden.detach().double() @ self.head.detach().double().T
            self.columns = formulas.columns(z.log_softmax(-1).gather(-1, self.labels.clamp_min(0)[:, None]).squeeze(-1))

    @property
    def valid(self) -> Tensor:
        return self.labels != IGNORE

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype, and leaves of their own."""
        names = ("hidden", "head", "ref_hidden", "ref_head")
        cast = {name: getattr(self, name).detach().to(dtype, copy=True) for name in names}
        made = dataclasses.replace(self, **cast, columns=dict(self.columns))
        made.hidden.requires_grad_()
        made.head.requires_grad_()
        return made

    def at(self, rows: Tensor) -> Problem:
        """Only the tokens where `rows` [N]."""
        return Problem(
            self.hidden.detach()[rows].requires_grad_(),
            self.head,
            self.ref_hidden[rows],
            self.ref_head,
            self.labels[rows],
            self.segments[rows],
            {name: column[rows] for name, column in self.columns.items()},
        )

    def logits(self, scale: float = 1.0, softcap: float | None = None) -> tuple[Tensor, Tensor]:
        """Of the policy and of the base, [N, V] each."""
        both = (scale * self.hidden @ self.head.T, scale * self.ref_hidden @ self.ref_head.T)
        return both if softcap is None else tuple(softcap * torch.tanh(z / softcap) for z in both)

    def surprises(self) -> Tensor:
        """−log π(y) and −log p(y) of each token, [2, N], from logits widened after their product."""
        wide = [z.detach().to(torch.float64 if z.dtype == torch.float64 else torch.float32) for z in self.logits()]
        label = self.labels.clamp_min(0)[:, None]
        return torch.stack([-z.log_softmax(-1).gather(-1, label).squeeze(-1) for z in wide])

    @property
    def base(self) -> dict[str, Any]:
        return {"ref_hidden": self.ref_hidden, "ref_head": self.ref_head}

    def fused(self, objective: Objective, **options: Any) -> Tensor:
        given = {**self.base, "columns": self.columns, "segments": self.segments, **options}
        return linear_loss(objective, self.hidden, self.head, self.labels, **given)

    def stats(self, *need: str, **options: Any) -> TokenStats:
        return linear_stats(self.hidden, self.head, self.labels, need=need, **{**self.base, **options})

    def dense(self, objective: Objective, *, widen: bool = False, **shape: Any) -> Tensor:
        """Loss of each token, [N]; `widen`: logits in float32 after the products."""
        z, r = (x.float() if widen else x for x in self.logits(**shape))
        reads = needs_reference(objective)
        return dense_loss(
            objective, z, self.labels, ref_logits=r if reads else None, columns=self.columns, segments=self.segments
        )

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """dh [N, d] and dW [V, d]."""
        return torch.autograd.grad(loss, [self.hidden, self.head])

    def fitted(self, objective: Objective) -> Objective:
        """SED with its threshold in the widest gap between this problem's masses, where rounding moves no token."""
        if not isinstance(objective, Sed):
            return objective
        z = self.hidden.detach().double() @ self.head.detach().double().T
        mass = z[self.valid].softmax(-1).topk(objective.topk).values.sum(-1).log().sort().values
        at = mass.diff().argmax()
        assert mass.diff()[at] > 0.15  # no token within 7 % of the threshold
        return dataclasses.replace(objective, threshold=((mass[at] + mass[at + 1]) / 2).exp().item())


def random(lengths: tuple[int, ...], vocab: int, widths: tuple[int, int], spread: Tensor, seed: int = 3) -> Problem:
    """Ragged sequences; `spread` [N] is the standard deviation of each token's logits. Every fifth label is ignored,
    half of the others are what the policy likes best."""
    g = torch.Generator().manual_seed(seed)
    n, (d, d_base) = sum(lengths), widths
    hidden = spread[:, None] * torch.randn(n, d, generator=g) / d**0.5
    ref_hidden = spread[:, None] * torch.randn(n, d_base, generator=g) / d_base**0.5
    head, ref_head = torch.randn(vocab, d, generator=g), torch.randn(vocab, d_base, generator=g)
    labels = torch.randint(vocab, (n,), generator=g)
    labels[1::2] = (hidden[1::2] @ head.T).argmax(-1)
    labels[::5] = IGNORE
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return Problem(hidden, head, ref_hidden, ref_head, labels, segments)


def small(dtype: torch.dtype = torch.float64) -> Problem:
    """37 tokens, 53 words, four sequences (one of a single ignored token)."""
    made = random((10, 1, 13, 13), 53, (16, 12), torch.linspace(1, 5, 37))
    return made.to(dtype)
