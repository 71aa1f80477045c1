"""Any transformers or TRL trainer with an `Objective` for its loss, exact under accumulation and across processes."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import peft
import torch
import transformers
import trl
from accelerate.utils import gather_object
from torch import Tensor

from heatbath.data.rendering import IGNORE
from heatbath.errors import RunError
from heatbath.ideas.statistics import Objective
from heatbath.reference import AdaptersOff, FrozenBase, Reference, require_same_vocabulary, segment_ids
from heatbath.stages.fused_forward import add_objective_forward
from heatbath.stages.sharding import as_sharded, settle_sharding
from heatbath.stages.training import CARRIED, RowCollator, float32_adapters, require_finite

Reduction = Literal["token_mean", "sequence_sum", "microbatch_token_mean"]


class ObjectiveMixin:
    """Put before a trainer class, it gives that trainer an `objective`:

        class Trainer(ObjectiveMixin, transformers.Trainer): ...

    `reduction` turns token losses into the loss of the optimizer step, over all its micro-batches and ranks:
    `token_mean` divides by its supervised tokens; `sequence_sum` (arXiv 2601.09233, Algorithm 1) by its sequences;
    `microbatch_token_mean` (the authors' code) adds up each micro-batch's own token mean, not averaged over the
    accumulation, so that long micro-batches count less per token and the gradient norm grows with accumulation.

    Objectives that read the base need `reference`; under PEFT it is by default the model with its adapters off. Batches
    hold `input_ids`, `labels` (-100 where unsupervised) and, for objectives that read them, `columns`: name → [B, T],
    aligned with the labels. PSFT's `old_logp` is made here. The loss is logged as `objective`, beside `nll`.
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
        arguments = kwargs.get("args") or (args[1] if len(args) > 1 else None)
        if arguments is not None and isinstance(kwargs.get("data_collator"), RowCollator):
            arguments.remove_unused_columns = False  # all of them are numbers that the objective may read
        if kwargs.get("compute_metrics") is not None:
            raise RunError("compute_metrics would never be called", "compute_metrics", "there are no logits; drop it")
        super().__init__(*args, **kwargs)
        float32_adapters(self.model)
        if reference is None and isinstance(self.model, peft.PeftModel):
            reference = AdaptersOff(self.model)
        if reference is not None:
            require_same_vocabulary(self.model, reference)
        settle_sharding(self)  # type: ignore[arg-type]
        if isinstance(reference, FrozenBase) and self.accelerator.is_fsdp2:
            reference.shard(**as_sharded(self.accelerator))
        self.objective, self.reference, self.reduction = objective, reference, reduction
        self._sums: dict[str, dict[str, Any]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        self._validated: dict[str, float] = {}
        self._window_started = time.perf_counter()
        self._old = OldPolicy() if hasattr(objective, "refresh") else None
        add_objective_forward(self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        known = self._signature_columns or []
        own = ["labels", *getattr(self.objective, "columns", ())] if hasattr(self, "objective") else []
        self._signature_columns = [*known, *(name for name in own if name not in known)]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | int | None:
        """The denominator of the optimizer step over all micro-batches and ranks: its tokens or its sequences.

        Counted here for every model: transformers skips it for those that do not take it in their own forward.
        """
        if batch_samples:
            self._forget_repeated(batch_samples[-1])
        if self.reduction == "sequence_sum":
            count = sum(_sequences(batch) for batch in batch_samples)
        else:
            count = sum(int((batch["labels"][:, 1:] != IGNORE).sum()) for batch in batch_samples)
        return self.accelerator.gather(torch.tensor(count, device=device)).sum()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        started = time.perf_counter()
        with torch.random.fork_rng():  # a checkpoint of this step holds the random state from before it
            result: dict[str, float] = super().evaluate(*args, **kwargs)  # type: ignore[misc]
        if self._validated:  # transformers' own loss is the mean of its batches' means
            result |= {"eval_loss": self._validated["val/objective"], **self._validated}
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
        step = self.state.global_step
        goal = self.objective.at(step) if hasattr(self.objective, "at") else self.objective
        inputs = dict(inputs)
        columns = dict(inputs.pop("columns", None) or {})
        columns |= {name: inputs.pop(name) for name in getattr(goal, "columns", ()) if name in inputs}
        if self._old is not None and "old_logp" not in columns:
            at = step if mode == "train" else max(step - 1, 0)  # an evaluation belongs to the step before it
            columns["old_logp"] = self._old.logp(model, inputs, at // goal.refresh)
        out = model(**inputs, objective=goal, reference=self.reference, columns=columns)
        loss, tokens = out["loss"], out["tokens"]
        require_finite(loss, f"step {step + 1}", "lower sft.lr, or look for a broken row")
        self._add(mode, {**out["sums"], "supervised": tokens, "tokens": _tokens(inputs)})
        if mode == "eval":
            return (loss / max(tokens, 1), out) if return_outputs else loss / max(tokens, 1)
        if self.reduction == "microbatch_token_mean":
            return loss / max(tokens, 1) * self.accelerator.num_processes
        # DDP averages gradients over ranks, and the denominator already spans all of them.
        assert num_items_in_batch is not None
        return loss / torch.as_tensor(num_items_in_batch).clamp(min=1) * self.accelerator.num_processes

    def _forget_repeated(self, batch: dict[str, Any]) -> None:
        """Where the rows of an epoch do not come out even, accelerate gives some processes rows of its beginning once
        more: nothing is learned from those, nor do they count."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return
        row = segment_ids(batch, batch["labels"]) - 1
        if "position_ids" not in batch:  # not packed: a sequence is a row
            row = torch.arange(len(row), device=row.device)[:, None].expand_as(row)
        own = self.args.per_device_train_batch_size if self.model.training else self.args.per_device_eval_batch_size
        first = self.accelerator.process_index * own
        batch["labels"] = batch["labels"].masked_fill(first + row >= state.remainder, IGNORE)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, None, None]:
        """The loss alone: there are no logits to gather."""
        self._forget_repeated(inputs)
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def _add(self, mode: str, sums: dict[str, Any]) -> None:
        for name, value in sums.items():
            self._sums[mode][name] += value  # stays on the device until the next log

    def carried(self) -> dict[str, Any]:
        """What a resumed stage must know: what all ranks have summed since the last log, in how many seconds, and
        PSFT's old policy."""
        state: dict[str, Any] = {"sums": self._totals("train"), "seconds": time.perf_counter() - self._window_started}
        return state | ({"old_policy": self._old.state()} if self._old is not None else {})

    def carry_on(self, state: dict[str, Any]) -> None:
        if self.is_world_process_zero():
            self._sums["train"].update(state["sums"])
        self._window_started = time.perf_counter() - state.get("seconds", 0.0)  # earlier versions kept none
        if self._old is not None:
            self._old.load(state["old_policy"])

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]
        state = self.carried()
        folder = Path(self._get_output_dir(trial=None)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            torch.save(state, folder / CARRIED)

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None and (Path(checkpoint) / CARRIED).is_file():
            self.carry_on(torch.load(Path(checkpoint) / CARRIED, weights_only=True))

    def _totals(self, mode: str) -> dict[str, float]:
        """Sums over all ranks, by name: a rank whose rows held no supervised token has fewer of them."""
        totals: Counter[str] = Counter()
        for part in gather_object([{name: float(value) for name, value in self._sums[mode].items()}]):
            totals.update(part)
        return dict(totals)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Token-weighted means over all tokens since the last log; the objective and NLL by name, never a bare loss."""
        mode = "eval" if any(key.startswith("eval_") for key in logs) else "train"
        totals = self._totals(mode)
        self._sums[mode].clear()
        if totals.get("supervised"):
            tokens, supervised = totals.pop("tokens"), totals.pop("supervised")
            prefix = "val/" if mode == "eval" else ""
            values = {prefix + name: value / supervised for name, value in totals.items()}
            if mode == "train":
                seconds = time.perf_counter() - self._window_started  # of all steps since the last log
                values |= {"tokens_per_second": tokens / seconds, "step_seconds": seconds}
                values |= {"tokens": tokens, "supervised_tokens": supervised}
                values |= {key: logs[key] for key in ("learning_rate", "grad_norm") if key in logs}
                self._window_started = time.perf_counter()
            else:
                self._validated = values
            transformers.Trainer.log(self, values, start_time)


class ObjectiveTrainer(ObjectiveMixin, trl.SFTTrainer):
    """`trl.SFTTrainer` with an objective; what it adds is `ObjectiveMixin`'s."""


class OldPolicy:
    """PSFT's old policy: a copy of the trained weights, taken anew every so many optimizer steps.

    Its log-probabilities are taken without dropout, so that under dropout the ratio is not exactly 1 after a renewal.
    """

    def __init__(self) -> None:
        self._copy: list[Tensor] = []
        self._period = -1

    def logp(self, model: torch.nn.Module, inputs: Mapping[str, Any], period: int) -> Tensor:
        """log π_old(y) of a batch, [B, T], aligned with the labels; the copy is renewed when `period` has moved on.

        Raises RunError where the weights are sharded: a copy of the parameters is then not the model.
        """
        trained = [p for p in model.parameters() if p.requires_grad]  # looked up each time: wrapping replaces them
        if any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") or hasattr(p, "_is_flat_param") for p in trained):
            raise RunError("psft keeps no old policy of sharded weights", "sft.objective", "train it under DDP")
        if period > self._period:
            self._copy, self._period = [p.detach().clone() for p in trained], period
        labels = inputs["labels"]
        training = model.training
        with torch.no_grad(), self._in_place(trained):
            model.eval()
            found = model(**inputs, statistics=("logp",))["logp"]
            model.train(training)
        out = torch.zeros(labels.shape, dtype=found.dtype, device=labels.device)
        out[:, 1:][labels[:, 1:] != IGNORE] = found
        return out

    @contextmanager
    def _in_place(self, trained: list[torch.nn.Parameter]) -> Iterator[None]:
        now = [p.data for p in trained]
        torch.clear_autocast_cache()  # it holds 16-bit copies of the weights by their names, not their values
        try:
            for p, old in zip(trained, self._copy, strict=True):
                p.data = old.to(p.device)
            yield
        finally:
            for p, data in zip(trained, now, strict=True):
                p.data = data
            torch.clear_autocast_cache()

    def state(self) -> dict[str, Any]:
        return {"period": self._period, "weights": self._copy}

    def load(self, state: dict[str, Any]) -> None:
        self._period, self._copy = state["period"], state["weights"]


def _sequences(batch: dict[str, torch.Tensor]) -> int:
    """Sequences of which something is learned."""
    learned = batch["labels"] != IGNORE
    learned[:, 0] = False  # the first token of a row is never a target
    return len(segment_ids(batch, batch["labels"])[learned].unique())


def _tokens(batch: dict[str, torch.Tensor]) -> int:
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())
