"""`heatbath surprise`: one pass of the base over the demonstrations, and what β would do on them. Trains nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from heatbath import models, surprise
from heatbath.data import checks, sources
from heatbath.errors import RecipeError
from heatbath.ideas.objectives import objective
from heatbath.progress import Progress
from heatbath.recipe import SFT, Recipe
from heatbath.report import tables
from heatbath.report.page import write_surprise
from heatbath.run import is_run, write_atomically
from heatbath.stages.measuring import MeasuredBase, left_open, require_columns
from heatbath.terminal import printable

WIDTH = 48  # characters of the longest bar


def run_surprise(recipe: Recipe, folder: Path, command: str, progress: Progress) -> dict[str, Any]:
    """Measures all demonstrations, fills the reference cache for the recipe's objective, and writes surprise.json and
    surprise.html into `folder`. Returns the profile. Raises RecipeError, DataError or RunError."""
    if recipe.sft is None:
        recipe = recipe.model_copy(update={"sft": SFT()})
    if recipe.model is None:
        raise RecipeError("the base of this recipe is not made yet", "[pretrain]", "profile a recipe that uses it")
    if is_run(folder):
        raise RecipeError("the folder holds a run, whose own profile would be lost", "--out", "name another folder")
    assert recipe.sft is not None
    splits = sources.of(recipe)
    sources.require(splits, recipe, ("sft",))
    tokenizer = models.load_tokenizer(recipe.model, recipe.template)
    demos = checks.rendered(tokenizer, splits.demos, recipe, "demos")
    goal = objective(recipe.sft.objective.name, **recipe.sft.objective.hyper)
    require_columns(goal, demos)
    model = models.load_model(recipe.model, torch.float32)
    checks.require_vocabulary(tokenizer, model.config)
    base = MeasuredBase(recipe, model, tokenizer, goal, keep=True)
    assert base.cache is not None
    base.fill(goal, demos, progress)
    nats = base.surprises(demos)
    share = goal.beta.left_to_base if left_open(goal) else None  # type: ignore[attr-defined]
    goal = surprise.resolve(goal, nats, base.vocab_size)
    base.fill(goal, demos, progress)  # where β was open until now
    kinds = [row.kind for row in splits.demos]
    found = surprise.profile(demos, nats, tokenizer, goal, vocab_size=base.vocab_size, kinds=kinds)
    sizes = surprise.cache_bytes(
        demos,
        nats,
        goal,
        vocab_size=base.vocab_size,
        width=base.cache.width,
        item=base.cache.dtype.itemsize,
        epsilon=recipe.sft.epsilon,
    )
    found |= {
        "model": recipe.model,
        "demonstrations": len(demos),
        "epsilon": recipe.sft.epsilon,
        "left_to_base": share,
        "caches": {**sizes, "head": base.cache.head.nbytes},
        "cache": str(base.cache.folder),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "surprise.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    found["page"] = str(write_surprise(folder, found, command))
    return found


def show(found: dict[str, Any], console: Console) -> None:
    """The profile on a terminal: histogram, shares by β and kind, the most surprising tokens, caches, the reading."""
    base = printable(found["model"])
    console.print(f"{found['rows']:,} demonstrations, {found['tokens']:,} supervised tokens of {base}\n", markup=False)
    _histogram(found, console)
    console.print(_table(tables.beta_rows(found)))
    if found["kinds"]:
        console.print(_table(tables.kind_rows(found)))
    console.print("\nmost surprising, in context")
    for token in found["most_surprising"]:
        line = Text(f"{token['nats']:6.1f} nats  {printable(token['before'])}")
        line.append(f"⟦{printable(token['token'])}⟧", style="bold")
        console.print(line, soft_wrap=True)
    console.print(_table(tables.cache_rows(found)))
    console.print(tables.cache_text(found), soft_wrap=True, markup=False)
    if found["left_to_base"] is not None:
        console.print(f"\nβ = {found['beta']:.6g} leaves {found['left_to_base']:.2%} to the base, as the recipe asks")
    console.print("\n" + surprise.describe(found), soft_wrap=True, markup=False)


def _histogram(found: dict[str, Any], console: Console) -> None:
    """Shares of tokens by surprise, 1 nat a line; a bar is logarithmic, from one token to all of them."""
    counts, total = found["histogram"], found["tokens"]
    last = max(i for i, count in enumerate(counts) if count)
    mark = found["beta"]
    for nats, count in enumerate(counts[: last + 1]):
        length = 0 if not count else 1 + round((WIDTH - 1) * _log_share(count, total))
        edge = " and above" if nats == len(counts) - 1 else ""
        here = f"  ← β = {mark:.4g}" if mark is not None and nats <= mark < nats + 1 else ""
        console.print(f"{nats:4} nats {'█' * length:<{WIDTH}} {count / total:8.3%}{edge}{here}", highlight=False)
    console.print()


def _log_share(count: int, total: int) -> float:
    return math.log(count) / math.log(total) if total > 1 else 1.0


def _table(rows: list[list[str]]) -> Table:
    table = Table(*rows[0], box=None, header_style="dim", padding=(0, 2, 0, 0))
    for row in rows[1:]:
        table.add_row(*row)
    return table
