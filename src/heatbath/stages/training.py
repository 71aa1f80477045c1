"""What both training stages share: trainer arguments, the run's log, and the guard against NaN."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from heatbath import models
from heatbath.errors import RunError
from heatbath.progress import Progress
from heatbath.recipe import Optimizer, Recipe
from heatbath.run import Run


def optimizer_arguments(settings: Optimizer, recipe: Recipe) -> dict[str, Any]:
    """Trainer arguments that follow from a stage's optimizer settings and the machine."""
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
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
    }


def require_finite(loss: torch.Tensor, where: str, remedy: str) -> None:
    """Raises RunError on a NaN or infinite loss, before it reaches the weights."""
    if not bool(torch.isfinite(loss)):
        raise RunError(f"the loss is {float(loss.detach())}", where, remedy)


def log_to_run(trainer: Trainer, run: Run, stage: str, progress: Progress, show: tuple[str, ...]) -> None:
    """Sends what the trainer logs to the run's metrics.jsonl and to the progress line, and nowhere else."""
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_RunLog(run, stage, progress, show))


def save_policy(trainer: Trainer, folder: Path) -> None:
    """A plain `from_pretrained` folder: weights, config, tokenizer, nothing pickled.

    Raises RunError instead of saving weights that the last step has made NaN or infinite.
    """
    broken = [name for name, p in trainer.model.named_parameters() if not bool(torch.isfinite(p).all())]
    if broken:
        raise RunError(
            f"the last step left NaN or infinite weights, first in {broken[0]}", "lr", "lower the learning rate"
        )
    trainer.save_model(str(folder))
    (folder / "training_args.bin").unlink(missing_ok=True)
    shutil.rmtree(str(trainer.args.output_dir), ignore_errors=True)


class _RunLog(TrainerCallback):
    """Writes what a trainer logs into the run's metrics.jsonl and shows a few of the numbers."""

    def __init__(self, run: Run, stage: str, progress: Progress, show: tuple[str, ...]):
        self.run, self.stage, self.progress, self.show = run, stage, progress, show

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
        shown = "  ".join(f"{key} {numbers[key]:.4g}" for key in self.show if key in numbers)
        self.progress.update(state.global_step, shown)
