"""Mutations of data files as files: broken lines, encodings, compression, Parquet, CSV, and what is no file at all."""

from __future__ import annotations

import io
import json
import os
import random
from pathlib import Path
from typing import Any

import mutated_tables as tables
from mutated_forms import GRADED, ROWS, Form, case, file_named, row_named
from mutation_oracle import Case

Draw = random.Random


def graded(form: Form, extension: str, number: int) -> tuple[tuple[str, ...], ...]:
    return ((str(number),),) if form.name in GRADED else row_named(extension, number)


BROKEN_LINES: tuple[tuple[str, bytes], ...] = (
    ("cut", b'{"question": "1 + 1?", "solu'),
    ("two objects", b'{"question": "a"} {"question": "b"}'),
    ("a comma too many", b'{"question": "a",}'),
    ("single quotes", b"{'question': 'a'}"),
    ("a list", b'["a", "b"]'),
    ("a text", b'"a"'),
    ("a number", b"5"),
    ("null", b"null"),
    ("no JSON", b"hello"),
    ("a closing brace", b"}"),
    ("nested too deeply", b"[" * 100_000),
    ("nested values", b'{"question": ' + b"[" * 5_000 + b"]" * 5_000 + b"}"),
    ("an endless number", b'{"question": ' + b"1" * 5_000 + b"}"),
    ("a raw control character", b'{"question": "a\x01b"}'),
    ("no UTF-8", b'{"question": "\xff"}'),
    ("half a character", b'{"question": "\xc3"}'),
    ("NUL bytes", b"\x00\x00\x00"),
    ("a BOM inside", b'\xef\xbb\xbf{"question": "a"}'),
    ("a wrong escape", b'{"question": "\\x41"}'),
    ("a key twice", b'{"question": "a", "question": "b", "solution": "c", "answer": "1"}'),
)


def broken_line(r: Draw, form: Form, extension: str) -> Case | None:
    if extension not in (".jsonl", ".json"):
        return None
    rows: list[Any] = list(form.rows())
    at, (what, line) = r.randrange(ROWS), r.choice(BROKEN_LINES)
    rows[at] = line
    content = tables.WRITERS[extension](rows)
    whole = extension == ".json" and what not in ("a list", "a text", "a number", "null")
    names = file_named(extension) if whole else graded(form, extension, at + 1)
    must = "either" if form.name in GRADED and what == "a BOM inside" and at == 0 else "refused"
    if what == "a BOM inside" and at == 0:
        names = graded(form, extension, 1) if extension == ".jsonl" else file_named(extension)
    return case(form, extension, "file: a broken line", content, must, names, note=what)


def encoding(r: Draw, form: Form, extension: str) -> Case | None:
    if extension == ".parquet":
        return None
    text = tables.WRITERS[extension](form.rows()).decode()
    how = r.choice(["bom", "crlf", "blank lines", "no last line end", "utf-16", "utf-32", "utf-16-le", "latin-1"])
    if how == "bom":
        return case(form, extension, "file: BOM", b"\xef\xbb\xbf" + text.encode(), "taken")
    if how == "crlf":
        return case(form, extension, "file: CRLF", text.replace("\n", "\r\n").encode(), "taken")
    if how == "blank lines":
        return case(form, extension, "file: blank lines", text.replace("\n", "\n\n").encode(), "taken")
    if how == "no last line end":
        return case(form, extension, "file: no last line end", text.rstrip("\n").encode(), "taken")
    if how == "latin-1":
        places = [n for n, c in enumerate(text) if c.isalnum()]
        at = r.choice(places)
        written = (text[:at] + "\xff" + text[at + 1 :]).encode("latin-1")
        number = text.count("\n", 0, at) + 1
        return case(form, extension, "file: latin-1", written, names=graded(form, extension, number)[:1])
    names = file_named(extension) if form.name not in GRADED else ()
    return case(form, extension, f"file: {how}", text.encode(how), names=names)


NO_ROWS: dict[str, tuple[bytes, ...]] = {
    ".jsonl": (b"", b"\n\n\n", b"  \n", b"\xef\xbb\xbf", b"\r\n"),
    ".json": (b"", b"[]", b"{}", b"null", b"5", b'"x"', b"[[]]", b"[", b"[1, 2]", b'{"rows": []}'),
    ".csv": (b"", b"question,solution,answer\n", b"\n\n", b"\xef\xbb\xbf", b",,\n", b'"'),
    ".parquet": (b"", b"PAR1", b"PAR1PAR1", b"\x00" * 100),
}


def no_rows(r: Draw, form: Form, extension: str) -> Case | None:
    content = r.choice(NO_ROWS[extension])
    must = "either" if form.name in GRADED else "refused"
    return case(form, extension, "file: no rows", content, must, file_named(extension), note=repr(content[:30]))


def cut(r: Draw, form: Form, extension: str) -> Case | None:
    """The first part of a file: a line that is cut, or whole rows that are fewer."""
    whole = tables.WRITERS[extension](form.rows())
    at = r.randrange(1, len(whole))
    names = file_named(extension) if form.name not in GRADED else ()
    must = "refused" if extension in (".parquet", ".json") and whole[:at].strip() != whole.strip() else "either"
    if form.name in ("prompts", "pool", "code", "choice", "columns"):
        names = ((f"rows{extension}", "data.prompts", "data.demos", "rows.csv"),)
    return case(form, extension, "file: cut", whole[:at], must, names, note=f"{at} of {len(whole)} bytes")


def flipped(r: Draw, form: Form, extension: str) -> Case | None:
    """Bytes exchanged anywhere."""
    raw = bytearray(tables.WRITERS[extension](form.rows()))
    for _ in range(r.choice([1, 3, 20])):
        raw[r.randrange(len(raw))] = r.randrange(256)
    return case(form, extension, "file: bytes exchanged", bytes(raw), "either", ((f"rows{extension}", "data."),))


def compressed(r: Draw, form: Form, extension: str) -> Case | None:
    if form.name in GRADED or form.name == "task":
        return None
    raw = tables.as_jsonl(form.rows())
    packed = tables.as_gzip(raw)
    how, file, content = r.choice(
        [
            ("whole", ".jsonl.gz", packed),
            ("plain, named gz", ".jsonl.gz", raw),
            ("cut", ".jsonl.gz", packed[: len(packed) // 2]),
            ("cut at the end", ".jsonl.gz", packed[:-4]),
            ("a wrong sum", ".jsonl.gz", packed[:-8] + b"\x00" * 8),
            ("garbage inside", ".jsonl.gz", packed[:20] + b"\x00\xff" * 20 + packed[40:]),
            ("empty", ".jsonl.gz", b""),
            ("packed nothing", ".jsonl.gz", tables.as_gzip(b"")),
            ("packed no UTF-8", ".jsonl.gz", tables.as_gzip(b"\xff\xfe")),
            ("packed, named jsonl", ".jsonl", packed),
            ("packed, named json", ".json", packed),
            ("packed, named csv", ".csv", packed),
            ("packed, named parquet", ".parquet", packed),
            ("packed csv", ".csv.gz", packed),
            ("packed json", ".json.gz", packed),
            ("packed parquet", ".parquet.gz", packed),
            ("only gz", ".gz", packed),
        ]
    )
    must = "taken" if how == "whole" else "refused"
    if file in (".csv", ".parquet") and file not in form.extensions:
        return None
    return case(form, file, "file: gzip", content, must, file_named(file), note=how)


def another_kind(r: Draw, form: Form, extension: str) -> Case | None:
    """One kind of table under the name of another, or under no name that is known."""
    if form.name in GRADED:
        return None
    written = r.choice(form.extensions)
    named = r.choice([*form.extensions, ".txt", "", ".tsv", ".xlsx", ".jsonl.bak", ".zip", ".JSONL", ".arrow"])
    if named == written:
        return None
    content = tables.WRITERS[written](form.rows())
    must = "taken" if named == ".JSONL" and written == ".jsonl" else "refused"
    return case(form, named, "file: named as another kind", content, must, file_named(named), note=f"is {written}")


def no_file(r: Draw, form: Form, extension: str) -> Case | None:
    file = f"rows{extension}"

    def gone(folder: Path) -> None:
        (folder / file).unlink()

    def dangling(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to("nowhere")

    def loop(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to(file)

    def locked(folder: Path) -> None:
        (folder / file).chmod(0)

    def null(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to("/dev/null")

    how = r.choice(
        [
            "gone",
            "dangling",
            "loop",
            "folder",
            "folder with no table",
            "folder with a broken one",
            "locked",
            "null",
            "below a file",
        ]
    )
    content: bytes | None = tables.WRITERS[extension](form.rows())
    files: dict[str, bytes | None] = {}
    before = {"gone": gone, "dangling": dangling, "loop": loop, "locked": locked, "null": null}.get(how)
    must = "refused"
    if how == "locked" and os.geteuid() == 0:
        must = "taken"  # root reads everything
    if how == "null" and form.name in GRADED:
        must = "either"
    if how.startswith("folder"):
        content = None
        if how == "folder with no table":
            files = {f"{file}/readme.txt": b"x"}
        elif how == "folder with a broken one":
            files = {f"{file}/a{extension}": tables.WRITERS[extension](form.rows()), f"{file}/b{extension}": b"{{{"}
    if how == "below a file":
        if form.name in GRADED or form.name == "task":
            return None
        made = case(form, extension, "file: none", content, "refused", (("test.jsonl",),), note=how)
        recipe = made.files["r.toml"]
        assert recipe is not None
        made.files["r.toml"] = recipe.replace(f'"{file}"'.encode(), b'"test.jsonl/rows.jsonl"')
        return made
    names: tuple[tuple[str, ...], ...] = ((file, "'mine'"),)
    return case(form, extension, "file: none", content, must, names, before=before, files=files, note=how)


def csv_shape(r: Draw, form: Form, extension: str) -> Case | None:
    if ".csv" not in form.extensions:
        return None
    text = tables.as_csv(form.rows()).decode()
    lines = text.rstrip("\n").split("\n")
    at = r.randrange(1, ROWS + 1)
    header = lines[0]
    first = form.texts[0]
    how = r.choice(
        [
            "open quote",
            "a field too many",
            "a field too few",
            "semicolons",
            "tabs",
            "header twice",
            "no header",
            "quote inside",
            "huge field",
            "only commas",
            "empty name",
            "spaces in header",
        ]
    )
    names = row_named(".csv", at)
    if how == "open quote":
        lines[at] = '"' + lines[at]
        names = file_named(".csv")
    elif how == "a field too many":
        lines[at] += ",x"
    elif how == "a field too few":
        lines[at] = "x"
    elif how in ("semicolons", "tabs"):
        lines = [line.replace(",", ";" if how == "semicolons" else "\t") for line in lines]
        names = file_named(".csv")
    elif how == "header twice":
        lines[0] = header.replace(header.split(",")[1], first)
        names = file_named(".csv")
    elif how == "no header":
        lines = lines[1:]
        names = file_named(".csv")
    elif how == "quote inside":
        lines[at] = '"a"b,' + lines[at].partition(",")[2]
        names = file_named(".csv")
    elif how == "huge field":
        lines[at] = "x" * 300_000 + "," + lines[at].partition(",")[2]
    elif how == "only commas":
        lines[at] = "," * header.count(",")
    elif how == "empty name":
        lines[0] = "," + header.partition(",")[2]
        names = file_named(".csv")
    else:
        lines[0] = header.replace(",", " , ")
        names = file_named(".csv")
    must = "either" if how in ("huge field", "tabs", "semicolons") or (how == "spaces in header") else "refused"
    return case(form, ".csv", f"file: CSV, {how}", "\n".join(lines).encode() + b"\n", must, names)


def parquet_types(r: Draw, form: Form, extension: str) -> Case | None:
    """Columns of types that hold no text."""
    import datetime
    import decimal

    import pyarrow
    import pyarrow.parquet

    if ".parquet" not in form.extensions or not form.texts:
        return None
    table = pyarrow.Table.from_pylist(form.rows())
    field = r.choice(form.texts)
    at = table.column_names.index(field)
    how, column = r.choice(
        [
            ("bytes", pyarrow.array([b"x"] * ROWS)),
            ("bytes that are no text", pyarrow.array([b"\xff"] * ROWS)),
            (
                "text of no UTF-8",
                pyarrow.Array.from_buffers(pyarrow.string(), ROWS, pyarrow.array([b"\xff"] * ROWS).buffers()),
            ),
            ("time", pyarrow.array([datetime.datetime(2026, 1, 1)] * ROWS)),
            ("a time beyond the calendar", pyarrow.array([2**62] * ROWS, pyarrow.timestamp("us"))),
            ("date", pyarrow.array([datetime.date(2026, 1, 1)] * ROWS)),
            ("decimal", pyarrow.array([decimal.Decimal("1.5")] * ROWS)),
            ("nothing", pyarrow.nulls(ROWS)),
            ("booleans", pyarrow.array([True] * ROWS)),
            ("dictionary", pyarrow.array([str(n) + "x?" for n in range(ROWS)]).dictionary_encode()),
            (
                "large text",
                table.column(field).cast(pyarrow.large_string())
                if table.schema.field(field).type == pyarrow.string()
                else table.column(field),
            ),
            ("structs", pyarrow.array([{"a": 1}] * ROWS)),
            ("a map", pyarrow.array([[("a", 1)]] * ROWS, pyarrow.map_(pyarrow.string(), pyarrow.int64()))),
            ("twice", None),
        ]
    )
    must = {"dictionary": "either", "large text": "taken"}.get(how, "refused")
    table = table.append_column(field, table.column(0)) if column is None else table.set_column(at, field, column)
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    names = (("rows.parquet",), (field, "row 1")) if how != "text of no UTF-8" else (("rows.parquet",),)
    return case(form, ".parquet", "file: Parquet of other types", sink.getvalue(), must, names, note=f"{field}: {how}")


def json_shape(r: Draw, form: Form, extension: str) -> Case | None:
    if ".json" not in form.extensions:
        return None
    rows = form.rows()
    how, content = r.choice(
        [
            ("an object of rows", json.dumps({"data": rows}).encode()),
            ("an object of columns", json.dumps({k: [row[k] for row in rows] for k in rows[0]}).encode()),
            ("lists", json.dumps([[*row.values()] for row in rows]).encode()),
            ("lines", tables.as_jsonl(rows)),
            ("twice", tables.as_json(rows) * 2),
            ("nested too deeply", b"[" * 200_000),
            ("nested", b"[" * 5_000 + b"]" * 5_000),
            ("an endless number", b"[" + b"9" * 6_000 + b"]"),
            ("a list in a list", b"[" + tables.as_json(rows) + b"]"),
            ("NaN", b"[NaN]"),
        ]
    )
    return case(form, ".json", "file: JSON of another shape", content, names=file_named(".json"), note=how)


MUTATIONS = (
    broken_line,
    broken_line,
    encoding,
    no_rows,
    cut,
    flipped,
    compressed,
    another_kind,
    no_file,
    csv_shape,
    parquet_types,
    json_shape,
)
