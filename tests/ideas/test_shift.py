"""The shift between two models against plain loops in float64, its invariances, and what it holds in memory."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from heatbath.ideas import shift
from heatbath.ideas.engine import linear_stats
from heatbath.ideas.intervals import mean_with_interval
from heatbath.ideas.shift import View, between, by_problem, sequence_geometry, token_shift, top_share

N, d, V = 23, 8, 61
KS = (1, 2, 7, 30, 60, V)


def views(dtype: torch.dtype = torch.float32, *, apart: float = 0.7, **transform: Any) -> tuple[View, View, Tensor]:
    """Two models whose states and heads differ, and the tokens they predict."""
    draw = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    head, after, before = normal(V, d), normal(N, d), 9 * normal(N, d)
    a = View(after.to(dtype), head.to(dtype), before.to(dtype), **transform)
    b = View(
        (after + apart * normal(N, d)).to(dtype),
        (head + apart * normal(V, d)).to(dtype),
        (before + apart * normal(N, d)).to(dtype),
        **transform,
    )
    return a, b, torch.randint(V, (N,), generator=draw)


def plain(a: View, b: View, tokens: Tensor, *, temperature: float = 1.0, vocab_size: int = V) -> dict[str, list[float]]:
    """Every column token by token: logits in float64, sets of Python's own sort by (−logit, id)."""
    out: dict[str, list[float]] = {}
    for t in range(len(tokens)):
        logps, orders, row = [], [], {}
        for view in (a, b):
            z = view.head[:vocab_size].double() @ view.after[t].double() * view.scale
            if view.softcap is not None:
                z = view.softcap * torch.tanh(z / view.softcap)
            orders.append(sorted(range(vocab_size), key=lambda v, z=z: (-float(z[v]), v)))
            logps.append((z / temperature).log_softmax(0))
        p, q = logps
        row["kl_from_to"], row["kl_to_from"] = float(p.exp() @ (p - q)), float(q.exp() @ (q - p))
        row["entropy_from"], row["entropy_to"] = -float(p.exp() @ p), -float(q.exp() @ q)
        row["logp_from"], row["logp_to"] = float(p[tokens[t]]), float(q[tokens[t]])
        for k in (k for k in KS if k <= vocab_size):
            one, two = set(orders[0][:k]), set(orders[1][:k])
            row[f"overlap@{k}"], row[f"jaccard@{k}"] = len(one & two) / k, len(one & two) / len(one | two)
        for layer in ("before", "after"):
            x, y = (getattr(view, layer)[t].double() for view in (a, b))
            row[f"cosine_{layer}"] = float(x @ y / math.sqrt(float(x @ x) * float(y @ y)))
            row[f"l2_{layer}"] = math.sqrt(float(((x - y) ** 2).sum()))
        for name, value in row.items():
            out.setdefault(name, []).append(value)
    return out


def assert_same(found: dict[str, Tensor], wanted: dict[str, list[float]], error: float = 1e-5) -> None:
    assert set(found) == set(wanted)
    for name, column in wanted.items():
        assert found[name].shape == (len(column),), name
        torch.testing.assert_close(
            found[name].double(), torch.as_tensor(column).double(), rtol=error, atol=error, msg=name
        )


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize(
    "transform", [{}, {"scale": 0.3}, {"softcap": 4.0}, {"scale": 1.7, "softcap": 2.5}], ids=lambda t: "-".join(t)
)
@pytest.mark.parametrize("rows", [1, 5, 4000])
def test_streamed_equals_plain_loops(
    temperature: float, transform: dict[str, float], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(shift.SCRATCH, "cpu", rows * V)
    a, b, tokens = views(**transform)
    assert_same(
        token_shift(a, b, tokens, temperature=temperature, topk=KS), plain(a, b, tokens, temperature=temperature)
    )


def test_each_model_has_its_own_transform() -> None:
    a, b, tokens = views()
    a, b = dataclasses.replace(a, scale=0.5), dataclasses.replace(b, softcap=3.0)
    assert_same(token_shift(a, b, tokens, topk=KS), plain(a, b, tokens))


@pytest.mark.parametrize("topk", [(1,), (7,), (2, 60)])
def test_lists_shorter_than_the_vocabulary(topk: tuple[int, ...]) -> None:
    a, b, tokens = views()
    wanted = {name: x for name, x in plain(a, b, tokens).items() if int(name.partition("@")[2] or topk[0]) in topk}
    assert_same(token_shift(a, b, tokens, topk=topk), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_and_heads_in_16_bits_are_compared_in_float32(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(shift.SCRATCH, "cpu", 7 * d)  # the head is widened 7 rows at a time
    a, b, tokens = views(dtype)
    found = token_shift(a, b, tokens, topk=KS)
    assert {x.dtype for x in found.values()} == {torch.float32}
    assert_same(found, plain(a, b, tokens))


def test_rows_of_a_padded_vocabulary_can_be_left_out() -> None:
    a, b, tokens = views()
    tokens = tokens % 40
    huge = [dataclasses.replace(v, head=torch.cat([v.head[:40], 50 * v.head[40:]])) for v in (a, b)]
    found = token_shift(*huge, tokens, topk=(1, 7, 40), vocab_size=40)
    wanted = plain(a, b, tokens, vocab_size=40)
    assert_same(
        found,
        {name: x for name, x in wanted.items() if name.partition("@")[2] in ("", "1", "7", "40")}
        | {f"{kind}@40": [1.0] * N for kind in ("overlap", "jaccard")},
    )
    shorter = dataclasses.replace(b, head=b.head[:40])
    assert_same(
        token_shift(a, shorter, tokens, topk=(1,), vocab_size=40), token_shift(a, b, tokens, topk=(1,), vocab_size=40)
    )


def test_a_model_is_no_distance_from_itself() -> None:
    a, _, tokens = views()
    found = token_shift(a, a, tokens, topk=KS)
    for layer in ("before", "after"):
        torch.testing.assert_close(found[f"cosine_{layer}"], torch.ones(N))
        assert (found[f"l2_{layer}"] == 0).all()
    assert (found["kl_from_to"] == 0).all() and (found["kl_to_from"] == 0).all()
    assert torch.equal(found["entropy_from"], found["entropy_to"]) and torch.equal(found["logp_from"], found["logp_to"])
    assert all((found[f"{kind}@{k}"] == 1).all() for kind in ("overlap", "jaccard") for k in KS)


@pytest.mark.parametrize("apart", [1e-7, 1e-5, 1e-3, 3.0])
def test_kl_is_not_negative_and_the_whole_vocabulary_overlaps(apart: float) -> None:
    a, b, tokens = views(apart=apart)
    found = token_shift(a, b, tokens, topk=(V,))
    assert (found["kl_from_to"] >= 0).all() and (found["kl_to_from"] >= 0).all()
    assert (found[f"overlap@{V}"] == 1).all() and (found[f"jaccard@{V}"] == 1).all()


def test_the_other_way_round_swaps_from_and_to() -> None:
    a, b, tokens = views()
    there, back = token_shift(a, b, tokens, topk=KS), token_shift(b, a, tokens, topk=KS)
    for name, column in there.items():
        kind, _, rest = name.partition("_")
        mirrored = {"from": "to", "to": "from", "from_to": "to_from", "to_from": "from_to"}.get(rest, rest)
        torch.testing.assert_close(column, back[f"{kind}_{mirrored}" if rest else name])


def test_scaling_the_states_leaves_cosine_and_scales_l2() -> None:
    a, b, tokens = views()
    one = token_shift(a, b, tokens, topk=KS)
    larger = [dataclasses.replace(v, before=300 * v.before, scale=1 / 300, after=300 * v.after) for v in (a, b)]
    two = token_shift(*larger, tokens, topk=KS)
    for layer in ("before", "after"):
        torch.testing.assert_close(one[f"cosine_{layer}"], two[f"cosine_{layer}"])
        torch.testing.assert_close(300 * one[f"l2_{layer}"], two[f"l2_{layer}"])
    torch.testing.assert_close(one["kl_from_to"], two["kl_from_to"], rtol=1e-4, atol=1e-6)
    only_a = token_shift(dataclasses.replace(a, before=5 * a.before), b, tokens, topk=KS)
    torch.testing.assert_close(only_a["cosine_before"], one["cosine_before"])
    assert (only_a["l2_before"] != one["l2_before"]).all()


def test_order_of_the_tokens_does_not_matter() -> None:
    a, b, tokens = views()
    turned = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    there = [View(v.after[turned], v.head, v.before[turned]) for v in (a, b)]
    one, two = token_shift(a, b, tokens, topk=KS), token_shift(*there, tokens[turned], topk=KS)
    for name, column in one.items():
        torch.testing.assert_close(column[turned], two[name])


def test_the_engine_finds_the_same_divergence() -> None:
    a, b, tokens = views(torch.float64, softcap=5.0)
    found = token_shift(a, b, tokens, topk=KS)
    need = ("logp", "entropy", "ref_ce", "rev_ce", "ref_logp", "ref_entropy")
    stats = linear_stats(b.after, b.head, tokens, need=need, ref_hidden=a.after, ref_head=a.head, softcap=5.0)
    torch.testing.assert_close(found["kl_from_to"], stats.ref_ce - stats.ref_entropy)
    torch.testing.assert_close(found["kl_to_from"], stats.rev_ce - stats.entropy)
    torch.testing.assert_close(found["entropy_from"], stats.ref_entropy)
    torch.testing.assert_close(found["entropy_to"], stats.entropy)
    torch.testing.assert_close(found["logp_from"], stats.ref_logp)
    torch.testing.assert_close(found["logp_to"], stats.logp)


def test_a_temperature_is_a_smaller_scale_and_cap() -> None:
    a, b, tokens = views(scale=0.8, softcap=3.0)
    warm = [dataclasses.replace(v, scale=0.8 / 1.6, softcap=3.0 / 1.6) for v in (a, b)]
    one, two = token_shift(a, b, tokens, temperature=1.6, topk=KS), token_shift(*warm, tokens, topk=KS)
    for name in one:
        torch.testing.assert_close(one[name], two[name])


def test_ties_go_to_the_lower_id() -> None:
    """Logits of a few whole numbers, −0 and 0 among them: nearly every place is shared by many tokens."""
    draw = torch.Generator().manual_seed(2)
    z = torch.randint(-2, 3, (2, N, V), generator=draw).float()
    z[:, :, ::2] = torch.where(z[:, :, ::2] == 0, -0.0, z[:, :, ::2])
    scratch = shift._Scratch(N, V, z)
    for logits in z:
        for k in (1, 2, 20, V):
            wanted = [sorted(range(V), key=lambda v, row=row: (-row[v], v))[:k] for row in logits.tolist()]
            assert shift._likeliest(logits, k, scratch).tolist() == wanted
    a, b = (View(torch.eye(N), logits.T.contiguous()) for logits in z)
    tokens = torch.zeros(N, dtype=torch.long)
    assert_same(token_shift(a, b, tokens, topk=KS), plain_geometry_free(a, b, tokens))


def plain_geometry_free(a: View, b: View, tokens: Tensor) -> dict[str, list[float]]:
    """Of views that hold no states before the norm."""
    zeros = torch.ones(len(tokens), 1)
    padded = [dataclasses.replace(v, before=zeros) for v in (a, b)]
    return {name: x for name, x in plain(*padded, tokens).items() if not name.endswith("_before")}


def test_jaccard_follows_from_the_overlap() -> None:
    a, b, tokens = views()
    found = token_shift(a, b, tokens, topk=KS)
    for k in KS:
        o = found[f"overlap@{k}"]
        torch.testing.assert_close(found[f"jaccard@{k}"], o / (2 - o))


def test_no_tokens_give_empty_columns() -> None:
    a, b, _ = views()
    none = [View(v.after[:0], v.head, v.before[:0]) for v in (a, b)]
    found = token_shift(*none, torch.zeros(0, dtype=torch.long), topk=KS)
    assert set(found) >= {"cosine_before", "kl_from_to", "overlap@1"} and all(x.shape == (0,) for x in found.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"topk": (0,)}, "between 1 and 61"),
        ({"topk": (1, V + 1)}, "between 1 and 61"),
        ({"temperature": 0.0}, "above 0"),
        ({"temperature": math.nan}, "above 0"),
        ({"vocab_size": V + 1}, "61 rows"),
        ({"vocab_size": 3}, "ids below 3"),
        ({"a": {"after": torch.zeros(N, d + 1)}}, "after of a"),
        ({"b": {"before": torch.zeros(N - 1, d)}}, "before of b"),
        ({"b": {"head": torch.zeros(V - 1, d)}}, "vocab_size"),
        ({"b": {"head": torch.zeros(V, 4), "after": torch.zeros(N, 4), "before": None}}, "width 8 and 4"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], said: str) -> None:
    a, b, tokens = views()
    a, b = (dataclasses.replace(v, **change.pop(name, {})) for v, name in ((a, "a"), (b, "b")))
    with pytest.raises(ValueError, match=said):
        token_shift(a, b, tokens, **change)


class Made(TorchDispatchMode):
    """Remembers the largest tensor that any operation made, and what all of those that are larger than a row came to;
    `given` are the inputs, of which views do not count."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in given}
        self.largest, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.known:
                held = x.untyped_storage().nbytes()
                self.largest = max(self.largest, held // x.element_size())
                if held > 2**23:
                    self.known.add(x.untyped_storage().data_ptr())
                    self.bytes += held
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_vocabulary_is_never_held_for_all_tokens(dtype: torch.dtype) -> None:
    tokens, large = 90, 152_000
    draw = torch.Generator().manual_seed(0)
    heads = [torch.randn(large, 64, generator=draw).to(dtype) for _ in range(2)]
    states = [torch.randn(tokens, 64, generator=draw).to(dtype) for _ in range(2)]
    given = [View(h, w, h) for h, w in zip(states, heads, strict=True)]
    with Made(*heads, *states) as seen:
        found = token_shift(*given, torch.arange(tokens), topk=(1, 100))
    assert seen.largest <= shift.SCRATCH["cpu"] < tokens * large / 3
    assert seen.largest > shift.SCRATCH["cpu"] / 2  # and the rows there is room for are taken at once
    if dtype == torch.float32:  # of a 16-bit head, blocks are made anew
        assert seen.bytes <= 7 * 4 * shift.SCRATCH["cpu"]  # everything larger than 8 MiB, made in all four chunks
    assert found["overlap@100"].shape == (tokens,)


def test_geometry_of_sequences_equals_plain_loops() -> None:
    draw = torch.Generator().manual_seed(3)
    counts = [1, 4, 2, 7]
    x, y = (torch.randn(sum(counts), d, generator=draw, dtype=torch.float64) for _ in range(2))
    found = sequence_geometry(x, y, counts)
    starts = np.cumsum([0, *counts])
    for s, count in enumerate(counts):
        one, two = x[starts[s] : starts[s] + count].numpy(), y[starts[s] : starts[s] + count].numpy()
        shapes = {"pooled": (one.mean(0), two.mean(0)), "last": (one[-1], two[-1]), "flat": (one.ravel(), two.ravel())}
        for pool, (p, q) in shapes.items():
            assert float(found[f"{pool}_cosine"][s]) == pytest.approx(p @ q / np.linalg.norm(p) / np.linalg.norm(q))
            assert float(found[f"{pool}_l2"][s]) == pytest.approx(np.linalg.norm(p - q))
    assert {len({round(float(found[f"{pool}_{m}"][0]), 12) for pool in shift.POOLS}) for m in ("cosine", "l2")} == {1}


def test_geometry_in_16_bits_and_of_zeros() -> None:
    x = torch.randn(6, d, generator=torch.Generator().manual_seed(0)).bfloat16()
    y = (x.float() * 1.5).bfloat16()
    found = between(x, y)
    torch.testing.assert_close(found["l2"], (x.float() - y.float()).norm(dim=-1))
    assert found["cosine"].dtype == torch.float32 and (found["cosine"] <= 1).all()
    same = sequence_geometry(x, x, [2, 4])
    for pool in shift.POOLS:
        torch.testing.assert_close(same[f"{pool}_cosine"].float(), torch.ones(2))
        assert (same[f"{pool}_l2"] == 0).all()
    assert float(between(torch.zeros(1, d), torch.ones(1, d))["cosine"]) == 0


def test_values_of_problems_have_the_weighted_mean() -> None:
    draw = np.random.default_rng(0)
    x, w = draw.normal(3, 1, 12), draw.integers(1, 50, 12)
    problems = [f"p{i % 5}" for i in range(12)]
    values = by_problem(x, w, problems)
    assert list(values) == ["p0", "p1", "p2", "p3", "p4"]
    assert np.mean(list(values.values())) == pytest.approx(np.average(x, weights=w))
    assert by_problem(x, [1] * 12, [str(i) for i in range(12)]) == pytest.approx(
        dict(zip(map(str, range(12)), x, strict=True))
    )
    assert by_problem(x, 7 * w, problems) == pytest.approx(values)
    # a problem's two sequences are worth one with their tokens together
    merged = by_problem(
        [np.average(x[[0, 5, 10]], weights=w[[0, 5, 10]]), *x[1:5], *x[6:10], x[11]],
        [w[[0, 5, 10]].sum(), *w[1:5], *w[6:10], w[11]],
        ["p0", *problems[1:5], *problems[6:10], "p1"],
    )
    assert merged == pytest.approx(values)


def test_the_interval_of_a_mean_over_tokens_is_that_of_resampled_problems() -> None:
    """Long sequences differ from short ones, and those of a problem are alike: neither a mean over sequences nor tokens
    taken as independent would scatter like this."""
    draw = np.random.default_rng(1)
    P = 300
    problems = np.repeat(np.arange(P), draw.integers(1, 4, P))
    w = draw.integers(5, 200, len(problems))
    x = 0.01 * w + draw.normal(0, 1, P)[problems] + draw.normal(0, 0.3, len(problems))
    found = mean_with_interval(list(by_problem(x, w, [str(p) for p in problems]).values()))
    sums = np.array([[(w * x)[problems == p].sum(), w[problems == p].sum()] for p in range(P)])
    drawn = sums[draw.integers(P, size=(20_000, P))].sum(1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    assert found.mean == pytest.approx(np.average(x, weights=w))
    assert found.high - found.low == pytest.approx(high - low, rel=0.05)
    assert found.low == pytest.approx(low, abs=0.1 * (high - low))


def test_share_of_the_largest() -> None:
    assert top_share(np.array([1.0] * 99 + [99.0])) == pytest.approx(0.5)
    assert top_share(np.arange(1.0, 5.0)) == pytest.approx(0.4)  # one at least
    assert top_share(np.ones(1000)) == pytest.approx(0.01)
    assert top_share(np.zeros(3)) == 0.0
