"""The verbs that look, measure and hand over: inspect, surprise, shift, compare, grade, report, export."""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from heatbath.allocator import keep_freed_memory
from heatbath.cli_options import Json, Overrides, RecipeArgument, Verbose, app, name_of, settle_libraries
from heatbath.errors import RecipeError
from heatbath.terminal import echo


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

    settle_libraries(verbose)
    found = inspecting.inspect(load(recipe, overrides), count=count, row=row, surprise=surprise)
    if json:
        echo(jsonlib.dumps(found, ensure_ascii=False))
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

    settle_libraries(verbose)
    loaded = load(recipe, overrides)
    from heatbath.stages import surprise as stage

    folder = out or Path("runs") / f"{name_of(recipe)}-surprise"
    command = shlex.join(["heatbath", *sys.argv[1:]])
    found = stage.run_surprise(loaded, folder, command, Progress(quiet=json))
    if json:
        echo(jsonlib.dumps(found, ensure_ascii=False))
    else:
        stage.show(found, Console(highlight=False))
        echo(f"page: {found['page']}")


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

    settle_libraries(verbose)
    keep_freed_memory()
    from heatbath.progress import Progress
    from heatbath.stages import shift as stage
    from heatbath.stages import shift_summary
    from heatbath.stages.shift_settings import named_and_set, parse

    names, texts = named_and_set(models)
    progress = Progress(quiet=json)
    found = stage.run_shift(names, parse(texts, on), data=data, out=out, fresh=fresh, progress=progress)
    if json:
        echo(jsonlib.dumps(found, ensure_ascii=False))
    else:
        shift_summary.show(found, Console(highlight=False))


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
    settle_libraries(verbose)
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
        echo(jsonlib.dumps(found, ensure_ascii=False) if json else found["page"])
        return
    numbers = grid.parse_seeds(seeds) if seeds is not None else None
    plan = grid.with_options(comparison(recipe), grid.parse_vary(vary or []), numbers, baseline)
    plan = plan.model_copy(update={"tune": None}) if no_tune else plan
    folder = out or Path("runs") / f"{name_of(recipe)}-compare"
    asked = stage.Comparison(recipe, plan, tuple(overrides or ()), folder)
    if dry_run:
        stage.check(asked)
        cells = stage.listed(asked)
        echo(jsonlib.dumps(cells, ensure_ascii=False) if json else stage.shown(cells))
        return
    try:
        found = stage.run_compare(asked, jobs=jobs, only=tuple(cell or ()), progress=Progress(quiet=json))
    except KeyboardInterrupt:
        echo(f"interrupted; the same command goes on with {folder}", err=True)
        raise typer.Exit(130) from None
    echo(jsonlib.dumps(found, ensure_ascii=False) if json else (folder / "compare.md").read_text())


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
        echo("interrupted; the same command goes on" if out != "-" else "interrupted", err=True)
        raise typer.Exit(130) from None
    echo(jsonlib.dumps(found, ensure_ascii=False) if json else stage.show(found), err=out == "-")
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
    echo(jsonlib.dumps({k: str(v) for k, v in written.items()}) if json else written["html"])


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    out: Annotated[Path, typer.Option("--out", help="The folder to write; it must be empty or not exist.")],
    policy: Annotated[str | None, typer.Option("--policy", help="base, init or final; default the last.")] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    adapter: Annotated[bool, typer.Option("--adapter", help="The adapter alone, for PEFT; else it is merged.")] = False,
    push: Annotated[str | None, typer.Option("--push", help="Upload to this repository of the hub, private.")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """A policy as a plain folder for others, with its model card; read back and compared before it is there."""
    settle_libraries(verbose)
    from heatbath.progress import Progress
    from heatbath.run import Run
    from heatbath.stages.export import Export, run_export

    wanted = Export(out, policy, dtype, adapter, push)
    found = run_export(Run.read(run), wanted, Progress(quiet=json))
    echo(jsonlib.dumps(found, ensure_ascii=False) if json else found["url"] or found["folder"])
