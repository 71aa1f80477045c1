"""Tasks: what a benchmark asks and how its answers are graded, each a small versioned definition in TOML.

`heatbath recipes --tasks` lists the shipped ones; docs/tasks.md says how to write one.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from heatbath import toml_files
from heatbath.data.rows import Row
from heatbath.data.task_records import Reading
from heatbath.data_sections import Fields, Name, Positive, Rate, Real, Section, whole
from heatbath.errors import DataError, RecipeError, got

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from heatbath.verify.graders import Grader
    from heatbath.verify.judge import Prompts

QUESTION = "{question}"
EXAM = 100  # problems of a procedural task whose definition says nothing else
LM_EVAL, LM_EVAL_CHAT = "lm_eval:", "lm_eval_chat:"
HARNESS_FILE = re.compile(r"\.ya?ml(?:@[^/]*)?\Z")
REASONING_GYM = "reasoning_gym:"
TAKEN = ("test",)  # what results call a run's own problems


class TaskSampling(Section):
    """What the definition of a benchmark demands of the sampling; the rest is the recipe's."""

    samples: Positive | None = None
    k: Annotated[list[Positive], Field(min_length=1)] | None = None
    temperature: Rate | None = None
    top_p: Annotated[Real, Field(gt=0, le=1)] | None = None
    max_new_tokens: Positive | None = None


class Hub(Reading):
    """A dataset of the hub with the same rows. What it does not set of `Reading` is the task's. `config = "*"` reads
    every configuration, whose name is then the column `config`."""

    id: Name
    config: str | None = None
    split: str = "test"
    revision: str | None = None


class Task(Reading):
    """A benchmark: where its rows are, how they are asked, and what an answer is graded as.

    `file` lies under `eval.data_dir` (or beside the task's own file); without it the rows come from `hub`. `remedy`
    says how else to get them. `prompt` holds `{question}` once. `source` is a table, or procedural: "arithmetic", or a
    `family` of "reasoning_gym", with their `options`. A judged task also has `references` and `judge_prompts`, files.
    """

    name: Name
    version: Positive = 1
    title: str = ""
    licence: str = ""
    link: str = ""
    kind: Literal["math", "choice", "code", "judge", "lm_eval"]
    source: Literal["table", "arithmetic", "reasoning_gym", "lm_eval"] = "table"
    file: Name | None = None
    hub: Hub | None = None
    remedy: str | None = None
    prompt: str = QUESTION
    system: str | None = None
    sampling: TaskSampling = TaskSampling()
    family: str | None = None
    options: dict[str, Any] = {}
    references: str | None = None
    judge_prompts: str | None = None
    _folder: Path | None = PrivateAttr(None)

    @field_validator("prompt")
    @classmethod
    def asks_once(cls, value: str) -> str:
        if value.count(QUESTION) != 1:
            raise ValueError("the prompt must hold {question} once")
        return value

    @model_validator(mode="after")
    def has_rows(self) -> Self:
        if self.source == "table" and self.file is None and self.hub is None:
            raise ValueError("rows of which table? name a file, or a hub dataset")
        if self.source == "reasoning_gym" and self.family is None:
            raise ValueError("source = 'reasoning_gym' needs a family")
        return self

    @model_validator(mode="after")
    def can_be_graded(self) -> Self:
        for columns in (self.columns, *([self._of_hub().columns] if self.hub else [])):
            if self.kind == "choice" and columns.options is None:
                raise ValueError("a choice needs options: fields.options, options_inside or distractors")
            if self.kind == "code" and columns.tests is None:
                raise ValueError("programs are graded by tests: name fields.tests ('*' is the whole row)")
        if self.kind == "judge" and self.file is None:
            raise ValueError("a judged task reads a file of questions in FastChat's form")
        return self

    @property
    def raw(self) -> bool:
        """Whether the question is continued as it stands, instead of being asked through the chat template."""
        return False

    @property
    def stops(self) -> list[str]:
        """Texts behind which nothing of a completion counts."""
        return []

    @property
    def origin(self) -> str:
        """Where its rows come from, in a few words."""
        if self.source != "table":
            return "built in" if self.source == "arithmetic" else f"reasoning-gym, {self.family}"
        if self.hub is None:
            return str(self.file)
        config = {None: "", "*": ", all configurations"}.get(self.hub.config, f", {self.hub.config}")
        return f"{self.hub.id}{config}, {self.hub.split}"

    def rows(self, data_dir: Path | None = None, problems: int | None = None) -> list[Row]:
        """The problems in the order of their table, in the task's prompt, or the first `problems` of them; `kind` is
        their subject. Raises DataError where neither file nor hub has them, and where they are not as many as the
        definition says."""
        rows = self._problems(data_dir, problems)
        return [dataclasses.replace(row, question=self.prompt.replace(QUESTION, row.question)) for row in rows]

    def questions(self, data_dir: Path | None = None) -> list[tuple[str, str]]:
        """(question, place) of every problem without prompt and options, as decontamination compares them."""
        if self.source == "table" and self.kind != "judge":
            from heatbath.data.tables import required

            reading, records = self._records(data_dir)
            name = reading.fields.question
            return [(required(record, name, "question", place), place) for record, place in records]
        rows = self._problems(data_dir, None)
        if self.kind == "judge":
            return [(turn, row.origin) for row in rows for turn in json.loads(str(row.answer))["turns"]]
        return [(row.asked, row.origin) for row in rows]

    def grader(self, *, workers: int = 2, deadline: float = 10.0, isolation: str | None = None) -> Grader:
        """What gives a verdict for each completion of its problems."""
        from heatbath.verify.graders import grader

        kind: Any = self.kind
        return grader(kind, workers=workers, deadline=deadline, isolation=isolation if kind == "code" else None)

    def prompts_of_judge(self, data_dir: Path | None = None) -> Prompts:
        """The judge's prompts: those of the file where it is there, else heatbath's own."""
        from heatbath.verify.judge import OWN, read_prompts

        path = self._path(self.judge_prompts, data_dir)
        return OWN if path is None else read_prompts(path)

    def _problems(self, data_dir: Path | None, problems: int | None) -> list[Row]:
        if self.source != "table":
            return self._procedural(problems)
        if self.kind == "judge":
            return self._judged(data_dir)[:problems]
        from heatbath.data.tables import rows_of

        reading, records = self._records(data_dir)
        made = [rows_of(record, place, reading.columns, ("answer",), 0)[0] for record, place in records[:problems]]
        return [dataclasses.replace(row, origin=f"{self.name}, {row.origin}") for row in made]

    def _records(self, data_dir: Path | None) -> tuple[Reading, list[tuple[dict[str, Any], str]]]:
        """How the table is read, and its prepared rows."""
        from heatbath.data.tables import read_file

        path = self._path(self.file, data_dir)
        reading = self if path is not None or self.hub is None else self._of_hub()
        read = list(read_file(path, f"task {self.name}") if path is not None else self._hub_records(data_dir))
        found = list(reading.kept(iter(read)))
        if reading.problems is not None and len(found) != reading.problems:
            raise DataError(
                f"'{self.name}' has {reading.problems:,} problems, but here are {len(found):,}",
                str(path or self.origin),
                "a whole copy of the benchmark; for a part of it `problems` of the recipe, or a task of your own",
            )
        if not found:
            raise reading.none_kept(self.name, len(read), str(path or self.origin))
        return reading, [(reading.prepared(record, place), place) for record, place in found]

    def _of_hub(self) -> Reading:
        assert self.hub is not None
        own = {key: getattr(self.hub, key) for key in self.hub.model_fields_set if key in Reading.model_fields}
        return Reading(**{key: own.get(key, getattr(self, key)) for key in Reading.model_fields})

    def _hub_records(self, data_dir: Path | None) -> Iterator[tuple[dict[str, Any], str]]:
        from heatbath.data.tables import read_hub

        if self.hub is None:
            raise self._absent(f"no file with the rows of '{self.name}'", data_dir)
        hub = self.hub
        try:
            for config in _configurations(hub):
                read = read_hub(hub.id, hub.split, self.name, config=config, revision=hub.revision, remedy="")
                for record, place in read:
                    yield record if hub.config != "*" else record | {"config": config}, place
        except DataError as error:
            raise self._absent(error.what, data_dir) from None

    def _absent(self, what: str, data_dir: Path | None) -> DataError:
        """The rows are nowhere; says what would help."""
        ways = []
        if self.file is not None:
            ways.append(
                f"set eval.data_dir to a folder with {self.file}"
                if data_dir is None
                else f"put {self.file} under {data_dir}"
            )
        if self.hub is not None:
            ways.append(f"with a connection the rows come from {self.origin}")
        if self.remedy is not None:
            ways.append(self.remedy)
        return DataError(what, f"task {self.name}", "; ".join(ways))

    def _path(self, name: str | None, data_dir: Path | None) -> Path | None:
        """That file under the data folder or beside the task's own, or None where it is in neither."""
        folders = [folder for folder in (data_dir, self._folder) if folder is not None]
        found = (folder / name for folder in folders if name is not None)
        return next((path for path in found if path.exists()), None)

    def _judged(self, data_dir: Path | None) -> list[Row]:
        """Questions of several turns: the first is the question, `answer` is JSON of id, turns and reference."""
        from heatbath.verify.judge import read_questions

        path = self._path(self.file, data_dir)
        if path is None:
            raise self._absent(f"no file with the rows of '{self.name}'", data_dir)
        questions = read_questions(path, self._path(self.references, data_dir))
        if self.problems is not None and len(questions) != self.problems:
            raise DataError(
                f"'{self.name}' has {self.problems} questions, but here are {len(questions)}", str(path), "a whole copy"
            )
        made = []
        for q in questions:
            answer = json.dumps({"id": q.id, "turns": q.turns, "reference": q.reference}, ensure_ascii=False)
            made.append(Row(q.turns[0], answer=answer, origin=f"{self.name}, question {q.id}", kind=q.category))
        return made

    def _procedural(self, problems: int | None) -> list[Row]:
        """The exam of a procedural task: problems held out from every training set that heatbath makes of it."""
        from heatbath.data import sources
        from heatbath.data_sections import ArithmeticData, ReasoningGymData

        whole = self.problems or EXAM
        sizes: Any = {"test": min(problems or whole, whole), "demos": 0, "validation": 0, "prompts": 0}
        if set_here := next((key for key in (*sizes, "source") if key in self.options), None):
            said = f"{self.source} takes no option '{set_here}' of a task"
            raise RecipeError(said, f"task {self.name}, options", "`problems` is how many are asked")
        try:
            if self.source == "arithmetic":
                data: Any = ArithmeticData(source="arithmetic", **sizes, **self.options)
            else:
                data = ReasoningGymData(source="reasoning_gym", family=str(self.family), options=self.options, **sizes)
        except ValidationError as error:
            said = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise RecipeError(
                f"{self.source} refuses its options: {said}", f"task {self.name}", "docs/data.md"
            ) from None
        rows = sources.load(data, 0).test
        return [dataclasses.replace(row, solution=None, kind="", origin=f"{self.name}, {row.origin}") for row in rows]


def prompt_ids(task: Task, tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """The ids that a policy continues: the row through the chat template, or as it stands for a `raw` task."""
    if task.raw:
        return list(tokenizer(row.question)["input_ids"])
    from heatbath.data import rendering

    return rendering.prompt_ids(tokenizer, rendering.messages(row, task.system))


def find(name: str | Path) -> Task:
    """The task of that name: a shipped one, `reasoning_gym:FAMILY`, `lm_eval:TASK`, or a definition's path (.toml, or a
    .yaml of lm-evaluation-harness). Raises RecipeError with near names where there is none."""
    text = str(name)
    if text.startswith((LM_EVAL, LM_EVAL_CHAT)) or HARNESS_FILE.search(text):
        from heatbath.integrations.lm_eval import lm_eval_task

        return lm_eval_task(text)
    if text.startswith(REASONING_GYM):
        return _family(text.removeprefix(REASONING_GYM))
    files = shipped()
    if text in files:
        return _load(files[text])
    path = Path(settled(text))
    if text.endswith(".toml"):
        if not path.is_file():
            raise RecipeError("no such task file", text, "check the path, which is relative to the working folder")
        task = _load(path)
        if task.name in (*files, *TAKEN):
            raise RecipeError(f"the name '{task.name}' is taken", text, "give your task another `name`")
        return task
    near = difflib.get_close_matches(text, files, n=2)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"shipped tasks: {', '.join(files)}."
    raise RecipeError(
        f"no task is called '{text}'", "eval.tasks", f"{hint} One of your own is named by its path (.toml)"
    )


def is_task(name: str) -> bool:
    """Whether `find` takes the name for a task's: it does not look whether a file is there."""
    named = name in shipped() or name.startswith((LM_EVAL, LM_EVAL_CHAT, REASONING_GYM))
    return named or name.endswith(".toml") or HARNESS_FILE.search(name) is not None


def settled(name: str) -> str:
    """The name with the path of a file that defines a task made absolute; other names are what they are."""
    if not name.endswith(".toml") and HARNESS_FILE.search(name) is None:
        return name
    prefix = next((p for p in (LM_EVAL_CHAT, LM_EVAL) if name.startswith(p)), "")
    return f"{prefix}{whole(Path(name.removeprefix(prefix)))}"


def shipped() -> dict[str, Path]:
    """Name → file of the definitions that come with the package."""
    folder = Path(str(importlib.resources.files("heatbath"))) / "tasks"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def listed() -> list[dict[str, Any]]:
    """The shipped tasks with what a user should know of them."""
    tasks = [_load(path) for path in shipped().values()]
    return [
        {
            "name": task.name,
            "version": task.version,
            "kind": task.kind,
            "problems": task.problems,
            "licence": task.licence,
            "rows": task.origin,
            "title": task.title,
            "link": task.link,
        }
        for task in tasks
    ]


def shown() -> str:
    """The list as text."""
    columns = ("name", "kind", "problems", "licence", "rows")
    lines = [columns, *([str(row[c] if row[c] is not None else "") for c in columns] for row in listed())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns) - 1)]
    table = [
        "  ".join([*(f"{cell:{w}}" for cell, w in zip(line[:-1], widths, strict=True)), line[-1]]) for line in lines
    ]
    more = "reasoning_gym:FAMILY  any family of reasoning-gym\nlm_eval:TASK          any task of an installed lm-eval"
    return "\n".join([*table, "", more, "your own: ten lines of TOML, named by its path (docs/tasks.md)"])


def _family(family: str) -> Task:
    from reasoning_gym.factory import DATASETS

    if family not in DATASETS:
        near = difflib.get_close_matches(family, DATASETS, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"one of its {len(DATASETS)}, for example chain_sum"
        raise RecipeError(f"reasoning-gym has no family '{family}'", "eval.tasks", hint)
    about: dict[str, Any] = {"title": f"reasoning-gym: {family}", "licence": "Apache-2.0", "problems": EXAM}
    about["link"] = "https://github.com/open-thought/reasoning-gym"
    return Task(name=f"{REASONING_GYM}{family}", kind="math", source="reasoning_gym", family=family, **about)


def _load(path: Path) -> Task:
    """The definition in a file. Raises RecipeError listing every mistake at once."""
    table = toml_files.read(path, str(path), "docs/tasks.md shows one")
    if "lm_eval" in (table.get("kind"), table.get("source")):
        raise RecipeError("lm_eval tasks are not written as TOML", str(path), "name them as lm_eval:TASK")
    try:
        task = Task.model_validate(table)
    except ValidationError as error:
        problems = [_explain(e) for e in error.errors()]
        said = "".join(f"\n  - {problem}" for problem in problems)
        count = f"{len(problems)} mistake{'s' if len(problems) > 1 else ''}"
        raise RecipeError(f"{count} in the task:{said}", str(path), "docs/tasks.md has every key") from None
    task._folder = path.absolute().parent
    return task


def _explain(error: Any) -> str:
    key = ".".join(map(str, error["loc"]))
    if error["type"] == "missing":
        return f"{key}: required"
    if error["type"] == "extra_forbidden":
        *tables, word = map(str, error["loc"])
        owners: dict[str, type[Section]] = {"fields": Fields, "hub": Hub, "sampling": TaskSampling}
        table = owners.get(tables[-1] if tables else "", Task)
        near = difflib.get_close_matches(word, table.model_fields, n=1)
        return f"{key}: unknown key" + (
            f", did you mean '{near[0]}'?" if near else f" (known: {', '.join(table.model_fields)})"
        )
    message = error["msg"].removeprefix("Value error, ")
    return f"{key or 'task'}: {message[0].lower() + message[1:]}{got(error['input'])}"


def _configurations(hub: Hub) -> list[str | None]:
    """The configurations to read, in the order of their names."""
    if hub.config != "*":
        return [hub.config]
    import datasets

    try:
        return sorted(datasets.get_dataset_config_names(hub.id, revision=hub.revision))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"cannot list the configurations of '{hub.id}': {error}", hub.id, "") from None
