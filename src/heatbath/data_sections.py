"""The `[data]` table of a recipe, one class for each source, and the types that every table is made of.

Importing this module imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator


def _number(value: Any) -> Any:
    """Not true and false, which pydantic takes for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("input should be a number")
    return value


Whole = Annotated[int, BeforeValidator(_number)]
Real = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Switch = Annotated[bool, Field(strict=True)]  # neither 1 nor "yes"
Count = Annotated[Whole, Field(ge=0)]
Positive = Annotated[Whole, Field(ge=1)]
Finite = Annotated[Real, Field(gt=0)]
Unit = Annotated[Real, Field(ge=0, lt=1)]
Share = Annotated[Real, Field(ge=0, le=1)]
Rate = Annotated[Real, Field(ge=0)]
Name = Annotated[str, Field(min_length=1)]  # of a file or a table: an empty one would be the folder around it


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Data(Section):
    """What every source has. Sizes count problems; `paths` solutions of each become demonstrations.

    Rows of `demos` and `prompts` that share `ngram` words in a row with a problem of `decontaminate`, files or names of
    tasks, are removed; the tasks' own files lie in `data_dir` (default: that of [eval]). `system` is a system message
    put before every question.
    """

    demos: Count = 0
    validation: Count = 0
    prompts: Count = 0
    test: Count = 0
    paths: Positive = 1
    system: str | None = None
    decontaminate: list[Name] = []
    ngram: Annotated[Whole, Field(ge=2)] = 13
    data_dir: Path | None = None

    @field_validator("decontaminate")
    @classmethod
    def whole_paths(cls, value: list[str]) -> list[str]:
        from heatbath.data.tasks import is_task, settled

        return [settled(name) if is_task(name) else str(whole(Path(name))) for name in value]

    @field_validator("data_dir")
    @classmethod
    def whole_data_dir(cls, value: Path | None) -> Path | None:
        return None if value is None else whole(value)


class NoData(Data):
    """No rows of one's own: an evaluation of `eval.tasks` alone."""

    source: Literal["none"]


class ProceduralData(Data):
    """What the built-in tasks have: solutions in one of several `forms`, of which a share `label_noise` is wrong."""

    forms: list[str]
    label_noise: Share = 0.0
    demos: Count = 128
    validation: Count = 32
    prompts: Count = 256
    test: Count = 100

    @field_validator("forms", "operations", check_fields=False)
    @classmethod
    def distinct(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("each may be named once")
        return value

    @model_validator(mode="after")
    def enough_forms(self) -> Self:
        if self.paths > len(self.forms):
            raise ValueError(f"paths = {self.paths} solutions of a problem need as many forms, not {len(self.forms)}")
        return self


class ArithmeticData(ProceduralData):
    """The built-in task: sums with worked solutions (`data/arithmetic.py`)."""

    source: Literal["arithmetic"]
    digits: Annotated[Whole, Field(ge=1, le=9)] = 2
    operations: Annotated[list[Literal["+", "-"]], Field(min_length=1)] = ["+"]
    forms: Annotated[list[Literal["tens", "columns", "round", "ones", "bare"]], Field(min_length=1)] = [
        "tens",
        "columns",
        "round",
        "ones",
    ]


class FunctionsData(ProceduralData):
    """The built-in programming task: functions of a list with hidden tests (`data/functions.py`)."""

    source: Literal["functions"]
    forms: Annotated[list[Literal["expression", "steps", "loop", "chain"]], Field(min_length=1)] = [
        "expression",
        "steps",
        "loop",
        "chain",
    ]


class ReasoningGymData(Data):
    """A family of reasoning-gym by its name; `options` are that family's own. Its solution is the bare answer."""

    source: Literal["reasoning_gym"]
    family: str
    options: dict[str, Any] = {}


class Fields(Section):
    """The names of the fields in the user's own rows.

    `solution` may name several fields, each with one solution of the problem, and a field may hold a list of them.
    `messages` names a field of chat messages instead: the last assistant turn is the solution, what stands before it
    the problem. Of the answer field only what follows the last `answer_after` counts. `columns` are numbers that the
    objective reads: one for the row, or one per supervised token. `kind` labels rows, for the surprise of each kind.
    `options` are the options of a multiple-choice question, which are asked with it; `tests` the tests of a programming
    problem (`*` is the whole row, for tables whose columns are the tests).
    """

    question: str = "question"
    solution: str | list[str] = "solution"
    answer: str = "answer"
    messages: str | None = None
    answer_after: str | None = None
    columns: list[str] = []
    kind: str | None = None
    options: str | None = None
    tests: str | None = None

    @field_validator("columns")
    @classmethod
    def free_names(cls, value: list[str]) -> list[str]:
        if value:
            from heatbath.ideas.statistics import STATS

            taken = {*STATS, "input_ids", "labels", "attention_mask", "position_ids", "seq_lengths", "sequence_weight"}
            taken.add("replay")
            if used := sorted(taken.intersection(value)):
                raise ValueError(f"'{used[0]}' is the name of something else; rename the column")
        return value


class TableData(Data):
    """Rows from tables. A split is read from its own table (`demos_from`, …; its size, where given, takes the first
    rows), else drawn from `pool` by content hash, disjoint from the others. `test_fields` are those of `test_from`
    where they differ."""

    demos: Count | None = None
    validation: Count | None = None
    prompts: Count | None = None
    test: Count | None = None
    pool: Name | None = None
    demos_from: Name | None = None
    validation_from: Name | None = None
    prompts_from: Name | None = None
    test_from: Name | None = None
    fields: Fields = Fields()
    test_fields: Fields | None = None

    @model_validator(mode="after")
    def pool_where_needed(self) -> Self:
        if self.pool is None:
            for split in ("demos", "validation", "prompts", "test"):
                if getattr(self, split) and getattr(self, f"{split}_from") is None:
                    raise ValueError(f"{split} = {getattr(self, split)} rows of which table? name {split}_from or pool")
        return self


class FilesData(TableData):
    """JSON-lines, Parquet or CSV files; paths are relative to `folder`, and that to the working folder."""

    source: Literal["files"]
    folder: Path = Field(default=Path(), validate_default=True)

    @field_validator("folder")
    @classmethod
    def whole_path(cls, value: Path) -> Path:
        return whole(value)


class HubData(TableData):
    """A dataset of the Hugging Face hub (or a folder that `datasets.load_dataset` reads); tables are its splits, in the
    library's own notation (`train`, `train[:1000]`)."""

    source: Literal["hub"]
    name: Name
    config: str | None = None
    revision: str | None = None


class DeepMathData(TableData):
    """DeepMath-103K (arXiv 2504.11456; MIT) in the first paper's three disjoint random subsets.

    `r1_solution` is which of the three DeepSeek-R1 solutions is learned; the paper does not say which it used. The
    system message is the one DeepMath's authors prepare their rows with, in our words. `pool` is a local copy, a file
    or a folder; `fields` are those of the other tables.
    """

    source: Literal["deepmath"]
    name: Name = "zwhe99/DeepMath-103K"
    revision: str | None = None
    demos: Count | None = 10_000
    validation: Count | None = 1_000
    prompts: Count | None = 10_000
    r1_solution: Literal[1, 2, 3] = 1
    system: str | None = "Please reason step by step, and put your final answer within \\boxed{}."

    @field_validator("pool")
    @classmethod
    def whole_path(cls, value: str | None) -> str | None:
        return value if value is None or value == "train" else str(whole(Path(value)))

    @model_validator(mode="after")
    def pool_where_needed(self) -> Self:
        return self


AnyData = Annotated[
    NoData | ArithmeticData | FunctionsData | ReasoningGymData | FilesData | HubData | DeepMathData,
    Field(discriminator="source"),
]


def whole(path: Path) -> Path:
    """Absolute, so that a run can be gone on with from any working folder. Raises ValueError as `at_home` does."""
    return at_home(path).absolute()


def at_home(path: Path) -> Path:
    """The path with `~` and `~name` replaced. Raises ValueError where nobody has that name."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(f"there is no home folder '{path.parts[0]}'") from None
