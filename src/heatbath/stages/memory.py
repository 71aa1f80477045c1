"""An estimate of the memory a stage needs, from the model's configuration alone.

Weights, gradients and AdamW's two moments are float32 (16 bytes per trained parameter). Activations are counted per
token and layer. It is an estimate: docs/LOG.md compares it with what was measured.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, PreTrainedModel

from heatbath import models
from heatbath.errors import RecipeError, RunError
from heatbath.ideas.objectives import objective
from heatbath.ideas.passes import chunk_tokens
from heatbath.ideas.policy import policy
from heatbath.ideas.statistics import needs_reference
from heatbath.recipe import Recipe
from heatbath.run import Run
from heatbath.stages.sharding import weights_are_sharded
from heatbath.stages.training import lora_config

GIB = 2**30
LIBRARIES = int(0.5 * GIB)  # torch, transformers and TRL themselves
LOGS = 16 * 2**20  # bytes of logs, samples and a report
ROUND = 4  # decimals of a GiB
BLOCK = 64  # weights that share a scale in 4 bits
QUANTIZED = 0.5 + 4 / BLOCK  # bytes of such a weight, its share of the float32 scale included


def estimate(
    recipe: Recipe, longest: int, longest_prompt: int, longest_preference: int = 0, *, gpu: bool | None = None
) -> dict[str, dict[str, float]]:
    """GiB on one device, by stage and part. `longest` is the number of tokens of the longest demonstration, and
    `longest_preference` of the longest prompt with a completion that is preferred or not. `gpu` says what device it is
    (None: this machine's)."""
    short = recipe.precision != "fp32" if gpu else models.autocast_dtype(recipe.precision) is not None
    kind = "cuda" if (torch.cuda.is_available() if gpu is None else gpu) else "cpu"
    config = _config(recipe)
    shape = _shape(config, trusted=isinstance(recipe.model, models.TrustedName))
    trained = _lora_parameters(recipe, config) if recipe.lora else shape["parameters"]
    shape["quantized"] = shape["linear"] if recipe.lora and recipe.lora.quantization else 0
    stages: dict[str, dict[str, float]] = {}
    if recipe.sft is not None:
        tokens = min(recipe.sft.micro_batch, recipe.sft.batch) * longest
        goal = objective(recipe.sft.objective.name, **recipe.sft.objective.hyper)
        beside = needs_reference(goal) and recipe.sft.reference == "model" and not recipe.lora
        stages["sft"] = _parts(shape, trained, tokens, short, kind, frozen="base" if beside else "")
        if needs_reference(goal) and recipe.sft.reference != "model":
            stages["sft"]["head of the base"] = round(4 * shape["V"] * shape["d"] / GIB, ROUND)
        if hasattr(goal, "refresh"):
            stages["sft"]["old policy"] = round(4 * trained / GIB, ROUND)
    if recipe.preference is not None:
        tokens = 2 * min(recipe.preference.micro_batch, recipe.preference.batch) * longest_preference
        stages["preference"] = _parts(shape, trained, tokens, short, kind, frozen="" if recipe.lora else "frozen start")
    if recipe.rl is not None:
        width = longest_prompt + recipe.rl.max_new_tokens
        tokens = recipe.rl.micro_batch * width
        stages["rl"] = _parts(shape, trained, tokens, short, kind, frozen="" if recipe.lora else "frozen start")
        method = policy(recipe.rl.policy.name, **recipe.rl.policy.hyper)
        if method.needs_reference and method.reference == "base" and recipe.sft and not recipe.lora:
            stages["rl"]["frozen base"] = round(4 * shape["parameters"] / GIB, ROUND)
        # The completions of a generation are sampled at once, into a cache of keys and values.
        rows = recipe.rl.prompts * recipe.rl.group_size
        cached = rows * width * shape["layers"] * 2 * shape["kv"]
        stages["rl"]["sampling"] = round(cached * (2 if short else 4) / GIB, ROUND)
    return stages


def _parts(
    shape: dict[str, int], trained: int, tokens: int, short: bool, kind: str, *, frozen: str
) -> dict[str, float]:
    """`frozen`: what the model is called that stands beside the policy, with which it is compared, if there is one."""
    all_parameters, quantized = shape["parameters"], shape["quantized"]
    casts = 2 * (all_parameters - quantized) if short else 0  # 16-bit copies of the weights within a step
    width = 2 if short else 4
    # Kept for the backward pass of a layer: float32 around the two norms and the residuals (7 d), and at the width of
    # the products the projections' inputs, queries, keys and values before and after rotation, and the gated MLP.
    per_layer = 4 * 7 * shape["d"] + width * (6 * shape["d"] + 3 * shape["kv"] + 4 * shape["ff"])
    if kind == "cuda":  # checkpointed: one layer whole, of the others their input
        activations = tokens * (per_layer + shape["layers"] * width * shape["d"])
    else:
        activations = tokens * per_layer * shape["layers"]
    # Of a chunk, policy and base: logits in the products' own width and what they are worked on in.
    logits = 2 * (4 + width) * min(tokens, chunk_tokens(shape["V"], kind)) * shape["V"]
    parts = {
        "weights": 4 * (all_parameters - quantized) + QUANTIZED * quantized + casts,
        **({frozen: 4 * all_parameters} if frozen else {}),
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "activations": activations,
        "logits": logits,
        "libraries": LIBRARIES,
    }
    return {name: round(size / GIB, ROUND) for name, size in parts.items()}


def parameters(recipe: Recipe) -> int:
    """Of the recipe's model, from its configuration."""
    return int(_model(_config(recipe), trusted=isinstance(recipe.model, models.TrustedName)).num_parameters())


def disk(recipe: Recipe, stage: str) -> int:
    """Bytes that a stage writes: its policy in float32, and while it trains a checkpoint more than it keeps, each with
    weights and AdamW's moments of what is trained, PSFT's old policy, and the moments of ReLIFT's own AdamW."""
    settings = getattr(recipe, stage)
    if stage == "eval" or settings is None:
        return LOGS
    config = _config(recipe)
    whole = _model(config, trusted=isinstance(recipe.model, models.TrustedName)).num_parameters()
    trained = _lora_parameters(recipe, config) if recipe.lora and stage != "pretrain" else whole
    kept = settings.save_total_limit + 1 if settings.save_every else 1  # one where it is interrupted
    own = 0
    if stage == "sft" and hasattr(objective(settings.objective.name, **settings.objective.hyper), "refresh"):
        own = 4
    elif stage == "rl" and settings.policy.name == "relift":
        own = 8
    if weights_are_sharded():  # accelerate writes the weights once more
        own += 4
    return LOGS + 4 * whole + kept * (12 + own) * trained


def require_room(run: Run, recipe: Recipe, stage: str) -> None:
    """Raises RunError where the disk of the run's folder has no room for what a stage will write; checkpoints that are
    there already make way."""
    there = run.folder.resolve()
    needed = disk(recipe, stage) - sum(p.stat().st_size for p in run.working(stage).rglob("*") if p.is_file())
    while not there.exists():
        there = there.parent
    if (free := shutil.disk_usage(there).free) < needed:
        keeps = f", or keep fewer checkpoints ({stage}.save_total_limit, {stage}.save_every = 0)" * (stage != "eval")
        raise RunError(
            f"the {stage} stage will write about {needed / GIB:,.2f} GiB, and {free / GIB:,.2f} GiB are free",
            str(run.folder),
            f"make room, choose another --out{keeps}",
        )


def _config(recipe: Recipe) -> Any:
    if recipe.model is None or recipe.model == models.TINY:
        from heatbath import recipe as recipes
        from heatbath.stages.pretrain import model_config

        return model_config(recipe if recipe.model is None else recipes.load("base-tiny"))
    return models.load_config(recipe.model)


def _model(config: Any, *, trusted: bool = False) -> Any:
    """The model of a configuration without its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trusted)


def _shape(config: Any, *, trusted: bool = False) -> dict[str, int]:
    model = _model(config, trusted=trusted)
    text = config.get_text_config()
    d, heads = text.hidden_size, text.num_attention_heads
    return {
        "parameters": model.num_parameters(),
        "linear": sum(m.weight.numel() for m in _quantizable(model)),
        "layers": text.num_hidden_layers,
        "d": d,
        "ff": getattr(text, "intermediate_size", None) or 4 * d,
        "kv": (getattr(text, "num_key_value_heads", None) or heads) * (getattr(text, "head_dim", None) or d // heads),
        "V": text.vocab_size,
    }


def require_lora_targets(recipe: Recipe) -> None:
    """Raises RecipeError where the adapters do not fit the model: unknown modules, or the output head."""
    assert recipe.lora is not None
    model = _with_adapters(recipe, _config(recipe))
    if recipe.lora.quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            "bitsandbytes, which stores 4 bits, is not installed", "lora.quantization", "pip install 'heatbath[qlora]'"
        )
    if isinstance(model.get_base_model().get_output_embeddings(), BaseTunerLayer):
        raise RecipeError(
            "an adapter on the output head would leave no base to compare with", "lora.targets", "leave lm_head out"
        )


def _quantizable(model: PreTrainedModel) -> list[torch.nn.Linear]:
    """The layers that bitsandbytes stores in 4 bits: all linear ones but the head."""
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings()]


def _lora_parameters(recipe: Recipe, config: Any) -> int:
    trained: int = _with_adapters(recipe, config).get_nb_trainable_parameters()[0]
    return trained


def _with_adapters(recipe: Recipe, config: Any) -> peft.PeftModel:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
        try:
            return peft.get_peft_model(model, lora_config(recipe.lora))
        except (ValueError, re.error) as error:  # no such layer, or no pattern
            first = str(error).strip().splitlines()[0]
            raise RecipeError(
                f"the adapters do not fit the model: {first}", "lora.targets", f"its linear layers: {', '.join(linear)}"
            ) from None
