"""How the folder of a run is opened: a new one, one that is gone on with, or one that starts over.

Nothing is ever overwritten in silence. A folder that holds something is refused without `--resume` or `--fresh`; a run
is gone on with only under the recipe it began with, unless each changed key is named (`--change`), and never under a
change that a finished stage would have had to know.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heatbath import recipe as recipes
from heatbath.errors import RecipeError, RunError
from heatbath.recipe import Recipe
from heatbath.run import STAGES, Run, append_jsonl, holds_nothing, is_run

# Keys that change no result: how often something is kept or shown, or how many samples are drawn of what is there.
FREE = (
    "name",
    "published",
    "pretrain.save_every",
    "pretrain.save_total_limit",
    "sft.save_every",
    "sft.save_total_limit",
    "sft.log_every",
    "preference.save_every",
    "preference.save_total_limit",
    "preference.log_every",
    "rl.save_every",
    "rl.save_total_limit",
    "rl.readiness",
    "eval.k",
    "eval.samples",
    "eval.batch",
    "eval.tasks",
    "eval.problems",
    "eval.data_dir",
    "eval.engine",
    "eval.endpoint",
    "eval.served",
    "eval.judge",
    "reward.workers",
    "trust_remote_code",
)
# What of [reward] a verdict hangs on: where one weighs the base's answers, the warm start reads it too.
GRADED = tuple(f"reward.{key}" for key in ("kind", "profile", "stages", "isolation", "deadline", "failed_share"))
# The stages whose result a key changes, by its table; every other key changes all of them.
READ_BY = {
    "pretrain": ("pretrain",),
    "sft": ("sft",),
    "preference": ("preference",),
    "rl": ("rl",),
    "eval": ("eval",),
    "reward": ("rl", "eval"),
    "lora": ("sft", "preference", "rl"),
}


@dataclass(frozen=True)
class Opening:
    """What the command line says about a folder that may exist: go on with it, start over, and the changed keys that
    are meant (a table's name stands for all of its keys)."""

    resume: bool = False
    fresh: bool = False
    change: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.resume and self.fresh:
            raise RecipeError("--resume and --fresh exclude each other", "command line", "give one of the two")


def open_run(
    folder: Path,
    recipe: Recipe,
    stages: Sequence[str],
    how: Opening,
    *,
    whole: bool = False,
    dry: bool = False,
    say: Callable[[str], None] | None = None,
) -> Run:
    """The run in that folder, ready for these stages; `whole` where they are a run from beginning to end. `dry` only
    checks, and neither writes nor removes anything. `say` is told what a change drops.

    Raises RecipeError or RunError, each with the option that would do what was perhaps meant.
    """
    if not folder.exists() or holds_nothing(folder):
        return Run(folder, recipe) if dry else Run(folder, recipe).write()
    if not is_run(folder):
        raise RecipeError(
            "the output folder exists and holds something else than a run; nothing was touched",
            str(folder),
            "choose another --out",
        )
    run = Run(folder, recipe)
    if how.fresh and whole:
        if not dry:
            run.forget_everything()
            run.write()
        return run
    _require_meant(run, stages, how, whole)
    redone = _redone(stages) if how.fresh else ()
    changed = _require_allowed_changes(run, how, redone)
    if not dry:
        if any("eval" in readers(key, recipe) for key in changed) and redone:
            run.forget("eval")
        for stage in reversed(redone):
            run.forget(stage)
        _accept(run, changed, say or (lambda _: None))
        run.note_resumed()
    return run


def _redone(stages: Sequence[str]) -> tuple[str, ...]:
    """The stages that start over, and the training stages after them. Samples of the policies before them stay."""
    first = min(map(STAGES.index, stages))
    return tuple(stage for stage in STAGES[first:] if stage in stages or stage != "eval")


def _require_meant(run: Run, stages: Sequence[str], how: Opening, whole: bool) -> None:
    """Refuses to go on in silence with what an earlier command left."""
    if how.resume or how.fresh:
        return
    if whole:
        done = (run.folder / "report.html").is_file()
        raise RecipeError(
            f"the output folder exists and holds {'a run with its report' if done else 'an unfinished run'}; nothing "
            "was touched",
            str(run.folder),
            f"open {run.folder}/report.html, " * done
            + "--resume to go on with it, --fresh to start over, or choose another --out",
        )
    for stage in stages:
        if stage == "eval":
            continue  # an evaluation only ever adds the samples that are missing
        if run.finished(stage):
            raise RunError(
                f"the {stage} stage of this run is already trained",
                str(run.folder),
                "--fresh trains it again (and drops what came after it), or choose another --out",
            )
        if run.begun(stage):
            raise RunError(
                f"the {stage} stage of this run was begun and not finished",
                str(run.folder),
                "--resume goes on from its last checkpoint, --fresh starts the stage again",
            )


def _require_allowed_changes(run: Run, how: Opening, redone: tuple[str, ...]) -> dict[str, tuple[Any, Any]]:
    """The changed keys, all of them meant and none of them read by a stage whose result stays."""
    changed = recipes.changes(Run.read(run.folder).recipe, run.recipe)
    known = [*recipes.surface(), *changed]
    for named in how.change:
        if not any(key == named or key.startswith(f"{named}.") for key in known):
            near = difflib.get_close_matches(named, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "name a key of the recipe, or a table"
            raise RecipeError(f"--change names no key of a recipe: {named}", "command line", hint)
    unnamed = {k: v for k, v in changed.items() if not any(k == c or k.startswith(f"{c}.") for c in how.change)}
    if unnamed:
        listed = "".join(f"\n  - {key}: {_shown(old)} → {_shown(new)}" for key, (old, new) in unnamed.items())
        flags = " ".join(f"--change {key}" for key in unnamed)
        raise RecipeError(
            f"the folder holds a run of another recipe:{listed}",
            str(run.folder / "recipe.toml"),
            f"give {run.folder} in place of the recipe to go on with its own; if the change is meant, --resume {flags} "
            "(an unfinished stage that reads it begins again); or another --out",
        )
    for key in changed:
        done = redone if not redone else (*redone, "eval")
        stale = [stage for stage in readers(key, run.recipe) if stage not in done and run.finished(stage)]
        if stale:
            command = stale[0] if stale[0] in ("sft", "rl", "eval") else "run"
            raise RecipeError(
                f"{key} has changed, and the {stale[0]} stage is finished under its former value",
                str(run.folder),
                f"heatbath {command} … --fresh --change {key} repeats it with what follows, or take another --out",
            )
    return changed


def readers(key: str, recipe: Recipe) -> tuple[str, ...]:
    """The stages whose result a key of the recipe changes."""
    if key in FREE or key.startswith(tuple(f"{free}." for free in FREE)):
        return ()
    graded = key in GRADED and recipe.sft is not None and recipe.sft.replay is not None and recipe.sft.replay.lift
    return (*(("sft",) if graded else ()), *READ_BY.get(key.partition(".")[0], STAGES))


def _accept(run: Run, changed: dict[str, tuple[Any, Any]], say: Callable[[str], None]) -> None:
    """Writes the new recipe and a line about each change; what an affected, unfinished stage had begun goes."""
    if not changed:
        return
    for stage in STAGES:
        read = [key for key in changed if stage in readers(key, run.recipe)]
        if read and not run.finished(stage) and run.begun(stage):
            say(f"{stage}: what was begun under another {', '.join(read)} is dropped; the stage begins again")
            run.forget(stage)
    if "model" in changed:
        run.forget_base()
    run.write_recipe()
    append_jsonl(
        run.folder / "changes.jsonl",
        [{"time": time.time(), "key": key, "before": old, "after": new} for key, (old, new) in changed.items()],
    )


def _shown(value: Any) -> str:
    return "(none)" if value is None else str(value)
