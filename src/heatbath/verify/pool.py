"""Worker processes with a hard deadline: a task that outlives it is killed with its process, and the process replaced.

Threads cannot do this (a big-integer power holds the interpreter lock for ever) and signals only work in a main
thread, so neither is used. A worker is a fresh interpreter that runs `heatbath.verify.worker`, not a copy of this
process: it needs no `__main__` guard in the user's script, loads no torch, and may be started by a daemonic process.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from heatbath.errors import RunError
from heatbath.verify.worker import LOW_PRIORITY_AFTER, START_SECONDS, Worker, WorkerLostError

START_ATTEMPTS = 3  # in a row, once a worker of this pool has run; before, only for those that are killed from outside
SLOW_AT_ONCE = 16  # tasks that run on beside the workers; past it, a slow task keeps its slot


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a task. `value` is there when it is done, `message` (the reason) when it is not."""

    status: Literal["done", "timeout", "crashed"]
    value: Any = None
    seconds: float = 0.0
    message: str = ""


class WorkerPool:
    """Calls a function in `workers` processes; each call ends by its `deadline` (seconds), by SIGKILL if it must.

    A task whose process dies is given to another one, once.

    `function` is "package.module:function" or "path/to/file.py:function"; arguments and results are JSON values. A task
    whose process is killed from outside gets another one, once.
    Processes start at the first task and are ready after the call `function(*warm_up)`, before any deadline counts.
    `memory_gib` is what a task may add to a warm worker. A task still running after `slow_after` seconds while others
    wait leaves its worker slot to another process and goes on beside it, at the lowest priority after twice as long, so
    that a task which hangs delays the others by `slow_after` and the start of a process.

    May be used by several threads at once, which share the workers in turn; after a fork the child starts its own.
    """

    def __init__(
        self,
        function: str,
        *,
        workers: int = 2,
        deadline: float = 10.0,
        memory_gib: float = 2.0,
        warm_up: Sequence[Any] | None = None,
        slow_after: float = 0.25,
    ) -> None:
        home, _, name = function.rpartition(":")
        if not home or not name:
            raise RunError(f"{function!r} names no function", remedy='write "package.module:function"')
        if workers < 1 or deadline <= 0 or memory_gib <= 0 or slow_after <= 0:
            raise RunError("workers, deadline, memory_gib and slow_after of a worker pool must be positive")
        # A later change of the working folder must not change what a replaced worker runs.
        self.function = f"{Path(home).resolve()}:{name}" if home.endswith(".py") else function
        self.workers, self.deadline, self.memory_gib = workers, deadline, memory_gib
        self.warm_up, self.slow_after = warm_up, slow_after
        self._alive: set[Worker] = set()  # shared with the finalizer, which must not hold the pool
        self._reset()
        _POOLS.add(self)
        self._finalizer = weakref.finalize(self, _end, self._alive)

    def map(self, tasks: Sequence[Sequence[Any]]) -> list[Outcome]:
        """The outcome of `function(*task)` for each task, in order. Raises where no worker can be started."""
        if self._pid != os.getpid():
            self._forget()
        with self._lock:
            self._require_open()
        return _Call(self, tasks).run() if tasks else []

    def close(self) -> None:
        """Ends every worker; a `map` that is running in another thread raises."""
        if self._pid != os.getpid():
            self._forget()
        with self._lock:
            self._closed = True
            idle = list(self._idle)
            self._idle.clear()
            self._alive.difference_update(idle)
            for worker in self._alive:
                worker.signal_kill()  # its pipes belong to the thread that polls them
            for call in self._calls:
                call.wake()
        for worker in idle:
            worker.end()

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        names = ("function", "workers", "deadline", "memory_gib", "warm_up", "slow_after")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, settings: dict[str, Any]) -> None:
        WorkerPool.__init__(self, **settings)

    # What follows is for _Call. A slot is the right to run one task at full priority; `_lock` guards all of it.

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._free_slots, self._slow = self.workers, 0
        self._idle: list[Worker] = []  # ready, or still starting
        self._calls: set[_Call] = set()
        self._queue: deque[_Call] = deque()  # calls that want slots, served in turn, one slot each
        self._closed = False
        self._proven, self._failures = False, 0

    def _forget(self) -> None:
        """In a forked child: the parent's workers are let alone, and its pipes closed so that its death is seen."""
        for worker in self._alive:
            worker.process.returncode = 0  # not a child of this process
            worker.close_pipes()
        for call in self._calls:
            call.close_pipe()
        self._alive.clear()
        closed = self._closed
        self._reset()
        self._closed = closed

    def _require_open(self) -> None:
        if self._closed:
            raise RunError(f"the worker pool of {self.function} is closed")

    def _share(self, call: _Call) -> None:
        """Sets what `call` wants and hands out the free slots: one to each call in turn."""
        with self._lock:
            self._require_open()
            self._calls.add(call)
            surplus = max(call.granted - call.wanted(), 0)
            call.granted -= surplus
            self._free_slots += surplus
            if call.wanted() > call.granted and call not in self._queue:
                self._queue.append(call)
            while self._queue and self._free_slots > 0:
                first = self._queue.popleft()
                if first.wanted() <= first.granted:
                    continue
                first.granted += 1
                self._free_slots -= 1
                if first.wanted() > first.granted:
                    self._queue.append(first)
                if first is not call:
                    first.wake()

    def _others_wait(self, call: _Call) -> bool:
        with self._lock:
            return any(c is not call for c in self._queue)

    def _lease(self, call: _Call) -> Worker:
        """A worker for a slot that `call` was granted: one that is ready, else one that is starting, else a new one."""
        with self._lock:
            self._require_open()
            for dead in [w for w in self._idle if w.ready and w.process.poll() is not None]:
                self._idle.remove(dead)  # somebody killed it while it waited: no task's fault
                self._alive.discard(dead)
                dead.end()
            ready = [w for w in self._idle if w.ready or w.look()]
            if ready or self._idle:
                worker = max(ready or self._idle, key=lambda w: w.served)  # the one whose caches are warmest
                self._idle.remove(worker)
            else:
                worker = self._start()
            call.granted -= 1
            return worker

    def _start(self) -> Worker:
        assert len(self._alive) < 2 * self.workers + SLOW_AT_ONCE + 2, "a fault here must not fill the machine"
        settings = {name: getattr(self, name) for name in ("deadline", "slow_after", "memory_gib", "warm_up")}
        try:
            worker = Worker(self.function, **settings)
        except OSError as error:
            raise RunError(f"no worker process of {self.function} could be started: {error}") from error
        self._alive.add(worker)
        return worker

    def _move_aside(self, worker: Worker) -> None:
        """Frees the slot of a slow task, unless too many are aside."""
        with self._lock:
            if self._slow >= SLOW_AT_ONCE or self._closed:
                return
            worker.aside = True
            self._slow += 1
            self._free_slots += 1
            # One takes over the slot; where tasks hang in numbers, another waits for the next that does.
            while len(self._idle) < min(self._slow, 2):
                self._idle.append(self._start())

    def _give_back(self, worker: Worker, *, usable: bool) -> None:
        """Takes a worker from a call, and the slot it held."""
        with self._lock:
            if worker.aside:
                self._slow -= 1
            else:
                self._free_slots += 1
            worker.aside = False
            if usable and not self._closed and len(self._idle) <= self.workers and worker.restore_priority():
                self._idle.append(worker)
                return
            self._alive.discard(worker)
        worker.end()

    def _leave(self, call: _Call) -> None:
        """The call is over: what it was granted goes to the others."""
        with self._lock:
            self._free_slots += call.granted
            call.granted = 0
            call.tasks = ()
            self._calls.discard(call)
            if call in self._queue:
                self._queue.remove(call)
            call.close_pipe()
            if self._queue and not self._closed:
                self._queue[0].wake()  # it shares out what became free


class _Call:
    """One `map`: its tasks, the workers that it holds, and the slots granted to it that it has not used yet.

    `run` is an event loop over the pipes of the workers held; other threads only write into its wake pipe.
    """

    def __init__(self, pool: WorkerPool, tasks: Sequence[Sequence[Any]]) -> None:
        self.pool, self.tasks = pool, tasks
        self.outcomes: list[Outcome | None] = [None] * len(tasks)
        self.given = self.finished = self.granted = 0
        self.again: list[int] = []  # tasks whose worker died, to be given to another one
        self.lost: set[int] = set()  # tasks that have cost a worker
        self.held: list[Worker] = []
        self._read_wake, self._write_wake = os.pipe()
        os.set_blocking(self._read_wake, False)
        os.set_blocking(self._write_wake, False)

    def run(self) -> list[Outcome]:
        try:
            while self.finished < len(self.outcomes):
                self.pool._share(self)
                while self.granted > 0 and self.wanted() > 0:
                    worker = self.pool._lease(self)
                    self.held.append(worker)
                    if worker.ready:
                        self._give_task(worker)
                self._wait()
                self._look_at_the_clock()
        finally:
            for worker in list(self.held):
                self._release(worker, usable=worker.task is None)
            self.pool._leave(self)
        return [o for o in self.outcomes if o is not None]

    def wanted(self) -> int:
        """Slots this call could use: tasks that no worker has, less the workers that are starting for them."""
        return max(len(self.tasks) - self.given + len(self.again) - sum(w.task is None for w in tuple(self.held)), 0)

    def wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it is full of wakes already
            os.write(self._write_wake, b"!")

    def close_pipe(self) -> None:
        os.close(self._read_wake)
        os.close(self._write_wake)

    def _give_task(self, worker: Worker) -> None:
        if self.again:
            number = self.again.pop()
        elif self.given < len(self.tasks):
            number, self.given = self.given, self.given + 1
        else:
            return self._release(worker, usable=True)
        worker.begin(number, list(self.tasks[number]))

    def _release(self, worker: Worker, *, usable: bool) -> None:
        self.held.remove(worker)
        self.pool._give_back(worker, usable=usable)

    def _finish(self, worker: Worker, outcome: Outcome, *, usable: bool) -> None:
        """Records the outcome of a worker's task and gives the worker its next one, where it may keep its slot."""
        assert worker.task is not None
        self.outcomes[worker.task] = outcome
        self.finished += 1
        worker.task = None
        if usable and not worker.aside and not self.pool._others_wait(self):
            self._give_task(worker)
        else:
            self._release(worker, usable=usable)

    def _wait(self) -> None:
        """Sleeps until a pipe of a held worker, or another thread, has something, or a clock runs out; then reads."""
        poll = select.poll()
        poll.register(self._read_wake, select.POLLIN)
        owners: dict[int, Worker] = {}
        for worker in self.held:
            for fd, events in worker.interests():
                poll.register(fd, events)
                owners[fd] = worker
        now = time.monotonic()
        pause = min((worker.next_change() - now for worker in self.held), default=None)
        ready = poll.poll(None if pause is None else max(math.ceil(pause * 1000), 0))
        for worker in {owners[fd] for fd, _ in ready if fd in owners}:
            self._hear(worker)
        with contextlib.suppress(BlockingIOError):
            if any(fd == self._read_wake for fd, _ in ready):
                os.read(self._read_wake, 1024)

    def _hear(self, worker: Worker) -> None:
        """Moves what the pipes of a worker can take and give, and acts on its answer or its death."""
        try:
            answer = worker.exchange()
        except WorkerLostError as lost:
            if not worker.ready:
                self._start_failed(worker, str(lost), killed=lost.killed)
            else:
                if self._try_again(worker, lost):
                    return
                elapsed = time.monotonic() - worker.since
                status: Literal["timeout", "crashed"] = "timeout" if lost.out_of_time else "crashed"
                self._finish(worker, Outcome(status, None, elapsed, str(lost)), usable=False)
            return
        if answer is None:
            return
        kind, value, seconds, exhausted = answer
        if kind == "ready":
            self.pool._proven, self.pool._failures = True, 0
            self._give_task(worker)
        elif kind == "done":
            self._finish(worker, Outcome("done", value, seconds), usable=not exhausted)
        else:
            self._finish(worker, Outcome("crashed", None, seconds, str(value)), usable=not exhausted)

    def _try_again(self, worker: Worker, lost: WorkerLostError) -> bool:
        """A worker may be killed for something else than its task (memory that another process took): the first time
        another one gets the task."""
        if not lost.killed or worker.task is None or worker.task in self.lost:
            return False
        self.lost.add(worker.task)
        self.again.append(worker.task)
        worker.task = None
        self._release(worker, usable=False)
        return True

    def _contended(self) -> bool:
        return bool(self.again) or self.given < len(self.tasks) or self.pool._others_wait(self)

    def _look_at_the_clock(self) -> None:
        """Kills what is past its deadline, and moves slow tasks out of the way of waiting ones."""
        now, pool = time.monotonic(), self.pool
        contended = self._contended()
        for worker in list(self.held):
            elapsed = now - worker.since
            if not worker.ready:
                if elapsed >= START_SECONDS:
                    self._start_failed(worker, f"it was not ready after {START_SECONDS:.0f} s")
            elif elapsed >= pool.deadline:
                message = f"killed at the deadline of {pool.deadline:g} s"
                self._finish(worker, Outcome("timeout", None, elapsed, message), usable=False)
            elif contended and elapsed >= pool.slow_after:
                if not worker.aside:
                    pool._move_aside(worker)
                if worker.aside and elapsed >= LOW_PRIORITY_AFTER * pool.slow_after:
                    worker.lower_priority()

    def _start_failed(self, worker: Worker, reason: str, *, killed: bool = False) -> None:
        pool, printed = self.pool, worker.last_words()
        self._release(worker, usable=False)
        with pool._lock:
            pool._require_open()
            pool._failures += 1
            if (pool._proven or killed) and pool._failures < START_ATTEMPTS:
                return
        raise RunError(
            f"a worker process could not load {pool.function} and make its warm-up call: {reason}",
            where=printed or "it printed nothing",
            remedy="call the function by hand in a new interpreter, in this folder",
        )


def _end(workers: set[Worker]) -> None:
    """For the garbage collector and the interpreter's exit: leaves no process behind."""
    for worker in workers:
        worker.signal_kill()
    while workers:
        workers.pop().end()


_POOLS: weakref.WeakSet[WorkerPool] = weakref.WeakSet()
_forking = threading.RLock()
_locked: list[WorkerPool] = []


def _before_fork() -> None:
    """No pool is in the middle of a change when this process is copied."""
    _forking.acquire()
    for pool in list(_POOLS):
        pool._lock.acquire()
        _locked.append(pool)


def _after_fork_in_parent() -> None:
    while _locked:
        _locked.pop()._lock.release()
    _forking.release()


def _after_fork_in_child() -> None:
    global _forking
    _locked.clear()
    _forking = threading.RLock()
    for pool in list(_POOLS):
        pool._forget()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
