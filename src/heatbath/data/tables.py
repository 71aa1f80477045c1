"""Rows from tables: JSON-lines, Parquet and CSV files, datasets of the hub, DeepMath."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import string
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from heatbath.data.contamination import Contaminated, contamination_note, read_problems, without_shared_ngrams
from heatbath.data.rows import Row, Splits, split_by_content
from heatbath.data_sections import DeepMathData, Fields, FilesData, HubData
from heatbath.errors import DataError
from heatbath.verify.choice import read_options

Record = tuple[dict[str, Any], str]  # what the table holds, and where
NEEDS = {"demos": "solution", "validation": "solution", "prompts": "answer", "test": "answer"}
MESSAGE = 'each is {"role": "system" | "user" | "assistant", "content": "…"}'
CHECK_PATH = "check the path and data.folder"
UTF8 = "save it as UTF-8"
BOM = b"\xef\xbb\xbf"


def load(data: FilesData | HubData | DeepMathData, seed: int) -> Splits:
    """The splits of a recipe whose rows lie in tables. Raises DataError naming table and row."""
    parts: dict[str, list[Row]] = {}
    notes: list[str] = []
    pooled = {}
    for split in NEEDS:
        own, size = getattr(data, f"{split}_from"), getattr(data, split)
        if own is None:
            pooled[split] = size or 0
            continue
        records = list(_read(data, own, f"data.{split}_from")) if size != 0 else []
        fields = data.test_fields if split == "test" and data.test_fields is not None else data.fields
        made = [rows_of(record, where, fields, (NEEDS[split],), data.paths) for record, where in records[:size]]
        parts[split] = [row for rows in made for row in (rows if NEEDS[split] == "solution" else rows[:1])]
    removed: list[Contaminated] = []
    if any(pooled.values()):
        drawn, note, removed = _from_pool(data, pooled, seed)
        notes += note
        parts |= {split: rows for split, rows in drawn.named().items() if split in pooled}
    return Splits(
        **{split: parts.get(split, []) for split in NEEDS}, notes=tuple(notes), removed=tuple(map(str, removed))
    )


def _from_pool(
    data: FilesData | HubData | DeepMathData, sizes: dict[str, int], seed: int
) -> tuple[Splits, list[str], list[Contaminated]]:
    """Splits of a pool: one row for each of the first `paths` solutions of a problem, contaminated rows left out before
    anything is drawn, so that the sizes are met."""
    name = data.pool if data.pool is not None else "train"
    deepmath = isinstance(data, DeepMathData)
    fields = _deepmath_fields(data) if isinstance(data, DeepMathData) else data.fields
    needs = tuple(sorted({NEEDS[split] for split, size in sizes.items() if size}))
    first = fields.solution if isinstance(fields.solution, str) else fields.solution[0]
    read = [(r, w) for r, w in _read(data, name, "data.pool") if not deepmath or as_text(r.get(first), first, w)]
    rows = [row for record, where in read for row in rows_of(record, where, fields, needs, 99)]
    answers: dict[str, str | None] = {}
    solutions: dict[str, list[str | None]] = {}
    kept, contradicting = [], 0
    for row in rows:
        known = solutions.setdefault(row.problem, [])
        if answers.setdefault(row.problem, row.answer) != row.answer:
            contradicting += 1
        elif row.solution not in known and len(known) < data.paths:
            known.append(row.solution)
            kept.append(row)
    notes = [f"{name}: {len(rows):,} rows, {len(solutions):,} different problems"]
    if len(kept) == len(solutions) and data.paths > 1:
        notes.append(f"{name}: paths = {data.paths}, but no problem has more than one solution")
    if contradicting:
        notes.append(f"{name}: {contradicting} rows contradict the answer of an earlier row of their problem; left out")
    removed: list[Contaminated] = []
    if data.decontaminate:
        problems = read_problems(data)
        kept, removed = without_shared_ngrams(kept, problems, data.ngram)
        notes.append(contamination_note(name, len(kept) + len(removed), removed, data.ngram, len(problems)))
    try:
        splits = split_by_content(kept, dict.fromkeys(NEEDS, 0) | sizes, seed)
    except ValueError as error:
        raise DataError(str(error), f"{name} (data.pool)", "ask for fewer rows") from None
    return splits, notes, removed


def _deepmath_fields(data: DeepMathData) -> Fields:
    first = data.r1_solution
    order = [first, *(k for k in (1, 2, 3) if k != first)]
    return Fields(solution=[f"r1_solution_{k}" for k in order], answer="final_answer")


def _read(data: FilesData | HubData | DeepMathData, name: str, key: str) -> Iterator[Record]:
    if isinstance(data, FilesData):
        return read_file(data.folder / name, key)
    if isinstance(data, DeepMathData) and Path(name).is_absolute():  # else a split of the hub's
        return read_file(Path(name), key)
    config = data.config if isinstance(data, HubData) else None
    remedy = "check data.name, data.config and the split; without a connection use source = 'files' and a local copy"
    return read_hub(data.name, name, key, config=config, revision=data.revision, remedy=remedy)


def read_hub(
    name: str, split: str, key: str, *, config: str | None = None, revision: str | None = None, remedy: str
) -> Iterator[Record]:
    """The records of a split of a hub dataset, each with its place. Raises DataError with that remedy."""
    import datasets

    try:
        table = datasets.load_dataset(name, config, split=split, revision=revision)
    except (OSError, ValueError, KeyError, StopIteration, datasets.exceptions.DatasetsError) as error:
        why = error.__cause__ or error  # a DatasetGenerationError says nothing itself
        first = str(why).strip().splitlines()[0] if str(why).strip() else "it holds no rows"
        raise DataError(f"cannot load the split '{split}' of '{name}': {first}", key, remedy) from None
    return ((dict(record), f"{name} {split}, row {number}") for number, record in enumerate(table, 1))


def read_file(path: Path, key: str) -> Iterator[Record]:
    """The records of a .jsonl, .json (a list), .parquet or .csv file, or of a folder of them, each with its place.
    Raises DataError naming file and row (from 1); `key` is the recipe's key that named the file."""
    name = path.name.lower()
    try:
        if path.is_dir():
            return _shards(path, key)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", key, CHECK_PATH) from None
    reader = next((READERS[ending] for ending in READERS if name.endswith(ending)), None)
    if reader is None:
        raise DataError(
            f"no reader for '{path.suffix or path.name}' files", f"{path} ({key})", f"write it as {', '.join(READERS)}"
        )
    try:
        records = list(reader(path, key))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error}", key, CHECK_PATH) from None
    if not records:
        raise DataError("the file holds no rows", f"{path} ({key})", "one problem per row")
    return iter(records)


def _shards(folder: Path, key: str) -> Iterator[Record]:
    """The tables of a folder, in the order of their names."""
    parts = sorted(path for path in folder.iterdir() if path.name.lower().endswith(tuple(READERS)))
    if not parts:
        raise DataError("the folder holds no table", f"{folder} ({key})", f"write it as {', '.join(READERS)}")
    return (record for part in parts for record in read_file(part, key))


def _jsonl(path: Path, key: str) -> Iterator[Record]:
    for number, line in enumerate(_content(path, key).removeprefix(BOM).split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, row {number} ({key})"
        yield _object(_json_value(line, where, "one JSON object per line"), where, b"\\u" in line), where


def _content(path: Path, key: str) -> bytes:
    stored = path.read_bytes()
    if path.suffix.lower() != ".gz":
        return stored
    try:
        return gzip.decompress(stored)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"not a whole gzip file: {error}", f"{path} ({key})", "pack or copy it anew") from None


def _json(path: Path, key: str) -> Iterator[Record]:
    remedy = "a list of objects, or use .jsonl"
    raw = path.read_bytes().removeprefix(BOM)
    table, escapes = _json_value(raw, f"{path} ({key})", remedy), b"\\u" in raw
    if not isinstance(table, list):
        raise DataError("not a list of objects", f"{path} ({key})", remedy)
    for number, record in enumerate(table, 1):
        where = f"{path}, row {number} ({key})"
        yield _object(record, where, escapes), where


def _json_value(raw: bytes, where: str, remedy: str) -> Any:
    """What JSON says. Raises DataError for what is none, and for what Python cannot hold."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error}", where, remedy) from None
    except UnicodeDecodeError as error:
        what = f"not UTF-8: byte 0x{raw[error.start]:02x}" + f" in line {_line(raw, error)}" * (b"\n" in raw)
        raise DataError(what, where, UTF8) from None
    except RecursionError:
        raise DataError("not JSON: nested too deeply", where, remedy) from None
    except ValueError as error:  # a key that is there twice, or a number of more than 4,300 digits
        raise DataError(str(error).partition(";")[0], where, remedy) from None


def _line(raw: bytes, error: UnicodeDecodeError) -> int:
    return raw.count(b"\n", 0, error.start) + 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"'{twice}' is there twice in one object, that of {str(pairs[0][1])[:80]!r}")
    return found


def _object(record: Any, where: str, escapes: bool) -> dict[str, Any]:
    """The record; where it has `escapes`, those must be characters. Raises DataError."""
    if not isinstance(record, dict):
        raise DataError("not a JSON object", where, "one JSON object per row")
    try:
        if escapes:
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        what = "half of a surrogate pair (\\ud800 to \\udfff), which is no character"
        raise DataError(what, where, "write the whole pair, or leave it out") from None
    return record


def _parquet(path: Path, key: str) -> Iterator[Record]:
    import pyarrow.parquet

    where = f"{path} ({key})"
    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(path.read_bytes()))
        names = file.schema_arrow.names
        _require_different(names, where)
        table = file.read()
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the file itself
        first = str(error).partition("\n")[0]
        raise DataError(f"not a Parquet file: {first}", where, "write it anew") from None
    columns = []
    for name in names:
        try:
            columns.append(table[name].to_pylist())
        except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # no UTF-8, or beyond the calendar
            what = f"cannot read the column '{name}': {error}"
            raise DataError(what, where, "write columns of text and numbers") from None
    for number, values in enumerate(zip(*columns, strict=True), 1):
        yield dict(zip(names, values, strict=True)), f"{path}, row {number} ({key})"


def _require_different(names: list[str], where: str) -> None:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DataError(f"two columns have the same name, '{twice}'", where, "rename one of them")


def _csv(path: Path, key: str) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # a reasoning trace may be longer than the module's 128 KiB
    raw = path.read_bytes().removeprefix(BOM)
    try:
        stream = io.StringIO(raw.decode("utf-8"), newline="")
    except UnicodeDecodeError as error:
        where = f"{path}, line {_line(raw, error)} ({key})"
        raise DataError(f"not UTF-8: byte 0x{raw[error.start]:02x}", where, UTF8) from None
    with stream:
        reader = csv.reader(stream, strict=True)
        try:
            header = next(reader, [])
            if len(header) == 1 and (found := [mark for mark in ";\t|" if mark in header[0]]):
                raise DataError(f"columns are separated by {found[0]!r}", f"{path} ({key})", "separate them by commas")
            _require_different(header, f"{path}, header ({key})")
            for number, values in enumerate((row for row in reader if row), 1):
                where = f"{path}, row {number} ({key})"
                if len(values) != len(header):
                    raise DataError(
                        f"the row has {len(values)} fields, the header {len(header)}",
                        where,
                        "quote fields that hold a comma or a line break",
                    )
                yield dict(zip(header, values, strict=True)), where
        except csv.Error as error:
            raise DataError(f"not CSV: {error}", f"{path}, line {reader.line_num} ({key})", "write it anew") from None


READERS = {".jsonl": _jsonl, ".jsonl.gz": _jsonl, ".json": _json, ".parquet": _parquet, ".csv": _csv}


def rows_of(record: dict[str, Any], where: str, fields: Fields, need: tuple[str, ...], most: int) -> list[Row]:
    """The rows of one record: one for each of its first `most` solutions, or one without. `need` names what its split
    cannot do without."""
    history: tuple[tuple[str, str], ...] = ()
    several: list[str] = []  # the field that each solution came from, where there are several
    if fields.messages is not None:
        history, question, solutions = _conversation(record, fields.messages, where)
    else:
        question = required(record, fields.question, "question", where)
        names = [fields.solution] if isinstance(fields.solution, str) else fields.solution
        solutions = [text for name in names for text in _texts(record, name, where)]
        several = [name for name in names for _ in _texts(record, name, where)] if len(names) > 1 else []
    if "solution" in need and not solutions:
        if fields.messages is not None:
            raise DataError(f"no assistant turn ends '{fields.messages}'", where, "a demonstration ends in the answer")
        raise _missing(
            record, fields.solution if isinstance(fields.solution, str) else fields.solution[0], "solution", where
        )
    answer = _gold(record, fields, where)
    if "answer" in need and answer is None:
        name, what = (fields.answer, "answer") if fields.tests is None else (fields.tests, "tests")
        raise _missing(record, name, what, where)
    if fields.options is not None:
        options = _options(record, fields.options, where)
        question = "\n".join([question, *(f"{label}. {text}" for label, text in options.items())])
    kind = as_text(record.get(fields.kind), fields.kind, where) or "" if fields.kind is not None else ""
    columns = {name: _numbers(record, name, where) for name in (fields.columns if "solution" in need else ())}
    chosen: list[str | None] = [*solutions[:most]] or [None]
    if len(chosen) > 1 and (lists := [name for name, value in columns.items() if isinstance(value, list)]):
        raise DataError(
            f"the column '{lists[0]}' has a number per token, and the row has {len(chosen)} solutions",
            where,
            "give each solution a row of its own",
        )
    kinds = several[:most] if several and not kind else [kind] * len(chosen)
    return [
        Row(question, solution, answer, history, where, kind=of, columns=columns)
        for solution, of in zip(chosen, kinds or [""] * len(chosen), strict=True)
    ]


def _gold(record: dict[str, Any], fields: Fields, where: str) -> str | None:
    """The gold answer as one text: JSON where it is more than an answer."""
    if fields.tests is not None:
        tests = record if fields.tests == "*" else record.get(fields.tests)
        tests = {"test_list": tests} if isinstance(tests, list) and tests else tests  # assertions, as in MBPP
        try:
            return None if not tests else tests if isinstance(tests, str) else json.dumps(tests)
        except (TypeError, ValueError) as error:  # what Parquet can hold and JSON cannot
            raise DataError(f"'{fields.tests}' holds no tests: {error}", where, "texts, numbers, lists") from None
    answer = as_text(record.get(fields.answer), fields.answer, where)
    if answer is not None and fields.answer_after is not None:
        answer = _after(answer, fields.answer_after, where)
    if answer is not None and fields.options is not None:
        options = _options(record, fields.options, where)
        unlabelled = isinstance(record[fields.options], list)  # among which an int is an index from 0
        indexed = isinstance(record[fields.answer], int) and fields.answer_after is None
        gold = {
            "gold": record[fields.answer] if indexed else answer,
            "options": [*options.values()] if unlabelled else options,
        }
        return json.dumps(gold, ensure_ascii=False)
    return answer


def _options(record: dict[str, Any], name: str, where: str) -> dict[str, str]:
    """The options of a question by their labels; a list of texts is labelled A, B, C, …"""
    labels, texts = read_options(record.get(name)) or (None, ())
    options = dict(zip(string.ascii_uppercase if labels is None else labels, texts, strict=False))
    if not options or len(options) < len(texts):
        raise DataError(f"'{name}' holds no options", where, "a list of texts, or an object of texts by label")
    return options


def _numbers(record: dict[str, Any], name: str, where: str) -> float | list[float]:
    """A column for the objective: one number, or a list of them."""
    value = record.get(name)
    if value is None:
        raise _missing(record, name, "columns", where)
    values = value if isinstance(value, list) else [value]
    try:
        numbers = [float(v) for v in values]
    except (TypeError, ValueError, OverflowError):
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise DataError(f"the column '{name}' holds something that is no number", where, "write finite numbers")
    return numbers if isinstance(value, list) else numbers[0]


def _conversation(record: dict[str, Any], name: str, where: str) -> tuple[tuple[tuple[str, str], ...], str, list[str]]:
    """The turns before the question, the question, and the last assistant turn as the solution."""
    turns = record.get(name)
    if turns and not isinstance(turns, list):
        raise DataError(f"'{name}' is a {type(turns).__name__}, not a list of messages", where, MESSAGE)
    if not turns:
        raise _missing(record, name, "messages", where)
    pairs = []
    for number, turn in enumerate(turns, 1):
        content = turn.get("content") if isinstance(turn, dict) else None
        if (
            not isinstance(content, str)
            or not content.strip()
            or turn.get("role") not in ("system", "user", "assistant")
        ):
            raise DataError(
                f"message {number} of '{name}' is not a turn with a role and text",
                where,
                MESSAGE,
            )
        pairs.append((turn["role"], content))
    solution = [pairs.pop()[1]] if pairs[-1][0] == "assistant" else []
    if not pairs or pairs[-1][0] != "user":
        raise DataError(f"no user turn stands before the answer in '{name}'", where, "end with user, then assistant")
    return tuple(pairs[:-1]), pairs[-1][1], solution


def _after(text: str, marker: str, where: str) -> str:
    _, found, after = text.rpartition(marker)
    if not found or not after.strip():
        raise DataError(
            f"no '{marker}' with an answer after it in {text[-60:]!r}",
            where,
            "data.fields.answer_after names the marker",
        )
    return after.strip()


def _texts(record: dict[str, Any], name: str, where: str) -> list[str]:
    value = record.get(name)
    values = value if isinstance(value, list) else [value]
    return [text for v in values if (text := as_text(v, name, where)) is not None]


def as_text(value: Any, name: str, where: str) -> str | None:
    """A field's text, or None where it holds none. Raises DataError for anything that is neither text nor number."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return None  # what a missing number becomes in JSON and Parquet
    if not isinstance(value, str | int | float) or isinstance(value, bool):
        raise DataError(f"'{name}' is a {type(value).__name__}, not text", where, "write it as a string")
    return str(value)


def required(record: dict[str, Any], name: str, what: str, where: str) -> str:
    """A field's text. Raises DataError, which says what the field is for, where it holds none."""
    text = as_text(record.get(name), name, where)
    if text is None:
        raise _missing(record, name, what, where)
    return text


def _missing(record: dict[str, Any], name: str, what: str, where: str) -> DataError:
    if name in record:
        return DataError(f"'{name}' is empty in the row", where, f"fill in the {what}, or drop the row")
    remedy = f"data.fields.{what} names the field that holds the {what}"
    if what == "columns":
        remedy = "data.fields.columns names it, for demonstrations and validation rows alike: give it to every row"
    return DataError(f"no '{name}' in the row (it has {', '.join(map(str, record)) or 'no fields'})", where, remedy)
