"""The program inside the sandbox: it runs model code in forked children and reports what came out of them.

Standard library only: its text is handed to a fresh interpreter (`sandbox.py`), which sees nothing of this package.
Expected values never come here, so nothing that model code reads or forges helps it: it must produce the values.

    stdin    job length (12 digits), job (JSON), secret (32 digits)
    stdout   frames: kind (1 byte), length (4 bytes), body
             H started   R results of the child (JSON lines)   O its standard output   C one child ended   E secret

The runner reads the secret after the last child has ended, so no child holds it; it is not dumpable, so a child of the
same user can neither read or write its memory nor open its pipes. With a process namespace of its own it is the first
process there: children cannot signal it, and it reaps them all. Children may starve it, and elsewhere stop or kill it:
then there is no E frame, and no verdict `right`.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import json
import os
import platform
import resource
import select
import signal
import struct
import sys
import time
import types
from typing import Any

MAX_DEPTH = 100  # of nested values
MAX_SIZE = 16_000_000  # of one value: items plus characters
MAX_COLLISIONS = 64  # members of one set, or keys of one dict, that share a hash
SMALL = 1 << 63  # larger integers travel as hexadecimal, whose reading is linear
POLL_MS = 20
SWEEP_SECONDS = 2.0  # for what a child left behind to end, once killed

# Model code needs none of these; each reaches memory that no limit counts, another process, or the kernel's corners.
FORBIDDEN = {  # name: (x86_64, aarch64)
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "bpf": (321, 280),
    "io_uring_setup": (425, 425),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
}
SOCKET = (41, 198)
FAMILIES = (1, 2, 10)  # unix, IPv4, IPv6: the other families are not all confined to a network namespace
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}


class NotPlainError(Exception):
    """A value that is not exactly one of the plain types, or too deep or too large."""


# Values --------------------------------------------------------------------------------------------------------------


def encode(value: Any) -> Any:
    """JSON form of plain data: exact types only, so nothing that arrives can bring its own `__eq__`."""
    return _Encoder().encode(value, 0)


class _Encoder:
    def __init__(self) -> None:
        self.left = MAX_SIZE

    def encode(self, value: Any, depth: int) -> Any:
        kind = type(value)
        size = len(value) if kind in (str, bytes) else value.bit_length() // 4 if kind is int else 0
        self.left -= 1 + size
        if self.left < 0 or depth > MAX_DEPTH:
            raise NotPlainError("a value too large or too deep")
        if value is None or kind in (bool, str, float):
            return value
        if kind is int:
            return value if -SMALL < value < SMALL else ["i", hex(value)]
        if kind is complex:
            return ["c", value.real, value.imag]
        if kind is bytes:
            return ["b", value.hex()]
        if kind in _SEQUENCES:
            return [_SEQUENCES[kind], *(self.encode(item, depth + 1) for item in value)]
        if kind in _MAPPINGS:
            pairs = [part for pair in dict.items(value) for part in pair]
            return ["d", *(self.encode(part, depth + 1) for part in pairs)]
        raise NotPlainError(f"a value of type {kind.__name__}")


_SEQUENCES: dict[type, str] = {list: "l", tuple: "t", set: "s", frozenset: "f"}
_MAPPINGS = (dict, collections.Counter, collections.OrderedDict, collections.defaultdict)  # each equal to its dict


def decode(wire: Any, depth: int = 0) -> Any:
    """The value of a JSON form; ValueError if it is none. Bounded: also where the form was written by an enemy."""
    if depth > MAX_DEPTH:  # as in `encode`: what one of them takes, the other does
        raise ValueError("not an encoded value")
    if wire is None or type(wire) in (bool, int, float, str):
        return wire
    if type(wire) is not list or not wire or type(wire[0]) is not str:
        raise ValueError("not an encoded value")
    tag, body = wire[0], wire[1:]
    if tag in ("i", "b") and len(body) == 1 and type(body[0]) is str:
        return int(body[0], 16) if tag == "i" else bytes.fromhex(body[0])
    if tag == "c" and len(body) == 2 and all(type(part) is float for part in body):
        return complex(*body)
    items = [decode(item, depth + 1) for item in body]
    if tag in ("l", "t"):
        return items if tag == "l" else tuple(items)
    try:
        if tag in ("s", "f"):
            return set(spread(items)) if tag == "s" else frozenset(spread(items))
        if tag == "d" and len(items) % 2 == 0:
            return dict(zip(spread(items[::2]), items[1::2], strict=True))
    except TypeError as error:
        raise ValueError("an unhashable member or key") from error
    raise ValueError("not an encoded value")


def spread(items: list[Any]) -> list[Any]:
    """`items`, unless so many share a hash that a set of them would take quadratic time."""
    counts = collections.Counter(hash(item) for item in items)
    if counts and max(counts.values()) > MAX_COLLISIONS:
        raise ValueError("too many members with one hash")
    return items


# The child: limits, then model code ----------------------------------------------------------------------------------


def _confine(job: dict[str, Any]) -> None:
    """Limits of one process, and the system calls it may not make."""
    cpu = int(job["seconds"]) + 2
    for name, limit in (
        ("RLIMIT_CORE", 0),
        ("RLIMIT_CPU", cpu),
        ("RLIMIT_FSIZE", job["file_bytes"]),
        ("RLIMIT_NOFILE", 128),
        ("RLIMIT_AS", job["memory_bytes"]),
        *((("RLIMIT_NPROC", job["processes"]),) if job["alone"] else ()),
    ):
        with contextlib.suppress(ValueError, OSError):  # not every system has each; the isolation level says which hold
            resource.setrlimit(getattr(resource, name), (limit, limit))
    machine = ARCHITECTURES.get(platform.machine())
    if machine is None or sys.platform != "linux":
        return
    index, architecture = machine
    denied = [numbers[index] for numbers in FORBIDDEN.values()]
    load, equal, above, answer = 0x20, 0x15, 0x35, 0x06  # BPF: load a word, jump if equal, jump if at least, return
    tail = len(FAMILIES) + 1  # from the last number check to the denial, with one more instruction between
    checks = [(above, len(denied) + tail + 2, 0, 0x40000000)]  # the x32 calls, numbered anew
    checks += [(equal, len(denied) - i + tail + 1, 0, number) for i, number in enumerate(denied)]
    program = [
        (load, 0, 0, 4),
        (equal, 1, 0, architecture),
        (answer, 0, 0, 0x80000000),  # another architecture's calls: kill
        (load, 0, 0, 0),
        *checks,
        (equal, 1, 0, SOCKET[index]),
        (answer, 0, 0, 0x7FFF0000),  # allow
        (load, 0, 0, 16),  # the family
        *((equal, len(FAMILIES) - i, 0, family) for i, family in enumerate(FAMILIES)),
        (answer, 0, 0, 0x00050001),  # refuse with EPERM
        (answer, 0, 0, 0x7FFF0000),
    ]
    packed = b"".join(struct.pack("HBBI", *line) for line in program)
    code = ctypes.create_string_buffer(packed, len(packed))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    place = ctypes.create_string_buffer(header, len(header))
    if _prctl(38, 1) or _prctl(22, 2, ctypes.addressof(place)):  # no new privileges, which the filter presupposes
        os._exit(97)


def _prctl(option: int, *arguments: int) -> int:
    if sys.platform != "linux":
        return 0
    words = [ctypes.c_ulong(word) for word in (*arguments, 0, 0, 0, 0)[:4]]
    return int(ctypes.CDLL(None).prctl(option, *words))


def _dumpable(value: int) -> None:
    _prctl(4, value)


class _Child:
    """One process of model code. Whatever it writes is data: it is believed in nothing."""

    def __init__(self, job: dict[str, Any], results: int) -> None:
        self.job, self.results = job, results
        self._write, self._dumps = os.write, json.dumps  # model code may replace both

    def tell(self, *record: Any) -> None:
        text = (self._dumps(record) + "\n").encode("ascii")
        while text:
            text = text[self._write(self.results, text) :]

    def run(self) -> int:
        """The exit code; the last record of a run that failed says at which test (-1: before the first)."""
        at = -1
        try:
            namespace = self._load()
            if namespace is None:
                return 1
            for at, test in enumerate(self._tests(namespace)):
                self.tell("value", at, test)
        except NotPlainError as error:
            self.tell("odd", at + 1, str(error))
            return 1
        except BaseException as error:  # noqa: BLE001 - the process edge: sys.exit() and all else is a result
            code = getattr(error, "code", 1)
            if self.job["mode"] == "stdin" and type(error) is SystemExit and code in (None, 0):
                return 0
            self.tell("error", at + 1, type(error).__name__[:80], str(error)[:200])
            return 1
        return 0

    def _load(self) -> dict[str, Any] | None:
        """The namespace after the first source that compiles has run."""
        name = "__main__" if self.job["mode"] == "stdin" else "program"
        module = types.ModuleType(name)
        module.__dict__.update(exit=sys.exit, quit=sys.exit)
        sys.modules[name] = module
        problem = ""
        for index, source in enumerate(self.job["sources"]):
            try:
                code = compile(source, "<program>", "exec", dont_inherit=True)
            except (SyntaxError, ValueError, RecursionError) as error:  # ValueError: a NUL or half a surrogate pair
                problem = problem or f"{type(error).__name__}: {error}"
                continue
            self.tell("program", index)
            exec(code, module.__dict__)  # noqa: S102 - this is the sandbox
            self.tell("loaded")
            return module.__dict__
        self.tell("unreadable", problem[:200])
        return None

    def _tests(self, namespace: dict[str, Any]) -> Any:
        job = self.job
        for name in job["defines"]:
            if name not in namespace:
                raise NameError(f"{name} is not defined")
        if job["mode"] == "call":
            function = namespace[job["entry_point"]]
            for arguments in job["inputs"]:
                yield self._plain(function(*decode(arguments)))
        elif job["mode"] == "eval":
            namespace.update({name: decode(wire) for name, wire in job["names"].items()})
            for source in job["setup"]:
                exec(compile(source, "<setup>", "exec", dont_inherit=True), namespace)  # noqa: S102 - as above
            for source in job["expressions"]:
                yield self._plain(eval(compile(source, "<test>", "eval", dont_inherit=True), namespace))  # noqa: S307
        elif "threading" in sys.modules:
            sys.modules["threading"]._shutdown()  # a program that solves its task in a thread is waited for

    def _plain(self, value: Any) -> Any:
        if self.job["reduce"] == "not none" and type(value) is not bool:
            return value is not None
        try:
            return encode(value)
        except NotPlainError:
            if self.job["reduce"] == "truth":
                return bool(value)
            raise


def _become_child(job: dict[str, Any], stdin: int, output: int, results: int) -> None:
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for source, target in ((stdin if stdin >= 0 else null, 0), (output, 1), (null, 2), (results, 3)):
        os.dup2(source, target)
    os.closerange(4, 4096)
    leave = os._exit  # model code may replace it
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", errors="replace", closefd=False))
    code = 96
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _dumpable(1)  # without it, /dev/stdin could not be opened
        _confine(job)
        code = _Child(job, 3).run()
        sys.stdout.flush()
    finally:
        leave(code)  # no exit handlers: they are model code too


# The runner ----------------------------------------------------------------------------------------------------------


class _Runner:
    def __init__(self, job: dict[str, Any]) -> None:
        self.job, self.left = job, job["output_bytes"]
        self.ends_at = time.monotonic() + job["seconds"]

    def run_all(self) -> None:
        for stdin in self.job["stdin"] or [None]:
            if not self._run_one(stdin):
                return

    def _run_one(self, stdin: str | None) -> bool:
        """Whether the child ended by itself with code 0."""
        began = time.monotonic()
        source = -1
        if stdin is not None:
            source = os.open(f"input-{os.getpid()}", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            os.unlink(f"input-{os.getpid()}")
            text = stdin.encode("utf-8", "replace")
            while text:
                text = text[os.write(source, text) :]
            os.lseek(source, 0, os.SEEK_SET)
        results, results_in = os.pipe()
        output, output_in = os.pipe()
        pid = os.fork()
        if pid == 0:
            _become_child(self.job, source, output_in, results_in)
        for descriptor in (results_in, output_in, *([source] if source >= 0 else [])):
            os.close(descriptor)
        how, status, cpu = self._watch(pid, {results: b"R", output: b"O"})
        code = os.waitstatus_to_exitcode(status)
        if how == "exit" and code < 0:
            how, code = "signal", -code
        seconds = time.monotonic() - began
        _frame(b"C", json.dumps({"how": how, "code": code, "cpu": cpu, "wall": seconds}).encode())
        os.close(results)
        os.close(output)
        return how == "exit" and code == 0

    def _watch(self, pid: int, pipes: dict[int, bytes]) -> tuple[str, int, float]:
        """How the child ended, its wait status and its processor seconds."""
        poll, open_pipes, how = select.poll(), dict(pipes), "exit"
        for descriptor in pipes:
            os.set_blocking(descriptor, False)
            poll.register(descriptor, select.POLLIN)
        poll.register(1, 0)  # says when nobody listens any more: the caller was killed
        looked = 0.0
        while True:
            for descriptor, _ in poll.poll(POLL_MS if open_pipes else 1):
                if descriptor == 1:
                    self.ends_at = 0.0
                elif not self._relay(descriptor, open_pipes[descriptor]):
                    poll.unregister(descriptor)
                    del open_pipes[descriptor]
            ended = _reaped(pid)
            now = time.monotonic()
            if ended:
                status, usage = ended
                break
            if self.left < 0:
                how = "output"
            elif now > self.ends_at:
                how = "deadline"
            elif now - looked > POLL_MS / 1000:
                looked = now
                how = "memory" if self._resident() > self.job["memory_bytes"] else how
            if how != "exit":
                os.kill(pid, signal.SIGKILL)
                _, status, usage = os.wait4(pid, 0)
                break
        self._sweep(pid)
        for descriptor, kind in open_pipes.items():
            while self._relay(descriptor, kind):
                pass
        return "output" if self.left < 0 else how, status, usage.ru_utime + usage.ru_stime

    def _relay(self, descriptor: int, kind: bytes) -> bool:
        """Passes on what a pipe holds; False at its end, when it is empty, and beyond the limit."""
        try:
            data = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return False
        self.left -= len(data)
        if data and self.left >= 0 and (kind == b"R" or self.job["stdin"]):
            _frame(kind, data)
        return bool(data) and self.left >= 0

    def _resident(self) -> int:
        """Bytes in memory of all processes of the sandbox. Without its own process namespace: unknown, 0."""
        pages = 0
        for name in self._others() if self.job["alone"] else ():
            with contextlib.suppress(OSError, IndexError), open(f"/proc/{name}/statm") as file:
                pages += int(file.read().split()[1])
        return pages * resource.getpagesize()

    def _others(self) -> list[str]:
        """Processes of the namespace but this one."""
        return [name for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]

    def _sweep(self, pid: int) -> None:
        """Ends what the child left behind: in a process namespace of its own everything, else its process group."""
        if not self.job["alone"]:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            return
        ends_at = time.monotonic() + SWEEP_SECONDS
        with contextlib.suppress(ChildProcessError):  # orphans are this process's children: no child, no process
            while time.monotonic() < ends_at:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(-1, signal.SIGKILL)  # all but this one
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
                time.sleep(0.001)
            sys.exit(94)  # the namespace ends with this process, and without its secret


def _reaped(pid: int) -> tuple[int, Any] | None:
    """Wait status and usage of `pid` if it has ended; reaps orphans that have, which count as processes till then."""
    for _ in range(256):  # a program may make them faster than this
        ended, status, usage = os.wait4(-1, os.WNOHANG)
        if ended in (0, pid):
            return (status, usage) if ended else None
    return None


def _frame(kind: bytes, body: bytes) -> None:
    data = struct.pack(">cI", kind, len(body)) + body
    while data:
        data = data[os.write(1, data) :]


def _read(count: int) -> bytes:
    data = b""
    while len(data) < count:
        part = os.read(0, count - len(data))
        if not part:
            sys.exit(95)
        data += part
    return data


def main() -> None:
    _dumpable(0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which the first process of a namespace is not sent from within
    job = json.loads(_read(int(_read(12))))
    _frame(b"H", b"")
    _Runner(job).run_all()
    _frame(b"E", _read(32))


if __name__ == "__main__":
    main()
