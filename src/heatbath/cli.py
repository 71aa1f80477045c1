"""Verbs → recipes → stages. No logic: it parses, calls, and turns errors into messages and exit codes.

Exit codes: 0 done, 1 failed, 2 the recipe or the data is wrong, 130 interrupted.
"""

from __future__ import annotations

import json as jsonlib
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from heatbath.allocator import keep_freed_memory
from heatbath.errors import HeatbathError

if TYPE_CHECKING:
    from heatbath.progress import Progress
    from heatbath.recipe import Recipe
    from heatbath.run import Run

app = typer.Typer(
    help="Warm-start reinforcement learning of a language model, and measure whether it helped.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

RecipeArgument = Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, applied over the recipe.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Read recipe and data, print the plan, train nothing.")]
Out = Annotated[Path | None, typer.Option("--out", help="The run's folder; default runs/<recipe name>.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, nothing else.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show the libraries' own messages and tracebacks.")]


@app.command()
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    out: Out = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """All stages of a recipe: sft, rl, eval, report."""
    _stage("run", recipe, overrides, dry_run, out, json, verbose)


@app.command()
def sft(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    out: Out = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """The warm start alone: base to init."""
    _stage("sft", recipe, overrides, dry_run, out, json, verbose)


@app.command()
def rl(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    out: Out = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Reinforcement learning alone: init (or base) to final."""
    _stage("rl", recipe, overrides, dry_run, out, json, verbose)


@app.command("eval")
def evaluate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    out: Out = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Sample, grade and compare the policies a run has so far."""
    _stage("eval", recipe, overrides, dry_run, out, json, verbose)


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="The folder of a run.")], json: Json = False) -> None:
    """Write report.html, report.md and report.json of a run."""
    from heatbath.report.page import write_report
    from heatbath.run import Run

    written = write_report(Run.read(folder))
    typer.echo(jsonlib.dumps({k: str(v) for k, v in written.items()}) if json else written["html"])


@app.command()
def recipes(json: Json = False) -> None:
    """List the shipped recipes."""
    from heatbath.recipe import shipped

    found = {name: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for name, path in shipped().items()}
    if json:
        typer.echo(jsonlib.dumps(found))
    else:
        for name, line in found.items():
            typer.echo(f"{name:12} {line}")


@app.command()
def doctor(json: Json = False) -> None:
    """What works on this machine: versions against the tested ranges, devices, models."""
    from heatbath.doctor import examine, show

    found = examine()
    typer.echo(jsonlib.dumps(found, indent=1) if json else show(found))
    raise typer.Exit(0 if found["ok"] else 1)


def _stage(
    stage: str,
    recipe: str,
    overrides: list[str] | None,
    dry_run: bool,
    out: Path | None,
    json: bool,
    verbose: bool,
) -> None:
    from heatbath.recipe import load

    _settle_libraries(verbose)
    keep_freed_memory()
    loaded = load(recipe, overrides)
    if dry_run:
        from heatbath.stages.pipeline import plan

        typer.echo(jsonlib.dumps(plan(loaded), indent=None if json else 1, ensure_ascii=False))
        return
    from heatbath.progress import Progress
    from heatbath.run import Run
    from heatbath.stages.pipeline import check, stages_of

    folder = out or Path("runs") / Path(recipe).stem
    opening = Run.create if stage == "run" else Run.open
    progress = Progress(quiet=json)
    opening(folder, loaded, dry=True)
    progress.say(f"run folder: {folder}; reading the data and the tokenizer of {loaded.model}")
    check(loaded, stages_of(loaded) if stage == "run" else (stage,))
    opened = opening(folder, loaded)
    try:
        result = _call(stage, opened, loaded, progress)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; finished stages and samples are in {folder}", err=True)
        raise typer.Exit(130) from None
    if json:
        typer.echo(jsonlib.dumps({"run": str(folder), **(result or {})}))
    else:
        typer.echo(_closing(opened, result))


def _call(stage: str, opened: Run, loaded: Recipe, progress: Progress) -> dict[str, Any] | None:
    if stage == "sft":
        from heatbath.stages.sft import run_sft

        run_sft(opened, loaded, progress)
        return None
    if stage == "rl":
        from heatbath.stages.rl import run_rl

        run_rl(opened, loaded, progress)
        return None
    if stage == "eval":
        from heatbath.stages.evaluate import run_evaluation

        return run_evaluation(opened, loaded, progress)
    from heatbath.stages.pipeline import run_all

    return run_all(opened, loaded, progress)


def _closing(opened: Run, result: dict[str, Any] | None) -> str:
    """The last lines on stdout: the table of results, and where everything lies."""
    from heatbath.report.tables import markdown_results

    lines = [markdown_results(result)] if result else []
    page = opened.folder / "report.html"
    return "\n".join([*lines, f"run: {opened.folder}", *([f"report: {page}"] if page.exists() else [])])


def _settle_libraries(verbose: bool) -> None:
    """No library phones home, asks for a key or chats, unless the user wants to hear it."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(
        level=logging.INFO if verbose else logging.ERROR, stream=sys.stderr, format="%(name)s: %(message)s"
    )
    if not verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars, in the middle of ours
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        import warnings

        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning)


def main() -> None:
    """The console script."""
    try:
        app()
    except HeatbathError as error:
        if "-v" in sys.argv or "--verbose" in sys.argv:
            logging.getLogger("heatbath").exception("failed")
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        free = shutil.disk_usage(Path.cwd()).free
        typer.echo(f"error: {error}\n  where:  {error.filename or 'the file system'} ({free >> 20} MiB free)", err=True)
        sys.exit(1)
