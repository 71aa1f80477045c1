"""Findings about the start, on rows written here: what provokes each, its edges, and what must not."""

import numpy as np
import pytest
import torch
from scipy.special import expit, logit

from heatbath import recipe as recipes
from heatbath.data.rendering import Rendered
from heatbath.ideas.gift import Gift
from heatbath.ideas.passk import pass_at_k
from heatbath.ideas.statistics import TokenStats
from heatbath.report.findings import Finding, Seen, Unjudged, find, unjudged
from heatbath.report.seen import counted
from heatbath.report.start_findings import (
    FLOOR,
    late_checkpoint,
    over_constrained,
    target_underflow,
    truncation,
    under_constrained,
)

WARM = recipes.parse({"model": "m", "data": {"source": "arithmetic"}, "sft": {}})
BOTH = recipes.parse({"model": "m", "data": {"source": "arithmetic"}, "sft": {}, "rl": {}})
COLD = recipes.parse({"model": "m", "data": {"source": "arithmetic"}, "rl": {}})


def validations(*pairs: tuple[float, float]) -> list[dict]:
    """Rows as SFT logs them, a validation every 10 steps from before the first."""
    steps = [{"step": 10 * i + 5, "nll": 0.5, "entropy": 0.1} for i in range(len(pairs))]
    return [*steps, *({"step": 10 * i, "val/nll": n, "val/entropy": h} for i, (n, h) in enumerate(pairs))]


def late(*nll: float, recipe=WARM) -> Finding | Unjudged | None:
    return late_checkpoint(Seen(recipe, sft=validations(*((n, 0.1) for n in nll))))


def test_a_start_past_its_minimum() -> None:
    found = late(1.0, 0.5, 0.4, 0.45)
    assert found.number == pytest.approx(0.05) and "0.450 at step 30" in found.says and "12.5% above" in found.says
    assert "0.400 at step 20" in found.says and "sft.max_steps = 20" in found.remedy
    assert late(1.0, 0.5, 0.4, 0.4119) is None and isinstance(late(1.0, 0.5, 0.4, 0.4121), Finding)
    assert late(1.0, 0.5, 0.6, 0.4) is None  # a hump before
    worse = late(0.4, 0.5)
    assert "before training" in worse.says and "max_steps" not in worse.remedy and "sft.lr" in worse.remedy
    assert late(0.4).why == "it takes 2 measurements of the validation NLL (data.validation), the run has 1"
    assert late_checkpoint(Seen(WARM)) is None and late(0.4, 0.5, recipe=COLD) is None


def test_checkpoints_of_equal_worth_are_seldom_told_late() -> None:
    draw = np.random.default_rng(0)
    told = sum(late(*(0.5 * (1 + 0.01 * draw.normal(size=6)))) is not None for _ in range(1000))
    assert 20 < told < 120  # 7 %
    assert not any(late(*(0.5 * (1 + 0.005 * draw.normal(size=6)))) for _ in range(1000))


def curves(base: np.ndarray, start: np.ndarray, n: int = 8, seed: int = 0, **names) -> Seen:
    """Samples of two policies whose problems are solved with these probabilities."""
    draw = np.random.default_rng(seed)
    right = {
        policy: ([f"p{i}" for i in range(len(p))], np.full(len(p), n), draw.binomial(n, p))
        for policy, p in (("base", base), ("init", start))
    }
    return Seen(WARM, right=right)


ABILITIES = np.random.default_rng(1).beta(1, 2, size=60)


def test_a_start_whose_samples_are_all_alike() -> None:
    seen = curves(ABILITIES, (np.random.default_rng(2).random(60) < 0.33).astype(float))
    found = over_constrained(seen)
    c, d = (right for _, _, right in seen.right.values())
    means = [pass_at_k(right, 8, k).mean() for right in (c, d) for k in (1, 8)]
    assert found.number == pytest.approx((means[3] / means[2]) / (means[1] / means[0])) and means[3] == means[2]
    assert f"{means[0]:.3f} → {means[1]:.3f}, the start {means[2]:.3f} → {means[3]:.3f}" in found.says
    assert f"7 more recover 0%, from the base {(means[1] - means[0]) / (1 - means[0]):.0%}" in found.says
    assert "beta" in found.remedy


@pytest.mark.parametrize(
    "start",
    [ABILITIES, expit(logit(ABILITIES) + 2), expit(logit(ABILITIES) - 1), np.full(60, 0.9), np.full(60, 0.4)],
    ids=["the same", "better", "worse", "all are easy", "more even"],
)
def test_a_start_that_is_better_or_worse_is_not_flat(start: np.ndarray) -> None:
    assert [over_constrained(curves(ABILITIES, start, seed=seed)) for seed in range(10)].count(None) >= 9


def test_a_start_that_nears_its_ceiling_has_a_lower_ratio_and_is_not_flat() -> None:
    """pass@8/pass@1 falls by a third, for want of room above."""
    seen = curves(np.full(60, 0.3), np.full(60, 0.9))
    ratio = [pass_at_k(right, 8, 8).mean() / pass_at_k(right, 8, 1).mean() for _, _, right in seen.right.values()]
    assert ratio[1] / ratio[0] < 0.67 and over_constrained(seen) is None


def test_what_cannot_be_told_of_flatness_is_said() -> None:
    flat = (ABILITIES > 0.4).astype(float)
    assert over_constrained(curves(ABILITIES[:19], flat[:19])).why.startswith("it takes 20 problems that base and init")
    assert (
        over_constrained(curves(ABILITIES, flat, n=3)).why
        == "it takes 4 samples of every problem (eval.samples), the run has 3"
    )
    assert over_constrained(curves(ABILITIES, 0 * flat)).why.startswith("too few of the samples are right")
    many = curves(ABILITIES, flat, n=64)
    assert "pass@8" in over_constrained(many).says  # the k of the paper's table, not the largest there is
    assert over_constrained(Seen(COLD, right=many.right)) is None
    assert over_constrained(Seen(WARM, right={"base": many.right["base"]})) is None


def test_only_problems_that_both_answered_are_compared() -> None:
    seen = curves(ABILITIES, expit(6 * logit(ABILITIES) + 2))
    names, n, c = seen.right["init"]
    shuffled = np.random.default_rng(3).permutation(60)
    extra = ([*"abcdefghij", *np.array(names)[shuffled]], np.append([8] * 10, n), np.append([8] * 10, c[shuffled]))
    other = Seen(WARM, right={"base": seen.right["base"], "init": extra})
    assert over_constrained(other).number == pytest.approx(over_constrained(seen).number)


FITTED = ((1.0, 0.4), (0.5, 0.1))  # NLL and entropy, before and after


def unimproved(
    mean: float, low: float | None, high: float | None, fitted=FITTED, generations: int = 10, **changes
) -> Seen:
    found = [{"from": "init", "to": "final", "k": 8, "mean": 0.5, "low": 0.4, "high": 0.6}]
    found += [{"from": "init", "to": "final", "k": 1, "mean": mean, "low": low, "high": high}]
    rl = [{"step": i + 1, "reward": 0.1, "informative_share": 0.5} for i in range(generations)]
    values = {"recipe": BOTH, "sft": validations(*fitted), "rl": rl, "results": {"policies": {}, "differences": found}}
    return Seen(**values | changes)


def test_a_start_that_fits_and_that_rl_does_not_improve() -> None:
    found = under_constrained(unimproved(0.01, -0.02, 0.04))
    assert found.number == 0.01 and "from 1.000 to 0.500" in found.says and "+0.010 [-0.020, +0.040]" in found.says
    assert isinstance(under_constrained(unimproved(-0.1, -0.2, -0.01)), Finding)
    assert under_constrained(unimproved(0.03, 0.001, 0.059)) is None  # it did improve
    assert under_constrained(unimproved(0.01, -0.04, 0.06)).why.startswith("pass@1 changed by +0.010 [-0.040, +0.060]")
    assert under_constrained(unimproved(0.0, None, None)) is None  # one problem
    assert under_constrained(unimproved(0.0, 0.0, 0.0, generations=9)).why == "it takes 10 generations, the run has 9"
    assert "validations" in under_constrained(unimproved(0.0, 0.0, 0.0, fitted=FITTED[:1])).why


@pytest.mark.parametrize(
    "fitted",
    [((1.0, 0.4), (0.91, 0.1)), ((1.0, 0.4), (0.5, 0.21)), ((1.0, 0.4), (0.15, 0.16))],
    ids=["it does not fit", "it kept its entropy", "it is as sure as it is right"],
)
def test_starts_that_did_not_collapse(fitted: tuple) -> None:
    assert under_constrained(unimproved(0.0, 0.0, 0.0, fitted=fitted)) is None


def test_without_a_warm_start_or_rl_or_results_nothing_is_looked_for() -> None:
    for changes in ({"recipe": COLD}, {"recipe": WARM}, {"rl": ()}, {"results": {}}):
        assert under_constrained(unimproved(0.0, 0.0, 0.0, **changes)) is None


def test_a_run_of_tasks_alone_is_judged_by_the_largest() -> None:
    def task(problems: int, mean: float) -> dict:
        found = {"from": "init", "to": "final", "k": 1, "mean": mean, "low": mean, "high": mean}
        return {"policies": {"init": {"problems": problems}}, "differences": [found]}

    tasks = {"small": task(30, 0.3), "large": task(500, -0.1), "rated": {"policies": {}, "differences": []}}
    seen = unimproved(0, 0, 0, results={"policies": {}, "differences": [], "tasks": tasks})
    assert under_constrained(seen).number == -0.1
    rated = task(80, -0.2) | {"kind": "judge"}
    seen = unimproved(0, 0, 0, results={"policies": {}, "differences": [], "tasks": {"mt_bench": rated}})
    assert under_constrained(seen) is None


def profile(share: float, beta: float | None = 10.0, **changes) -> dict:
    told = {
        "objective": {"w_below_0.5": 0.1},
        "beta": beta,
        "below_floor": share,
        "tokens": 2000,
        "vocab_size": 100,
        "floor": 0.0,
    }
    return told | changes


def test_tokens_that_the_base_finds_impossible() -> None:
    found = target_underflow(Seen(WARM, surprise=profile(0.005)))
    assert found.number == 0.005 and found.says.startswith("0.50% of 2,000 supervised tokens")
    mass = Gift(10.0).target_mass(TokenStats(vocab_size=100, ref_logp=torch.tensor([FLOOR]).log()))
    assert f"at most {mass.item():.0e}" in found.says and "log(V/λ) = 9.2" in found.remedy
    theirs = target_underflow(Seen(WARM, surprise=profile(0.005, beta=20.0, floor=1e-10)))
    assert "at most 0.09 of the target" in theirs.says  # nearly twice 0.046, as a p of 1e-10 is with their floor
    for told in (
        profile(0.0009),
        profile(0.005, beta=0.0),  # distillation: the expert only chooses where
        profile(0.005, beta=23.1),  # lifted above a half all the same
        profile(0.005, objective=None),  # plain SFT has no such target
    ):
        assert target_underflow(Seen(WARM, surprise=told)) is None
    assert isinstance(target_underflow(Seen(WARM, surprise=profile(0.005, beta=22.9))), Finding)
    assert isinstance(target_underflow(Seen(WARM, surprise=profile(0.001, beta=None))), Finding)  # β of each token
    assert target_underflow(Seen(WARM)) is None
    former = profile(0.1)
    del former["below_floor"]
    assert "earlier version" in target_underflow(Seen(WARM, surprise=former)).why


def evaluated(**shares: float) -> dict:
    return {"policies": {name: {"truncated_share": share} for name, share in shares.items()}, "differences": []}


def test_completions_cut_in_the_evaluation() -> None:
    found = truncation(Seen(WARM, results=evaluated(base=0.86, init=0.06, final=0.05)))
    assert found.number == 0.86
    assert found.says == "cut at the limit: 86% of base in the evaluation, 6% of init in the evaluation"
    assert found.remedy.startswith("raise eval.max_new_tokens;")
    assert truncation(Seen(WARM, results=evaluated(base=0.05))) is None and truncation(Seen(WARM)) is None
    tasks = {"math500": evaluated(init=0.2), "mt_bench": {"policies": {"init": {"rating": {}}}, "differences": []}}
    only = truncation(Seen(WARM, results={"policies": {}, "differences": [], "tasks": tasks}))
    assert only.says == "cut at the limit: 20% of init in math500"
    rl = [{"step": i, "truncated_share": 0.5} for i in range(4)]
    assert truncation(Seen(BOTH, rl=rl, results=evaluated(base=0.1))).remedy.startswith(
        "raise eval.max_new_tokens and rl.max_new_tokens"
    )


def test_samples_are_counted_by_policy_for_one_task() -> None:
    def sample(policy: str, problem: str, status: str, **task: str) -> dict:
        return {"policy": policy, "problem": problem, "status": status, **task}

    own = [sample("base", "p", s) for s in ("right", "wrong", "no_answer")] + [
        sample("init", "q", "right", task="test")
    ]
    other = [sample("base", "a", "right", task="gsm8k") for _ in range(5)] + [
        sample("base", "b", "wrong", task="aime24")
    ]
    rated = [sample("base", "1", "answered", task="mt_bench")] * 9

    def plain(rows: list[dict]) -> dict:
        return {p: (list(ids), n.tolist(), c.tolist()) for p, (ids, n, c) in counted(rows).items()}

    assert plain(own + other + rated) == {"base": (["p"], [3], [1]), "init": (["q"], [1], [1])}
    assert plain(other + rated) == {"base": (["a"], [5], [5])}
    assert plain(rated) == {}


def test_a_warm_start_alone_is_looked_at_too() -> None:
    seen = Seen(WARM, sft=validations((1.0, 0.4), (0.5, 0.3), (0.6, 0.2)), surprise=profile(0.01))
    assert [f.name for f in find(seen)] == ["target underflow", "late checkpoint"] and unjudged(seen) == []


def test_the_floor_is_counted_after_smoothing() -> None:
    from heatbath.surprise import profile as measured

    class Characters:
        def decode(self, ids: object) -> str:
            return "x"

        def convert_ids_to_tokens(self, token: int) -> str:
            return f"<{token}>"

    row = Rendered([0, 1, 2, 3, 4], [-100, 1, 2, 3, 4], False)
    nats = [np.array([1.0, 23.0, 23.1, 40.0])]  # 1e-10 is 23.03
    for objective, share in ((Gift(10.0), 0.5), (Gift(10.0, smoothing=0.01), 0.0), (Gift(10.0, floor=1e-10), 0.5)):
        found = measured([row], nats, Characters(), objective, vocab_size=100)
        assert found["below_floor"] == share
        left = {"<2>", "<3>", "<4>"} if share else set()  # alike as text, told by name
        assert {one["token"] for one in found["left"]} == left
    tiny = Gift(10.0, smoothing=1e-11)  # λ/V below the floor: it lifts nothing
    assert measured([row], nats, Characters(), tiny, vocab_size=100)["below_floor"] == 0.5
    assert torch.tensor(FLOOR).log().item() == pytest.approx(-23.026, abs=1e-3)
