"""Verbs → recipes → stages. No logic: it parses, calls, and turns errors into messages and exit codes.

Exit codes: 0 done, 1 failed, 2 the recipe or the data is wrong, 130 interrupted.
"""

from __future__ import annotations

import json as jsonlib
import logging
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

# Before torch is loaded: OpenMP threads that spin for ever while they wait make a busy machine up to 50 times slower,
# threads that sleep at once make small models half as fast on a quiet one. A short spin is within a third of either.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from heatbath import cli_stages, cli_measures  # noqa: F401, I001 - their verbs, in this order
from heatbath import interruption, ranks
from heatbath.cli_options import Json, app
from heatbath.errors import HeatbathError, RecipeError, RunError
from heatbath.terminal import echo, printable


@app.command()
def recipes(
    action: Annotated[str, typer.Argument(help="list, or copy NAME [TO].")] = "list",
    name: Annotated[str | None, typer.Argument(help="The recipe to copy, or ddp, fsdp2, zero2.")] = None,
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

        echo(jsonlib.dumps(definitions.listed(), ensure_ascii=False) if json else definitions.shown())
        return
    if strategies:
        from heatbath import strategies as named

        echo(jsonlib.dumps(named.listed()) if json else named.shown())
        return
    if policies:
        from heatbath.methods import listed, shown

        echo(jsonlib.dumps(listed()) if json else shown())
        return
    if action == "copy" and name is not None:
        written = copy(name, to)
        echo(jsonlib.dumps({"written": str(written)}) if json else written)
        return
    if action != "list":
        raise RecipeError(f"'{action}' with no recipe to copy", "command line", "heatbath recipes copy NAME [TO]")
    found = {name: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for name, path in shipped().items()}
    if json:
        echo(jsonlib.dumps(found))
    else:
        for name, line in found.items():
            echo(f"{name:16} {line}")


@app.command()
def doctor(json: Json = False) -> None:
    """What works on this machine: versions against the tested ranges, devices, models."""
    from heatbath.doctor import examine, show

    found = examine()
    echo(jsonlib.dumps(found, indent=1) if json else show(found))
    raise typer.Exit(0 if found["ok"] else 1)


def main() -> None:
    """The console script."""
    interruption.listen()
    try:
        app()
    except HeatbathError as error:
        if "-v" in sys.argv or "--verbose" in sys.argv:
            logging.getLogger("heatbath").error("failed\n%s", printable(traceback.format_exc()))
        echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except RuntimeError as error:
        if not ranks.lost(error):
            raise
        sys.exit(1)  # that process, or who started it, says why
    except OSError as error:
        free = shutil.disk_usage(Path.cwd()).free
        where = f"{error.filename or 'the file system'} ({free >> 20} MiB free)"
        told = RunError(str(error), where, "check that the path is right, may be used, and has room")
        echo(f"error: {told}", err=True)
        sys.exit(1)
