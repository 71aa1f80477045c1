"""The warm start: supervised training of the base on demonstrations, under any objective.

Reads the demonstrations, measures how surprising the base finds them, settles what the objective leaves open, trains,
and saves the policy `init`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from heatbath import models, ranks
from heatbath.data import checks, sources
from heatbath.data.rendering import Rendered
from heatbath.ideas.objectives import objective
from heatbath.ideas.replay import Replayed
from heatbath.ideas.statistics import Objective
from heatbath.progress import Progress
from heatbath.recipe import SFT, Recipe
from heatbath.reference import Reference
from heatbath.run import Run
from heatbath.sections import Preference, Pretrain
from heatbath.stages.measuring import MeasuredBase, require_columns, settle
from heatbath.stages.objective_trainer import ObjectiveTrainer
from heatbath.stages.replay import demonstrated, with_replay
from heatbath.stages.training import (
    RowCollator,
    log_to_run,
    lora_config,
    optimizer_arguments,
    require_isolation,
    save_policy,
    train,
)


def run_sft(run: Run, recipe: Recipe, progress: Progress) -> None:
    """Trains the base of the recipe on its demonstrations; writes metrics, surprise.json and the policy `init`."""
    splits = sources.of(recipe)
    sources.require(splits, recipe, ("sft",))
    settings, start = recipe.sft, run.model_of("base")
    assert settings is not None
    tokenizer = models.load_tokenizer(start, run.template_of("base"))
    demos = checks.rendered(tokenizer, splits.demos, recipe, "demos")
    validation = checks.rendered(tokenizer, splits.validation, recipe, "validation")
    if cut := sum(row.truncated for row in demos):
        progress.say(
            f"warning: {cut} of {len(demos)} demonstrations are cut at {settings.max_length} tokens, without EOS"
        )
    model = models.load_trained(start, recipe)
    checks.require_vocabulary(tokenizer, model.config)
    run.require_same_base(models.fingerprint_of_source(model, start))
    goal = objective(settings.objective.name, **settings.objective.hyper)
    require_columns(goal, demos)
    if settings.packing:
        require_isolation(model, demos)
    kinds = [row.kind for row in splits.demos]
    base = MeasuredBase(recipe, model, tokenizer, goal)
    rows = [*demos, *validation]
    base.fill(goal, rows, progress)
    goal = settle(run, base, tokenizer, goal, demos, kinds, progress)
    if settings.replay is not None:
        demos = with_replay(run, recipe, model, tokenizer, splits.demos, demos, goal, progress)
        validation, goal = demonstrated(validation), Replayed(goal)
        rows = [*demos, *validation]
    base.fill(goal, rows, progress)
    with run.new_checkpoint("init") as folder:
        trainer = build_trainer(run, recipe, model, tokenizer, goal, demos, validation, base.reference())
        log_to_run(trainer, run, "sft", progress, show=("nll", "val/nll", "keep", "tokens_per_second"))
        with progress.bar(f"sft ({settings.objective.name})", total_steps(settings, len(demos))):
            train(trainer, run, "sft", progress)
        save_policy(trainer, folder)


def build_trainer(
    run: Run,
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    goal: Objective,
    demos: list[Rendered],
    validation: list[Rendered],
    reference: Reference | None,
) -> ObjectiveTrainer:
    """The trainer of a recipe's [sft] table."""
    assert recipe.sft is not None
    return ObjectiveTrainer(
        model=model,
        args=training_arguments(recipe, run.working("sft"), validating=bool(validation)),
        train_dataset=dataset(demos),
        eval_dataset=dataset(validation) if validation else None,
        processing_class=tokenizer,
        data_collator=RowCollator(tokenizer.pad_token_id, packing=recipe.sft.packing),
        objective=goal,
        reference=reference,
        reduction=recipe.sft.reduction,
        peft_config=lora_config(recipe.lora),
    )


def training_arguments(recipe: Recipe, folder: Path, *, validating: bool) -> trl.SFTConfig:
    """The recipe's [sft] table in TRL's terms."""
    settings = recipe.sft
    assert settings is not None
    micro, accumulated = ranks.micro_batches(settings.batch, settings.micro_batch, ranks.count(), "sft.batch")
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": accumulated,
        "logging_steps": settings.log_every,
        "eval_strategy": "epoch" if validating else "no",
        "eval_on_start": validating,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,  # all of them are numbers that the objective may read
        "max_length": None,
        **optimizer_arguments(settings, recipe),
        **settings.trainer,
    }
    return trl.SFTConfig(**arguments)


def total_steps(settings: SFT | Preference | Pretrain, rows: int) -> int:
    """Optimizer steps of the stage; the last one of an epoch may be smaller."""
    steps = math.ceil(math.ceil(rows / settings.batch) * settings.epochs)
    most = None if isinstance(settings, Pretrain) else settings.max_steps
    return min(steps, most) if most else steps


def dataset(rows: list[Rendered]) -> Dataset:
    return Dataset.from_list([{"input_ids": r.input_ids, "labels": r.labels, **r.columns} for r in rows])
