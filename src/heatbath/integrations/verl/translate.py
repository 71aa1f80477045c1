"""A recipe's `[rl]` in verl's keys (verl 0.9.1, `verl.trainer.main_ppo`): what has no equal there is refused by name,
what verl does in another way is a note. Imports no verl.

verl counts steps in generations, heatbath in optimizer steps; one generation is `prompts / update_prompts` of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heatbath.errors import RecipeError
from heatbath.ideas.policy import POLICIES, policy
from heatbath.ideas.surrogates import Policy
from heatbath.recipe import RL, Recipe, flat

MACHINE = {  # what a recipe does not say; `[rl.verl]` may set these and any key that the recipe leaves alone
    "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 8,
    "trainer.logger": ["console"],
    "actor_rollout_ref.rollout.name": "vllm",
    "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
}
REDUCTIONS = {
    "token_mean": "token-mean",
    "seq_mean_token_mean": "seq-mean-token-mean",
    "seq_mean_token_sum": "seq-mean-token-sum",
    "seq_mean_token_sum_norm": "seq-mean-token-sum-norm",
}
ADVANTAGES = {"centred": ("grpo", False), "normalised": ("grpo", True), "leave_one_out": ("rloo", False)}
KL = {"k1": "k1", "k2": "k2", "k3": "low_var_kl"}
NEVER = 1e9  # a bound that no ratio reaches: verl holds log-ratios in ±20, e^20 = 4.9e8
STD_EPSILON = 1e-6  # fixed in verl's compute_grpo_outcome_advantage
COMPOSED = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "paper")  # policies that carry over as they are


@dataclass(frozen=True)
class Start:
    """What RL begins with, in paths that every node of the cluster reads: the policy's folder, its tokenizer's, the two
    tables, and where verl keeps its checkpoints."""

    model: str
    tokenizer: Path
    train: Path
    val: Path
    checkpoints: Path


@dataclass
class Translated:
    """verl's configuration as nested tables, its generations, and what a reader should know of the difference."""

    config: dict[str, Any]
    generations: int
    notes: list[str] = field(default_factory=list)


def translated(recipe: Recipe, start: Start, rows: int, longest_prompt: int) -> Translated:
    """The configuration for `rows` prompts of at most `longest_prompt` tokens. Raises RecipeError naming the key."""
    settings = recipe.rl
    assert settings is not None
    require_carried(recipe)
    goal = policy(settings.policy.name, **settings.policy.hyper).at_length(settings.max_new_tokens)
    notes: list[str] = []
    generations = _generations(settings, rows, notes)
    keys = {
        **MACHINE,
        **_loss(goal, recipe, notes),
        **_data(recipe, start, longest_prompt),
        **_sampling(recipe),
        **_optimizer(settings, recipe, notes),
        **_calendar(settings, rows, generations, notes),
        **_reward(recipe, goal, notes),
        "actor_rollout_ref.model.path": start.model,
        "actor_rollout_ref.model.tokenizer_path": str(start.tokenizer),
        "trainer.default_local_dir": str(start.checkpoints),
        "trainer.project_name": "heatbath",
        "trainer.experiment_name": recipe.name or settings.policy.name,
    }
    own = flat(settings.verl)
    for key in own:
        if key in keys and key not in MACHINE:
            raise RecipeError(f"verl's {key} is set by the recipe itself ({keys[key]!r})", "rl.verl", "leave it out")
    keys |= own
    _require_divisible(settings, keys)
    notes += _unused(settings)
    return Translated(nested(keys), generations, notes)


def require_carried(recipe: Recipe) -> None:
    """Raises RecipeError for tables and policies that have no equal in verl."""
    settings = recipe.rl
    if settings is None:
        raise RecipeError("the recipe has no [rl] table", "rl", "add one, or copy that of recipes/smoke.toml")
    made = POLICIES[settings.policy.name].made
    trl = "take --engine trl"
    if made is not Policy:
        raise RecipeError(
            f"verl has no policy '{settings.policy.name}'",
            "rl.policy",
            f'{", ".join(COMPOSED)} work there, and rloo with ratio = "token"; or {trl}',
        )
    if recipe.lora is not None:
        raise RecipeError("adapters are not carried over to verl", "lora", f"leave out [lora], or {trl}")
    if settings.trainer:
        remedy = f"leave them out (verl's own go into [rl.verl]), or {trl}"
        raise RecipeError(f"{', '.join(settings.trainer)}: fields of trl.GRPOConfig", "rl.trainer", remedy)
    if recipe.reward.model is not None or recipe.reward.weighted != {"verdict": 1.0}:
        raise RecipeError(
            "verl is given the verdict alone as reward", "reward", f"leave out model and weights, or {trl}"
        )
    if settings.schedule == "linear":
        raise RecipeError("verl has no linear schedule", "rl.schedule", f"constant or cosine, or {trl}")


def _loss(goal: Policy, recipe: Recipe, notes: list[str]) -> dict[str, Any]:
    """Advantage, ratio, surrogate, reduction, KL and entropy."""
    if goal.advantage not in ADVANTAGES:
        raise _no_part("advantage", goal.advantage, ADVANTAGES)
    if goal.reduction not in REDUCTIONS:
        raise _no_part("reduction", goal.reduction, REDUCTIONS)
    estimator, normalised = ADVANTAGES[goal.advantage]
    if normalised and goal.ddof != 1:
        raise RecipeError("verl's standard deviation divides by G − 1", "rl.policy.ddof", "1")
    if normalised and goal.std_epsilon != STD_EPSILON:
        notes.append(f"verl adds {STD_EPSILON:g} to a group's standard deviation, not {goal.std_epsilon:g}")
    if goal.sqrt_length:
        raise RecipeError("verl does not divide rewards by √tokens", "rl.policy.sqrt_length", "false")
    actor = "actor_rollout_ref.actor"
    keys = {
        "algorithm.adv_estimator": estimator,
        "algorithm.norm_adv_by_std_in_grpo": normalised,
        "algorithm.use_kl_in_reward": False,
        f"{actor}.loss_agg_mode": REDUCTIONS[goal.reduction],
        f"{actor}.entropy_coeff": goal.entropy,
        f"{actor}.use_kl_loss": goal.needs_reference,
        **{f"{actor}.{key}": value for key, value in _surrogate(goal).items()},
    }
    if goal.reduction == "seq_mean_token_sum_norm":
        keys[f"{actor}.loss_scale_factor"] = goal.length
    if goal.entropy and goal.reduction != "token_mean":
        remedy = 'reduction = "token_mean", or no entropy'
        raise RecipeError("verl reduces the entropy as it does the loss", "rl.policy.entropy", remedy)
    if goal.needs_reference:
        if goal.reference == "base" and recipe.sft is not None:
            raise RecipeError("verl's reference is the policy at the start", "rl.policy.reference", '"init"')
        keys |= {f"{actor}.kl_loss_coef": goal.kl, f"{actor}.kl_loss_type": KL[goal.kl_estimator]}
        if goal.kl_estimator == "k3":
            notes.append("verl holds the k3 estimate of a token at 10 nats at most")
    if goal.dynamic_sampling:
        keys |= {"algorithm.filter_groups.enable": True, "algorithm.filter_groups.metric": "reward"}
        notes.append("dynamic sampling is verl's: it goes on sampling until the step has its groups, without a bound")
    return keys


def _no_part(part: str, given: str, known: dict[str, Any]) -> RecipeError:
    remedy = f"one of {', '.join(known)}, or take --engine trl"
    return RecipeError(f"verl has no {part} '{given}'", f"rl.policy.{part}", remedy)


def _surrogate(goal: Policy) -> dict[str, Any]:
    """verl's loss mode and its clips, of the ratio and the surrogate together."""

    def mode(name: str, low: float, high: float, dual: float | None = None) -> dict[str, Any]:
        clips = {"clip_ratio": min(low, high), "clip_ratio_low": low, "clip_ratio_high": high}
        return {"policy_loss.loss_mode": name, **clips, "clip_ratio_c": NEVER if dual is None else dual}

    if goal.surrogate == "score":
        return mode("gpg", goal.clip_low, goal.clip_high)  # reads none of them
    if (goal.ratio, goal.surrogate) == ("token", "clip"):
        return mode("vanilla", goal.clip_low, goal.clip_high, goal.dual_clip)
    if (goal.ratio, goal.surrogate) == ("token", "linear"):
        return mode("vanilla", NEVER, NEVER)
    if (goal.ratio, goal.surrogate) == ("token", "cap"):
        return mode("cispo", 1.0, goal.clip_high - 1)  # clamp(ratio, 1 − 1, 1 + (c − 1)) = min(ratio, c)
    if (goal.ratio, goal.surrogate) == ("sequence", "clip") and goal.dual_clip is None:
        return mode("gspo", goal.clip_low, goal.clip_high)
    dual = " with dual_clip" if goal.dual_clip is not None else ""
    raise RecipeError(
        f"verl has no loss of ratio '{goal.ratio}' and surrogate '{goal.surrogate}'{dual}",
        "rl.policy",
        'token with clip, cap, linear; sequence with clip; or surrogate = "score"; or take --engine trl',
    )


def _data(recipe: Recipe, start: Start, longest_prompt: int) -> dict[str, Any]:
    settings = recipe.rl
    assert settings is not None
    return {
        "data.train_files": str(start.train),
        "data.val_files": str(start.val),
        "data.train_batch_size": settings.prompts,
        "data.max_prompt_length": longest_prompt,
        "data.max_response_length": settings.max_new_tokens,
        "data.filter_overlong_prompts": False,  # there are none
        "data.truncation": "error",
        "data.shuffle": True,
        "data.seed": recipe.seed,
    }


def _sampling(recipe: Recipe) -> dict[str, Any]:
    """Of the rollouts, and of the held-out problems, which heatbath samples once each at the same temperature."""
    settings = recipe.rl
    assert settings is not None
    rollout = "actor_rollout_ref.rollout"
    return {
        f"{rollout}.n": settings.group_size,
        f"{rollout}.temperature": settings.temperature,
        f"{rollout}.top_p": 1.0,
        f"{rollout}.top_k": -1,
        f"{rollout}.seed": recipe.seed,
        f"{rollout}.log_prob_micro_batch_size_per_gpu": settings.micro_batch,
        f"{rollout}.val_kwargs.do_sample": True,
        f"{rollout}.val_kwargs.temperature": settings.temperature,
        f"{rollout}.val_kwargs.n": 1,
        **({f"{rollout}.dtype": "float32"} if recipe.precision == "fp32" else {}),
    }


def _optimizer(settings: RL, recipe: Recipe, notes: list[str]) -> dict[str, Any]:
    actor, ref = "actor_rollout_ref.actor", "actor_rollout_ref.ref"
    warmup = math.ceil(settings.warmup_steps / _steps(settings))
    if settings.warmup_steps:
        notes.append(f"verl moves the learning rate once per generation: {warmup} of them are its warm-up")
    elif settings.schedule == "cosine" and _steps(settings) > 1:
        notes.append("verl moves the learning rate once per generation")
    keys: dict[str, Any] = {
        f"{actor}.ppo_mini_batch_size": settings.update_prompts,
        f"{actor}.ppo_micro_batch_size_per_gpu": settings.micro_batch,
        f"{actor}.ppo_epochs": 1,
        f"{actor}.use_dynamic_bsz": False,
        f"{actor}.data_loader_seed": recipe.seed,
        f"{actor}.grad_clip": settings.max_grad_norm,
        f"{actor}.optim.lr": settings.lr,
        f"{actor}.optim.lr_scheduler_type": settings.schedule,
        f"{actor}.optim.lr_warmup_steps": warmup,
        f"{actor}.optim.weight_decay": settings.weight_decay,
        f"{actor}.optim.betas": list(settings.adam_betas),
        f"{actor}.optim.clip_grad": settings.max_grad_norm,
        f"{actor}.fsdp_config.seed": recipe.seed,
        f"{ref}.log_prob_micro_batch_size_per_gpu": settings.micro_batch,
    }
    if recipe.precision == "fp32":
        mixed = {f"{part}_dtype": "fp32" for part in ("param", "reduce", "buffer")}
        for engine in (actor, ref):
            keys |= {f"{engine}.fsdp_config.mixed_precision.{key}": value for key, value in mixed.items()}
    return keys


def _steps(settings: RL) -> int:
    """Optimizer steps of one generation."""
    return settings.prompts // settings.update_prompts


def _generations(settings: RL, rows: int, notes: list[str]) -> int:
    of_an_epoch = rows // settings.prompts
    if not of_an_epoch:
        remedy = f"at most {rows}, or more data.prompts"
        raise RecipeError(f"{rows} prompts do not fill a generation of {settings.prompts}", "rl.prompts", remedy)
    steps = math.ceil(of_an_epoch * _steps(settings) * settings.epochs)
    wanted = min(steps, settings.max_steps) if settings.max_steps else steps
    generations = math.ceil(wanted / _steps(settings))
    if generations * _steps(settings) != wanted:
        made = generations * _steps(settings)
        notes.append(f"verl ends with a whole generation: {made} optimizer steps in place of {wanted}")
    return generations


def _calendar(settings: RL, rows: int, generations: int, notes: list[str]) -> dict[str, Any]:
    """Epochs, and how often something is saved or tested. verl saves its last step only where it saves at all."""
    of_an_epoch, per = rows // settings.prompts, _steps(settings)

    def every(key: str, steps: int) -> int:
        if steps % per:
            notes.append(f"rl.{key} = {steps} is every {math.ceil(steps / per) * per} steps: {per} to a generation")
        return math.ceil(steps / per)

    epochs = math.ceil(generations / of_an_epoch)
    filtered = policy(settings.policy.name, **settings.policy.hyper).dynamic_sampling
    return {
        "trainer.total_training_steps": generations,
        "trainer.total_epochs": epochs * 100 if filtered else epochs,  # filtering takes more prompts than an epoch has
        "trainer.save_freq": min(every("save_every", settings.save_every), generations) or generations,
        "trainer.max_actor_ckpt_to_keep": 1,
        "trainer.test_freq": every("eval_every", settings.eval_every) or -1,
        "trainer.val_before_train": bool(settings.eval_every),
        "trainer.resume_mode": "auto",
        # beside the shards the whole policy, in the type it is trained in: verl's merger rounds to 16 bits
        "actor_rollout_ref.actor.checkpoint.save_contents": ["model", "optimizer", "extra", "hf_model"],
        # all but the last, which nothing is read back from
        "actor_rollout_ref.actor.checkpoint.load_contents": ["model", "optimizer", "extra"],
    }


def _reward(recipe: Recipe, goal: Policy, notes: list[str]) -> dict[str, Any]:
    settings = recipe.reward
    function = "reward.custom_reward_function"
    options = {"workers": settings.workers, "deadline": settings.deadline}
    options |= {"stages": settings.stages} if settings.stages else {}
    options |= {"isolation": settings.isolation} if settings.isolation else {}
    notes.append(
        "reward.failed_share does not stop a run of verl, and a gold answer that nobody can read scores 0 there; the "
        "verdicts' status is in verl's reward_extra_info"
    )
    keys: dict[str, Any] = {
        f"{function}.path": "pkg://heatbath.integrations.verl",
        f"{function}.name": "compute_score",
        **{f"{function}.reward_kwargs.{key}": value for key, value in options.items()},
        "reward.reward_manager.name": "naive",
    }
    if goal.overlong:
        assert goal.length is not None
        last = round(goal.overlong * goal.length)
        if last != goal.overlong * goal.length:
            notes.append(f"the last {last} tokens are punished: verl counts whole ones")
        buffer = {"enable": True, "len": last, "penalty_factor": goal.overlong_penalty, "log": False}
        if goal.length != recipe.rl.max_new_tokens:  # type: ignore[union-attr]
            remedy = f"rl.max_new_tokens ({recipe.rl.max_new_tokens}), or leave it out"  # type: ignore[union-attr]
            raise RecipeError("verl punishes up to the longest completion it samples", "rl.policy.length", remedy)
        keys |= {"reward.reward_manager.name": "dapo", "reward.reward_kwargs.max_resp_len": goal.length}
        keys |= {f"reward.reward_kwargs.overlong_buffer_cfg.{key}": value for key, value in buffer.items()}
    return keys


def _require_divisible(settings: RL, keys: dict[str, Any]) -> None:
    """verl cuts an optimizer step into equal parts for its GPUs, and each into whole micro-batches."""
    gpus = keys["trainer.nnodes"] * keys["trainer.n_gpus_per_node"]
    completions = settings.update_prompts * settings.group_size
    if completions % (gpus * settings.micro_batch):
        raise RecipeError(
            f"update_prompts × group_size ({completions}) is no multiple of {gpus} GPUs × micro_batch "
            f"({settings.micro_batch})",
            "rl.micro_batch",
            "a smaller one, or other numbers of GPUs: [rl.verl] trainer = { nnodes = 1, n_gpus_per_node = 8 }",
        )


def _unused(settings: RL) -> list[str]:
    """Settings of what heatbath measures itself and verl does not."""
    unused = [f"rl.{name}" for name, value in (("readiness", settings.readiness), ("kl_every", 1)) if value]
    return [f"{' and '.join(unused)}: verl measures neither the start's readiness nor the KL to it"]


def nested(keys: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as tables in tables."""
    out: dict[str, Any] = {}
    for key, value in keys.items():
        *path, last = key.split(".")
        table = out
        for part in path:
            table = table.setdefault(part, {})
        table[last] = value
    return out
