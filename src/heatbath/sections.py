"""The tables of a recipe, typed. Defaults are the first paper's settings (arXiv 2601.09233, appendix E).

Importing this module imports no torch; objectives and trainer fields are looked up only where a recipe names them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Unit = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Data(Section):
    """What every source has. Sizes count problems; `paths` solutions of each become demonstrations.

    Rows of `demos` and `prompts` that share `ngram` words in a row with a problem of the files in `decontaminate` are
    removed. `system` is a system message put before every question.
    """

    demos: Count = 0
    validation: Count = 0
    prompts: Count = 0
    test: Count = 0
    paths: Positive = 1
    system: str | None = None
    decontaminate: list[Path] = []
    ngram: Annotated[int, Field(ge=2)] = 13

    @field_validator("decontaminate")
    @classmethod
    def whole_paths(cls, value: list[Path]) -> list[Path]:
        return [_whole(path) for path in value]


class ArithmeticData(Data):
    """The built-in task: sums with worked solutions (`data/arithmetic.py`)."""

    source: Literal["arithmetic"]
    digits: Annotated[int, Field(ge=1, le=9)] = 2
    operations: Annotated[list[Literal["+", "-"]], Field(min_length=1)] = ["+"]
    forms: Annotated[list[Literal["tens", "columns", "round", "ones", "bare"]], Field(min_length=1)] = [
        "tens",
        "columns",
        "round",
        "ones",
    ]
    label_noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    demos: Count = 128
    validation: Count = 32
    prompts: Count = 256
    test: Count = 100

    @field_validator("operations", "forms")
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
    pool: str | None = None
    demos_from: str | None = None
    validation_from: str | None = None
    prompts_from: str | None = None
    test_from: str | None = None
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
        return _whole(value)


class HubData(TableData):
    """A dataset of the Hugging Face hub (or a folder that `datasets.load_dataset` reads); tables are its splits, in the
    library's own notation (`train`, `train[:1000]`)."""

    source: Literal["hub"]
    name: str
    config: str | None = None
    revision: str | None = None


class DeepMathData(TableData):
    """DeepMath-103K (arXiv 2504.11456; MIT) in the first paper's three disjoint random subsets.

    `r1_solution` is which of the three DeepSeek-R1 solutions is learned; the paper does not say which it used. The
    system message is the one DeepMath's authors prepare their rows with, in our words. `pool` is a local copy, a file
    or a folder; `fields` are those of the other tables.
    """

    source: Literal["deepmath"]
    name: str = "zwhe99/DeepMath-103K"
    revision: str | None = None
    demos: Count | None = 10_000
    validation: Count | None = 1_000
    prompts: Count | None = 10_000
    r1_solution: Literal[1, 2, 3] = 1
    system: str | None = "Please reason step by step, and put your final answer within \\boxed{}."

    @field_validator("pool")
    @classmethod
    def whole_path(cls, value: str | None) -> str | None:
        return value if value is None or value == "train" else str(_whole(Path(value)))

    @model_validator(mode="after")
    def pool_where_needed(self) -> Self:
        return self


AnyData = Annotated[
    ArithmeticData | ReasoningGymData | FilesData | HubData | DeepMathData, Field(discriminator="source")
]


class ObjectiveSpec(BaseModel):
    """`name` and that objective's own hyper-parameters, checked against its definition in ideas/objectives.py."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def hyper(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @field_validator("name")
    @classmethod
    def whole_path(cls, value: str) -> str:
        path, colon, attribute = value.rpartition(":")
        return f"{_whole(Path(path))}:{attribute}" if colon and path.endswith(".py") else value

    @model_validator(mode="after")
    def buildable(self) -> Self:
        from heatbath.ideas.objectives import objective

        objective(self.name, **self.hyper)
        return self


class Optimizer(Section):
    """AdamW, shared by the stages that train. `lr` per step, `schedule` as transformers names it. `save_every` steps
    the stage keeps what it needs to be resumed (0: never)."""

    lr: Finite
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    weight_decay: Rate = 0.01
    adam_betas: tuple[Unit, Unit] = (0.9, 0.95)
    max_grad_norm: Finite = 1.0
    save_every: Count = 50


class Pretrain(Optimizer):
    """A small Llama with one token per character, trained from random weights on the demonstrations. `width` is d;
    `batch` counts sequences."""

    width: Positive = 160
    layers: Positive = 4
    heads: Positive = 4
    lr: Finite = 4e-3
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: Count = 50
    epochs: Finite = 4
    batch: Positive = 64

    @model_validator(mode="after")
    def divisible(self) -> Self:
        if self.width % (2 * self.heads):
            raise ValueError(f"width ({self.width}) must be a multiple of 2 × heads ({2 * self.heads})")
        return self


class Lora(Section):
    """Low-rank adapters in both training stages (arXiv 2106.09685), merged into a plain model at the end of each. The
    base's view is then the same model with its adapters off."""

    rank: Positive = 16
    alpha: Finite = 32.0
    dropout: Unit = 0.0
    targets: str | list[str] = "all-linear"


class SFT(Optimizer):
    """The warm start. `batch` and `micro_batch` count sequences: per optimizer step, and per forward pass. `max_steps`
    ends before `epochs` do.

    `reference` is where the base's view comes from: a frozen model (with LoRA the adapters off), or a cache on disk:
    "hidden" states of every token, exact, or its "surprise" at every token and hidden states only where the target
    leaves the base more than `epsilon`.

    More than 1 % of rows longer than `max_length` is an error unless `truncate`. `packing` lays the sequences of a
    micro-batch end to end instead of padding them; none sees another. `trainer` holds any field of `trl.SFTConfig`.
    """

    objective: ObjectiveSpec = Field(default_factory=lambda: ObjectiveSpec(name="sft"))
    reference: Literal["model", "hidden", "surprise"] = "model"
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    reduction: Literal["token_mean", "sequence_sum", "microbatch_token_mean"] = "token_mean"
    lr: Finite = 1e-5
    epochs: Finite = 6
    max_steps: Positive | None = None
    batch: Positive = 128
    micro_batch: Positive = 8
    max_length: Annotated[int, Field(ge=2)] = 8192
    truncate: bool = False
    packing: bool = False
    log_every: Positive = 1
    trainer: dict[str, Any] = {}

    @field_validator("objective", mode="before")
    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("trainer")
    @classmethod
    def known_fields(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _checked_fields("sft", value)

    @model_validator(mode="after")
    def divisible(self) -> Self:
        if self.batch % min(self.micro_batch, self.batch):
            raise ValueError(f"batch ({self.batch}) must be a multiple of micro_batch ({self.micro_batch})")
        return self

    @model_validator(mode="after")
    def cache_suffices(self) -> Self:
        if self.reference == "surprise":
            from heatbath.ideas.objectives import objective

            goal = objective(self.objective.name, **self.objective.hyper)
            if {"ref_ce", "rev_ce", "ref_entropy"} & set(goal.needs) and not hasattr(goal, "target_mass"):
                raise ValueError(
                    f"'{self.objective.name}' needs the base everywhere, which reference = \"surprise\" does not hold; "
                    'take "hidden" or "model"'
                )
        return self


class RL(Optimizer):
    """Reinforcement learning. `prompts` are sampled at once, `update_prompts` enter one optimizer step, each with
    `group_size` completions; `micro_batch` counts completions per forward pass. `max_steps` ends before `epochs` do.
    `save_every` is rounded up to whole generations. `trainer` holds any field of `trl.GRPOConfig`."""

    policy: Literal["paper"] = "paper"
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    lr: Finite = 1e-6
    epochs: Finite = 1
    max_steps: Positive | None = None
    prompts: Positive = 128
    update_prompts: Positive = 64
    group_size: Annotated[int, Field(ge=2)] = 8
    micro_batch: Positive = 8
    temperature: Annotated[float, Field(gt=0)] = 1.0
    max_new_tokens: Positive = 8192
    kl_every: Positive = 1
    save_every: Count = 10
    trainer: dict[str, Any] = {}

    @field_validator("trainer")
    @classmethod
    def known_fields(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _checked_fields("rl", value)

    @model_validator(mode="after")
    def divisible(self) -> Self:
        if self.prompts % self.update_prompts:
            raise ValueError(f"prompts ({self.prompts}) must be a multiple of update_prompts ({self.update_prompts})")
        if (self.update_prompts * self.group_size) % self.micro_batch:
            raise ValueError(
                f"update_prompts × group_size ({self.update_prompts * self.group_size}) must be a multiple of "
                f"micro_batch ({self.micro_batch})"
            )
        return self


class Eval(Section):
    """Sampling of the test problems. `k` are the pass@k reported; each needs `samples` ≥ k."""

    samples: Positive = 8
    k: Annotated[list[Positive], Field(min_length=1)] = [1, 8]
    temperature: Annotated[float, Field(gt=0)] = 0.6
    max_new_tokens: Positive = 8192
    batch: Positive = 64

    @model_validator(mode="after")
    def enough_samples(self) -> Self:
        if max(self.k) > self.samples:
            raise ValueError(f"pass@{max(self.k)} needs at least {max(self.k)} samples, not {self.samples}")
        return self


class Reward(Section):
    """What a completion earns: the verdict of a grader, and where wished a reward model or functions of one's own.

    `kind` is what a gold answer is; `profile` and `stages` (import paths) are for math, `isolation` for code. `model`
    is a sequence-classification checkpoint, which is then the whole reward unless `weights` says otherwise: a number
    for `verdict`, for `model` and for any reward function in TRL's form, by import path. `sqrt_length` divides the
    model's score by the square root of the completion's tokens. A verdict may take `deadline` seconds; `workers`
    processes grade. More than `failed_share` of a step's verdicts (and more than one) that are failures of grading stop
    the run.
    """

    kind: Literal["math", "choice", "code"] = "math"
    profile: Literal["strict", "paper"] = "strict"
    stages: list[str] = []
    isolation: str | None = None
    model: str | None = None
    sqrt_length: bool = False
    weights: dict[str, float] = {}
    deadline: Annotated[float, Field(gt=0)] = 10.0
    workers: Positive = 2
    failed_share: Annotated[float, Field(ge=0, le=1)] = 0.01

    @field_validator("weights")
    @classmethod
    def known_rewards(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            if name not in ("verdict", "model") and ":" not in name:
                raise ValueError(f"'{name}' is neither verdict, model nor an import path such as rewards.py:brevity")
        return value

    @model_validator(mode="after")
    def fitting_settings(self) -> Self:
        if self.kind != "math" and (self.profile != "strict" or self.stages):
            raise ValueError(f"profile and stages are for math answers, not for {self.kind}")
        if self.kind != "code" and self.isolation is not None:
            raise ValueError(f"isolation is for code, not for {self.kind} answers")
        if self.model is None and ("model" in self.weights or self.sqrt_length):
            raise ValueError("there is no reward model: set reward.model")
        return self

    @property
    def weighted(self) -> dict[str, float]:
        """The weight of each reward; verdicts are measured even where theirs is 0."""
        return {"verdict": float(self.model is None)} | ({"model": 1.0} if self.model else {}) | self.weights


class Recipe(Section):
    """A whole run. A stage without its table is left out: no `[sft]` is direct RL, no `[rl]` is SFT alone.

    `model` is where the base comes from, unless `[pretrain]` makes it. `template` is a chat template for models without
    one (or instead of theirs): the name of a shipped one, or a Jinja file.
    """

    model: str | None = None
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    template: str | None = None
    data: AnyData
    pretrain: Pretrain | None = None
    lora: Lora | None = None
    sft: SFT | None = None
    rl: RL | None = None
    eval: Eval = Eval()
    reward: Reward = Reward()


def contradictions(table: dict[str, Any]) -> list[str]:
    """What no single table of a recipe can know, read from the raw tables so that it is told beside other mistakes."""
    found = []
    table = {key: value for key, value in table.items() if value is not None}
    if not {"model", "pretrain"} & table.keys():
        found.append("model: required (or a [pretrain] table that makes one)")
    if {"model", "pretrain"} <= table.keys():
        found.append("model: [pretrain] makes the base from nothing; leave out model, or [pretrain]")
    data = table.get("data")
    if isinstance(data, dict) and data.get("source") in ("files", "hub"):
        for stage, split in (("pretrain", "demos"), ("sft", "demos"), ("rl", "prompts")):
            given = data.get(split) != 0 if data.get(f"{split}_from") else bool(data.get(split))
            if stage in table and not given:
                found.append(f"data: the {stage} stage reads data.{split}, and the recipe gives it no row")
    return found


def _whole(path: Path) -> Path:
    """Absolute, so that a run can be gone on with from any working folder."""
    return path.expanduser().absolute()


def _checked_fields(stage: str, given: dict[str, Any]) -> dict[str, Any]:
    if given:
        from heatbath.stages.trainer_fields import check_fields

        check_fields(stage, given)
    return given
