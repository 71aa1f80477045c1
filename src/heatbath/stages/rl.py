"""Reinforcement learning on verifiable prompts, from the warm start (or from the base where the recipe has none).

Samples groups of completions, grades them, takes clipped policy-gradient steps, and saves the policy `final`.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.utils import add_fused_lm_head

from heatbath import models
from heatbath.data import checks, rendering, sources
from heatbath.data.rows import Row
from heatbath.errors import RunError
from heatbath.ideas.policy import Policy, kl_k3, policy
from heatbath.progress import Progress
from heatbath.recipe import RL, Recipe
from heatbath.run import Run
from heatbath.stages.rewards import Reward, grader_of, reward_functions
from heatbath.stages.training import log_to_run, lora_config, optimizer_arguments, require_finite, save_policy, train
from heatbath.verify.verdict import STATUSES

# What TRL measures, under the name it has here; everything else TRL logs is dropped, above all its "loss", which is
# zero in expectation on-policy and tells nothing.
NAMES = {
    "reward": "reward",
    "informative_share": "informative_share",
    "completions/mean_length": "completion_tokens",
    "completions/clipped_ratio": "truncated_share",
    "step_time": "step_seconds",
    **{f"verdict/{status}": f"verdict/{status}" for status in STATUSES},
}


class PolicyTrainer(trl.GRPOTrainer):
    """`trl.GRPOTrainer` whose loss is a `Policy`, divided by the tokens of the optimizer step.

    Prompts are rendered by `data/rendering.py`, the one place that does it. The KL to the policy at the start is
    measured (not penalised) every `kl_every` generations: to `initial`, a frozen copy of it, or under PEFT to the model
    with its adapters off.
    """

    def __init__(
        self,
        *args: Any,
        policy: Policy,
        initial: PreTrainedModel | None = None,
        kl_every: int = 1,
        **kwargs: Any,
    ):
        _require_only_what_the_policy_does(kwargs.get("args") or (args[2] if len(args) > 2 else trl.GRPOConfig()))
        super().__init__(*args, **kwargs)
        self.policy, self.kl_every = policy, kl_every
        self._token_sums: dict[str, Any] = defaultdict(float)
        self._initial = [] if initial is None else [initial.eval().requires_grad_(False)]
        self._generations = self._epochs_done = 0
        for model in self._initial:
            add_fused_lm_head(model, temperature=self.temperature)
        self._adapters = isinstance(self.model, peft.PeftModel)

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [rendering.prompt_ids(self.processing_class, p) for p in prompts], None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        # One outer autocast context keeps the 16-bit copies of the weights for the whole generation; without it they
        # are cast again at every token.
        with self.accelerator.autocast():
            return super()._generate_single_turn(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if (self._initial or self._adapters) and self._generations % self.kl_every == 0:
            ids = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
            mask = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
            start, off = self.model, contextlib.nullcontext()
            if self._initial:
                start = self._initial[0]
            else:
                off = self.model.disable_adapter()
            with torch.no_grad(), off:
                output["initial_logps"], _, _ = self._get_per_token_logps_and_entropies(
                    start,
                    ids,
                    mask,
                    output["completion_ids"].size(1),
                    batch_size=self.args.per_device_train_batch_size,
                )
        self._generations += 1
        return output

    def _calculate_rewards(self, *args: Any) -> Tensor:
        """TRL's rewards; beside them the share of groups with two different scores, which alone carry a signal."""
        rewards: Tensor = super()._calculate_rewards(*args)
        mode = "train" if self.model.training else "eval"
        group = self.num_generations if mode == "train" else self.num_generations_eval
        if rewards.isnan().all():
            raise RunError(
                "no completion of this step got a reward: every one was missing or not a number",
                f"step {self.state.global_step + 1}, {', '.join(self.reward_func_names)}",
                "check the gold answers, and what the reward functions return",
            )
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        total = total.masked_fill(rewards.isnan().all(1), torch.nan).view(-1, group)
        spread = total.nan_to_num(-torch.inf).amax(1) - total.nan_to_num(torch.inf).amin(1)
        self._metrics[mode]["informative_share"].append((spread > 0).float().mean().item())
        return rewards

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """Adds to each micro-batch the number of completion tokens of its whole optimizer step, over all ranks."""
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if self.model.training and "step_tokens" not in inputs:
            accumulation = self.args.gradient_accumulation_steps
            for start in range(0, len(self._buffered_inputs), accumulation):
                window = self._buffered_inputs[start : start + accumulation]
                tokens = torch.stack([_scored(batch).sum() for batch in window]).sum()
                tokens = self.accelerator.gather(tokens).sum()
                for batch in window:
                    batch["step_tokens"] = tokens
        return inputs

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        mask, scored = inputs["completion_mask"], _scored(inputs)
        logp, entropy, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], mask], dim=1),
            mask.size(1),
            compute_entropy=True,
        )
        old = inputs.get("old_per_token_logps")
        per_token, clipped = self.policy.token_loss(logp, logp.detach() if old is None else old, inputs["advantages"])
        # DDP averages gradients over ranks, and the denominator already spans all of them.
        tokens = inputs["step_tokens"] if "step_tokens" in inputs else scored.sum()
        loss = (per_token * scored).sum() / tokens.clamp(min=1) * self.accelerator.num_processes
        require_finite(loss, f"step {self.state.global_step + 1}", "lower rl.lr")
        with torch.no_grad():
            measured = {"entropy": entropy, "clip_share": clipped.float()}
            if "initial_logps" in inputs:
                measured["kl_init"] = kl_k3(logp, inputs["initial_logps"])
            for name, value in measured.items():  # summed on the device; means are taken at the next log
                self._token_sums[name] += torch.stack([(value * scored).sum(), scored.sum()]).double()
        return loss

    def carried(self) -> dict[str, Any]:
        """What a resumed stage must know; everything else is empty where a generation ends."""
        return {"generations": self._generations, "epochs": int(self.state.epoch + 1e-6)}

    def carry_on(self, state: dict[str, Any]) -> None:
        self._generations, self._epochs_done = state["generations"], state["epochs"]

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Any:
        """TRL's sampler shuffles with one generator that goes on from epoch to epoch: a resumed one is moved up."""
        sampler = super()._get_train_sampler(dataset)
        for _ in range(self._epochs_done):
            torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Token-weighted means since the last log, and what TRL measured once per generation."""
        if not self._token_sums:
            return  # the closing summary of transformers
        measured = {k: sum(v) / len(v) for k, v in self._metrics["train"].items() if v}
        self._metrics["train"].clear()
        values = {ours: measured[theirs] for theirs, ours in NAMES.items() if theirs in measured}
        if len(self.reward_funcs) > 1:
            means = {f"reward/{name}": f"rewards/{name}/mean" for name in self.reward_func_names}
            values |= {ours: measured[theirs] for ours, theirs in means.items() if theirs in measured}
        for name in sorted(self._token_sums):
            total, count = self.accelerator.reduce(self._token_sums[name], "sum").tolist()
            values[name] = total / max(count, 1.0)
        self._token_sums.clear()
        values |= {k: logs[k] for k in ("grad_norm", "learning_rate") if k in logs}
        transformers.Trainer.log(self, values, start_time)


def _scored(batch: dict[str, Any]) -> Tensor:
    """The completion tokens the policy itself wrote, [B, T]: what a tool returned is not its doing."""
    mask: Tensor = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


# Settings of TRL that change its loss, and the value each must keep: here the Policy decides.
LEFT_TO_THE_POLICY = {
    "beta": 0.0,
    "epsilon": 0.2,
    "epsilon_high": None,
    "delta": None,
    "importance_sampling_level": "token",
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "off_policy_mask_threshold": None,
    "use_vllm": False,
}


def _require_only_what_the_policy_does(arguments: trl.GRPOConfig) -> None:
    for name, value in LEFT_TO_THE_POLICY.items():
        given = getattr(arguments, name)
        if given != value and not (name == "epsilon_high" and given == arguments.epsilon):
            raise RunError(f"{name} = {given!r} would be ignored", f"GRPOConfig.{name}", "set it in the policy instead")
    if arguments.steps_per_generation % arguments.gradient_accumulation_steps:
        raise RunError(
            f"{arguments.steps_per_generation} micro-batches per generation do not divide into optimizer steps of "
            f"{arguments.gradient_accumulation_steps}",
            "GRPOConfig.steps_per_generation",
            "make it a multiple of gradient_accumulation_steps",
        )


def run_rl(run: Run, recipe: Recipe, progress: Progress) -> None:
    """Trains the start of the recipe with verifiable rewards; writes metrics and the policy `final`."""
    splits = sources.load(recipe.data, recipe.seed)
    sources.require(splits, recipe, ("rl",))
    settings, rows = recipe.rl, splits.prompts
    assert settings is not None
    before = "init" if recipe.sft is not None else "base"
    start = run.model_of(before)
    with run.new_checkpoint("final") as folder, grader_of(recipe.reward) as grader:
        tokenizer = models.load_tokenizer(start, run.template_of(before))
        model = models.load_model(start, torch.float32)
        checks.require_vocabulary(tokenizer, model.config)
        if before == "base":
            run.require_same_base(models.fingerprint(model))
        trainer = build_trainer(run, recipe, model, tokenizer, rows, reward_functions(recipe.reward, grader))
        shown = ("reward", "informative_share", "truncated_share", "kl_init")
        log_to_run(trainer, run, "rl", progress, show=shown)
        with progress.bar(f"rl ({settings.policy})", total_steps(settings, len(rows))):
            train(trainer, run, "rl", progress)
        save_policy(trainer, folder)


def build_trainer(
    run: Run,
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    rewards: list[Reward],
) -> PolicyTrainer:
    """The trainer of a recipe's [rl] table."""
    assert recipe.rl is not None
    dataset = Dataset.from_list(
        [{"prompt": rendering.messages(row, recipe.data.system), "gold": row.answer} for row in rows]
    )
    return PolicyTrainer(
        model=model,
        args=training_arguments(recipe, run.working("rl")),
        train_dataset=dataset,
        processing_class=tokenizer,
        reward_funcs=rewards,
        policy=policy(recipe.rl.policy, clip_low=recipe.rl.clip, clip_high=recipe.rl.clip),
        initial=None if recipe.lora is not None else copy.deepcopy(model),
        kl_every=recipe.rl.kl_every,
        peft_config=lora_config(recipe.lora),
    )


def training_arguments(recipe: Recipe, folder: Path) -> trl.GRPOConfig:
    """The recipe's [rl] table in TRL's terms."""
    settings = recipe.rl
    assert settings is not None
    update = settings.update_prompts * settings.group_size // settings.micro_batch
    steps = settings.prompts // settings.update_prompts  # of one generation; only between two can the stage be resumed
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "per_device_train_batch_size": settings.micro_batch,
        "gradient_accumulation_steps": update,
        "steps_per_generation": update * steps,
        "num_generations": settings.group_size,
        "max_completion_length": settings.max_new_tokens,
        "temperature": settings.temperature,
        "scale_rewards": "none",
        "beta": 0.0,
        "reward_weights": list(recipe.reward.weighted.values()),
        "logging_steps": 1,
        **optimizer_arguments(settings, recipe, window=steps),
        **settings.trainer,
    }
    made = trl.GRPOConfig(**arguments)
    _require_only_what_the_policy_does(made)
    return made


def total_steps(settings: RL, rows: int) -> int:
    """Optimizer steps of the stage: an epoch has whole generations only, each of prompts / update_prompts steps."""
    steps = math.ceil(rows // settings.prompts * (settings.prompts // settings.update_prompts) * settings.epochs)
    return min(steps, settings.max_steps) if settings.max_steps else steps
