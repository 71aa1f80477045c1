"""What verl reads, written into `verl/` of a run: tables of rows, a configuration, a script that starts the trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heatbath import models
from heatbath.data import checks, rendering, sources
from heatbath.data.rows import Row, Splits
from heatbath.errors import RecipeError
from heatbath.integrations.verl.translate import Start, Translated, nested, translated
from heatbath.recipe import Recipe
from heatbath.run import Run
from heatbath.stages import pipeline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLDER, SHARDS = "verl", "verl"  # in the run's folder, and in the working folder of a stage
LAUNCH = """\
#!/bin/sh
# {what} on config {name}.yaml of this folder; keys of verl may follow, for example
#   sh {name}.sh {example}
# HEATBATH_VERL_PYTHON is the python of verl's environment.
# {where}
set -eu
HERE="$(cd "$(dirname "$0")" && pwd)"
PYTHON="${{HEATBATH_VERL_PYTHON:-python}}"
"""
RL_SCRIPT = (
    LAUNCH
    + """\
"$PYTHON" -m heatbath.integrations.verl.check "$HERE/{name}.yaml" "$@"
exec "$PYTHON" -m verl.trainer.main_ppo --config-path "$HERE" --config-name {name} "$@"
"""
)
SFT_SCRIPT = (
    LAUNCH
    + """\
exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node "${{GPUS:-8}}" \\
    -m heatbath.integrations.verl.sft --config-path "$HERE" --config-name {name} "$@"
"""
)


@dataclass
class Written:
    """Where the files lie, the steps that verl's trainers end with (no SFT step: none is written), and what a reader
    should know."""

    folder: Path
    last: int
    sft_last: int | None = None
    notes: list[str] = field(default_factory=list)


def write(run: Run, recipe: Recipe, splits: Splits, tokenizer: PreTrainedTokenizerBase) -> Written:
    """Writes everything for `[rl]`, and for `[sft]` where that can be carried over. Raises RecipeError where `[rl]`
    cannot."""
    folder = (run.folder / FOLDER).resolve()
    made = plan(run, recipe, splits, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    for old in (old for ending in ("parquet", "yaml", "sh") for old in folder.glob(f"*.{ending}")):
        old.unlink()
    tokenizer.save_pretrained(folder / "tokenizer")
    _parquet(folder / "train.parquet", rl_rows(splits.prompts, recipe, "prompts"))
    _parquet(folder / "val.parquet", rl_rows(held_out(recipe, splits), recipe, "test"))
    (folder / "rl.yaml").write_text(_text("ppo_trainer", made.config, folder), encoding="utf-8")
    (folder / "rl.sh").write_text(_rl_script(), encoding="utf-8")
    written = Written(folder, made.generations, notes=list(made.notes))
    if recipe.sft is not None:
        try:
            written.sft_last, notes = _write_sft(folder, run, recipe, splits, tokenizer)
            written.notes += [f"sft: {note}" for note in notes]
        except RecipeError as error:
            written.notes.append(f"[sft] stays with heatbath sft: {error.what} ({error.where})")
    (folder / "notes.txt").write_text("\n".join(written.notes) + "\n", encoding="utf-8")
    return written


def planned(run: Run, recipe: Recipe) -> dict[str, Any]:
    """What `--dry-run` adds: the notes, the configuration as text, and the script that would start the trainer."""
    splits = sources.of(recipe)
    made = plan(run, recipe, splits, pipeline.tokenizer_of(recipe))
    text = _text("ppo_trainer", made.config, (run.folder / FOLDER).resolve())
    script = str(run.folder / FOLDER / "rl.sh")
    return {
        "notes": [*splits.notes, *made.notes],
        "verl": f"{text.rstrip()}\n\n# {script}\n{_rl_script().rstrip()}",
        "command": f"sh {script}",
    }


def _rl_script() -> str:
    where = "RAY_ADDRESS names the cluster; without it Ray starts on this machine."
    return RL_SCRIPT.format(what="verl.trainer.main_ppo", name="rl", example="trainer.nnodes=2", where=where)


def plan(run: Run, recipe: Recipe, splits: Splits, tokenizer: PreTrainedTokenizerBase) -> Translated:
    """The configuration of `[rl]` alone; nothing is written."""
    folder = (run.folder / FOLDER).resolve()
    start = Start(
        model=str(run.checkpoint("init").resolve()) if recipe.sft is not None else _base(run, recipe),
        tokenizer=folder / "tokenizer",
        train=folder / "train.parquet",
        val=folder / "val.parquet",
        checkpoints=(run.working("rl") / SHARDS).resolve(),
    )
    asked = [*splits.prompts, *held_out(recipe, splits)]
    lengths = [len(rendering.prompt_ids(tokenizer, rendering.messages(row, recipe.data.system))) for row in asked]
    return translated(recipe, start, len(splits.prompts), max(lengths))


def _base(run: Run, recipe: Recipe) -> str:
    """The base as verl's processes load it: a whole path, or a name of the hub."""
    if recipe.model is None:
        return str(run.checkpoint("base").resolve())
    found = models.resolve(recipe.model)
    return str(Path(found).expanduser().resolve()) if Path(found).expanduser().is_dir() else found


def held_out(recipe: Recipe, splits: Splits) -> list[Row]:
    """The problems that verl tests on; without any, or where none are wanted, a training prompt: it insists on some."""
    assert recipe.rl is not None
    return splits.test[: recipe.rl.eval_prompts] or splits.prompts[:1]


def rl_rows(rows: list[Row], recipe: Recipe, split: str) -> list[dict[str, Any]]:
    """Rows in verl's schema: the conversation as messages, the gold answer, and which grader judges it."""
    kind, profile = recipe.reward.kind, recipe.reward.profile
    return [
        {
            "data_source": f"heatbath/{recipe.data.source}",
            "prompt": rendering.messages(row, recipe.data.system),
            "ability": kind,
            "reward_model": {"style": "rule", "ground_truth": "" if row.answer is None else str(row.answer)},
            "extra_info": {"index": i, "split": split, "id": row.id, "kind": kind, "profile": profile},
        }
        for i, row in enumerate(rows)
    ]


def sft_rows(rendered: list[rendering.Rendered]) -> list[dict[str, Any]]:
    """Demonstrations as heatbath renders them: token ids, and which of them are learned."""
    return [
        {"input_ids": row.input_ids, "loss_mask": [int(label != rendering.IGNORE) for label in row.labels]}
        for row in rendered
    ]


def _write_sft(
    folder: Path, run: Run, recipe: Recipe, splits: Splits, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, list[str]]:
    """The demonstrations, the configuration of verl's SFT trainer on the recipe's objective, and its script. Returns
    its last step, and notes."""
    keys, notes = sft_keys(recipe, len(splits.demos))
    tables = {}
    assert recipe.sft is not None
    for name, split in (("sft", "demos"), ("sft-val", "validation")):
        rows = sft_rows(checks.rendered(tokenizer, getattr(splits, split), recipe, split))
        if split == "demos" or len(rows) >= recipe.sft.batch:
            tables[name] = folder / f"{name}.parquet"
            _parquet(tables[name], rows)
        elif rows:
            notes.append(f"verl would leave out the {len(rows)} rows of validation, which do not fill a batch")
    keys |= {
        "data.train_files": str(tables["sft"]),
        "data.val_files": str(tables["sft-val"]) if "sft-val" in tables else None,
        "model.path": _base(run, recipe),
        "model.tokenizer_path": str(folder / "tokenizer"),
        "trainer.test_freq": "after_each_epoch" if "sft-val" in tables else -1,
        "heatbath.base": _base(run, recipe),
        "trainer.default_local_dir": str((run.working("sft") / SHARDS).resolve()),
    }
    (folder / "sft.yaml").write_text(_text("sft_trainer_engine", nested(keys), folder), encoding="utf-8")
    words = {"name": "sft", "example": "optim.lr=2e-5", "where": "GPUS is how many this machine has (8)."}
    what = "verl's SFT trainer with heatbath's objective"
    (folder / "sft.sh").write_text(SFT_SCRIPT.format(what=what, **words), encoding="utf-8")
    return keys["trainer.total_training_steps"], notes


def sft_keys(recipe: Recipe, rows: int) -> tuple[dict[str, Any], list[str]]:
    """`[sft]` in the keys of verl's SFT trainer, and what it does in another way. Raises RecipeError."""
    from heatbath.integrations.verl.sft import require_carried

    settings = recipe.sft
    assert settings is not None
    require_carried(settings.objective)
    trl = "heatbath sft does it"
    if settings.reduction != "token_mean":
        raise RecipeError(f"verl's SFT trainer has no reduction '{settings.reduction}'", "sft.reduction", trl)
    if settings.trainer or recipe.lora is not None:
        raise RecipeError("[sft.trainer] and [lora] are not carried over to verl", "sft", trl)
    if settings.schedule == "linear":
        raise RecipeError("verl has no linear schedule", "sft.schedule", "constant or cosine")
    if settings.replay is not None:
        raise RecipeError("answers of the base are not written for verl", "sft.replay", trl)
    if settings.splits != ["demos"]:
        raise RecipeError("only demonstrations are written for verl", "sft.splits", trl)
    of_an_epoch = rows // settings.batch
    if not of_an_epoch:
        raise RecipeError(f"{rows} demonstrations do not fill a batch of {settings.batch}", "sft.batch", "less")
    steps = math.ceil(of_an_epoch * settings.epochs)
    steps = min(steps, settings.max_steps) if settings.max_steps else steps
    notes = []
    if rows % settings.batch:
        notes.append(f"verl leaves out the {rows % settings.batch} rows of an epoch that do not fill a batch")
    if settings.reference != "model":
        notes.append("the base runs beside the policy there, which is exact; no cache is read")
    param = "fp32" if recipe.precision == "fp32" else "bf16"
    return {
        "heatbath.objective": {"name": settings.objective.name, **settings.objective.hyper},
        "data.train_batch_size": settings.batch,
        "data.micro_batch_size_per_gpu": min(settings.micro_batch, settings.batch),
        "data.use_dynamic_bsz": False,
        "data.max_length": settings.max_length,
        "data.custom_cls.path": "pkg://heatbath.integrations.verl.sft",
        "data.custom_cls.name": "RenderedRows",
        "optim.lr": settings.lr,
        "optim.lr_scheduler_type": settings.schedule,
        "optim.lr_warmup_steps": settings.warmup_steps,
        "optim.weight_decay": settings.weight_decay,
        "optim.betas": list(settings.adam_betas),
        "optim.clip_grad": settings.max_grad_norm,
        "engine.strategy": "fsdp2",
        "engine.seed": recipe.seed,
        "engine.mixed_precision": {"param_dtype": param, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
        "checkpoint.save_contents": ["model", "optimizer", "extra", "hf_model"],
        "checkpoint.load_contents": ["model", "optimizer", "extra"],
        "trainer.total_epochs": math.ceil(steps / of_an_epoch),
        "trainer.total_training_steps": steps,
        "trainer.save_freq": settings.save_every or steps,
        "trainer.max_ckpt_to_keep": 1,
        "trainer.seed": recipe.seed,
        "trainer.logger": ["console"],
        "trainer.project_name": "heatbath",
        "trainer.experiment_name": recipe.name or settings.objective.name,
    }, notes


def _parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _text(defaults: str, config: dict[str, Any], folder: Path) -> str:
    """A configuration that hydra composes with verl's own defaults."""
    import yaml

    head = {
        "hydra": {"searchpath": ["pkg://verl.trainer.config"], "run": {"dir": str(folder / "hydra")}},
        "defaults": [defaults, "_self_"],
    }
    text: str = yaml.safe_dump(head | config, sort_keys=False, allow_unicode=True, width=120)
    return text
