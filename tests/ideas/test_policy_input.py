"""Functions of one's own in a policy, and what a policy refuses."""

import math
from pathlib import Path

import pytest
import torch
from rl_formulas import NONE, ROWS, batch, by_hand
from test_policy import same

from heatbath.ideas.policy import policy, policy_loss
from heatbath.ideas.surrogates import Counts, Rows

OWN = """
import torch

def above_median(rewards, groups):
    made = torch.zeros_like(rewards)
    for group in groups.unique():
        mine = groups == group
        made[mine] = rewards[mine] - rewards[mine].nanmedian()
    return made

def sapo(ratio, advantage, logp):
    tau = 1.05 - 0.05 * (advantage > 0).to(advantage.dtype)
    return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantage

def divided(rewards, groups):
    made = torch.zeros_like(rewards)
    for group in groups.unique():
        mine = groups == group
        known = rewards[mine][~rewards[mine].isnan()]
        made[mine] = (rewards[mine] - known.mean()) / known.std(correction=0)
    return made

def short(rewards, groups): return rewards[:-1]
def spoiled(rewards, groups): return rewards - rewards.mean()
def by_row(ratio, advantage, logp): return (-advantage * logp).sum(1)
broken = 3
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return str(tmp_path / "own.py")


def test_an_advantage_and_a_surrogate_of_ones_own(own: str) -> None:
    b = batch()
    made = policy("grpo", advantage=f"{own}:above_median", surrogate=f"{own}:sapo")
    literal = {
        "advantage": lambda mine, others: mine - sorted(others)[(len(others) - 1) // 2],
        "surrogate": lambda r, a, logp: -(4 / (x := 1.0 if a > 0 else 1.05)) / (1 + (-x * (r - 1)).exp()) * a,
    }
    same(policy_loss(made, b.logp, **b.given(False)), by_hand("grpo", b, **literal), b)
    rewards, groups = torch.tensor([1.0, 3.0, NONE, 5.0, 5.0, 2.0]), torch.tensor([8, 8, 8, 4, 4, 6])
    divided = policy("grpo", advantage=f"{own}:divided").advantages(rewards, groups)
    assert divided.tolist() == [-1, 1, 0, 0, 0, 0]  # 0/0 where rewards are equal, or there is one
    sequence = policy("gspo", surrogate=f"{own}:sapo")
    same(
        policy_loss(sequence, b.logp, **b.given(False)),
        by_hand("gspo", b, surrogate=literal["surrogate"]),
        b,
    )


def test_functions_of_ones_own_that_are_wrong(own: str) -> None:
    b = batch()
    for made, says in (
        (policy("paper", advantage=f"{own}:short"), r"short returned shape \(13,\) for rewards \(14,\)"),
        (policy("paper", advantage=f"{own}:spoiled"), "spoiled returned NaN or inf for 6 of 14"),
        (policy("paper", surrogate=f"{own}:by_row"), r"by_row returned shape \(14,\) for logp \(14, 9\)"),
    ):
        with pytest.raises(ValueError, match=says):
            policy_loss(made, b.logp, **b.given(False))
    square = Rows(torch.ones(3, 3), advantage=torch.ones(3))
    with pytest.raises(ValueError, match="returned shape"):
        policy("paper", surrogate=f"{own}:by_row").loss(torch.zeros(3, 3), square, Counts.of(square))
    for name, says in (
        (f"{own}:none_such", "no attribute 'none_such'"),
        (f"{own}:broken", "is not a function"),
        ("no/such/file.py:f", "cannot import"),
    ):
        with pytest.raises(ValueError, match=says):
            policy("paper", surrogate=name)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("grop", {}, "unknown policy 'grop', did you mean 'grpo'.*known: paper"),
        ("paper", {"clip_lo": 0.1}, "has no 'clip_lo', did you mean 'clip_low'"),
        ("paper", {"clip_low": 1.0}, "0 ≤ clip_low < 1 and clip_high ≥ 0, not 1.0 and 0.2"),
        ("paper", {"clip_high": -0.1}, "clip_high ≥ 0"),
        ("paper", {"clip_high": math.nan}, "clip_high must be a finite number"),
        ("paper", {"clip_high": "0.3"}, "clip_high must be a number"),
        ("paper", {"dual_clip": 1.0}, "dual_clip must be > 1"),
        ("paper", {"ddof": 0}, "does not read 'ddof'; it takes advantage, clip_high"),
        ("paper", {"std_epsilon": 0.1}, "does not read 'std_epsilon'"),
        ("paper", {"length": 100}, "does not read 'length'"),
        ("paper", {"kl_estimator": "k1"}, "does not read 'kl_estimator'"),
        ("paper", {"overlong_penalty": 2.0}, "does not read 'overlong_penalty'"),
        ("paper", {"reference": "base"}, "does not read 'reference'"),
        ("paper", {"kl": -1.0}, "kl and entropy must be ≥ 0"),
        ("paper", {"entropy": -1.0}, "kl and entropy must be ≥ 0"),
        ("paper", {"kl": 0.1, "kl_estimator": "k4"}, "kl_estimator must be one of 'k1', 'k2', 'k3'"),
        ("paper", {"kl": 0.1, "reference": "old"}, "the KL is to 'init' or to 'base'"),
        ("paper", {"overlong": 1.0}, r"overlong.* must lie in \[0, 1\)"),
        ("paper", {"overlong": 0.1, "overlong_penalty": -1.0}, "overlong_penalty"),
        ("paper", {"advantage": "gae"}, "advantage must be one of centred, .* or a function of your own"),
        ("paper", {"ratio": "file.py:f"}, "ratio must be one of token, sequence, product, none, not"),
        ("paper", {"advantage": 3}, "advantage must be one of"),
        ("paper", {"ratio": "none"}, "ratio 'none' leaves surrogate 'clip' no gradient"),
        ("luffy", {"ratio": "none"}, "ratio 'none' leaves surrogate 'linear' no gradient"),
        ("paper", {"sqrt_length": 1}, "sqrt_length must be true or false"),
        ("grpo", {"ddof": 2}, "ddof must be 0 or 1"),
        ("grpo", {"ddof": 1.0}, "ddof must be a whole number"),
        ("grpo", {"std_epsilon": -1e-9}, "std_epsilon ≥ 0"),
        ("dr_grpo", {"length": 0}, "length must be ≥ 1"),
        ("cispo", {"clip_high": 0.0}, "absolute cap"),
        ("cispo", {"clip_low": 0.1}, "does not read 'clip_low'"),
        ("reinforce", {"clip_high": 0.1}, "does not read 'clip_high'"),
        ("reinforce", {"ratio": "token"}, "does not read 'ratio'"),
        ("implicit", {"surrogate": "clip"}, "does not read 'surrogate'"),
        ("implicit", {"clip_low": 0.1}, "does not read 'clip_low'"),
        ("implicit", {"kl_estimator": "k1"}, "does not read 'kl_estimator'"),
        ("implicit", {"std_floor": 0.0}, "std_floor and scale must be > 0"),
        ("implicit", {"scale": -1.0}, "std_floor and scale must be > 0"),
        ("implicit", {"score": "sum"}, "score must be one of 'kl_sum', 'kl_mean'"),
        ("gvpo", {"std_floor": 2.0}, "does not read 'std_floor'"),
        ("gvpo", {"ddof": 0}, "does not read 'ddof'"),
        ("luffy", {"gamma": 0.0}, "gamma must be > 0"),
        ("luffy", {"traces": -1}, "traces must be ≥ 0"),
        ("luffy", {"dynamic_sampling": True}, "does not read 'dynamic_sampling'"),
        ("luffy", {"clip_high": 0.3}, "does not read 'clip_high'"),
        ("trapo", {"alpha": 0.0}, "alpha must be > 0"),
        ("trapo", {"rounds": [4, 4]}, "one number for each micro-group"),
        ("trapo", {"rounds": [4, 2, 2, 0]}, "whole numbers ≥ 1"),
        ("trapo", {"rounds": [4.0, 2, 1, 1]}, "whole numbers ≥ 1"),
        ("trapo", {"rounds": 8}, "not iterable"),
        ("trapo", {"shares": [0, 0.5, 1, 1.5]}, "shares in"),
        ("trapo", {"thresholds": [0, 0.5, 1, math.nan]}, "finite thresholds"),
        ("trapo", {"rounds": [], "shares": [], "thresholds": []}, "rounds"),
        ("uft", {"high": 0.01}, "low ≤ high"),
        ("uft", {"chunks": 0}, "chunks ≥ 1"),
        ("uft", {"hint_loss": -1.0}, "hint_loss must be ≥ 0"),
        ("uft", {"hint_steps": -1}, "hint_steps"),
        ("relift", {"sft_batch": 0}, "sft_batch"),
        ("relift", {"sft_lr": 0.0}, "sft_lr"),
        ("relift", {"sft_entropy": -0.1}, "sft_entropy"),
        ("relift", {"sft_max_grad_norm": 0.0}, "sft_max_grad_norm"),
    ],
)
def test_bad_hyper_parameters_are_named(name: str, options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        policy(name, **options)


def test_what_a_policy_reads_must_be_there() -> None:
    b = batch()
    for name, options, missing in (
        ("paper", {"kl": 0.1}, "ref_logp"),
        ("implicit", {}, "ref_logp"),
        ("paper", {"entropy": 0.1}, "entropy"),
    ):
        made = policy(name, **options)
        assert made.needs_reference == (missing == "ref_logp") and made.needs_entropy == (missing == "entropy")
        with pytest.raises(ValueError, match=f"no {missing} is given"):
            policy_loss(made, b.logp, **b.given(False) | {missing: None})
    with pytest.raises(ValueError, match="group of one"):
        policy_loss(policy("paper"), b.logp, **b.given(False) | {"groups": torch.arange(len(ROWS))})
