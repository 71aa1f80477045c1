"""The cells of a comparison: settings × seeds, each a run folder of its own, and what one cell can take from another.

A cell is its list of overrides over one recipe, so `heatbath run RECIPE OVERRIDES --out FOLDER` is the same cell.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from heatbath import recipe as recipes
from heatbath.compare_sections import Compare, Grid
from heatbath.errors import RecipeError, RunError
from heatbath.opening import readers
from heatbath.recipe import Recipe
from heatbath.run import CHECKPOINTS, STAGES, Run, is_run

SHORT = {"strategy", "sft.objective", "rl.policy"}  # axes whose values say what they are
MEASURED = {"sft": ("surprise.json",), "rl": ("readiness.json",)}  # what a stage leaves beside its policy


@dataclass(frozen=True)
class Cell:
    """One run of a comparison: `setting` names what is compared, `trial` a candidate while it is tuned."""

    setting: str
    seed: int
    overrides: tuple[str, ...]
    folder: Path
    trial: str = ""

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.setting, self.trial, f"seed {self.seed}") if part)

    def recipe(self, path: str) -> Recipe:
        return recipes.load(path, [*self.overrides])


def settings(vary: Grid) -> dict[str, tuple[str, ...]]:
    """Name → overrides of every combination of the varied values, in their order; one of no name where none vary."""
    found = {}
    for values in itertools.product(*vary.values()):
        chosen = dict(zip(vary, values, strict=True))
        found[_label(chosen)] = tuple(override(key, value) for key, value in chosen.items())
    return found


def override(key: str, value: Any) -> str:
    return f"{key}={value}" if isinstance(value, str) else f"{key}={recipes.literal(value)}"


def _label(chosen: dict[str, Any]) -> str:
    parts = []
    for key, value in chosen.items():
        if isinstance(value, dict):
            shown = ",".join(str(value[k]) if k == "name" else f"{k}={_shown(value[k])}" for k in value)
        else:
            shown = _shown(value)
        parts.append(shown if key in SHORT else f"{key.rpartition('.')[2]}={shown}")
    return " ".join(parts) or "recipe"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def cells(plan: Compare, overrides: Sequence[str], out: Path, chosen: dict[str, list[str]] | None = None) -> list[Cell]:
    """The cells that are compared, seed by seed. `chosen` are the overrides that tuning found for each setting."""
    found = []
    for seed, (name, own) in itertools.product(plan.seeds, settings(plan.vary).items()):
        asked = (*overrides, *own, *(chosen or {}).get(name, ()), f"seed={seed}")
        found.append(Cell(name, seed, asked, out / slug(name) / f"{seed}"))
    return found


def tuning_cells(plan: Compare, overrides: Sequence[str], out: Path) -> list[Cell]:
    """The cells that each setting is tuned by: every combination of its grid, asked the validation problems."""
    if plan.tune is None:
        return []
    found = []
    shorter = [override(key, value) for key, value in plan.tune.overrides.items()]
    for seed, (name, own) in itertools.product(plan.tune.seeds, settings(plan.vary).items()):
        for trial, tried in settings(plan.tune.grids.get(name, plan.tune.grid)).items():
            asked = (*overrides, *own, *shorter, *tried, "eval.split=validation", f"seed={seed}")
            folder = out / "tuning" / slug(name) / slug(trial) / f"{seed}"
            found.append(Cell(name, seed, asked, folder, trial))
    return found


def slug(name: str) -> str:
    """A folder's name for it."""
    return re.sub(r"[^A-Za-z0-9._=,+-]+", "_", name).strip("._") or "recipe"


def require(plan: Compare, path: str, every: Sequence[Cell], known: Iterable[str]) -> dict[Cell, Recipe]:
    """The recipe of every cell. Raises RecipeError for one that does not load, before anything is trained."""
    names = list(settings(plan.vary))
    slugs = [slug(name) for name in names]
    if twice := next((name for name, own in zip(names, slugs, strict=True) if slugs.count(own) > 1), None):
        raise RecipeError(f"two settings would share the folder {slug(twice)}", "compare.vary", "rename one of them")
    if "tuning" in slugs:
        raise RecipeError("a setting cannot be called 'tuning'", "compare.vary", "rename the strategy")
    for what, name in [("compare.baseline", plan.baseline), *(("compare.tune.grids", n) for n in _grids(plan))]:
        if name is not None and name not in names and (what == "compare.baseline" or name not in known):
            raise RecipeError(f"no setting is called '{name}'", what, f"one of {', '.join(names)}")
    return {cell: cell.recipe(path) for cell in every}


def _grids(plan: Compare) -> list[str]:
    return [] if plan.tune is None else list(plan.tune.grids)


def keys_of(recipe: Recipe, stage: str) -> str:
    """Everything that a stage's policy hangs on, as one text: the keys that this stage and those before it read."""
    before = STAGES[: STAGES.index(stage) + 1]
    flat = recipes.flat(recipe.model_dump(mode="json"))
    own = {key: value for key, value in flat.items() if set(readers(key)) & set(before)}
    tables = {s: getattr(recipe, s) is not None for s in before}
    return json.dumps([own, tables], sort_keys=True, ensure_ascii=False)


def adopt(run: Run, siblings: Iterable[Path]) -> list[str]:
    """Takes over, from other cells that are finished with it, the policies that this run would train in the same way,
    and the samples it would draw alike. Returns what was taken, in words."""
    taken = []
    others = [Run.read(folder) for folder in siblings if folder != run.folder and is_run(folder)]
    for stage in ("pretrain", "sft"):
        if getattr(run.recipe, stage) is None or run.begun(stage):
            continue
        wanted = keys_of(run.recipe, stage)
        found = next((o for o in others if o.finished(stage) and keys_of(o.recipe, stage) == wanted), None)
        if found is not None:
            _take_policy(run, found, stage)
            taken.append(f"{CHECKPOINTS[stage]} of {found.folder}")
    for policy in ("base", "init"):
        found = next((o for o in others if _same_samples(run, o, policy)), None)
        if found is not None:
            run.add_samples(found.samples(policy))
            taken.append(f"samples of {policy} of {found.folder}")
    return taken


def _take_policy(run: Run, other: Run, stage: str) -> None:
    policy = CHECKPOINTS[stage]
    for name in ("base.json", *MEASURED.get(stage, ())):
        if (known := other.read_json(name)) is not None:
            run.write_json(name, known)
    with run.new_checkpoint(policy) as folder:
        shutil.copytree(other.checkpoint(policy), folder, dirs_exist_ok=True, copy_function=_linked)
        run.add_metrics(other.metrics(stage))


def _linked(source: str, target: str) -> None:
    """A second name for the same file where the file system has such; a policy's files are never written to."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _same_samples(run: Run, other: Run, policy: str) -> bool:
    """Whether the other run has drawn all that this one would draw from a policy, and this one nothing yet."""
    if policy not in run.policies or policy not in other.policies or not other.finished("eval"):
        return False
    stage = other.stage_of(policy) if policy != "base" or run.recipe.model is None else "pretrain"
    same = run.recipe.eval == other.recipe.eval and run.recipe.reward == other.recipe.reward
    if not same or keys_of(run.recipe, stage) != keys_of(other.recipe, stage):
        return False
    judged = run.recipe.eval.judge is not None  # whose ratings lie in files of their own
    return not judged and not run.samples(policy)


def candidates(found: dict[Cell, float | None]) -> dict[str, str]:
    """Setting → the trial with the best mean over its seeds; the first of equals. Raises RunError where a trial has no
    result."""
    scores: dict[str, dict[str, list[float]]] = {}
    for cell, score in found.items():
        if score is None:
            raise RunError("tuning is not finished: a trial has no result", str(cell.folder), "run its cell first")
        scores.setdefault(cell.setting, {}).setdefault(cell.trial, []).append(score)
    means = {name: {trial: sum(own) / len(own) for trial, own in tried.items()} for name, tried in scores.items()}
    return {name: max(tried, key=lambda trial: tried[trial]) for name, tried in means.items()}


def named_runs(runs: Sequence[Run]) -> list[tuple[str, Run]]:
    """Each run with the name of its setting: its strategy, and the keys in which recipes of one strategy differ, but
    for the seed."""
    flat = [recipes.flat(run.recipe.model_dump(mode="json")) for run in runs]
    named = []
    for run, own in zip(runs, flat, strict=True):
        alike = [other for other in flat if other.get("name") == own.get("name")]
        keys = sorted({key for other in alike for key in other | own if other.get(key) != own.get(key)} - {"seed"})
        differing = [f"{key.rpartition('.')[2]}={_shown(own[key])}" for key in keys if own.get(key) is not None]
        named.append((" ".join([*([own["name"]] if own.get("name") else []), *differing]) or "recipe", run))
    return named


def parse_vary(texts: Sequence[str]) -> Grid:
    """`key=a,b,c` or `key=[…]` in TOML, by key. Raises RecipeError."""
    found: Grid = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not key.strip() or not values.strip():
            raise RecipeError("what is varied is key=value,value", f"--vary {text}", "for example strategy=sft,gift")
        written = values if values.lstrip().startswith("[") else f"[{values}]"
        try:
            parsed = tomllib.loads(f"v = {written}")["v"]
        except tomllib.TOMLDecodeError:
            parsed = [_plain(value) for value in values.split(",")]
        found[key.strip()] = parsed
    return found


def _plain(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text.strip()


def parse_seeds(text: str) -> list[int]:
    """`0..4` (both ends) or `0,1,2`. Raises RecipeError."""
    try:
        if ".." in text:
            first, last = (int(part) for part in text.split(".."))
            return list(range(first, last + 1))
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"not a list of seeds: {text}", "--seeds", "for example 0..4, or 0,1,2") from None


def with_options(plan: Compare, vary: Grid, seeds: list[int] | None, baseline: str | None) -> Compare:
    """The recipe's table with what the command line says instead."""
    given: dict[str, Any] = {"vary": vary or None, "seeds": seeds, "baseline": baseline}
    changed = {key: value for key, value in given.items() if value is not None}
    if vary and baseline is None and plan.baseline not in settings(vary):
        changed["baseline"] = None
    try:
        return Compare.model_validate(plan.model_dump() | changed)
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise RecipeError(said, "command line", "change --vary or --seeds") from None
