"""The verbs that run the stages of a recipe: run, sft, rl, eval."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heatbath.allocator import keep_freed_memory
from heatbath.cli_options import (
    Change,
    DryRun,
    Fresh,
    Json,
    Out,
    Overrides,
    RecipeArgument,
    Resume,
    Verbose,
    app,
    name_of,
    settle_libraries,
)
from heatbath.errors import RecipeError

if TYPE_CHECKING:
    from heatbath.data.rows import Splits
    from heatbath.progress import Progress
    from heatbath.recipe import Recipe
    from heatbath.run import Run


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    out: Out = None,
    resume: Resume = False,
    fresh: Fresh = False,
    change: Change = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """All stages of a recipe: sft, preference or rl, eval, report."""
    _stage("run", recipe, overrides, dry_run, out, (resume, fresh, change), json, verbose)


@app.command()
def sft(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    out: Out = None,
    resume: Resume = False,
    fresh: Fresh = False,
    change: Change = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """The warm start alone: base to init."""
    _stage("sft", recipe, overrides, dry_run, out, (resume, fresh, change), json, verbose)


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
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Reinforcement learning alone: init (or base) to final."""
    if engine not in ("trl", "verl"):
        raise RecipeError(f"no engine is called '{engine}'", "--engine", "trl or verl")
    stage = "rl on verl" if engine == "verl" else "rl"
    _stage(stage, recipe, overrides, dry_run, out, (resume, fresh, change), json, verbose)


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
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Sample, grade and compare the policies a run has so far."""
    _stage("rescore" if rescore else "eval", recipe, overrides, dry_run, out, (resume, fresh, change), json, verbose)


def _stage(
    stage: str,
    recipe: str,
    overrides: list[str] | None,
    dry_run: bool,
    out: Path | None,
    opening: tuple[bool, bool, list[str] | None],
    json: bool,
    verbose: bool,
) -> None:
    from heatbath.opening import Opening, open_run
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
    from heatbath.progress import Progress
    from heatbath.run import Run
    from heatbath.stages import pipeline

    folder = out or Path("runs") / name_of(recipe)
    if stage == "rl on verl":
        from heatbath.integrations.verl.translate import require_carried

        require_carried(loaded)
    stages = {"run": pipeline.stages_of(loaded), "rescore": ("eval",), "rl on verl": ("rl",)}.get(stage, (stage,))
    whole = stage == "run"
    if dry_run:
        from heatbath.stages import plan

        found = plan.plan(loaded, stages, [a for a in sys.argv[1:] if a not in ("--dry-run", "--json")])
        found["folder"] = plan.folder_line(folder, loaded, stages, how, whole)
        if stage == "rl on verl":
            from heatbath.integrations.verl.files import planned

            found |= planned(Run(folder, loaded), loaded)
        shown = "\n".join([plan.show(found), *([found["verl"]] if "verl" in found else [])])
        typer.echo(jsonlib.dumps(found, ensure_ascii=False) if json else shown)
        return
    progress = Progress(quiet=json)
    if stage == "rescore":
        Run.read(folder)
    open_run(folder, loaded, stages, how, whole=whole, dry=True)
    splits = None
    if stage != "rescore":
        base = loaded.model or "the new base"
        progress.say(f"run folder: {folder}; checking the data against the tokenizer of {base}")
        splits, _ = pipeline.check(loaded, stages)
    with Run(folder, loaded).locked():
        opened = open_run(folder, loaded, stages, how, whole=whole, say=progress.say)
        if splits is not None:
            opened.write_json("data.json", splits.report())
            for note in splits.notes:
                progress.say(note)
        result = _finish(stage, opened, loaded, splits, progress)
    if json:
        typer.echo(jsonlib.dumps({"run": str(folder), **(result or {})}))
    else:
        typer.echo(_closing(opened, result))


def _finish(
    stage: str, opened: Run, loaded: Recipe, splits: Splits | None, progress: Progress
) -> dict[str, Any] | None:
    try:
        return _call(stage, opened, loaded, splits, progress)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; --resume goes on with {opened.folder}", err=True)
        raise typer.Exit(130) from None


def _call(stage: str, opened: Run, loaded: Recipe, splits: Splits | None, progress: Progress) -> dict[str, Any] | None:
    result: dict[str, Any] | None = None
    if stage == "rescore":
        from heatbath.stages.evaluate import rescore

        result = rescore(opened, loaded, progress)
    elif stage == "rl on verl":
        from heatbath.integrations.verl.launch import run_rl_on_verl

        assert splits is not None
        run_rl_on_verl(opened, loaded, splits, progress)
    else:
        from heatbath.stages.pipeline import run_all, run_stage

        result = run_all(opened, loaded, progress) if stage == "run" else run_stage(stage, opened, loaded, progress)
    if stage in ("eval", "rescore"):
        from heatbath.report.page import write_report

        write_report(opened)
    return result


def _closing(opened: Run, result: dict[str, Any] | None) -> str:
    """The last lines on stdout: the table of results, and where everything lies."""
    from heatbath.report.tables import markdown_results

    lines = [markdown_results(result)] if result else []
    page = opened.folder / "report.html"
    return "\n".join([*lines, f"run: {opened.folder}", *([f"report: {page}"] if page.exists() else [])])
