"""The `[eval]` table of a recipe: what the policies are asked, how their answers are sampled, and who judges them.

Importing this module imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from heatbath.addresses import require_no_credentials
from heatbath.data_sections import Positive, Rate, Real, Section, whole


class TaskEntry(Section):
    """A task of `eval.tasks` with what this recipe asks of it instead of its definition's own or [eval]'s sampling."""

    name: str
    samples: Positive | None = None
    k: Annotated[list[Positive], Field(min_length=1)] | None = None
    temperature: Rate | None = None
    top_p: Annotated[Real, Field(gt=0, le=1)] | None = None
    max_new_tokens: Positive | None = None
    problems: Positive | None = None

    @field_validator("name")
    @classmethod
    def whole_path(cls, value: str) -> str:
        from heatbath.data.tasks import settled

        return settled(value)


class Judge(Section):
    """The model that rates the answers of judged tasks (mt_bench): its OpenAI-compatible server's address, and its
    name there. The key is read from the environment variable `key_env`."""

    endpoint: str
    model: str
    key_env: str = "OPENAI_API_KEY"

    @field_validator("endpoint")
    @classmethod
    def bare_address(cls, value: str) -> str:
        return require_no_credentials(value) or value


class Eval(Section):
    """Sampling of the test problems and of the `tasks` (`heatbath recipes --tasks` lists them; a file of one's own by
    its path). `k` are the pass@k reported; each needs `samples` ≥ k. temperature 0 is greedy. `batch` counts prompts;
    without it as many as fit are sampled at a time.

    A task is sampled as its definition says, else as this table does; an entry { name = "aime24", samples = 64 } comes
    before both. `problems` takes only the first of each task, `data_dir` is where local copies of the tasks' files lie.

    `split` are the rows that are asked: test, or validation, to choose settings by. `engine` is transformers, "vllm",
    or "api": the OpenAI-compatible server at `endpoint`, where `served` names the model of each policy (only policies
    named there are sampled).
    """

    samples: Positive = 8
    k: Annotated[list[Positive], Field(min_length=1)] = [1, 8]
    temperature: Rate = 0.6
    top_p: Annotated[Real, Field(gt=0, le=1)] = 1.0
    max_new_tokens: Positive = 8192
    batch: Positive | None = None
    tasks: list[TaskEntry] = []
    problems: Positive | None = None
    split: Literal["test", "validation"] = "test"
    data_dir: Path | None = None
    engine: Literal["transformers", "vllm", "api"] = "transformers"
    endpoint: str | None = None
    served: dict[Literal["base", "init", "final"], str] = {}
    judge: Judge | None = None

    @field_validator("tasks", mode="before")
    @classmethod
    def shorthand(cls, value: Any) -> Any:
        entries = value if isinstance(value, list) else [value]
        return [{"name": entry} if isinstance(entry, str) else entry for entry in entries]

    @field_validator("tasks")
    @classmethod
    def distinct(cls, value: list[TaskEntry]) -> list[TaskEntry]:
        names = [entry.name for entry in value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"the task '{twice}' is there twice")
        return value

    @field_validator("endpoint")
    @classmethod
    def bare_address(cls, value: str | None) -> str | None:
        return require_no_credentials(value)

    @field_validator("data_dir")
    @classmethod
    def whole_path(cls, value: Path | None) -> Path | None:
        return None if value is None else whole(value)

    @model_validator(mode="after")
    def enough_samples(self) -> Self:
        if max(self.k) > self.samples:
            raise ValueError(f"pass@{max(self.k)} needs at least {max(self.k)} samples, not {self.samples}")
        return self

    @model_validator(mode="after")
    def served_somewhere(self) -> Self:
        if self.engine == "api" and (self.endpoint is None or not self.served):
            raise ValueError('engine = "api" needs endpoint, and served = { base = "its name there" }')
        if self.engine != "api" and (self.endpoint is not None or self.served):
            raise ValueError(f'endpoint and served are for engine = "api", not "{self.engine}"')
        return self
