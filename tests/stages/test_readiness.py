"""What is measured before RL, against brute force; that measuring leaves no trace; and what is said about it."""

import copy
import json
import random
import re
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from conftest import small_model, small_tokenizer
from heatbath import recipe as recipes
from heatbath.data import sources
from heatbath.engines.sampling import seeds_of
from heatbath.ideas.intervals import mean_with_interval
from heatbath.progress import Progress
from heatbath.run import Run
from heatbath.stages import readiness
from heatbath.stages.readiness import compare, mean_entropy, measure, spread, warnings
from heatbath.stages.rl import run_rl
from heatbath.verify.verdict import Verdict

G, T = 4, 0.8


class Judge:
    """Verdicts by a rule of the text."""

    def __init__(self, status):
        self.status = status

    def grade(self, completions, golds) -> list[Verdict]:
        return [Verdict(self.status(text)) for text in completions]


HALF = Judge(lambda text: "right" if sum(map(ord, text)) % 2 else "wrong")
WRONG, RIGHT = Judge(lambda text: "wrong"), Judge(lambda text: "right")


def recipe(**rl) -> recipes.Recipe:
    table = {"prompts": 4, "update_prompts": 2, "group_size": G, "micro_batch": 2, "max_new_tokens": 6, "lr": 1e-3}
    table |= {"temperature": T, "readiness": 7}
    reward = rl.pop("reward", {})
    return recipes.parse(
        {
            "model": rl.pop("model", "m"),
            "precision": "fp32",
            "seed": 3,
            "data": {"source": "arithmetic", "demos": 0, "validation": 0, "prompts": 40, "test": 2},
            "rl": {**table, **rl},
            "reward": reward,
        }
    )


def measured(folder: Path, made: recipes.Recipe, grader=HALF, model=None) -> tuple[Run, dict]:
    run = Run.create(folder, made)
    rows = sources.load(made.data, made.seed).prompts
    found = measure(run, made, rows, small_tokenizer(), model or small_model(), grader, Progress(quiet=True))
    return run, found


def entropies(model: PreTrainedModel, pairs: list[tuple[list[int], list[int]]], temperature: float) -> list[float]:
    """Of each completion token, from the model's own logits, one sequence at a time."""
    out = []
    for prompt, completion in pairs:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0].double() / temperature
        at = logits[len(prompt) - 1 : -1].log_softmax(-1)
        out += (-(at.exp() * at).sum(-1)).tolist()
    return out


def test_the_numbers_are_those_of_the_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    sample = readiness._sample

    def keep(*given):
        kept.append((given[2], sample(*given)))
        return kept[0][1]

    monkeypatch.setattr(readiness, "_sample", keep)
    run, found = measured(tmp_path / "run", recipe())
    ((asked, sampled),) = kept
    assert found == json.loads((run.folder / "readiness.json").read_text())
    groups = [[s for s in sampled if s.prompt == i] for i in range(7)]
    assert all(len(group) == G for group in groups)
    right = [sum(s.verdict.status == "right" for s in group) for group in groups]
    assert found["right_of_prompts"] == right and len(set(right)) > 2

    def told(values) -> dict:
        e = mean_with_interval(values, bounds=(0.0, 1.0))
        return {"mean": e.mean, "low": e.low, "high": e.high}

    cut = [sum(s.ids[-1] != 1 for s in group) / G for group in groups]
    assert found["pass"] == {"1": told([c / G for c in right]), str(G): told([float(c > 0) for c in right])}
    assert found["informative_share"] == told([float(0 < c < G) for c in right])
    assert found["all_right_share"] == told([float(c == G) for c in right])
    assert found["all_wrong_share"] == told([float(c == 0) for c in right])
    assert found["truncated_share"] == told(cut) and found["eos_rate"] == told([1 - x for x in cut])
    assert found["mean_tokens"] == np.mean([len(s.ids) for s in sampled])
    assert found["verdicts"] == {"right": sum(right), "wrong": 7 * G - sum(right)}
    every = entropies(small_model(), [(asked[s.prompt], s.ids) for s in sampled], T)
    assert len(every) == sum(len(s.ids) for s in sampled)
    assert found["entropy"] == pytest.approx(np.mean(every), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_entropy_is_that_of_the_whole_softmax(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 0.5}
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, final_logit_softcapping=2.0)).eval()
    monkeypatch.setattr(readiness, "PASS_TOKENS", 20)
    draw = random.Random(0)
    pairs = [
        ([draw.randrange(2, 50) for _ in range(p)], [draw.randrange(2, 50) for _ in range(c)])
        for p, c in ((3, 5), (9, 1), (4, 12), (3, 2))
    ]
    for model in (small_model(), capped):
        expected = np.mean(entropies(model, pairs, temperature))
        assert mean_entropy(model, pairs, temperature, pad_id=1) == pytest.approx(expected, rel=1e-5)


def test_measuring_leaves_no_trace_and_is_the_same_again(tmp_path: Path) -> None:
    model = small_model()
    model.train()
    model.model.layers[0].eval()
    weights, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    config, needs = model.generation_config, [p.requires_grad for p in model.parameters()]
    torch.manual_seed(11)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    _, one = measured(tmp_path / "a", recipe(), model=model)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert [m.training for m in model.modules()] == modes and model.generation_config is config
    assert [p.requires_grad for p in model.parameters()] == needs
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    torch.manual_seed(12)
    assert measured(tmp_path / "b", recipe())[1] == one
    adapted = peft.get_peft_model(small_model(), peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.5))
    assert measured(tmp_path / "c", recipe(), model=adapted)[1] == one  # adapters begin at zero


def test_runs_of_neighbouring_seeds_share_no_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[list[int]] = []
    sample = readiness.LocalSampler.sample
    monkeypatch.setattr(
        readiness.LocalSampler,
        "sample",
        lambda *given: kept.append(seeds_of(given[3], len(given[1]))) or sample(*given),
    )
    for seed in (3, 4):
        measured(tmp_path / str(seed), recipe().model_copy(update={"seed": seed}))
    assert len({*kept[0], *kept[1]}) == 2 * 7 * G


def test_it_is_measured_once_and_not_at_all_where_not_wanted(tmp_path: Path) -> None:
    run, found = measured(tmp_path / "a", recipe())
    assert measure(run, recipe(), [], None, None, None, Progress(quiet=True)) == found
    assert run.begun("rl") and not run.finished("rl")
    run.forget("rl")
    assert not run.begun("rl") and compare(run) is None
    run, found = measured(tmp_path / "b", recipe(readiness=0))
    assert found is None and not (run.folder / "readiness.json").exists()


def test_rl_after_it_is_the_rl_without_it(small_base: Path, tmp_path: Path) -> None:
    rows = []
    for count in (0, 5):
        made = recipe(model=str(small_base), readiness=count, max_steps=3)
        run = Run.create(tmp_path / str(count), made)
        run_rl(run, made, Progress(quiet=True))
        rows.append([{k: v for k, v in r.items() if "seconds" not in k and k != "time"} for r in run.metrics("rl")])
    assert rows[0] == rows[1] and len(rows[0]) == 3
    assert run.read_json("readiness.json")["prompts"] == 5
    assert compare(run)["generations"] == 2


def test_prompts_are_spread_over_the_rows() -> None:
    rows = list(range(100))
    assert [row // 10 for row in spread(rows, 10, 0)] == list(range(10))
    assert spread(rows, 10, 0) == spread(rows, 10, 0) != spread(rows, 10, 1)
    assert spread(rows, 100, 0) == spread(rows, 200, 5) == rows


@pytest.mark.parametrize(
    ("grader", "says"),
    [
        (WRONG, r"^0 of 20 prompts had two .* all wrong 1\.000, .* too hard: a warm start"),
        (RIGHT, r"^0 of 20 prompts had two .* all right 1\.000\), .* too easy"),
    ],
    ids=["hard", "easy"],
)
def test_no_signal_is_said_with_its_number(tmp_path: Path, grader: Judge, says: str) -> None:
    _, found = measured(tmp_path / "run", recipe(readiness=20), grader)
    assert found["informative_share"]["mean"] == 0.0
    assert re.search(says, found["warnings"][0])
    assert "warm start" not in warnings({**found, "truncated_share": {"mean": 0.0}}, warm=True)[0]
    fewer = {"truncated_share": {"mean": 0.0}, "verdicts": {"no_answer": 39, "wrong": 41}}
    assert "their form" not in warnings({**found, **fewer}, warm=True)[0]


def test_answers_that_the_grader_cannot_read_are_not_called_hard_prompts(tmp_path: Path) -> None:
    """GIFT's starts of study-code wrote a program in 0 to 2 of 128 answers; RL had 0.70 of them right in 24 steps."""
    _, found = measured(tmp_path / "run", recipe(readiness=20), Judge(lambda text: "no_answer"))
    whole = found | {"truncated_share": {"mean": 0.0}}
    for warm, remedy in ((True, "a larger β where it is GIFT's"), (False, "a warm start ([sft]) on")):
        said = warnings(whole, warm=warm)[0]
        assert "no answer in 80 of 80 completions; if it is their form: " + remedy in said and "too hard" not in said
    assert "too hard" in warnings(whole | {"verdicts": {"no_answer": 40, "wrong": 40}}, warm=True)[0]
    cut = warnings(whole | {"truncated_share": {"mean": 0.9}}, warm=True)
    assert "too hard" in cut[0] and "raise rl.max_new_tokens" in cut[1]


def test_a_signal_or_too_few_prompts_to_deny_it_are_not_warned_about(tmp_path: Path) -> None:
    for name, count, grader in (("a", 20, HALF), ("b", 5, WRONG)):
        _, found = measured(tmp_path / name, recipe(readiness=count), grader)
        assert not any("signal" in warning for warning in found["warnings"])


def test_truncation_a_missing_eos_and_a_failing_grader_are_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    made = recipe()
    run = Run.create(tmp_path / "run", made)
    rows = sources.load(made.data, made.seed).prompts
    failing = Judge(lambda text: "timeout")
    found = measure(run, made, rows, small_tokenizer(), small_model(), failing, Progress())
    said = capsys.readouterr().err
    assert "readiness: 7 of 40 prompts × 4 completions of the start, T = 0.8" in said
    assert "pass@1 0.000 [0.000, 0.410]" in said and "warning: 28 of 28 verdicts are failures of grading" in said
    for share, says in ((0.75, "75% of 28 completions were cut at 6"), (1.0, "none of 28 completions ended with EOS")):
        told = warnings({**found, "truncated_share": {"mean": share}, "grader_failures": 0}, warm=False)
        assert len(told) == 1 and says in told[0] and "raise rl.max_new_tokens" in told[0]
    assert warnings({**found, "truncated_share": {"mean": 0.5}, "grader_failures": 0}, warm=False) == []


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"reward": {"weights": {"rewards.py:brevity": 0.5}}}, "more than the verdict"),
        ({"policy": "luffy"}, "learns from demonstrations"),
        ({"policy": "reinforce"}, "learns from groups of equal verdicts too"),
    ],
    ids=["reward", "demonstrations", "no baseline"],
)
def test_where_verdicts_are_not_the_whole_signal_none_is_denied(tmp_path: Path, settings: dict, note: str) -> None:
    run, found = measured(tmp_path / "run", recipe(readiness=20, **settings), WRONG)
    assert not found["judged"] and note in found["notes"][0]
    assert not any("signal" in warning for warning in found["warnings"])
    run.log("rl", 1, {"informative_share": 1.0})
    assert compare(run)["as_predicted"] is None


def test_settings_that_are_not_applied_are_named(tmp_path: Path) -> None:
    _, found = measured(tmp_path / "run", recipe(trainer={"top_p": 0.9}))
    assert found["judged"] and found["notes"] == ["sampled without top_p of rl.trainer"]


def test_the_prediction_is_held_against_what_happened(tmp_path: Path) -> None:
    run, found = measured(tmp_path / "run", recipe(readiness=20, prompts=40, update_prompts=20))
    predicted = found["informative_share"]["mean"]
    assert compare(run) is None
    run.log("rl", 1, {"informative_share": round(predicted * 40) / 40})
    run.log("rl", 2, {"entropy": 1.0})
    run.log("rl", 3, {"informative_share": 0.1})
    seen = compare(run)
    assert seen["predicted"] == found["informative_share"] and seen["as_predicted"] is True
    assert seen["generations"] == 2 and seen["groups"] == 40
    assert seen["mean"] == pytest.approx((round(predicted * 40) / 40 + 0.1) / 2)
    run.forget("rl")
    run.write_json("readiness.json", found)
    run.log("rl", 1, {"informative_share": 0.05})
    assert compare(run)["as_predicted"] is False and compare(run)["difference"]["high"] < 0
