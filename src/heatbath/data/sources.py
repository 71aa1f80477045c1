"""Rows from where the recipe says: the built-in arithmetic task, or JSON-lines files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heatbath.data import arithmetic
from heatbath.data.rows import Row, Splits
from heatbath.errors import DataError, RecipeError

if TYPE_CHECKING:
    from heatbath.recipe import ArithmeticData, JsonlData, Recipe


def load(data: ArithmeticData | JsonlData, seed: int) -> Splits:
    """The four splits of a recipe's `[data]`. Raises DataError naming file and row.

    No question of `test` or `validation` may stand in a split that is trained on, nor in each other; demonstrations
    and prompts may share questions.
    """
    splits = _arithmetic(data, seed) if data.source == "arithmetic" else _jsonl(data)
    for held_out, others in (("test", ("demos", "prompts", "validation")), ("validation", ("demos", "prompts"))):
        questions = {row.question for row in getattr(splits, held_out)}
        for other in others:
            shared = [row.question for row in getattr(splits, other) if row.question in questions]
            if shared:
                raise DataError(
                    f"{len(shared)} held-out question(s) also stand in data.{other}, first: {shared[0][:80]!r}",
                    f"data.{held_out} against data.{other}",
                    "remove them from one of the two: a problem seen in training measures nothing",
                )
    return splits


def require(splits: Splits, recipe: Recipe, stages: tuple[str, ...]) -> None:
    """Raises RecipeError or DataError where one of the stages has no table or not enough rows to run."""
    for stage in stages:
        if getattr(recipe, stage) is None:
            raise RecipeError(f"the recipe has no [{stage}] table", stage, "add one, or run the other stages alone")
    if "sft" in stages and not splits.demos:
        raise DataError("no demonstrations", "data.demos", "the sft stage needs at least one row")
    if "rl" in stages and recipe.rl is not None and len(splits.prompts) < recipe.rl.prompts:
        raise DataError(
            f"{len(splits.prompts)} prompts, but one generation takes rl.prompts = {recipe.rl.prompts}",
            "data.prompts",
            "give more prompts or lower rl.prompts",
        )
    if "eval" in stages and not splits.test:
        raise DataError("no test problems", "data.test", "the eval stage needs at least one")


def _arithmetic(data: ArithmeticData, seed: int) -> Splits:
    sizes = (data.test, data.validation, data.demos, data.prompts)
    try:
        rows = arithmetic.rows(data.digits, tuple(data.operations), tuple(data.paths), sum(sizes), seed)
    except ValueError as error:
        raise DataError(
            str(error), "data.test + data.validation + data.demos + data.prompts", "ask for fewer"
        ) from None
    parts, start = [], 0
    for size in sizes:
        parts.append(rows[start : start + size])
        start += size
    test, validation, demos, prompts = parts
    return Splits(demos=demos, validation=validation, prompts=prompts, test=test)


def _jsonl(data: JsonlData) -> Splits:
    def read(key: str, need: tuple[str, ...]) -> list[Row]:
        path: Path | None = getattr(data, key)
        return [] if path is None else read_jsonl(path, data.fields.model_dump(), need, f"data.{key}")

    return Splits(
        demos=read("demos", ("solution",)),
        validation=read("validation", ("solution",)),
        prompts=read("prompts", ("answer",)),
        test=read("test", ("answer",)),
    )


def read_jsonl(path: Path, fields: dict[str, str], need: tuple[str, ...], key: str) -> list[Row]:
    """Rows of a JSON-lines file; `fields` maps question, solution and answer to the file's own field names.

    `need` names what this split cannot do without. Raises DataError with the row number (from 1).
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {path}: {error}", key, "check the path; it is relative to the working folder"
        ) from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, row {number} ({key})"
        try:
            record: Any = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"not JSON: {error}", where, "one JSON object per line") from None
        if not isinstance(record, dict):
            raise DataError("not a JSON object", where, "one JSON object per line")
        rows.append(_row(record, fields, need, where))
    if not rows:
        raise DataError("the file holds no rows", f"{path} ({key})", "one JSON object per line")
    return rows


def _row(record: dict[str, Any], fields: dict[str, str], need: tuple[str, ...], where: str) -> Row:
    values: dict[str, str] = {}
    for name, source in fields.items():
        value = record.get(source)
        if value is None or (isinstance(value, str) and not value.strip()):
            if name == "question" or name in need:
                raise DataError(
                    f"no '{source}' in the row (it has {', '.join(record) or 'no fields'})",
                    where,
                    f"data.fields.{name} names the field that holds the {name}",
                )
            continue
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise DataError(f"'{source}' is a {type(value).__name__}, not text", where, "write it as a string")
        values[name] = str(value)
    return Row(**values)
