"""Verbs → recipes → stages. No logic: it parses, calls, and turns errors into messages and exit codes.

Exit codes: 0 done, 1 failed, 2 the recipe or the data is wrong, 130 interrupted.
"""

from __future__ import annotations

import json as jsonlib
import logging
import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

# Before torch is loaded: OpenMP threads that spin for ever while they wait make a busy machine up to 50 times slower,
# threads that sleep at once make small models half as fast on a quiet one. A short spin is within a third of either.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from heatbath.allocator import keep_freed_memory
from heatbath.errors import HeatbathError, RecipeError

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

RecipeArgument = Annotated[
    str, typer.Argument(help="A TOML file, the name of a shipped recipe, or the folder of a run (its own recipe).")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, applied over the recipe.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Read and check recipe and data, print the plan, train nothing.")
]
Out = Annotated[Path | None, typer.Option("--out", help="The run's folder; default runs/<recipe name>.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what the run's folder holds.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start over: drop what the run's folder holds of these stages.")]
Change = Annotated[
    list[str] | None, typer.Option("--change", help="A key that may differ from the run's recipe; may be repeated.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, nothing else.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show the libraries' own messages and tracebacks.")]


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
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Reinforcement learning alone: init (or base) to final."""
    _stage("rl", recipe, overrides, dry_run, out, (resume, fresh, change), json, verbose)


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


@app.command()
def compare(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe, or RUN RUN …: runs that are there.")],
    overrides: Overrides = None,
    vary: Annotated[
        list[str] | None, typer.Option("--vary", help="key=value,value or strategy=name,name; may be repeated.")
    ] = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="0..4, or 0,1,2.")] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="The setting that others are held against.")
    ] = None,
    no_tune: Annotated[bool, typer.Option("--no-tune", help="Take the recipe's own numbers, tune nothing.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Cells at a time.")] = 1,
    cell: Annotated[list[int] | None, typer.Option("--cell", help="Only the cell of that number.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the cells and their commands; run nothing.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Folder; default runs/<recipe name>-compare.")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Settings × seeds, each a run of its own, then one table with intervals. The same command goes on."""
    _settle_libraries(verbose)
    from heatbath.progress import Progress
    from heatbath.recipe import comparison
    from heatbath.run import is_run
    from heatbath.stages import compare as stage
    from heatbath.stages import grid

    if is_run(Path(recipe)) and overrides and all(is_run(Path(each)) for each in overrides):
        if vary or seeds or cell or dry_run or no_tune:
            raise RecipeError(
                "runs that are there are only compared", "command line", "give --baseline and --out alone"
            )
        folders = [Path(recipe), *map(Path, overrides)]
        found = stage.compare_runs(folders, baseline, out or Path("runs") / f"compare-{len(folders)}-runs")
        typer.echo(jsonlib.dumps(found, ensure_ascii=False) if json else found["page"])
        return
    numbers = grid.parse_seeds(seeds) if seeds is not None else None
    plan = grid.with_options(comparison(recipe), grid.parse_vary(vary or []), numbers, baseline)
    plan = plan.model_copy(update={"tune": None}) if no_tune else plan
    folder = out or Path("runs") / f"{_name(recipe)}-compare"
    asked = stage.Comparison(recipe, plan, tuple(overrides or ()), folder)
    if dry_run:
        stage.check(asked)
        cells = stage.listed(asked)
        typer.echo(jsonlib.dumps(cells, ensure_ascii=False) if json else stage.shown(cells))
        return
    try:
        found = stage.run_compare(asked, jobs=jobs, only=tuple(cell or ()), progress=Progress(quiet=json))
    except KeyboardInterrupt:
        typer.echo(f"interrupted; the same command goes on with {folder}", err=True)
        raise typer.Exit(130) from None
    typer.echo(jsonlib.dumps(found, ensure_ascii=False) if json else (folder / "compare.md").read_text())


@app.command()
def inspect(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    count: Annotated[int, typer.Option("-n", min=1, help="How many demonstrations.")] = 3,
    row: Annotated[int | None, typer.Option("--row", min=1, help="One demonstration by its number.")] = None,
    surprise: Annotated[bool, typer.Option("--surprise", help="Colour tokens by what they cost the base.")] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Demonstrations exactly as the loss sees them, coloured by mask or by surprise."""
    from rich.console import Console

    from heatbath import inspecting
    from heatbath.recipe import load

    _settle_libraries(verbose)
    found = inspecting.inspect(load(recipe, overrides), count=count, row=row, surprise=surprise)
    if json:
        typer.echo(jsonlib.dumps(found, ensure_ascii=False))
    else:
        inspecting.show(found, Console())


@app.command()
def surprise(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder; default runs/<recipe name>-surprise.")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """How surprising the base finds the demonstrations, and what β would do: one pass, nothing is trained."""
    import shlex

    from rich.console import Console

    from heatbath.progress import Progress
    from heatbath.recipe import load

    _settle_libraries(verbose)
    loaded = load(recipe, overrides)
    from heatbath.stages import surprise as stage

    folder = out or Path("runs") / f"{_name(recipe)}-surprise"
    command = shlex.join(["heatbath", *sys.argv[1:]])
    found = stage.run_surprise(loaded, folder, command, Progress(quiet=json))
    if json:
        typer.echo(jsonlib.dumps(found, ensure_ascii=False))
    else:
        stage.show(found, Console(highlight=False))
        typer.echo(f"page: {found['page']}")


@app.command()
def shift(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN [RUN2]",
            help="A run, two runs to be compared, or BASE INIT [FINAL] with --data; then key=value of split, problems, "
            "tokens, layer, mean, pool, temperature, topk, max_length, vocabulary, dtype (docs/shift.md).",
        ),
    ],
    data: Annotated[
        str | None, typer.Option("--data", help="Recipe whose rows are read; default the run's own.")
    ] = None,
    on: Annotated[
        str, typer.Option("--on", help="demos (held out), or samples:POLICY, what it answered in the run.")
    ] = "demos",
    out: Annotated[Path | None, typer.Option("--out", help="JSON file; default shift.json in the run.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what shift.json holds.")] = False,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """How far base, init and final are from each other: hidden states, KL, overlap of the likeliest tokens."""
    from rich.console import Console

    _settle_libraries(verbose)
    keep_freed_memory()
    from heatbath.progress import Progress
    from heatbath.stages import shift as stage
    from heatbath.stages import shift_summary
    from heatbath.stages.shift_settings import named_and_set, parse

    names, texts = named_and_set(models)
    progress = Progress(quiet=json)
    found = stage.run_shift(names, parse(texts, on), data=data, out=out, fresh=fresh, progress=progress)
    if json:
        typer.echo(jsonlib.dumps(found, ensure_ascii=False))
    else:
        shift_summary.show(found, Console(highlight=False))


@app.command()
def grade(
    source: Annotated[str, typer.Argument(metavar="IN.jsonl", help="Rows with response and gold; - reads stdin.")],
    kind: Annotated[str, typer.Option("--kind", help="math, code (field tests) or choice (field options).")] = "math",
    profile: Annotated[str, typer.Option("--profile", help="strict, or for math also paper.")] = "strict",
    out: Annotated[
        str, typer.Option("--out", help="The graded rows; an existing file is gone on with. -: stdout.")
    ] = "-",
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over: drop the graded rows there are.")] = False,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Verdicts at a time.")] = 2,
    deadline: Annotated[float, typer.Option("--deadline", help="Seconds a verdict may take.")] = 10.0,
    json: Json = False,
) -> None:
    """Verdicts for any responses. Exits 2 when rows were left ungraded: unreadable, or without a gold answer."""
    from heatbath.progress import Progress
    from heatbath.stages import grade as stage

    grading = stage.Grading(source, out, kind, profile, workers, deadline, fresh)
    try:
        found = stage.run_grade(grading, Progress(quiet=json))
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on" if out != "-" else "interrupted", err=True)
        raise typer.Exit(130) from None
    typer.echo(jsonlib.dumps(found, ensure_ascii=False) if json else stage.show(found), err=out == "-")
    raise typer.Exit(0 if found["ok"] else 2)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="The folder of a run, or of several.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The page; default report.html in the run, of n: report-n-runs.html.")
    ] = None,
    json: Json = False,
) -> None:
    """Write the page of a run, or one that compares several; Markdown and JSON lie beside it."""
    from heatbath.report.page import write_report
    from heatbath.report.runs_page import write_comparison
    from heatbath.run import Run

    written = write_report(Run.read(folders[0]), out) if len(folders) == 1 else write_comparison(folders, out)
    typer.echo(jsonlib.dumps({k: str(v) for k, v in written.items()}) if json else written["html"])


@app.command()
def recipes(
    action: Annotated[str, typer.Argument(help="list, or copy NAME [TO].")] = "list",
    name: Annotated[str | None, typer.Argument(help="The recipe to copy.")] = None,
    to: Annotated[Path | None, typer.Argument(help="File or folder; default the working folder.")] = None,
    policies: Annotated[bool, typer.Option("--policies", help="List the RL policies and preference methods.")] = False,
    tasks: Annotated[bool, typer.Option("--tasks", help="List the tasks that an evaluation may ask.")] = False,
    strategies: Annotated[bool, typer.Option("--strategies", help="List the ways to start RL, by name.")] = False,
    json: Json = False,
) -> None:
    """List the shipped recipes, or copy one to edit it."""
    from heatbath.recipe import copy, shipped

    if tasks:
        from heatbath.data import tasks as definitions

        typer.echo(jsonlib.dumps(definitions.listed(), ensure_ascii=False) if json else definitions.shown())
        return
    if strategies:
        from heatbath import strategies as named

        typer.echo(jsonlib.dumps(named.listed()) if json else named.shown())
        return
    if policies:
        from heatbath.methods import listed, shown

        typer.echo(jsonlib.dumps(listed()) if json else shown())
        return
    if action == "copy" and name is not None:
        written = copy(name, to)
        typer.echo(jsonlib.dumps({"written": str(written)}) if json else written)
        return
    if action != "list":
        raise RecipeError(f"'{action}' with no recipe to copy", "command line", "heatbath recipes copy NAME [TO]")
    found = {name: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for name, path in shipped().items()}
    if json:
        typer.echo(jsonlib.dumps(found))
    else:
        for name, line in found.items():
            typer.echo(f"{name:16} {line}")


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
    _settle_libraries(verbose)
    keep_freed_memory()
    loaded = load(recipe, overrides)
    if (Path(recipe) / "recipe.toml").is_file():
        out = out or Path(recipe)
    from heatbath.progress import Progress
    from heatbath.run import Run
    from heatbath.stages import pipeline

    folder = out or Path("runs") / _name(recipe)
    stages = {"run": pipeline.stages_of(loaded), "rescore": ("eval",)}.get(stage, (stage,))
    whole = stage == "run"
    if dry_run:
        from heatbath.stages import plan

        found = plan.plan(loaded, stages, [a for a in sys.argv[1:] if a not in ("--dry-run", "--json")])
        found["folder"] = plan.folder_line(folder, loaded, stages, how, whole)
        typer.echo(jsonlib.dumps(found, ensure_ascii=False) if json else plan.show(found))
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
        result = _finish(stage, opened, loaded, progress)
    if json:
        typer.echo(jsonlib.dumps({"run": str(folder), **(result or {})}))
    else:
        typer.echo(_closing(opened, result))


def _name(recipe: str) -> str:
    """That of a recipe's file, which may hold dots."""
    return Path(recipe).name.removesuffix(".toml")


def _finish(stage: str, opened: Run, loaded: Recipe, progress: Progress) -> dict[str, Any] | None:
    try:
        return _call(stage, opened, loaded, progress)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; --resume goes on with {opened.folder}", err=True)
        raise typer.Exit(130) from None


def _call(stage: str, opened: Run, loaded: Recipe, progress: Progress) -> dict[str, Any] | None:
    if stage == "rescore":
        from heatbath.stages.evaluate import rescore

        result: dict[str, Any] | None = rescore(opened, loaded, progress)
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


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """The console script."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)  # a scheduler's end is an interruption like any other
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
