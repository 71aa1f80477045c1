"""Verdicts for the rows of a file: JSON lines in, the same rows with their verdicts out, in the same order.

IN holds objects with a text `response` and the field `gold` (kind `code`: `tests`; kind `choice`: also `options`). OUT
gets one line for each line of IN that is not blank: the row with `score status answer rule seconds` added. A former
verdict is replaced; a field of the row's own that has one of these names is kept as `answer_given`, and so on. A line
that cannot be graded because of what it holds is `refused` with no score and a rule that begins with `unreadable: `;
where it is no JSON object at all, its line number in IN (`row`) stands for its content.

An OUT that is there is gone on with: its rows must be the first ones of IN. A last line that a kill has cut off is
graded again. `.OUT.grading.json` beside it keeps what it was graded as: verdicts of two graders must not be mixed.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, get_args

from filelock import FileLock, Timeout

from heatbath.errors import DataError, HeatbathError, RecipeError, RunError
from heatbath.progress import Progress
from heatbath.run import write_atomically
from heatbath.terminal import printable
from heatbath.verify.graders import Grader, Kind, grader
from heatbath.verify.verdict import JUDGED, STATUSES, Verdict

MAX_LINE = 8 << 20  # bytes of a line; a longer one is refused without being held in memory
MAX_BATCH = 32 << 20  # bytes of the lines that are graded at a time
BATCH_SECONDS = 4.0  # how long a batch should take: what a kill can cost
MAX_SHOWN = 20  # unreadable rows in the summary; OUT has them all
FIELDS = ("score", "status", "answer", "rule", "seconds")
UNREADABLE = "unreadable: "
PROFILES = ("strict", "paper")


@dataclass(frozen=True)
class Grading:
    """What is to be graded, and how. `-` as `source` is stdin, as `out` stdout."""

    source: str
    out: str = "-"
    kind: str = "math"
    profile: str = "strict"
    workers: int = 2
    deadline: float = 10.0
    fresh: bool = False

    def check(self) -> None:
        """Raises RecipeError or DataError where nothing could be graded that way."""
        if self.kind not in get_args(Kind):
            raise RecipeError(f"no grader '{self.kind}'", "--kind", f"one of {', '.join(get_args(Kind))}")
        if self.profile not in PROFILES:
            raise RecipeError(f"no profile '{self.profile}'", "--profile", f"one of {', '.join(PROFILES)}")
        if self.profile != "strict" and self.kind != "math":
            raise RecipeError(f"only math has a profile '{self.profile}'", "--profile", "leave it out, or --kind math")
        if not (self.deadline > 0 and math.isfinite(self.deadline)):
            raise RecipeError("the deadline must be a number of seconds > 0", "--deadline", "such as 10")
        source, out = Path(self.source), Path(self.out)
        if self.source != "-" and not source.exists():
            raise DataError("cannot read the rows: no such file", self.source, "give a JSON-lines file, or - for stdin")
        if self.source != "-" and source.is_dir():
            raise DataError("cannot read the rows: it is a folder", self.source, "give a JSON-lines file")
        if self.out != "-" and out.is_dir():
            raise RecipeError("the output is a folder", self.out, "give the file to write")
        if "-" not in (self.source, self.out) and out.exists() and source.samefile(out):
            raise RecipeError("the output is the input", self.out, "give another --out")


@dataclass(frozen=True)
class Row:
    """One line of IN: its number, the object in it (None where there is none) and why it cannot be graded, if so."""

    number: int
    data: dict[str, Any] | None
    reason: str | None = None
    gold: Any = None
    size: int = 0  # bytes of its line

    def with_verdict(self, verdict: Verdict | None) -> dict[str, Any]:
        """The row of OUT."""
        row = {"row": self.number} if self.data is None else self._kept(self.data)
        if verdict is None:
            verdict = Verdict("refused", None, f"{UNREADABLE}{self.reason}")
            return row | {"score": None, **asdict(verdict)}
        return row | {"score": verdict.score, **asdict(verdict)}

    @staticmethod
    def _kept(data: dict[str, Any]) -> dict[str, Any]:
        """The row's own fields. One that has a verdict's name is kept as `answer_given`, …; a former verdict is not."""
        if all(field in data for field in FIELDS):
            return {k: v for k, v in data.items() if k not in FIELDS}
        return {f"{k}_given" if k in FIELDS else k: v for k, v in data.items()}


def run_grade(grading: Grading, progress: Progress) -> dict[str, Any]:
    """Grades what OUT does not hold yet; returns the summary of all its rows."""
    grading.check()
    summary = Summary()
    with ExitStack() as stack:
        source = sys.stdin.buffer if grading.source == "-" else stack.enter_context(Path(grading.source).open("rb"))
        rows = read_rows(source, grading.kind)
        judge = stack.enter_context(_judge(grading))  # before the output is opened, which may empty it
        sink = sys.stdout.buffer if grading.out == "-" else stack.enter_context(_opened(grading, rows, summary))
        known = grading.source != "-" and Path(grading.source).is_file()
        total = _count_lines(Path(grading.source)) if known else 0
        stack.enter_context(progress.bar(f"grade {grading.kind}", total) if known else nullcontext())
        size = 16
        while batch := _take(rows, size):
            started = time.monotonic()
            graded = _graded(batch, judge)
            sink.write(b"".join(map(_as_line, graded)))
            sink.flush()
            for row, result in zip(batch, graded, strict=True):
                summary.add(row.number, result)
            if known:
                progress.update(batch[-1].number, f"right {summary.verdicts['right'] / summary.rows:.2f}")
            # halved or doubled with the time the last batch took, so that neither a kill nor the writing costs much
            size = max(size // 2, 16) if time.monotonic() - started > BATCH_SECONDS else min(size * 2, 2048)
    return summary.as_dict(grading)


def _judge(grading: Grading) -> Grader:
    """The grader; raises RecipeError where there is none that grades so."""
    kind: Any = grading.kind
    try:
        return grader(kind, profile=grading.profile, workers=grading.workers, deadline=grading.deadline)
    except HeatbathError as error:
        raise RecipeError(error.what, error.where, error.remedy) from None
    except ValueError as error:
        how = f"--kind {grading.kind} --workers {grading.workers} --deadline {grading.deadline:g}"
        raise RecipeError(str(error), how, "give other values") from None


# --- reading -------------------------------------------------------------------------------------------------------
def read_rows(stream: BinaryIO, kind: str) -> Iterator[Row]:
    """The rows of a JSON-lines stream; blank lines are passed over, and every other one is a row, readable or not."""
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE and not line.endswith(b"\n"):
            while (more := stream.readline(MAX_LINE)) and not more.endswith(b"\n"):
                pass
            yield Row(number, None, f"the line is longer than {MAX_LINE >> 20} MiB")
        elif line.strip():
            yield _row(number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, kind)


def _row(number: int, line: bytes, kind: str) -> Row:
    try:
        data = json.loads(line.decode("utf-8"))
        if line.count(b"[") + line.count(b"{") > 400:
            json.dumps(data)  # what can be read may be nested too deeply to be written
    except UnicodeDecodeError as error:
        return Row(number, None, f"not UTF-8: byte 0x{line[error.start]:02x} at {error.start}", size=len(line))
    except RecursionError:
        return Row(number, None, "nested too deeply", size=len(line))
    except ValueError as error:
        return Row(number, None, f"not JSON: {error}", size=len(line))
    if not isinstance(data, dict):
        return Row(number, None, f"{_type(data)}, not an object", size=len(line))
    gold, reason = _gold(data, kind)
    response = data.get("response")
    if "response" not in data:
        reason = _missing("response", data)
    elif not isinstance(response, str):
        reason = f"'response' is {_type(response)}, not a text"
    return Row(number, data, reason, gold, len(line))


def _gold(data: dict[str, Any], kind: str) -> tuple[Any, str | None]:
    """What the grader of this kind takes as gold, or why the row has none."""
    name = "tests" if kind == "code" else "gold"
    if name not in data:
        return None, _missing(name, data)
    gold = data[name]
    if kind == "code":
        gold = {"test_list": gold} if isinstance(gold, list) else gold
        return gold, None if isinstance(
            gold, str | dict
        ) else f"'tests' is {_type(gold)}, not an object, a list or a text"
    if isinstance(gold, bool) or not isinstance(gold, str | int | float):
        whole = kind == "choice" and isinstance(gold, Mapping)
        return (gold, None) if whole else (None, f"'gold' is {_type(gold)}, not a text or a number")
    if isinstance(gold, float) and not math.isfinite(gold):
        return None, f"'gold' is {gold}, not a finite number"
    if kind == "choice":
        return ({"gold": gold, "options": data["options"]} if data.get("options") is not None else gold), None
    return _encodable(str(gold)), None


def _missing(name: str, data: dict[str, Any]) -> str:
    has = ", ".join(k if k.isprintable() else ascii(k) for k in islice(data, 8)) or "none"
    return f"no field '{name}' (it has {has[:200]})"


def _type(value: Any) -> str:
    names = {"dict": "an object", "list": "a list", "str": "a text", "NoneType": "null", "bool": "true or false"}
    return names.get(type(value).__name__, "a number")


def _encodable(text: str) -> str:
    """The text without lone surrogates, which JSON can hold and no process can be sent."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _take(rows: Iterator[Row], count: int) -> list[Row]:
    batch: list[Row] = []
    size = 0
    for row in islice(rows, count):
        batch.append(row)
        size += row.size
        if size > MAX_BATCH:
            break
    return batch


def _count_lines(path: Path) -> int:
    with path.open("rb") as stream:
        return sum(piece.count(b"\n") for piece in iter(lambda: stream.read(1 << 20), b""))


# --- grading and writing -------------------------------------------------------------------------------------------
def _graded(batch: list[Row], judge: Grader) -> list[dict[str, Any]]:
    good = [row for row in batch if row.reason is None and row.data is not None]
    verdicts = iter(judge.grade([_encodable(row.data["response"]) for row in good if row.data], [r.gold for r in good]))
    return [row.with_verdict(next(verdicts) if row.reason is None else None) for row in batch]


def _as_line(row: dict[str, Any]) -> bytes:
    try:
        return printable(json.dumps(row, ensure_ascii=False)).encode("utf-8") + b"\n"
    except UnicodeEncodeError:  # a lone surrogate, which only an escape can hold
        return json.dumps(row).encode("ascii") + b"\n"


@contextmanager
def _opened(grading: Grading, rows: Iterator[Row], summary: Summary) -> Iterator[BinaryIO]:
    """OUT, ours alone, open after the rows it holds; those are taken off `rows` and counted. Raises RecipeError where
    they are not the first rows of IN or were graded otherwise, RunError while another process writes to it."""
    out = Path(grading.out)
    if out.exists() and not out.is_file():  # a pipe or a device
        with out.open("wb") as stream:
            yield stream
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".{out.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError("another process writes to the output", str(out), "wait for it, or give another --out") from None
    with lock:
        kept = out.with_name(f".{out.name}.grading.json")
        how = {"kind": grading.kind, "profile": grading.profile}
        goes_on = out.exists() and out.stat().st_size > 0 and not grading.fresh
        if goes_on and kept.is_file() and (former := json.loads(kept.read_text())) != how:
            what = f"the output was graded as {former}, not as {how}"
            raise RecipeError(what, str(out), "--fresh grades it anew, or give another --out")
        with out.open("r+b" if goes_on else "wb") as stream:
            end = _matched(stream, rows, summary, out) if goes_on else 0
            write_atomically(kept, json.dumps(how) + "\n")
            stream.truncate(end)
            stream.seek(end)
            yield stream


def _matched(stream: BinaryIO, rows: Iterator[Row], summary: Summary, out: Path) -> int:
    """Where the whole lines of OUT end, which must be the first rows of IN."""
    end = 0
    for number, line in enumerate(iter(stream.readline, b""), start=1):
        if not line.endswith(b"\n"):
            break
        row = next(rows, None)
        try:
            graded = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            graded = None
        if row is None or not isinstance(graded, dict) or not _same(row, graded):
            what = f"line {number} of the output is not a graded row of the input in its place"
            raise RecipeError(what, str(out), "--fresh overwrites it, or give another --out")
        summary.add(row.number, graded)
        end += len(line)
    summary.resumed = summary.rows
    return end


def _same(row: Row, graded: dict[str, Any]) -> bool:
    """Whether a line of OUT is this row; as text, in which NaN equals itself."""
    own, other = ({k: v for k, v in d.items() if k not in FIELDS} for d in (row.with_verdict(None), graded))
    return all(field in graded for field in FIELDS) and json.dumps(own) == json.dumps(other)


# --- what came of it -----------------------------------------------------------------------------------------------
class Summary:
    """Counts over the rows of OUT, in memory that does not grow with them."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.rows = self.resumed = self.unreadable = self.scored = 0
        self.score = 0.0
        self.verdicts: Counter[str] = Counter()
        self.reasons: list[dict[str, Any]] = []
        self.failures: dict[str, dict[str, Any]] = {}
        self.agreement: Counter[str] = Counter()
        self.differences: dict[str, dict[str, Any]] = {}

    def add(self, number: int, row: dict[str, Any]) -> None:
        """Counts a row of OUT, whose line in IN has that number."""
        self.rows += 1
        if str(row["rule"]).startswith(UNREADABLE):
            self.unreadable += 1
            if len(self.reasons) < MAX_SHOWN:
                self.reasons.append({"row": number, "reason": row["rule"].removeprefix(UNREADABLE)})
            return
        status = row["status"]
        self.verdicts[status] += 1
        if row["score"] is not None:
            self.scored, self.score = self.scored + 1, self.score + row["score"]
        if status not in JUDGED:
            self.failures.setdefault(status, _case(number, row))
        expected = row.get("expected")
        if status != "bad_gold" and isinstance(expected, bool | int | float) and expected in (0, 1):
            right = status == "right"
            how = "agree" if right == bool(expected) else "false_accepts" if right else "false_rejects"
            self.agreement[how] += 1
            if how != "agree":
                self.differences.setdefault(how, _case(number, row))

    def as_dict(self, grading: Grading) -> dict[str, Any]:
        """What `--json` prints; `ok` is whether every row could be graded."""
        compared = self.agreement.total()
        return {
            "ok": not self.unreadable and not self.verdicts["bad_gold"],
            "kind": grading.kind,
            "profile": grading.profile,
            "out": grading.out,
            "rows": self.rows,
            "resumed": self.resumed,
            "mean_score": self.score / self.scored if self.scored else None,
            "verdicts": dict(self.verdicts),
            "failures": {k: {"count": self.verdicts[k], "first": first} for k, first in self.failures.items()},
            "unreadable": self.unreadable,
            "unreadable_rows": self.reasons,
            "agreement": {
                "rows": compared,
                **{how: self.agreement[how] for how in ("agree", "false_accepts", "false_rejects")},
                "first": self.differences,
            }
            if compared
            else None,
            "seconds": round(time.monotonic() - self.started, 3),
        }


def _case(number: int, row: dict[str, Any]) -> dict[str, Any]:
    gold = row.get("gold", row.get("tests"))
    shown = {"gold": _encodable(str(gold)[:200]), **{field: row[field] for field in ("answer", "rule", "status")}}
    return {"row": number, **shown, "response": _encodable(row["response"][-200:])}


def show(found: dict[str, Any]) -> str:
    """The summary for a person."""
    mean = "no row has a score" if found["mean_score"] is None else f"mean score {found['mean_score']:.4f}"
    before = f" ({found['resumed']:,} of them graded before)" if found["resumed"] else ""
    lines = [f"{found['rows']:,} rows{before}: {mean}"]
    lines += [f"  {status:10} {found['verdicts'][status]:,}" for status in STATUSES if status in found["verdicts"]]
    for status, failure in found["failures"].items():
        lines.append(f"first {status}: {_shown(failure['first'])}")
    if found["unreadable"]:
        lines.append(f"{found['unreadable']:,} rows could not be read:")
        lines += [f"  row {bad['row']}: {bad['reason']}" for bad in found["unreadable_rows"]]
        if found["unreadable"] > len(found["unreadable_rows"]):
            lines.append("  … (the others: `refused` in the output)")
    if agreement := found["agreement"]:
        lines.append(
            f"agrees with `expected` on {agreement['agree']:,} of {agreement['rows']:,} rows: "
            f"{agreement['false_accepts']:,} false accepts, {agreement['false_rejects']:,} false rejects"
        )
        lines += [f"first of the {how.replace('_', ' ')}: {_shown(case)}" for how, case in agreement["first"].items()]
    return "\n".join([*lines, *([f"verdicts: {found['out']}"] if found["out"] != "-" else [])])


def _shown(case: dict[str, Any]) -> str:
    said = case["answer"] if case["answer"] is not None else case["response"]
    return f"row {case['row']}, gold {case['gold'][:80]!r}, {str(said)[-120:]!r} ({case['rule']})"
