"""What every verb of the command line shares: the app, its arguments and options, and the libraries' manners."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

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
Gpus = Annotated[int, typer.Option("--gpus", min=1, help="Processes on this machine, one per GPU (or on a CPU).")]
Nodes = Annotated[int, typer.Option("--nodes", min=1, help="Machines; the same command runs on each (docs/scale.md).")]
Sharding = Annotated[str, typer.Option("--sharding", help="ddp, fsdp2, zero2, or a configuration file of accelerate.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, nothing else.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Show the libraries' own messages and tracebacks.")]


def name_of(recipe: str) -> str:
    """That of a recipe's file, which may hold dots."""
    return Path(recipe).name.removesuffix(".toml")


def settle_libraries(verbose: bool) -> None:
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
