"""Rows in a compressed JSON-lines file that a kill cannot harm: each batch is one gzip member.

`zcat` reads such a file whole. A member that a kill cut off is no row; the next write takes it away.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

CHUNK = 1 << 20
GZIP = 31  # zlib's wbits of a gzip member with any window


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of every complete batch, in the order in which they were added; none where there is no file."""
    return [json.loads(line) for data, _ in _members(path) for line in data.split(b"\n") if line]


def add(path: Path, rows: list[dict[str, Any]]) -> None:
    """Appends a batch, after what is complete, and waits until the disk has it."""
    key, end = path.absolute(), 0
    if path.exists():
        known = _written.get(key) == _state(path)
        end = path.stat().st_size if known else max((end for _, end in _members(path)), default=0)
    with path.open("ab") as stream:
        stream.truncate(end)
        stream.write(_packed(rows))
        stream.flush()
        os.fsync(stream.fileno())
    _written[key] = _state(path)


def lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as JSON lines. Half a surrogate pair, which a server may send escaped and no encoding can write, stays
    escaped."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def replace(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes these rows instead of those there are, all or nothing."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_bytes(_packed(rows) if rows else b"")
    unfinished.replace(path)


_written: dict[Path, tuple[int, int]] = {}  # files as this process left them, which adding need not read


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _packed(rows: list[dict[str, Any]]) -> bytes:
    return gzip.compress(lines(rows).encode(), mtime=0)


def _members(path: Path) -> Iterator[tuple[bytes, int]]:
    """The content of each complete member with the offset of its end; stops at the first that is not."""
    if not path.exists():
        return
    with path.open("rb") as stream:
        at, rest = 0, b""
        while True:
            one, parts = zlib.decompressobj(GZIP), []
            while not one.eof:
                data = rest or stream.read(CHUNK)
                if not data:
                    return
                at += len(data)
                rest = b""
                try:
                    parts.append(one.decompress(data))
                except zlib.error:
                    return
            rest = one.unused_data
            at -= len(rest)
            yield b"".join(parts), at
