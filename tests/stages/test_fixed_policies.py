"""The policies that RL compares with, as models and as adapters: which one each name is."""

from pathlib import Path

import peft
import pytest
import torch

from conftest import small_model
from heatbath import models
from heatbath import recipe as recipes
from heatbath.errors import RunError
from heatbath.progress import Progress
from heatbath.run import Run
from heatbath.stages.fixed_policies import INIT, FixedPolicies
from heatbath.stages.rl import run_rl, start_of
from heatbath.stages.sft import run_sft

IDS = torch.arange(4, 24)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def stirred(model, seed: int, adapter: str):
    for name, p in model.named_parameters():
        if f".{adapter}." in name:
            p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    return model


def test_adapters_are_the_three_policies_without_a_second_model() -> None:
    base, config = small_model(), peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    expected = {"base": logits(base)}
    for name, seed in (("init", 1), ("trained", 2)):
        expected[name] = logits(stirred(peft.get_peft_model(small_model(), config), seed, "default"))
    model = peft.get_peft_model(base, config)
    model.add_adapter(INIT, config)
    stirred(stirred(model, 1, INIT), 2, "default")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    fixed = FixedPolicies(model, None, None)
    for name in ("base", "init"):
        with fixed.model_of(name) as found:
            assert found is model
            torch.testing.assert_close(logits(found), expected[name])
        torch.testing.assert_close(logits(model), expected["trained"])
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable


def test_without_an_init_adapter_the_start_is_the_model_with_its_adapters_off() -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    model = stirred(peft.get_peft_model(small_model(), config), 3, "default")
    for name in ("init", "base"):
        with FixedPolicies(model, None, None).model_of(name) as found:
            torch.testing.assert_close(logits(found), logits(small_model()))


def recipe(base: Path, policy: dict) -> recipes.Recipe:
    small = {"prompts": 4, "update_prompts": 2, "group_size": 2, "micro_batch": 2, "max_new_tokens": 6, "lr": 1e-2}
    return recipes.parse(
        {
            "model": str(base),
            "precision": "fp32",
            "data": {"source": "arithmetic", "demos": 8, "validation": 0, "prompts": 8, "test": 2},
            "lora": {"rank": 2},
            "sft": {"objective": "sft", "lr": 1e-2, "epochs": 2, "batch": 4},
            "rl": {**small, "policy": policy, "readiness": 0},
        }
    )


def verdicts(settings, grader):
    return [lambda completions, **_: [float(len(c[0]["content"]) % 3) for c in completions]]


@pytest.mark.parametrize("reference", ["init", "base"])
def test_rl_goes_on_training_the_warm_starts_adapter(small_base: Path, tmp_path: Path, monkeypatch, reference) -> None:
    monkeypatch.setattr("heatbath.stages.rl.reward_functions", verdicts)
    made = recipe(small_base, {"name": "grpo", "kl": 0.1, "reference": reference})
    run = Run.create(tmp_path / "run", made)
    run_sft(run, made, Progress(quiet=True))
    start = start_of(run, made)
    torch.testing.assert_close(logits(start), logits(models.load_model(str(run.checkpoint("init")), torch.float32)))
    assert (logits(start) - logits(models.load_model(str(small_base), torch.float32))).abs().max() > 1e-3
    run_rl(run, made, Progress(quiet=True))
    first = run.metrics("rl")[0]
    assert first["kl_init"] == pytest.approx(0.0, abs=1e-9)
    assert (first["kl_reference"] > 1e-6) == (reference == "base")
    final = models.load_model(str(run.checkpoint("final")), torch.float32)
    assert (logits(final) - logits(start)).abs().max() > 1e-4
    stacked = peft.PeftModel.from_pretrained(
        models.load_model(str(small_base), torch.float32), run.checkpoint("final") / "adapter"
    )
    torch.testing.assert_close(logits(stacked), logits(final))


def test_a_warm_start_without_its_adapter_is_named(small_base: Path, tmp_path: Path) -> None:
    made = recipe(small_base, {"name": "grpo"})
    run = Run.create(tmp_path / "run", made)
    run.checkpoint("init").mkdir(parents=True)
    with pytest.raises(RunError, match="without its adapter"):
        start_of(run, made)
