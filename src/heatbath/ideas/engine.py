"""One engine for every objective: hidden states and a head in, a loss and its gradient out, never [N, V] for all N.

Each statistic of `TokenStats` has a derivative in the logits z that is known in closed form, so autograd runs only over
the objective's own [C] vectors; its derivatives become six numbers per token and

    dz = π ∘ (a0 + a1·log π + a2·log p) + a3·p + a4 + a5·onehot(y)

(derivation: docs/gift.md). `dense_loss` is the readable truth in plain autograd; `linear_loss` equals it in chunks.

N supervised tokens, C tokens of one chunk, V vocabulary, d hidden width. π policy, p base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heatbath.ideas.objectives import DIFFERENTIABLE, STATS, Objective, TokenStats, needs_reference

IGNORE = -100
# Elements of one [C, V] buffer (128 MiB and 1 GiB in float32), and the fewest tokens C it may come down to: a CPU keeps
# its GEMMs busy from about 256, a GPU is held up by the float32 accumulation of dW below about 1,024.
CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}
CHUNK_FLOOR = {"cpu": 256, "cuda": 1024}


class LinearLoss(NamedTuple):
    """Sum of the token losses (differentiable), and the sums of what was logged beside it (float64, detached)."""

    loss: Tensor
    tokens: int
    sums: dict[str, Tensor]


def dense_loss(
    objective: Objective,
    logits: Tensor,
    labels: Tensor,
    *,
    ref_logits: Tensor | None = None,
    columns: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Loss of each token by plain autograd over full logits, [N]; exactly 0 where the label is -100.

    `logits` and `ref_logits` are [N, V], `labels` [N], each row already aligned with the label it predicts (no shift
    happens here); a column is [N]. Raises ValueError when the objective needs `ref_logits` and none are given.
    """
    _require_reference(objective, ref_logits is not None)
    valid = labels != IGNORE
    logp = logits[valid].to(_accumulate(logits.dtype)).log_softmax(-1)
    ref = None if ref_logits is None else ref_logits[valid].to(_accumulate(ref_logits.dtype)).log_softmax(-1)
    picked = {name: column[valid] for name, column in (columns or {}).items()}
    stats = _statistics(set(objective.needs), logp, ref, labels[valid], picked)
    return logits.new_zeros(labels.shape, dtype=logp.dtype).masked_scatter(valid, _per_token(objective, stats))


def linear_loss(
    objective: Objective,
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    ref_hidden: Tensor | None = None,
    ref_head: Tensor | None = None,
    columns: Mapping[str, Tensor] | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Sum over tokens of the objective's loss on logits `hidden @ head.T`, scalar; equals `dense_loss(...).sum()`.

    `hidden` [N, d], `head` [V, d], `labels` [N] (-100 is ignored), the base's `ref_hidden` [N, d'] and `ref_head`
    [V, d']. The gradient is formed during the forward pass, so memory is one chunk of logits plus the gradients
    themselves. Matrix products run in the autocast dtype where autocast is on, all else in float32 (float64 inputs:
    float64). Double backward is refused. Raises ValueError when the objective needs the base and none is given.
    """
    return linear_loss_with_sums(
        objective, hidden, head, labels, ref_hidden=ref_hidden, ref_head=ref_head, columns=columns, chunk=chunk
    ).loss


def linear_loss_with_sums(
    objective: Objective,
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    ref_hidden: Tensor | None = None,
    ref_head: Tensor | None = None,
    columns: Mapping[str, Tensor] | None = None,
    chunk: int | None = None,
) -> LinearLoss:
    """`linear_loss` and, from the same pass, the token sums of `objective`, `nll`, `entropy`, `surprise` (where the
    objective reads the base) and of whatever the objective's `diagnostics(stats)` returns."""
    _require_reference(objective, ref_hidden is not None and ref_head is not None)
    valid = labels != IGNORE
    if not bool(valid.all()):
        hidden, labels = hidden[valid], labels[valid]
        ref_hidden = None if ref_hidden is None else ref_hidden[valid]
        columns = {name: column[valid] for name, column in (columns or {}).items()}
    sums: dict[str, Tensor] = {}
    run = _Pass(objective, labels, ref_hidden, ref_head, dict(columns or {}), chunk, sums)
    loss: Tensor = _LinearLoss.apply(hidden, head, run)  # type: ignore[no-untyped-call]
    return LinearLoss(loss, labels.numel(), sums)


def label_logps(hidden: Tensor, head: Tensor, labels: Tensor, *, chunk: int | None = None) -> Tensor:
    """log π(y) of each token without gradient, [N] (0 where the label is -100); shapes as in `linear_loss`."""
    out = hidden.new_zeros(labels.shape, dtype=_accumulate(hidden.dtype))
    valid = (labels != IGNORE).nonzero().squeeze(-1)
    project = _Projection(hidden, head)
    with torch.no_grad():
        for rows in torch.split(valid, chunk or _chunk_size(head)):
            logp = project.log_softmax(hidden[rows], labels[rows])
            out[rows] = logp.gather(-1, labels[rows, None]).squeeze(-1)
    return out


class _Pass(NamedTuple):
    """Everything of one `linear_loss` call that autograd does not differentiate. Labels hold no -100."""

    objective: Objective
    labels: Tensor
    ref_hidden: Tensor | None
    ref_head: Tensor | None
    columns: dict[str, Tensor]
    chunk: int | None
    sums: dict[str, Tensor]


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, run: _Pass) -> Tensor:
        need_dh, need_dw = ctx.needs_input_grad[:2]
        project = _Projection(hidden, head)
        base = None
        if run.ref_hidden is not None and run.ref_head is not None and needs_reference(run.objective):
            base = _Projection(run.ref_hidden, run.ref_head)
        dh = torch.zeros_like(hidden) if need_dh else None
        dw = torch.zeros_like(head, dtype=project.accumulate) if need_dw else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        everything = torch.arange(len(run.labels), device=hidden.device)
        for rows in torch.split(everything, run.chunk or _chunk_size(head)):
            y, h = run.labels[rows], hidden[rows]
            logp = project.log_softmax(h, y)  # [C, V]
            ref = None if base is None or run.ref_hidden is None else base.log_softmax(run.ref_hidden[rows], y)
            columns = {name: column[rows] for name, column in run.columns.items()}
            loss, dz = _chunk_gradient(run.objective, logp, ref, y, columns, run.sums, need_dh or need_dw)
            total += loss
            if dz is not None:
                project.accumulate_gradients(dz, h, rows, dh, dw)
        ctx.save_for_backward(dh, None if dw is None else dw.to(head.dtype))
        return total.to(project.accumulate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dh, dw = (None if g is None else g * upstream[0].to(g.dtype) for g in ctx.saved_tensors)
        return dh, dw, None


class _Projection:
    """Logits of one head, chunk by chunk, in the dtype autocast asks for, with the label's logit exact.

    In 16-bit products a logit of size 20 is off by up to 0.06, which reaches π(y) and w as 6 %. The label's own logit
    is therefore taken from a float32 dot product and written back before the softmax, so that log π(y) ≤ 0 holds.
    """

    def __init__(self, hidden: Tensor, head: Tensor):
        kind = hidden.device.type
        self.accumulate = _accumulate(hidden.dtype)
        self.matmul = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        self.head = head.detach()
        self.cast_head = self.head.to(self.matmul)

    def log_softmax(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """log-softmax of the chunk's logits, [C, V] in the accumulation dtype."""
        with torch.autocast(hidden.device.type, enabled=False):
            logits = (hidden.detach().to(self.matmul) @ self.cast_head.T).to(self.accumulate)
            if self.matmul != self.accumulate:
                exact = (hidden.detach().to(self.accumulate) * self.head[labels].to(self.accumulate)).sum(-1)
                logits.scatter_(-1, labels[:, None], exact[:, None])
            return logits.sub_(logits.logsumexp(-1, keepdim=True))

    def accumulate_gradients(
        self, dz: Tensor, hidden: Tensor, rows: Tensor, dh: Tensor | None, dw: Tensor | None
    ) -> None:
        """Adds the chunk's dh = dz·W into its `rows` and dzᵀ·h into `dw`."""
        with torch.autocast(hidden.device.type, enabled=False):
            dz = dz.to(self.matmul)
            if dh is not None:
                dh[rows] = (dz @ self.cast_head).to(dh.dtype)
            if dw is not None:
                h = hidden.detach().to(self.matmul)
                if self.matmul == dw.dtype:
                    dw.addmm_(dz.T, h)
                else:
                    dw.add_(dz.T @ h)


def _chunk_gradient(
    objective: Objective,
    logp: Tensor,
    ref: Tensor | None,
    labels: Tensor,
    columns: dict[str, Tensor],
    sums: dict[str, Tensor],
    need_gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Loss of the chunk (float64 scalar) and its gradient in the logits [C, V], reusing the memory of `logp`."""
    with torch.no_grad():
        wanted = {*objective.needs, "logp", "entropy", *(("ref_logp",) if ref is not None else ())}
        stats = _statistics(wanted, logp, ref, labels, columns)
    leaves = {name: getattr(stats, name).detach() for name in DIFFERENTIABLE if name in objective.needs}
    with torch.enable_grad():
        for name, leaf in leaves.items():
            setattr(stats, name, leaf.requires_grad_(need_gradient))
        loss = _per_token(objective, stats)
        slopes: dict[str, Tensor] = {}
        if need_gradient and loss.requires_grad:
            grads = torch.autograd.grad(loss.sum(), list(leaves.values()), allow_unused=True)
            slopes = {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}
    _record(objective, stats, loss, ref is not None, sums)
    if not need_gradient:
        return loss.detach().double().sum(), None
    return loss.detach().double().sum(), _logit_gradient(slopes, stats, logp, ref, labels)


def _logit_gradient(
    slopes: dict[str, Tensor], stats: TokenStats, logp: Tensor, ref: Tensor | None, labels: Tensor
) -> Tensor:
    """Σ over statistics of slope · d(statistic)/dz, [C, V]."""
    V = logp.shape[-1]
    zero = torch.zeros_like(logp[:, 0])
    a0, a1, a2, a3, a4, a5 = (zero.clone() for _ in range(6))
    if (g := slopes.get("logp")) is not None:  # onehot − π
        a0, a5 = a0 - g, a5 + g
    if (g := slopes.get("entropy")) is not None:  # −π (log π + H)
        a0, a1 = a0 - g * stats.entropy.detach(), a1 - g
    if (g := slopes.get("mean_logp")) is not None:  # 1/V − π
        a0, a4 = a0 - g, a4 + g / V
    if (g := slopes.get("ref_ce")) is not None:  # π − p
        a0, a3 = a0 + g, a3 - g
    if (g := slopes.get("rev_ce")) is not None:  # −π (log p + rev_ce)
        a0, a2 = a0 - g * stats.rev_ce.detach(), a2 - g
    dz = logp.exp()
    factor: Tensor = a0[:, None]
    if "entropy" in slopes:
        factor = factor + a1[:, None] * logp
    if "rev_ce" in slopes and ref is not None:
        factor = factor + a2[:, None] * ref
    dz.mul_(factor)
    if "ref_ce" in slopes and ref is not None:
        dz.addcmul_(a3[:, None].expand_as(dz), ref.exp())
    if "mean_logp" in slopes:
        dz.add_(a4[:, None])
    return dz.scatter_add_(-1, labels[:, None], a5[:, None])


def _statistics(
    wanted: set[str], logp: Tensor, ref: Tensor | None, labels: Tensor, columns: Mapping[str, Tensor]
) -> TokenStats:
    """The wanted statistics from log-probabilities of the policy and, if any, of the base ([C, V] each)."""
    unknown = wanted.difference(STATS)
    if unknown:
        raise ValueError(f"unknown statistics {sorted(unknown)}; an objective may need {', '.join(STATS)}")
    index = labels[:, None]
    make: dict[str, Callable[[], Tensor]] = {
        "logp": lambda: logp.gather(-1, index).squeeze(-1),
        "entropy": lambda: -torch.linalg.vecdot(logp.exp(), logp),
        "mean_logp": lambda: logp.mean(-1),
    }
    if ref is not None:
        base = ref
        make |= {
            "ref_ce": lambda: -torch.linalg.vecdot(base.exp(), logp),
            "rev_ce": lambda: -torch.linalg.vecdot(logp.exp(), base),
            "ref_logp": lambda: base.gather(-1, index).squeeze(-1),
            "ref_entropy": lambda: -torch.linalg.vecdot(base.exp(), base),
        }
    values = {name: make[name]() for name in wanted}
    return TokenStats(**values, vocab_size=logp.shape[-1], columns=columns)


def _per_token(objective: Objective, stats: TokenStats) -> Tensor:
    loss = objective(stats)
    if loss.shape != stats.logp.shape:
        raise ValueError(
            f"{type(objective).__name__} returned shape {tuple(loss.shape)} for {tuple(stats.logp.shape)} tokens: "
            "an objective returns one loss per token and never reduces"
        )
    return loss


def _record(
    objective: Objective, stats: TokenStats, loss: Tensor, has_reference: bool, sums: dict[str, Tensor]
) -> None:
    """Adds the chunk's token sums of everything worth logging."""
    with torch.no_grad():
        values = {"objective": loss, "nll": -stats.logp, "entropy": stats.entropy}
        if has_reference:
            values["surprise"] = -stats.ref_logp
        diagnostics = getattr(objective, "diagnostics", None)
        if diagnostics is not None:
            values |= diagnostics(stats)
        for name, value in values.items():
            total = value.detach().double().sum()
            sums[name] = sums[name] + total if name in sums else total


def _require_reference(objective: Objective, present: bool) -> None:
    if needs_reference(objective) and not present:
        raise ValueError(
            f"{type(objective).__name__} reads the base model: pass its hidden states and head (or logits)"
        )


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _chunk_size(head: Tensor) -> int:
    kind = "cpu" if head.device.type == "cpu" else "cuda"
    return max(CHUNK_FLOOR[kind], CHUNK_ELEMENTS[kind] // head.shape[0])
