"""The warm start: supervised training of the base on demonstrations, under any objective.

Reads the demonstrations, measures how surprising the base finds them, trains, and saves the policy `init`.
"""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import transformers
import trl
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from heatbath import models
from heatbath.data import checks, sources
from heatbath.data.rendering import IGNORE, Rendered
from heatbath.ideas.objectives import Objective, objective
from heatbath.progress import Progress
from heatbath.recipe import SFT, Recipe
from heatbath.reference import AdaptersOff, FrozenBase, Reference, profile, require_same_vocabulary, surprises
from heatbath.run import Run
from heatbath.sections import Pretrain
from heatbath.stages.fused_forward import add_objective_forward
from heatbath.stages.training import (
    RowCollator,
    log_to_run,
    lora_config,
    optimizer_arguments,
    require_finite,
    require_isolation,
    save_policy,
    train,
)

Reduction = Literal["token_mean", "sequence_sum", "microbatch_token_mean"]
PROFILE_ROWS = 512  # demonstrations the surprise profile reads; more would only sharpen its tail


class ObjectiveTrainer(trl.SFTTrainer):
    """`trl.SFTTrainer` whose loss is any `Objective`, exact under accumulation and across processes.

    `reduction` turns token losses into the loss of the optimizer step, over all its micro-batches and ranks:
    `token_mean` divides by its supervised tokens; `sequence_sum` (arXiv 2601.09233, Algorithm 1) by its sequences;
    `microbatch_token_mean` (the authors' code) adds up each micro-batch's own token mean, not averaged over the
    accumulation, so that long micro-batches count less per token and the gradient norm grows with accumulation.
    Objectives that read the base need `reference`; under PEFT it is by default the model with its adapters off. Rows
    hold `input_ids` and `labels` (-100 where unsupervised).
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the whole optimizer step; nobody else may divide again

    def __init__(
        self,
        *args: Any,
        objective: Objective,
        reference: Reference | None = None,
        reduction: Reduction = "token_mean",
        **kwargs: Any,
    ):
        super().__init__(*args, **kwargs)
        if reference is None and isinstance(self.model, peft.PeftModel):
            reference = AdaptersOff(self.model)
        if reference is not None:
            require_same_vocabulary(self.model, reference)
        self.objective, self.reference, self.reduction = objective, reference, reduction
        self._sums: dict[str, dict[str, Any]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        self._window_started = time.perf_counter()
        add_objective_forward(self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | int | None:
        """The denominator of the optimizer step over all micro-batches and ranks: its tokens or its sequences.

        Counted here for every model: transformers skips it for those that do not take it in their own forward.
        """
        if self.reduction == "sequence_sum":
            count = sum(_sequences(batch) for batch in batch_samples)
        else:
            count = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batch_samples)
        return self.accelerator.gather(torch.tensor(count, device=device)).sum()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        started = time.perf_counter()
        with torch.random.fork_rng():  # a checkpoint of this step holds the random state from before it
            result = super().evaluate(*args, **kwargs)
        self._window_started += time.perf_counter() - started  # evaluation does not count as training time
        return result

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        mode = "train" if self.model.training else "eval"
        out = model(**inputs, objective=self.objective, reference=self.reference)
        loss, tokens = out["loss"], out["tokens"]
        require_finite(loss, f"step {self.state.global_step + 1}", "lower sft.lr, or look for a broken row")
        self._add(mode, {**out["sums"], "supervised": tokens, "tokens": _tokens(inputs)})
        if mode == "eval":
            return (loss / max(tokens, 1), out) if return_outputs else loss / max(tokens, 1)
        if self.reduction == "microbatch_token_mean":
            return loss / max(tokens, 1)
        # DDP averages gradients over ranks, and the denominator already spans all of them.
        assert num_items_in_batch is not None
        return loss / num_items_in_batch * self.accelerator.num_processes

    def _add(self, mode: str, sums: dict[str, Any]) -> None:
        for name, value in sums.items():
            self._sums[mode][name] += value  # stays on the device until the next log

    def carried(self) -> dict[str, Any]:
        """What has been summed since the last log."""
        return {name: float(value) for name, value in self._sums["train"].items()}

    def carry_on(self, state: dict[str, Any]) -> None:
        self._sums["train"].update(state)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Token-weighted means over all tokens since the last log; the objective and NLL by name, never a bare loss."""
        mode = "eval" if any(key.startswith("eval_") for key in logs) else "train"
        sums = self._sums[mode]
        if sums["supervised"]:
            names = sorted(sums)
            local = torch.tensor([float(sums[name]) for name in names], dtype=torch.float64)
            total = self.accelerator.reduce(local.to(self.accelerator.device), "sum")
            totals = dict(zip(names, total.tolist(), strict=True))
            tokens, supervised = totals.pop("tokens"), totals.pop("supervised")
            prefix = "val/" if mode == "eval" else ""
            values = {prefix + name: value / supervised for name, value in totals.items()}
            if mode == "train":
                values["tokens_per_second"] = tokens / (time.perf_counter() - self._window_started)
                values |= {key: logs[key] for key in ("learning_rate", "grad_norm") if key in logs}
                self._window_started = time.perf_counter()
            sums.clear()
            transformers.Trainer.log(self, values, start_time)


def _sequences(batch: dict[str, torch.Tensor]) -> int:
    """Sequences of a batch: its rows, or as many as begin in a row of several."""
    positions = batch.get("position_ids")
    return len(batch["labels"]) if positions is None else int((positions == 0).sum())


def _tokens(batch: dict[str, torch.Tensor]) -> int:
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


def run_sft(run: Run, recipe: Recipe, progress: Progress) -> None:
    """Trains the base of the recipe on its demonstrations; writes metrics, surprise.json and the policy `init`."""
    splits = sources.load(recipe.data, recipe.seed)
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
    model = models.load_model(start, torch.float32)
    checks.require_vocabulary(tokenizer, model.config)
    run.require_same_base(models.fingerprint(model))
    goal = objective(settings.objective.name, **settings.objective.hyper)
    if run.read_json("surprise.json") is None:
        _measure_surprise(run, recipe, model, tokenizer, demos, progress)
    if settings.packing:
        require_isolation(model, demos)
    with run.new_checkpoint("init") as folder:
        trainer = build_trainer(run, recipe, model, tokenizer, goal, demos, validation)
        log_to_run(trainer, run, "sft", progress, show=("nll", "val/nll", "keep", "tokens_per_second"))
        with progress.bar(f"sft ({settings.objective.name})", total_steps(settings, len(demos))):
            train(trainer, run, "sft", progress)
        save_policy(trainer, folder)


def _measure_surprise(
    run: Run,
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    demos: list[Rendered],
    progress: Progress,
) -> None:
    """Writes surprise.json and says the few lines of it that a user reads before training starts."""
    assert recipe.sft is not None
    progress.say("measuring how surprising the base finds the demonstrations")
    measured, hyper = demos[:PROFILE_ROWS], recipe.sft.objective.hyper
    base = FrozenBase(model)
    nats = surprises(base, measured, pad_id=tokenizer.pad_token_id, autocast=models.autocast_dtype(recipe.precision))
    found = profile(
        measured,
        nats,
        tokenizer,
        vocab_size=base.head.shape[0],
        beta=hyper.get("beta"),
        smoothing=hyper.get("smoothing", 0.0),
    )
    model.requires_grad_(True)
    run.write_json("surprise.json", {"demonstrations": len(demos), **found})
    progress.say(describe_profile(found))


def build_trainer(
    run: Run,
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    goal: Objective,
    demos: list[Rendered],
    validation: list[Rendered],
) -> ObjectiveTrainer:
    """The trainer of a recipe's [sft] table. The reference is a frozen copy of `model`, or `model` with LoRA off."""
    assert recipe.sft is not None
    return ObjectiveTrainer(
        model=model,
        args=training_arguments(recipe, run.working("sft"), validating=bool(validation)),
        train_dataset=dataset(demos),
        eval_dataset=dataset(validation) if validation else None,
        processing_class=tokenizer,
        data_collator=RowCollator(tokenizer.pad_token_id, packing=recipe.sft.packing),
        objective=goal,
        reference=None if recipe.lora is not None else FrozenBase(copy.deepcopy(model)),
        reduction=recipe.sft.reduction,
        peft_config=lora_config(recipe.lora),
    )


def training_arguments(recipe: Recipe, folder: Path, *, validating: bool) -> trl.SFTConfig:
    """The recipe's [sft] table in TRL's terms."""
    settings = recipe.sft
    assert settings is not None
    micro = min(settings.micro_batch, settings.batch)
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": settings.batch // micro,
        "logging_steps": settings.log_every,
        "eval_strategy": "epoch" if validating else "no",
        "eval_on_start": validating,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        **optimizer_arguments(settings, recipe),
        **settings.trainer,
    }
    return trl.SFTConfig(**arguments)


def total_steps(settings: SFT | Pretrain, rows: int) -> int:
    """Optimizer steps of the stage; the last one of an epoch may be smaller."""
    steps = math.ceil(math.ceil(rows / settings.batch) * settings.epochs)
    most = settings.max_steps if isinstance(settings, SFT) else None
    return min(steps, most) if most else steps


def describe_profile(found: dict[str, Any]) -> str:
    """One or two lines a user reads before training starts."""
    text = f"surprise: mean {found['mean']:.2f} nats over {found['tokens']:,} tokens, 99 % below "
    text += f"{found['quantiles']['0.99']:.1f}, max {found['max']:.1f}"
    if found["beta"] is not None:
        share = next(b for b in found["betas"] if b["beta"] == found["beta"])["w_below_0.5"]
        if not found["beta"]:
            return text + "\nβ = 0 is distillation from the base; the demonstrations only choose where"
        text += f"\nβ = {found['beta']:g} leaves {share:.1%} of the tokens to the base (w < 0.5)"
        if share < 0.001:
            text += "; GIFT can hardly differ from SFT here"
        elif share > 0.05:
            text += "; above about 5 % the start may be neither base nor expert"
        text += f". {found['suggested_share']:.0%} would be β = {found['suggested_beta']:.1f}"
    return text


def dataset(rows: list[Rendered]) -> Dataset:
    return Dataset.from_list([{"input_ids": r.input_ids, "labels": r.labels} for r in rows])
