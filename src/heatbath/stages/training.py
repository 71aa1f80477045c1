"""What the training stages share: trainer arguments, batches, LoRA, resuming, the run's log, the guard against NaN.

transformers saves and restores weights, optimizer, schedule, random states and the place in the data. Here its folders
are marked when complete (a kill in the middle of saving leaves one without the mark), the older ones are removed only
afterwards, and what our own trainers carry from step to step travels with them.
"""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import peft
import torch
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from heatbath import models, ranks
from heatbath.data.rendering import IGNORE, Rendered
from heatbath.errors import RunError
from heatbath.progress import Progress
from heatbath.recipe import Recipe
from heatbath.run import Run
from heatbath.sections import Lora, Optimizer
from heatbath.stages.sharding import own_part
from heatbath.unpickling import require_data

CARRIED = "heatbath.pt"
ADAPTER = "adapter"  # beside a merged checkpoint: what was merged, for a later stage to go on with
LARGEST_GAP = 0.05  # nats, mean absolute difference between the sampler's and the trainer's log-probabilities
IDLE_GENERATIONS = 3  # in a row without any signal, before it is said aloud
ONE_INTERRUPTION = 3.0  # seconds in which the same one may come more than once: from a scheduler and a launcher
LEAK = 1e-3  # relative difference of float32 hidden states, packed against alone; rounding stays below 1e-5


def optimizer_arguments(settings: Optimizer, recipe: Recipe, window: int = 1) -> dict[str, Any]:
    """Trainer arguments that follow from a stage's optimizer settings and the machine. Checkpoints fall on multiples of
    `window` steps."""
    gpu = torch.cuda.is_available()
    schedule = settings.schedule
    return {
        "learning_rate": settings.lr,
        "lr_scheduler_type": "constant_with_warmup" if schedule == "constant" and settings.warmup_steps else schedule,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "adam_beta1": settings.adam_betas[0],
        "adam_beta2": settings.adam_betas[1],
        "max_grad_norm": settings.max_grad_norm,
        "seed": recipe.seed,
        "bf16": models.autocast_dtype(recipe.precision) is torch.bfloat16,
        "use_cpu": not gpu,
        "gradient_checkpointing": gpu,  # on a CPU memory is plentiful and time is not
        "dataloader_pin_memory": gpu,
        "ddp_find_unused_parameters": False,
        "save_strategy": "steps" if settings.save_every else "no",
        "save_steps": max(1, -(-settings.save_every // window) * window),
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
    }


def without_dropout(model: torch.nn.Module) -> None:
    """Switches dropout off: modules of that name, and the number that an attention function is called with."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def require_finite(loss: torch.Tensor, where: str, remedy: str) -> None:
    """Raises RunError on a NaN or infinite loss (or largest gradient), before it reaches the weights."""
    if not bool(torch.isfinite(loss)):
        what = "the largest entry" if "gradient" in where else "the loss"
        raise RunError(f"{what} is {float(loss.detach())}", where, remedy)


def log_to_run(trainer: Trainer, run: Run, stage: str, progress: Progress, show: tuple[str, ...]) -> None:
    """Sends what the trainer logs to the run's metrics.jsonl and to the progress line, and nowhere else."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_RunLog(run, stage, progress, show))


def train(trainer: Any, run: Run, stage: str, progress: Progress) -> None:
    """Trains from the beginning, or from the stage's last whole checkpoint where there is one. An interruption (SIGINT,
    SIGTERM) lets the step in flight end and saves it; a second one ends at once. Raises KeyboardInterrupt then. One
    that comes after the last step is put off until `Run.new_checkpoint` has saved the policy."""
    checkpoint = ranks.agreed(lambda: run.last_checkpoint(stage, progress.say))
    if checkpoint is not None:
        require_data(checkpoint)
        run.require_same_processes(checkpoint)
        progress.say(f"{stage}: going on after step {checkpoint.name.rpartition('-')[2]}")
    stopping = _StopAfterStep(trainer.args, progress)
    trainer.add_callback(stopping)
    trainer.add_callback(_KeepResumable(trainer, run, stage))
    if checkpoint is not None:
        # The end of an epoch is saved before it is evaluated, and rows logged after a checkpoint do not outlive it.
        trainer.args.eval_on_start = _ends_epoch(trainer.args, len(trainer.train_dataset), checkpoint)
        trainer.carry_on(torch.load(checkpoint / CARRIED, weights_only=True))
    _end_at_the_last_step(trainer)
    stopping.listen()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stopping.stopped:
        raise KeyboardInterrupt


def _end_at_the_last_step(trainer: Any) -> None:
    """transformers asks whether the last step was taken only after another one: resumed from the checkpoint of the last
    step it would go one too far."""
    run_epoch = trainer._run_epoch

    def bounded(*args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True
        else:
            run_epoch(*args, **kwargs)

    trainer._run_epoch = bounded


def _ends_epoch(args: TrainingArguments, rows: int, checkpoint: Path) -> bool:
    """Whether an evaluation belongs to the step of a checkpoint."""
    step = int(checkpoint.name.rpartition("-")[2])
    per_epoch = math.ceil(rows / (args.train_batch_size * args.gradient_accumulation_steps * args.world_size))
    last = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    return args.eval_strategy == "epoch" and (step % per_epoch == 0 or step == last)


def save_policy(trainer: Trainer, folder: Path) -> None:
    """A plain `from_pretrained` folder: weights (adapters merged, and kept in its folder `adapter`), config, tokenizer,
    nothing pickled.

    Raises RunError instead of saving weights that the last step has made NaN or infinite.
    """
    own = [name for name, p in trainer.model.named_parameters() if not bool(torch.isfinite(own_part(p)).all())]
    if broken := [name for names in ranks.gathered(own) for name in names]:
        raise RunError(
            f"the last step left NaN or infinite weights, first in {broken[0]}", "lr", "lower the learning rate"
        )
    if isinstance(trainer.model, peft.PeftModel):
        if not ranks.first():
            return
        trainer.model.save_pretrained(folder / ADAPTER, selected_adapters=["default"])
        _merged(trainer.model, folder / ADAPTER).save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
    elif trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # with a copy of each tied weight
        if not ranks.first():
            return
        once = {name: w for name, w in weights.items() if name not in trainer.model.all_tied_weights_keys}
        trainer.model.save_pretrained(folder, state_dict=once)
        trainer.processing_class.save_pretrained(folder)
    else:
        trainer.save_model(str(folder))
    (folder / "training_args.bin").unlink(missing_ok=True)


def _merged(model: peft.PeftModel, adapter: Path) -> PreTrainedModel:
    """The plain model that adapters have made of their base, in float32. A base in 4 bits is taken out of them first:
    the sum would be rounded to 4 bits again, and the policy is what was trained."""
    if not models.is_quantized(model):
        merged: PreTrainedModel = model.merge_and_unload()
        return merged
    base = model.unload().dequantize().float()
    return models.load_adapter(base, adapter).merge_and_unload()


def float32_adapters(model: torch.nn.Module) -> None:
    """Of a quantised base: TRL would train them in bf16, in which small steps are lost."""
    if models.is_quantized(model):
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.float()


def lora_config(settings: Lora | None) -> peft.LoraConfig | None:
    """The adapters of a recipe's [lora] table, or None."""
    if settings is None:
        return None
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.targets,
    )


@dataclass(frozen=True)
class RowCollator:
    """Rows of `input_ids` and `labels` to a batch: padded on the right, or laid end to end in one row.

    End to end, `position_ids` start anew with each sequence, by which transformers keeps one from attending to another,
    and the first token of each is never a target. Nothing is masked by token id. Every other key of the rows is a
    column for the objective, a number or one per token: `columns`, name → [B, T], aligned with the labels.
    """

    pad_id: int
    packing: bool = False

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        names = [name for name in rows[0] if name not in ("input_ids", "labels", "attention_mask")]
        if not all(all(row.get("attention_mask", ())) for row in rows) or {"position_ids", "seq_lengths"} & {*names}:
            raise ValueError("RowCollator makes masks and positions itself: give it rows without padding or packing")
        columns = {name: [_per_token(row, name) for row in rows] for name in names}
        if self.packing:
            batch: dict[str, Any] = {
                "input_ids": torch.tensor([[i for row in rows for i in row["input_ids"]]]),
                "labels": torch.tensor([[x for row in rows for x in (IGNORE, *row["labels"][1:])]]),
                "position_ids": torch.tensor([[k for row in rows for k in range(len(row["input_ids"]))]]),
            }
            packed = {name: torch.tensor([[x for row in values for x in row]]) for name, values in columns.items()}
            return batch | ({"columns": packed} if packed else {})
        width = max(len(row["input_ids"]) for row in rows)

        def padded(values: list[list[Any]], fill: float) -> torch.Tensor:
            return torch.tensor([[*v, *[fill] * (width - len(v))] for v in values])

        batch = {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad_id),
            "labels": padded([row["labels"] for row in rows], IGNORE),
            "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
        }
        filled = {name: padded(values, 0.0) for name, values in columns.items()}
        return batch | ({"columns": filled} if filled else {})


def _per_token(row: dict[str, Any], name: str) -> list[float]:
    value = row[name]
    values = [float(value)] * len(row["input_ids"]) if isinstance(value, int | float) else [float(x) for x in value]
    if len(values) != len(row["input_ids"]):
        raise ValueError(f"the column '{name}' holds {len(values)} numbers for {len(row['input_ids'])} tokens")
    return values


@torch.no_grad()
def require_isolation(model: PreTrainedModel, rows: Sequence[Rendered]) -> None:
    """Raises RunError where sequences laid end to end would see each other: not every architecture keeps them apart."""
    two = sorted(rows, key=lambda row: len(row.input_ids))[:2]
    made = [{"input_ids": row.input_ids, "labels": row.labels} for row in two]
    packed = RowCollator(0, packing=True)(made)

    def hidden(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        inputs = {k: v.to(model.device) for k, v in batch.items() if k != "labels"}
        out: torch.Tensor = model.base_model(**inputs, use_cache=False).last_hidden_state[0]
        return out

    alone = torch.cat([hidden(RowCollator(0)([row])) for row in made])
    apart = torch.linalg.norm(hidden(packed) - alone) / torch.linalg.norm(alone)
    if not apart < LEAK:
        raise RunError(
            f"{type(model).__name__} does not keep packed sequences apart: hidden states differ by {float(apart):.1%}",
            "sft.packing",
            "leave packing off for this model",
        )


class _StopAfterStep(TrainerCallback):
    """Ends training after the step in which an interruption comes, once that is saved; of RL after the last step of the
    generation, since only between two of them it can be resumed. Any process that hears it stops all of them."""

    def __init__(self, args: TrainingArguments, progress: Progress):
        self.progress, self.asked, self.stopped, self.heard = progress, False, False, 0.0
        self.window = max(1, getattr(args, "steps_per_generation", 1) // args.gradient_accumulation_steps)

    def listen(self) -> None:
        """From here on, until somebody else does."""
        if threading.current_thread() is threading.main_thread():  # only that one hears signals
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if time.monotonic() - self.heard > ONE_INTERRUPTION:
                raise KeyboardInterrupt
            return
        self.asked, self.heard = True, time.monotonic()
        self.progress.interrupted = True
        self.progress.say(
            "interrupted: the step in flight is finished and saved, after the last one the policy (once more after "
            f"{ONE_INTERRUPTION:g} seconds ends at once)"
        )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if any(ranks.gathered(self.asked)) and state.global_step % self.window == 0:
            self.stopped = control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.stopped:
            control.should_evaluate = False


class _KeepResumable(TrainerCallback):
    """Marks each checkpoint when complete, adds the trainer's own state, and removes older ones than the recipe's
    `save_total_limit` keeps."""

    def __init__(self, trainer: Any, run: Run, stage: str):
        self.trainer, self.run, self.stage = trainer, run, stage

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A checkpoint restores these two with the state; the recipe of today decides them."""
        state.save_steps, state.logging_steps = args.save_steps, args.logging_steps

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        ranks.wait()  # each process has its own random states to write
        if ranks.first():
            self._keep(args, state)
        ranks.wait()  # one that ends first has the launcher end the others

    def _keep(self, args: TrainingArguments, state: TrainerState) -> None:
        folder = Path(str(args.output_dir))
        checkpoint = folder / f"checkpoint-{state.global_step}"
        (checkpoint / "training_args.bin").unlink(missing_ok=True)  # pickled, and nothing reads it
        if not (checkpoint / CARRIED).exists():
            torch.save(self.trainer.carried(), checkpoint / CARRIED)
        self.run.complete(checkpoint, self.stage)
        kept = getattr(self.run.recipe, self.stage).save_total_limit
        numbered = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        for old in numbered[:-kept]:
            shutil.rmtree(old, ignore_errors=True)


class _RunLog(TrainerCallback):
    """Writes what a trainer logs into the run's metrics.jsonl and shows a few of the numbers."""

    def __init__(self, run: Run, stage: str, progress: Progress, show: tuple[str, ...]):
        self.run, self.stage, self.progress, self.show = run, stage, progress, show
        self.latest: dict[str, float] = {}
        self.uninformative = 0
        self.told_gap = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        numbers = {k: float(v) for k, v in (logs or {}).items() if isinstance(v, int | float)}
        self.run.log(self.stage, state.global_step, numbers)
        self.latest |= numbers
        shown = "  ".join(f"{key} {self.latest[key]:.4g}" for key in self.show if key in self.latest)
        self.progress.update(state.global_step, shown)
        if numbers.get("sampler_gap", 0.0) > LARGEST_GAP and not self.told_gap:
            self.told_gap = True
            self.progress.say(
                f"warning: the sampler's log-probabilities differ from the trainer's by {numbers['sampler_gap']:.3g} "
                f"nats per token in the mean (above {LARGEST_GAP}); look at precision and chat template, and leave "
                "vllm_importance_sampling_correction on"
            )
        if "informative_share" in numbers:
            self.uninformative = 0 if numbers["informative_share"] else self.uninformative + 1
            if self.uninformative == IDLE_GENERATIONS:
                self.progress.say(
                    f"warning: in {IDLE_GENERATIONS} generations no group had two different rewards (mean reward "
                    f"{self.latest.get('reward', float('nan')):.3g}); RL learns nothing from them. Look at the "
                    "samples, the gold answers and rl.max_new_tokens"
                )
