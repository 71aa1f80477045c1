"""An interruption ends a command wherever it comes: SIGTERM counts as SIGINT does, and none is lost in a finaliser."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

AGAIN = 0.05
"""Seconds until an interruption that could not be raised is sent once more."""


def listen() -> None:
    """From here on SIGTERM raises KeyboardInterrupt, and one that Python would only print is raised later.

    Python cannot raise from a finaliser or a garbage collection: it prints "Exception ignored in …" and goes on, and a
    command that was told to end would run to its end.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)
    tell = sys.unraisablehook
    if tell.__module__ == __name__:  # heard already
        return

    def once_more(lost: UnraisableHookArgs) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt) and not sys.is_finalizing():
            again = threading.Timer(AGAIN, os.kill, (os.getpid(), signal.SIGTERM))
            again.daemon = True
            with suppress(RuntimeError):  # no thread begins once the interpreter ends
                again.start()
        else:
            tell(lost)

    sys.unraisablehook = once_more


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Whatever listens to SIGINT and SIGTERM at its end is replaced by what did at its beginning."""
    if threading.current_thread() is not threading.main_thread():  # only that one hears signals
        yield
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            if handler is not None:  # None: not Python's own
                signal.signal(number, handler)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt
