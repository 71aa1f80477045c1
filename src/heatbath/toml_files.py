"""TOML as people write it: what a file or a value holds, or a RecipeError that says in which line it is wrong.

Importing this module imports no torch.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from heatbath.errors import RecipeError

REMEDY = "see https://toml.io"


def read(file: Path, where: str, remedy: str) -> dict[str, Any]:
    """The tables of a file, a byte order mark in front of it or not. `remedy` is for one that cannot be read."""
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise RecipeError(f"cannot read the file: {error}", where, remedy) from None
    try:
        return parsed(raw.decode("utf-8-sig"), where)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        what = f"not UTF-8 at line {line}: byte 0x{raw[error.start]:02x}"
        raise RecipeError(what, where, "save the file as UTF-8") from None


def parsed(text: str, where: str) -> dict[str, Any]:
    """The tables of a text."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"not valid TOML: {error}", where, REMEDY) from None
    except RecursionError:
        at = _line(text, lambda line: line.count("[") + line.count("{"))
        raise RecipeError(f"not valid TOML: nested too deeply (at line {at})", where, REMEDY) from None
    except ValueError:  # Python reads no integer of more than 4,300 digits
        at = _line(text, lambda line: max(map(len, re.findall(r"[\d_]+", line)), default=0))
        raise RecipeError(f"not valid TOML: too large a number (at line {at})", where, "write a smaller one") from None


def value(text: str, where: str) -> Any:
    """What a text stands for: a TOML value, or the text itself where it is none."""
    try:
        found = tomllib.loads(f"v = {text}")
    except tomllib.TOMLDecodeError:
        return text
    except (RecursionError, ValueError):
        return parsed(f"v = {text}", where)["v"]  # which says what is wrong
    if len(found) > 1:
        raise RecipeError("more than one value, in several lines", where, "give each key an override of its own")
    return found["v"]


def _line(text: str, weight: Callable[[str], int]) -> int:
    """The number of the line with the largest weight."""
    lines = text.split("\n")
    return 1 + max(range(len(lines)), key=lambda number: weight(lines[number]))
