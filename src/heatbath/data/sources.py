"""Rows from where the recipe says: the built-in sums and programs, reasoning-gym, files, the hub, DeepMath."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from heatbath.data import arithmetic, functions, tables
from heatbath.data.contamination import contamination_note, read_problems, without_shared_ngrams
from heatbath.data.rows import HELD_OUT, Row, Splits, position
from heatbath.data_sections import AnyData, ArithmeticData, FunctionsData, NoData, ReasoningGymData
from heatbath.errors import DataError, RecipeError

if TYPE_CHECKING:
    from heatbath.recipe import Recipe

SIZES = "data.test + data.validation + data.demos + data.prompts"
FAMILY_SIZE = 100_000  # fixed, because entries of some families depend on it
EXAM_SEED = 0  # validation and test of a procedural task are the same problems for every seed of a run


def load(data: AnyData, seed: int) -> Splits:
    """The four splits of a recipe's `[data]`, decontaminated. Raises DataError naming file and row.

    No problem of `test` or `validation` may stand in a split that is trained on, nor in each other; demonstrations and
    prompts may share problems.
    """
    if isinstance(data, NoData):
        return Splits([], [], [], [])
    if isinstance(data, ArithmeticData | FunctionsData):
        splits = _procedural(data, seed)
    elif isinstance(data, ReasoningGymData):
        splits = _reasoning_gym(data, seed)
    else:
        splits = tables.load(data, seed)
    if data.decontaminate:
        splits = _decontaminated(splits, data)
    _require_disjoint(splits)
    return splits


def of(recipe: Recipe) -> Splits:
    """What a recipe's stages read: `demos` are what the warm start learns from, `test` the problems that are asked."""
    splits = load(recipe.data, recipe.seed)
    if recipe.sft is not None and "prompts" in recipe.sft.splits:
        lacking = next((row for row in splits.prompts if row.solution is None), None)
        if lacking is not None:
            raise DataError("a prompt without a solution", f"data.prompts, {lacking.origin}", 'sft.splits = ["demos"]')
        demos = splits.demos if "demos" in recipe.sft.splits else []
        splits = dataclasses.replace(splits, demos=[*demos, *splits.prompts])
    if recipe.eval.split == "validation":
        one_each = {row.id: row for row in splits.validation}
        splits = dataclasses.replace(splits, test=list(one_each.values()))
    return splits


def require(splits: Splits, recipe: Recipe, stages: tuple[str, ...]) -> None:
    """Raises RecipeError or DataError where one of the stages has no table or not enough rows to run."""
    for stage in stages:
        if getattr(recipe, stage) is None:
            raise RecipeError(f"the recipe has no [{stage}] table", stage, "add one, or run the other stages alone")
    if ("sft" in stages or "pretrain" in stages) and not splits.demos:
        stage = "sft" if "sft" in stages else "pretrain"
        raise DataError("no demonstrations", "data.demos", f"the {stage} stage needs at least one row")
    if "rl" in stages and recipe.rl is not None and len(splits.prompts) < recipe.rl.prompts:
        raise DataError(
            f"{len(splits.prompts)} prompts, but one generation takes rl.prompts = {recipe.rl.prompts}",
            "data.prompts",
            "give more prompts or lower rl.prompts",
        )
    if "rl" in stages and recipe.rl is not None and recipe.rl.eval_every and not splits.test:
        raise RecipeError(
            f"rl.eval_every = {recipe.rl.eval_every} answers test problems while RL runs, and there are none",
            "rl.eval_every",
            "give data.test rows, or set it to 0",
        )
    if "eval" in stages and not splits.test and not recipe.eval.tasks:
        raise DataError("no test problems", "data.test", "the eval stage needs at least one, or eval.tasks")


def _require_disjoint(splits: Splits) -> None:
    for held_out, others in (("test", ("demos", "prompts", "validation")), ("validation", ("demos", "prompts"))):
        problems = {row.problem: row for row in getattr(splits, held_out)}
        for other in others:
            shared = [row for row in getattr(splits, other) if row.problem in problems]
            if shared:
                first = shared[0]
                raise DataError(
                    f"{len(shared)} held-out question(s) also stand in data.{other}, first: {first.question[:80]!r}",
                    f"data.{held_out}, {problems[first.problem].origin}, and data.{other}, {first.origin}",
                    "remove them from one of the two: a problem seen in training measures nothing",
                )


def _decontaminated(splits: Splits, data: AnyData) -> Splits:
    problems = read_problems(data)
    known = {text for text, _ in problems}
    problems += [(row.asked, f"data.test, {row.origin}") for row in splits.test if row.asked not in known]
    kept: dict[str, list[Row]] = {}
    notes, removed = list(splits.notes), list(splits.removed)
    for split in ("demos", "prompts"):
        rows = getattr(splits, split)
        kept[split], found = without_shared_ngrams(rows, problems, data.ngram)
        if not rows:
            continue
        notes.append(contamination_note(split, len(rows), found, data.ngram, len(problems)))
        removed += map(str, found)
    return Splits(kept["demos"], splits.validation, kept["prompts"], splits.test, tuple(notes), tuple(removed))


def _procedural(data: ArithmeticData | FunctionsData, seed: int) -> Splits:
    forms: tuple[str, ...] = tuple(data.forms)

    def drawn(count: int, seed: int, held_out: bool) -> list[Any]:
        if isinstance(data, FunctionsData):
            return functions.problems(count, seed, held_out=held_out)
        return arithmetic.problems(data.digits, tuple(data.operations), count, seed, held_out=held_out)

    def rows(held_out: bool, sizes: tuple[int, int], noise: float, seed: int) -> tuple[list[Row], list[Row]]:
        make = functions.rows if isinstance(data, FunctionsData) else arithmetic.rows
        found = drawn(sum(sizes), seed, held_out)
        first = make(found[: sizes[0]], forms, paths=1 if held_out else data.paths, label_noise=noise, seed=seed)
        second = make(found[sizes[0] :], forms, paths=1, label_noise=noise, seed=seed)
        return list(first), list(second)

    try:
        test, validation = rows(True, (data.test, data.validation), 0.0, EXAM_SEED)
        demos, prompts = rows(False, (data.demos, data.prompts), data.label_noise, seed)
    except ValueError as error:
        raise DataError(
            str(error), SIZES, "ask for fewer" + (", or for more digits" if isinstance(data, ArithmeticData) else "")
        ) from None
    return Splits(demos=demos, validation=validation, prompts=prompts, test=test)


def _reasoning_gym(data: ReasoningGymData, seed: int) -> Splits:
    """Entries of a family, a quarter of the problems held out by content. Raises DataError for families that repeat
    themselves before the sizes are reached."""

    def draw(count: int, seed: int, held_out: bool) -> list[Row]:
        found: dict[str, Row] = {}
        tried = 0
        for row in itertools.islice(_entries(data, seed), 20 * count + 1000) if count else ():
            tried += 1
            if (position(row.problem) < HELD_OUT) == held_out:
                found.setdefault(row.problem, row)
            if len(found) == count:
                return list(found.values())
        if count:
            raise DataError(
                f"reasoning-gym's '{data.family}' gave {len(found)} different problems in {tried} tries, "
                f"{count} are wanted",
                SIZES,
                "ask for fewer, or make the family larger with data.options",
            )
        return []

    held = draw((data.test or 0) + (data.validation or 0), EXAM_SEED, True)
    trained = draw((data.demos or 0) + (data.prompts or 0), seed, False)
    return Splits(
        demos=trained[: data.demos],
        validation=held[data.test :],
        prompts=trained[data.demos :],
        test=held[: data.test],
    )


def _entries(data: ReasoningGymData, seed: int) -> Iterator[Row]:
    import difflib

    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if data.family not in DATASETS:
        near = difflib.get_close_matches(data.family, DATASETS, n=3)
        raise RecipeError(
            f"reasoning-gym has no family '{data.family}'",
            "data.family",
            f"did you mean {' or '.join(near)}?" if near else f"one of its {len(DATASETS)}, for example chain_sum",
        )
    try:
        dataset = reasoning_gym.create_dataset(data.family, seed=seed, size=FAMILY_SIZE, **data.options)
    except (TypeError, ValueError, AssertionError) as error:
        raise RecipeError(
            f"reasoning-gym's '{data.family}' refuses its options: {error}",
            "data.options",
            f"it has {', '.join(f.name for f in dataclasses.fields(DATASETS[data.family][1]))}",
        ) from None
    for number, entry in enumerate(dataset, 1):
        if entry["answer"] is None:
            raise RecipeError(
                f"the problems of reasoning-gym's '{data.family}' have no single answer to compare with",
                "data.family",
                "take a family whose entries have an answer, for example chain_sum",
            )
        answer = str(entry["answer"])
        yield Row(entry["question"], answer, answer, origin=f"{data.family} entry {number}")
