"""GIFT against Algorithm 1 and the authors' order of operations; its sequence form against all sequences enumerated."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from formulas import EXACT, Tokens, cross_entropy, entropy, gift, gift_target, gradient, loss, same, tokens
from torch import Tensor

from heatbath.ideas.engine import dense_loss
from heatbath.ideas.gift import Column, Gift, GiftSequence, LeftToBase, Schedule
from heatbath.ideas.objectives import Kd, Sft, objective
from heatbath.ideas.statistics import TokenStats


def base_stats(t: Tokens) -> TokenStats:
    return TokenStats(vocab_size=t.z.shape[-1], ref_logp=t.ref_logp)


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0, 5.0, 10.0, 20.0, 40.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.01])
def test_gift_is_algorithm_1(beta: float, smoothing: float) -> None:
    t = tokens(vocab=97)
    same(loss(Gift(beta, smoothing), t), gift(t, beta, smoothing), t)


@pytest.mark.parametrize("beta", [5.0, 20.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.01])
def test_the_authors_floor_inside_the_logarithm_is_a_smoothing(beta: float, smoothing: float) -> None:
    """Their order: softmax, (1 − λ)p + λ/V, log(p + 1e-10), + β at the label, softmax; at surprises up to 120 nats."""
    t = tokens()
    t.r -= torch.linspace(0, 120, len(t.y), dtype=torch.float64)[:, None] * F.one_hot(t.y, t.z.shape[-1])
    target = Gift(beta, smoothing, floor=1e-10)
    same(loss(target, t), gift(t, beta, smoothing, 1e-10), t)
    label = t.label(gift_target(t, beta, smoothing, 1e-10))
    torch.testing.assert_close(target.target_mass(base_stats(t)), label, **EXACT)
    # which is not Algorithm 1: the floor keeps teaching what the base finds impossible
    if smoothing == 0 and beta == 20:
        assert label.min().item() == pytest.approx(1 / (1 + 1e10 * math.exp(-20) * (1 + 31e-10)), rel=1e-6)
        assert Gift(beta).target_mass(base_stats(t)).min() < 1e-40


def test_large_beta_is_sft_and_zero_beta_is_distillation() -> None:
    t = tokens()
    same(loss(Gift(300.0), t), loss(Sft(), t), t)
    zero = loss(Gift(0.0), t)
    same(zero, loss(Kd(1.0), t) + entropy(t.log_base), t)
    distilled = F.kl_div(t.log_pi, t.r.softmax(-1), reduction="none").sum(-1)
    base = torch.distributions.Categorical(logits=t.r).entropy()
    same(zero, distilled + base, t)


def test_gradient_at_the_base_is_sft_times_one_minus_keep() -> None:
    t, target = tokens(), Gift(6.0)
    t.r = t.z.detach()
    sft = gradient(loss(Sft(), t), t)
    torch.testing.assert_close(gradient(loss(target, t), t), (1 - target.keep(base_stats(t)))[:, None] * sft)


def test_gradient_is_away_from_sft_by_what_the_target_leaves_off_the_token() -> None:
    t = tokens()
    for target in (Gift(6.0), Gift(3.0, 0.1), Gift(20.0, floor=1e-10)):
        apart = gradient(loss(target, t), t) - gradient(loss(Sft(), t), t)
        torch.testing.assert_close(apart.abs().sum(-1), 2 * (1 - target.target_mass(base_stats(t))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_keep_and_mass_hold_at_extreme_surprise(dtype: torch.dtype) -> None:
    logp = -torch.tensor([1e-12, 1e-3, 1.0, 10.0, 20.0, 100.0, 1e4], dtype=dtype)
    for beta in (0.0, 5.0, 20.0, 300.0):
        base = TokenStats(vocab_size=97, ref_logp=logp)
        keep, mass = Gift(beta).keep(base), Gift(beta).target_mass(base)
        assert torch.isfinite(keep).all() and ((keep >= 0) & (keep <= 1)).all()
        p = logp.double().exp()
        odds = beta + torch.where(p < 1, (p / (1 - p)).log(), math.inf)
        torch.testing.assert_close(mass.double(), odds.sigmoid(), rtol=1e-4, atol=2e-6)


def test_half_of_the_target_is_the_tokens_where_the_surprise_is_beta() -> None:
    """w = ½ at logit p(y) = −β; with the authors' floor it never falls below σ(β + logit 1e-10)."""
    for beta in (2.0, 10.0, 20.0):
        base = TokenStats(vocab_size=97, ref_logp=torch.tensor([-beta, 0.0]).double().sigmoid().log())
        found = Gift(beta).diagnostics(base)
        assert found["w"][0].item() == pytest.approx(0.5, abs=1e-12)
        assert found["left_to_base"][1] == 0
        torch.testing.assert_close(found["w"], (1 - found["keep"]) + found["keep"] * base.ref_logp.exp())


def test_a_column_of_beta_is_each_tokens_own_number() -> None:
    t = tokens()
    whole = loss(Gift(Column("beta"), 0.02), t)
    assert objective("gift", beta={"column": "beta"}).columns == ("beta",)
    for i, beta in enumerate(t.columns["beta"].tolist()):
        torch.testing.assert_close(whole[i], loss(Gift(beta, 0.02), t)[i], **EXACT)
    for wrong in (-1.0, math.inf, math.nan):
        t.columns["beta"][3] = wrong
        with pytest.raises(ValueError, match=r"column 'beta' must hold finite numbers ≥ 0"):
            loss(Gift(Column("beta")), t)


def test_a_schedule_runs_from_start_to_end_and_stays() -> None:
    linear, cosine = Schedule(20.0, 5.0, 300), Schedule(20.0, 5.0, 300, "cosine")
    for schedule in (linear, cosine):
        assert [schedule.at(step) for step in (0, 300, 301, 10**9)] == pytest.approx([20.0, 5.0, 5.0, 5.0])
        assert schedule.at(150) == pytest.approx(12.5)
    assert linear.at(75) == pytest.approx(16.25)
    assert cosine.at(75) == pytest.approx(5 + 15 * (1 + math.cos(math.pi / 4)) / 2)
    assert Schedule(0.0, 4.0, 1).at(1) == 4.0
    target = objective("gift", beta={"start": 20, "end": 5, "steps": 300, "shape": "cosine"}, smoothing=0.1)
    assert target.at(150) == Gift(12.5, 0.1) and target.most_cautious() == Gift(5.0, 0.1)
    assert Gift(3.0).at(7) == Gift(3.0) == Gift(3.0).most_cautious()


def test_a_beta_that_is_no_number_yet_says_how_it_becomes_one() -> None:
    t = tokens()
    with pytest.raises(ValueError, match=r"objective\.at\(step\)"):
        loss(Gift(Schedule(20.0, 5.0, 300)), t)
    with pytest.raises(ValueError, match="measure the surprise"):
        loss(Gift(LeftToBase(0.005)), t)


# The sequence target: V = 4 tokens, T = 4 positions, all 256 sequences.
V, T = 4, 4


def enumerated(seed: int) -> tuple[dict[tuple[int, ...], Tensor], dict[tuple[int, ...], float]]:
    """A random autoregressive base: its next-token logits after each prefix, and its probability of each sequence."""
    g = torch.Generator().manual_seed(seed)
    prefixes = [p for n in range(T) for p in itertools.product(range(V), repeat=n)]
    after = {prefix: 2 * torch.randn(V, generator=g, dtype=torch.float64) for prefix in prefixes}
    probability = {}
    for y in itertools.product(range(V), repeat=T):
        logs = [after[y[:t]].log_softmax(-1)[y[t]] for t in range(T)]
        probability[y] = torch.stack(logs).sum().exp().item()
    assert len(probability) == 256 and sum(probability.values()) == pytest.approx(1)
    return after, probability


@pytest.mark.parametrize("mass", [0.01, 0.5, 0.9])
@pytest.mark.parametrize("expert", [(0, 0, 0, 0), (3, 1, 2, 0), (2, 2, 3, 1)])
def test_gift_sequence_is_the_conditional_of_the_enumerated_target(mass: float, expert: tuple[int, ...]) -> None:
    """(1 − m)·p_base + m·δ over whole answers, conditioned on the expert's prefixes; e^{β·1[y = y*]} is that too."""
    after, probability = enumerated(seed=4)
    target = {y: (1 - mass) * p + mass * (y == expert) for y, p in probability.items()}
    beta = math.log1p(mass / (1 - mass) / probability[expert])
    lifted = {y: p * math.exp(beta * (y == expert)) for y, p in probability.items()}
    whole = sum(lifted.values())
    assert all(lifted[y] / whole == pytest.approx(target[y], abs=1e-12) for y in target)

    conditionals = []
    for t in range(T):
        reach = [sum(p for y, p in target.items() if y[: t + 1] == (*expert[:t], v)) for v in range(V)]
        conditionals.append(torch.tensor(reach, dtype=torch.float64) / sum(reach))
    q = torch.stack(conditionals)
    z = torch.randn(T, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    base = torch.stack([after[expert[:t]] for t in range(T)])
    tok = Tokens(z, base, torch.tensor(expert), torch.zeros(T, dtype=torch.long))
    same(loss(GiftSequence(mass), tok), cross_entropy(q, tok.log_pi), tok, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(loss(GiftSequence(mass), tok), tok), (z.softmax(-1) - q).detach(), **EXACT)
    # it is GIFT with β_t = softplus(logit m + S up to and with t)
    spent = -tok.ref_logp.cumsum(0)
    tok.columns = {"beta": F.softplus(math.log(mass / (1 - mass)) + spent)}
    same(loss(GiftSequence(mass), tok), loss(Gift(Column("beta")), tok), tok)


def test_gift_sequence_is_sft_where_the_mass_is_one() -> None:
    t = tokens()
    same(loss(GiftSequence(1 - 1e-13), t), loss(Sft(), t), t, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mass", [0.1, 0.6])
def test_gift_sequence_without_memory_is_kd(mass: float) -> None:
    t, alpha = tokens(), 1 - mass
    same(loss(GiftSequence(mass, memory=0.0), t), loss(Kd(alpha), t) + alpha * entropy(t.log_base), t)


def test_gift_sequence_starts_as_kd_and_becomes_sft_as_surprise_is_spent() -> None:
    t, target = tokens(lengths=(40,)), GiftSequence(0.5)
    keep = target.sequence_weights(TokenStats(ref_logp=t.ref_logp), t.segments)
    assert keep[0].item() == 0.5 and (keep.diff() <= 0).all() and keep[-1] < 1e-12


@pytest.mark.parametrize("memory", [1.0, 0.5])
def test_sequences_in_one_batch_do_not_see_each_other(memory: float) -> None:
    t, target = tokens(), GiftSequence(0.3, memory)
    whole = loss(target, t)
    for segment in range(4):
        here = t.segments == segment
        alone = dense_loss(target, t.z[here], t.y[here], ref_logits=t.r[here], segments=t.segments[here] * 0)
        torch.testing.assert_close(whole[here], alone, **EXACT)


def test_gift_sequences_diagnostics_are_gifts() -> None:
    t, target = tokens(), GiftSequence(0.3)
    stats = TokenStats(vocab_size=31, logp=t.logp, ref_logp=t.ref_logp)
    keep = target.sequence_weights(stats, t.segments)
    stats.columns["sequence_weight"] = keep
    found = target.diagnostics(stats)
    torch.testing.assert_close(found["keep"], keep)
    torch.testing.assert_close(found["w"], (1 - keep) + keep * t.ref_logp.exp())
    assert found["left_to_base"].tolist() == (found["w"] < 0.5).double().tolist()
