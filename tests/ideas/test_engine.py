"""The chunked engine against plain autograd over full logits, in float64 on a small vocabulary, and what it refuses."""

from dataclasses import dataclass

import pytest
import torch
from formulas import CASES, Case, case
from problems import IGNORE, Problem, small

from heatbath.ideas.engine import dense_loss, label_logps, linear_loss, linear_loss_with_sums, linear_stats
from heatbath.ideas.gift import Gift, GiftSequence
from heatbath.ideas.objectives import Dft, Entropy, IwSft, Kd, LabelSmoothing, Pear, Psft, Sft
from heatbath.ideas.statistics import DIFFERENTIABLE, STATS, TokenStats


@dataclass(frozen=True)
class Everything:
    """Nonlinear in every differentiable statistic, and reads every constant and a column."""

    needs = (*STATS,)
    topk = 7

    def __call__(self, s: TokenStats) -> torch.Tensor:
        ratio = (s.logp - s.old_logp).exp()
        mixed = -ratio + s.entropy**2 - s.mean_logp * s.ref_ce + s.rev_ce * s.ref_entropy + s.ref_logp * s.logp
        return mixed + s.topk_entropy * s.entropy * s.ref_ce - s.topk_mass * s.rev_ce**2 + s.mean_logp**2


ALL = [*CASES, Case("everything", Everything(), None)]
EVERY = pytest.mark.parametrize("c", ALL, ids=lambda c: c.name)


def same(problem: Problem, found: torch.Tensor, truth: torch.Tensor) -> None:
    torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-12)
    for ours, expected in zip(problem.gradients(found), problem.gradients(truth), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
@EVERY
def test_fused_equals_dense(c: Case, chunk: int) -> None:
    """Loss, dh and dW, under an upstream gradient that is not 1, with ignored tokens inside the sequences."""
    problem = small()
    same(problem, 2.5 * problem.fused(c.objective, chunk=chunk), 2.5 * problem.dense(c.objective).sum())


@EVERY
def test_scale_and_softcap_are_those_of_the_logits(c: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a chunk of 8 is worked on in blocks of 3 rows, as one of a real vocabulary is."""
    monkeypatch.setattr("heatbath.ideas.rows.BLOCK_ELEMENTS", 3 * 53)
    problem = small()
    same(problem, problem.fused(c.objective, chunk=8), problem.dense(c.objective).sum())
    for shape in ({"scale": 0.3}, {"softcap": 6.0}, {"scale": 1.7, "softcap": 9.0}):
        same(problem, problem.fused(c.objective, chunk=8, **shape), problem.dense(c.objective, **shape).sum())


@EVERY
def test_ignored_tokens_are_as_if_they_were_not_there(c: Case) -> None:
    """Also where a column or a sequence runs over them; their own gradient is exactly zero."""
    problem = small()
    without = problem.at(problem.valid)
    found, alone = problem.fused(c.objective, chunk=9), without.fused(c.objective, chunk=9)
    torch.testing.assert_close(found, alone, rtol=1e-13, atol=0)
    (dh, dw), (dh_alone, dw_alone) = problem.gradients(found), without.gradients(alone)
    assert (dh[~problem.valid] == 0).all()
    torch.testing.assert_close(dh[problem.valid], dh_alone)
    torch.testing.assert_close(dw, dw_alone)
    assert (problem.dense(c.objective)[~problem.valid] == 0).all()


@EVERY
def test_a_batch_of_ignored_tokens_is_a_zero_with_gradient(c: Case) -> None:
    problem = small()
    problem.labels[:] = IGNORE
    for loss in (problem.fused(c.objective), problem.dense(c.objective).sum()):
        assert loss.item() == 0
        assert all((g == 0).all() for g in problem.gradients(loss))


def test_frozen_parts_get_no_gradient() -> None:
    problem = small()
    target = Gift(4.0, smoothing=0.1)
    dh, dw = problem.gradients(problem.dense(target).sum())
    problem.head.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(problem.fused(target), [problem.hidden]), (dh,))
    problem.head.requires_grad_()
    problem.hidden.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(problem.fused(target), [problem.head]), (dw,))
    problem.head.requires_grad_(False)
    assert not problem.fused(target).requires_grad


def test_inputs_may_be_views_and_are_left_as_they_were() -> None:
    problem = small()
    before = {k: v.clone() for k, v in vars(problem).items() if isinstance(v, torch.Tensor)}
    columns = set(problem.columns)
    expected = problem.dense(GiftSequence()).sum()
    wide = torch.stack([problem.hidden, problem.hidden], -1).detach().requires_grad_()
    tall = problem.head.detach().T.contiguous().requires_grad_()
    given = {**problem.base, "columns": problem.columns, "segments": problem.segments, "chunk": 8}
    found = linear_loss(GiftSequence(), wide[..., 0], tall.T, problem.labels, **given)
    torch.testing.assert_close(found, expected)
    for ours, truth in zip(torch.autograd.grad(found, [wide, tall]), problem.gradients(expected), strict=True):
        torch.testing.assert_close(ours[..., 0] if ours.dim() == 3 else ours.T, truth)
    assert set(problem.columns) == columns
    for name, value in before.items():
        assert torch.equal(getattr(problem, name), value)


def test_no_gradient_is_formed_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation pass costs its own products only."""
    problem = small()
    expected = problem.dense(Gift(4.0)).sum().detach()
    monkeypatch.setattr("heatbath.ideas.passes.Gradients.add", lambda *_: pytest.fail("a gradient is formed"))
    with torch.no_grad():
        torch.testing.assert_close(problem.fused(Gift(4.0)), expected)


class Undeclared:
    """Reads log π(y), which is always there, without naming it."""

    needs = ("entropy",)

    def __call__(self, stats: TokenStats) -> torch.Tensor:
        return -stats.logp - 0.1 * stats.entropy


def test_a_statistic_that_can_be_read_has_its_gradient() -> None:
    problem = small()
    same(problem, problem.fused(Undeclared()), problem.dense(Undeclared()).sum())


def test_second_derivatives_are_refused() -> None:
    problem = small()
    (first,) = torch.autograd.grad(problem.fused(Sft()) ** 2, [problem.hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    stats = problem.stats("logp")
    (first,) = torch.autograd.grad((stats.logp**2).sum(), [problem.hidden], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_a_second_backward_is_refused_not_wrong() -> None:
    problem = small()
    loss = problem.fused(Sft())
    loss.backward(retain_graph=True)
    once = problem.hidden.grad.clone()
    with pytest.raises(RuntimeError, match="handed its gradient over"):
        loss.backward()
    assert torch.equal(problem.hidden.grad, once)


@EVERY
def test_sums_come_with_the_same_loss_and_gradient(c: Case) -> None:
    problem = small()
    given = {**problem.base, "columns": problem.columns, "segments": problem.segments, "chunk": 8}
    out = linear_loss_with_sums(c.objective, problem.hidden, problem.head, problem.labels, **given)
    same(problem, out.loss, problem.fused(c.objective))
    assert {"objective", "nll", "entropy"} <= set(out.sums) and out.tokens == problem.valid.sum()
    torch.testing.assert_close(out.sums["objective"], out.loss.detach().double())
    assert all(torch.isfinite(value) and not value.requires_grad for value in out.sums.values())


def test_sums_are_the_token_sums() -> None:
    problem, target = small(), Gift(4.0)
    out = linear_loss_with_sums(target, problem.hidden, problem.head, problem.labels, **problem.base, chunk=8)
    valid = problem.labels != IGNORE
    logp, ref = (z.log_softmax(-1)[valid] for z in problem.logits())
    ref_logp = ref.gather(-1, problem.labels[valid, None]).squeeze(-1)
    base = TokenStats(vocab_size=53, ref_logp=ref_logp)
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


def literal_statistics(problem: Problem, topk: int, **shape: float) -> dict[str, torch.Tensor]:
    """Every statistic straight from its definition, [N], differentiable, 0 where the label is ignored."""
    z, r = problem.logits(**shape)
    pi, p, log_pi, log_p = z.softmax(-1), r.softmax(-1), z.log_softmax(-1), r.log_softmax(-1)
    label = problem.labels.clamp_min(0)[:, None]
    best = pi.detach().sort(descending=True).values[:, :topk]
    share = best / best.sum(-1, keepdim=True)
    found = {
        "logp": log_pi.gather(-1, label).squeeze(-1),
        "entropy": -(pi * log_pi).sum(-1),
        "mean_logp": log_pi.sum(-1) / z.shape[-1],
        "ref_ce": -(p * log_pi).sum(-1),
        "rev_ce": -(pi * log_p).sum(-1),
        "ref_logp": log_p.gather(-1, label).squeeze(-1),
        "ref_entropy": -(p * log_p).sum(-1),
        "topk_entropy": -(share * share.log()).sum(-1),
        "topk_mass": best.sum(-1),
    }
    assert set(found) == set(STATS)
    return {name: value * problem.valid for name, value in found.items()}


@pytest.mark.parametrize("shape", [{}, {"scale": 1.7, "softcap": 9.0}], ids=["plain", "scale and softcap"])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_statistics_are_their_definitions(chunk: int, shape: dict) -> None:
    """Values and gradients under a random upstream of each token, and through a nonlinear function of all."""
    problem = small()
    found = problem.stats(*STATS, topk=6, chunk=chunk, columns=problem.columns, **shape)
    truth = literal_statistics(problem, 6, **shape)
    assert found.vocab_size == 53 and torch.equal(found.old_logp, problem.columns["old_logp"])
    upstream = torch.randn(37, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name in STATS:
        value = getattr(found, name)
        torch.testing.assert_close(value, truth[name], rtol=1e-11, atol=1e-12)
        assert value.requires_grad == (name in DIFFERENTIABLE)
        assert (value[~problem.valid] == 0).all()
        if name in DIFFERENTIABLE:
            ours = torch.autograd.grad((upstream * value).sum(), [problem.hidden, problem.head], retain_graph=True)
            expected = problem.gradients((upstream * truth[name]).sum())
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)
            truth = literal_statistics(problem, 6, **shape)
    target = Everything()
    found.columns["old_logp"] = problem.columns["old_logp"].clone()
    whole = TokenStats(columns=found.columns, **literal_statistics(problem, 6, **shape))
    same(problem, (upstream * target(found)).sum(), (upstream * target(whole)).sum())


@pytest.mark.parametrize("name", STATS)
def test_each_statistic_can_be_asked_for_alone(name: str) -> None:
    problem = small()
    found, truth = getattr(problem.stats(name, topk=4), name), literal_statistics(problem, 4)[name]
    torch.testing.assert_close(found, truth, rtol=1e-11, atol=1e-12)
    if name in DIFFERENTIABLE:
        ours, expected = problem.gradients(found.sum()), problem.gradients(truth.sum())
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_label_logps_are_logp_without_gradient() -> None:
    problem = small()
    found = label_logps(problem.hidden, problem.head, problem.labels, chunk=5)
    assert not found.requires_grad
    torch.testing.assert_close(found, problem.stats("logp").logp.detach())


# A base known at some tokens only: log p(y) of all, hidden states of a few (`reference.py`, surprise cache).


def partly(problem: Problem, rows: torch.Tensor) -> dict:
    ref_logp = problem.logits()[1].log_softmax(-1).gather(-1, problem.labels.clamp_min(0)[:, None]).squeeze(-1)
    return {"ref_logp": ref_logp, "ref_hidden": problem.ref_hidden[rows], "ref_rows": rows}


@pytest.mark.parametrize("name", ["kd", "asft", "gift", "gift smoothed", "gift column", "gift_sequence", "iw_sft"])
def test_a_base_known_everywhere_by_rows_is_the_base(name: str) -> None:
    problem, target = small(), case(name).objective
    some = torch.randperm(37, generator=torch.Generator().manual_seed(2))
    same(problem, problem.fused(target, chunk=6, **partly(problem, some)), problem.dense(target).sum())


@dataclass(frozen=True)
class Certain:
    """The objective with the base taken to be certain of the label at the tokens that `known` marks 0."""

    objective: object
    needs = ("logp", "ref_ce", "ref_logp", "ref_entropy", "mean_logp")

    def __call__(self, s: TokenStats) -> torch.Tensor:
        s.ref_ce = torch.where(s.known > 0, s.ref_ce, -s.logp)
        s.ref_entropy = torch.where(s.known > 0, s.ref_entropy, 0.0)
        return self.objective(s)


@pytest.mark.parametrize("name", ["kd", "asft", "gift", "gift smoothed", "gift_sequence"])
@pytest.mark.parametrize("rows", [[30, 2, 10, 11, 36, 5], []], ids=["some rows", "no rows"])
def test_where_the_base_is_not_known_it_is_certain_of_the_label(name: str, rows: list[int]) -> None:
    """Rows in any order, some of them of ignored tokens."""
    problem, target = small(), case(name).objective
    rows = torch.tensor(rows, dtype=torch.long)
    given = partly(problem, rows)
    known = torch.zeros(37, dtype=torch.float64).index_fill(0, rows, 1.0)
    problem.columns["known"] = known
    if isinstance(target, GiftSequence):
        stats = TokenStats(ref_logp=given["ref_logp"][problem.valid])
        keep = target.sequence_weights(stats, problem.segments[problem.valid])
        problem.columns["sequence_weight"] = torch.zeros_like(known).masked_scatter(problem.valid, keep)
    truth = problem.dense(Certain(target)).sum()
    same(problem, problem.fused(target, chunk=6, **given), truth)
    statistics = problem.stats("ref_ce", "ref_entropy", "logp", chunk=6, **given)
    literal = literal_statistics(problem, 3)
    ref_ce = torch.where(known > 0, literal["ref_ce"], -literal["logp"])
    same(problem, (statistics.ref_ce**2).sum(), (ref_ce**2).sum())
    torch.testing.assert_close(statistics.ref_entropy, literal["ref_entropy"] * known)


@pytest.mark.parametrize("target", [Gift(4.0), Gift(12.0), Gift(4.0, 0.02)], ids=str)
def test_leaving_a_row_of_the_base_out_costs_two_times_one_minus_w(target: Gift) -> None:
    """In L1 of the token's logits (an identity for a head, so that dh is dz); exactly that much without smoothing."""
    g = torch.Generator().manual_seed(0)
    eye = torch.eye(40, dtype=torch.float64)
    z, r = (4 * torch.randn(30, 40, generator=g, dtype=torch.float64) for _ in range(2))
    problem = Problem(z.requires_grad_(), eye, r, eye, torch.randint(40, (30,), generator=g), torch.zeros(30).long())
    rows = torch.arange(0, 30, 3)
    given = partly(problem, rows)
    (found,) = torch.autograd.grad(problem.fused(target, chunk=7, **given), [problem.hidden])
    (exact,) = torch.autograd.grad(problem.dense(target).sum(), [problem.hidden])
    apart = (found - exact).abs().sum(-1)
    bound = 2 * (1 - target.target_mass(TokenStats(vocab_size=40, ref_logp=given["ref_logp"])))
    bound[rows] = 0.0
    assert (apart <= bound + 1e-12).all() and (bound > 0.1).any()
    if target.smoothing == 0:
        torch.testing.assert_close(apart, bound, rtol=1e-9, atol=1e-12)


def test_a_base_known_in_part_needs_its_surprises_and_has_no_reverse_direction() -> None:
    problem = small()
    rows = torch.tensor([1, 2])
    some = {"ref_hidden": problem.ref_hidden[rows], "ref_rows": rows}
    with pytest.raises(ValueError, match="needs `ref_logp` of all"):
        problem.fused(Gift(4.0), **some)
    with pytest.raises(ValueError, match="cannot give rev_ce"):
        problem.fused(Kd(direction="reverse"), **partly(problem, rows))


def test_surprises_alone_are_enough_for_a_ratio_to_the_base() -> None:
    problem = small()
    given = {"ref_logp": partly(problem, torch.tensor([0]))["ref_logp"], "ref_hidden": None, "ref_head": None}
    same(problem, problem.fused(IwSft(), **given), problem.dense(IwSft()).sum())


# What is refused, and what a padded vocabulary does.


class Reduces:
    needs = ("logp",)

    def __call__(self, stats: TokenStats) -> torch.Tensor:
        return -stats.logp.mean()


class AsksForMore:
    needs = ("logp", "perplexity")

    def __call__(self, stats: TokenStats) -> torch.Tensor:
        return -stats.logp


@pytest.mark.parametrize(
    ("target", "missing", "message"),
    [
        (Gift(1.0), "base", "Gift reads the base model: pass its hidden states and head"),
        (IwSft(), "base", "IwSft reads the base model"),
        (Psft(), "columns", r"Psft reads the column 'old_logp', \[N\]: pass it in `columns`"),
        (case("gift column").objective, "columns", "Gift reads the column 'beta'"),
        (GiftSequence(), "segments", r"GiftSequence weighs whole sequences: pass `segments` \[N\]"),
        (Reduces(), "nothing", "Reduces returned shape .* never reduces"),
        (AsksForMore(), "nothing", r"AsksForMore needs unknown statistics \['perplexity'\]; there are logp"),
    ],
)
def test_objectives_that_cannot_work_are_refused(target: object, missing: str, message: str) -> None:
    problem = small()
    z, r = problem.logits()
    given = {"columns": problem.columns, "segments": problem.segments}
    given.pop(missing, None)
    dense, fused = ({}, {}) if missing == "base" else ({"ref_logits": r}, problem.base)
    with pytest.raises(ValueError, match=message):
        dense_loss(target, z, problem.labels, **given, **dense)
    for engine in (linear_loss, linear_loss_with_sums):
        with pytest.raises(ValueError, match=message):
            engine(target, problem.hidden, problem.head, problem.labels, **given, **fused)


@pytest.mark.parametrize(
    ("target", "changed", "message"),
    [
        (Gift(1.0), {"ref_hidden": None}, "Gift reads the base model"),
        (Gift(1.0), {"ref_head": None}, "Gift reads the base model"),
        (Gift(1.0), {"ref_hidden": None, "ref_logp": torch.zeros(37)}, "Gift reads the base model"),
        (Pear(), {"columns": {"old_logp": torch.zeros(37)}}, "Pear reads the column 'generator_logp'"),
        (Sft(), {"backend": "abacus"}, "no backend 'abacus'"),
    ],
)
def test_half_of_what_is_needed_is_not_enough(target: object, changed: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small().fused(target, **changed)


def test_misfit_shapes_are_named() -> None:
    problem = small()
    for changed in ({"hidden": problem.hidden[:, 1:]}, {"labels": problem.labels[1:]}, {"hidden": problem.hidden[1:]}):
        given = {"hidden": problem.hidden, "head": problem.head, "labels": problem.labels} | changed
        with pytest.raises(ValueError, match=r"do not fit \[N, d\], \[V, d\] and \[N\]"):
            linear_loss(Sft(), **given)
    problem.hidden.full_tensor = lambda: problem.hidden
    with pytest.raises(ValueError, match=r"`hidden` is a DTensor: gather it once with hidden\.full_tensor\(\)"):
        problem.fused(Sft())
    problem = small()
    with pytest.raises(ValueError, match="52 rows in ref_head, 53 in head"):
        problem.fused(Gift(1.0), ref_head=problem.ref_head[1:])


@pytest.mark.parametrize("name", ["ref_hidden", "columns", "segments", "ref_logp"])
@pytest.mark.parametrize("count", [1, 36, 38])
def test_inputs_that_are_not_one_per_token_are_named(name: str, count: int) -> None:
    """A shifted column would weigh each token by its neighbour's number."""
    problem = small()
    problem.labels.clamp_min_(0)
    wrong = {
        "ref_hidden": torch.zeros(count, 12, dtype=torch.float64),
        "columns": {"old_logp": torch.zeros(count, dtype=torch.float64)},
        "segments": torch.zeros(count, dtype=torch.long),
        "ref_logp": torch.zeros(count, dtype=torch.float64),
    }
    target = {"columns": Psft(), "segments": GiftSequence()}.get(name, Gift(4.0))
    with pytest.raises(ValueError, match="old_logp" if name == "columns" else name):
        problem.fused(target, **{name: wrong[name]})


def test_unknown_statistics_and_those_without_a_base_are_named() -> None:
    problem = small()
    with pytest.raises(ValueError, match=r"unknown statistics \['perplexity'\]; there are logp"):
        problem.stats("logp", "perplexity")
    for name in ("ref_ce", "rev_ce", "ref_logp", "ref_entropy"):
        with pytest.raises(ValueError, match="need its hidden states and head"):
            linear_stats(problem.hidden, problem.head, problem.labels, need=("logp", name))


@pytest.mark.parametrize("c", [c for c in CASES if "mean_logp" not in c.objective.needs], ids=lambda c: c.name)
def test_padded_logits_of_minus_infinity_have_no_probability_and_no_gradient(c: Case) -> None:
    """As some models mask their padding rows: finite, and as if the padding were cut off."""
    problem = small()
    z, r = (x.detach() for x in problem.logits())
    pad = torch.full((37, 4), -torch.inf, dtype=torch.float64)
    given = {"columns": problem.columns, "segments": problem.segments}
    found = []
    for width in (0, 4):
        logits = torch.cat([z, pad[:, :width]], -1).requires_grad_()
        ref = torch.cat([r, pad[:, :width]], -1)
        loss = dense_loss(c.objective, logits, problem.labels, ref_logits=ref, **given)
        found.append((loss.detach(), torch.autograd.grad(loss.sum(), logits)[0]))
    (loss, dz), (padded_loss, padded_dz) = found
    torch.testing.assert_close(padded_loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(padded_dz, torch.cat([dz, torch.zeros_like(pad)], -1), rtol=1e-11, atol=1e-12)


def test_rows_that_are_sliced_off_the_head_leave_the_sum() -> None:
    """A padded vocabulary takes part unless its rows are cut: label smoothing spreads over them, as in torch."""
    problem = small()
    cut = problem.head[:50]
    problem.labels.clamp_max_(49)
    for target in (Sft(), LabelSmoothing(0.2), Entropy(0.1), Dft()):
        found = linear_loss(target, problem.hidden, cut, problem.labels)
        expected = dense_loss(target, (problem.hidden @ problem.head.T)[:, :50], problem.labels).sum()
        same(problem, found, expected)
