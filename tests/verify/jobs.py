"""What the workers of test_pool.py run: honest functions, and tasks that hang, die or lie."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import Any


def echo(value: Any) -> Any:
    return value


def identify(value: Any, seconds: float = 0.0) -> list[Any]:
    time.sleep(seconds)
    return [value, os.getpid()]


def spin(seconds: float) -> float:
    """Busy for so much processor time."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
    return seconds


def niceness(seconds: float) -> int:
    """Its priority after so much work, or at least after a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return os.getpriority(os.PRIO_PROCESS, 0)


def hang(kind: str) -> Any:
    if kind == "power":
        return 9**9**9**9  # in C, holding the interpreter lock
    if kind == "loop":
        while True:
            pass
    if kind == "deaf":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)
    time.sleep(3600)


def mark_then_hang(path: str, kind: str) -> Any:
    with open(path, "w") as file:
        file.write(str(os.getpid()))
    return hang(kind)


def fail(kind: str) -> Any:
    if kind == "memory":
        hoard = []
        while True:
            hoard.append(bytearray(1 << 26))
    if kind == "exit":
        os._exit(0)
    if kind == "segfault":
        ctypes.string_at(0)
    if kind == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "quit":
        sys.exit(0)
    if kind == "set":
        return {1, 2}
    if kind == "large":
        return "x" * 50_000_000
    if kind == "flood":
        while True:
            print("x" * 1000)
    if kind == "forge":  # writes at random on every descriptor, as memory gone wrong might
        for fd in range(3, 64):
            try:
                os.write(fd, b"\x00\x00\x00\x04[[[[")
            except OSError:
                continue
        time.sleep(3600)
    raise ValueError("no such luck\nin two lines")


def talk(value: Any) -> Any:
    print("a result: [1, 2]")
    os.write(1, b"\x00\x00\x00\x02{}")
    subprocess.run(["echo", "from a child"], check=True)
    sys.stderr.write("\ud800")
    return value


def grow(size: int) -> int:
    KEPT.append(bytearray(os.urandom(1024) * (size // 1024)))
    return os.getpid()


KEPT: list[bytearray] = []
