"""What files of rows are for: for each form the recipe that reads it, the command, its rows, and what each field is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import mutated_tables as tables
from mutation_oracle import Case

HEAD = 'model = "tiny"\nprecision = "fp32"\n'
RL = "[rl]\nprompts = 4\nupdate_prompts = 4\ngroup_size = 2\nmicro_batch = 8\nmax_new_tokens = 32\n"
ROWS = 8
Record = dict[str, Any]


@dataclass(frozen=True)
class Form:
    """What a file of rows is for: the recipe that reads it, its rows, and what each field is to them.

    `texts` must hold text in every row, `answers` a gold answer; `learned` is the text that the loss sees.
    """

    name: str
    recipe: str
    texts: tuple[str, ...]
    key: str
    extensions: tuple[str, ...] = (".jsonl", ".json", ".csv", ".parquet")
    answers: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()
    asked: str = "question"
    command: tuple[str, ...] = ("run", "r.toml", "--dry-run")

    def rows(self) -> list[Record]:
        return [_row(self.name, n) for n in range(ROWS)]

    def text(self, extension: str) -> str:
        return self.recipe.replace("FILE", f"rows{extension}")


def _row(form: str, n: int) -> Record:
    question, solution, answer = f"What is {n} + {n + 1}?", f"{n} + {n + 1} = {2 * n + 1}", str(2 * n + 1)
    asked = {"question": question}
    return {
        "demos": {**asked, "solution": solution, "answer": answer},
        "prompts": {**asked, "answer": answer},
        "pool": {**asked, "solution": solution, "answer": answer},
        "messages": {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": question},
                {"role": "assistant", "content": solution},
            ]
        },
        "columns": {**asked, "solution": solution, "generator_logp": -0.5 - n / 10},
        "pairs": {**asked, "chosen": solution, "rejected": f"It is {n}."},
        "scores": {"prompt": question, "response": solution, "score": n / 10},
        "labels": {"prompt": question, "completion": solution, "label": n % 2 == 0},
        "code": {
            "question": f"Write f that adds {n}.",
            "tests": [f"assert f(1) == {1 + n}", f"assert f(2) == {2 + n}"],
        },
        "choice": {"question": f"{question} Which?", "choices": [str(n), answer, "none"], "answer": answer},
        "task": {**asked, "answer": answer},
        "graded": {"response": f"The answer is \\boxed{{{answer}}}.", "gold": answer},
        "graded choice": {"response": "The answer is B.", "gold": "B", "options": ["one", "two"]},
    }[form]


SFT = (
    HEAD
    + '[data]\nsource = "files"\ndemos_from = "FILE"\n{data}[sft]\nbatch = 4\nmicro_batch = 4\nmax_length = 200\n{sft}'
)
ASKED = HEAD + '[data]\nsource = "files"\nprompts_from = "FILE"\ntest_from = "test.jsonl"\n{data}' + RL + "{more}"
JUDGED = (
    HEAD + '[data]\nsource = "files"\ntest_from = "test.jsonl"\n[preference]\ndata = "FILE"\nmax_length = 200\n{more}'
)
STAGE = {stage: (stage, "r.toml", "--dry-run") for stage in ("sft", "rl")}
FORMS = (
    Form(
        "demos",
        SFT.format(data="", sft=""),
        ("question", "solution"),
        "data.demos_from",
        learned=("question", "solution"),
        command=STAGE["sft"],
    ),
    Form(
        "prompts",
        ASKED.format(data="", more=""),
        ("question", "answer"),
        "data.prompts_from",
        answers=("answer",),
        learned=("question",),
    ),
    Form(
        "pool",
        HEAD + '[data]\nsource = "files"\npool = "FILE"\ndemos = 2\nprompts = 4\ntest = 1\nvalidation = 1\n'
        "[sft]\nbatch = 2\nmicro_batch = 2\nmax_length = 200\n" + RL,
        ("question", "solution", "answer"),
        "data.pool",
    ),
    Form(
        "messages",
        SFT.format(data='fields = { messages = "messages" }\n', sft=""),
        (),
        "data.demos_from",
        (".jsonl", ".json", ".parquet"),
        command=STAGE["sft"],
    ),
    Form(
        "columns",
        SFT.format(data='fields = { columns = ["generator_logp"] }\n', sft='objective = "pear"\n'),
        ("question", "solution"),
        "data.demos_from",
        learned=("question", "solution"),
        command=STAGE["sft"],
    ),
    Form("pairs", JUDGED.format(more=""), ("question", "chosen", "rejected"), "preference.data", learned=("chosen",)),
    Form(
        "scores",
        JUDGED.format(more='method = "una"\n'),
        ("prompt", "response"),
        "preference.data",
        learned=("response",),
        asked="prompt",
    ),
    Form(
        "labels",
        JUDGED.format(more='method = "una"\n'),
        ("prompt", "completion"),
        "preference.data",
        learned=("completion",),
        asked="prompt",
    ),
    Form(
        "code",
        HEAD
        + '[data]\nsource = "files"\nprompts_from = "FILE"\nfields = { tests = "tests" }\n'
        + RL
        + '[reward]\nkind = "code"\n',
        ("question",),
        "data.prompts_from",
        (".jsonl", ".json", ".parquet"),
        command=STAGE["rl"],
    ),
    Form(
        "choice",
        HEAD
        + '[data]\nsource = "files"\nprompts_from = "FILE"\nfields = { options = "choices" }\n'
        + RL
        + '[reward]\nkind = "choice"\n',
        ("question", "answer"),
        "data.prompts_from",
        (".jsonl", ".json", ".parquet"),
        command=STAGE["rl"],
        answers=("answer",),
    ),
    Form("task", HEAD + '[eval]\nsamples = 1\nk = [1]\ntasks = ["mine.toml"]\n', ("question", "answer"), "task mine"),
    Form("graded", "", ("response", "gold"), "", (".jsonl",), command=("grade", "FILE", "--json")),
    Form(
        "graded choice",
        "",
        ("response", "gold"),
        "",
        (".jsonl",),
        command=("grade", "FILE", "--json", "--kind", "choice"),
    ),
)
GRADED = ("graded", "graded choice")


@cache
def other_files() -> dict[str, bytes]:
    test = [{"question": f"How many are {n} and 50?", "answer": str(50 + n)} for n in range(2)]
    return {"test.jsonl": tables.as_jsonl(test)}


def case(
    form: Form, extension: str, kind: str, content: bytes | None, must: Any = "refused", names: Any = (), **more: Any
) -> Case:
    """The form's command on a file of these bytes (None: a folder)."""
    file = f"rows{extension}"
    files: dict[str, bytes | None] = {**other_files(), file: content, **more.pop("files", {})}
    if form.recipe:
        files["r.toml"] = form.text(extension).encode()
    if form.name == "task":
        files["mine.toml"] = f'name = "mine"\nkind = "math"\nfile = "{file}"\n'.encode()
    argv = tuple(part.replace("FILE", file) for part in form.command)
    note = f"{form.name}{extension}: {more.pop('note', '')}"
    return Case(kind, argv, files, must, names, note=note[:100], listed=form.name in GRADED, **more)


def row_named(extension: str, number: int) -> tuple[tuple[str, ...], ...]:
    """How a message names a row: its file, and its number there (lines of a CSV file that cannot be read)."""
    return (
        (f"rows{extension}",),
        (f"row {number}", f"line {number + 1}", f"row {number + 1}")[: 3 if extension == ".csv" else 1],
    )


def file_named(extension: str) -> tuple[tuple[str, ...], ...]:
    return ((f"rows{extension}",),)


def of_row(
    form: Form, extension: str, kind: str, rows: list[Any], at: int, must: str = "refused", **more: Any
) -> Case | None:
    """The case of a file in which row `at` (from 0) is the mutated one; None where such a table cannot be written."""
    try:
        content = tables.WRITERS[extension](rows)
    except (ValueError, TypeError, AttributeError, OverflowError):  # what CSV and Parquet cannot hold
        return None
    names = row_named(extension, at + 1)
    if form.name in GRADED:
        names = ((str(at + 1),),)
    return case(form, extension, kind, content, must, names, **more)
