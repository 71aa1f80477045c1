"""Every row of the policy table against its formula in loops, in value and gradient; split and whole; bad input."""

import dataclasses
import itertools
import math

import pytest
import torch
from rl_formulas import BY_HAND, GUIDED, ROWS, WIDTH, Batch, advantages, batch, by_hand, small_steps
from torch import Tensor

from heatbath.ideas.implicit import Implicit
from heatbath.ideas.policy import POLICIES, defaults, policy, policy_loss
from heatbath.ideas.surrogates import ESTIMATORS, Counts, Policy, Rows, informative

EXACT = {"rtol": 1e-11, "atol": 1e-13}
OPTIONS: list[tuple[str, dict]] = [
    ("paper", {"dual_clip": 1.5}),
    ("paper", {"clip_low": 0.4, "clip_high": 0.1}),
    ("paper", {"kl": 0.04}),
    ("paper", {"kl": 0.04, "kl_estimator": "k1"}),
    ("paper", {"kl": 0.04, "kl_estimator": "k2", "reference": "base"}),
    ("paper", {"entropy": 0.3}),
    ("paper", {"sqrt_length": True}),
    ("paper", {"sqrt_length": True, "overlong": 0.5, "overlong_penalty": 0.7, "length": 8}),
    ("grpo", {"ddof": 0}),
    ("grpo", {"std_epsilon": 0.3, "ddof": 0}),
    ("grpo", {"std_epsilon": 0.0}),
    ("grpo", {"reduction": "token_mean"}),
    ("grpo", {"kl": 0.04, "entropy": 0.01, "dual_clip": 3.0}),
    ("grpo", {"reduction": "seq_mean_token_sum", "kl": 0.04}),
    ("dr_grpo", {"length": 5, "kl": 0.1}),
    ("dapo", {"overlong": 0.4, "overlong_penalty": 2.0, "length": 5}),
    ("dapo", {"advantage": "leave_one_out"}),
    ("gspo", {"clip_low": 0.05, "clip_high": 0.04}),
    ("gspo", {"reduction": "token_mean", "dual_clip": 1.2}),
    ("gspo", {"surrogate": "linear"}),
    ("cispo", {"clip_high": 1.2}),
    ("cispo", {"ratio": "sequence", "clip_high": 1.01}),
    ("cispo", {"ratio": "none", "clip_high": 0.5}),
    ("rloo", {"clip_low": 0.1, "clip_high": 0.9, "kl": 0.05}),
    ("rloo", {"ratio": "token"}),
    ("reinforce", {"reduction": "token_mean", "entropy": 0.1}),
    ("luffy", {"gamma": 0.5, "entropy": 0.2}),
    ("luffy", {"surrogate": "clip", "reduction": "token_mean", "kl": 0.1}),
    ("luffy", {"reduction": "seq_mean_token_mean", "advantage": "normalised"}),
    ("trapo", {"alpha": 0.4, "length": 20, "kl": 0.01}),
    ("trapo", {"reduction": "token_mean"}),
    ("uft", {"hint_loss": 0.5, "kl": 0.2, "entropy": 0.1}),
    ("uft", {"reduction": "seq_mean_token_mean", "ratio": "sequence"}),
    ("relift", {"reduction": "seq_mean_token_sum_norm"}),
    ("implicit", {"ddof": 0}),
    ("implicit", {"scale": 0.6, "std_floor": 0.01}),
    ("implicit", {"scale": 0.6, "std_floor": 0.01, "std": "detached"}),
    ("implicit", {"score": "kl_mean"}),
    ("implicit", {"score": "kl_mean", "std_floor": 4.0, "ddof": 0}),
    ("implicit", {"reference": "old", "sqrt_length": True}),
    ("implicit", {"kl": 0.1, "entropy": 0.2, "overlong": 0.5, "length": 8, "overlong_penalty": 3.0}),
    ("gvpo", {"scale": 0.3}),
    ("gvpo", {"score": "kl_mean", "kl": 0.1}),
]
CASES = [(name, {}) for name in BY_HAND] + OPTIONS


def same(found: Tensor, truth: Tensor, b: Batch) -> None:
    """In value and in gradient, which is 0 where nothing counts."""
    torch.testing.assert_close(found, truth, **EXACT)
    mine, other = (
        torch.autograd.grad(loss, b.differentiable(), allow_unused=True, materialize_grads=True)
        for loss in (found, truth)
    )
    for one, two in zip(mine, other, strict=True):
        torch.testing.assert_close(one, two, **EXACT)
        assert (one[b.mask == 0] == 0).all()


def test_the_table_is_read_from_the_papers_twice() -> None:
    assert set(BY_HAND) == set(POLICIES)


@pytest.mark.parametrize("steps", ["large", "small"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda x: x if isinstance(x, str) else ",".join(x))
def test_policy_is_its_formula(name: str, options: dict, steps: str) -> None:
    b = batch(guided=name in GUIDED)
    b = small_steps(b) if steps == "small" else b
    same(policy_loss(policy(name, **options), b.logp, **b.given(name in GUIDED)), by_hand(name, b, **options), b)


def test_the_problem_reaches_both_sides_of_every_clip() -> None:
    """Clips that never bind would prove nothing."""
    b, near = batch(), small_steps(batch())
    of = torch.tensor(advantages(b.rewards.tolist(), b.groups.tolist(), {}), dtype=torch.float64)[:, None]
    large, small = (torch.where(b.mask == 1, b.logp.detach() - x.old, 0.0) for x in (b, near))
    mean = (small.sum(1) / b.mask.sum(1))[:, None]
    for log_ratio, low, high in (
        (large, 0.2, 0.2),
        (large, 0.4, 0.1),
        (small.sum(1, keepdim=True), 0.2, 0.2),
        (mean, 0.05, 0.04),
        (mean, 0.0003, 0.0004),
    ):
        for sign in (-1, 1):
            ratio = log_ratio.exp()[((b.mask == 1) & (of * sign > 0))[:, : log_ratio.shape[1]]]
            assert (ratio < 1 - low).any() and (ratio > 1 + high).any()
            assert (low == 0.0003 and sign < 0) or ((ratio > 1 - low) & (ratio < 1 + high)).any()
    assert (large.exp() > 5)[(b.mask == 1) & (of < 0)].any()  # dual clip, cap


@pytest.mark.parametrize("name", [n for n in BY_HAND if n not in ("cispo", "trapo")])  # their weights are constants
def test_gradient_is_the_slope_of_the_loss(name: str) -> None:
    b = small_steps(batch(3, guided=name in GUIDED))
    made = policy(name)
    loss = policy_loss(made, b.logp, **b.given(name in GUIDED))
    (gradient,) = torch.autograd.grad(loss, b.logp)
    for i, t in ((0, 1), (1, 0), (2, 0), (2, 3), (4, 2), (8, 6), (10, 3)):
        ends = []
        for step in (1e-6, -1e-6):
            moved = b.logp.detach().clone()
            moved[i, t] += step
            ends.append(policy_loss(made, moved, **b.given(name in GUIDED)))
        assert ((ends[0] - ends[1]) / 2e-6).item() == pytest.approx(gradient[i, t].item(), rel=1e-5, abs=1e-9)


def in_parts(made: Policy, b: Batch, parts: list[list[int]], expert: bool, narrow: bool) -> Tensor:
    """The loss as a trainer computes it: advantages or coefficients from all completions, then batch by batch."""
    made = made.at_length(WIDTH)
    columns = {"old_logp": b.old, "ref_logp": b.ref, "entropy": b.entropy, "expert": b.expert if expert else None}
    whole = Rows(b.mask, **columns)
    lengths, counts = b.mask.sum(1), Counts.of(whole)
    rewards = made.shaped(b.rewards, lengths)
    if isinstance(made, Implicit):
        scores = torch.cat([made.scores(*cut(b.logp, whole, part)) for part in parts]).detach()
        order = [i for part in parts for i in part]
        coefficient = torch.zeros_like(scores)
        coefficient[order] = made.coefficients(scores, rewards[order], b.groups[order], lengths[order])[0]
        whole = dataclasses.replace(whole, coefficient=coefficient)
    else:
        whole = dataclasses.replace(whole, advantage=made.advantages(rewards, b.groups))
    return sum(made.loss(*cut(b.logp, whole, part, narrow), counts)[0] for part in parts)


def cut(logp: Tensor, rows: Rows, part: list[int], narrow: bool = False) -> tuple[Tensor, Rows]:
    """Some completions, padded to the longest of them where `narrow`."""
    width = int(rows.mask[part].sum(1).max()) + 1 if narrow else WIDTH
    held = {f.name: getattr(rows, f.name) for f in dataclasses.fields(Rows)}
    mine = {k: None if v is None else v[part, :width] if v.dim() == 2 else v[part] for k, v in held.items()}
    return logp[part, :width], Rows(**mine)


PARTS = {
    "one by one": [[i] for i in range(len(ROWS))],
    "torn": [[0, 1, 5], [13, 2], [3, 4, 6, 7, 8, 9, 10], [11, 12]],
    "whole": [list(range(len(ROWS)))],
}


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", BY_HAND)
def test_the_parts_of_a_step_add_up(name: str, parts: str, narrow: bool) -> None:
    b = batch(1, guided=name in GUIDED)
    regularised = {} if name == "uft" else {"kl": 0.1, "entropy": 0.2}
    made = policy(name, **regularised)
    whole = policy_loss(made, b.logp, **b.given(name in GUIDED))
    split = in_parts(made, b, PARTS[parts], name in GUIDED, narrow)
    if isinstance(made, Implicit):  # whose parts have the gradient of the loss, not its value
        split = split + (whole - split).detach()
    same(split, whole, b)


def test_without_old_logp_the_policy_that_sampled_is_this_one() -> None:
    b = batch()
    for name in ("paper", "gspo", "rloo", "cispo"):
        made = policy(name)
        rows = Rows(b.mask, advantage=made.advantages(b.rewards, b.groups))
        for old in (None, b.logp.detach()):
            loss = made.loss(b.logp, dataclasses.replace(rows, old_logp=old), Counts.of(rows))[0]
            same(loss, policy_loss(made, b.logp, **b.given(False) | {"old_logp": b.logp.detach()}), b)


def test_the_other_policies_are_constants_and_padding_counts_nowhere() -> None:
    b = batch()
    b.old.requires_grad_()
    b.ref.requires_grad_()
    for name in ("paper", "gspo", "cispo", "implicit", "gvpo"):
        loss = policy_loss(policy(name, kl=0.1), b.logp, **b.given(False))
        assert torch.autograd.grad(loss, (b.old, b.ref), allow_unused=True) == (None, None)
    for name in ("paper", "gspo", "cispo", "luffy", "uft"):
        advantage = torch.ones(len(ROWS), requires_grad=True)
        rows = Rows(b.mask, advantage=advantage, old_logp=b.logp.detach(), entropy=b.entropy, expert=b.expert)
        made = policy(name, **({"kl": 0.0} if name == "uft" else {}))
        assert torch.autograd.grad(made.loss(b.logp, rows, Counts.of(rows))[0], advantage, allow_unused=True) == (None,)
    spoiled = torch.tensor([[3.0, math.inf], [math.nan, math.nan]], dtype=torch.float64)
    mask = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    for name in ("paper", "grpo", "dr_grpo", "reinforce", "luffy"):
        share = {"paper": 1, "grpo": 2, "dr_grpo": 8, "reinforce": 2, "luffy": 4}[name]
        assert policy(name).at_length(4).reduced(spoiled, mask, 1, 2) == 3 / share


def test_a_correction_weighs_the_loss_of_each_token_and_nothing_else() -> None:
    b = batch()
    made = policy("paper", kl=0.1)
    rows = Rows(b.mask, old_logp=b.old, ref_logp=b.ref, advantage=made.advantages(b.rewards, b.groups))
    weights = torch.rand(len(ROWS), WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = Counts.of(rows)
    for correction in (weights, weights[:, :1]):
        found = made.loss(b.logp, dataclasses.replace(rows, correction=correction), counts)[0]
        plain = made.token_loss(b.logp, rows)[0]
        truth = (torch.where(b.mask == 1, plain, 0.0) * correction).sum() / b.mask.sum()
        same(found, truth + made.regularised(b.logp, rows, counts)[0], b)


def test_measured_numbers() -> None:
    """Which tokens a clip decided: those whose loss is flat in the ratio."""
    b = batch()
    for options in ({}, {"dual_clip": 1.5}):
        made = policy("paper", kl=0.1, **options)
        rows = Rows(b.mask, old_logp=b.old, ref_logp=b.ref, advantage=made.advantages(b.rewards, b.groups))
        token, decided = made.token_loss(b.logp, rows)
        (slope,) = torch.autograd.grad(token.sum(), b.logp)
        has_advantage = (rows.advantage != 0)[:, None] & (b.mask == 1)
        assert torch.equal(decided & (b.mask == 1), (slope == 0) & has_advantage) and decided.any()
        measured = made.loss(b.logp, rows, Counts.of(rows))[1]
        assert torch.equal(measured["clip_share"], decided.double())
        for i, t in ((0, 0), (4, 2)):
            d = (b.ref[i, t] - b.logp[i, t]).item()
            assert measured["kl_reference"][i, t].item() == pytest.approx(math.expm1(d) - d)
    made = policy("cispo", clip_high=1.2)
    _, decided = made.token_loss(b.logp, rows)
    inside = b.mask == 1
    assert torch.equal(decided[inside], ((b.logp - b.old).exp() > 1.2)[inside]) and decided.any()


def test_cispo_keeps_the_gradient_of_every_token() -> None:
    b = batch()
    made = policy("cispo", clip_high=1.5)
    (gradient,) = torch.autograd.grad(policy_loss(made, b.logp, **b.given(False)), b.logp)
    a = advantages(b.rewards.tolist(), b.groups.tolist(), {"advantage": "normalised"})
    weight = (b.logp.detach() - b.old).exp().clamp(max=1.5)
    truth = torch.where(b.mask == 1, -weight * torch.tensor(a, dtype=torch.float64)[:, None] / b.mask.sum(), 0.0)
    torch.testing.assert_close(gradient, truth, **EXACT)


def test_advantages_of_a_group() -> None:
    rewards = torch.tensor([1.0, 3.0, math.nan, 8.0, 5.0, 5.0], dtype=torch.float64)
    groups = torch.tensor([9, 9, 9, 9, 2, 2])
    for name, expected in {
        "centred": [-3, -1, 0, 4, 0, 0],
        "leave_one_out": [-4.5, -1.5, 0, 6, 0, 0],
        "reward": [1, 3, 0, 8, 5, 5],
        "normalised": [-3 / math.sqrt(13), -1 / math.sqrt(13), 0, 4 / math.sqrt(13), 0, 0],
    }.items():
        options = {"std_epsilon": 0.0} if name == "normalised" else {}
        found = policy("grpo", advantage=name, **options).advantages(rewards, groups)
        assert found.tolist() == pytest.approx(expected)
    assert informative(rewards, groups).tolist() == [True] * 4 + [False] * 2
    third = torch.full((3,), 0.1, dtype=torch.float64)  # whose mean is not 0.1
    assert not informative(third, torch.zeros(3, dtype=torch.int64)).any()
    assert (policy("grpo", std_epsilon=0.0).advantages(third, torch.zeros(3, dtype=torch.int64)) == 0).all()


def test_overlong_and_sqrt_length_shape_the_reward() -> None:
    """arXiv 2503.14476: L = 20480 with a buffer of 4096, from 0 at 16384 to −1 at 20480 and beyond."""
    made = policy("dapo").at_length(20480)
    lengths = torch.tensor([1, 16384, 18432, 20480, 30000])
    assert made.shaped(torch.zeros(5), lengths).tolist() == pytest.approx([0, 0, -0.5, -1, -1])
    assert policy("paper", sqrt_length=True).shaped(torch.ones(2), torch.tensor([4, 0])).tolist() == [0.5, 1.0]
    assert policy("dapo", length=7).at_length(20480).length == 7


@pytest.mark.parametrize("name", POLICIES)
def test_defaults_make_the_policy(name: str) -> None:
    assert policy(name, **defaults(name)) == policy(name)
    assert POLICIES[name].says and POLICIES[name].source
    assert policy(name).needs_reference == ("reference" in POLICIES[name].needs)
    assert ("solution" in POLICIES[name].needs) == (name in (*GUIDED, "relift"))


@pytest.mark.parametrize("name", BY_HAND)
def test_groups_without_rewards_teach_nothing(name: str) -> None:
    b = batch(guided=name in GUIDED)
    b.rewards[:] = math.nan
    made = dataclasses.replace(policy(name), kl=0.0, entropy=0.0)
    loss = policy_loss(made, b.logp, **b.given(name in GUIDED))
    (gradient,) = torch.autograd.grad(loss, b.logp)
    taught = b.expert if name in ("trapo", "uft") else torch.zeros_like(b.mask)  # whose advantage is 1
    assert loss.isfinite() and torch.equal(gradient != 0, taught.bool())


def test_kl_estimators() -> None:
    """k1 and k3 are unbiased under π, k3 is never negative; k2's mean gradient in π is that of the KL, k1's is 0."""
    g = torch.Generator().manual_seed(1)
    z = torch.randn(11, generator=g, dtype=torch.float64, requires_grad=True)
    q = torch.randn(11, generator=g, dtype=torch.float64).log_softmax(-1)
    p = z.log_softmax(-1)
    kl = (p.exp() * (p - q)).sum()
    (slope,) = torch.autograd.grad(kl, z, retain_graph=True)
    means = {name: (p.exp().detach() * of(p, q)).sum() for name, of in ESTIMATORS.items()}
    assert means["k1"].item() == pytest.approx(kl.item()) and means["k3"].item() == pytest.approx(kl.item())
    assert (ESTIMATORS["k3"](p, q) >= 0).all()
    assert ESTIMATORS["k3"](p, p).abs().max() == 0
    close = p.detach() + 1e-9
    assert ESTIMATORS["k3"](close, p.detach()) == pytest.approx(5e-19, rel=1e-6, abs=0)
    gradient = {name: torch.autograd.grad(mean, z, retain_graph=True)[0] for name, mean in means.items()}
    torch.testing.assert_close(gradient["k2"], slope)
    torch.testing.assert_close(gradient["k1"], torch.zeros_like(slope))


def bandit() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits of a policy over two tokens of which token 0 ends, its completions' log-probabilities [5, 2], their mask
    and their rewards."""
    z = torch.tensor([[0.3, -0.5, 0.9], [1.0, -1.0, 0.0], [-0.4, 0.2, 0.6]], dtype=torch.float64, requires_grad=True)
    table = z.log_softmax(-1)
    outcomes = [(0,), (1, 0), (1, 1), (2, 0), (2, 1), (1, 2), (2, 2)]
    zero = torch.zeros((), dtype=torch.float64)
    logp = torch.stack([torch.stack([table[0, o[0]], table[o[0], o[1]] if len(o) > 1 else zero]) for o in outcomes])
    mask = torch.tensor([[1.0, float(len(o) > 1)] for o in outcomes], dtype=torch.float64)
    return z, logp, mask, torch.tensor([0.7, -1.0, 2.0, 0.1, 0.0, 1.5, -0.3], dtype=torch.float64)


@pytest.mark.parametrize("name", ["reinforce", "rloo"])
def test_the_mean_gradient_is_that_of_the_expected_reward(name: str) -> None:
    """Over every pair of completions of a policy small enough to list them."""
    z, logp, mask, rewards = bandit()
    chance = (logp * mask).sum(1).exp()
    assert chance.sum().item() == pytest.approx(1)
    (truth,) = torch.autograd.grad(-(chance * rewards).sum(), z, retain_graph=True)
    mean = torch.zeros_like(z)
    for i, j in itertools.product(range(len(rewards)), repeat=2):
        pair = torch.tensor([i, j])
        loss = policy_loss(
            policy(name),
            logp[pair],
            old_logp=logp[pair].detach(),
            mask=mask[pair],
            rewards=rewards[pair],
            groups=torch.zeros(2, dtype=torch.int64),
        )
        mean += (chance[i] * chance[j]).detach() * torch.autograd.grad(loss, z, retain_graph=True)[0]
    torch.testing.assert_close(mean, truth, **EXACT)
