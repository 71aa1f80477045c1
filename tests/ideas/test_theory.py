"""What the first paper proves about its start (arXiv 2601.09233, section 3), on a task whose answers are all listed."""

import itertools
import math
import random

import pytest
import torch
from enumerable import (
    Answer,
    climbed,
    conditionals,
    descended,
    distance,
    gibbs,
    joined,
    learned,
    marginals,
    maximised,
    paths,
    random_base,
    reward,
    sequence_mass,
    soft_advantage,
    token_mass,
)
from torch import Tensor

from heatbath.ideas.gift import Gift, GiftSequence

V, T = 4, 4
BETA, STRENGTH = 4.0, 3.0


def task(seed: int, valid: int) -> tuple[Tensor, Tensor, list[Answer]]:
    """A base, the reward 1[one of the valid answers], and those."""
    base = random_base(V, T, 1.5, torch.Generator().manual_seed(seed))
    answers = list(itertools.product(range(V), repeat=T))
    right = random.Random(seed).sample(answers, valid)
    return base, reward(right, base), right


TASKS = [(0, 1), (1, 4), (2, 16)]


@pytest.mark.parametrize(("seed", "valid"), TASKS)
def test_the_exact_start_then_rl_is_one_gibbs_distribution(seed: int, valid: int) -> None:
    """Not by the formula: next-token logits are optimised until E[R] − KL/λ rises no more."""
    base, r, _ = task(seed, valid)
    whole = (base + (BETA + STRENGTH) * r).flatten().log_softmax(0).view_as(base)
    reached = maximised(gibbs(base, r, BETA), r, STRENGTH)
    assert (reached.exp() - whole.exp()).abs().max() < 1e-6
    assert (maximised(base, r, BETA).exp() - gibbs(base, r, BETA).exp()).abs().max() < 1e-6


@pytest.mark.parametrize(("seed", "valid"), TASKS)
def test_sft_then_rl_is_not(seed: int, valid: int) -> None:
    """RL of the same strength cannot give back what SFT has taken: what it reaches is SFT's own Gibbs distribution."""
    base, r, right = task(seed, valid)
    whole = gibbs(base, r, BETA + STRENGTH)
    for demos in (right[:1], right):
        start = descended(base, demos, nll=0.01)
        reached = maximised(start, r, STRENGTH)
        assert (reached.exp() - gibbs(start, r, STRENGTH).exp()).abs().max() < 1e-6
        assert distance(whole, reached) > 0.02
        assert (reached.exp() - whole.exp()).abs().max() > 1e-3


@pytest.mark.parametrize(("seed", "valid"), TASKS)
def test_the_start_is_the_base_lifted_by_the_soft_advantage(seed: int, valid: int) -> None:
    base, r, _ = task(seed, valid)
    lifted = conditionals(gibbs(base, r, BETA))
    for own, before, advantage in zip(lifted, conditionals(base), soft_advantage(base, r, BETA), strict=True):
        torch.testing.assert_close(own, before + advantage, rtol=0, atol=1e-12)


def test_one_valid_answer_is_gift_sequence_and_not_gift() -> None:
    """Its best constant β leaves a gap; with the mass that the reward implies gift_sequence leaves none."""
    base, r, right = task(0, 1)
    exact = gibbs(base, r, BETA)
    odds = math.expm1(BETA) * float(base[right[0]].exp())  # m / (1 − m)
    sequence = learned(base, right, sequence_mass(GiftSequence(odds / (1 + odds))))
    torch.testing.assert_close(sequence, exact, rtol=0, atol=1e-10)
    constant = min(distance(exact, learned(base, right, token_mass(Gift(b / 4)))) for b in range(40))
    assert constant > 0.05


def test_what_is_learned_is_where_the_loss_is_least() -> None:
    """Of GIFT on several demonstrations with a common beginning: at these conditionals no logit has a gradient."""
    base, _, _ = task(3, 1)
    demos = [(0, 1, 2, 3), (0, 1, 3, 3), (2, 0, 0, 1)]
    logits = [c.clone().requires_grad_() for c in conditionals(learned(base, demos, token_mass(Gift(2.0))))]
    loss = torch.zeros(())
    for y in demos:
        for z, c in zip(logits, conditionals(base), strict=True):
            t = z.dim() - 1
            lifted = c[y[:t]].clone()
            lifted[y[t]] += 2.0
            loss = loss - (lifted.softmax(-1) * z[y[:t]].log_softmax(-1)).sum()
    for gradient in torch.autograd.grad(loss, logits):
        assert gradient.abs().max() < 1e-12


def test_policy_gradient_climbs_along_the_gradient() -> None:
    base, r, _ = task(1, 4)
    logits = [c.clone().requires_grad_() for c in conditionals(base)]
    gain = (joined([z.log_softmax(-1) for z in logits]).exp() * r).sum()
    step = torch.autograd.grad(gain, logits)
    after = joined([(z.detach() + 0.5 * g).log_softmax(-1) for z, g in zip(logits, step, strict=True)])
    once = climbed(base, r, success=gain.item() + 1e-9, rate=0.5)
    torch.testing.assert_close(once, after, rtol=0, atol=1e-12)


def test_without_kl_the_policy_gradient_keeps_no_proportions() -> None:
    """Exact RL without KL ends on hardly more than one of 16 right answers, where the Gibbs start took 4."""
    base, r, right = task(2, 16)
    exact = gibbs(base, r, BETA)
    assert paths(exact, r) == pytest.approx(paths(base, r)) and paths(exact, r) > 4
    assert paths(climbed(exact, r, 0.99), r) < 2
    assert paths(gibbs(exact, r, 50.0), r) == pytest.approx(paths(base, r))
    assert paths(descended(base, right, nll=0.01), r) > 15


def test_marginals_and_joints_are_each_others_inverse() -> None:
    base, _, _ = task(5, 1)
    torch.testing.assert_close(joined(conditionals(base)), base, rtol=0, atol=1e-12)
    brute = {y: sum(float(base[y + z].exp()) for z in itertools.product(range(V), repeat=2)) for y in [(0, 1), (3, 2)]}
    for y, p in brute.items():
        assert float(marginals(base)[1][y].exp()) == pytest.approx(p)
