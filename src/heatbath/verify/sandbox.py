"""Where model code runs: one fresh interpreter per program, confined by bubblewrap, killed at its deadline.

What is started here is `inside.py`; it is told what to run on its standard input and answers in frames on its standard
output. No thread is waited for and no signal handler used, so any thread or forked process may call `run`.

As root, an outer bubblewrap makes the file system (the interpreter may lie where only root can read), the uid drops to
65534, and an inner one makes the namespaces: so limits on processes hold, which they do not for root.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import select
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from heatbath.verify.inside import decode
from heatbath.verify.verdict import Status

BUBBLEWRAP = "bubblewrap"
UNISOLATED = "none: run model code as my own user"
LEVELS = (BUBBLEWRAP, UNISOLATED)

NOBODY = "65534"
FILE_BYTES = 64 << 20  # of the private /tmp, and of any one file
PROCESSES = 64  # processes and threads of one program
START_SECONDS = 10.0  # for bubblewrap and the interpreter to start on a busy machine
END_SECONDS = 3.0  # for our runner to report after the program's deadline, which it enforces itself
STDERR_BYTES = 8 << 10
END_BYTES = 1000  # of what the runner says of a child's end
ENDS = ("exit", "signal", "deadline", "memory", "output")
CPU_SIGNAL = 24
OLDEST = (0, 8)  # of bubblewrap: the first with --disable-userns
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
FLAGS = ("-s", "-S", "-P", "-B", "-X", "utf8")  # only the standard library, and the same order of sets in every run


@dataclass(frozen=True)
class Limits:
    """Of one program: wall seconds, bytes of results and output of all its tests, and memory of all its processes."""

    seconds: float = 10.0
    memory_gib: float = 2.0
    output_bytes: int = 16 << 20


@dataclass(frozen=True)
class Case:
    """One process of model code. `how` is exit, signal, deadline, memory or output; `code` the exit code or signal."""

    how: str
    code: int
    cpu_seconds: float
    seconds: float
    results: bytes
    output: bytes


@dataclass(frozen=True)
class Outcome:
    """`complete` says that our own runner saw the end of every process it reports; `refusal` why nothing was run."""

    cases: tuple[Case, ...] = ()
    complete: bool = False
    late: bool = False
    refusal: str = ""


@dataclass
class _Frames:
    """What has arrived so far. The runner writes frames in order; after one that is none of its own, all is lost."""

    data: bytearray = field(default_factory=bytearray)
    cases: list[Case] = field(default_factory=list)
    started: bool = False
    lost: bool = False
    secret: bytes = b""
    results: bytearray = field(default_factory=bytearray)
    output: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> None:
        self.data += data
        at = 0
        while len(self.data) - at >= 5 and not self.lost:
            kind, length = struct.unpack_from(">cI", self.data, at)
            if len(self.data) - at - 5 < length:
                break
            self._take(kind, bytes(self.data[at + 5 : at + 5 + length]))
            at += 5 + length
        del self.data[:at]

    def _take(self, kind: bytes, body: bytes) -> None:
        if kind == b"H":
            self.started = True
        elif kind == b"R":
            self.results += body
        elif kind == b"O":
            self.output += body
        elif kind == b"E":
            self.secret = body
        elif kind == b"C" and (case := self._case(body)):
            self.cases.append(case)
            self.results, self.output = bytearray(), bytearray()
        else:
            self.lost = True

    def _case(self, body: bytes) -> Case | None:
        """None if the runner cannot have said this."""
        try:
            end = json.loads(body[: END_BYTES + 1])
            how, code, cpu, wall = end["how"], end["code"], end["cpu"], end["wall"]
        except (ValueError, TypeError, LookupError, RecursionError):
            return None
        numbers = type(code) is int and all(type(part) in (int, float) and 0 <= part < 1e9 for part in (cpu, wall))
        if how not in ENDS or not numbers or abs(code) > 1000:
            return None
        return Case(how, code, cpu, wall, bytes(self.results), bytes(self.output))


def run(job: Mapping[str, Any], limits: Limits, isolation: str) -> Outcome:
    """Runs one job of `inside.py`; on return every process it started has ended, or been killed and is ending.

    `job` has `mode` (call, eval or stdin), `sources` (the first that compiles is run) and what that mode reads.
    """
    reason = available(isolation)
    return Outcome(refusal=reason) if reason else _run(job, limits, isolation)


def _run(job: Mapping[str, Any], limits: Limits, isolation: str) -> Outcome:
    defaults: dict[str, Any] = {"inputs": [], "entry_point": "", "defines": [], "reduce": "", "stdin": []}
    defaults |= {"expressions": [], "setup": [], "names": {}}
    settings = {
        "seconds": limits.seconds,
        "memory_bytes": int(limits.memory_gib * (1 << 30)),
        "file_bytes": FILE_BYTES,
        "output_bytes": limits.output_bytes,
        "processes": PROCESSES,
        "alone": isolation == BUBBLEWRAP,
    }
    text = json.dumps({**defaults, **job, **settings}).encode("ascii")
    secret = secrets.token_hex(16).encode("ascii")
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        stdin.write(b"%012d" % len(text) + text + secret)
        stdin.seek(0)
        try:
            process = subprocess.Popen(
                _command(isolation),
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=ENVIRONMENT,
                cwd=folder,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(refusal=f"{isolation}: {error}")
        with process:
            frames, errors, late = _listen(process, limits)
    if not (frames.started or late or frames.lost):
        return Outcome(refusal=f"{isolation} did not start: {errors.strip()[-300:] or 'no reason given'}")
    return Outcome(tuple(frames.cases), frames.secret == secret and not frames.lost, late)


def _listen(process: subprocess.Popen[bytes], limits: Limits) -> tuple[_Frames, str, bool]:
    """What it says, what it complains of, and whether it was late; bounded, and killed in every case."""
    frames, errors, late, started = _Frames(), bytearray(), False, False
    ends_at, left = time.monotonic() + START_SECONDS, 2 * limits.output_bytes
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(_open(process.stdout), selectors.EVENT_READ)
            selector.register(_open(process.stderr), selectors.EVENT_READ)
            while selector.get_map() and not (frames.secret or frames.lost or late) and left > 0:
                ready = selector.select(max(0.0, ends_at - time.monotonic()))
                late = not ready
                for key, _ in ready:
                    data = os.read(key.fd, 1 << 16)
                    left -= len(data)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.fileobj is process.stdout:
                        frames.feed(data)
                    elif len(errors) < STDERR_BYTES:
                        errors += data
                if frames.started and not started:
                    started, ends_at = True, time.monotonic() + limits.seconds + END_SECONDS
                late = late or time.monotonic() > ends_at
    finally:
        _end(process, by_itself=bool(frames.secret))
    return frames, errors.decode("utf-8", "replace"), late


def _open(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None  # both are pipes
    return stream


def _end(process: subprocess.Popen[bytes], *, by_itself: bool) -> None:
    """Waits for the end of every process, which our runner's is; else kills them.

    Bubblewrap's processes die with their parents and a process namespace with its first process, which bubblewrap
    waits for. Killed, they still end one after the other: their pipes say when.
    """
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(END_SECONDS if by_itself else 0)
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.wait()
    ends_at = time.monotonic() + END_SECONDS
    for stream in (_open(process.stdout), _open(process.stderr)):
        while select.select([stream], [], [], max(0.0, ends_at - time.monotonic()))[0] and os.read(
            stream.fileno(), 1 << 16
        ):
            pass


# What a run says -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Values:
    """The plain values one child produced, or what was made of each, in order; and why there is not one more."""

    values: tuple[Any, ...] = ()
    ran: bool = False  # a child was started
    source: int | None = None  # which of the job's sources it compiled
    loaded: bool = False
    failure: tuple[Status, str] | None = None
    seconds: float = 0.0


def read_values(
    outcome: Outcome, count: int, take: Callable[[int, Any], Any] | None = None, room: Sequence[int] = ()
) -> Values:
    """What a call or eval job left. `take` (place, value) is given each value as it is decoded, till it returns False.

    `room` bounds the items of each value, before it is decoded. Forged records are only data: the worst of them is a
    wrong value.
    """
    if not outcome.cases:
        return Values(failure=lost(outcome))
    case = outcome.cases[0]
    values, source, loaded = list[Any](), None, False
    said: tuple[Status, str] | None = None
    for line in case.results.split(b"\n", count + 3)[: count + 3]:
        if not line:
            continue
        try:
            if room and line.count(b"[") + line.count(b",") > room[min(len(values), len(room) - 1)]:
                said = ("wrong", "a value far larger than the right one")
                break
            record = json.loads(line)
            if record[0] == "value" and record[1] == len(values) and len(values) < count:
                value = decode(record[2])
                values.append(take(len(values), value) if take else value)
                if take and values[-1] is False:
                    break
            elif record[0] == "program":
                source = source if source is not None else int(record[1])
            elif record[0] != "loaded":
                said = _complaint(record)
                break
            loaded = loaded or record[0] == "loaded"
        except (ValueError, TypeError, LookupError, RecursionError, OverflowError):
            said = ("wrong", "unreadable results")
            break
    failure = None
    if said or len(values) != count or not outcome.complete or (case.how, case.code) != ("exit", 0):
        failure = _violent_end(outcome, case) or said or ("wrong", f"it ended early (exit code {case.code})")
    return Values(tuple(values), True, source, loaded, failure, case.seconds)


def _complaint(record: list[Any]) -> tuple[Status, str]:
    """Of the record with which a child ended early."""
    kind, *rest = record
    if kind == "unreadable":
        return "wrong", f"it does not compile: {str(rest[0])[:120]}"
    if kind == "odd":
        return "wrong", f"not plain data, but {str(rest[1])[:120]}"
    if kind == "error":
        name, text = str(rest[1])[:60], str(rest[2])[:120]
        return (
            ("crashed", "out of memory") if name == "MemoryError" else ("wrong", f"raised {name}: {text}".rstrip(": "))
        )
    return "wrong", "unreadable results"


def lost(outcome: Outcome) -> tuple[Status, str]:
    if outcome.refusal:
        return "refused", outcome.refusal
    return ("timeout", "the sandbox did not end in time") if outcome.late else ("crashed", "the sandbox was killed")


def _violent_end(outcome: Outcome, case: Case) -> tuple[Status, str] | None:
    """None for a process that ended by itself."""
    if case.how == "deadline" or (case.how, case.code) == ("signal", CPU_SIGNAL):
        return "timeout", f"no end within {case.seconds:.3g} s, {case.cpu_seconds:.2g} s of them computing"
    if case.how == "memory":
        return "crashed", "out of memory"
    if case.how == "output":
        return "refused", "too much output"
    if case.how == "signal":
        return "crashed", f"killed by signal {case.code}"
    return None if outcome.complete else lost(outcome)


# Commands ------------------------------------------------------------------------------------------------------------


def _command(isolation: str) -> list[str]:
    program = [str(_interpreter()), *FLAGS, "-c", _inside()]
    return program if isolation == UNISOLATED else [*_bubblewrap(), *program]


@functools.cache
def _inside() -> str:
    return Path(__file__).with_name("inside.py").read_text(encoding="utf-8")


@functools.cache
def _interpreter() -> Path:
    """The interpreter itself: a virtual environment's is a link to it."""
    return Path(getattr(sys, "_base_executable", None) or sys.executable).resolve()


@functools.cache
def _bubblewrap() -> tuple[str, ...]:
    inner = [
        *("bwrap", "--unshare-all", "--unshare-user", "--disable-userns", "--die-with-parent", "--new-session"),
        "--as-pid-1",  # bubblewrap's own first process could be written to by any other of its user
        *("--uid", NOBODY, "--gid", NOBODY, "--cap-drop", "ALL"),
    ]
    if os.geteuid() == 0:
        outer = ["bwrap", "--die-with-parent", *_system(), "--dev", "/dev", "--bind", "/proc", "/proc", "--dir", "/tmp"]
        drop = ["setpriv", "--reuid", NOBODY, "--regid", NOBODY, "--clear-groups", "--no-new-privs", "--"]
        start, end = [*outer, "--", *drop, *inner, "--ro-bind", "/", "/"], []
    else:
        start, end = [*inner, *_system()], ["--remount-ro", "/"]
    private = [
        *("--dev", "/dev", "--remount-ro", "/dev", "--proc", "/proc"),
        *("--size", str(FILE_BYTES), "--tmpfs", "/tmp", *end, "--chdir", "/tmp", "--"),
    ]
    return (*start, *private)


def _system() -> list[str]:
    """What of the host can be seen, and only read: its libraries and programs, and this interpreter."""
    options = ["--perms", "0755", "--dir", "/etc"]
    for name in ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc/ld.so.cache"):
        options += ["--ro-bind-try", name, name]
    interpreter = _interpreter()
    prefix = interpreter.parent.parent
    if not interpreter.is_relative_to("/usr"):
        for parent in reversed(interpreter.parents):
            if parent != Path("/"):
                options += ["--perms", "0755", "--dir", str(parent)]
        for path in (interpreter, prefix / "lib", prefix / "lib64"):
            options += ["--ro-bind-try", str(path), str(path)]
    return options


# Whether it works ----------------------------------------------------------------------------------------------------


def available(isolation: str) -> str | None:
    """None where programs can be run at this level; else what is missing, and what to do."""
    if isolation not in LEVELS:
        return f"unknown isolation {isolation!r}: choose one of {', '.join(map(repr, LEVELS))}"
    if isolation in _WORKING:
        return None
    reason = _missing() if isolation == BUBBLEWRAP else None
    if reason is None:
        outcome = _run({"mode": "eval", "sources": [""], "expressions": ["6 * 7"]}, Limits(), isolation)
        if outcome.complete and b'["value", 0, 42]' in outcome.cases[0].results:
            _WORKING.add(isolation)
            return None
        reason = outcome.refusal or "it started, but did not answer"
    if isolation == BUBBLEWRAP:
        reason += f'; repair that, or choose isolation = "{UNISOLATED}"'
    return reason


_WORKING: set[str] = set()


def _missing() -> str | None:
    for program, package in (("bwrap", "bubblewrap"), ("setpriv", "util-linux")):
        if shutil.which(program) is None and (program == "bwrap" or os.geteuid() == 0):
            return f"{program} is not installed (apt-get install {package})"
    said = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, check=False).stdout
    version = tuple(int(part) for part in re.findall(r"\d+", said)[:2])
    return None if version >= OLDEST else f"bubblewrap {'.'.join(map(str, OLDEST))} or later is needed, not {said!r}"
