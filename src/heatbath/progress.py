"""What a person sees while a run works: a bar on a terminal, sparse lines elsewhere; always on stderr."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from heatbath import ranks
from heatbath.terminal import printable


class Progress:
    """One bar at a time. `quiet` shows nothing (for `--json` and tests), nor does any process but the first."""

    def __init__(self, *, quiet: bool = False):
        self.console = Console(stderr=True, quiet=quiet or not ranks.first(), highlight=False, soft_wrap=True)
        self.interrupted = False  # whether somebody has asked for an end, which a stage may put off
        self._bar: Bar | None = None
        self._title, self._total, self._done, self._said = "", 0, 0, 0.0

    def say(self, text: str) -> None:
        self.console.print(printable(text), markup=False)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[None]:
        """A bar while the block runs; the terminal is given back however the block ends."""
        self._title, self._total, self._done, self._said = printable(title), total, 0, time.monotonic()
        if not self.console.is_terminal:
            self.say(self._title)
            yield
            return
        named = TextColumn("{task.description}", markup=False)
        columns = (named, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Bar(*columns, console=self.console, transient=True) as self._bar:
            self._bar.add_task(self._title, total=total)
            try:
                yield
            finally:
                self._bar = None

    def update(self, done: int, note: str = "") -> None:
        """Shows that `done` of the total are done, with the numbers measured at that point."""
        self._done = done
        if self._bar is not None:
            self._bar.update(self._bar.tasks[0].id, completed=self._done, description=f"{self._title} {note}")
        elif time.monotonic() - self._said > 20 or self._done >= self._total:
            self.say(f"  {self._done}/{self._total} {note}")
            self._said = time.monotonic()
