"""heatbath in a process of its own, to be watched and killed: forked from one that has imported everything, which saves
the 8 seconds that each would take for it. In all else as `python -m heatbath` in that folder."""

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from heatbath.stages.compare import PRELOADED


class Forked:
    """As much of `subprocess.Popen` as tests need; stdout and stderr go to one file."""

    def __init__(self, *arguments: str, cwd: Path, environment: Mapping[str, str] | None = None):
        handle, name = tempfile.mkstemp(prefix="heatbath-forked-")
        os.close(handle)
        self.output = Path(name)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED, "heatbath.cli"])
        self.process = context.Process(target=_run, args=(arguments, str(cwd), name, dict(environment or {})))
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int | None:
        self.process.join(timeout)
        return self.process.exitcode

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.process.pid, how)

    def said(self) -> str:
        """What it printed, once it has ended."""
        self.wait()
        text = self.output.read_text(encoding="utf-8", errors="replace")
        self.output.unlink(missing_ok=True)
        return text


def _run(arguments: tuple[str, ...], folder: str, output: str, environment: dict[str, str]) -> None:
    from heatbath import cli

    os.chdir(folder)
    os.environ.update(environment)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["heatbath", *arguments]
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
