"""The elementwise work on rows of logits in two Triton kernels: one reads z and r, one reads both and writes dz over z.

C rows, V vocabulary; z the policy's logits, r the base's, π and p their softmax, y the label. Logits stay as the matrix
product left them (bfloat16, float16 or float32) and are widened in registers, so that in 16 bits the two kernels move
10 bytes per entry. The label's logit alone is at hand exactly (`Rows.statistics`); the kernels put it in its place.

Every sum is kept relative to the running maximum of its row, Σ e^t·t with t = z − max and not Σ e^t·z, and is carried
over when the maximum grows: nothing cancels, whatever offset the logits have. What remains is arithmetic on [C]
vectors, done in torch. Names as in `EagerRows`: t, e, u, f are z − max, its exp, r − max, its exp.

Sources: Milakov & Gimelshein 2018 (online softmax); Liger-Kernel (a row kernel that overwrites logits by gradients).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from heatbath.ideas.rows import RowState, RowWork, coefficients

# Entries of one tile: 16 per thread at 8 warps, in 16 bits two 16-byte loads of z and two of r. Half as many pay twice
# the reductions across warps per entry; twice as many need more registers than two programs on a multiprocessor have.
BLOCK = 4096
WARPS = 8
# Tiles in shared memory, the next on its way while one is worked on. Two keep 16 KiB per program in flight in 16 bits,
# which with two programs on a multiprocessor is past what bandwidth times latency asks for; three cost registers, and
# in float64 do not fit every device. All three sizes are calculated, with the compiler's register counts; not timed.
STAGES = 2
# Where the running maximum begins: below any logit, yet finite, so that the difference of two maxima is never NaN.
LOWEST: tl.constexpr = tl.constexpr(-1e30)

# Rows of the [*, C] tables between torch and the kernels, in the order in which the kernels number them.
SUMS = ("top", "sum", "inner", "mean", "ref_top", "ref_sum", "cross", "ref_inner", "under")
NORMAL = ("label", "top", "log", "ref_label", "ref_top", "ref_log")
COEFFICIENTS = ("pi", "pi_log_pi", "pi_log_p", "p", "one", "onehot")


class TritonRows:
    """CUDA devices (and CPU tensors under TRITON_INTERPRET=1). z and r may be of any float dtype; sums are float32,
    or float64 where z is. `statistics` leaves z and r as they are."""

    takes_16_bits = True  # z and r in the dtype of the matrix product

    def statistics(
        self, z: Tensor, r: Tensor | None, labels: Tensor, work: RowWork, exact: tuple[Tensor | None, Tensor | None]
    ) -> RowState:
        """As in `Rows`. `normal` keeps what the gradient needs again: maximum, log of the sum and label's logit."""
        wanted, accumulate = work.wanted, _accumulate(z)
        label = _label(z, labels, exact[0], work.softcap)
        ref_label = label if r is None else _label(r, labels, exact[1], work.softcap).to(accumulate)
        sums = z.new_empty(len(SUMS), len(z), dtype=accumulate)
        flags = {
            "has_mean": "mean_logp" in wanted,
            "has_entropy": "entropy" in wanted,
            "has_ref": r is not None,
            "has_ref_ce": "ref_ce" in wanted,
            "has_ref_entropy": "ref_entropy" in wanted,
            "has_rev_ce": "rev_ce" in wanted,
        }
        _launch(_statistics_kernel, z, r, labels, work, label, ref_label, sums, **flags)
        s = dict(zip(SUMS, sums, strict=True))

        log = s["sum"].log()
        stats = {"logp": label - s["top"] - log}
        normal = {"label": label, "top": s["top"], "log": log}
        if "mean_logp" in wanted:
            stats["mean_logp"] = s["mean"] / z.shape[-1] - log
        if "entropy" in wanted:
            stats["entropy"] = log - s["inner"] / s["sum"]
        if r is not None:
            ref_log = s["ref_sum"].log()
            normal |= {"ref_label": ref_label, "ref_top": s["ref_top"], "ref_log": ref_log}
            stats["ref_logp"] = ref_label - s["ref_top"] - ref_log
            if "ref_ce" in wanted:
                stats["ref_ce"] = log - s["cross"] / s["ref_sum"]
            if "ref_entropy" in wanted:
                stats["ref_entropy"] = ref_log - s["ref_inner"] / s["ref_sum"]
            if "rev_ce" in wanted:
                stats["rev_ce"] = ref_log - s["under"] / s["sum"]
        if {"topk_entropy", "topk_mass"} & wanted:
            best = _likeliest(z, labels, label, work) - s["top"][:, None]
            q = best.log_softmax(-1)
            stats["topk_entropy"] = -(q.exp() * q).sum(-1)
            stats["topk_mass"] = (best - log[:, None]).exp().sum(-1)
        return RowState(stats, normal)

    def gradient(
        self, z: Tensor, r: Tensor | None, labels: Tensor, work: RowWork, state: RowState, slopes: Mapping[str, Tensor]
    ) -> None:
        """As in `Rows`; dz is rounded once, to the dtype of z."""
        given = state.normal | coefficients(slopes, state, z.shape[-1])
        absent = torch.zeros_like(state.normal["top"])
        numbers = torch.stack([given.get(name, absent).to(absent.dtype) for name in NORMAL + COEFFICIENTS])
        flags = {
            "has_pi_log_pi": "pi_log_pi" in given,
            "has_pi_log_p": r is not None and "pi_log_p" in given,
            "has_p": r is not None and "p" in given,
        }
        _launch(_gradient_kernel, z, r, labels, work, numbers, **flags)


def _launch(
    kernel: Any, z: Tensor, r: Tensor | None, labels: Tensor, work: RowWork, *tables: Tensor, **flags: bool
) -> None:
    """One program for each row. Where there is no r the kernel gets z in its place, and does not read it."""
    ref = z if r is None else r
    if z.stride(-1) != 1 or ref.stride(-1) != 1:
        raise ValueError(f"rows of logits must be contiguous, not of strides {z.stride()} and {ref.stride()}")
    if z.device.type == "cpu" and isinstance(kernel, triton.JITFunction):
        raise ValueError("the backend 'triton' runs on a GPU, not on CPU tensors: take backend='eager'")
    if not len(z):
        return
    with torch.cuda.device_of(z):  # type: ignore[no-untyped-call]
        kernel[(len(z),)](
            z,
            ref,
            labels.contiguous(),
            *tables,
            len(z),
            z.shape[-1],
            z.stride(0),
            ref.stride(0),
            **flags,
            cap=None if work.softcap is None else float(work.softcap),
            wide=_accumulate(z) == torch.float64,
            block=BLOCK,
            stages=STAGES,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


def _accumulate(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _label(x: Tensor, labels: Tensor, exact: Tensor | None, softcap: float | None) -> Tensor:
    """The label's logit after the soft-cap, [C], in the dtype sums are taken in."""
    logit = x.gather(-1, labels[:, None]).squeeze(-1) if exact is None else exact
    return _capped(logit.to(_accumulate(x)), softcap).contiguous()


def _capped(x: Tensor, softcap: float | None) -> Tensor:
    return x if softcap is None else (x / softcap).tanh() * softcap


def _likeliest(z: Tensor, labels: Tensor, label: Tensor, work: RowWork) -> Tensor:
    """The `topk` largest logits of each row after the soft-cap, [C, k], the label's exact.

    Of the other tokens the k largest are among the k + 1 largest as rounded; no wider copy of z is made.
    """
    V = z.shape[-1]
    rounded, column = z.topk(min(work.topk + 1, V), -1)
    others = _capped(rounded.to(label.dtype), work.softcap).masked_fill(column == labels[:, None], -torch.inf)
    return torch.cat([label[:, None], others], -1).topk(min(work.topk, V), -1).values


@triton.jit  # type: ignore[untyped-decorator]
def _logits(
    row: tl.tensor,
    cols: tl.tensor,
    vocab: tl.tensor,
    y: tl.tensor,
    label: tl.tensor,
    cap: tl.constexpr,
    wide: tl.constexpr,
) -> tl.tensor:
    """One tile of a row of logits, soft-capped, the label's value exact; −inf beyond the vocabulary."""
    x = tl.load(row + cols, mask=cols < vocab, other=float("-inf"))
    x = x.to(tl.float64) if wide else x.to(tl.float32)
    if cap is not None:  # c·tanh(x / c), written so that no exponential overflows
        e = tl.exp(tl.abs(x) * (-2.0 / cap))
        x = tl.where(x < 0, -cap, cap) * ((1.0 - e) / (1.0 + e))
        x = tl.where(cols < vocab, x, float("-inf"))
    return tl.where(cols == y, label, x)


@triton.jit  # type: ignore[untyped-decorator]
def _dot(weight: tl.tensor, x: tl.tensor) -> tl.tensor:
    """Σ weight·x over a tile, where 0·(−inf) is 0."""
    return tl.sum(weight * tl.where(weight > 0, x, 0.0), 0)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _statistics_kernel(
    z: tl.tensor,
    r: tl.tensor,
    labels: tl.tensor,
    z_label: tl.tensor,
    r_label: tl.tensor,
    sums: tl.tensor,
    rows: tl.tensor,
    vocab: tl.tensor,
    z_stride: tl.tensor,
    r_stride: tl.tensor,
    has_mean: tl.constexpr,
    has_entropy: tl.constexpr,
    has_ref: tl.constexpr,
    has_ref_ce: tl.constexpr,
    has_ref_entropy: tl.constexpr,
    has_rev_ce: tl.constexpr,
    cap: tl.constexpr,
    wide: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
) -> None:
    """The SUMS of one row. A program reads its row once, in tiles of `block`."""
    row = tl.program_id(0).to(tl.int64)  # row · stride passes 2^31
    y = tl.load(labels + row).to(tl.int32)
    label, ref_label = tl.load(z_label + row), tl.load(r_label + row)
    z += row * z_stride
    r += row * r_stride
    zero = tl.full((), 0.0, tl.float64 if wide else tl.float32)
    top, total, inner, mean = zero + LOWEST, zero, zero, zero
    ref_top, ref_total, cross, ref_inner, under = zero + LOWEST, zero, zero, zero, zero
    for start in tl.range(0, vocab, block, num_stages=stages):
        cols = start + tl.arange(0, block)
        x = _logits(z, cols, vocab, y, label, cap, wide)
        new = tl.maximum(top, tl.max(x, 0))
        rise, t = top - new, x - new  # rise: what every t of the tiles before falls by
        e = tl.exp(t)
        if has_mean:
            mean += start * rise + tl.sum(tl.where(cols < vocab, t, 0.0), 0)
        if has_entropy:
            inner = tl.exp(rise) * (inner + total * rise) + _dot(e, t)
        if has_ref:
            w = _logits(r, cols, vocab, y, ref_label, cap, wide)
            ref_new = tl.maximum(ref_top, tl.max(w, 0))
            ref_rise, u = ref_top - ref_new, w - ref_new
            f = tl.exp(u)
            if has_ref_ce:
                cross = tl.exp(ref_rise) * (cross + ref_total * rise) + _dot(f, t)
            if has_ref_entropy:
                ref_inner = tl.exp(ref_rise) * (ref_inner + ref_total * ref_rise) + _dot(f, u)
            if has_rev_ce:
                under = tl.exp(rise) * (under + total * ref_rise) + _dot(e, u)
            ref_total = tl.exp(ref_rise) * ref_total + tl.sum(f, 0)
            ref_top = ref_new
        total = tl.exp(rise) * total + tl.sum(e, 0)
        top = new
    sums += row
    tl.store(sums, top)
    tl.store(sums + rows, total)
    tl.store(sums + 2 * rows, inner)
    tl.store(sums + 3 * rows, mean)
    tl.store(sums + 4 * rows, ref_top)
    tl.store(sums + 5 * rows, ref_total)
    tl.store(sums + 6 * rows, cross)
    tl.store(sums + 7 * rows, ref_inner)
    tl.store(sums + 8 * rows, under)


@triton.jit(do_not_specialize=["rows"])  # type: ignore[untyped-decorator]
def _gradient_kernel(
    z: tl.tensor,
    r: tl.tensor,
    labels: tl.tensor,
    numbers: tl.tensor,
    rows: tl.tensor,
    vocab: tl.tensor,
    z_stride: tl.tensor,
    r_stride: tl.tensor,
    has_pi_log_pi: tl.constexpr,
    has_pi_log_p: tl.constexpr,
    has_p: tl.constexpr,
    cap: tl.constexpr,
    wide: tl.constexpr,
    block: tl.constexpr,
    stages: tl.constexpr,
) -> None:
    """One row of z becomes π∘(pi + pi_log_pi·log π + pi_log_p·log p) + p·p + one + onehot·onehot(y), through the cap.

    A tile is read before it is written, and by one program alone.
    """
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(labels + row).to(tl.int32)
    numbers += row
    label, top, log = tl.load(numbers), tl.load(numbers + rows), tl.load(numbers + 2 * rows)
    ref_label, ref_top = tl.load(numbers + 3 * rows), tl.load(numbers + 4 * rows)
    ref_log, pi = tl.load(numbers + 5 * rows), tl.load(numbers + 6 * rows)
    pi_log_pi, pi_log_p = tl.load(numbers + 7 * rows), tl.load(numbers + 8 * rows)
    p, one, onehot = tl.load(numbers + 9 * rows), tl.load(numbers + 10 * rows), tl.load(numbers + 11 * rows)
    z += row * z_stride
    r += row * r_stride
    for start in tl.range(0, vocab, block, num_stages=stages):
        cols = start + tl.arange(0, block)
        x = _logits(z, cols, vocab, y, label, cap, wide)
        log_pi = x - top - log
        likely = tl.exp(log_pi)
        inner = pi
        if has_pi_log_pi:  # 0·log 0 = 0
            inner += pi_log_pi * tl.where(likely > 0, log_pi, 0.0)
        dz = tl.where(cols == y, one + onehot, one)
        if has_pi_log_p or has_p:
            log_p = _logits(r, cols, vocab, y, ref_label, cap, wide) - ref_top - ref_log
            if has_pi_log_p:
                inner += pi_log_p * tl.where(likely > 0, log_p, 0.0)
            if has_p:
                dz += p * tl.exp(log_p)
        dz += likely * inner
        if cap is not None:  # d(c·tanh(x/c))/dx = 1 − tanh²
            dz *= 1.0 - (x / cap) * (x / cap)
        tl.store(z + cols, dz.to(z.dtype.element_ty), mask=cols < vocab)
