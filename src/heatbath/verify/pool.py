"""Worker processes with a hard deadline: a task that outlives it is killed with its process, and the process replaced.

Threads cannot do this (a big-integer power holds the interpreter lock for ever) and signals only work in a main
thread, so neither is used.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, cast

from pebble import ProcessPool

from heatbath.verify.verdict import Status

RECYCLE_AFTER = 2_000  # tasks of one worker, so that a parser's caches cannot grow without bound


class WorkerPool:
    """Calls `function` (importable, returning a `Status`) in fresh interpreters, `workers` at a time.

    The processes start at the first task: a run that never needs them pays nothing. `warm_up` are the arguments of a
    first call, made before any deadline counts, because loading the parser takes longer than most verdicts.
    """

    def __init__(
        self, function: Callable[..., str], *, workers: int, deadline: float, warm_up: tuple[Any, ...]
    ) -> None:
        self.function, self.workers, self.deadline, self.warm_up = function, workers, deadline, warm_up
        self._pool: ProcessPool | None = None

    def map(self, tasks: list[tuple[Any, ...]]) -> list[tuple[Status, float]]:
        """Outcome and seconds of each task, in order; a deadline is `timeout`, a dead or raising worker `crashed`."""
        if not tasks:
            return []
        futures = [
            self._started().schedule(_timed, args=(self.function, task), timeout=self.deadline) for task in tasks
        ]
        results: list[tuple[Status, float]] = []
        for future in futures:
            started = time.perf_counter()
            try:
                results.append(cast(tuple[Status, float], future.result()))
            except FutureTimeoutError:
                results.append(("timeout", self.deadline))
            except Exception:  # noqa: BLE001 - the process edge: a dead or raising worker is a crash, and is counted
                results.append(("crashed", time.perf_counter() - started))
        return results

    def close(self) -> None:
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
            self._pool = None

    def _started(self) -> ProcessPool:
        if self._pool is None:
            self._pool = ProcessPool(
                max_workers=self.workers,
                max_tasks=RECYCLE_AFTER,
                initializer=_initialise,
                initargs=(self.function, self.warm_up),
                context=multiprocessing.get_context("spawn"),
            )
        return self._pool


def _initialise(function: Callable[..., str], arguments: tuple[Any, ...]) -> None:
    function(*arguments)


def _timed(function: Callable[..., str], arguments: tuple[Any, ...]) -> tuple[str, float]:
    started = time.perf_counter()
    return function(*arguments), time.perf_counter() - started
