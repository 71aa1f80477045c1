"""The targets of the studies graded and adaptive, against the distributions that they stand for."""

import importlib.util
import itertools
import math
import random
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import pytest
import torch

import heatbath
from heatbath import recipe as recipes
from heatbath.data import sources
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


def test_values_are_those_of_the_verifiers_gibbs_target(graded: ModuleType) -> None:
    """Against the exact conditionals of p·e^{lift·right} along an answer, where all 27 answers are listed and those of
    the base are drawn by the thousand."""
    lift, length, size = 3.0, 3, 3
    generator = torch.Generator().manual_seed(3)
    base = {
        prefix: torch.randn(size, generator=generator).double().softmax(0)
        for n in range(length)
        for prefix in itertools.product(range(size), repeat=n)
    }
    every = list(itertools.product(range(size), repeat=length))
    p = {a: math.prod(float(base[a[:t]][a[t]]) for t in range(length)) for a in every}
    good = {a: a in [(0, 1, 2), (1, 1, 1), (2, 0, 0), (0, 2, 2)] for a in every}
    rng = random.Random(0)
    drawn = {}
    for n in range(length):
        for prefix in itertools.product(range(size), repeat=n):
            own = [a for a in every if a[:n] == prefix]
            chosen = rng.choices(own, [p[a] for a in own], k=20_000)
            drawn["q", prefix] = [(a, good[a]) for a in chosen]
    for answer in ((0, 1, 2), (1, 0, 2), (2, 0, 0)):
        logp = [math.log(float(base[answer[:t]][answer[t]])) for t in range(length)]
        shares = graded.graded("q", list(answer), logp, drawn, good[answer], lift)
        for t, (expert, keep) in enumerate(shares):
            weights = {a: p[a] * math.exp(lift * good[a]) for a in every if a[:t] == answer[:t]}
            exact = sum(w for a, w in weights.items() if a[t] == answer[t]) / sum(weights.values())
            assert expert + keep * math.exp(logp[t]) == pytest.approx(exact, abs=0.02)
    assert max(abs(expert) for expert, _ in shares) > 0.2  # far from the base, so that it could have been missed


def test_where_nothing_tells_a_token_is_left_to_the_base(graded: ModuleType) -> None:
    took = {("q", ()): [((7, 8), False)] * 8, ("q", (7,)): [((7, 9), True)] * 8}
    [first, last] = graded.graded("q", [7, 8], [math.log(0.9), math.log(0.5)], took, True, 5.0)
    assert first == (0.0, 1.0)  # every answer took it: its worth beside others is not known
    assert last[0] + last[1] * 0.5 == pytest.approx(0.5)  # after it both are right
    assert graded.graded("q", [7, 8], [math.log(0.99)] * 2, took, True, 5.0) == [(0.0, 1.0)] * 2


@pytest.mark.thorough
def test_the_files_of_a_recipe_are_what_its_runs_learn_from(graded: ModuleType, tmp_path: Path) -> None:
    """Written by the script, read by the recipe: of each prefix the shares of its demonstrations have the mean 1."""
    line = [sys.executable, str(BENCHMARKS / "graded.py"), "study-paths", "data.paths=4", "data.demos=24"]
    line += ["--samples", "1", "--values", "--out", str(tmp_path / "data")]
    subprocess.run(line, check=True, capture_output=True)
    recipe = recipes.load("study-graded", [f"data.folder={tmp_path / 'data'}", "strategy=allowed"])
    rows = sources.of(recipe).demos
    assert len({row.id for row in rows}) == 24 and len(rows) < 4 * 24  # some forms give the same text
    prefixes: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        assert row.solution is not None
        expert, keep = (row.columns[f"allowed_{name}"] for name in ("expert", "keep"))
        assert isinstance(expert, list) and isinstance(keep, list) and len(expert) == len(row.solution) + 1
        for t, (one, other) in enumerate(zip(expert, keep, strict=True)):
            prefixes[row.id, row.solution[:t]].append(one + other)
    assert all(sum(own) / len(own) == pytest.approx(1) for own in prefixes.values())


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
