"""The verbs that run the stages of a recipe: run, sft, rl, eval."""

from __future__ import annotations

import json as jsonlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heatbath import ranks
from heatbath.allocator import keep_freed_memory
from heatbath.cli_options import (
    Change,
    DryRun,
    Fresh,
    Gpus,
    Json,
    Nodes,
    Out,
    Overrides,
    RecipeArgument,
    Resume,
    Sharding,
    Verbose,
    app,
    name_of,
    settle_libraries,
)
from heatbath.errors import RecipeError
from heatbath.terminal import echo

if TYPE_CHECKING:
    from heatbath.data.rows import Splits
    from heatbath.launch import Launch
    from heatbath.opening import Opening
    from heatbath.progress import Progress
    from heatbath.recipe import Recipe
    from heatbath.run import Run


ON_VERL = "rl on verl"


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    out: Out = None,
    resume: Resume = False,
    fresh: Fresh = False,
    change: Change = None,
    gpus: Gpus = 1,
    nodes: Nodes = 1,
    sharding: Sharding = "ddp",
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """All stages of a recipe: sft, preference or rl, eval, report."""
    _stage("run", recipe, overrides, dry_run, out, (resume, fresh, change), (gpus, nodes, sharding), json, verbose)


@app.command()
def sft(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    out: Out = None,
    resume: Resume = False,
    fresh: Fresh = False,
    change: Change = None,
    gpus: Gpus = 1,
    nodes: Nodes = 1,
    sharding: Sharding = "ddp",
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """The warm start alone: base to init."""
    _stage("sft", recipe, overrides, dry_run, out, (resume, fresh, change), (gpus, nodes, sharding), json, verbose)


@app.command()
def rl(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    out: Out = None,
    resume: Resume = False,
    fresh: Fresh = False,
    change: Change = None,
    engine: Annotated[
        str, typer.Option("--engine", help="trl: here. verl: in its own environment, on a Ray cluster (docs/verl.md).")
    ] = "trl",
    gpus: Gpus = 1,
    nodes: Nodes = 1,
    sharding: Sharding = "ddp",
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Reinforcement learning alone: init (or base) to final."""
    if engine not in ("trl", "verl"):
        raise RecipeError(f"no engine is called '{engine}'", "--engine", "trl or verl")
    if engine == "verl" and (gpus, nodes, sharding) != (1, 1, "ddp"):
        remedy = "[rl.verl] trainer = { nnodes = 1, n_gpus_per_node = 8 } in the recipe"
        raise RecipeError("verl is told its GPUs in the recipe", "--gpus, --nodes, --sharding", remedy)
    stage = ON_VERL if engine == "verl" else "rl"
    _stage(stage, recipe, overrides, dry_run, out, (resume, fresh, change), (gpus, nodes, sharding), json, verbose)


@app.command("eval")
def evaluate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    out: Out = None,
    resume: Resume = False,
    fresh: Fresh = False,
    change: Change = None,
    rescore: Annotated[bool, typer.Option("--rescore", help="Grade the samples there are again; sample none.")] = False,
    gpus: Gpus = 1,
    nodes: Nodes = 1,
    sharding: Sharding = "ddp",
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Sample, grade and compare the policies a run has so far."""
    stage = "rescore" if rescore else "eval"
    _stage(stage, recipe, overrides, dry_run, out, (resume, fresh, change), (gpus, nodes, sharding), json, verbose)


def _stage(
    stage: str,
    recipe: str,
    overrides: list[str] | None,
    dry_run: bool,
    out: Path | None,
    opening: tuple[bool, bool, list[str] | None],
    processes: tuple[int, int, str],
    json: bool,
    verbose: bool,
) -> None:
    from heatbath.launch import Launch
    from heatbath.opening import Opening
    from heatbath.recipe import load

    resume, fresh, change = opening
    how = Opening(resume, fresh, tuple(change or ()))
    if stage == "rescore" and fresh:
        raise RecipeError("--fresh would drop the samples that --rescore grades", "command line", "give one of the two")
    settle_libraries(verbose)
    keep_freed_memory()
    loaded = load(recipe, overrides)
    if (Path(recipe) / "recipe.toml").is_file():
        out = out or Path(recipe)
    if stage == ON_VERL:
        from heatbath.integrations.verl.translate import require_carried

        require_carried(loaded)
    asked = _Asked(stage, loaded, out or Path("runs") / name_of(recipe), how, Launch(*processes))
    if dry_run:
        _show_plan(asked, json)
    else:
        with ranks.joined():
            _carry_out(asked, json)


@dataclass(frozen=True)
class _Asked:
    """What the command line asks for."""

    stage: str
    recipe: Recipe
    folder: Path
    how: Opening
    launch: Launch

    @property
    def stages(self) -> tuple[str, ...]:
        from heatbath.stages import pipeline

        several = {"run": pipeline.stages_of(self.recipe), "rescore": ("eval",), ON_VERL: ("rl",)}
        return several.get(self.stage, (self.stage,))

    @property
    def whole(self) -> bool:
        return self.stage == "run"


def _show_plan(asked: _Asked, json: bool) -> None:
    from heatbath.run import Run
    from heatbath.stages import plan

    arguments = [a for a in sys.argv[1:] if a not in ("--dry-run", "--json")]
    if not ranks.first():  # of processes that somebody else has started
        return
    found = plan.plan(asked.recipe, asked.stages, arguments, asked.launch)
    found["folder"] = plan.folder_line(asked.folder, asked.recipe, asked.stages, asked.how, asked.whole)
    if asked.stage == ON_VERL:
        from heatbath.integrations.verl.files import planned

        found |= planned(Run(asked.folder, asked.recipe), asked.recipe)
    shown = "\n".join([plan.show(found), *([found["verl"]] if "verl" in found else [])])
    echo(jsonlib.dumps(found, ensure_ascii=False) if json else shown)


def _carry_out(asked: _Asked, json: bool) -> None:
    """Checks everything, starts the processes where several are asked for, and goes through the stages in each."""
    from heatbath.launch import evaluates_alone, node
    from heatbath.opening import Opening, open_run
    from heatbath.progress import Progress
    from heatbath.run import Run
    from heatbath.stages import pipeline

    recipe, folder, how = asked.recipe, asked.folder, asked.how
    progress = Progress(quiet=json)
    if ranks.count() > 1:
        asked.launch.require_started(recipe, asked.stages)
    if asked.stage == "rescore":
        Run.read(folder)
    splits = None
    if ranks.first():
        open_run(folder, recipe, asked.stages, how, whole=asked.whole, dry=True)
        if asked.stage != "rescore":
            progress.say(
                f"run folder: {folder}; checking the data against the tokenizer of {recipe.model or 'the new base'}"
            )
            splits, _ = pipeline.check(recipe, asked.stages)
    if asked.launch.several and ranks.count() == 1:
        asked.launch.require(recipe, asked.stages)
        code = asked.launch.run(sys.argv[1:], progress.say)
        if code or not asked.whole or not evaluates_alone(recipe) or node():
            raise typer.Exit(code)
        how = Opening(resume=True)
    ranks.take_one_device(progress.say)
    with Run(folder, recipe).locked():
        if ranks.first():
            opened = open_run(folder, recipe, asked.stages, how, whole=asked.whole, say=progress.say)
            if splits is not None:
                opened.write_json("data.json", splits.report())
                for note in splits.notes:
                    progress.say(note)
        ranks.wait()
        opened = Run(folder, recipe)
        result = _finish(asked.stage, opened, recipe, splits, progress)
    if ranks.first():
        echo(jsonlib.dumps({"run": str(folder), **(result or {})}) if json else _closing(opened, result))


def _finish(
    stage: str, opened: Run, loaded: Recipe, splits: Splits | None, progress: Progress
) -> dict[str, Any] | None:
    try:
        return _call(stage, opened, loaded, splits, progress)
    except KeyboardInterrupt:
        if ranks.first():
            echo(f"interrupted; --resume goes on with {opened.folder}", err=True)
        raise typer.Exit(130) from None


def _call(stage: str, opened: Run, loaded: Recipe, splits: Splits | None, progress: Progress) -> dict[str, Any] | None:
    result: dict[str, Any] | None = None
    if stage == "rescore":
        from heatbath.stages.evaluate import rescore

        result = rescore(opened, loaded, progress)
    elif stage == ON_VERL:
        from heatbath.integrations.verl.launch import run_rl_on_verl

        assert splits is not None
        run_rl_on_verl(opened, loaded, splits, progress)
    else:
        from heatbath.stages.pipeline import run_all, run_stage

        result = run_all(opened, loaded, progress) if stage == "run" else run_stage(stage, opened, loaded, progress)
    if stage in ("eval", "rescore") and ranks.first():
        from heatbath.report.page import write_report

        write_report(opened)
    return result


def _closing(opened: Run, result: dict[str, Any] | None) -> str:
    """The last lines on stdout: the table of results, and where everything lies."""
    from heatbath.report.tables import markdown_results

    lines = [markdown_results(result)] if result else []
    page = opened.folder / "report.html"
    return "\n".join([*lines, f"run: {opened.folder}", *([f"report: {page}"] if page.exists() else [])])
