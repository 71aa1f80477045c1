"""Rows as the bytes of each kind of table that heatbath reads."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Sequence
from typing import Any

Rows = Sequence[dict[str, Any]]


def as_jsonl(rows: Sequence[Any]) -> bytes:
    """A line for each row; a row that is bytes already stands as it is."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    return b"\n".join([*lines, b""])


def as_json(rows: Sequence[Any]) -> bytes:
    return b"[" + b",\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"]"


def as_csv(rows: Rows) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def as_parquet(rows: Rows) -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    names = dict.fromkeys(name for row in rows for name in row)
    whole = [dict.fromkeys(names) | row for row in rows]  # else only the columns of the first row are written
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(whole), sink)
    return sink.getvalue()


def as_gzip(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


WRITERS = {".jsonl": as_jsonl, ".json": as_json, ".csv": as_csv, ".parquet": as_parquet}
