"""A worker process, seen from both ends: `Worker` is the parent's handle, `main` the program of the process itself.

The program, `python -m heatbath.verify.worker module:function READ_FD WRITE_FD`, reads frames (four bytes of length,
then JSON) on one private pipe and answers on another: first its settings, then lists of arguments, each answered by
`[kind, value, seconds, exhausted]`. Its standard output is a third pipe, so nothing that a grader prints can be taken
for an answer. It imports the standard library, and the function.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from heatbath.ideas.importing import module_of

LENGTH = struct.Struct(">I")
START_SECONDS = 120.0  # for importing the function and its warm-up call, on a busy machine
LOW_PRIORITY_AFTER = 2.0  # times `slow_after`
LOOK_AGAIN = 0.05  # seconds
MAX_PRINTED = 1 << 20  # bytes that one task may print
TAIL = 4_000  # bytes of what a worker printed last, kept for messages
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")  # a worker is meant for one core
MAX_RESULT = 8 << 20  # bytes of JSON
MAX_MESSAGE = 500  # characters of an exception's last line
RECYCLE_AFTER = 5_000  # tasks, so that no parser's cache grows without bound
RECYCLE_SHARE = 0.25  # of the memory limit that a worker may have grown by since it was warm
CPU_GRACE = 2  # seconds of processor time past the deadline: the parent's kill comes first while there is a parent
# Of a machine's memory, what is added to a worker's own when the kernel looks for a process to end (per mille): the
# worker goes before the training run does.
OUT_OF_MEMORY_SCORE = 500


class WorkerLostError(Exception):
    """The worker is dead, or of no use any more. `killed` says by SIGKILL, which its task cannot be blamed for."""

    def __init__(self, reason: str, *, out_of_time: bool = False, killed: bool = False) -> None:
        super().__init__(reason)
        self.out_of_time, self.killed = out_of_time, killed


class Worker:
    """The parent's side of a worker process: its pipes, the task it has, and since when."""

    def __init__(
        self, function: str, *, deadline: float, slow_after: float, memory_gib: float, warm_up: Sequence[Any] | None
    ) -> None:
        """Starts the process. Raises OSError where the system refuses one."""
        self.deadline, self.slow_after = deadline, slow_after
        self._owner = os.getpid()
        self.ready = self.aside = self.low = False
        self.task: int | None = None
        self.served = self.printed = 0
        self.tail = b""
        self._inbox, self._outbox = bytearray(), memoryview(b"")
        source, self._to = os.pipe()
        self._from, sink = os.pipe()
        self._said, mouth = os.pipe()
        life, self._life = os.pipe()  # nothing is ever written to it: its end is the parent's
        for fd in (self._to, self._from, self._said):
            os.set_blocking(fd, False)
        command = [sys.executable, "-P", "-m", "heatbath.verify.worker", function, str(source), str(sink), str(life)]
        environment = {**dict.fromkeys(ONE_THREAD, "1"), **os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(p) for p in sys.path)
        try:
            # A group of its own, not a session: Ctrl-C passes it by, and priorities still count within the session.
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=mouth,
                stderr=mouth,
                pass_fds=(source, sink, life),
                env=environment,
                process_group=0,
            )
        except OSError:
            self.close_pipes()
            raise
        finally:
            for fd in (source, sink, mouth, life):
                os.close(fd)
        self.since = time.monotonic()
        self._send(
            {
                "deadline": deadline,
                "memory": int(memory_gib * 2**30),
                "warm_up": None if warm_up is None else list(warm_up),
                "pythonpath": os.environ.get("PYTHONPATH"),
            }
        )
        self._flush()

    def begin(self, task: int, arguments: list[Any]) -> None:
        self._send(arguments)
        self.task, self.since = task, time.monotonic()
        self.served += 1
        self.printed, self.tail = 0, b""
        self._flush()

    def look(self) -> bool:
        """Whether a starting worker has become ready. A dead one is left for its next holder to find."""
        with contextlib.suppress(WorkerLostError):
            self.exchange()
        return self.ready

    def interests(self) -> list[tuple[int, int]]:
        pairs = [(self._from, select.POLLIN)]
        if self._said >= 0:
            pairs.append((self._said, select.POLLIN))
        return [*pairs, (self._to, select.POLLOUT)] if self._outbox else pairs

    def next_change(self) -> float:
        """The moment, on the monotonic clock, to look at the worker if no pipe moves before."""
        if not self.ready:
            return self.since + START_SECONDS
        end = self.since + self.deadline
        if self.low:
            return end
        # A slow task waits for room aside, or for others to come and want its slot: look again now and then.
        slow = self.since + self.slow_after * (LOW_PRIORITY_AFTER if self.aside else 1.0)
        return min(end, max(slow, time.monotonic() + LOOK_AGAIN))

    def exchange(self) -> tuple[str, Any, float, bool] | None:
        """Reads and writes what the pipes have and take; an answer where a whole one is there."""
        self._flush()
        self._drain()
        if self.task is not None and self.printed > MAX_PRINTED:
            raise WorkerLostError(f"printed more than {MAX_PRINTED:,} bytes")
        try:
            while piece := os.read(self._from, 1 << 18):
                self._inbox += piece
                if len(self._inbox) > MAX_RESULT + LENGTH.size:
                    raise WorkerLostError(f"answered more than {MAX_RESULT:,} bytes")
        except BlockingIOError:
            return self._answer()
        raise self._death()

    def _answer(self) -> tuple[str, Any, float, bool] | None:
        if len(self._inbox) < LENGTH.size:
            return None
        end = LENGTH.size + LENGTH.unpack_from(self._inbox)[0]
        if end > MAX_RESULT + LENGTH.size or len(self._inbox) > end:
            raise WorkerLostError("its answer breaks the protocol")
        if len(self._inbox) < end:
            return None
        try:
            kind, value, seconds, exhausted = json.loads(self._inbox[LENGTH.size :])
        except (ValueError, TypeError, RecursionError) as error:
            raise WorkerLostError(f"its answer breaks the protocol: {error}") from error
        self._inbox = bytearray()
        self.ready = True
        return str(kind), value, float(seconds), bool(exhausted)

    def last_words(self) -> str:
        """The end of what it printed."""
        self._drain()
        return self.tail.decode(errors="replace").strip()

    def lower_priority(self) -> None:
        if not self.low:
            self.low, self._usual = True, os.getpriority(os.PRIO_PGRP, self.process.pid)
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PGRP, self.process.pid, 19)

    def restore_priority(self) -> bool:
        """Whether it has its usual priority again, which takes a privilege."""
        if self.low:
            try:
                os.setpriority(os.PRIO_PGRP, self.process.pid, self._usual)
            except OSError:
                return False
            self.low = False
        return True

    def signal_kill(self) -> None:
        """SIGKILL for the process and what it started."""
        if os.getpid() == self._owner and self.process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kills, closes and reaps."""
        self.signal_kill()
        self.close_pipes()
        with contextlib.suppress(subprocess.TimeoutExpired):  # then `subprocess` reaps it later
            self.process.wait(timeout=1.0)

    def close_pipes(self) -> None:
        for fd in (self._to, self._from, self._said, self._life):
            if fd >= 0:
                os.close(fd)
        self._to = self._from = self._said = self._life = -1

    def _send(self, message: Any) -> None:
        body = json.dumps(message).encode()
        self._outbox = memoryview(bytes(self._outbox) + LENGTH.pack(len(body)) + body)

    def _flush(self) -> None:
        """Writes what the pipe takes now. What a dead worker cannot take is dropped: its answer pipe tells."""
        try:
            while self._outbox:
                self._outbox = self._outbox[os.write(self._to, self._outbox) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self._outbox = memoryview(b"")

    def _drain(self) -> None:
        """Reads what it printed, some at a time: a flood must not keep this thread here."""
        with contextlib.suppress(BlockingIOError):
            for _ in range(16 if self._said >= 0 else 0):
                piece = os.read(self._said, 1 << 16)
                if not piece:
                    os.close(self._said)
                    self._said = -1
                    return
                self.printed += len(piece)
                self.tail = (self.tail + piece)[-TAIL:]

    def _death(self) -> WorkerLostError:
        """The reason of the end of the answer pipe."""
        try:
            code = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return WorkerLostError("closed its pipe without an answer")
        if code < 0:
            name = signal.Signals(-code).name
            hints = {"SIGKILL": " (by the kernel, for want of memory?)", "SIGXCPU": " (its processor time is used up)"}
            reason = f"killed by {name}{hints.get(name, '')}"
        else:
            reason = f"exited with status {code} before it answered"
        lines = self.last_words().splitlines()
        if self.ready and lines:
            reason += f"; last printed: {lines[-1][:MAX_MESSAGE]}"
        return WorkerLostError(reason, out_of_time=code == -signal.SIGXCPU, killed=code == -signal.SIGKILL)


# What follows runs in the worker process.


def main() -> None:
    name, source, sink, life = sys.argv[1], *map(int, sys.argv[2:5])
    for fd in (source, sink, life):
        os.set_inheritable(fd, False)
    sys.stdout = sys.stderr  # line by line, and unable to fail on any text
    _forget_inherited_signals()
    _die_with_parent(life)
    settings = receive(source)
    if settings is None:
        return
    _restore_environment(settings["pythonpath"])
    function = load(name)
    if settings["warm_up"] is not None:
        function(*settings["warm_up"])
    baseline = _memory()
    _limit_memory(int(settings["memory"]))
    growth = RECYCLE_SHARE * settings["memory"]
    send(sink, ["ready", None, 0.0, False])
    done = 0
    while (arguments := receive(source)) is not None:
        _limit_processor(settings["deadline"])
        kind, value, seconds, exhausted = _answer(function, arguments)
        done += 1
        exhausted = exhausted or done >= RECYCLE_AFTER or _memory() - baseline > growth
        send(sink, [kind, value, seconds, exhausted])


def load(name: str) -> Callable[..., Any]:
    """The function that `package.module:function` or `path/to/file.py:function` names."""
    home, _, attribute = name.rpartition(":")
    function = getattr(module_of(home), attribute)
    if not callable(function):
        raise TypeError(f"{name} is not a function")
    return function  # type: ignore[no-any-return]


def receive(fd: int) -> Any:
    """The next frame, or None where the parent has closed its end or is gone."""
    head = _read(fd, LENGTH.size)
    body = _read(fd, LENGTH.unpack(head)[0]) if head else b""
    return json.loads(body) if body else None


def send(fd: int, message: Any) -> None:
    """Writes a frame; a value that is no JSON, or too long, is sent as the failure it is."""
    try:
        body = json.dumps(message).encode()
        if len(body) > MAX_RESULT:
            failure = f"returned {len(body):,} bytes of JSON; at most {MAX_RESULT:,} are taken"
            body = json.dumps(["raised", failure, message[2], True]).encode()
    except (TypeError, ValueError, RecursionError, MemoryError) as error:
        failure = f"returned what JSON cannot hold: {error}"[:MAX_MESSAGE]
        body = json.dumps(["raised", failure, message[2], message[3]]).encode()
    view = memoryview(LENGTH.pack(len(body)) + body)
    while view:
        view = view[os.write(fd, view) :]


def _answer(function: Callable[..., Any], arguments: list[Any]) -> tuple[str, Any, float, bool]:
    """Kind, value or reason, seconds, and whether this process should be used no more."""
    started = time.perf_counter()
    try:
        value = function(*arguments)
    except BaseException as error:  # noqa: BLE001 - the process edge: whatever a grader raises is its answer
        import traceback

        last_line = traceback.format_exception_only(error)[-1].strip()[:MAX_MESSAGE]
        return "raised", last_line, time.perf_counter() - started, isinstance(error, MemoryError)
    return "done", value, time.perf_counter() - started, False


def _read(fd: int, count: int) -> bytes:
    """`count` bytes, or none at the end of the stream."""
    pieces: list[bytes] = []
    while count:
        piece = os.read(fd, min(count, 1 << 20))
        if not piece:
            return b""
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)


def _die_with_parent(fd: int) -> None:
    """From now on the kernel ends this process as soon as the last writer of `fd` is gone, whatever code is running.

    Nothing is ever written to that pipe, so the hang-up is its only event: the pipe of the tasks would not do, because
    a writer tells of its data after the reader may have read them. Linux; elsewhere (SIGIO is ignored) an orphan ends
    at its limit of processor time or at its next read.
    """
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)
    poll = select.poll()
    poll.register(fd, 0)
    if poll.poll(0):  # it hung up before the flag was set
        os._exit(0)


def _forget_inherited_signals() -> None:
    """What the parent blocks or ignores survives exec; the signals that end a worker must end it."""
    for number in (signal.SIGIO, signal.SIGXCPU, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(OUT_OF_MEMORY_SCORE))


def _restore_environment(pythonpath: str | None) -> None:
    """The search path was handed down as PYTHONPATH; programs that a grader starts get the user's own."""
    if pythonpath is None:
        os.environ.pop("PYTHONPATH", None)
    else:
        os.environ["PYTHONPATH"] = pythonpath


def _memory() -> int:
    """Resident bytes; where /proc is missing, their peak."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _limit_memory(room: int) -> None:
    """Address space: what the warm worker maps, and `room` bytes more. macOS refuses such a limit."""
    try:
        with open("/proc/self/statm", "rb") as file:
            mapped = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        mapped = 0
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (mapped + room, mapped + room))


def _limit_processor(deadline: float) -> None:
    """Moves the limit forward to this task's deadline: an orphan in C code, deaf to signals' handlers, ends by it."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(time.process_time() + deadline) + 1 + CPU_GRACE
    if hard != resource.RLIM_INFINITY:
        soft = min(soft, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


if __name__ == "__main__":
    main()
