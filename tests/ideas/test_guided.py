"""RL with demonstrations: LUFFY, TRAPO and UFT against closed forms, schedules and tables worked out by hand."""

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from heatbath.ideas.guided import Relift
from heatbath.ideas.policy import policy, policy_loss
from heatbath.ideas.surrogates import Counts, Policy, Rows

EXACT = {"rtol": 1e-11, "atol": 1e-13}
GROUPS = torch.tensor([3, 3, 3, 3])
REWARDS = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)


def one_trace() -> tuple[Tensor, Tensor, Tensor]:
    """logp [4, 5], mask and expert mask: the first completion is a demonstration, the others sampled, of 2 to 5."""
    g = torch.Generator().manual_seed(0)
    logp = (-4 * torch.rand(4, 5, generator=g, dtype=torch.float64)).requires_grad_()
    mask = (torch.arange(5) < torch.tensor([4, 5, 2, 3])[:, None]).double()
    return logp, mask, mask * torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)[:, None]


def gradient(made: Policy, logp: Tensor, mask: Tensor, expert: Tensor | None) -> Tensor:
    loss = policy_loss(
        made,
        logp,
        old_logp=logp.detach(),
        mask=mask,
        rewards=REWARDS,
        groups=GROUPS,
        ref_logp=logp.detach(),
        entropy=torch.zeros_like(logp),
        expert=expert,
    )
    assert loss.isfinite()
    return torch.autograd.grad(loss, logp)[0]


@pytest.mark.parametrize("gamma", [0.1, 0.5])
def test_luffy_shapes_the_gradient_of_a_demonstrated_token(gamma: float) -> None:
    """A·γ·p/(p + γ)², all of it over the width; when every rollout fails and the demonstration is right A is 7/8 and
    −1/8 in a group of eight, 3/4 and −1/4 here."""
    logp, mask, expert = one_trace()
    p = logp.detach().exp()
    found = gradient(policy("luffy", gamma=gamma, length=50), logp, mask, expert)
    truth = -torch.where(expert == 1, 0.75 * gamma * p / (p + gamma) ** 2, -0.25) * mask / 50
    torch.testing.assert_close(found, truth, **EXACT)


@pytest.mark.parametrize(("name", "plain"), [("luffy", "relift"), ("trapo", "relift"), ("uft", "grpo")])
def test_without_demonstrated_tokens_it_is_a_policy_gradient(name: str, plain: str) -> None:
    logp, mask, expert = one_trace()
    made = policy(name)
    none = gradient(made, logp, mask, torch.zeros_like(expert))
    torch.testing.assert_close(none, gradient(made, logp, mask, None), **EXACT)
    rest = {"reduction": "token_mean"} if plain == "grpo" else {}
    torch.testing.assert_close(none, gradient(policy(plain, **rest), logp, mask, None), **EXACT)


@pytest.mark.parametrize("alpha", [0.1, 0.3])
def test_trapo_teaches_with_weight_of_at_most_one(alpha: float) -> None:
    """min(1, p/α) whatever the reward."""
    logp, mask, expert = one_trace()
    expert = expert.clone()
    expert[1, :2] = 1  # the beginning of a completion that got nothing
    p = logp.detach().exp()
    assert (p < alpha)[expert == 1].any() and (p > alpha)[expert == 1].any()
    found = gradient(policy("trapo", alpha=alpha), logp, mask, expert)
    advantage = torch.tensor([0.75, -0.25, -0.25, -0.25], dtype=torch.float64)[:, None]
    truth = -torch.where(expert == 1, (p / alpha).clamp(max=1), advantage) * mask / 5
    torch.testing.assert_close(found, truth, **EXACT)


def test_uft_counts_a_hint_in_a_mean_of_its_own() -> None:
    logp, mask, expert = one_trace()
    expert = mask * (torch.arange(5) < torch.tensor([2, 1, 0, 3])[:, None])  # the last one is nothing but a hint
    found = gradient(policy("uft", hint_loss=0.3, std_epsilon=0.0, ddof=0), logp, mask, expert)
    deviation = math.sqrt(3) / 4
    advantage = torch.tensor([0.75, -0.25, -0.25, -0.25], dtype=torch.float64)[:, None] / deviation
    own = mask - expert
    truth = -advantage * own / own.sum() - 0.3 * expert / expert.sum()
    torch.testing.assert_close(found, truth, **EXACT)


def test_the_entropy_of_demonstrated_tokens_counts_where_the_authors_count_it() -> None:
    logp, mask, expert = one_trace()
    own = mask - expert
    for name, counted in (("luffy", mask), ("trapo", mask), ("uft", own), ("relift", own)):
        entropy = torch.ones_like(logp).requires_grad_()
        rows = Rows(mask, entropy=entropy, expert=expert)
        made = policy(name, entropy=0.2, **({"kl": 0.0} if name == "uft" else {}))
        (slope,) = torch.autograd.grad(made.regularised(logp, rows, Counts.of(rows))[0], entropy)
        torch.testing.assert_close(slope, -0.2 * counted / counted.sum(), **EXACT)


def test_demonstrated_tokens_are_never_clipped_and_never_corrected() -> None:
    logp, mask, expert = one_trace()
    made = policy("luffy", surrogate="clip")
    rows = Rows(
        mask,
        advantage=torch.ones(4),
        old_logp=logp.detach() - 9,
        entropy=torch.zeros_like(logp),
        expert=expert,
        correction=torch.full((4, 1), 2.0),
    )
    loss, measured = made.loss(logp, rows, Counts.of(rows))
    assert torch.equal(measured["clip_share"] * mask, mask - expert)
    p = logp.detach().exp()
    shaped = -(p / (p + 0.1) * expert).sum() / 5
    torch.testing.assert_close(loss.detach(), shaped - 2 * 1.2 * (mask - expert).sum() / 5, **EXACT)
    assert Counts.of(rows) == Counts(tokens=10, sequences=4, expert=4)


def test_uft_hints_fall_along_a_cosine() -> None:
    """arXiv 2505.16984: p = 0.05 + 0.5·0.9·(1 + cos(π·t/300)), then none."""
    made = policy("uft")
    for step, p in {0: 0.95, 75: 0.5 + 0.45 * math.sqrt(0.5), 100: 0.725, 150: 0.5, 200: 0.275, 300: 0.0}.items():
        assert made.probability(step) == pytest.approx(p)
    assert made.probability(299) == pytest.approx(0.05, abs=1e-4) and made.probability(299) > 0.05
    assert made.probability(10_000) == 0
    draws = [i / 100 for i in range(100)]
    assert {made.share(0, [], step, u) for step in (300, 301, 499) for u in draws} == {0.0}
    assert {policy("uft", hint_steps=0).share(0, [], 0, u) for u in draws} == {0.0}
    assert {policy("uft", high=1.0).share(0, [], 0, u) for u in draws} == {1.0}
    other = policy("uft", low=0.2, high=0.6, hint_steps=10)
    assert [other.probability(t) for t in (0, 5, 10)] == pytest.approx([0.6, 0.4, 0.0])


@pytest.mark.parametrize("step", [0, 120, 290])
@pytest.mark.parametrize("chunks", [1, 5])
def test_uft_shares_are_binomial(chunks: int, step: int) -> None:
    """Every outcome of so many coins, against the draws of a fine grid."""
    made = policy("uft", chunks=chunks)
    p, grid = made.probability(step), 4000
    drawn = Counter(made.share(0, [], step, (i + 0.5) / grid) for i in range(grid))
    chance = Counter[float]()
    for coins in itertools.product((0, 1), repeat=chunks):
        chance[sum(coins) / chunks] += math.prod(p if c else 1 - p for c in coins)
    assert set(drawn) <= set(chance)
    for share, mass in chance.items():
        assert drawn[share] / grid == pytest.approx(mass, abs=1.01 / grid)
    assert made.share(0, [], step, 0.0) == 0 and made.share(0, [], step, math.nextafter(1, 0)) == 1


def test_trapo_lengthens_the_beginning_while_the_group_fails() -> None:
    """arXiv 2512.17636: rounds of 4, 2, 1, 1; shares 0, 0.2, 0.5, 1 below means of −1, 0.5, 0.7, 0.9."""
    made = policy("trapo")
    table: list[tuple[int, list[float], float]] = [
        (0, [], 0.0),
        (1, [0, 0, 0, 0], 0.2),
        (1, [1, 0, 0, 0], 0.2),
        (1, [1, 1, 0, 0], 0.0),  # 0.5 is not below 0.5
        (1, [1, 1, 1, 1], 0.0),
        (2, [1, 1, 0, 0, 1, 0], 0.5),
        (2, [1, 1, 1, 0, 1, 0], 0.5),  # 0.667
        (2, [1, 1, 1, 0, 1, 1], 0.0),  # 0.833
        (3, [1, 1, 1, 0, 1, 1, 1], 1.0),  # 0.857
        (3, [1, 1, 1, 1, 1, 1, 1], 0.0),
        (3, [0] * 7, 1.0),
        (1, [1, math.nan, 1, math.nan], 0.0),  # over those that were graded
        (1, [1, math.nan, 0, 0], 0.2),
        (2, [math.nan] * 6, 0.5),
    ]
    for round, rewards, share in table:
        for step, draw in ((0, 0.0), (900, 0.99)):
            assert made.share(round, rewards, step, draw) == share, (round, rewards)
    early = policy("trapo", rounds=[2, 2], shares=[0.1, 1], thresholds=[0, 0.5])
    assert early.rounds == (2, 2) and early.shares == (0.1, 1) and hash(early)
    assert [early.share(0, [], 0, 0.5), early.share(1, [0, 1], 0, 0.5), early.share(1, [0, 0], 0, 0.5)] == [0.1, 0, 1]


def test_rounds_add_up_to_the_group() -> None:
    assert policy("luffy").rounds_of(8) == (7, 1)
    assert policy("luffy", traces=3).rounds_of(8) == (5, 3)
    assert policy("luffy", traces=0).rounds_of(8) == (8,)
    assert [policy("luffy").share(r, [0.0] * 7 * r, 0, 0.3) for r in (0, 1)] == [0.0, 1.0]
    assert policy("trapo").rounds_of(8) == (4, 2, 1, 1)
    assert policy("uft").rounds_of(4) == (4,)
    with pytest.raises(ValueError, match="8 traces leave no rollout in a group of 8"):
        policy("luffy", traces=8).rounds_of(8)
    with pytest.raises(ValueError, match=r"rounds \[4, 2, 1, 1\] add up to 8, the group has 4"):
        policy("trapo").rounds_of(4)


def test_relift_is_a_policy_with_a_buffer() -> None:
    """The settings of arXiv 2506.07527: one SFT step on 128, lr 1e-6, nll − 0.001·H, gradients clipped at 1."""
    made = policy("relift")
    assert isinstance(made, Relift) and made.needs_demonstrations
    assert (made.sft_batch, made.sft_lr, made.sft_entropy, made.sft_max_grad_norm) == (128, 1e-6, 0.001, 1.0)
    assert {"sft_batch", "sft_lr", "dynamic_sampling", "entropy"} <= made.takes
