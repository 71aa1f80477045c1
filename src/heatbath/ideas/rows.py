"""The elementwise work between the matrix products: statistics of each row of logits, and their gradient in place.

`EagerRows` is plain torch and the reference for every other backend (`kernels/triton_rows.py`). On a CPU it takes a few
rows at a time, so that the passes over them run in the cache: 16 rows of 150,000 at once cost a tenth of 256.

C rows of one chunk, V vocabulary, B rows of one block. z the policy's logits, r the base's, π and p their softmax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from heatbath.ideas.statistics import TOPK

BLOCK_ELEMENTS = 2**21  # of one [B, V] block on a CPU: 8 MiB in float32, a share of a third-level cache
# Statistics whose gradient holds log π or log p, so that the logits must outlive the first pass.
NEED_LOGITS = frozenset({"entropy", "rev_ce"})


@dataclass(frozen=True)
class RowWork:
    """What is asked of the rows: the statistics, whether a gradient in NEED_LOGITS or through a soft-cap follows,
    the `k` of topk_*, and the cap c of logits c·tanh(z / c)."""

    wanted: frozenset[str]
    keep_logits: bool = False
    topk: int = TOPK
    softcap: float | None = None


@dataclass
class RowState:
    """Statistics of a chunk's rows, [C] each, and the normalisers that their gradient needs again."""

    stats: dict[str, Tensor] = field(default_factory=dict)
    normal: dict[str, Tensor] = field(default_factory=dict)


class Rows(Protocol):
    """A backend. `z` and `r` are [C, V] buffers it may overwrite; between the two calls they belong to it."""

    def statistics(
        self, z: Tensor, r: Tensor | None, labels: Tensor, work: RowWork, exact: tuple[Tensor | None, Tensor | None]
    ) -> RowState:
        """The statistics of each row that `work` asks for, [C] each. `exact` are the label's logits of policy and base
        where z and r hold them rounded."""

    def gradient(
        self, z: Tensor, r: Tensor | None, labels: Tensor, work: RowWork, state: RowState, slopes: Mapping[str, Tensor]
    ) -> None:
        """Overwrites z with Σ over statistics of slope [C] · d(statistic)/dz."""


class EagerRows:
    """Any device, any float dtype of z and r wide enough to accumulate in."""

    def __init__(self) -> None:
        self._scratch: dict[str, Tensor] = {}

    def statistics(
        self, z: Tensor, r: Tensor | None, labels: Tensor, work: RowWork, exact: tuple[Tensor | None, Tensor | None]
    ) -> RowState:
        for x, label in zip((z, r), exact, strict=True):
            if x is not None and label is not None:
                x.scatter_(-1, labels[:, None], label[:, None])
        parts = [self._block(z[b], None if r is None else r[b], labels[b], work) for b in _blocks(z)]
        return RowState(
            {name: torch.cat([p.stats[name] for p in parts]) for name in parts[0].stats},
            {name: torch.cat([p.normal[name] for p in parts]) for name in parts[0].normal},
        )

    def _block(self, z: Tensor, r: Tensor | None, labels: Tensor, work: RowWork) -> RowState:
        """One block: z becomes exp(z − max), or z − max where the logits must outlive it; r likewise."""
        wanted, y = work.wanted, labels[:, None]
        stats: dict[str, Tensor] = {}
        if work.softcap is not None:
            for x in (z, *(() if r is None else (r,))):
                x.div_(work.softcap).tanh_().mul_(work.softcap)
        top = z.amax(-1, keepdim=True)
        t = z.sub_(top)
        t_y = t.gather(-1, y).squeeze(-1)
        mean = t.mean(-1) if "mean_logp" in wanted else None
        best = t.topk(min(work.topk, t.shape[-1]), -1).values if {"topk_entropy", "topk_mass"} & wanted else None
        normal = {"top": top.squeeze(-1)}

        keep_t = work.keep_logits or bool(NEED_LOGITS & wanted)
        keep_u = work.keep_logits or bool({"rev_ce", "ref_entropy"} & wanted)
        cross = under = inner = None
        if r is not None:
            u = r.sub_(r.amax(-1, keepdim=True))
            u_y = u.gather(-1, y).squeeze(-1)
            f = self._exp(u, "f") if keep_u else u.exp_()
            ref_sum = f.sum(-1)
            normal["ref_sum"], ref_log = ref_sum, ref_sum.log()
            stats["ref_logp"] = u_y - ref_log
            if "ref_ce" in wanted:
                cross = torch.linalg.vecdot(f, t) / ref_sum
            if "ref_entropy" in wanted:
                stats["ref_entropy"] = ref_log - torch.linalg.vecdot(f, u) / ref_sum
        e = self._exp(t, "e") if keep_t else t.exp_()
        total = e.sum(-1)
        normal["sum"], log = total, total.log()
        if "entropy" in wanted:
            inner = torch.linalg.vecdot(e, t) / total
        if r is not None and "rev_ce" in wanted:
            under = torch.linalg.vecdot(e, r) / total
        if not work.keep_logits:
            if keep_t:
                z.copy_(e)
            if r is not None and keep_u:
                r.copy_(f)

        stats["logp"] = t_y - log
        if mean is not None:
            stats["mean_logp"] = mean - log
        if inner is not None:
            stats["entropy"] = log - inner
        if cross is not None:
            stats["ref_ce"] = log - cross
        if under is not None:
            stats["rev_ce"] = ref_log - under
        if best is not None:
            q = best.log_softmax(-1)
            stats["topk_entropy"] = -(q.exp() * q).sum(-1)
            stats["topk_mass"] = (best - log[:, None]).exp().sum(-1)
        return RowState(stats, normal)

    def gradient(
        self, z: Tensor, r: Tensor | None, labels: Tensor, work: RowWork, state: RowState, slopes: Mapping[str, Tensor]
    ) -> None:
        a = coefficients(slopes, state, z.shape[-1])
        for b in _blocks(z):
            here = {name: value[b][:, None] for name, value in (a | state.normal).items()}
            self._gradient_block(z[b], None if r is None else r[b], labels[b], work, here)

    def _gradient_block(self, z: Tensor, r: Tensor | None, labels: Tensor, work: RowWork, a: dict[str, Tensor]) -> None:
        if not work.keep_logits:  # z holds exp(z − max), r likewise
            z.mul_(a["pi"] / a["sum"])
            if r is not None and "p" in a:
                z.addcmul_(r, a["p"] / a["ref_sum"])
        else:
            pi = self._exp(z, "e").div_(a["sum"])
            bend = None
            if work.softcap is not None:  # d(c·tanh(x/c))/dx = 1 − tanh²
                bend = torch.add(z, a["top"], out=self._like(z, "f")).div_(work.softcap).square_().neg_().add_(1)
            shift = a["pi"] - a["pi_log_pi"] * a["sum"].log() if "pi_log_pi" in a else a["pi"]
            if r is not None and "pi_log_p" in a:
                shift = shift - a["pi_log_p"] * a["ref_sum"].log()
            z.mul_(a.get("pi_log_pi", torch.zeros_like(shift))).add_(shift)
            if r is not None and "pi_log_p" in a:
                z.addcmul_(r, a["pi_log_p"])
            z.mul_(pi)
            if r is not None and "p" in a:
                z.addcmul_(r.exp_(), a["p"] / a["ref_sum"])
        if "one" in a:
            z.add_(a["one"])
        if "onehot" in a:
            z.scatter_add_(-1, labels[:, None], a["onehot"])
        if work.keep_logits and bend is not None:
            z.mul_(bend)

    def _exp(self, x: Tensor, name: str) -> Tensor:
        return torch.exp(x, out=self._like(x, name))

    def _like(self, x: Tensor, name: str) -> Tensor:
        """A buffer of x's shape, kept from block to block."""
        held = self._scratch.get(name)
        if held is None or len(held) < len(x) or held.shape[1:] != x.shape[1:] or held.dtype != x.dtype:
            held = self._scratch[name] = torch.empty_like(x)
        return held[: len(x)]


def coefficients(slopes: Mapping[str, Tensor], state: RowState, vocab_size: int) -> dict[str, Tensor]:
    """The six numbers of each row, [C], by the slope of its loss in each differentiable statistic:

        dz = π∘(pi + pi_log_pi·log π + pi_log_p·log p) + p·p + one + onehot·onehot(y)

    `pi` is always there, the others only where some slope asks for them (derivation: docs/gift.md).
    """
    stats = state.stats
    zero = torch.zeros_like(stats["logp"])
    a: dict[str, Tensor] = {"pi": zero}

    def add(name: str, value: Tensor) -> None:
        a[name] = a[name] + value if name in a else value

    for name, g in slopes.items():
        if name == "logp":  # onehot − π
            add("pi", -g)
            add("onehot", g)
        elif name == "entropy":  # −π (log π + H)
            add("pi", -g * stats["entropy"])
            add("pi_log_pi", -g)
        elif name == "mean_logp":  # 1/V − π
            add("pi", -g)
            add("one", g / vocab_size)
        elif name == "ref_ce":  # π − p
            add("pi", g)
            add("p", -g)
        elif name == "rev_ce":  # −π (log p + rev_ce)
            add("pi", -g * stats["rev_ce"])
            add("pi_log_p", -g)
    return a


def _blocks(z: Tensor) -> Iterator[slice]:
    size = max(1, BLOCK_ELEMENTS // z.shape[-1]) if z.device.type == "cpu" else max(1, len(z))
    return (slice(start, start + size) for start in range(0, max(1, len(z)), size))


def rows_for(device: torch.device, backend: str | None = None) -> Rows:
    """The backend of that name, or the fastest that the device has: "triton" on CUDA where it is installed, else
    "eager". Raises ValueError on another name."""
    made: dict[str, Callable[[], Rows]] = {"eager": EagerRows}
    if backend == "triton" or (backend is None and device.type == "cuda" and _has_triton()):
        from heatbath.ideas.kernels.triton_rows import TritonRows

        made["triton"] = TritonRows
        backend = "triton"
    if (backend or "eager") not in made:
        raise ValueError(f"no backend '{backend}'; there is eager and triton")
    return made[backend or "eager"]()


def _has_triton() -> bool:
    import importlib.util

    return importlib.util.find_spec("triton") is not None
