"""The losses of rows of preferences against the papers' formulas, written out in float64 with Python's functions."""

import math

import pytest
import torch

from heatbath.ideas.preference import dpo, implicit_reward, una, una_scored

REWARDS = [-3.0, -0.7, 0.0, 0.4, 2.5]
TARGETS = [0.0, 0.25, 0.6, 1.0]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("target", TARGETS)
def test_scores_and_labels_are_compared_as_the_paper_says(target: float) -> None:
    """Value and derivative in r: 2(σ − s)·σ(1 − σ) and σ − s."""
    for comparison in ("mse", "bce"):
        reward = column(REWARDS)
        found = una_scored(reward, torch.full((len(REWARDS),), target, dtype=torch.float64), comparison)
        found.sum().backward()
        for i, r in enumerate(REWARDS):
            p = sigmoid(r)
            if comparison == "mse":
                value, slope = (p - target) ** 2, 2 * (p - target) * p * (1 - p)
            else:
                value, slope = -target * math.log(p) - (1 - target) * math.log(1 - p), p - target
            assert found[i].item() == pytest.approx(value, rel=1e-12)
            assert reward.grad[i].item() == pytest.approx(slope, rel=1e-12, abs=1e-15)


def test_the_logarithm_is_safe_where_the_sigmoid_is_0_or_1() -> None:
    reward = torch.tensor([-200.0, 200.0], requires_grad=True)
    found = una_scored(reward, torch.tensor([1.0, 0.0]), "bce")
    found.sum().backward()
    assert found.tolist() == [200.0, 200.0] and reward.grad.tolist() == [-1.0, 1.0]


def test_dpo_is_the_logistic_loss_of_the_difference() -> None:
    chosen, rejected = column(REWARDS), column(REWARDS[::-1])
    found = dpo(chosen, rejected)
    found.sum().backward()
    for i, (w, l) in enumerate(zip(REWARDS, REWARDS[::-1], strict=True)):  # noqa: E741 the paper's names
        assert found[i].item() == pytest.approx(-math.log(sigmoid(w - l)), rel=1e-12)
        assert chosen.grad[i].item() == pytest.approx(-sigmoid(l - w), rel=1e-12)
        assert rejected.grad[i].item() == pytest.approx(sigmoid(l - w), rel=1e-12)


def test_rows_of_every_kind_stand_side_by_side() -> None:
    """Each row is what it is alone, and has its gradient."""
    beta = torch.tensor([0.03, 0.1, 0.01, 0.1, 0.1, 0.1], dtype=torch.float64)
    logp, ref = column([-12.0, -9.0, -30.0, -7.5, -11.0, -8.0]), torch.tensor([-14.0, -8.5, -31.0, -7.5, -10.0, -13.0])
    rewards = implicit_reward(logp, ref, beta)
    target = torch.tensor([0.7, -1.0, 1.0, -1.0], dtype=torch.float64)
    found = una(rewards[:4], target, target < 0, rewards[4:])
    found.sum().backward()
    r = [0.03 * 2, 0.1 * -0.5, 0.01 * 1, 0.0, 0.1 * -1, 0.1 * 5]
    expected = [
        (sigmoid(r[0]) - 0.7) ** 2,
        -math.log(sigmoid(r[1] - r[4])),
        (sigmoid(r[2]) - 1) ** 2,
        -math.log(sigmoid(r[3] - r[5])),
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-12)
    slopes = [2 * (sigmoid(r[0]) - 0.7) * sigmoid(r[0]) * sigmoid(-r[0]), -sigmoid(r[4] - r[1])]
    slopes += [2 * (sigmoid(r[2]) - 1) * sigmoid(r[2]) * sigmoid(-r[2]), -sigmoid(r[5] - r[3])]
    slopes += [sigmoid(r[4] - r[1]), sigmoid(r[5] - r[3])]
    assert logp.grad.tolist() == pytest.approx([b * s for b, s in zip(beta.tolist(), slopes, strict=True)], rel=1e-12)


@pytest.mark.parametrize("paired", [True, False])
def test_batches_of_one_kind_alone(paired: bool) -> None:
    reward, target = column([0.2, -0.4]), torch.tensor([-1.0, -1.0] if paired else [0.5, 0.5], dtype=torch.float64)
    found = una(reward, target, target < 0, column([0.1, 0.3] if paired else []))
    expected = dpo(reward, torch.tensor([0.1, 0.3])) if paired else una_scored(reward, target)
    torch.testing.assert_close(found, expected)
