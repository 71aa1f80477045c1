"""Records of a task's table in one form, whatever form the benchmark is published in.

After `prepared` a record has its question, its options and its gold answer in the fields that `Fields` names.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections.abc import Iterator
from typing import Any

from heatbath.data.tables import Record, as_text
from heatbath.data_sections import Fields, Positive, Section, Switch
from heatbath.errors import DataError

OPTIONS = "options"  # the field that options found elsewhere are put into
OPTION_LINE = re.compile(r"([A-Z]|[1-9])\) (.*)")


class Reading(Section):
    """How a table's rows become problems.

    `fields` names its columns (docs/data.md). `where` keeps the rows whose field has that value, or one of these.
    `options_inside`: the options stand at the end of the question, a line `A) …` for each. `distractors` are the fields
    with the wrong options, where the answer's field holds the right one. `indexed`: the answer is an option's index
    from 0. `problems` is how many rows are kept, where the definition knows it.
    """

    fields: Fields = Fields()
    where: dict[str, Any] = {}
    options_inside: Switch = False
    distractors: list[str] = []
    indexed: Switch = False
    problems: Positive | None = None

    @property
    def columns(self) -> Fields:
        """The fields of a record after `prepared`; a task reads no solutions."""
        own = {"options": OPTIONS} if self.options_inside or self.distractors else {}
        return self.fields.model_copy(update={"solution": [], **own})

    def kept(self, records: Iterator[Record]) -> Iterator[Record]:
        """The rows that `where` keeps; a text counts as what it is written of, for CSV knows nothing else. Raises
        DataError for a row without the field."""
        for record, place in records:
            for field, wanted in self.where.items():
                if field not in record:
                    has = ", ".join(map(str, record))
                    raise DataError(f"no '{field}' in the row (it has {has})", place, f"`where` filters by '{field}'")
                values = wanted if isinstance(wanted, list) else [wanted]
                if record[field] not in (*values, *map(str, values)):
                    break
            else:
                yield record, place

    def none_kept(self, name: str, read: int, where: str) -> DataError:
        """What is wrong where no row of a table is left."""
        if not read:
            return DataError(f"the table of '{name}' holds no rows", where, "one problem per row")
        asked = ", ".join(f"{field} = {value!r}" for field, value in self.where.items())
        return DataError(
            f"'{name}' keeps none of its {read:,} rows (where {asked})", where, "give `where` values that the rows have"
        )

    def prepared(self, record: dict[str, Any], place: str) -> dict[str, Any]:
        """The record with options and answer in fields of their own. Raises DataError where they cannot be found."""
        question, answer = self.fields.question, self.fields.answer
        if isinstance(record.get(answer), list):  # several parts of one answer
            parts = [as_text(part, answer, place) or "" for part in record[answer]]
            record = record | {answer: ", ".join(parts)}
        if self.options_inside:
            stem, options = _split(as_text(record.get(question), question, place) or "", place)
            record = record | {question: stem, OPTIONS: options}
        if self.distractors:
            shuffled, letter = self._shuffled(record, place)
            record = record | {OPTIONS: shuffled, answer: letter}
        if self.indexed:
            record = record | {answer: _letter(record.get(answer), place)}
        return record

    def _shuffled(self, record: dict[str, Any], place: str) -> tuple[list[str], str]:
        """The right option among the wrong ones, in an order that only the texts decide, and its letter."""
        texts = []
        for field in (self.fields.answer, *self.distractors):
            text = as_text(record.get(field), field, place)
            if text is None:
                raise DataError(f"'{field}' holds no option", place, "fill it in, or drop the row")
            texts.append(text.strip())
        salt = str(record.get(self.fields.question))
        order = sorted(texts, key=lambda text: hashlib.sha256(f"{salt}\0{text}".encode()).digest())
        return order, string.ascii_uppercase[order.index(texts[0])]


def _split(text: str, place: str) -> tuple[str, dict[str, list[str]]]:
    """The question without its options, and these, from lines `A) …` (or `1) …`) at its end."""
    lines = text.rstrip().split("\n")
    found: list[re.Match[str]] = []
    while lines and (match := OPTION_LINE.fullmatch(lines[-1])):
        found.insert(0, match)
        lines.pop()
    labels = [match[1] for match in found]
    first = labels[0] if labels else ""
    known = string.ascii_uppercase if first == "A" else string.digits[1:]
    if len(labels) < 2 or labels != list(known[: len(labels)]) or not "".join(lines).strip():
        raise DataError(f"no options at the end of {text[-60:]!r}", place, "lines such as 'A) …', in order")
    return "\n".join(lines).rstrip(), {"label": labels, "text": [match[2] for match in found]}


def _letter(value: Any, place: str) -> str:
    text = str(value).strip()
    if not text.isdecimal() or int(text) >= len(string.ascii_uppercase):
        raise DataError(f"{value!r} is no index of an option", place, "a number from 0, or leave out `indexed`")
    return string.ascii_uppercase[int(text)]
