"""One engine for every objective: hidden states and a head in, a loss and its gradient out, never [N, V] for all N.

Each statistic of `TokenStats` has a derivative in the logits z that is known in closed form, so autograd runs only over
the objective's own [C] vectors; its derivatives become six numbers per token and

    dz = π ∘ (a0 + a1·log π + a2·log p) + a3·p + a4 + a5·onehot(y)

(derivation: docs/gift.md). `dense_loss` is the readable truth in plain autograd; `linear_loss` equals it in chunks,
with the gradient formed during the forward pass; `linear_stats` gives the statistics, recomputed in backward.

N supervised tokens, C tokens of one chunk, V vocabulary, d hidden width, M tokens of which the base's hidden state is
known. π policy, p base. Sources: docs/gift.md; Liger-Kernel and TRL for forming gradients in forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from heatbath.ideas.passes import BASE_ROWS, Inputs, Pass, accumulate_dtype
from heatbath.ideas.rows import NEED_LOGITS, RowWork
from heatbath.ideas.statistics import (
    DIFFERENTIABLE,
    IGNORE,
    STATS,
    TOPK,
    Objective,
    TokenStats,
    needs_reference,
)


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
    segments: Tensor | None = None,
) -> Tensor:
    """Loss of each token by plain autograd over full logits, [N]; exactly 0 where the label is -100.

    `logits` and `ref_logits` are [N, V], `labels` [N], each row already aligned with the label it predicts (no shift
    happens here); a column is [N]; `segments` [N] numbers the sequence of each token. A logit of −inf (a padded
    vocabulary) has probability 0. Raises ValueError when the objective needs `ref_logits`, columns or segments and none
    are given.
    """
    _require(objective, ref_logits is not None, columns or {}, segments is not None)
    valid = labels != IGNORE
    stats = dense_statistics(
        {*objective.needs, "logp", *getattr(objective, "sequence_needs", ())},
        logits[valid],
        None if ref_logits is None else ref_logits[valid],
        labels[valid],
        getattr(objective, "topk", TOPK),
    )
    stats.columns |= {name: column[valid] for name, column in (columns or {}).items()}
    if segments is not None and hasattr(objective, "sequence_weights"):
        with torch.no_grad():
            stats.columns["sequence_weight"] = objective.sequence_weights(stats, segments[valid])
    loss = _per_token(objective, stats)
    return logits.new_zeros(labels.shape, dtype=loss.dtype).masked_scatter(valid, loss)


def linear_loss(
    objective: Objective,
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    ref_hidden: Tensor | None = None,
    ref_head: Tensor | None = None,
    columns: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """Sum over tokens of the objective's loss on logits `hidden @ head.T`, scalar; equals `dense_loss(...).sum()`.

    `hidden` [N, d], `head` [V, d], `labels` [N] (-100 is ignored), the base's `ref_hidden` [N, d'] and `ref_head`
    [V, d'], a column [N]. The gradient is formed during the forward pass, so memory is one chunk of logits plus the
    gradients themselves. Matrix products run in the autocast dtype where autocast is on, all else in float32 (float64
    inputs: float64). A head that does not require a gradient costs no dW. Double backward is refused.

    Options: `segments` [N], the sequence of each token, for objectives that weigh whole sequences. `ref_logp` [N], the
    base's log-probability of each label where it is known already; `ref_rows` [M], the tokens of which `ref_hidden`
    [M, d'] holds a row: at the others the base is taken to be certain of the label (docs/reference.md); with
    `ref_epsilon` an objective that leaves the base more than that there, 1 − w > ε, is refused.
    `scale` and `softcap` c: logits c·tanh(scale·h·W / c) of policy and base. `chunk` tokens at once; `backend` "eager"
    or "triton". Rows of a padded vocabulary take part; slice the head to leave them out.

    Raises ValueError when the objective needs the base, columns or segments and they are not given.
    """
    given = Inputs(hidden, head, labels, ref_hidden, ref_head, dict(columns or {}), **options)
    return _linear_loss(objective, given, record=False).loss


def linear_loss_with_sums(
    objective: Objective,
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    ref_hidden: Tensor | None = None,
    ref_head: Tensor | None = None,
    columns: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> LinearLoss:
    """`linear_loss` and, from the same pass, the token sums of `objective`, `nll`, `entropy`, `surprise` (where the
    objective reads the base) and of whatever the objective's `diagnostics(stats)` returns."""
    given = Inputs(hidden, head, labels, ref_hidden, ref_head, dict(columns or {}), **options)
    return _linear_loss(objective, given, record=True)


def linear_stats(
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    *,
    need: Sequence[str] = ("logp",),
    ref_hidden: Tensor | None = None,
    ref_head: Tensor | None = None,
    columns: Mapping[str, Tensor] | None = None,
    topk: int = TOPK,
    **options: Any,
) -> TokenStats:
    """The statistics named in `need` of each token, [N] (0 where the label is -100), differentiable where they can be.

    Memory is one chunk of logits: backward computes them again. Inputs and options as in `linear_loss`.
    """
    given = Inputs(hidden, head, labels, ref_hidden, ref_head, dict(columns or {}), **options)
    unknown = set(need).difference(STATS)
    if unknown:
        raise ValueError(f"unknown statistics {sorted(unknown)}; there are {', '.join(STATS)}")
    valid = labels != IGNORE
    kept = given.at(valid)
    if any(name in need for name in ("ref_ce", "rev_ce", "ref_entropy", "ref_logp")) and kept.ref_hidden is None:
        raise ValueError("statistics of the base need its hidden states and head")
    order = tuple(dict.fromkeys(need))
    values = _LinearStats.apply(kept.scaled, kept.head, kept, order, topk)  # type: ignore[no-untyped-call]
    out = {}
    for name, value in zip(order, values, strict=True):
        out[name] = value.new_zeros(labels.shape).masked_scatter(valid, value)
    return TokenStats(vocab_size=head.shape[0], columns=columns, **out)


def label_logps(hidden: Tensor, head: Tensor, labels: Tensor, **options: Any) -> Tensor:
    """log π(y) of each token without gradient, [N] (0 where the label is -100); inputs and options of `linear_loss`."""
    with torch.no_grad():
        return linear_stats(hidden, head, labels, need=("logp",), **options).logp


def _linear_loss(objective: Objective, given: Inputs, *, record: bool) -> LinearLoss:
    known = given.ref_logp is not None
    needed = {*objective.needs, *getattr(objective, "sequence_needs", ())}
    only_logp = not needed & {"ref_ce", "rev_ce", "ref_entropy"}
    base = (given.ref_hidden is not None and given.ref_head is not None) or (known and only_logp)
    _require(objective, base, given.columns, given.segments is not None)
    valid = given.labels != IGNORE
    kept = given if bool(valid.all()) else given.at(valid)
    if hasattr(objective, "sequence_weights"):
        with torch.no_grad():
            kept = _with_sequence_weights(objective, kept)
    _require_whole_base(objective, kept)
    sums: dict[str, Tensor] = {}
    # Without gradients none may be formed; autograd.Function would still be told that both inputs need one.
    hidden, head = (x if torch.is_grad_enabled() else x.detach() for x in (kept.scaled, kept.head))
    into = sums if record else None
    loss: Tensor = _LinearLoss.apply(hidden, head, objective, kept, into)  # type: ignore[no-untyped-call]
    return LinearLoss(loss, kept.labels.numel(), sums)


def _with_sequence_weights(objective: Any, given: Inputs) -> Inputs:
    """The inputs with the objective's own weights of whole sequences as a column, [N], and with what the one pass that
    they need has found of the base."""
    options = {"softcap": given.softcap, "scale": given.scale, "chunk": given.chunk, "backend": given.backend}
    stats: dict[str, Tensor] = {}
    if "logp" in objective.sequence_needs:
        stats["logp"] = label_logps(given.hidden, given.head, given.labels, **options)
    known = given.ref_logp
    if "ref_logp" in objective.sequence_needs:
        if known is None:
            assert given.ref_hidden is not None and given.ref_head is not None
            known = label_logps(given.ref_hidden, given.ref_head, given.labels, **options)
        stats["ref_logp"] = known
    assert given.segments is not None
    seen = TokenStats(vocab_size=given.head.shape[0], columns=given.columns, **stats)
    weights = objective.sequence_weights(seen, given.segments)
    return dataclasses.replace(given, columns={**given.columns, "sequence_weight": weights}, ref_logp=known)


def _require_whole_base(objective: Objective, given: Inputs) -> None:
    """Raises ValueError where the base is known at some tokens only, and the objective's target leaves it more than
    `ref_epsilon` at another one."""
    name, N = type(objective).__name__, len(given.labels)
    if given.ref_rows is None or given.ref_epsilon is None or len(given.ref_rows) == N:
        return
    if not BASE_ROWS.intersection(objective.needs):
        return
    w: Any = getattr(objective, "target_mass", None)
    if w is None or given.ref_logp is None:
        raise ValueError(f"{name} needs the base at every token; `ref_hidden` holds it at {len(given.ref_rows)} of {N}")
    left = 1 - w(TokenStats(vocab_size=given.head.shape[0], columns=given.columns, ref_logp=given.ref_logp))
    left[given.ref_rows] = 0.0
    if bool((left > given.ref_epsilon * 1.01 + 1e-6).any()):
        raise ValueError(
            f"{name} leaves the base {float(left.max()):.2g} at a token whose hidden state is not held, more than "
            f"ε = {given.ref_epsilon:g}: fill the cache for this objective"
        )


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, objective: Objective, given: Inputs, sums: dict[str, Tensor] | None
    ) -> Tensor:
        need_dh, need_dw = ctx.needs_input_grad[:2]
        need = need_dh or need_dw
        wanted = {*objective.needs, "logp", *(("entropy",) if sums is not None else ())}
        work = RowWork(
            frozenset(wanted),
            keep_logits=need and (bool(NEED_LOGITS.intersection(objective.needs)) or given.softcap is not None),
            topk=getattr(objective, "topk", TOPK),
            softcap=given.softcap,
        )
        run = Pass(given, work)
        gradients = run.gradients(need_dh, need_dw)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for chunk in run.chunks():
            stats = TokenStats(vocab_size=head.shape[0], columns=chunk.columns, **chunk.stats)
            loss, slopes = _slopes(objective, stats, need)
            total += loss.double().sum()
            if sums is not None:
                _record(objective, stats, loss, sums)
            if need:
                gradients.add(chunk, slopes)
        ctx.gradients, ctx.dtype = (gradients.dh, gradients.dw), head.dtype
        return total.to(run.accumulate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_loss has handed its gradient over: for a second backward call it again")
        (dh, dw), ctx.gradients = ctx.gradients, None
        if upstream[0].device.type == "cpu" and upstream[0] == 1:  # elsewhere the question costs more than the answer
            return dh, None if dw is None else dw.to(ctx.dtype), None, None, None
        if dw is not None:  # in place: a second [V, d] tensor would cost as much as all the elementwise work
            dw = dw.mul_(upstream[0]).to(ctx.dtype)
        if dh is not None:  # 1/N itself is not rounded to 16 bits
            dh = (dh.to(upstream[0].dtype) * upstream[0]).to(dh.dtype)
        return dh, dw, None, None, None


class _LinearStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, given: Inputs, names: tuple[str, ...], topk: int
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a statistic that the loss does not read costs nothing in backward
        run = Pass(given, RowWork(frozenset(names), topk=topk, softcap=given.softcap))
        out = {name: hidden.new_zeros(len(given.labels), dtype=run.accumulate) for name in names}
        for chunk in run.chunks():
            for name in names:
                out[name][chunk.rows] = chunk.stats[name]
        ctx.save_for_backward(hidden, head)
        ctx.given, ctx.names = given, names
        ctx.autocast = (torch.is_autocast_enabled(hidden.device.type), torch.get_autocast_dtype(hidden.device.type))
        ctx.mark_non_differentiable(*(out[name] for name in names if name not in DIFFERENTIABLE))
        return tuple(out[name] for name in names)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        given, (hidden, _) = ctx.given, ctx.saved_tensors
        slopes = {n: g for n, g in zip(ctx.names, upstream, strict=True) if g is not None and n in DIFFERENTIABLE}
        enabled, dtype = ctx.autocast
        work = RowWork(
            frozenset({*slopes, "logp"}),
            keep_logits=bool(NEED_LOGITS.intersection(slopes)) or given.softcap is not None,
            softcap=given.softcap,
        )
        with torch.autocast(hidden.device.type, dtype=dtype, enabled=enabled):
            run = Pass(given, work)
            gradients = run.gradients(*ctx.needs_input_grad[:2])
            for chunk in run.chunks():
                gradients.add(chunk, {name: g[chunk.rows].to(run.accumulate) for name, g in slopes.items()})
        return *gradients.take(given.head.dtype), None, None, None


def _slopes(objective: Objective, stats: TokenStats, need_gradient: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each token, [C], detached, and its derivative in each differentiable statistic, [C]."""
    leaves = {name: getattr(stats, name) for name in DIFFERENTIABLE if name in (*objective.needs, "logp")}
    with torch.enable_grad():
        for name, leaf in leaves.items():
            setattr(stats, name, leaf.detach().requires_grad_(need_gradient))
        loss = _per_token(objective, stats)
        slopes: dict[str, Tensor] = {}
        if need_gradient and loss.requires_grad:
            inputs = [getattr(stats, name) for name in leaves]
            grads = torch.autograd.grad(loss.sum(), inputs, allow_unused=True)
            slopes = {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}
    for name, leaf in leaves.items():
        setattr(stats, name, leaf)
    return loss.detach(), slopes


def dense_statistics(wanted: set[str], z: Tensor, r: Tensor | None, labels: Tensor, topk: int) -> TokenStats:
    """The wanted statistics, [N], in plain torch from the policy's logits `z` and the base's `r`, [N, V]."""
    logp = z.to(accumulate_dtype(z.dtype)).log_softmax(-1)
    ref = None if r is None else r.to(accumulate_dtype(r.dtype)).log_softmax(-1)

    def expected(p: Tensor, x: Tensor) -> Tensor:  # Σ_v p·x, where 0·(−inf) is 0
        total: Tensor = torch.linalg.vecdot(p, x.masked_fill(x.isneginf() & (p == 0), 0.0))
        return total

    index = labels[:, None]
    out = {"logp": logp.gather(-1, index).squeeze(-1)}
    if "entropy" in wanted:
        out["entropy"] = -expected(logp.exp(), logp)
    if "mean_logp" in wanted:
        out["mean_logp"] = logp.mean(-1)
    if {"topk_entropy", "topk_mass"} & wanted:
        best = logp.detach().topk(min(topk, logp.shape[-1]), -1).values
        out["topk_entropy"] = -expected(best.softmax(-1), best.log_softmax(-1))
        out["topk_mass"] = best.exp().sum(-1)
    if ref is not None:
        p = ref.exp()
        out |= {
            "ref_ce": -expected(p, logp),
            "rev_ce": -expected(logp.exp(), ref),
            "ref_logp": ref.gather(-1, index).squeeze(-1),
            "ref_entropy": -expected(p, ref),
        }
    stats = TokenStats(vocab_size=z.shape[-1])
    for name in wanted & out.keys():
        setattr(stats, name, out[name])
    return stats


def _per_token(objective: Objective, stats: TokenStats) -> Tensor:
    loss: Tensor = objective(stats)
    if loss.shape != stats.logp.shape:
        raise ValueError(
            f"{type(objective).__name__} returned shape {tuple(loss.shape)} for {tuple(stats.logp.shape)} tokens: "
            "an objective returns one loss per token and never reduces"
        )
    return loss


def _record(objective: Objective, stats: TokenStats, loss: Tensor, sums: dict[str, Tensor]) -> None:
    """Adds the chunk's token sums of everything worth logging."""
    with torch.no_grad():
        values = {"objective": loss, "nll": -stats.logp, "entropy": stats.entropy}
        if "ref_logp" in stats.__dict__:
            values["surprise"] = -stats.ref_logp
        diagnostics = getattr(objective, "diagnostics", None)
        if diagnostics is not None:
            values |= diagnostics(stats)
        for name, value in values.items():
            total = value.detach().double().sum()
            sums[name] = sums[name] + total if name in sums else total


def _require(objective: Objective, base: bool, columns: Mapping[str, Tensor], segments: bool) -> None:
    """Raises ValueError where the objective reads what the caller has not given."""
    name = type(objective).__name__
    unknown = set(objective.needs).difference(STATS)
    if unknown:
        raise ValueError(f"{name} needs unknown statistics {sorted(unknown)}; there are {', '.join(STATS)}")
    if needs_reference(objective) and not base:
        raise ValueError(f"{name} reads the base model: pass its hidden states and head (or logits)")
    missing = [c for c in getattr(objective, "columns", ()) if c not in columns]
    if missing:
        raise ValueError(f"{name} reads the column '{missing[0]}', [N]: pass it in `columns`")
    if hasattr(objective, "sequence_weights") and not segments:
        raise ValueError(f"{name} weighs whole sequences: pass `segments` [N], the sequence of each token")
