"""The targets of the studies graded and adaptive, against the distributions that they stand for."""

import importlib.util
import itertools
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

import heatbath
from heatbath.ideas.engine import dense_loss
from heatbath.ideas.statistics import TokenStats

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
V, BETA = 5, 3.0


@pytest.fixture(scope="module")
def graded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("graded", BENCHMARKS / "graded.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_what_demonstrations_go_on_with_is_lifted_in_the_bases_proportions(graded: ModuleType) -> None:
    """The mean of the demonstrations' targets at each prefix is softmax(log p + β·[some demonstration goes on so])."""
    torch.manual_seed(0)
    answers = [[0, 1, 2], [0, 1, 3], [0, 1, 2], [0, 4], [3, 3, 3], [0, 1, 3, 1]]
    base = {
        prefix: torch.randn(V).double().log_softmax(0)
        for n in range(4)
        for prefix in itertools.product(range(V), repeat=n)
    }
    logp = [[float(base[tuple(a[:t])][token]) for t, token in enumerate(a)] for a in answers]
    targets: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for answer, shares in zip(answers, graded.allowed(answers, logp, BETA), strict=True):
        for t, (expert, keep) in enumerate(shares):
            prefix = tuple(answer[:t])
            onehot = torch.nn.functional.one_hot(torch.tensor(answer[t]), V).double()
            targets.setdefault(prefix, []).append(expert * onehot + keep * base[prefix].exp())
    assert len(targets) == 6
    for prefix, own in targets.items():
        allowed = [v for v in range(V) if any(tuple(a[: len(prefix) + 1]) == (*prefix, v) for a in answers)]
        lifted = base[prefix].clone()
        lifted[allowed] += BETA
        torch.testing.assert_close(torch.stack(own).mean(0), lifted.softmax(0), rtol=0, atol=1e-12)


def test_a_token_is_worth_what_the_base_makes_of_it(graded: ModuleType) -> None:
    """w = p·E[y] / (p·E[y] + (1 − p)·E[others]); without a lift that is the base, and a fatal token sinks below it."""
    answer, logp = [7, 8], [math.log(0.25), math.log(0.5)]
    before = [((7, 8), True)] * 3 + [((7, 9), False)] + [((6,), False)] * 12
    found = {("q", ()): before, ("q", (7,)): [((7, 8), True)] * 12 + [((7, 9), False)] * 4}
    for lift in (0.0, 2.0, 50.0):
        (expert, keep), (last, kept) = graded.graded("q", answer, logp, found, 0.5, lift)
        assert expert + keep == pytest.approx(1) and last + kept == pytest.approx(1)
        own, others = (1 + math.expm1(lift) * share for share in (13 / 18, 1 / 14))
        w = 0.25 * own / (0.25 * own + 0.75 * others)
        assert expert + keep * 0.25 == pytest.approx(w)
    assert graded.graded("q", answer, logp, found, 0.5, 0.0) == [pytest.approx((0, 1)), pytest.approx((0, 1))]
    found = {("q", ()): [((7, 9), False)] * 4 + [((6,), True)] * 12, ("q", (7,)): [((7, 9), False)] * 16}
    [(expert, keep), _] = graded.graded("q", answer, logp, found, 0.0, 5.0)
    assert expert + keep * 0.25 < 0.25
    assert graded.graded("q", answer, [math.log(0.99)] * 2, found, 0.5, 5.0) == [(0.0, 1.0)] * 2


def test_the_mixture_is_the_cross_entropy_to_its_target() -> None:
    goal = heatbath.objective(f"{BENCHMARKS / 'soft_targets.py'}:Mixture", target="x")
    torch.manual_seed(1)
    hidden, head = torch.randn(6, 4).double(), torch.randn(V, 4).double()
    base_hidden, base_head = torch.randn(6, 4).double(), torch.randn(V, 4).double()
    labels, expert, keep = torch.randint(V, (6,)), torch.randn(6).double(), torch.rand(6).double()
    loss = dense_loss(
        goal,
        hidden @ head.T,
        labels,
        ref_logits=base_hidden @ base_head.T,
        columns={"x_expert": expert, "x_keep": keep},
    )
    onehot = torch.nn.functional.one_hot(labels, V)
    target = expert[:, None] * onehot + keep[:, None] * (base_hidden @ base_head.T).softmax(-1)
    expected = -(target * (hidden @ head.T).log_softmax(-1)).sum(-1)
    torch.testing.assert_close(loss, expected)


def test_beta_follows_the_policy_and_the_problem() -> None:
    torch.manual_seed(2)
    logp, ref_logp, ref_ce = -4 * torch.rand(100), -4 * torch.rand(100), torch.rand(100)
    stats = TokenStats(vocab_size=V, logp=logp, ref_logp=ref_logp, ref_ce=ref_ce)
    goal = heatbath.objective(f"{BENCHMARKS / 'soft_targets.py'}:Quantile", share=0.1)
    beta = float(goal.diagnostics(stats)["beta"][0])
    assert int((-logp > beta).sum()) == 10
    torch.testing.assert_close(goal(stats), heatbath.objective("gift", beta=beta)(stats))
    solved = torch.tensor([0.0, 1.0, 0.5, 0.25]).repeat(25)
    stats = TokenStats(vocab_size=V, logp=logp, ref_logp=ref_logp, ref_ce=ref_ce, columns={"solved": solved})
    goal = heatbath.objective(f"{BENCHMARKS / 'soft_targets.py'}:Difficulty", easy=1.0, hard=3.0)
    for share, own in ((0.0, 3.0), (1.0, 1.0), (0.5, 2.0), (0.25, 2.5)):
        rows = solved == share
        torch.testing.assert_close(goal(stats)[rows], heatbath.objective("gift", beta=own)(stats)[rows])
