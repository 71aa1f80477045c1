"""How exact the engine is: float32 and bfloat16 against float64 at a real vocabulary's width, and at any surprise.

The truth is plain autograd in float64 over full logits of the same rounded inputs. Errors are norm-wise: of the summed
loss, of dh and of dW, each relative to the truth's norm.
"""

import functools
import itertools
import math
from collections.abc import Iterator

import problems
import pytest
import torch
import torch.nn.functional as F
from formulas import CASES, Case, case
from problems import IGNORE, Problem
from torch import Tensor

from heatbath.ideas.engine import label_logps
from heatbath.ideas.gift import Gift
from heatbath.ideas.statistics import DIFFERENTIABLE, STATS, Objective

V = 151_936  # Qwen2.5's
# Every objective, both directions of the base, both levels; Gift(12) has its threshold at the surprise of a flat guess.
TWINS = {"kd additive", "kd additive reverse", "gift floor", "gift_sequence memory"}  # same statistics, same products
WIDE = [*(c for c in CASES if c.name not in TWINS), Case("gift 12", Gift(12.0), None)]
FIVE_IN_A_THOUSAND = {"sft", "entropy", "label_smoothing", "kd", "gift", "gift smoothed", "gift 12", "gift_sequence"}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Products of few rows with 151,936 columns are summed otherwise, and worse, by some numbers of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def wide(most: float, dtype: torch.dtype, seed: int = 6) -> Problem:
    """9 supervised tokens of 12 whose logits have standard deviations from 0.2 to `most`."""
    made = problems.random((5, 1, 6), V, (16, 12), torch.linspace(0.2, most, 12), seed).to(dtype)
    return Problem(made.hidden, made.head, made.ref_hidden, made.ref_head, made.labels, made.segments)


@functools.lru_cache(maxsize=1)
def known(kind: str, dtype: torch.dtype) -> tuple[Problem, Problem]:
    """A problem of logits up to 4 ("flat": π(y) ≈ 1/V) or 35 ("peaked": π(y) up to 0.9), and its truth's."""
    made = wide({"flat": 0.7, "peaked": 8.0}[kind], dtype)
    return made, made.to(torch.float64)


def truth(target: Objective, exact: Problem) -> tuple[Tensor, ...]:
    loss = exact.dense(target).sum()
    return (loss, *exact.gradients(loss))


def errors(problem: Problem, loss: Tensor, expected: tuple[Tensor, ...]) -> list[float]:
    """Of loss, dh and dW."""
    found = (loss, *problem.gradients(loss))
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("c", WIDE, ids=lambda c: c.name)
@pytest.mark.parametrize("kind", ["flat", "peaked"])
def test_float32_is_exact_to_1e_5(kind: str, c: Case) -> None:
    """In chunks of 5 and 4 tokens."""
    problem, exact = known(kind, torch.float32)
    target = problem.fitted(c.objective)
    found = errors(problem, problem.fused(target, chunk=5), truth(target, exact))
    assert max(found) < 1e-5, found


@pytest.mark.parametrize("c", WIDE, ids=lambda c: c.name)
@pytest.mark.parametrize("kind", ["flat", "peaked"])
def test_bf16_is_as_exact_as_its_products_allow(kind: str, c: Case) -> None:
    """To 5e-3, or to 1.5 times the error of full logits from a bf16 product with everything after it in float32.

    bf16 holds the logits of a flat distribution; a peaked one's are off by up to 0.06.
    """
    problem, exact = known(kind, torch.bfloat16)
    target = problem.fitted(c.objective)
    expected = truth(target, exact)
    fused = errors(problem, problem.fused(target, chunk=5), expected)
    limits = [5e-3] * 3
    if kind == "peaked" or c.name not in FIVE_IN_A_THOUSAND:
        dense = errors(problem, problem.dense(target, widen=True).sum(), expected)
        limits = [max(5e-3, 1.5 * error) for error in dense]
    assert all(error < limit for error, limit in zip(fused, limits, strict=True)), (fused, limits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_of_a_wide_vocabulary_are_exact(dtype: torch.dtype) -> None:
    """float32: to 2e-6 of 1 + their size, their gradients to 1e-5. bf16: no worse than those of bf16 logits in float32,
    and log π(y) is never above 0."""
    problem, exact = known("peaked", dtype)
    upstream = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, expected = problem.stats(*STATS, chunk=5), exact.stats(*STATS)
    assert (found.logp <= 0).all()
    for name in STATS:
        value, right = getattr(found, name), getattr(expected, name)
        assert value.dtype == torch.float32 and (value[~problem.valid] == 0).all()
        if dtype == torch.float32:
            assert ((value - right).abs() / (1 + right.abs())).max() < 2e-6
            if name in DIFFERENTIABLE:
                ours = torch.autograd.grad((upstream * value).sum(), [problem.hidden, problem.head], retain_graph=True)
                theirs = torch.autograd.grad((upstream * right).sum(), [exact.hidden, exact.head], retain_graph=True)
                assert all((a - b).norm() / b.norm() < 1e-5 for a, b in zip(ours, theirs, strict=True))
    if dtype == torch.bfloat16:
        rounded = (z.float().log_softmax(-1) for z in problem.logits())
        for name, log_p in zip(("logp", "ref_logp"), rounded, strict=True):
            plain = log_p.gather(-1, problem.labels.clamp_min(0)[:, None]).squeeze(-1) * problem.valid
            right = getattr(expected, name)
            assert (getattr(found, name) - right).norm() < 0.9 * (
                plain - right
            ).norm()  # the label's own logit is exact


@pytest.mark.parametrize("name", ["sft", "entropy", "kd reverse", "gift smoothed", "gift_sequence"])
def test_autocast_rounds_the_products_only(name: str) -> None:
    """float32 inputs, bf16 products: two roundings of 2^-9 per operand, in norm about 1e-2; gradients stay float32."""
    exact, mixed = problems.small(), problems.small(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mixed.fused(case(name).objective, chunk=9)
        logp = label_logps(mixed.hidden, 40 * mixed.head, mixed.labels)
    assert (logp <= 0).all() and loss.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in mixed.gradients(loss))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mixed.fused(case(name).objective, chunk=9)
    assert max(errors(mixed, loss, truth(case(name).objective, exact))) < 2e-2


def test_statistics_are_recomputed_as_they_were_computed() -> None:
    """A backward outside of autocast repeats the products of the forward inside it."""
    problem = problems.small(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = problem.gradients(problem.stats("logp", "entropy").entropy.sum())
        value = problem.stats("logp", "entropy").entropy.sum()
    plain = problem.gradients(problem.stats("entropy").entropy.sum())
    outside = problem.gradients(value)
    for a, b, c in zip(inside, outside, plain, strict=True):
        assert torch.equal(a, b) and not torch.equal(b, c)


def test_the_heads_gradient_is_summed_in_float32() -> None:
    """In bf16 one token at a time is no worse than all at once, but for the rounding of each product."""
    g = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(600, 16, generator=g), torch.randn(53, 16, generator=g)
    tokens = torch.arange(600)
    problem = Problem(hidden, head, hidden, head, tokens % 53, tokens // 10).to(torch.bfloat16)
    expected = truth(case("sft").objective, problem.to(torch.float64))
    for chunk in (1, 1000):
        assert errors(problem, problem.fused(case("sft").objective, chunk=chunk), expected)[2] < 4e-3


SURPRISES = (1e-12, 1e-3, 1.0, 10.0, 20.0, 100.0, 1e4)


def extreme(dtype: torch.dtype) -> Problem:
    """log π(y) and log p(y) each of every size from −1e-12 to −1e4 in 49 supervised tokens, 7 ignored between them.

    The heads are identities, so that the hidden states are the logits, exactly, and dh is the gradient in the logits.
    """
    g = torch.Generator().manual_seed(0)
    pairs = torch.tensor([*itertools.product(SURPRISES, SURPRISES), *[(1.0, 1.0)] * 7], dtype=torch.float64)
    pairs = torch.cat([pairs[49:, None], pairs[torch.randperm(49, generator=g)].view(7, 7, 2)], 1).flatten(0, 1)
    y = torch.randint(24, (56,), generator=g)
    rows = []
    for surprise in pairs.T:
        z = torch.randn(56, 24, generator=g, dtype=torch.float64)
        others = z.masked_fill(F.one_hot(y, 24).bool(), -math.inf).logsumexp(-1)
        label = others - surprise - torch.log(-torch.expm1(-surprise))  # logit(e^−s)
        rows.append(z.scatter(-1, y[:, None], label[:, None]))
    eye, segments = torch.eye(24), torch.arange(56) // 8
    y[::8] = IGNORE
    made = Problem(rows[0].to(dtype), eye, rows[1].to(dtype), eye, y, segments).to(dtype)
    made.columns = {name: column.float() for name, column in made.columns.items()}
    return made


def test_the_extremes_are_there() -> None:
    problem = extreme(torch.float64)
    for surprise, size in itertools.product(problem.surprises(), SURPRISES):
        assert ((surprise[problem.valid] / size - 1).abs() < 1e-3).sum() == 7


# These take differences of log-probabilities, which float32 knows to 2^-24 of their size; PEAR sums them up.
DIFFERENCES = {"psft", "pear", "iw_sft token", "kd reverse", "kd additive reverse", "asft reverse"}


@pytest.mark.parametrize("c", CASES, ids=lambda c: c.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_surprise_is_finite_and_exact_token_by_token(dtype: torch.dtype, c: Case) -> None:
    """‖error‖₁ of each token's gradient against its truth's, or 1 where that is smaller; in bf16 it is rounded."""
    problem = extreme(dtype)
    exact = problem.to(torch.float64)
    loss = problem.fused(c.objective, chunk=11)
    (found,) = torch.autograd.grad(loss, [problem.hidden])
    right = exact.dense(c.objective)
    (expected,) = torch.autograd.grad(right.sum(), [exact.hidden])
    assert torch.isfinite(found).all() and torch.isfinite(expected).all()
    assert (found[~problem.valid] == 0).all()
    error = (found.double() - expected).abs().sum(-1) / expected.abs().sum(-1).clamp_min(1.0)
    limit = torch.full_like(error, 2**-8 if dtype == torch.bfloat16 else 1e-5)
    if c.name in DIFFERENCES:
        far = exact.surprises().amax(0) > 1e3
        limit[far if c.name != "pear" else slice(None)] += 2e-3
    assert (error < limit).all(), (error / limit).max()
    assert loss.item() == pytest.approx(right.sum().item(), rel=1e-3 if c.name in DIFFERENCES else 1e-6)
