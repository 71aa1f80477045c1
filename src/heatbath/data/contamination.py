"""n-gram decontamination: training rows that share a run of words with a problem of an evaluation are removed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from heatbath.data.rows import Row
from heatbath.data_sections import Data
from heatbath.errors import DataError

_UNSPACED = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+|[-+*/^=<>×÷]")
QUESTION_FIELDS = ("question", "problem", "prompt", "Question", "Problem", "text")


@dataclass(frozen=True)
class Contaminated:
    """A training row, and the problem that shares words with it."""

    row: str
    problem: str
    words: str

    def __str__(self) -> str:
        return f"{self.row} and {self.problem}: {self.words!r}"


def words(text: str) -> list[str]:
    """Words, numbers and operators in lower case; other punctuation and markup do not separate two copies of a problem.
    Each character of a script written without spaces is a word."""
    return _WORD.findall(text.casefold())


def ngrams(text: str, n: int) -> set[str]:
    """Every run of `n` words; a shorter text is one run of all its words."""
    w = words(text)
    return {" ".join(w[i : i + n]) for i in range(max(len(w) - n, 0) + 1)} if w else set()


def without_shared_ngrams(
    rows: Sequence[Row], problems: Sequence[tuple[str, str]], n: int
) -> tuple[list[Row], list[Contaminated]]:
    """Rows whose question shares no run of `n` words with a problem (text, place), and those that do.

    A problem of fewer than `n` words counts only where a question is that very text, else every short question would
    remove half of a data set.
    """
    known: dict[str, str] = {}
    for text, place in problems:
        for gram in ngrams(text, n):
            known.setdefault(gram, place)
    kept, removed = [], []
    for row in rows:
        shared = sorted(ngrams(row.asked, n) & known.keys())
        if shared:
            removed.append(Contaminated(row.origin or row.question[:60], known[shared[0]], shared[0][:80]))
        else:
            kept.append(row)
    return kept, removed


def contamination_note(of: str, rows: int, removed: Sequence[Contaminated], n: int, problems: int) -> str:
    """The line that a user reads about it."""
    first = f"; first: {removed[0]}" if removed else ""
    return (
        f"decontamination: {len(removed)} of {rows:,} rows of {of} share {n} words in a row with one of {problems:,} "
        f"problems (or are a shorter one) and were removed{first}"
    )


def read_problems(data: Data) -> list[tuple[str, str]]:
    """(problem, place) of everything that `data.decontaminate` names: the questions of tasks, and the rows of files,
    whose question is the first field of `QUESTION_FIELDS` that the row has. Raises DataError where it has none, or
    where a task's rows are not there."""
    from heatbath.data import tasks

    found = []
    for name in data.decontaminate:
        found += tasks.find(name).questions(data.data_dir) if tasks.is_task(name) else _rows_of(Path(name))
    return found


def _rows_of(path: Path) -> list[tuple[str, str]]:
    from heatbath.data.tables import read_file  # which draws from pools that are decontaminated here

    found = []
    for record, where in read_file(path, "data.decontaminate"):
        name = next((name for name in QUESTION_FIELDS if isinstance(record.get(name), str)), None)
        if name is None:
            raise DataError(
                f"no problem in the row (it has {', '.join(map(str, record))})",
                where,
                f"the field may be called {', '.join(QUESTION_FIELDS)}",
            )
        found.append((record[name], where))
    return found
