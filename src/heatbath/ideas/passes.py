"""One pass over the tokens in chunks: logits of a chunk, their statistics, and the gradients added up.

Tokens of which the base's hidden state is known and those of which it is not go in chunks of their own, so that the
base's matrix product is paid only where it is needed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from heatbath.ideas.rows import Rows, RowState, RowWork, rows_for

# Elements of one [C, V] buffer (128 MiB and 1 GiB in float32), and the fewest tokens C it may come down to: a CPU keeps
# its products busy from about 256, a GPU is held up by the float32 accumulation of dW below about 1,024.
CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}
CHUNK_FLOOR = {"cpu": 256, "cuda": 1024}
CHUNK_MOST = 4096
BASE_ROWS = frozenset({"ref_ce", "rev_ce", "ref_entropy"})  # statistics that need the base's whole distribution


@dataclass
class Inputs:
    """What a caller of the engine gives, shapes as in `engine.linear_loss`."""

    hidden: Tensor
    head: Tensor
    labels: Tensor
    ref_hidden: Tensor | None = None
    ref_head: Tensor | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)
    segments: Tensor | None = None
    ref_logp: Tensor | None = None
    ref_rows: Tensor | None = None
    ref_epsilon: float | None = None
    scale: float = 1.0
    softcap: float | None = None
    chunk: int | None = None
    backend: str | None = None

    def __post_init__(self) -> None:
        for name in ("hidden", "head"):
            if hasattr(getattr(self, name), "full_tensor"):
                raise ValueError(f"`{name}` is a DTensor: gather it once with {name}.full_tensor()")
        if self.hidden.shape[-1] != self.head.shape[-1] or self.hidden.shape[:-1] != self.labels.shape:
            raise ValueError(
                f"hidden {tuple(self.hidden.shape)}, head {tuple(self.head.shape)} and labels "
                f"{tuple(self.labels.shape)} do not fit [N, d], [V, d] and [N]"
            )
        known = self.labels if self.ref_rows is None else self.ref_rows
        if self.ref_hidden is not None and self.ref_hidden.shape[:-1] != known.shape:
            raise ValueError(
                f"ref_hidden {tuple(self.ref_hidden.shape)} does not fit [N, d'] of {len(self.labels)} labels, or "
                "[M, d'] of the tokens in ref_rows"
            )
        for name, value in {**self.columns, "segments": self.segments, "ref_logp": self.ref_logp}.items():
            if value is not None and value.shape != self.labels.shape:
                raise ValueError(f"'{name}' {tuple(value.shape)} does not fit [N] of {len(self.labels)} labels")
        if self.ref_head is not None and self.ref_head.shape[0] != self.head.shape[0]:
            raise ValueError(f"{self.ref_head.shape[0]:,} rows in ref_head, {self.head.shape[0]:,} in head")

    @property
    def scaled(self) -> Tensor:
        """The hidden states whose product with the head are the logits, [N, d]."""
        return self.hidden if self.scale == 1.0 else self.hidden * self.scale

    def at(self, valid: Tensor) -> Inputs:
        """Only the tokens where `valid` [N]."""
        ref_hidden, ref_rows = self.ref_hidden, self.ref_rows
        if ref_rows is not None and ref_hidden is not None:
            stay = valid[ref_rows]
            ref_hidden, ref_rows = ref_hidden[stay], (valid.cumsum(0) - 1)[ref_rows[stay]]
        elif ref_hidden is not None:
            ref_hidden = ref_hidden[valid]
        return dataclasses.replace(
            self,
            hidden=self.hidden[valid],
            labels=self.labels[valid],
            ref_hidden=ref_hidden,
            ref_rows=ref_rows,
            columns={name: column[valid] for name, column in self.columns.items()},
            segments=None if self.segments is None else self.segments[valid],
            ref_logp=None if self.ref_logp is None else self.ref_logp[valid],
        )


@dataclass
class Chunk:
    """The tokens `rows` [C] of the pass: their statistics and columns, and the buffers of their logits."""

    rows: slice | Tensor
    hidden: Tensor
    labels: Tensor
    stats: dict[str, Tensor]
    columns: dict[str, Tensor]
    z: Tensor
    r: Tensor | None
    state: RowState


class Pass:
    """Logits and statistics of the given tokens, chunk by chunk. Labels hold no -100."""

    def __init__(self, given: Inputs, work: RowWork):
        self.given, self.work = given, work
        self.rows: Rows = rows_for(given.hidden.device, given.backend)
        self.hidden = given.scaled.detach()
        self.policy = Projection(self.hidden, given.head)
        self.accumulate = self.policy.accumulate
        self.base: Projection | None = None
        self.pointer = self._pointer()
        self._buffers: dict[str, Tensor] = {}

    def _pointer(self) -> Tensor | None:
        """Of each token, the row of `ref_hidden` that is its base's hidden state, or −1; None where none is wanted."""
        given, wanted = self.given, self.work.wanted
        if given.ref_hidden is None or given.ref_head is None:
            return None
        if not (BASE_ROWS & wanted) and (given.ref_logp is not None or "ref_logp" not in wanted):
            return None
        ref = given.ref_hidden if given.scale == 1.0 else given.ref_hidden * given.scale
        self.ref_hidden = ref
        self.base = Projection(ref, given.ref_head, self.accumulate)
        everything = torch.arange(len(ref), device=ref.device)
        if given.ref_rows is None:
            return everything
        if len(given.ref_rows) < len(given.labels) and (given.ref_logp is None or "rev_ce" in wanted):
            raise ValueError("a base known at some tokens only needs `ref_logp` of all, and cannot give rev_ce")
        pointer = torch.full_like(given.labels, -1)
        pointer[given.ref_rows] = everything
        return pointer

    def chunks(self) -> Iterator[Chunk]:
        """Chunks without the base first, then those with it. A chunk's buffers hold until the next is asked for."""
        N, most = len(self.given.labels), self.given.chunk or chunk_size(self.given.head)
        if self.pointer is None or self.given.ref_rows is None:
            for start, stop in even_parts(N, most):
                yield self._chunk(slice(start, stop), stop - start, self.pointer is not None)
            return
        for base in (False, True):
            group = ((self.pointer >= 0) == base).nonzero().squeeze(-1)
            for start, stop in even_parts(len(group), most):
                yield self._chunk(group[start:stop], stop - start, base)

    def _chunk(self, rows: slice | Tensor, count: int, base: bool) -> Chunk:
        given, r, r_label = self.given, None, None
        hidden, labels = self.hidden[rows], given.labels[rows]
        z, z_label = self.policy.logits(hidden, labels, self._buffer("z", count, self.policy))
        if base:
            assert self.base is not None and self.pointer is not None
            ref = self.ref_hidden[rows if given.ref_rows is None else self.pointer[rows]]
            r, r_label = self.base.logits(ref, labels, self._buffer("r", count, self.base))
        state = self.rows.statistics(z, r, labels, self.work, (z_label, r_label))
        stats = {name: value for name, value in state.stats.items() if name in self.work.wanted or name == "ref_logp"}
        if given.ref_logp is not None:
            stats["ref_logp"] = given.ref_logp[rows].to(self.accumulate)
        if not base and self.pointer is not None:  # the base is taken to be certain of the label
            if "ref_ce" in self.work.wanted:
                stats["ref_ce"] = -state.stats["logp"]
            if "ref_entropy" in self.work.wanted:
                stats["ref_entropy"] = torch.zeros_like(state.stats["logp"])
        columns = {name: column[rows] for name, column in given.columns.items()}
        return Chunk(rows, hidden, labels, stats, columns, z, r, state)

    def _buffer(self, name: str, rows: int, of: Projection) -> Tensor:
        """[C, V] in the dtype that the backend works in, kept from chunk to chunk."""
        if name not in self._buffers:
            size = min(self.given.chunk or chunk_size(self.given.head), len(self.given.labels))
            dtype = of.accumulate if not getattr(self.rows, "takes_16_bits", False) else of.matmul
            self._buffers[name] = torch.empty(size, of.head.shape[0], dtype=dtype, device=of.head.device)
        return self._buffers[name][:rows]

    def gradients(self, need_dh: bool, need_dw: bool) -> Gradients:
        """An empty sum of gradients."""
        return Gradients(self, need_dh, need_dw)


class Gradients:
    """dh [N, d] and dW [V, d] (float32 at least), added up chunk by chunk."""

    def __init__(self, run: Pass, need_dh: bool, need_dw: bool):
        self.run = run
        self.dh = torch.zeros_like(run.hidden) if need_dh else None
        # Not zeroed where the first chunk is written, not added: a pass over [V, d] is 1 % of the products.
        written = len(run.given.labels) > 0 and run.policy.matmul == run.accumulate
        make = torch.empty_like if written else torch.zeros_like
        self.dw = make(run.policy.head, dtype=run.accumulate) if need_dw else None
        self._write = written

    def add(self, chunk: Chunk, slopes: Mapping[str, Tensor]) -> None:
        """Adds what the slopes [C] of the chunk's statistics come to; the chunk's logits are gone afterwards."""
        run, slopes = self.run, dict(slopes)
        if chunk.r is None and "ref_ce" in slopes:  # the base certain of the label: ref_ce = −log π(y)
            slopes["logp"] = slopes.get("logp", 0.0) - slopes.pop("ref_ce")
        run.rows.gradient(chunk.z, chunk.r, chunk.labels, run.work, chunk.state, slopes)
        dz = chunk.z.to(run.policy.matmul)
        with torch.autocast(dz.device.type, enabled=False):
            if self.dh is not None:
                self.dh[chunk.rows] = (dz @ run.policy.cast_head).to(self.dh.dtype)
            if self.dw is not None:
                if self._write:
                    torch.mm(dz.T, chunk.hidden, out=self.dw)
                    self._write = False
                else:
                    add_product(self.dw, dz.T, chunk.hidden.to(run.policy.matmul))

    def take(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """dh, and dW in the dtype of the head; None what was not wanted."""
        return self.dh, None if self.dw is None else self.dw.to(dtype)


class Projection:
    """Logits of one head in the dtype autocast asks for, and the label's logit exact.

    In 16-bit products a logit of size 20 is off by up to 0.06, which reaches π(y) and w as 6 %. The label's own logit
    is therefore taken from a float32 dot product and takes its place before the softmax, so that log π(y) ≤ 0 holds.
    """

    def __init__(self, hidden: Tensor, head: Tensor, accumulate: torch.dtype | None = None):
        kind = hidden.device.type
        self.accumulate = accumulate or accumulate_dtype(hidden.dtype)
        self.matmul = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        self.head = head.detach()
        self.cast_head = self.head.to(self.matmul)

    def logits(self, hidden: Tensor, labels: Tensor, out: Tensor) -> tuple[Tensor, Tensor | None]:
        """Writes [C, V] into `out`; returns it and, where the product is in 16 bits, the label's exact logit [C]."""
        with torch.autocast(hidden.device.type, enabled=False):
            if self.matmul == out.dtype:
                torch.mm(hidden.to(self.matmul), self.cast_head.T, out=out)
            else:
                out.copy_(hidden.to(self.matmul) @ self.cast_head.T)
            if self.matmul == self.accumulate:
                return out, None
            return out, (hidden.to(self.accumulate) * self.head[labels].to(self.accumulate)).sum(-1)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, accumulated in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def even_parts(count: int, most: int) -> Iterator[tuple[int, int]]:
    """Start and stop of parts of about the same size, at most `most`: a product of a few rows left over is slow, and on
    a CPU less exact."""
    parts = -(-count // most)
    return ((i * count // parts, (i + 1) * count // parts) for i in range(parts))


def chunk_size(head: Tensor) -> int:
    """Tokens whose logits are held at once."""
    return chunk_tokens(head.shape[0], "cpu" if head.device.type == "cpu" else "cuda")


def chunk_tokens(vocab_size: int, kind: str) -> int:
    """The same for a vocabulary on "cpu" or "cuda"."""
    return min(CHUNK_MOST, max(CHUNK_FLOOR[kind], CHUNK_ELEMENTS[kind] // vocab_size))
