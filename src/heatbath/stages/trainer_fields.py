"""`[sft.trainer]` and `[rl.trainer]`: any field of TRL's own configuration, checked against that class."""

from __future__ import annotations

import difflib
import functools
import typing
from dataclasses import fields
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

# Fields that a key of the recipe sets already: two places for one setting would overwrite one of them.
SAID_ELSEWHERE = {
    "learning_rate": "lr",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup_steps",
    "weight_decay": "weight_decay",
    "adam_beta1": "adam_betas",
    "adam_beta2": "adam_betas",
    "max_grad_norm": "max_grad_norm",
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "save_steps": "save_every",
    "save_strategy": "save_every",
    "save_total_limit": "save_every",
    "per_device_train_batch_size": "micro_batch",
    "per_device_eval_batch_size": "micro_batch",
    "gradient_accumulation_steps": "batch and micro_batch",
}
ONLY = {
    "sft": {
        "max_length": "max_length",
        "packing": "packing",
        "padding_free": "packing",
        "logging_steps": "log_every",
        "loss_type": "objective",
        "label_smoothing_factor": "objective",
    },
    "rl": {
        "num_generations": "group_size",
        "steps_per_generation": "prompts and update_prompts",
        "generation_batch_size": "prompts",
        "max_completion_length": "max_new_tokens",
        "temperature": "temperature",
        "beta": "policy",
        "epsilon": "clip",
        "epsilon_high": "clip",
        "loss_type": "policy",
        "scale_rewards": "policy",
    },
}
# Fields that heatbath itself needs at one value.
FIXED = {
    "output_dir": "the run's folder holds everything",
    "seed": "the recipe's top-level seed decides",
    "bf16": "the recipe's top-level precision decides",
    "fp16": "the recipe's top-level precision decides",
    "resume_from_checkpoint": "--resume finds the checkpoint",
    "dataset_kwargs": "heatbath renders the rows itself",
    "remove_unused_columns": "heatbath renders the rows itself",
    "do_train": "the stage trains",
}


def check_fields(stage: str, given: dict[str, Any]) -> None:
    """Raises ValueError naming every field that the configuration lacks, refuses, or that the recipe sets itself."""
    types = _types(stage)
    problems = []
    said = SAID_ELSEWHERE | ONLY[stage]
    for name, value in given.items():
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            problems.append(
                f"trl.{_class_name(stage)} has no field '{name}'" + (f", did you mean '{near[0]}'?" if near else "")
            )
        elif name in said:
            problems.append(f"{name} is set by {stage}.{said[name]}; set that instead")
        elif name in FIXED:
            problems.append(f"{name} cannot be set: {FIXED[name]}")
        elif (trouble := _refusal(types[name], value)) is not None:
            problems.append(f"{name}: {trouble} (got {value!r})")
    if problems:
        raise ValueError("; ".join(problems))


def _refusal(kind: Any, value: Any) -> str | None:
    try:
        TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        message: str = error.errors()[0]["msg"]
        return message[0].lower() + message[1:]
    return None


def _class_name(stage: str) -> str:
    return {"sft": "SFTConfig", "rl": "GRPOConfig"}[stage]


@functools.cache
def _types(stage: str) -> dict[str, Any]:
    """Name → type of every field of the stage's configuration class."""
    import trl

    cls = getattr(trl, _class_name(stage))
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}
