"""The cells of a comparison: settings × seeds, each a run folder of its own, and what one cell can take from another.

A cell is its list of overrides over one recipe, so `heatbath run RECIPE OVERRIDES --out FOLDER` is the same cell.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from heatbath import recipe as recipes
from heatbath import toml_files
from heatbath.compare_sections import Compare, Grid
from heatbath.errors import RecipeError, RunError
from heatbath.opening import readers
from heatbath.recipe import Recipe
from heatbath.run import CHECKPOINTS, STAGES, Run, is_run

# Keys whose values say what they are.
SHORT = {"strategy", "sft.objective", "sft.objective.name", "rl.policy", "rl.policy.name"}
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
        return recipes.load(path, list(self.overrides))


def settings(vary: Grid, shown: Callable[[str], str] = str) -> dict[str, tuple[str, ...]]:
    """Name → overrides of every combination of the varied values, in their order; one of no name where none vary.
    `shown` is what a key is called in names."""
    found = {}
    for values in itertools.product(*vary.values()):
        chosen = dict(zip(vary, values, strict=True))
        found[_label(chosen, shown)] = tuple(override(key, value) for key, value in chosen.items())
    return found


def of_plan(plan: Compare) -> dict[str, tuple[str, ...]]:
    """The settings that are compared."""
    return settings(plan.vary, _short(plan))


def trials_of(plan: Compare, path: str, setting: str) -> dict[str, tuple[str, ...]]:
    """The trials of a setting: of the grid that bears its name, that of its strategy, or the one for all others."""
    tune = plan.tune
    assert tune is not None
    strategy = recipes.strategy_of(path, of_plan(plan)[setting])
    grid = tune.grids.get(setting) or tune.grids.get(str(strategy)) or tune.grid
    return settings(grid, _short(plan))


def _short(plan: Compare) -> Callable[[str], str]:
    """A key by its last part, unless another key of the comparison ends alike."""
    grids = [plan.vary, *([plan.tune.grid, *plan.tune.grids.values()] if plan.tune else [])]
    keys = {key for grid in grids for key in grid}
    ends = [key.rpartition(".")[2] for key in keys]
    return lambda key: key if ends.count(key.rpartition(".")[2]) > 1 else key.rpartition(".")[2]


def override(key: str, value: Any) -> str:
    return f"{key}={value}" if isinstance(value, str) else f"{key}={recipes.literal(value)}"


def _label(chosen: dict[str, Any], shown: Callable[[str], str]) -> str:
    parts = []
    for key, value in chosen.items():
        if isinstance(value, dict):
            told = ",".join(str(value[k]) if k == "name" else f"{k}={value[k]}" for k in value)
        else:
            told = str(value)
        parts.append(told if key in SHORT else f"{shown(key)}={told}")
    return " ".join(parts) or "recipe"


def cells(
    plan: Compare, path: str, overrides: Sequence[str], out: Path, chosen: dict[str, list[str]] | None = None
) -> list[Cell]:
    """The cells that are compared, seed by seed. `chosen` are the overrides that tuning found for each setting."""
    found = []
    for seed, (name, own) in itertools.product(plan.seeds, of_plan(plan).items()):
        shared = _fitting(path, own, overrides)
        asked = (*shared, *own, *(chosen or {}).get(name, ()), f"seed={seed}")
        found.append(Cell(name, seed, asked, out / slug(name) / f"{seed}"))
    return found


def tuning_cells(plan: Compare, path: str, overrides: Sequence[str], out: Path) -> list[Cell]:
    """The cells that each setting is tuned by: every combination of its grid, asked the validation problems."""
    if plan.tune is None:
        return []
    found = []
    shorter = [*overrides, *(override(key, value) for key, value in plan.tune.overrides.items())]
    for seed, (name, own) in itertools.product(plan.tune.seeds, of_plan(plan).items()):
        shared = _fitting(path, own, shorter)
        for trial, tried in trials_of(plan, path, name).items():
            asked = (*shared, *own, *tried, "eval.split=validation", f"seed={seed}")
            folder = out / "tuning" / slug(name) / slug(trial) / f"{seed}"
            found.append(Cell(name, seed, asked, folder, trial))
    return found


def _fitting(path: str, own: Sequence[str], shared: Sequence[str]) -> list[str]:
    """The overrides for all settings without those of a stage that this setting's strategy leaves out: they would
    bring it back."""
    without = recipes.stages_without(path, recipes.strategy_of(path, own))
    return [text for text in shared if text.partition(".")[0] not in without]


def slug(name: str) -> str:
    """A folder's name for it."""
    return re.sub(r"[^A-Za-z0-9._=,+-]+", "_", name).strip("._") or "recipe"


def require(plan: Compare, path: str, overrides: Sequence[str]) -> None:
    """Raises RecipeError for a comparison that is not one: names that clash or mean nothing, keys that two parts of it
    set."""
    names = list(of_plan(plan))
    slugs = [slug(name) for name in names]
    if twice := next((name for name, own in zip(names, slugs, strict=True) if slugs.count(own) > 1), None):
        raise RecipeError(f"two settings would share the folder {slug(twice)}", "compare.vary", "rename one of them")
    if "tuning" in slugs:
        raise RecipeError("a setting cannot be called 'tuning'", "compare.vary", "rename the strategy")
    if plan.baseline is not None and plan.baseline not in names:
        raise RecipeError(f"no setting is called '{plan.baseline}'", "compare.baseline", f"one of {', '.join(names)}")
    known = {*names, *recipes.strategies_of(path)}
    grids = [] if plan.tune is None else list(plan.tune.grids)
    if unknown := next((name for name in grids if name not in known), None):
        raise RecipeError(f"no setting is called '{unknown}'", "compare.tune.grids", f"one of {', '.join(names)}")
    settled: dict[str, Any] = {"seed": plan.seeds, **plan.vary, **({} if plan.tune is None else plan.tune.overrides)}
    for grid in [] if plan.tune is None else [plan.tune.grid, *plan.tune.grids.values()]:
        if both := next((key for key in grid if key in plan.vary), None):
            raise RecipeError(f"{both} is varied and tuned", "compare.tune", "leave it out of one of the two")
        settled |= grid
    if set_twice := next((text for text in overrides if text.partition("=")[0] in settled), None):
        raise RecipeError(
            "the comparison sets this key itself", set_twice, "give --vary or --no-tune, or change [compare]"
        )


def keys_of(recipe: Recipe, stage: str) -> str:
    """Everything of a recipe that a stage's policy hangs on, as one text: the keys that this stage and those before it
    read, and the content of files of one's own that they name."""
    before = STAGES[: STAGES.index(stage) + 1]
    flat = recipes.flat(recipe.model_dump(mode="json"))
    own = {key: value for key, value in flat.items() if set(readers(key, recipe)) & set(before)}
    tables = {s: getattr(recipe, s) is not None for s in before}
    return json.dumps([own, tables, _contents(own.values())], sort_keys=True, ensure_ascii=False)


def _contents(values: Iterable[Any]) -> dict[str, str]:
    """Path → digest of every file that a value names, alone or before the name of something in it."""
    named = {text for value in values if isinstance(value, str) for text in (value, value.rpartition(":")[0])}
    files = {text: Path(text) for text in named if text and len(text) < 4096 and "\n" not in text}
    return {text: hashlib.sha256(file.read_bytes()).hexdigest() for text, file in files.items() if file.is_file()}


def adopt(run: Run, siblings: Iterable[Path], base: str | None = None) -> list[str]:
    """Takes over, from other cells that are finished with it, the policies that this run would train in the same way,
    and the samples it would draw alike. Returns what was taken, in words. `base` is the fingerprint of the base as it
    is today, where it may have changed."""
    taken = []
    read = [Run.read(folder) for folder in siblings if folder != run.folder and is_run(folder)]
    others = [other for other in read if _of_one_kind(run, other, base)]
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


def _of_one_kind(run: Run, other: Run, base: str | None) -> bool:
    """Whether what both read is the same today as it was then: rows, base, versions, precision."""
    known = (other.read_json("base.json") or {}).get("fingerprint")
    if base is not None and known not in (None, base):
        return False
    ours, theirs = (each.read_json("env.json") for each in (run, other))
    same = all(ours.get(key) == theirs.get(key) for key in ("versions", "precision", "device"))
    rows = [(each.read_json("data.json") or {}).get("digest") for each in (run, other)]
    return same and rows[0] == rows[1]


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
    stage = other.stage_of(policy)
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
        differing = [f"{key}={own[key]}" for key in keys if own.get(key) is not None]
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
        where = f"--vary {text}"
        parsed = toml_files.value(written, where)
        single = (toml_files.value(each.strip(), where) for each in values.split(","))
        found[key.strip()] = parsed if isinstance(parsed, list) else list(single)
    return found


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
    if vary and baseline is None and plan.baseline not in of_plan(plan.model_copy(update={"vary": vary})):
        changed["baseline"] = None
    try:
        return Compare.model_validate(plan.model_dump() | changed)
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise RecipeError(said, "command line", "change --vary or --seeds") from None
