"""A small base from nothing: a character-level Llama pretrained on worked solutions, cached by its content.

Random weights hold no prior worth keeping, and a real model is slow on a laptop. This one is cheap and has a prior:
several ways to solve a problem, and a share of wrong ones. `model = "tiny"` is what recipes/base-tiny.toml makes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import trl
from filelock import FileLock
from transformers import LlamaConfig, LlamaForCausalLM

from heatbath import models
from heatbath import recipe as recipes
from heatbath.data import characters, checks, sources
from heatbath.data.rows import Row
from heatbath.ideas.objectives import objective
from heatbath.progress import Progress
from heatbath.run import Run
from heatbath.stages.objective_trainer import ObjectiveTrainer
from heatbath.stages.sft import dataset, total_steps
from heatbath.stages.training import RowCollator, log_to_run, optimizer_arguments, save_policy, train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from heatbath.recipe import Recipe

MADE_BY = 2  # raise it when the same recipe would give another model: cached ones are then made again
# On a CPU, however many cores there are: their number decides the order in which float32 sums are taken, and a small
# model that learns to add ends elsewhere for it (pass@1 0.19 and 0.39 with 2 threads and with 1).
THREADS = 2


def run_pretrain(run: Run, recipe: Recipe, progress: Progress) -> None:
    """Makes the policy `base` of a recipe with a [pretrain] table, or takes it from the cache if it was made before."""
    splits = sources.of(recipe)
    sources.require(splits, recipe, ("pretrain",))
    cached = cached_folder(recipe, splits.demos)
    cached.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(cached.with_suffix(".lock")):
        if cached.is_dir():
            progress.say(f"base: found in the cache, {cached}")
            with run.new_checkpoint("base") as folder:
                shutil.copytree(cached, folder, dirs_exist_ok=True)
            return
        _pretrain(run, recipe, splits.demos, progress)
        with tempfile.TemporaryDirectory(dir=cached.parent) as unfinished:
            shutil.copytree(run.checkpoint("base"), Path(unfinished) / "model")
            (Path(unfinished) / "model").rename(cached)


def cached_folder(recipe: Recipe, corpus: list[Row]) -> Path:
    """Where the base that this recipe makes of this corpus is kept: a name for its content."""
    assert recipe.pretrain is not None
    content = {
        "made_by": MADE_BY,
        "pretrain": recipe.pretrain.model_dump(mode="json", exclude={"save_every", "save_total_limit"}),
        "seed": recipe.seed,
        "precision": str(models.autocast_dtype(recipe.precision)),
        "template": base_tokenizer(recipe).chat_template,
        "system": recipe.data.system,
        "corpus": [(row.history, row.question, row.solution) for row in corpus],
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
    return models.cache_folder() / "models" / f"pretrained-{digest}"


def tiny_folder() -> Path:
    """Where the tiny base is kept, made or not."""
    recipe = recipes.load("base-tiny")
    return cached_folder(recipe, sources.of(recipe).demos)


def tiny_base(progress: Progress | None = None) -> Path:
    """The folder of the tiny base, pretrained now if the cache does not hold it (minutes on 2 CPU cores)."""
    recipe, cached = recipes.load("base-tiny"), tiny_folder()
    if not cached.is_dir():
        progress = progress or Progress()
        progress.say("the tiny base is not in the cache; pretraining it, once (a few minutes on 2 CPU cores)")
        with tempfile.TemporaryDirectory() as folder:
            run_pretrain(Run.create(Path(folder) / "run", recipe), recipe, progress)
    return cached


def _pretrain(run: Run, recipe: Recipe, corpus: list[Row], progress: Progress) -> None:
    settings = recipe.pretrain
    assert settings is not None
    tokenizer = base_tokenizer(recipe)
    rows = checks.rendered(tokenizer, corpus, recipe.model_copy(update={"sft": None}), "demos")
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(model_config(recipe))
    progress.say(f"pretraining {model.num_parameters():,} parameters on {sum(len(r.input_ids) for r in rows):,} tokens")
    arguments: dict[str, Any] = {
        "output_dir": str(run.working("pretrain")),
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.batch,
        "logging_steps": 10,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        **optimizer_arguments(settings, recipe),
        "gradient_checkpointing": False,
    }
    trainer = ObjectiveTrainer(
        model=model,
        args=trl.SFTConfig(**arguments),
        train_dataset=dataset(rows),
        processing_class=tokenizer,
        data_collator=RowCollator(tokenizer.pad_token_id),
        objective=objective("sft"),
    )
    log_to_run(trainer, run, "pretrain", progress, show=("nll", "tokens_per_second"))
    with run.new_checkpoint("base") as folder:
        with progress.bar("pretrain", total_steps(settings, len(rows))), _same_sums():
            train(trainer, run, "pretrain", progress)
        save_policy(trainer, folder)


@contextmanager
def _same_sums() -> Iterator[None]:
    """Computes with `THREADS` threads."""
    own = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(own)


def base_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer that a [pretrain] table makes."""
    tokenizer = characters.character_tokenizer()
    models.set_template(tokenizer, recipe.template)
    return tokenizer


def model_config(recipe: Recipe) -> LlamaConfig:
    """The shape of the model that a [pretrain] table makes."""
    settings, tokenizer = recipe.pretrain, base_tokenizer(recipe)
    assert settings is not None
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=8 * settings.width // 3 // 16 * 16,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=checks.PRETRAIN_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",  # at this size and length 1.6 times the speed of the fused kernel on a CPU
    )
