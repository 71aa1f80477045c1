"""Group-relative Implicit Fine-Tuning and GVPO: gradients in closed form, the singular start, and what Z(x) cancels."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from heatbath.ideas.implicit import Implicit
from heatbath.ideas.policy import policy, policy_loss
from heatbath.ideas.surrogates import Counts, Rows

EXACT = {"rtol": 1e-11, "atol": 1e-13}
NONE = math.nan


def groups_of(*sizes: int, seed: int = 0, spread: float = 8.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores with a deviation of about `spread` nats, rewards, group ids and lengths of interleaved groups."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.cat([torch.full((n,), 17 - 5 * i) for i, n in enumerate(sizes)])
    ids = ids[torch.randperm(len(ids), generator=g)]
    scores = spread * torch.randn(len(ids), generator=g, dtype=torch.float64)
    rewards = torch.randn(len(ids), generator=g, dtype=torch.float64)
    return scores, rewards, ids, torch.randint(1, 9, (len(ids),), generator=g)


def standard(values: list[float], ddof: int) -> tuple[list[float], float]:
    """Values less their mean over their deviation; and the deviation."""
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - ddof))
    return [(v - mean) / deviation for v in values], deviation


def members(ids: Tensor) -> list[list[int]]:
    return [[i for i, x in enumerate(ids.tolist()) if x == group] for group in sorted(set(ids.tolist()))]


@pytest.mark.parametrize("scale", [1.0, 0.4])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("std", ["attached", "detached"])
def test_gradient_in_the_scores(std: str, ddof: int, scale: float) -> None:
    """−(2c/(N·s))·(t − ρ·z) through the deviation, −(2c/(N·s))·(t − c·z) without. ρ = Σ t·z / (N − ddof) is Pearson's
    whatever ddof is, as long as it is that of both deviations; the loss is 2(1 − ρ)(N − ddof)/N at c = 1."""
    scores, rewards, ids, lengths = groups_of(5, 2, 7, seed=3)
    made = policy("implicit", std=std, ddof=ddof, scale=scale)
    found, loss = made.coefficients(scores, rewards, ids, lengths)
    assert found.dtype == torch.float64
    truth, losses = torch.zeros_like(scores), []
    for rows in members(ids):
        t, _ = standard([rewards[i].item() for i in rows], ddof)
        z, s = standard([scores[i].item() for i in rows], ddof)
        assert s > 1, "the floor must not be reached here"
        n = len(rows)
        rho = torch.corrcoef(torch.stack([rewards[rows], scores[rows]]))[0, 1].item()
        assert sum(a * b for a, b in zip(t, z, strict=True)) / (n - ddof) == pytest.approx(rho)
        for i, a, b in zip(rows, t, z, strict=True):
            pull = a - rho * b if std == "attached" else a - scale * b
            truth[i] = -2 * scale / (n * s) * pull / 3  # of three groups
        losses.append((1 - 2 * scale * rho + scale**2) * (n - ddof) / n)
    torch.testing.assert_close(found, truth, **EXACT)
    assert loss.item() == pytest.approx(sum(losses) / 3, rel=1e-12)
    for rows in members(ids):
        assert abs(found[rows].sum()) < 1e-15  # a constant for the whole group moves nothing
        if std == "attached":
            assert abs((found[rows] * scores[rows]).sum()) < 1e-14  # nor does their scale


@pytest.mark.parametrize("spread", [8.0, 0.01])  # above the floor and below it
@pytest.mark.parametrize("std", ["attached", "detached"])
def test_rewards_in_any_order_push_nothing_on_average(std: str, spread: float) -> None:
    """Over all orders of a group's rewards the gradient through the deviation has mean 0, so that whatever sets
    completions apart (their length) is pushed on by its relation to the reward alone. Without it, and below the floor,
    what is left pulls every score back to the group's mean: (2/(N·s²))·(r̂ − mean)."""
    scores, rewards, ids, lengths = groups_of(5, seed=6, spread=spread)
    made = policy("implicit", std=std)
    orders = [torch.tensor(order) for order in itertools.permutations(range(5))]
    mean = torch.stack([made.coefficients(scores, rewards[order], ids, lengths)[0] for order in orders]).mean(0)
    s = max(scores.std().item(), made.std_floor)
    pull = 2 / (5 * s**2) * (scores - scores.mean())
    truth = torch.zeros_like(mean) if (std, spread) == ("attached", 8.0) else pull
    torch.testing.assert_close(mean, truth, rtol=1e-9, atol=1e-12)


def test_groups_of_equal_rewards_are_masked_and_not_counted() -> None:
    scores, rewards, ids, lengths = groups_of(4, 3)
    made = policy("implicit")
    truth, loss = made.coefficients(scores, rewards, ids, lengths)
    equal, single, missing = torch.full((5,), 0.1, dtype=torch.float64), [0.3, NONE, NONE], [NONE, NONE]
    more = torch.cat([rewards, equal, torch.tensor([*single, *missing], dtype=torch.float64)])
    padded = torch.cat([scores, 9 * torch.arange(10.0, dtype=torch.float64)])
    extra = torch.tensor([30] * 5 + [31] * 3 + [32] * 2)
    found, same = made.coefficients(padded, more, torch.cat([ids, extra]), torch.cat([lengths, lengths.new_ones(10)]))
    torch.testing.assert_close(found, torch.cat([truth, torch.zeros(10, dtype=torch.float64)]), **EXACT)
    torch.testing.assert_close(same, loss, **EXACT)
    for name in ("implicit", "gvpo"):
        none, zero = policy(name).coefficients(padded[-10:], more[-10:], extra, lengths.new_ones(10))
        assert zero == 0 and (none == 0).all()


def test_a_completion_without_reward_is_as_if_it_were_not_there() -> None:
    scores, rewards, ids, lengths = groups_of(4, 3)
    rewards[2] = NONE
    rest = [i for i in range(7) if i != 2]
    for name in ("implicit", "gvpo"):
        for score in ("kl_sum", "kl_mean"):
            made = policy(name, score=score)
            found, loss = made.coefficients(scores / 40, rewards, ids, lengths)
            truth, same = made.coefficients(scores[rest] / 40, rewards[rest], ids[rest], lengths[rest])
            assert found[2] == 0 and loss.item() == pytest.approx(same.item(), rel=1e-12)
            torch.testing.assert_close(found[rest], truth, **EXACT)


@pytest.mark.parametrize("std", ["attached", "detached"])
@pytest.mark.parametrize("name", ["implicit", "gvpo"])
def test_a_constant_for_each_prompt_changes_nothing(name: str, std: str) -> None:
    scores, rewards, ids, lengths = groups_of(4, 3)
    made = policy(name, **({"std": std} if name == "implicit" else {}))
    for spread in (1.0, 0.01):  # above the floor and below it
        for one, two in zip(
            made.coefficients(spread * scores, rewards, ids, lengths),
            made.coefficients(spread * scores + 10.0 * ids, rewards, ids, lengths),
            strict=True,
        ):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


V, T, BETA = 4, 3, 0.7


def small_model(g: torch.Generator) -> Tensor:
    """log π of all V^T sequences, from a table of softmaxes for each prefix."""
    first, second, third = (torch.randn(*[V] * n, generator=g, dtype=torch.float64).log_softmax(-1) for n in (1, 2, 3))
    return (first[:, None, None] + second[:, :, None] + third).flatten()


def test_the_partition_function_need_not_be_known() -> None:
    """With log Z(x) estimated from samples of the base, the normalised implicit rewards are those without it."""
    g = torch.Generator().manual_seed(4)
    base, other = small_model(g), small_model(g)
    reward = torch.randn(V**T, generator=g, dtype=torch.float64)
    draws = torch.multinomial(base.exp(), 40_000, replacement=True, generator=g)
    log_z = ((reward[draws] / BETA).exp().mean()).log()
    exact = torch.logsumexp(base + reward / BETA, 0)
    assert abs(log_z - exact) < 0.05 and log_z != exact
    best = base + reward / BETA - exact  # π ∝ base · exp(r/β)
    torch.testing.assert_close(BETA * (best - base) + BETA * exact, reward)  # r_θ is r there: the definition of Z
    group = torch.multinomial(other.exp(), 12, generator=g)
    made = policy("implicit", std="detached", std_floor=1e-3)
    ids, lengths = torch.zeros(12, dtype=torch.int64), torch.full((12,), T)
    found = []
    for scores in (
        (other - base)[group],  # Σ (ℓ − ℓ_ref), which is what the package regresses
        BETA * (other - base)[group] + BETA * log_z,
        BETA * (other - base)[group] + BETA * exact,
    ):
        gradient, _ = made.coefficients(scores, reward[group], ids, lengths)
        t, z = (torch.tensor(standard(x.tolist(), 1)[0]) for x in (reward[group], scores))
        s = standard(scores.tolist(), 1)[1]
        torch.testing.assert_close(t + 12 * s / 2 * gradient, z, rtol=1e-6, atol=1e-6, check_dtype=False)
        found.append(t + 12 * s / 2 * gradient)  # z, solved from the gradient
    for normalised in found[1:]:
        assert (normalised - found[0]).abs().max() < 1e-4
    for name, scale in (("implicit", 1.0), ("gvpo", BETA)):
        optimum = policy(name, scale=scale).coefficients((best - base)[group], reward[group], ids, lengths)
        assert optimum[1].item() == pytest.approx(0, abs=1e-20) and optimum[0].abs().max() < 1e-12
    assert policy("gvpo").coefficients((best - base)[group], reward[group], ids, lengths)[1] > 1e-3  # another β


@pytest.mark.parametrize("score", ["kl_sum", "kl_mean"])
@pytest.mark.parametrize("std", ["attached", "detached"])
@pytest.mark.parametrize("reference", ["init", "old"])
def test_the_start_is_reinforce(reference: str, std: str, score: str) -> None:
    """Where the policy is the reference every score is 0: no NaN, and −(2c/(N·floor))·t times the gradient of r̂."""
    g = torch.Generator().manual_seed(0)
    logp = -torch.rand(5, 6, generator=g, dtype=torch.float64)
    logp.requires_grad_()
    mask = (torch.arange(6) < torch.tensor([6, 1, 3, 4, 2])[:, None]).double()
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5], dtype=torch.float64)
    floor, c = 0.3, 0.8
    made = policy("implicit", reference=reference, std=std, score=score, std_floor=floor, scale=c)
    loss = policy_loss(
        made,
        logp,
        old_logp=logp.detach(),
        mask=mask,
        rewards=rewards,
        groups=torch.zeros(5, dtype=torch.int64),
        ref_logp=None if reference == "old" else logp.detach(),
    )
    (gradient,) = torch.autograd.grad(loss, logp)
    t = torch.tensor(standard(rewards.tolist(), 1)[0], dtype=torch.float64)[:, None]
    if score == "kl_mean":  # the floor is in nats per completion, of 16/5 tokens in the mean
        truth = -2 * c / (5 * floor / (16 / 5)) * t * mask / mask.sum(1, keepdim=True)
    else:
        truth = -2 * c / (5 * floor) * t * mask
    torch.testing.assert_close(gradient, truth, **EXACT)
    assert loss.item() == pytest.approx(4 / 5)  # mean t² with ddof 1


@pytest.mark.parametrize("std", ["attached", "detached"])
def test_the_loss_is_continuous_at_the_floor(std: str) -> None:
    scores, rewards, ids, lengths = groups_of(6)
    deviation = scores.std().item()
    made = policy("implicit", std=std, std_floor=deviation)
    below, above = (made.coefficients(scores * (1 + step), rewards, ids, lengths) for step in (-1e-9, 1e-9))
    assert below[1].item() == pytest.approx(above[1].item(), rel=1e-7)
    if std == "detached":  # whose gradient is continuous too
        torch.testing.assert_close(below[0], above[0], rtol=1e-7, atol=1e-10)
    else:
        assert (below[0] - above[0]).abs().max() > 1e-3


@pytest.mark.parametrize("std", ["attached", "detached"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_below_the_floor_it_is_gvpo(ddof: int, std: str) -> None:
    """(t − c·r̃/floor)² = (r̃_explicit − (c·σ_r/floor)·r̃)² / σ_r²."""
    scores, rewards, ids, lengths = groups_of(5, spread=0.2)
    sigma, floor, c = rewards.std(correction=ddof).item(), 2.5, 0.7
    made = policy("implicit", ddof=ddof, std_floor=floor, scale=c, std=std)
    oracle = policy("gvpo", scale=c * sigma / floor)
    for one, two in zip(
        made.coefficients(scores, rewards, ids, lengths),
        oracle.coefficients(scores, rewards, ids, lengths),
        strict=True,
    ):
        torch.testing.assert_close(one, two / sigma**2, **EXACT)


def test_the_floor_of_mean_scores_is_that_of_sums_over_the_mean_length() -> None:
    scores, rewards, ids, _ = groups_of(4, 5)
    for length in (1, 7):
        lengths = torch.full((9,), length)
        for spread in (1.0, 0.01):
            sums = policy("implicit", std_floor=0.6).coefficients(spread * scores, rewards, ids, lengths)
            means = policy("implicit", std_floor=0.6, score="kl_mean").coefficients(
                spread * scores / length, rewards, ids, lengths
            )
            torch.testing.assert_close(means[0] / length, sums[0], **EXACT)
            torch.testing.assert_close(means[1], sums[1], **EXACT)


def test_gvpo_is_its_loop() -> None:
    scores, rewards, ids, lengths = groups_of(3, 4, spread=1.0)
    leaf = scores.clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for rows in members(ids):
        for i in rows:
            implicit = leaf[i] - sum(leaf[j] for j in rows) / len(rows)
            explicit = rewards[i] - sum(rewards[j] for j in rows) / len(rows)
            total = total + (0.3 * implicit - explicit) ** 2 / len(rows) / 2
    (truth,) = torch.autograd.grad(total, leaf)
    found, loss = policy("gvpo", scale=0.3).coefficients(scores, rewards, ids, lengths)
    torch.testing.assert_close(found, truth, **EXACT)
    torch.testing.assert_close(loss, total.detach(), **EXACT)


def test_scores() -> None:
    logp = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -5.0, -7.0]], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[-1.5, -1.0, 99.0], [-2.0, 99.0, 99.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.0, -2.5, 99.0], [-0.5, 99.0, 99.0]], dtype=torch.float64)
    mask = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    rows = Rows(mask, old_logp=old, ref_logp=ref)
    for options, expected in (
        ({}, [-0.5, 1.5]),
        ({"score": "kl_mean"}, [-0.25, 1.5]),
        ({"reference": "old"}, [0.5, 0.0]),
        ({"reference": "base"}, [-0.5, 1.5]),
    ):
        made = policy("implicit", **options)
        scores = made.scores(logp, rows)
        assert scores.tolist() == pytest.approx(expected)
        slope, none = torch.autograd.grad(scores.sum(), (logp, ref), allow_unused=True)
        per = mask / mask.sum(1, keepdim=True) if "score" in options else mask
        assert torch.equal(slope, per) and none is None
        assert made.needs_reference == (options.get("reference") != "old")
    this = policy("implicit", reference="old").scores(logp, Rows(mask))  # sampled by this very policy
    assert this.tolist() == [0, 0]
    assert torch.equal(torch.autograd.grad(this.sum(), logp)[0], mask)
    demonstrated = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert policy("implicit").scores(logp, Rows(mask, ref_logp=ref, expert=demonstrated)).tolist() == [-1.0, 1.5]
    long, one = torch.full((1, 5000), -0.5).bfloat16(), torch.ones(1, 5000)
    half = policy("implicit").scores(long, Rows(one, ref_logp=-one.bfloat16()))
    assert half.dtype == torch.float32 and half.item() == 2500


def test_coefficients_are_of_the_whole_step() -> None:
    """In float64 whatever the scores are in, also where no gradient is recorded; rows without one add nothing."""
    scores, rewards, ids, lengths = groups_of(4, 3)
    made = policy("implicit")
    truth, loss = made.coefficients(scores, rewards, ids, lengths)
    with torch.no_grad():
        found, same = made.coefficients(scores.float(), rewards.float(), ids, lengths)
    assert found.dtype == torch.float64 and not same.requires_grad
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(same, loss, rtol=1e-5, atol=1e-6)
    logp = torch.zeros(7, 1, requires_grad=True)
    rows = Rows(torch.ones(7, 1), ref_logp=torch.ones(7, 1), coefficient=truth)
    total, _ = made.loss(logp, rows, Counts(7, 7))
    torch.testing.assert_close(torch.autograd.grad(total, logp)[0][:, 0], truth.float())
    deviations = [standard([scores[i].item() for i in rows], 1)[1] for rows in members(ids)]
    assert made.deviation(scores, rewards, ids).item() == pytest.approx(sum(deviations) / 2)


def test_one_step_of_descent_raises_what_is_rewarded() -> None:
    """From the reference on, over all sequences of a small model: the correlation of r̂ and r grows from 0 towards 1,
    and the policy of GVPO becomes base · exp(r/β)."""
    g = torch.Generator().manual_seed(2)
    z = torch.randn(V, generator=g, dtype=torch.float64)
    base = z.log_softmax(0)
    reward = torch.tensor([1.0, 0.0, 0.5, -1.0], dtype=torch.float64)
    ids, lengths = torch.zeros(V, dtype=torch.int64), torch.ones(V)
    for made, rate in ((policy("implicit"), 0.5), (policy("gvpo", scale=BETA), 0.5)):
        theta = z.clone().requires_grad_()
        for _ in range(400):
            logp = theta.log_softmax(0)
            loss = made.group_loss(logp - base, reward, ids, lengths)
            (gradient,) = torch.autograd.grad(loss, theta)
            theta = (theta - rate * gradient).detach().requires_grad_()
        change = theta.log_softmax(0) - base
        assert torch.corrcoef(torch.stack([change.detach(), reward]))[0, 1] > 0.9999
        if not isinstance(made, Implicit) or made == policy("gvpo", scale=BETA):
            torch.testing.assert_close(change, (base + reward / BETA).log_softmax(0) - base, rtol=1e-4, atol=1e-4)


def test_every_pair_of_options_is_finite_at_the_start_and_far_from_it() -> None:
    for std, score, ddof in itertools.product(("attached", "detached"), ("kl_sum", "kl_mean"), (0, 1)):
        made = policy("implicit", std=std, score=score, ddof=ddof)
        for spread in (0.0, 1e-30, 1e-8, 1e4):
            scores, rewards, ids, lengths = groups_of(2, 3, spread=spread)
            found, loss = made.coefficients(scores.float(), rewards.float(), ids, lengths)
            assert found.isfinite().all() and loss.isfinite()
