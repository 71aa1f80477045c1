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

import psutil

from heatbath.ranks import PATIENCE
from heatbath.terminal import echo

LAUNCHERS = (RuntimeError, ValueError, ImportError, OSError)  # a port in use, machines that do not meet, a wrong file


def start(line: Sequence[str]) -> int:
    """Runs `torchrun …` or `accelerate launch …` in this process; returns 0, or 1 where a process failed or this one
    was told to end."""
    os.environ["LOGLEVEL"] = "CRITICAL"  # of the launcher
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(int(PATIENCE.total_seconds())))
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
        told = _killed(error)
    except api.SignalException:
        return 1
    except LAUNCHERS as error:
        told = next(iter(str(error).strip().splitlines()), type(error).__name__)
    else:
        return 0
    if told is not None:
        echo(
            f"error: {told}\n  where:  {line[0]}\n  remedy: --resume goes on from the last complete checkpoint",
            err=True,
        )
    return 1


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


def _killed(error: object) -> str | None:
    """Which process was killed, if that came first: the others are ended after it."""
    failures = error.failures  # type: ignore[attr-defined]
    first = min(failure.timestamp for failure in failures.values())
    for rank, failure in failures.items():
        if failure.timestamp == first and failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            return f"process {rank} was killed by {failure.signal_name()}"
    return None


if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
