"""How far one model is from another at the same tokens: hidden states, distributions, likeliest tokens.

Source: arXiv 2601.09233, Table 4 and Figure 2, which leave much of it open (docs/shift.md).

Two models read the same sequences, `a` the earlier one, `b` the later. Logits are made a few rows at a time, so that no
[N, V] exists: `SCRATCH` bounds what is held beside the inputs. Everything after the bodies is float32 (float64 for
float64 states), whatever the dtype of the states and the heads.

N tokens, V vocabulary, d hidden width, C rows of one chunk, K of a top-K, S sequences, P problems.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from heatbath.ideas.intervals import Floats
from heatbath.ideas.passes import accumulate_dtype, even_parts

# Elements of one [C, V] buffer, by device, unless a single row is longer: 27 rows of 152,000 on a CPU. The buffers of a
# pass are 7·4 bytes times that (112 MiB on a CPU, 896 MiB on a GPU) in float32; beside them stand copies of the [N, d]
# states, and of a 16-bit head a block as large as one buffer.
SCRATCH = {"cpu": 2**22, "cuda": 2**25}
TOPK = (1, 2, 5, 10, 20, 50, 100)
POOLS = ("pooled", "last", "flat")
TOP_SHARE = 0.01
TINY = 1e-30


@dataclass(frozen=True)
class View:
    """One model at N tokens: `after` [N, d] is what its head [V, d] reads to predict them, `before` [N, d] the last
    block's output before the final norm. Its logits are softcap·tanh(scale·after·headᵀ / softcap)."""

    after: Tensor
    head: Tensor
    before: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@torch.no_grad()
def token_shift(
    a: View,
    b: View,
    tokens: Tensor,
    *,
    temperature: float = 1.0,
    topk: Sequence[int] = TOPK,
    vocab_size: int | None = None,
) -> dict[str, Tensor]:
    """Of each token the columns below, [N] each; `tokens` [N] are the ids that the states predict.

    cosine_before, l2_before    between the states before the final norm, where both views hold them
    cosine_after, l2_after      between the states after it
    kl_from_to, kl_to_from      KL(p_a ‖ p_b) and KL(p_b ‖ p_a), nats, over the whole vocabulary
    entropy_from, entropy_to    H(p_a), H(p_b), nats
    logp_from, logp_to          log p_a(token), log p_b(token)
    overlap@K                   |TopK(p_a) ∩ TopK(p_b)| / K
    jaccard@K                   |TopK(p_a) ∩ TopK(p_b)| / |TopK(p_a) ∪ TopK(p_b)|

    p is the softmax of the logits divided by `temperature`, over the first `vocab_size` rows of the heads (all of them;
    less leaves out a padded vocabulary). Tokens are ranked by their float32 logits, of equal ones the lower id first. A
    KL that rounding makes negative is 0. Raises ValueError where shapes, K or temperature do not fit.
    """
    V = _vocabulary(a, b, tokens, vocab_size)
    if not temperature > 0:
        raise ValueError(f"the temperature must be above 0, not {temperature}")
    if any(not 1 <= k <= V for k in topk):
        raise ValueError(f"K of a top-K lies between 1 and {V:,}, the tokens in the vocabulary; given {list(topk)}")
    out = {f"{name}_after": x for name, x in between(a.after, b.after).items()}
    if a.before is not None and b.before is not None:
        out |= {f"{name}_before": x for name, x in between(a.before, b.before).items()}
    rows = max(1, SCRATCH["cpu" if a.after.device.type == "cpu" else "cuda"] // V)
    scratch = _Scratch(min(rows, len(tokens)), V, a.after)
    parts = [
        _distributions((a, b), slice(start, stop), tokens, (temperature, tuple(topk)), scratch)
        for start, stop in even_parts(len(tokens), rows)
    ]
    for name in _distribution_names(topk):
        out[name] = torch.cat([part[name] for part in parts]) if parts else a.after.new_zeros(0, dtype=torch.float32)
    return out


def between(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """`cosine` and `l2` = ‖x − y‖₂ of each row of two [N, d], [N] each. The cosine to a vector of zeros is 0."""
    wide = accumulate_dtype(x.dtype)
    x, y = x.to(wide), y.to(wide)
    norms = x.norm(dim=-1) * y.norm(dim=-1)
    return {"cosine": (torch.linalg.vecdot(x, y) / norms.clamp_min(TINY)).clamp(-1, 1), "l2": (x - y).norm(dim=-1)}


def sequence_geometry(x: Tensor, y: Tensor, counts: Sequence[int]) -> dict[str, Tensor]:
    """Cosine and L2 of whole sequences in place of tokens, [S] each: of the mean state (`pooled`), of the last token's
    (`last`), and of all states of a sequence as one long vector (`flat`).

    x and y are [N, d], the states of S sequences one after the other; `counts` are their tokens, each at least 1.
    """
    sizes = torch.tensor(counts, device=x.device)
    wide = accumulate_dtype(x.dtype)
    x, y = x.to(wide), y.to(wide)

    def summed(rows: Tensor) -> Tensor:  # [N, …] → [S, …]
        total = rows.new_zeros((len(sizes), *rows.shape[1:]))
        return total.index_add_(0, torch.arange(len(sizes), device=x.device).repeat_interleave(sizes), rows)

    last = sizes.cumsum(0) - 1
    shapes = {
        "pooled": between(summed(x) / sizes[:, None], summed(y) / sizes[:, None]),
        "last": between(x[last], y[last]),
    }
    inner, xx, yy, apart = (
        summed(torch.linalg.vecdot(p, q).double()) for p, q in ((x, y), (x, x), (y, y), (x - y, x - y))
    )
    shapes["flat"] = {"cosine": (inner / (xx * yy).sqrt().clamp_min(TINY)).clamp(-1, 1), "l2": apart.sqrt()}
    return {f"{pool}_{name}": value for pool, found in shapes.items() for name, value in found.items()}


def by_problem(values: ArrayLike, weights: ArrayLike, problems: Sequence[str]) -> dict[str, float]:
    """Problem → a value, such that the values' mean is the weighted mean of all sequences, and their scatter that of
    this mean when problems are drawn anew; so t intervals and paired differences over problems are those of the mean.

    `values` [S] are means of sequences, `weights` [S] their tokens (a mean over tokens) or ones (over sequences). With
    R the weighted mean it is R + P·Σ_{s of the problem} w_s·(x_s − R) / Σ w, the linearised ratio estimator (Cochran,
    Sampling Techniques, 6.3); of one sequence per problem and equal weights it is x itself.
    """
    x, w = np.asarray(values, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    mean = float(x @ w / w.sum())
    names = list(dict.fromkeys(problems))
    place = {name: i for i, name in enumerate(names)}
    pulls = np.zeros(len(names))
    np.add.at(pulls, [place[p] for p in problems], w * (x - mean))
    return dict(zip(names, (mean + len(names) / w.sum() * pulls).tolist(), strict=True))


def top_share(values: Floats, share: float = TOP_SHARE) -> float:
    """How much of the sum of non-negative values the largest `share` of them carry (one of them at least)."""
    x = np.sort(np.asarray(values, dtype=np.float64))[::-1]
    total = float(x.sum())
    return float(x[: max(1, round(share * len(x)))].sum()) / total if total > 0 else 0.0


class _Scratch:
    """What a chunk of rows is computed in, kept from chunk to chunk: a new [C, V] costs more than what is done in it.

    Five buffers in the dtype of the logits and one of int64, [C, V] each: 7·4·C·V bytes in float32.
    """

    def __init__(self, rows: int, vocab_size: int, like: Tensor):
        def buffer(dtype: torch.dtype) -> Tensor:
            return torch.empty(rows, vocab_size, dtype=dtype, device=like.device)

        wide = accumulate_dtype(like.dtype)
        self.logps = [buffer(wide), buffer(wide)]
        self.e, self.apart, self.product, self.key = buffer(wide), buffer(wide), buffer(wide), buffer(torch.int64)
        # For the ranking, which is over before the other two are written.
        low, turned = (self.e, self.product) if wide == torch.float32 else (buffer(torch.float32) for _ in range(2))
        self.low, self.turned = low, turned.view(torch.int32)
        self.ids = torch.arange(vocab_size - 1, -1, -1, device=like.device)

    def dot(self, x: Tensor, y: Tensor) -> Tensor:
        """Σ_v x·y of each row, [C]."""
        return torch.mul(x, y, out=self.product[: len(x)]).sum(-1)


def _distributions(
    views: tuple[View, View], rows: slice, tokens: Tensor, how: tuple[float, tuple[int, ...]], scratch: _Scratch
) -> dict[str, Tensor]:
    """Everything of a chunk of rows that is read off the logits, [C] each."""
    temperature, topk = how
    C, ranked = rows.stop - rows.start, []
    for view, buffer in zip(views, scratch.logps, strict=True):
        z = _logits(view, rows, buffer[:C])
        if topk:  # before the cap, which in float32 makes large logits equal
            ranked.append(_likeliest(z, max(topk), scratch))
        if view.softcap is not None:
            z.div_(view.softcap).tanh_().mul_(view.softcap)
        z.div_(temperature).sub_(z.amax(-1, keepdim=True))
        z.sub_(torch.exp(z, out=scratch.e[:C]).sum(-1, keepdim=True).log_())
    p, q = (buffer[:C] for buffer in scratch.logps)
    apart, ids = torch.sub(p, q, out=scratch.apart[:C]), tokens[rows, None]
    out = {"logp_from": p.gather(-1, ids).squeeze(-1), "logp_to": q.gather(-1, ids).squeeze(-1)}
    e = torch.exp(p, out=scratch.e[:C])
    out["entropy_from"], out["kl_from_to"] = -scratch.dot(e, p), scratch.dot(e, apart)
    e = torch.exp(q, out=e)
    out["entropy_to"], out["kl_to_from"] = -scratch.dot(e, q), -scratch.dot(e, apart)
    for name in ("kl_from_to", "kl_to_from"):
        out[name].clamp_min_(0.0)
    if topk:
        worse = _worse_rank(*ranked)
        for k in topk:
            common = (worse < k).sum(-1).to(p.dtype)
            out[f"overlap@{k}"], out[f"jaccard@{k}"] = common / k, common / (2 * k - common)
    return out


def _distribution_names(topk: Sequence[int]) -> list[str]:
    pairs = ("kl_from_to", "kl_to_from", "entropy_from", "entropy_to", "logp_from", "logp_to")
    return [*pairs, *(f"overlap@{k}" for k in topk), *(f"jaccard@{k}" for k in topk)]


def _logits(view: View, rows: slice, out: Tensor) -> Tensor:
    """Writes [C, V] into `out`, not capped yet; a 16-bit head is widened a block of it at a time."""
    hidden, head = view.after[rows].to(out.dtype), view.head[: out.shape[-1]]
    if head.dtype == out.dtype:
        torch.mm(hidden, head.T, out=out)
    else:
        block = max(1, SCRATCH["cpu"] // head.shape[1])
        for start in range(0, len(head), block):
            out[:, start : start + block] = hidden @ head[start : start + block].to(out.dtype).T
    return out if view.scale == 1.0 else out.mul_(view.scale)


def _likeliest(z: Tensor, k: int, scratch: _Scratch) -> Tensor:
    """Ids of the k largest of each row, best first and equal ones by id, [C, k].

    `topk` leaves the order of equal values open. The bits of a float, read as an integer and turned round below 0, are
    ordered as the float is; with V − 1 − id in the lower half of 64 bits no two of a row are equal.
    """
    C, V = z.shape
    bits = scratch.low[:C].copy_(z).add_(0.0).view(torch.int32)  # + 0.0: of −0 it makes 0
    turned = torch.bitwise_right_shift(bits, 31, out=scratch.turned[:C]).bitwise_and_(0x7FFFFFFF)
    key = scratch.key[:C].copy_(bits.bitwise_xor_(turned)).bitwise_left_shift_(32).bitwise_or_(scratch.ids)
    best: Tensor = key.topk(k, -1).values
    return V - 1 - (best & 0xFFFFFFFF)


def _worse_rank(ids: Tensor, others: Tensor) -> Tensor:
    """Of each id of the first list [C, K], the worse of its two ranks (from 0), or K where the second list lacks it: it
    is common to both top-k for exactly the k above that rank."""
    K = ids.shape[-1]
    inside, order = others.sort(-1)
    at = torch.searchsorted(inside, ids).clamp_(max=K - 1)
    ranks = torch.maximum(order.gather(-1, at), torch.arange(K, device=ids.device))
    return ranks.masked_fill_(inside.gather(-1, at) != ids, K)


def _vocabulary(a: View, b: View, tokens: Tensor, vocab_size: int | None) -> int:
    """The number of tokens compared. Raises ValueError where the two views do not fit."""
    for name, view in (("a", a), ("b", b)):
        for kind, states in (("after", view.after), ("before", view.before)):
            if states is not None and states.shape != (len(tokens), view.head.shape[1]):
                raise ValueError(
                    f"{kind} of {name} {tuple(states.shape)} does not fit [N, d] of {len(tokens)} tokens and a head "
                    f"{tuple(view.head.shape)}"
                )
    if a.head.shape[1] != b.head.shape[1]:
        raise ValueError(f"hidden states of width {a.head.shape[1]:,} and {b.head.shape[1]:,} cannot be compared")
    fewest = min(a.head.shape[0], b.head.shape[0])
    if vocab_size is None and a.head.shape[0] != b.head.shape[0]:
        raise ValueError(
            f"vocabularies of {a.head.shape[0]:,} and {b.head.shape[0]:,} rows: say with vocab_size which are compared"
        )
    V = fewest if vocab_size is None else vocab_size
    if not 1 <= V <= fewest:
        raise ValueError(f"vocab_size = {V:,} of heads with {fewest:,} rows")
    if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < V:
        raise ValueError(f"tokens must be ids below {V:,}")
    return V
