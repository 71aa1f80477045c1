"""Reinforcement learning on verifiable prompts, from the warm start (or from the base where the recipe has none).

Samples groups of completions, grades them, takes the policy's steps, and saves the policy `final`.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import torch
import trl
from datasets import Dataset
from transformers import IntervalStrategy, PreTrainedModel, PreTrainedTokenizerBase

from heatbath import models, ranks
from heatbath.data import checks, rendering, sources
from heatbath.data.rows import Row, Splits
from heatbath.errors import RunError
from heatbath.ideas.guided import Relift
from heatbath.ideas.policy import policy
from heatbath.ideas.surrogates import Policy
from heatbath.progress import Progress
from heatbath.recipe import RL, Recipe
from heatbath.run import Run
from heatbath.stages import readiness
from heatbath.stages.fixed_policies import INIT
from heatbath.stages.policy_trainer import PolicyTrainer, require_only_what_the_policy_does
from heatbath.stages.relift import ReliftTrainer
from heatbath.stages.rewards import Reward, grader_of, reward_functions
from heatbath.stages.training import ADAPTER, log_to_run, lora_config, optimizer_arguments, save_policy, train


def run_rl(run: Run, recipe: Recipe, progress: Progress) -> None:
    """Trains the start of the recipe with verifiable rewards; writes metrics and the policy `final`."""
    splits = sources.of(recipe)
    sources.require(splits, recipe, ("rl",))
    settings = recipe.rl
    assert settings is not None
    before = "init" if recipe.sft is not None else "base"
    with run.new_checkpoint("final") as folder, grader_of(recipe.reward) as grader:
        tokenizer = models.load_tokenizer(run.model_of(before), run.template_of(before))
        model = start_of(run, recipe)
        checks.require_vocabulary(tokenizer, model.config)
        if before == "base":
            run.require_same_base(models.fingerprint_of_source(model, run.model_of("base")))
        ranks.agreed(lambda: readiness.measure(run, recipe, splits.prompts, tokenizer, model, grader, progress))
        trainer = build_trainer(run, recipe, model, tokenizer, splits, reward_functions(recipe.reward, grader))
        shown = ("reward", "informative_share", "truncated_share", "kl_init", "held_out/right")
        log_to_run(trainer, run, "rl", progress, show=shown)
        with progress.bar(f"rl ({settings.policy.name})", total_steps(settings, len(splits.prompts))):
            train(trainer, run, "rl", progress)
        save_policy(trainer, folder)


def start_of(run: Run, recipe: Recipe) -> PreTrainedModel | peft.PeftModel:
    """The policy that RL starts from. Where the warm start was trained with adapters, RL goes on training those: the
    base with the warm start's adapter, and a frozen copy of it under the name "init"."""
    if recipe.sft is None or recipe.lora is None:
        return models.load_trained(run.model_of("base" if recipe.sft is None else "init"), recipe)
    adapter = run.checkpoint("init") / ADAPTER
    if not adapter.is_dir():
        raise RunError("the warm start was saved without its adapter", str(adapter), "train it again: heatbath sft")
    model = models.load_trained(run.model_of("base"), recipe)
    run.require_same_base(models.fingerprint_of_source(model, run.model_of("base")))
    stacked = models.load_adapter(model, adapter, is_trainable=True)
    stacked.load_adapter(str(adapter), adapter_name=INIT, is_trainable=False)
    return stacked


def build_trainer(
    run: Run,
    recipe: Recipe,
    model: PreTrainedModel | peft.PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    splits: Splits,
    rewards: list[Reward],
) -> PolicyTrainer:
    """The trainer of a recipe's [rl] table."""
    settings = recipe.rl
    assert settings is not None
    goal = policy_of(settings)
    stacked = isinstance(model, peft.PeftModel)
    initial = None if recipe.lora is not None else copy.deepcopy(model)
    base = None
    if goal.needs_reference and goal.reference == "base" and recipe.lora is None:
        base = initial if recipe.sft is None else models.load_model(run.model_of("base"), torch.float32)
    demos = checks.demonstrations(tokenizer, splits.prompts, recipe) if goal.needs_demonstrations else None
    asked = min(settings.eval_prompts, len(splits.test)) if settings.eval_every else 0
    held_out = splits.test[: asked - asked % ranks.count()]  # as many for each process: none is asked twice
    arguments = training_arguments(recipe, run.working("rl"))
    if held_out and ranks.count() > 1:  # in whole batches: no process is given a problem once more to fill one
        each, most = len(held_out) // ranks.count(), arguments.per_device_eval_batch_size
        arguments.per_device_eval_batch_size = max(size for size in range(1, most + 1) if each % size == 0)
    elif settings.eval_every and not held_out:
        arguments.eval_strategy, arguments.eval_on_start = IntervalStrategy.NO, False
    cls = ReliftTrainer if isinstance(goal, Relift) else PolicyTrainer
    return cls(
        model=model,
        args=arguments,
        train_dataset=_dataset(splits.prompts, recipe, demos),
        eval_dataset=_dataset(held_out, recipe) if held_out else None,
        processing_class=tokenizer,
        reward_funcs=rewards,
        policy=goal,
        initial=initial,
        base=base,
        kl_every=settings.kl_every,
        peft_config=None if stacked else lora_config(recipe.lora),
    )


def policy_of(settings: RL) -> Policy:
    """The policy of a recipe's [rl] table."""
    return policy(settings.policy.name, **settings.policy.hyper)


def _dataset(rows: list[Row], recipe: Recipe, demos: list[list[int]] | None = None) -> Dataset:
    columns: dict[str, list[Any]] = {
        "prompt": [rendering.messages(row, recipe.data.system) for row in rows],
        "gold": [row.answer for row in rows],
    }
    return Dataset.from_dict(columns | ({"demo": demos} if demos is not None else {}))


def training_arguments(recipe: Recipe, folder: Path) -> trl.GRPOConfig:
    """The recipe's [rl] table in TRL's terms."""
    settings = recipe.rl
    assert settings is not None
    rows, processes = settings.update_prompts * settings.group_size, ranks.count()
    micro, update = ranks.micro_batches(rows, settings.micro_batch, processes, "rl.update_prompts")
    steps = settings.prompts // settings.update_prompts  # of one generation; only between two can the stage be resumed
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": update,
        "steps_per_generation": update * steps,
        "num_generations": settings.group_size,
        "max_completion_length": settings.max_new_tokens,
        "temperature": settings.temperature,
        "beta": 0.0,
        "trust_remote_code": recipe.trust_remote_code,
        "reward_weights": list(recipe.reward.weighted.values()),
        "logging_steps": 1,
        **optimizer_arguments(settings, recipe, window=steps),
        **_evaluation(settings),
        **settings.trainer,
    }
    made = trl.GRPOConfig(**arguments)
    require_only_what_the_policy_does(made)
    return made


def _evaluation(settings: RL) -> dict[str, Any]:
    if not settings.eval_every:
        return {}
    return {
        "eval_strategy": "steps",
        "eval_steps": settings.eval_every,
        "eval_on_start": True,
        "num_generations_eval": 1,
        "per_device_eval_batch_size": max(
            1, min(settings.eval_prompts, settings.prompts * settings.group_size) // ranks.count()
        ),
    }


def total_steps(settings: RL, rows: int) -> int:
    """Optimizer steps of the stage: an epoch has whole generations only, each of prompts / update_prompts steps."""
    steps = math.ceil(rows // settings.prompts * (settings.prompts // settings.update_prompts) * settings.epochs)
    return min(steps, settings.max_steps) if settings.max_steps else steps
