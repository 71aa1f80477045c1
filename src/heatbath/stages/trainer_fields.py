"""`[sft.trainer]`, `[preference.trainer]`, `[rl.trainer]`: any field of TRL's own configuration, checked against it."""

from __future__ import annotations

import difflib
import functools
import typing
from dataclasses import fields
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from heatbath.addresses import require_no_credentials
from heatbath.sections import PREFERENCE_LOSSES

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
    "save_total_limit": "save_total_limit",
    "per_device_train_batch_size": "micro_batch",
    "per_device_eval_batch_size": "micro_batch",
}
ONLY = {
    "sft": {
        "max_length": "max_length",
        "packing": "packing",
        "padding_free": "packing",
        "gradient_accumulation_steps": "batch and micro_batch",
        "logging_steps": "log_every",
        "loss_type": "objective",
        "label_smoothing_factor": "objective",
    },
    "preference": {
        "max_length": "max_length",
        "gradient_accumulation_steps": "batch and micro_batch",
        "logging_steps": "log_every",
        "loss_type": "loss",
        "beta": "beta",
    },
    "rl": {
        "gradient_accumulation_steps": "update_prompts, group_size and micro_batch",
        "num_generations": "group_size",
        "steps_per_generation": "prompts and update_prompts",
        "generation_batch_size": "prompts",
        "max_completion_length": "max_new_tokens",
        "temperature": "temperature",
        "beta": "policy",
        "epsilon": "policy",
        "epsilon_high": "policy",
        "loss_type": "policy",
        "scale_rewards": "policy",
    },
}
ROWS = "heatbath renders the rows itself"
EXACT = "a resumed run would not be the same run"
EVALUATION = "heatbath decides when to validate (rl.eval_every)"
POLICY = "the policy decides the loss"
LOGGED = "heatbath writes its own log"
# Fields that would be ignored, or break what heatbath promises, with the reason.
REFUSED = {
    "output_dir": "the run's folder holds everything",
    "seed": "the recipe's top-level seed decides",
    "data_seed": "the recipe's top-level seed decides",
    "bf16": "the recipe's top-level precision decides",
    "fp16": "the recipe's top-level precision decides",
    "resume_from_checkpoint": "--resume finds the checkpoint",
    "do_train": "the stage trains",
    **dict.fromkeys(("save_only_model", "ignore_data_skip", "auto_find_batch_size", "load_best_model_at_end"), EXACT),
    **dict.fromkeys(("metric_for_best_model", "eval_strategy", "eval_steps", "eval_on_start", "do_eval"), EVALUATION),
    **dict.fromkeys(("dataset_kwargs", "dataset_text_field", "dataset_num_proc", "remove_unused_columns"), ROWS),
    **dict.fromkeys(("eos_token", "pad_token", "chat_template_path", "truncation_mode", "pad_to_multiple_of"), ROWS),
    **dict.fromkeys(("completion_only_loss", "assistant_only_loss", "shuffle_dataset"), ROWS),
    **dict.fromkeys(("packing_strategy", "eval_packing", "chat_template_kwargs"), ROWS),
    "model_init_kwargs": "heatbath loads the model itself",
    "trust_remote_code": "the recipe's top-level trust_remote_code decides",
    "hub_token": "a recipe is copied into the run and its report; log in with `hf auth login`",
}
REFUSED_IN_RL = {
    "logging_steps": "the log has a row for every step",
    "num_iterations": "each generation is used once",
    "shuffle_dataset": "the recipe's top-level seed decides",
    **dict.fromkeys(("delta", "importance_sampling_level", "top_entropy_quantile", "entropy_coef"), POLICY),
    **dict.fromkeys(("use_adaptive_entropy", "entropy_target", "off_policy_mask_threshold"), POLICY),
    **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), POLICY),
    **dict.fromkeys(("multi_objective_aggregation", "use_bias_correction_kl"), POLICY),
    **dict.fromkeys(("entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "router_aux_loss_coef"), POLICY),
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos", "label_smoothing_factor"), POLICY),
    **dict.fromkeys(("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg"), POLICY),
    **dict.fromkeys(("log_completions", "log_unique_prompts", "num_completions_to_print", "log_multimodal"), LOGGED),
    "reward_weights": "reward.weights decides",
    "disable_dropout": "dropout is off: ratios compare log-probabilities of two passes",
    **dict.fromkeys(("num_generations_eval", "per_device_eval_batch_size"), "rl.eval_prompts decides"),
}
REFUSED_IN_PREFERENCE = {
    "disable_dropout": "dropout is off: policy and reference are compared",
    "padding_free": "TRL does not offer it at present",
    "loss_weights": "there is one loss",
    "label_smoothing_factor": "there are no labels; the losses' own is label_smoothing",
    **dict.fromkeys(("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"), EXACT),
}
REFUSED_IN = {"preference": REFUSED_IN_PREFERENCE, "rl": REFUSED_IN_RL}
# Fields that only one of TRL's vLLM modes reads; every other vllm_ field is read by both.
READ_BY_MODE = {
    "colocate": (
        "vllm_gpu_memory_utilization",
        "vllm_max_model_length",
        "vllm_tensor_parallel_size",
        "vllm_enable_sleep_mode",
        "vllm_model_impl",
    ),
    "server": (
        "vllm_server_base_url",
        "vllm_server_host",
        "vllm_server_port",
        "vllm_server_timeout",
        "vllm_group_port",
    ),
}
WITHOUT_VLLM = ("use_transformers_continuous_batching", "cache_implementation")
CORRECTION = "vllm_importance_sampling_correction"
# What `generation_kwargs` may not hold, for the recipe says it elsewhere; and a seed, which TRL would send with every
# request, so that each step would draw with the same numbers.
GENERATION = {
    "temperature": "rl.temperature",
    **dict.fromkeys(("max_tokens", "max_new_tokens", "max_length"), "rl.max_new_tokens"),
    **dict.fromkeys(("n", "num_return_sequences"), "rl.group_size"),
}
# Fields of trl.DPOConfig that only some of its losses read, and those that UNA, whose loss is our own, does not.
_DIFFERENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust")  # losses of the difference of two rewards
_DPO = PREFERENCE_LOSSES["dpo"]
READ_BY_LOSS = {
    "label_smoothing": ("robust",),
    "discopop_tau": (),
    **dict.fromkeys(("f_divergence_type", "f_alpha_divergence_coef"), _DIFFERENCES),
    **dict.fromkeys(("ld_alpha", "use_weighting", "router_aux_loss_coef"), _DPO),
    **dict.fromkeys(("precompute_ref_log_probs", "precompute_ref_batch_size"), _DPO),
}


def check_read(method: str, loss: str, given: dict[str, Any]) -> None:
    """Raises ValueError where a field of `[preference.trainer]` would be ignored by the loss, or the loss needs one."""
    for name in given:
        if name in READ_BY_LOSS and loss not in READ_BY_LOSS[name]:
            readers = [reader for reader in READ_BY_LOSS[name] if reader != loss]
            raise ValueError(f"{name} is not read by loss '{loss}' of {method}, only by {', '.join(readers) or 'none'}")
    if loss == "robust" and not 0 < given.get("label_smoothing", 0) < 0.5:
        raise ValueError("loss 'robust' needs trainer.label_smoothing, the share of flipped pairs, between 0 and 0.5")


def check_fields(stage: str, given: dict[str, Any]) -> None:
    """Raises ValueError naming every field that the configuration lacks, refuses, or that the recipe sets itself."""
    types = _types(stage)
    problems = []
    said = SAID_ELSEWHERE | ONLY[stage]
    refused = REFUSED | REFUSED_IN.get(stage, {})
    for name, value in given.items():
        if name not in types:
            near = difflib.get_close_matches(name, types, n=1)
            problems.append(
                f"trl.{_class_name(stage)} has no field '{name}'" + (f", did you mean '{near[0]}'?" if near else "")
            )
        elif name in said:
            problems.append(f"{name} is set by {stage}.{said[name]}; set that instead")
        elif name in refused:
            problems.append(f"{name} cannot be set: {refused[name]}")
        elif (trouble := _refusal(types[name], value)) is not None:
            problems.append(f"{name}: {trouble} (got {value!r})")
    if stage == "rl" and not problems:
        problems = _contradictions(given)
    if problems:
        raise ValueError("; ".join(problems))


def _contradictions(given: dict[str, Any]) -> list[str]:
    """Fields about sampling in `[rl.trainer]` that another of them leaves unread, or that the recipe says elsewhere."""
    own = given.get("generation_kwargs") or {}
    found = [f"generation_kwargs.{k} is set by {GENERATION[k]}; set that instead" for k in own if k in GENERATION]
    about = [name for name in given if name.startswith("vllm_")]
    if not given.get("use_vllm"):
        return [*found, *(f"{name} is read only with use_vllm = true" for name in about)]
    mode = given.get("vllm_mode", "colocate")
    if mode not in READ_BY_MODE:
        return [*found, f"vllm_mode is colocate or server (got {mode!r})"]
    other = "server" if mode == "colocate" else "colocate"
    found += [f'{name} is read only with vllm_mode = "{other}"' for name in about if name in READ_BY_MODE[other]]
    found += [f"{name} is read only without use_vllm" for name in WITHOUT_VLLM if name in given]
    if "vllm_server_base_url" in given:
        doubled = [name for name in ("vllm_server_host", "vllm_server_port") if name in given]
        found += [f"{name} is not read beside vllm_server_base_url" for name in doubled]
        try:
            require_no_credentials(str(given["vllm_server_base_url"]))
        except ValueError as error:
            found.append(f"vllm_server_base_url: {error}")
    if not given.get(CORRECTION, True):
        unread = [name for name in about if name.startswith("vllm_importance_sampling_") and name != CORRECTION]
        found += [f"{name} is read only with {CORRECTION} = true" for name in unread]
    if "seed" in own:
        found.append("generation_kwargs.seed would be sent with every request, so that each step draws alike")
    return found


def _refusal(kind: Any, value: Any) -> str | None:
    try:
        TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
    except ValidationError as error:
        message: str = error.errors()[0]["msg"]
        return message[0].lower() + message[1:]
    return None


def _class_name(stage: str) -> str:
    return {"sft": "SFTConfig", "preference": "DPOConfig", "rl": "GRPOConfig"}[stage]


@functools.cache
def _types(stage: str) -> dict[str, Any]:
    """Name → type of every field of the stage's configuration class."""
    import trl

    cls = getattr(trl, _class_name(stage))
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.init}
