"""torchrun or accelerate as a program that ends with a line instead of a traceback: `python -m heatbath.starting LINE`.

What a process of heatbath has to say of its end it has said itself; here only what none could say is told.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence


def start(line: Sequence[str]) -> int:
    """Runs `torchrun …` or `accelerate launch …` in this process; returns 0, or 1 where a process failed or this one
    was told to end."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # each process's end, in its own words
    try:
        if line[0] == "torchrun":
            from torch.distributed import run

            run.main(list(line[1:]))
        else:
            from accelerate.commands import launch

            launch.launch_command(launch.launch_command_parser().parse_args(list(line[2:])))
    except ChildFailedError as error:
        for rank, failure in error.failures.items():
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # which the others are sent then
                print(
                    f"error: process {rank} was killed by {failure.signal_name()}\n  where:  {line[0]}\n"
                    "  remedy: --resume goes on from the last complete checkpoint",
                    file=sys.stderr,
                )
        return 1
    except SignalException:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(start(sys.argv[1:]))
