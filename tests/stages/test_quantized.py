"""Adapters on a base in 4 bits (QLoRA), against bitsandbytes' own reading of the 4 bits."""

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conftest import small_tokenizer
from heatbath import models
from heatbath import recipe as recipes
from heatbath.errors import RecipeError
from heatbath.progress import Progress
from heatbath.recipe import Recipe
from heatbath.run import Run
from heatbath.stages import memory, pipeline
from heatbath.stages.export import Export, run_export
from heatbath.stages.rl import run_rl
from heatbath.stages.sft import run_sft

bnb = pytest.importorskip("bitsandbytes")
IDS = torch.arange(24).view(2, 12) + 5


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers have whole blocks of 64 inputs."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=101, initializer_range=0.2, tie_word_embeddings=True, eos_token_id=1, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return folder


def quantized_recipe(base: Path, **lora: object) -> Recipe:
    return recipes.parse(
        {
            "model": str(base),
            "precision": "fp32",
            "data": {"source": "arithmetic", "digits": 3, "demos": 16, "validation": 4, "prompts": 8, "test": 4},
            "lora": {"rank": 4, "quantization": "nf4", **lora},
            "sft": {"objective": {"name": "gift", "beta": 4.0}, "lr": 1e-2, "batch": 8, "micro_batch": 4, "epochs": 2},
            "rl": {
                "policy": {"name": "grpo", "kl": 0.05},
                "lr": 1e-3,
                "prompts": 4,
                "update_prompts": 4,
                "group_size": 4,
                "micro_batch": 8,
                "max_new_tokens": 12,
                "readiness": 0,
            },
            "eval": {"samples": 1, "k": [1], "max_new_tokens": 12},
        }
    )


@pytest.fixture(scope="module")
def finished(wide_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a warm start and RL on the base in 4 bits."""
    recipe = quantized_recipe(wide_base)
    run = Run(tmp_path_factory.mktemp("runs") / "run", recipe).write()
    run_sft(run, recipe, Progress(quiet=True))
    run_rl(run, recipe, Progress(quiet=True))
    return run


def as_stored(base: Path) -> LlamaForCausalLM:
    """The base with every linear layer as 4 bits keep it, by bitsandbytes' own functions."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            packed, state = bnb.functional.quantize_4bit(layer.weight.data, quant_type="nf4")
            layer.weight.data = bnb.functional.dequantize_4bit(packed, state).to(torch.float32)
    return model


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_the_base_is_trained_on_as_4_bits_keep_it(wide_base: Path) -> None:
    model = models.load_trained(str(wide_base), quantized_recipe(wide_base))
    whole = AutoModelForCausalLM.from_pretrained(wide_base, dtype=torch.float32).eval()
    assert (logits(model) - logits(as_stored(wide_base))).abs().max() < 1e-4
    assert (logits(model) - logits(whole)).abs().max() > 0.1, "rounding to 4 bits changes nothing"
    held = sum(p.numel() * p.element_size() for n, p in model.named_parameters() if "layers" in n and p.dim() > 1)
    assert held < 0.2 * sum(4 * p.numel() for n, p in whole.named_parameters() if "layers" in n and p.dim() > 1)


@pytest.mark.parametrize("policy", ["init", "final"])
def test_the_saved_policy_is_the_one_that_was_trained(finished: Run, wide_base: Path, policy: str) -> None:
    """A plain float32 model: the base as 4 bits keep it, with the adapter on it; and no rounding of the sum."""
    saved = models.load_model(str(finished.checkpoint(policy)), torch.float32)
    assert not models.is_quantized(saved) and not hasattr(saved.config, "quantization_config")
    trained = peft.PeftModel.from_pretrained(as_stored(wide_base), finished.checkpoint(policy) / "adapter").eval()
    assert (logits(saved) - logits(trained)).abs().max() < 1e-4
    assert (logits(saved) - logits(as_stored(wide_base))).abs().max() > 1e-2, "the adapter learned nothing"
    weights = trained.state_dict()
    assert {w.dtype for n, w in weights.items() if "lora" in n} == {torch.float32}


def test_rl_goes_on_with_the_adapter_of_the_warm_start(finished: Run, wide_base: Path) -> None:
    """Its first KL to the start is zero, and it ends elsewhere."""
    rows = [row for row in finished.metrics("rl") if "kl_init" in row]
    assert abs(rows[0]["kl_init"]) < 1e-5
    start, end = (
        models.load_model(str(finished.checkpoint(policy)), torch.float32).state_dict() for policy in ("init", "final")
    )
    assert any((start[name] != end[name]).any() for name in start)


def test_an_export_reads_back_as_the_policy(finished: Run, tmp_path: Path) -> None:
    """Merged exactly; the adapter alone stands on the base in full precision, and what that costs is told."""
    merged = run_export(finished, Export(tmp_path / "merged"), Progress(quiet=True))
    assert merged["compared"]["largest_difference_nats"] < 1e-5
    alone = run_export(finished, Export(tmp_path / "alone", adapter=True), Progress(quiet=True))
    assert alone["compared"]["largest_difference_nats"] > 1e-3


def test_without_bitsandbytes_nothing_starts(wide_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"heatbath\[qlora\]"):
        pipeline.check(quantized_recipe(wide_base), ("sft",))


def test_the_plan_counts_4_bits(wide_base: Path) -> None:
    held = memory.estimate(quantized_recipe(wide_base), 40, 20)["sft"]["weights"]
    whole = memory.estimate(quantized_recipe(wide_base, quantization=None), 40, 20)["sft"]["weights"]
    assert held < whole
