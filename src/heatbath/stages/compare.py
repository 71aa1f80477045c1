"""Strategies × seeds: every cell a run of its own, then one table with intervals and what the data do not decide.

A setting that is to be tuned is tuned first, with the same number of trials as every other. Cells that are done are
kept, interrupted ones go on, and several processes (or machines that share the folder) may work on one comparison.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from heatbath import interruption
from heatbath import recipe as recipes
from heatbath.compare_sections import Compare
from heatbath.errors import BusyError, HeatbathError, RecipeError, RunError
from heatbath.opening import Opening, open_run, readers
from heatbath.progress import Progress
from heatbath.recipe import Recipe
from heatbath.run import Run, is_run, write_atomically
from heatbath.stages import grid
from heatbath.stages.grid import Cell

CHOSEN = "chosen.json"  # what tuning has settled on
UNFINISHED = ".unfinished"  # stands in the folder of a cell until all of it is done
ATTEMPT = "--- attempt"  # begins each in a cell's log
DONE, FAILED, BUSY, STOPPED = 0, 1, 75, 130  # how a cell's process ends
PATIENCE_SECONDS = 5.0  # before a cell that another process works on is asked for again
PRELOADED = ["heatbath.stages.preloaded"]


@dataclass(frozen=True)
class Comparison:
    """What is compared and where: the recipe's path, its [compare] table, overrides common to all cells, the folder."""

    path: str
    plan: Compare
    overrides: tuple[str, ...]
    out: Path

    def tuning(self) -> list[Cell]:
        return grid.tuning_cells(self.plan, self.path, self.overrides, self.out)

    def cells(self) -> list[Cell]:
        """Those that are compared, under what tuning found."""
        return grid.cells(self.plan, self.path, self.overrides, self.out, self.chosen())

    def chosen(self) -> dict[str, list[str]]:
        """Setting → overrides that tuning settled on, as far as it did, for this very table of trials."""
        path = self.out / CHOSEN
        if self.plan.tune is None or not path.is_file():
            return {}
        found = json.loads(path.read_text())
        return dict(found["overrides"]) if found["tune"] == self.plan.tune.model_dump(mode="json") else {}

    @property
    def tuned(self) -> bool:
        """Whether nothing is left to be settled by tuning."""
        return self.plan.tune is None or set(grid.of_plan(self.plan)) <= set(self.chosen())

    def every(self) -> list[Cell]:
        return [*self.tuning(), *self.cells()]


def run_compare(
    comparison: Comparison, *, jobs: int = 1, only: Sequence[int] = (), progress: Progress
) -> dict[str, Any]:
    """Runs the cells that are not done, `jobs` at a time, and returns the content of compare.json. `only` are numbers
    of cells as `listed` counts them.

    A failed cell is told and left; the others go on. Raises RunError at the end where cells failed.
    """
    from heatbath.report.grid_page import write_page

    check(comparison)
    comparison.out.mkdir(parents=True, exist_ok=True)
    _same_comparison(comparison)
    wanted = _numbered(comparison, only)
    tuning = [cell for cell in comparison.tuning() if only == () or cell.folder in wanted]
    failed = _run_all(comparison, tuning, jobs, "tuning", progress)
    if comparison.plan.tune is not None and not failed:
        _choose(comparison, only, progress)
    cells = [cell for cell in comparison.cells() if only == () or cell.folder in wanted]
    if comparison.tuned:
        failed |= _run_all(comparison, cells, jobs, "cells", progress)
    elif only and cells:
        first = len(comparison.tuning())
        raise RunError("the trials of tuning are not done", f"--cell {min(only)}", f"run cells 1 to {first} first")
    written = write_page(summary_of(comparison), comparison.out)
    progress.say(f"page: {written['html']}")
    if failed:
        told = "".join(f"\n  - {cell.name}: {why}" for cell, why in failed.items())
        count = f"{len(failed)} cell{'s' * (len(failed) > 1)}"
        where = str(log_of(next(iter(failed))))
        raise RunError(f"{count} failed:{told}", where, "mend what it says; the same command goes on")
    found: dict[str, Any] = json.loads(written["json"].read_text())
    return found


def check(comparison: Comparison) -> None:
    """Loads the recipe of every cell, and checks one of each setting, and one trial, with its data, before anything is
    trained. Raises RecipeError or DataError."""
    from heatbath.stages import pipeline

    grid.require(comparison.plan, comparison.path, comparison.overrides)
    seen = set()
    for cell in comparison.every():
        recipe = cell.recipe(comparison.path)
        if (kind := (cell.setting, bool(cell.trial))) not in seen:
            seen.add(kind)
            pipeline.check(recipe, pipeline.stages_of(recipe))


def listed(comparison: Comparison) -> list[dict[str, Any]]:
    """Number, name, folder, state and command of every cell: what a scheduler needs. Cells that wait for tuning have no
    command yet."""
    rows = []
    for number, cell in enumerate(comparison.every(), 1):
        settled = bool(cell.trial) or comparison.tuned
        command = ["heatbath", "run", comparison.path, *cell.overrides, "--out", str(cell.folder)]
        begun = "begun" if is_run(cell.folder) else "to do" if settled else "waits"
        state = "done" if _done(cell, comparison) else begun
        facts = {"number": number, "cell": cell.name, "folder": str(cell.folder), "state": state}
        rows.append(facts | {"command": command if settled else None})
    return rows


def shown(cells: Sequence[dict[str, Any]]) -> str:
    """The list as text."""
    lines = [f"{c['number']:4} {c['state']:6} {c['cell']:40} {c['folder']}" for c in cells]
    told = "--cell NUMBER runs one; or by itself, for example:"
    last = [c["command"] for c in cells if c["command"]][-1]
    return "\n".join([*lines, told, shlex.join(last)])


def summary_of(comparison: Comparison) -> dict[str, Any]:
    """The numbers of the cells that are done."""
    from heatbath.stages import grid_summary

    runs: dict[str, dict[int, Run]] = {}
    for cell in comparison.cells():
        runs.setdefault(cell.setting, {})
        if _done(cell, comparison):
            runs[cell.setting][cell.seed] = Run.read(cell.folder)
    found = grid_summary.summarise(runs, comparison.plan.baseline)
    asked = sum(len(comparison.plan.seeds) for _ in runs)
    tuned = json.loads((comparison.out / CHOSEN).read_text()) if comparison.chosen() else None
    facts = {"recipe": comparison.path, "overrides": list(comparison.overrides), "seeds": comparison.plan.seeds}
    return {**facts, "vary": comparison.plan.vary, "cells": asked, "tuned": tuned, **found}


def compare_runs(folders: Sequence[Path], baseline: str | None, out: Path) -> dict[str, Any]:
    """The page of runs that are there already, whoever made them: runs whose recipes differ in the seed alone are one
    setting. Raises RecipeError for two runs of one setting and seed, and RunError for one without results."""
    from heatbath.report.grid_page import write_page
    from heatbath.stages import grid_summary

    runs: dict[str, dict[int, Run]] = {}
    for name, run in grid.named_runs([Run.read(folder) for folder in folders]):
        if not run.finished("eval"):
            raise RunError("the run has no results", str(run.folder), f"heatbath eval {run.folder}")
        own = runs.setdefault(name, {})
        if run.recipe.seed in own:
            where = f"{own[run.recipe.seed].folder} and {run.folder}"
            raise RecipeError("two runs of the same recipe with the same seed", where, "give one of them")
        own[run.recipe.seed] = run
    if baseline is not None and baseline not in runs:
        raise RecipeError(f"no setting is called '{baseline}'", "--baseline", f"one of {', '.join(runs)}")
    found = grid_summary.summarise(runs, baseline)
    seeds = sorted({seed for own in runs.values() for seed in own})
    facts = {"recipe": "", "overrides": [], "seeds": seeds, "vary": {}, "cells": len(folders), "tuned": None}
    out.mkdir(parents=True, exist_ok=True)
    return {"page": str(write_page({**facts, **found}, out)["html"]), **facts, **found}


def _numbered(comparison: Comparison, only: Sequence[int]) -> set[Path]:
    every = comparison.every()
    if wrong := next((number for number in only if not 1 <= number <= len(every)), None):
        raise RecipeError(
            f"there is no cell {wrong}", "--cell", f"cells go from 1 to {len(every)}; --dry-run lists them"
        )
    return {every[number - 1].folder for number in only}


def _same_comparison(comparison: Comparison) -> None:
    """Raises RecipeError where the folder holds a comparison of other settings than those asked for."""
    path = comparison.out / "comparison.json"
    now = {"recipe": Path(comparison.path).name, "overrides": list(comparison.overrides)}
    if path.is_file():
        if json.loads(path.read_text()) != now:
            raise RecipeError("the folder holds another comparison", str(comparison.out), "choose another --out")
        return
    if any(not entry.name.startswith(".") for entry in comparison.out.iterdir()):
        raise RecipeError("the folder holds something else", str(comparison.out), "choose another --out")
    write_atomically(path, json.dumps(now) + "\n")


def _choose(comparison: Comparison, only: Sequence[int], progress: Progress) -> None:
    """Settles what tuning found, once all of its trials are there."""
    tune = comparison.plan.tune
    assert tune is not None
    scores = {cell: _score(cell, comparison, tune.k) for cell in comparison.tuning()}
    if only and None in scores.values():
        return  # somebody else's cells are not there yet
    best = grid.candidates(scores)
    overrides = {name: list(grid.trials_of(comparison.plan, comparison.path, name)[best[name]]) for name in best}
    tried = [{"setting": c.setting, "trial": c.trial, "seed": c.seed, "score": s} for c, s in scores.items()]
    kept = {"tune": tune.model_dump(mode="json"), "k": tune.k, "trials": best, "overrides": overrides, "tried": tried}
    write_atomically(comparison.out / CHOSEN, json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    progress.say("tuned: " + "; ".join(f"{name}: {trial}" for name, trial in best.items()))


def _score(cell: Cell, comparison: Comparison, k: int) -> float | None:
    """pass@k of the last policy of a tuning cell; None where it is not done."""
    if not _done(cell, comparison):
        return None
    run = Run.read(cell.folder)
    score: float = run.read_json("results.json")["policies"][run.policies[-1]]["pass"][str(k)]["mean"]
    return score


def _done(cell: Cell, comparison: Comparison) -> bool:
    """Whether the folder holds this cell, whole: of this recipe, evaluated to its end, its shift measured if wanted."""
    if not is_run(cell.folder) or (cell.folder / UNFINISHED).exists():
        return False
    run = Run.read(cell.folder)
    results = run.read_json("results.json")
    if results is None or results.get("incomplete"):
        return False
    wanted = cell.recipe(comparison.path)
    if any(readers(key, wanted) for key in recipes.changes(run.recipe, wanted)):
        return False
    return not _wants_shift(cell, comparison) or len(run.policies) < 2 or (cell.folder / "shift.json").is_file()


def _wants_shift(cell: Cell, comparison: Comparison) -> bool:
    return comparison.plan.shift and not cell.trial


def _run_all(
    comparison: Comparison, cells: Sequence[Cell], jobs: int, title: str, progress: Progress
) -> dict[Cell, str]:
    """Runs what is not done, in processes of their own; returns the cells that failed, and why."""
    todo = [cell for cell in cells if not _done(cell, comparison)]
    if not todo:
        return {}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    every = comparison.every()
    running: dict[BaseProcess, tuple[Cell, int]] = {}
    failed: dict[Cell, str] = {}
    busy: dict[Cell, float] = {}
    finished = len(cells) - len(todo)
    with progress.bar(title, len(cells)), _all_ended(running):
        while todo or running or busy:
            todo += [cell for cell, at in busy.items() if at <= time.monotonic()]
            busy = {cell: at for cell, at in busy.items() if cell not in todo}
            while todo and len(running) < jobs:
                cell = todo.pop(0)
                slot = min(set(range(jobs)) - {used for _, used in running.values()})
                siblings = [other.folder for other in every if other.seed == cell.seed]  # others share nothing
                arguments = (comparison.path, cell, siblings, slot, jobs, _wants_shift(cell, comparison))
                process = context.Process(target=run_cell, args=arguments, name=cell.name)
                process.start()
                running[process] = (cell, slot)
            if not running:
                time.sleep(0.2)
                continue
            wait([process.sentinel for process in running], timeout=1.0)
            for process in [process for process in running if process.exitcode is not None]:
                cell, _ = running.pop(process)
                if process.exitcode == BUSY:
                    busy[cell] = time.monotonic() + PATIENCE_SECONDS
                    continue
                if process.exitcode != DONE:
                    failed[cell] = _why(cell, process.exitcode)
                    progress.say(f"{cell.name} failed: {failed[cell]}")
                finished += 1
                progress.update(finished, cell.name)
    return failed


@contextlib.contextmanager
def _all_ended(running: dict[BaseProcess, tuple[Cell, int]]) -> Any:
    """However the block ends, no cell is left running: each is asked to save, and waited for."""
    try:
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join(60)
            process.kill()


def log_of(cell: Cell) -> Path:
    """What a cell said, beside its folder."""
    return cell.folder.with_name(f"{cell.folder.name}.log")


def _why(cell: Cell, code: int | None) -> str:
    path = log_of(cell)
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    lines = text.rpartition(ATTEMPT)[2].strip().splitlines()[1:]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
    return f"{said.removeprefix('error: ')} (exit {code})"


def run_cell(path: str, cell: Cell, siblings: Sequence[Path], slot: int, jobs: int, shift: bool) -> None:
    """One cell, in a process of its own: what it says goes to its log. Ends the process."""
    interruption.listen()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells all; the parent then ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(log_of(cell), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    print(f"{ATTEMPT} {time.strftime('%Y-%m-%dT%H:%M:%S')}", file=sys.stderr, flush=True)
    code = FAILED
    try:
        _limit(slot, jobs)
        code = _work(cell.recipe(path), cell, siblings, shift)
    except KeyboardInterrupt:
        code = STOPPED
    except HeatbathError as error:
        print(f"error: {error}", file=sys.stderr)
    except Exception:  # noqa: BLE001 - a process edge: it is told in the log, and the other cells go on
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def _work(recipe: Recipe, cell: Cell, siblings: Sequence[Path], shift: bool) -> int:
    from heatbath.stages import pipeline
    from heatbath.stages.evaluate import run_evaluation

    progress = Progress()
    stages = pipeline.stages_of(recipe)
    try:
        with Run(cell.folder, recipe).locked():
            run = open_run(cell.folder, recipe, stages, Opening(resume=True), whole=True, say=progress.say)
            (cell.folder / UNFINISHED).touch()
            splits, _ = pipeline.check(recipe, stages)
            run.write_json("data.json", splits.report())
            for taken in grid.adopt(run, siblings, _fingerprint(recipe)):
                progress.say(f"taken: {taken}")
            for stage in stages:
                if stage != "eval" and not run.finished(stage):
                    pipeline.run_stage(stage, run, recipe, progress)
            run_evaluation(run, recipe, progress)
            if shift and len(run.policies) > 1:
                _measure_shift(run, progress)
            (cell.folder / UNFINISHED).unlink()
    except BusyError:
        return BUSY
    return DONE


def _fingerprint(recipe: Recipe) -> str | None:
    """Of a base in a folder of one's own, whose content may have changed since another cell read it."""
    from heatbath import models

    own = recipe.model is not None and Path(recipe.model).is_dir()
    return models.fingerprint_of(recipe.model) if own else None


def _measure_shift(run: Run, progress: Progress) -> None:
    from heatbath.stages.shift import run_shift
    from heatbath.stages.shift_settings import parse

    run_shift([str(run.folder)], parse([], "demos"), progress=progress)


def _limit(slot: int, jobs: int) -> None:
    """Each of several cells at a time has its share of the cores, and each one device: the trainers would spread over
    all that they see."""
    import torch

    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    devices = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    devices = devices or [str(i) for i in range(torch.cuda.device_count())]
    if len(devices) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
