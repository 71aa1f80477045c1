"""One typed TOML file describes a whole run. Unknown keys are refused; nothing a user sets is ever overwritten.

Defaults are the first paper's settings (arXiv 2601.09233, appendix E). Importing this module imports no torch.
"""

from __future__ import annotations

import difflib
import importlib.resources
import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from heatbath.errors import RecipeError

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Epochs = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Unit = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class ArithmeticData(Section):
    """The built-in task: sums with worked solutions (`data/arithmetic.py`). Split sizes are numbers of problems."""

    source: Literal["arithmetic"]
    digits: Annotated[int, Field(ge=1, le=9)] = 2
    operations: Annotated[list[Literal["+", "-"]], Field(min_length=1)] = ["+"]
    paths: Annotated[list[Literal["tens", "columns", "round"]], Field(min_length=1)] = ["tens", "columns", "round"]
    demos: Count = 128
    validation: Count = 32
    prompts: Count = 256
    test: Count = 100
    system: str | None = None

    @field_validator("operations", "paths")
    @classmethod
    def distinct(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("each may be named once")
        return value


class Fields(Section):
    """The names of the fields in the user's own rows."""

    question: str = "question"
    solution: str = "solution"
    answer: str = "answer"


class JsonlData(Section):
    """JSON-lines files; a file is needed for each stage that reads it."""

    source: Literal["jsonl"]
    demos: Path | None = None
    validation: Path | None = None
    prompts: Path | None = None
    test: Path | None = None
    fields: Fields = Fields()
    system: str | None = None


class ObjectiveSpec(BaseModel):
    """`name` and that objective's own hyper-parameters, checked against its definition in ideas/objectives.py."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def hyper(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    @model_validator(mode="after")
    def buildable(self) -> Self:
        from heatbath.ideas.objectives import objective

        objective(self.name, **self.hyper)
        return self


class Optimizer(Section):
    """AdamW, shared by both stages. `lr` per step, `schedule` as transformers names it."""

    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    weight_decay: Rate = 0.01
    adam_betas: tuple[Unit, Unit] = (0.9, 0.95)
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class SFT(Optimizer):
    """The warm start. `batch` and `micro_batch` count sequences: per optimizer step, and per forward pass."""

    objective: ObjectiveSpec = Field(default_factory=lambda: ObjectiveSpec(name="sft"))
    reduction: Literal["token_mean", "sequence_sum", "microbatch_token_mean"] = "token_mean"
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-5
    epochs: Epochs = 6
    batch: Positive = 128
    micro_batch: Positive = 8
    max_length: Annotated[int, Field(ge=2)] = 8192
    log_every: Positive = 1

    @field_validator("objective", mode="before")
    @classmethod
    def shorthand(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def divisible(self) -> Self:
        if self.batch % min(self.micro_batch, self.batch):
            raise ValueError(f"batch ({self.batch}) must be a multiple of micro_batch ({self.micro_batch})")
        return self


class RL(Optimizer):
    """Reinforcement learning. `prompts` are sampled at once, `update_prompts` enter one optimizer step, each with
    `group_size` completions; `micro_batch` counts completions per forward pass. `max_steps` ends before `epochs` do."""

    policy: Literal["paper"] = "paper"
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-6
    epochs: Epochs = 1
    max_steps: Positive | None = None
    prompts: Positive = 128
    update_prompts: Positive = 64
    group_size: Annotated[int, Field(ge=2)] = 8
    micro_batch: Positive = 8
    temperature: Annotated[float, Field(gt=0)] = 1.0
    max_new_tokens: Positive = 8192
    kl_every: Positive = 1

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
    """Grading: the seconds a verdict may take and the worker processes that may work on verdicts."""

    deadline: Annotated[float, Field(gt=0)] = 10.0
    workers: Positive = 2


class Recipe(Section):
    """A whole run. A stage without its table is left out: no `[sft]` is direct RL, no `[rl]` is SFT alone."""

    model: str
    seed: int = 0
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    data: Annotated[ArithmeticData | JsonlData, Field(discriminator="source")]
    sft: SFT | None = None
    rl: RL | None = None
    eval: Eval = Eval()
    reward: Reward = Reward()

    @model_validator(mode="after")
    def data_for_every_stage(self) -> Self:
        if isinstance(self.data, JsonlData):
            for stage, key in (("sft", "demos"), ("rl", "prompts")):
                if getattr(self, stage) is not None and getattr(self.data, key) is None:
                    raise ValueError(f"the {stage} stage reads data.{key}, and the recipe names no such file")
        return self


def load(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """The recipe in a TOML file (or a shipped one by its bare name), with `section.key=value` overrides applied.

    An override of `….objective.name` starts that objective from its own defaults. Raises RecipeError listing every
    mistake at once.
    """
    file = find(path)
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"cannot read the recipe: {error}", str(path), "heatbath recipes lists the shipped ones"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"not valid TOML: {error}", str(file), "see https://toml.io") from None
    for override in sorted(overrides or [], key=lambda o: not o.partition("=")[0].endswith("objective.name")):
        _override(table, override)
    return parse(table, str(file))


def parse(table: dict[str, Any], where: str = "recipe") -> Recipe:
    """The recipe of an already parsed table. Raises RecipeError listing every mistake at once."""
    try:
        return Recipe.model_validate(table)
    except ValidationError as error:
        problems = [_explain(e) for e in error.errors()]
        count = f"{len(problems)} mistake{'s' if len(problems) > 1 else ''}"
        listed = "".join(f"\n  - {p}" for p in problems)
        raise RecipeError(f"{count} in the recipe:{listed}", where, "fix the keys named above") from None


def shipped() -> dict[str, Path]:
    """Name → file of the recipes that come with the package."""
    installed = Path(str(importlib.resources.files("heatbath"))) / "recipes"
    folder = installed if installed.is_dir() else Path(__file__).parents[2] / "recipes"
    return {p.stem: p for p in sorted(folder.glob("*.toml"))}


def find(path: str | Path) -> Path:
    """The file itself, or the shipped recipe of that bare name."""
    if Path(path).exists():
        return Path(path)
    recipes = shipped()
    if str(path) in recipes:
        return recipes[str(path)]
    near = difflib.get_close_matches(Path(path).stem, recipes, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"shipped recipes: {', '.join(recipes)}"
    raise RecipeError("no such recipe", str(path), hint)


def as_toml(recipe: Recipe) -> str:
    """The resolved recipe, every default written out."""
    top, tables = [], []
    for key, value in recipe.model_dump(mode="json").items():
        if isinstance(value, dict):
            body = "\n".join(f"{k} = {_literal(v)}" for k, v in value.items() if v is not None)
            tables.append(f"[{key}]\n{body}")
        elif value is not None:
            top.append(f"{key} = {_literal(value)}")
    return "\n\n".join(["\n".join(top), *tables]) + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # a JSON string is a TOML string
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_literal(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_literal(v) for v in value) + "]"
    return repr(value)


def _override(table: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise RecipeError("an override is section.key=value", text, "for example sft.lr=2e-5")
    *path, last = key.strip().split(".")
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = value
    if path and path[-1] == "objective" and last == "name":
        path, last, parsed = path[:-1], "objective", {"name": parsed}
    for part in path:
        inner = table.setdefault(part, {})
        if isinstance(inner, str) and part == "objective":
            inner = table[part] = {"name": inner}
        if not isinstance(inner, dict):
            raise RecipeError(f"'{part}' is not a table", text, "heatbath recipes shows recipes with every table")
        table = inner
    table[last] = parsed


def _explain(error: Any) -> str:
    path = [part for part in error["loc"] if part not in ("arithmetic", "jsonl")]
    key = ".".join(str(p) for p in path)
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key{_did_you_mean(path)}"
    if error["type"] == "missing":
        return f"{key}: required"
    message = error["msg"].removeprefix("Value error, ")
    got = "" if isinstance(error["input"], dict) else f" (got {error['input']!r})"
    return f"{key or 'recipe'}: {message[0].lower() + message[1:]}{got}"


def _did_you_mean(path: list[Any]) -> str:
    """The nearest key of the same table, or the table in which a key of that very name lives."""
    from heatbath.ideas.objectives import OBJECTIVES

    word = str(path[-1])
    keys = surface() + [f"sft.objective.{f}" for cls in OBJECTIVES.values() for f in cls.__dataclass_fields__]
    table = ".".join(str(p) for p in path[:-1])
    inside = [k.removeprefix(f"{table}.") for k in keys if not table or k.startswith(f"{table}.")]
    here = sorted({k.partition(".")[0] for k in inside})
    near = difflib.get_close_matches(word, here, n=1, cutoff=0.6)
    if near:
        return f", did you mean '{near[0]}'?"
    elsewhere = [k for k in keys if k.rpartition(".")[2] == word]
    if elsewhere:
        return f" here, did you mean '{elsewhere[0]}'?"
    return f" (known here: {', '.join(here)})" if here else ""


def surface() -> list[str]:
    """Every key a recipe may hold, sorted; an objective's hyper-parameters are its own."""
    keys: set[str] = set()

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, info in model.model_fields.items():
            arguments = getattr(info.annotation, "__args__", (info.annotation,))
            nested = [a for a in arguments if isinstance(a, type) and issubclass(a, BaseModel)]
            for inner in nested:
                walk(inner, f"{prefix}{name}.")
            if not nested:
                keys.add(prefix + name)

    walk(Recipe, "")
    return sorted(keys)
