"""The chunked engine against plain autograd over full logits."""

from dataclasses import dataclass

import pytest
import torch

from heatbath.ideas.engine import dense_loss, label_logps, linear_loss, linear_loss_with_sums
from heatbath.ideas.gift import Gift
from heatbath.ideas.objectives import Sft
from heatbath.ideas.statistics import TokenStats

N, V, D, D_BASE = 37, 53, 16, 12


@dataclass(frozen=True)
class Everything:
    """Nonlinear in every differentiable statistic, and reads every constant and a column."""

    needs = ("logp", "entropy", "mean_logp", "ref_ce", "rev_ce", "ref_logp", "ref_entropy")

    def __call__(self, s: TokenStats) -> torch.Tensor:
        ratio = (s.logp - s.old_logp).exp()
        return -ratio + s.entropy**2 - s.mean_logp * s.ref_ce + s.rev_ce * s.ref_entropy + s.ref_logp * s.logp


OBJECTIVES = [Sft(), Gift(4.0), Gift(4.0, smoothing=0.05), Everything()]


class Problem:
    def __init__(self, dtype: torch.dtype = torch.float64):
        g = torch.Generator().manual_seed(3)
        self.hidden = torch.randn(N, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        self.head = torch.randn(V, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        self.ref_hidden = torch.randn(N, D_BASE, generator=g, dtype=torch.float64).to(dtype)
        self.ref_head = torch.randn(V, D_BASE, generator=g, dtype=torch.float64).to(dtype)
        self.labels = torch.randint(V, (N,), generator=g)
        self.labels[::5] = -100
        self.columns = {"old_logp": -3 * torch.rand(N, generator=g, dtype=torch.float64).to(dtype)}

    def fused(self, objective, **kwargs):
        return linear_loss(
            objective,
            self.hidden,
            self.head,
            self.labels,
            ref_hidden=self.ref_hidden,
            ref_head=self.ref_head,
            columns=self.columns,
            **kwargs,
        )

    def dense(self, objective):
        return dense_loss(
            objective,
            self.hidden @ self.head.T,
            self.labels,
            ref_logits=self.ref_hidden @ self.ref_head.T,
            columns=self.columns,
        )

    def gradients(self, loss):
        return torch.autograd.grad(loss, [self.hidden, self.head])


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_fused_equals_dense(objective, chunk: int) -> None:
    problem = Problem()
    loss, truth = problem.fused(objective, chunk=chunk), problem.dense(objective).sum()
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=0)
    for found, expected in zip(problem.gradients(2.5 * loss), problem.gradients(2.5 * truth), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_float32_is_close_to_float64(objective) -> None:
    exact, rounded = Problem(), Problem(torch.float32)
    loss, truth = rounded.fused(objective), exact.dense(objective).sum()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    for found, expected in zip(rounded.gradients(loss), exact.gradients(truth), strict=True):
        assert (found.double() - expected).norm() / expected.norm() < 1e-5


def test_bf16_products_stay_close_and_log_probabilities_negative() -> None:
    exact, mixed = Problem(), Problem(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mixed.fused(Gift(4.0))
        logp = label_logps(mixed.hidden, 40 * mixed.head, mixed.labels)
    assert (logp <= 0).all()
    truth = exact.dense(Gift(4.0)).sum()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-2)
    for found, expected in zip(mixed.gradients(loss), exact.gradients(truth), strict=True):
        # bf16 keeps 8 bits: rounding each operand of the two products costs up to 2^-8 relative, in norm about 1e-2
        assert (found.double() - expected).norm() / expected.norm() < 2e-2


def test_frozen_parts_get_no_gradient() -> None:
    problem = Problem()
    (expected,) = torch.autograd.grad(problem.dense(Gift(4.0)).sum(), [problem.hidden])
    problem.head.requires_grad_(False)
    (found,) = torch.autograd.grad(problem.fused(Gift(4.0)), [problem.hidden])
    torch.testing.assert_close(found, expected)


def test_ignored_rows_are_exactly_zero_and_all_ignored_is_a_zero_with_gradient() -> None:
    problem = Problem()
    assert (problem.dense(Sft())[::5] == 0).all()
    problem.labels[:] = -100
    loss = problem.fused(Gift(4.0))
    assert loss.item() == 0
    assert all((g == 0).all() for g in problem.gradients(loss))


def test_second_derivatives_are_refused() -> None:
    problem = Problem()
    (first,) = torch.autograd.grad(problem.fused(Sft()) ** 2, [problem.hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_sums_are_the_token_sums() -> None:
    problem = Problem()
    target = Gift(4.0)
    out = linear_loss_with_sums(
        target,
        problem.hidden,
        problem.head,
        problem.labels,
        ref_hidden=problem.ref_hidden,
        ref_head=problem.ref_head,
        chunk=8,
    )
    valid = problem.labels != -100
    logp = (problem.hidden @ problem.head.T).log_softmax(-1)[valid]
    ref = (problem.ref_hidden @ problem.ref_head.T).log_softmax(-1)[valid]
    ref_logp = ref.gather(-1, problem.labels[valid, None]).squeeze(-1)
    base = TokenStats(vocab_size=V, ref_logp=ref_logp)
    assert out.tokens == valid.sum()
    expected = {
        "objective": problem.dense(target).sum(),
        "nll": problem.dense(Sft()).sum(),
        "entropy": -(logp.exp() * logp).sum(),
        "surprise": -ref_logp.sum(),
        "keep": target.keep(base).sum(),
        "w": target.target_mass(base).sum(),
        "left_to_base": (target.target_mass(base) < 0.5).sum().double(),
    }
    assert set(out.sums) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(out.sums[name], value.detach())


def test_objectives_that_cannot_work_are_refused() -> None:
    problem = Problem()
    with pytest.raises(ValueError, match="reads the base model"):
        linear_loss(Gift(1.0), problem.hidden, problem.head, problem.labels)

    class Reduces:
        needs = ("logp",)

        def __call__(self, stats):
            return -stats.logp.mean()

    with pytest.raises(ValueError, match="never reduces"):
        problem.fused(Reduces())
