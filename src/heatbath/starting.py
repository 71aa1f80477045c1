"""torchrun or accelerate as a program that ends with a line instead of a traceback: `python -m heatbath.starting LINE`.

What a process of heatbath has to say of its end it has said itself; here only what none could say is told. An
interruption is passed on to the processes and waited for: torch's own way is to kill them half a minute later.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING

import psutil

from heatbath.terminal import echo

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

LAUNCHERS = (RuntimeError, ValueError, ImportError, OSError)  # a port in use, machines that do not meet, a wrong file


def start(line: Sequence[str]) -> int:
    """Runs `torchrun …` or `accelerate launch …` in this process; returns 0, or 1 where a process failed or this one
    was told to end."""
    os.environ["LOGLEVEL"] = "CRITICAL"  # of the launcher
    from torch.distributed.elastic.multiprocessing import api
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    end = api._terminate_process_handler

    def pass_on(number: int, frame: FrameType | None) -> None:
        if not (started := processes()):
            end(number, frame)
        for process in started:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGTERM)

    api._terminate_process_handler = pass_on
    try:
        _launch(line)
    except ChildFailedError as error:
        if (killed := _killed(error)) is not None:
            _tell(killed, line, "--resume goes on from the last complete checkpoint")
        return 1
    except api.SignalException:
        return 1
    except LAUNCHERS as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        _tell(first, line, "check the configuration, and that MASTER_ADDR and MASTER_PORT can be reached and are free")
        return 1
    return 0


def _tell(what: str, line: Sequence[str], remedy: str) -> None:
    echo(f"error: {what}\n  where:  {line[0]}\n  remedy: {remedy}", err=True)


def processes() -> list[psutil.Process]:
    """The run's processes below this one; what those start in turn, as their graders, is theirs to end."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if "RANK" in child.environ():
                found.append(child)
    return found


def _launch(line: Sequence[str]) -> None:
    if line[0] == "torchrun":
        from torch.distributed import run

        run.main(list(line[1:]))
    else:
        from accelerate.commands import launch

        launch.launch_command(launch.launch_command_parser().parse_args(list(line[2:])))


def _killed(error: ChildFailedError) -> str | None:
    """Which process was killed, if that came first: the others are ended after it."""
    first = min(failure.timestamp for failure in error.failures.values())
    for rank, failure in error.failures.items():
        if failure.timestamp == first and failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            return f"process {rank} was killed by {failure.signal_name()}"
    return None


if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
