"""One mutated input, the command it is given to, and what may come of it.

A case says whether it must be refused, must be taken or may be either, and what a refusal has to name. Whatever the
case, no exception may leave the command line, and a refusal has to say what is wrong, where, and what to do.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any, Literal
from unittest import mock

MOST_CHARACTERS = 6_000  # of a message; a mistake is not explained by printing a file
SECONDS = 60.0
Must = Literal["refused", "taken", "either"]


@dataclass(frozen=True)
class Case:
    """`names`: a refusal holds at least one text of each tuple. `kept`: key → value that a recipe which is taken must
    come to. `isolated`: it may change the process it runs in, and gets one of its own."""

    kind: str
    argv: tuple[str, ...]
    files: dict[str, bytes | None] = field(default_factory=dict)  # None: an empty folder
    must: Must = "either"
    names: tuple[tuple[str, ...], ...] = ()
    kept: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    before: Callable[[Path], None] | None = None
    isolated: bool = False
    listed: bool = False  # `heatbath grade` lists the rows that it leaves ungraded, and goes on


@dataclass(frozen=True)
class Outcome:
    """What came of a case. `escaped` is the traceback of an exception that left the command line."""

    code: int
    said: str
    printed: str = ""
    escaped: str = ""
    resolved: dict[str, Any] | None = None


class Hung(BaseException):
    """A case took longer than `SECONDS`."""


def observe(case: Case, folder: Path) -> Outcome:
    """Runs the case's command in that folder, which holds its files then."""
    for name, content in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.mkdir(exist_ok=True)
        else:
            path.write_bytes(content)
    if case.before is not None:
        case.before(folder)
    out, err = (TextIOWrapper(BytesIO(), "utf-8", how, newline="") for how in ("strict", "backslashreplace"))
    code, escaped, resolved = 0, "", None
    with _there(folder), _limited(SECONDS):
        with (
            mock.patch.object(sys, "argv", ["heatbath", *case.argv]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code, escaped = _called()
        if code == 0 and not escaped and case.kept:
            resolved = _resolved(case)
    out.flush(), err.flush()
    texts = [stream.buffer.getvalue().decode("utf-8", "replace") for stream in (err, out)]
    return Outcome(code, *texts, escaped, resolved)


def _called() -> tuple[int, str]:
    """The exit code of the console script, and what escaped it."""
    from heatbath import cli

    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0), ""
    except BaseException:  # noqa: BLE001 - whatever leaves is what is looked for
        return 1, traceback.format_exc()
    return 0, ""


def _resolved(case: Case) -> dict[str, Any]:
    from heatbath import recipe as recipes

    made = recipes.load(case.argv[1], [text for text in case.argv[2:] if not text.startswith("--")])
    return recipes.flat(made.model_dump(mode="json"))


@contextlib.contextmanager
def _there(folder: Path) -> Iterator[None]:
    here = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hung(f"{seconds:g} seconds")

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def failures(case: Case, seen: Outcome) -> list[str]:
    """Why the outcome is not what the case demands; empty where it is."""
    if seen.escaped:
        return [f"escaped: {seen.escaped.strip().splitlines()[-1][:200]}"]
    if seen.code == 0:
        return _of_taken(case, seen)
    found = []
    if seen.code != 2:
        found.append(f"exit code {seen.code}")
    told = re.search(r"(?m)^error: ", seen.said)
    said = seen.said[told.start() :] if told else seen.said
    if case.must == "taken":
        found.append("refused, and must be taken")
    if case.listed and '"unreadable"' in seen.said:
        return found + _unlisted(case, seen.said)
    for part in ("error: ", "\n  where:  ", "\n  remedy: "):
        if part not in said:
            found.append(f"no {part.strip()!r} in the message")
    found += _unreadable(said)
    found += [f"names none of {', '.join(wanted)}" for wanted in case.names if not any(n in said for n in wanted)]
    return found


def _unlisted(case: Case, said: str) -> list[str]:
    """Rows that the summary of `heatbath grade` does not name, of those the case says."""
    found = json.loads(said)
    rows = {row["row"] for row in found["unreadable_rows"]}
    rows |= {failure["first"]["row"] for status, failure in found["failures"].items() if status == "bad_gold"}
    wanted = [int(name) for names in case.names for name in names if name.isdigit()]
    return [f"row {number} is not listed" for number in wanted if number not in rows] + ["no row is listed"] * (
        not rows
    )


def _unreadable(said: str) -> list[str]:
    """What makes a message hard to read for a person."""
    found = []
    if len(said) > MOST_CHARACTERS:
        found.append(f"a message of {len(said):,} characters")
    if any(not c.isprintable() and c != "\n" for c in said):
        found.append("control characters in the message")
    if leaked := re.search(r"Traceback|<class |object at 0x|pydantic\.dev|NoneType|<function|PydanticU", said):
        found.append(f"{leaked[0]!r} in the message")
    return found


def _of_taken(case: Case, seen: Outcome) -> list[str]:
    if case.must == "refused":
        return ["taken, and must be refused"]
    resolved = seen.resolved or {}
    return [
        f"{key} was set to {value!r} and came to {resolved.get(key)!r}"
        for key, value in case.kept.items()
        if not _same(resolved.get(key), value)
    ]


def _same(found: Any, given: Any) -> bool:
    if isinstance(given, list) and isinstance(found, list):
        return len(found) == len(given) and all(map(_same, found, given))
    if isinstance(found, bool) != isinstance(given, bool):
        return False
    if isinstance(found, int | float) and isinstance(given, str):  # a number in quotes
        return given.replace("_", "").strip() not in ("", "nan") and float(given) == found
    return bool(found == given)


def outcome(case: Case) -> Outcome:
    """That of the case in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="mutated-") as name:
        return observe(case, Path(name))
