"""The RL stage, real TRL underneath: advantages, what it logs, its steps, and the settings it refuses."""

from pathlib import Path

import pytest
import torch
from policy_trainers import G, even_letters, make, texts

from conftest import small_model, small_tokenizer
from heatbath import recipe as recipes
from heatbath.data import rendering
from heatbath.errors import DataError, RecipeError, RunError
from heatbath.progress import Progress
from heatbath.run import Run
from heatbath.stages.rewards import verdict_reward
from heatbath.stages.rl import run_rl, total_steps
from heatbath.verify.math import MathGrader


def test_advantages_are_centred_in_the_group_and_not_scaled(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.model.train()
    output = trainer._generate_and_score_completions([trainer.train_dataset[i] for i in range(2) for _ in range(G)])
    r = torch.tensor(even_letters(texts(trainer, [output])), dtype=torch.float64)
    r = r.view(2, G)
    torch.testing.assert_close(output["advantages"].view(2, G), r - r.mean(1, keepdim=True), rtol=1e-6, atol=1e-7)


def test_kl_to_the_start_is_zero_at_the_start_and_then_grows(tmp_path: Path) -> None:
    trainer = make(tmp_path, own={"initial": small_model()}, dtype=torch.float32, steps_per_generation=2, max_steps=4)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "reward" in row]
    assert logs[0]["kl_init"] == 0.0 and logs[-1]["kl_init"] > 1e-4
    assert all("loss" not in row for row in logs)
    expected = {
        "reward",
        "informative_share",
        "entropy",
        "clip_share",
        "truncated_share",
        "completion_tokens",
        "kl_init",
    }
    assert all(expected <= set(row) for row in logs)


def test_prompts_reach_the_model_as_training_rendered_them(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    conversation = [{"role": "user", "content": "What is 1 + 2?"}]
    ids, images, fields = trainer._tokenize_prompts([conversation])
    assert ids == [rendering.prompt_ids(small_tokenizer(), conversation)] and images is None and fields == {}


def test_verdicts_become_rewards_and_counts() -> None:
    logged = {}
    with MathGrader(workers=1) as grader:
        reward = verdict_reward(grader)
        completions = [[{"content": text}] for text in ("so 3", "so 4", "none", "so 3")]
        found = reward(completions=completions, gold=["3", "3", "3", " "], log_metric=logged.__setitem__)
    assert found == [1.0, 0.0, 0.0, None]  # a gold answer nobody can read gives no signal, not a 0
    assert {k: v for k, v in logged.items() if v} == {
        f"verdict/{s}": 0.25 for s in ("right", "wrong", "no_answer", "bad_gold")
    }


def recipe(base: Path, **rl) -> recipes.Recipe:
    table = {"prompts": 4, "update_prompts": 2, "group_size": 2, "micro_batch": 2, "max_new_tokens": 6, "lr": 1e-3}
    return recipes.parse(
        {
            "model": str(base),
            "precision": "fp32",
            "data": {"source": "arithmetic", "demos": 0, "validation": 0, "prompts": 9, "test": 2},
            "rl": {**table, **rl},
        }
    )


def test_the_stage_trains_the_base_directly_where_there_is_no_warm_start(small_base: Path, tmp_path: Path) -> None:
    made = recipe(small_base)
    run = Run.create(tmp_path / "run", made)
    run_rl(run, made, Progress(quiet=True))
    rows = run.metrics("rl")
    assert len(rows) == total_steps(made.rl, 9) == 4  # two whole generations of 4 prompts, two steps each
    assert ["reward" in row for row in rows] == [True, False, True, False]
    assert sum(rows[0][f"verdict/{s}"] for s in ("right", "wrong", "no_answer")) == pytest.approx(1.0)
    assert run.policies == ["base", "final"] and (run.checkpoint("final") / "model.safetensors").is_file()


def test_too_few_prompts_and_a_missing_start_are_named(small_base: Path, tmp_path: Path) -> None:
    few = recipe(small_base, prompts=10)
    with pytest.raises(DataError, match="9 prompts"):
        run_rl(Run.create(tmp_path / "a", few), few, Progress(quiet=True))
    blind = recipe(small_base, eval_every=1)
    blind = blind.model_copy(update={"data": blind.data.model_copy(update={"test": 0})})
    with pytest.raises(RecipeError, match=r"rl.eval_every = 1 answers test problems .* there are none"):
        run_rl(Run.create(tmp_path / "c", blind), blind, Progress(quiet=True))
    table = recipe(small_base).model_dump(mode="json")
    warm = recipes.parse({**table, "sft": {"objective": "sft"}})
    with pytest.raises(RunError, match="no 'init' policy"):
        run_rl(Run.create(tmp_path / "b", warm), warm, Progress(quiet=True))


@pytest.mark.parametrize(("epochs", "steps"), [(0.1, 1), (0.5, 3), (1, 6), (1.5, 9)])
def test_planned_steps_are_the_steps_taken(small_base: Path, tmp_path: Path, epochs: float, steps: int) -> None:
    made = recipe(small_base, prompts=3, update_prompts=3, epochs=epochs, micro_batch=3)
    made = made.model_copy(update={"data": made.data.model_copy(update={"prompts": 18})})
    run = Run.create(tmp_path / "run", made)
    run_rl(run, made, Progress(quiet=True))
    assert len(run.metrics("rl")) == total_steps(made.rl, 18) == steps


@pytest.mark.parametrize(
    "setting",
    [{"beta": 0.1}, {"importance_sampling_level": "sequence"}, {"epsilon": 0.3}, {"entropy_coef": 0.1}],
    ids=str,
)
def test_settings_that_would_be_ignored_are_refused(tmp_path: Path, setting: dict) -> None:
    with pytest.raises(RunError, match="would be ignored"):
        make(tmp_path, **setting)


def test_optimizer_steps_that_span_generations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="do not divide"):
        make(tmp_path, steps_per_generation=1)


def test_a_group_without_two_scores_is_not_informative(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.model.train()
    table = [1.0, 0.0, None, 0.0, None, None, None, None, 1.0, 1.0, None, 1.0, 0.0, 0.0, 0.0, 1.0]
    trainer.reward_funcs = [lambda completions, **_: table[: len(completions)]]
    trainer._calculate_rewards(
        [{}] * 16, [[{"role": "user", "content": "q"}]] * 16, [[{"content": ""}]] * 16, [[1]] * 16
    )
    assert trainer._metrics["train"]["informative_share"] == [0.5]
