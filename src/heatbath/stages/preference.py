"""Offline preference: the warm start (or the base) learns from pairs, scores or labels written down beforehand.

DPO (arXiv 2305.18290) is TRL's; UNA (arXiv 2408.15339) is a subclass with rows of one completion. The policy is saved
as `final`.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from heatbath import models, ranks
from heatbath.data import checks, preferences, sources
from heatbath.data.preferences import RenderedPreference
from heatbath.ideas.preference import Comparison, implicit_reward, una
from heatbath.progress import Progress
from heatbath.recipe import Recipe
from heatbath.run import Run
from heatbath.sections import PREFERENCE_LOSSES, Preference
from heatbath.stages.sft import total_steps
from heatbath.stages.training import (
    CARRIED,
    log_to_run,
    lora_config,
    optimizer_arguments,
    require_finite,
    save_policy,
    train,
    without_dropout,
)

PAIR = -1.0  # in place of a target, in rows that have a second completion instead
# What TRL measures of a micro-batch, under the name it has here; it counts a tie as not accurate, so do we.
NAMES = {
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "accuracy",
}
MEASURES = ("objective", *NAMES.values(), "score_error")


class DpoTrainer(trl.DPOTrainer):
    """`trl.DPOTrainer` on rows that are token ids already (`prompt_ids chosen_ids rejected_ids`).

    The loss is the mean over the rows of the optimizer step, of all its micro-batches and ranks. TRL's own is the mean
    of the micro-batches' means: the same but where the last one of an epoch is smaller, whose rows it weighs more. The
    logged means are over rows in the same way.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the whole optimizer step; nobody else may divide again

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._sums: dict[str, Any] = defaultdict(float)

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # TRL would render it again, by its own rules

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor:
        count = sum(self._rows(batch) for batch in batch_samples)
        return self.accelerator.gather(torch.tensor(count, device=device)).sum()

    def _rows(self, batch: dict[str, Any]) -> int:
        return len(batch["input_ids"]) // 2

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        mode, rows = "train" if self.model.training else "eval", self._rows(inputs)
        loss = super().compute_loss(model, inputs)
        require_finite(loss, f"step {self.state.global_step + 1}", "lower preference.lr, or look for a broken row")
        if mode == "train":
            measured = {ours: self._metrics[mode][theirs][-1] for theirs, ours in NAMES.items() if self._metrics[mode]}
            self._add({"objective": loss.detach(), **measured}, rows)
        self._metrics[mode].clear()
        if num_items_in_batch is None:
            return loss
        # DDP averages gradients over ranks, and the denominator already spans all of them.
        return loss * rows / torch.as_tensor(num_items_in_batch).clamp(min=1) * self.accelerator.num_processes

    def _add(self, means: dict[str, Any], rows: int) -> None:
        """Means over that many rows, towards those of the next log."""
        for name, mean in means.items():
            count = torch.tensor([1.0, 1.0], dtype=torch.float64, device=self.accelerator.device) * rows
            count[0] *= mean
            self._sums[name] += count

    def _totals(self) -> dict[str, Tensor]:
        """Sum and rows of every measure over all ranks; each rank asks for the same ones, whatever its rows were."""
        zero = torch.zeros(2, dtype=torch.float64, device=self.accelerator.device)
        return {name: self.accelerator.reduce(self._sums.get(name, zero), "sum") for name in MEASURES}

    def carried(self) -> dict[str, Any]:
        """What a resumed stage must know: what all ranks have summed since the last log."""
        return {"sums": {name: total.cpu() for name, total in self._totals().items()}}

    def carry_on(self, state: dict[str, Any]) -> None:
        if self.is_world_process_zero():
            self._sums.update({name: total.to(self.accelerator.device) for name, total in state["sums"].items()})

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        state = self.carried()  # of all ranks, so it cannot wait for the callback of the first
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{self.state.global_step}"
            torch.save(state, folder / CARRIED)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Means over the rows since the last log, by name, and nothing else that TRL measures."""
        totals = {name: total.tolist() for name, total in self._totals().items()}
        self._sums.clear()
        if not totals["objective"][1]:
            return  # the closing summary of transformers
        values = {name: total / rows for name, (total, rows) in totals.items() if rows}
        values |= {k: logs[k] for k in ("grad_norm", "learning_rate") if k in logs}
        transformers.Trainer.log(self, values, start_time)


class UnaTrainer(DpoTrainer):
    """UNA (arXiv 2408.15339) on `DpoTrainer`: rows of one completion and its target beside pairs, in any mixture.

    Batches are `CompletionCollator`'s. `comparison` is how scores and labels are compared. Of a mixture of experts the
    router's auxiliary loss is not added.
    """

    def __init__(self, *args: Any, comparison: Comparison = "mse", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.comparison = comparison

    def _rows(self, batch: dict[str, Any]) -> int:
        return len(batch["target"])

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Tensor:
        target, beta = inputs["target"], inputs["beta"]
        asked = {name: inputs[name] for name in ("input_ids", "attention_mask", "completion_mask")}
        labels = asked["input_ids"].masked_fill(asked["completion_mask"] == 0, -100)
        out = model(
            input_ids=asked["input_ids"], attention_mask=asked["attention_mask"], labels=labels, fused_lm_head=True
        )
        ref = torch.cat(self.compute_ref_log_probs(self.ref_model or self.model, asked))
        paired = target == PAIR
        rewards = implicit_reward(out.log_probs.sum(1), ref, torch.cat([beta, beta[paired]]))
        reward, rejected = rewards[: len(target)], rewards[len(target) :]
        self._measure(reward.detach(), target, paired, rejected.detach())
        return una(reward, target, paired, rejected, self.comparison).mean()

    def _measure(self, reward: Tensor, target: Tensor, paired: Tensor, rejected: Tensor) -> None:
        if not self.model.training:
            return
        chosen = reward[paired]
        pairs = {"reward_chosen": chosen, "reward_rejected": rejected, "reward_margin": chosen - rejected}
        pairs["accuracy"] = (chosen > rejected).double()
        for name, values in pairs.items():
            self._add({name: values.sum() / max(len(values), 1)}, len(values))
        error = (reward.sigmoid() - target)[~paired].abs()
        self._add({"score_error": error.sum() / max(len(error), 1)}, len(error))


@dataclass(frozen=True)
class CompletionCollator:
    """Rows of `prompt_ids chosen_ids rejected_ids target beta` to a batch, padded on the right: first every row's only
    or chosen completion, then the rejected ones of the pairs, in the same order."""

    pad_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        pairs = [row for row in rows if row["target"] == PAIR]
        parts = [(row["prompt_ids"], row["chosen_ids"]) for row in rows]
        parts += [(row["prompt_ids"], row["rejected_ids"]) for row in pairs]
        width = max(len(prompt) + len(completion) for prompt, completion in parts)

        def padded(values: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([[*v, *[fill] * (width - len(v))] for v in values])

        return {
            "input_ids": padded([prompt + completion for prompt, completion in parts], self.pad_id),
            "attention_mask": padded([[1] * (len(p) + len(c)) for p, c in parts], 0),
            "completion_mask": padded([[0] * len(p) + [1] * len(c) for p, c in parts], 0),
            "target": torch.tensor([row["target"] for row in rows]),
            "beta": torch.tensor([row["beta"] for row in rows]),
        }


def run_preference(run: Run, recipe: Recipe, progress: Progress) -> None:
    """Trains the start of the recipe on its preferences; writes metrics and the policy `final`."""
    splits = sources.of(recipe)
    settings = recipe.preference
    assert settings is not None
    rows, notes = preferences.load(recipe, splits.test)
    before = "init" if recipe.sft is not None else "base"
    start = run.model_of(before)
    with run.new_checkpoint("final") as folder:
        tokenizer = models.load_tokenizer(start, run.template_of(before))
        made = preferences.rendered(tokenizer, rows, recipe)
        for note in notes:
            progress.say(note)
        if cut := sum(row.truncated for row in made):
            progress.say(f"warning: {cut} of {len(made)} rows are cut at {settings.max_length} tokens, without EOS")
        model = models.load_trained(start, recipe)
        checks.require_vocabulary(tokenizer, model.config)
        if before == "base":
            run.require_same_base(models.fingerprint_of_source(model, start))
        trainer = build_trainer(run, recipe, model, tokenizer, made)
        shown = ("objective", "reward_margin", "accuracy", "score_error")
        log_to_run(trainer, run, "preference", progress, show=shown)
        with progress.bar(f"preference ({settings.method})", total_steps(settings, len(made))):
            train(trainer, run, "preference", progress)
        save_policy(trainer, folder)


def build_trainer(
    run: Run,
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[RenderedPreference],
) -> DpoTrainer:
    """The trainer of a recipe's [preference] table; the reference is a copy of the model, or its adapters off."""
    settings = recipe.preference
    assert settings is not None
    without_dropout(model)
    arguments = training_arguments(recipe, run.working("preference"))
    kept = recipe.lora is not None or arguments.precompute_ref_log_probs  # TRL reads the reference off the start itself
    common: dict[str, Any] = {
        "model": model,
        "ref_model": None if kept else copy.deepcopy(model).requires_grad_(False),
        "args": arguments,
        "train_dataset": dataset(rows, settings),
        "processing_class": tokenizer,
        "peft_config": lora_config(recipe.lora),
    }
    if settings.method == "dpo":
        return DpoTrainer(**common)
    comparison: Any = settings.loss or PREFERENCE_LOSSES["una"][0]
    return UnaTrainer(**common, data_collator=CompletionCollator(tokenizer.pad_token_id), comparison=comparison)


def dataset(rows: Sequence[RenderedPreference], settings: Preference) -> Dataset:
    """The rows under TRL's names; the only completion of a row stands in the place of the chosen one."""
    return Dataset.from_list(
        [
            {
                "prompt_ids": row.prompt_ids,
                "chosen_ids": row.completion_ids[0],
                "rejected_ids": row.completion_ids[1] if row.kind == "pair" else [],
                "target": PAIR if row.target is None else row.target,
                "beta": settings.beta_of(row.kind),
            }
            for row in rows
        ]
    )


def training_arguments(recipe: Recipe, folder: Path) -> trl.DPOConfig:
    """The recipe's [preference] table in TRL's terms."""
    settings = recipe.preference
    assert settings is not None
    micro, accumulated = ranks.micro_batches(settings.batch, settings.micro_batch, ranks.count(), "preference.batch")
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps or -1,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": accumulated,
        "logging_steps": settings.log_every,
        "max_length": None,
        "remove_unused_columns": False,
        "beta": settings.beta_of("pair"),
        **optimizer_arguments(settings, recipe),
        **settings.trainer,
    }
    if settings.method == "dpo":
        arguments["loss_type"] = [settings.loss or PREFERENCE_LOSSES["dpo"][0]]
    return trl.DPOConfig(**arguments)
