"""Findings about RL are there where something happened, and not where nothing did: noise, a short or healthy run."""

from collections import Counter

import numpy as np
import pytest

from heatbath import recipe as recipes
from heatbath.report.findings import LOOKS, Finding, Seen, find, unjudged

NAMES = ["nothing to learn", "train–eval gap", "length without reward", "exploding gradient"]


def recipe(**rl) -> recipes.Recipe:
    return recipes.parse({"model": "m", "data": {"source": "arithmetic"}, "rl": rl})


def rows(
    steps: int, reward, tokens=100.0, norm=0.3, held=None, every: int = 1, informative=0.4, cut=0.02, right=0.4
) -> list[dict]:
    """Rows as RL logs them; each argument a number or one for each step."""
    columns = {"reward": reward, "completion_tokens": tokens, "grad_norm": norm, "verdict/right": right}
    columns |= {"informative_share": informative, "truncated_share": cut}
    values = {name: np.broadcast_to(value, steps) for name, value in columns.items()}
    out = []
    for i in range(steps):
        out.append({"step": i + 1, "learning_rate": 1e-6, **{name: float(v[i]) for name, v in values.items()}})
        if held is not None and i % every == 0:
            out.append({"step": i + 1, "held_out/right": float(np.broadcast_to(held, steps)[i])})
    return out


def simulated(draw: np.random.Generator, *, rise: float = 0.0, grow: float = 0.0) -> list[dict]:
    """A run whose reward rises and whose completions grow by so much, whose held-out accuracy only fluctuates, with
    noise that is correlated from step to step."""
    steps, every, problems = int(draw.integers(12, 200)), int(draw.integers(1, 8)), int(draw.choice([8, 64, 200]))
    memory = float(draw.choice([0.0, 0.3, 0.6]))

    def noise() -> np.ndarray:
        out, shocks = np.zeros(steps + 20), draw.normal(size=steps + 20)
        for t in range(1, steps + 20):
            out[t] = memory * out[t - 1] + np.sqrt(1 - memory**2) * shocks[t]
        return out[20:]

    done = np.linspace(0, 1, steps)
    return rows(
        steps,
        reward=0.4 + rise * done + draw.choice([0.02, 0.05, 0.1]) * noise(),
        tokens=100 * (1 + grow * done) * (1 + draw.choice([0.02, 0.1, 0.3]) * noise()),
        norm=draw.choice([0.1, 1.0, 5.0]) * np.exp(draw.choice([0.3, 0.6, 0.9]) * noise()),
        held=draw.binomial(problems, 0.4, size=steps) / problems,
        every=every,
        informative=draw.binomial(8, draw.choice([0.15, 0.3, 0.6]), size=steps) / 8,
        cut=draw.beta(2, 60, size=steps),
    )


@pytest.mark.parametrize(
    ("rise", "grow"), [(0.0, 0.0), (0.3, 0.0), (0.1, 0.6)], ids=["nothing happens", "reward rises", "both rise"]
)
def test_false_findings_are_rare(rise: float, grow: float) -> None:
    draw = np.random.default_rng(5)
    made = recipe(prompts=8, update_prompts=8)
    seen = Counter(f.name for _ in range(200) for f in find(Seen(made, simulated(draw, rise=rise, grow=grow))))
    assert all(count < 0.05 * 200 for count in seen.values()), seen


def test_a_reward_that_rises_while_accuracy_falls() -> None:
    draw, done = np.random.default_rng(6), np.linspace(0, 1, 60)
    falling = 0.6 - 0.2 * done + 0.03 * draw.normal(size=60)
    rising = 0.3 + 0.4 * done + 0.03 * draw.normal(size=60)
    (found,) = find(Seen(recipe(), rows(60, rising, held=falling, every=4)))
    assert found.name == "train–eval gap" and found.number == pytest.approx(-0.19, abs=0.05)
    assert "from step 1 to 57 the reward changed by +0.3" in found.says and "rl.lr" in found.remedy
    assert find(Seen(recipe(), rows(60, rising, held=rising, every=4))) == []
    assert find(Seen(recipe(), rows(60, falling, held=falling, every=4))) == []  # both fall: no gap


def test_a_peak_of_accuracy_in_the_middle_is_found_too() -> None:
    draw, done = np.random.default_rng(7), np.linspace(0, 1, 80)
    peaked = 0.5 - 0.8 * (done - 0.5) ** 2 + 0.01 * draw.normal(size=80)
    (found,) = find(Seen(recipe(), rows(80, 0.3 + 0.4 * done + 0.03 * draw.normal(size=80), held=peaked, every=4)))
    assert found.name == "train–eval gap" and "from step 41" in found.says and found.number < -0.1
    assert found.remedy.startswith("end near step ") and 30 < int(found.remedy.split()[3]) < 50


def test_completions_that_grow_at_flat_reward() -> None:
    draw, done = np.random.default_rng(8), np.linspace(0, 1, 60)
    longer = 200 * (1 + 0.5 * done) + 10 * draw.normal(size=60)
    flat = 0.4 + 0.02 * draw.normal(size=60)
    (found,) = find(Seen(recipe(), rows(60, flat, tokens=longer)))
    assert found.name == "length without reward" and found.number == pytest.approx(0.5, abs=0.1)
    assert "(+5" in found.says and "dr_grpo" in found.remedy
    assert find(Seen(recipe(), rows(60, flat + 0.2 * done, tokens=longer))) == []
    assert find(Seen(recipe(), rows(60, flat, tokens=200 * (1 + 0.1 * done)))) == []  # a tenth is no matter
    late = np.where(done < 0.5, 200, 200 + 300 * (done - 0.5)) + 5 * draw.normal(size=60)
    plateau = 0.2 + np.minimum(0.4, 0.8 * done) + 0.01 * draw.normal(size=60)
    (found,) = find(Seen(recipe(), rows(60, plateau, tokens=late)))
    assert found.name == "length without reward" and "from step 31" in found.says


@pytest.mark.parametrize("clip", [1.0, 1e9])
def test_a_gradient_that_explodes(clip: float) -> None:
    norm = 0.3 * np.exp(0.3 * np.random.default_rng(9).normal(size=40))
    norm[[20, 33]] = 12.0, 90.0
    (found,) = find(Seen(recipe(max_grad_norm=clip), rows(40, 0.4, norm=norm)))
    assert found.name == "exploding gradient" and found.number == 2
    assert "in 2 of 40 steps" in found.says and "(steps 21, 34); the worst, step 34" in found.says
    assert f"clipping at {clip:g}" in found.says
    norm[[20, 33]] = 0.9, 0.95  # far outside its scale in a quiet run, and not even clipped
    assert find(Seen(recipe(max_grad_norm=clip), rows(40, 0.4, norm=norm / 10))) == []
    (slow,) = find(Seen(recipe(), rows(80, 0.4, norm=0.2 * 1.1 ** np.arange(80))))
    assert slow.name == "exploding gradient" and slow.number > 10  # growth without a jump


def test_a_norm_that_is_not_finite_is_found_in_a_short_run_and_where_the_log_left_it_out() -> None:
    for broken in (rows(4, 0.4, norm=[0.3, np.nan, 0.3, 0.3]), rows(4, 0.4)):
        if broken[1]["grad_norm"] == 0.3:
            del broken[1]["grad_norm"]
        (found,) = find(Seen(recipe(), broken))
        assert found.number == 1 and "step 2, was not finite" in found.says


def test_steps_without_a_signal_are_no_scale() -> None:
    norm = np.where(np.arange(40) % 4 == 0, 1.5, 0.0)
    assert find(Seen(recipe(), rows(40, 0.4, norm=norm))) == []


def test_short_runs_say_that_they_cannot_tell() -> None:
    short = rows(5, [0.1, 0.3, 0.5, 0.7, 0.9], tokens=[1, 2, 3, 4, 5], held=[0.9, 0.7, 0.5, 0.3, 0.1])
    seen = Seen(recipe(prompts=7, update_prompts=7), short)
    assert find(seen) == [] and [u.name for u in unjudged(seen)] == NAMES
    assert unjudged(seen)[0].why == "it takes 36 groups, the run has 35"
    assert unjudged(seen)[1].why == "it takes 6 held-out evaluations (rl.eval_every), the run has 5"
    assert unjudged(Seen(recipe(), rows(60, 0.4)))[0].why.endswith("the run has 0")
    assert [u.name for u in unjudged(Seen(recipe(), rows(60, 0.4, held=0.5)))] == []


def test_groups_without_a_signal() -> None:
    draw = np.random.default_rng(10)
    few, made = draw.binomial(32, 0.03, size=40) / 32, recipe(prompts=32, update_prompts=32)
    (found,) = find(Seen(made, rows(40, 0.02, informative=few, right=0.02)))
    assert found.name == "nothing to learn" and found.number == pytest.approx(1 - few.mean())
    assert "of 1,280 groups" in found.says and "with 2% of the completions right" in found.says
    assert found.remedy.startswith("easier prompts")
    assert find(Seen(made, rows(40, 0.02, informative=0.15))) == []
    half = np.where(np.arange(40) < 20, 0.5, few)  # solved in the first half
    (found,) = find(Seen(made, rows(40, 0.9, informative=half, right=0.97)))
    assert found.name == "nothing to learn" and "from step 21 to 40" in found.says
    assert found.remedy.startswith("harder prompts")
    assert find(Seen(made, rows(40, 0.9, informative=half[::-1]))) == []  # it found its feet


def test_a_tenth_of_the_groups_is_seldom_taken_for_none() -> None:
    draw, made = np.random.default_rng(11), recipe(prompts=6, update_prompts=6)
    alarms = sum(
        bool(find(Seen(made, rows(10, 0.1, informative=draw.binomial(6, 0.1, size=10) / 6)))) for _ in range(1000)
    )
    assert 0 < alarms <= 50  # the whole and the last half, each at 2.5 %


@pytest.mark.parametrize("policy", ["luffy", "implicit"])
def test_policies_that_learn_from_such_groups_or_from_demonstrations_are_not_judged(policy: str) -> None:
    seen = Seen(recipe(policy=policy), rows(40, 0.0, informative=0.0, right=0.0))
    learns = "nothing to learn" not in {u.name for u in unjudged(seen)}
    assert learns == (policy == "implicit") and ("nothing to learn" in {f.name for f in find(seen)}) == learns


def test_completions_cut_in_rl() -> None:
    late = np.where(np.arange(40) < 20, 0.0, 0.3)
    (found,) = find(Seen(recipe(), rows(40, 0.4, cut=late)))
    assert (found.name, found.number) == ("truncation", pytest.approx(0.3))
    assert found.says == "cut at the limit: 30% in the last half of RL"
    assert found.remedy.startswith("raise rl.max_new_tokens;")
    assert find(Seen(recipe(), rows(40, 0.4, cut=late[::-1]))) == []
    assert find(Seen(recipe(), rows(40, 0.4, cut=0.09))) == []


def test_a_run_without_rl_has_none() -> None:
    seen = Seen(recipes.parse({"model": "m", "data": {"source": "arithmetic"}, "sft": {}}))
    assert find(seen) == [] and unjudged(seen) == []


def test_one_more_look_is_one_more_function(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Finding("mine", 1.0, "says", "remedy")
    monkeypatch.setattr("heatbath.report.findings.LOOKS", (*LOOKS, lambda seen: mine))
    assert find(Seen(recipe())) == [mine]
