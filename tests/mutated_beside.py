"""Mutations of what stands beside a recipe: chat templates, definitions of tasks, folders for the hub's reader, files
that data are held against."""

from __future__ import annotations

import random
from typing import Any

import mutated_tables as tables
from grounded_recipes import text_of
from mutated_recipes import case
from mutation_oracle import Case

Draw = random.Random
TEMPLATES: tuple[tuple[str, bytes], ...] = (
    ("no end of a loop", b"{% for m in messages %}{{ m.content }}"),
    ("an unknown tag", b"{% fro m in messages %}{% endfor %}"),
    ("an open expression", b"{{ messages[0"),
    ("refuses", b"{{ raise_exception('roles must alternate') }}"),
    ("divides by zero", b"{{ 1 / 0 }}"),
    ("an unknown filter", b"{{ messages | shout }}"),
    ("an attribute of nothing", b"{{ messages[99].content.x }}"),
    ("a wrong call", b"{{ messages() }}"),
    ("a sum of text and number", b"{{ messages[0].content + 1 }}"),
    ("no UTF-8", b"\xff\xfe"),
    ("empty", b""),
    ("a constant", b"hello"),
    ("the last turn first", b"{% for m in messages | reverse %}{{ m.content }}{% endfor %}"),
)


def template(r: Draw, name: str, text: str) -> Case | None:
    what, content = r.choice(TEMPLATES)
    files: dict[str, bytes | None] = {"t.jinja": content}
    must = "either" if what == "a constant" else "refused"
    return case(
        "chat template",
        text_of("smoke"),
        must,
        (("template",),),
        files=files,
        overrides=("template=t.jinja",),
        note=what,
    )


TASK = """\
name = "mine"
kind = "math"
file = "rows.jsonl"
prompt = "{question}"
version = 1
[sampling]
samples = 4
k = [1, 4]
[fields]
question = "question"
answer = "answer"
"""
TASK_CHANGES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ('name = "mine"', 'name = ""', ("name",)),
    ('name = "mine"', "name = 5", ("name",)),
    ('name = "mine"', 'name = "gsm8k"', ("'gsm8k'",)),
    ('name = "mine"\n', "", ("name: required",)),
    ('kind = "math"', 'kind = "maths"', ("kind",)),
    ('kind = "math"', 'kind = "choice"', ("options",)),
    ('kind = "math"', 'kind = "code"', ("tests",)),
    ('kind = "math"', 'kind = "lm_eval"', ("lm_eval",)),
    ('file = "rows.jsonl"', 'file = ""', ("file",)),
    ('file = "rows.jsonl"', 'file = "nowhere.jsonl"', ("nowhere.jsonl", "mine")),
    ('file = "rows.jsonl"\n', "", ("file",)),
    ("{question}", "{questoin}", ("question",)),
    ("{question}", "{question} {question}", ("question",)),
    ("version = 1", "version = 0", ("version",)),
    ("version = 1", "version = true", ("version",)),
    ("version = 1", "problems = 3", ("3",)),
    ("version = 1", "problems = -1", ("problems",)),
    ("version = 1", "where = 5", ("where",)),
    ("version = 1", 'where = { subject = "x" }', ("subject",)),
    ("version = 1", 'where = { question = "x" }', ("question",)),
    ("version = 1", 'where = { question = [["x"]] }', ("question",)),
    ("version = 1", "options_inside = true", ("row 1", "options")),
    ("version = 1", 'distractors = ["wrong"]', ("wrong",)),
    ("version = 1", "indexed = 5", ("indexed",)),
    ("version = 1", "indexed = true", ("index",)),
    ("version = 1", 'source = "reasoning_gym"', ("family",)),
    ("version = 1", 'source = "reasoning_gym"\nfamily = "nothing"', ("nothing",)),
    ("version = 1", 'source = "reasoning_gym"\nfamily = "chain_sum"\noptions = { x = 1 }', ("options",)),
    ("version = 1", 'source = "arithmetic"\noptions = { digits = 99 }', ("digits",)),
    ("version = 1", 'source = "arithmetic"\noptions = { test = 5 }', ("options", "test")),
    ("version = 1", "vresion = 1", ("vresion",)),
    ("samples = 4", "samples = 0", ("samples",)),
    ("samples = 4", "samples = 1", ("pass@4",)),
    ("k = [1, 4]", "k = []", ("sampling.k",)),
    ("k = [1, 4]", "temperature = nan", ("temperature",)),
    ("k = [1, 4]", "temperature = inf", ("temperature",)),
    ("k = [1, 4]", "top_p = 0", ("top_p",)),
    ("k = [1, 4]", "max_new_tokens = 0", ("max_new_tokens",)),
    ('question = "question"', 'question = "prompt"', ("prompt", "row 1")),
    ('answer = "answer"', 'answer_after = "####"', ("####",)),
    ('answer = "answer"', "answer = 5", ("answer",)),
    ("[fields]", "[feilds]", ("feilds",)),
    ("[fields]", "[[fields]]", ("fields", "at line")),
)


def task(r: Draw, name: str, text: str) -> Case | None:
    """A definition of one's own, by its path."""
    before, after, names = r.choice(TASK_CHANGES)
    content = TASK.replace(before, after, 1)
    assert content != TASK, before
    rows = [{"question": f"How many are {n} and 50?", "answer": str(50 + n)} for n in range(2)]
    files: dict[str, bytes | None] = {"mine.toml": content.encode(), "rows.jsonl": tables.as_jsonl(rows)}
    overrides = ("eval.tasks=['mine.toml']",)
    return case("task", text_of("smoke"), "refused", (names,), files=files, overrides=overrides, note=after)


def held_against(r: Draw, name: str, text: str) -> Case | None:
    """A file of `data.decontaminate`."""
    what, content, must, names = r.choice(
        [
            ("as it is", b'{"question": "What is one?"}\n', "taken", ("held",)),
            ("broken", b'{"question": "What is one?"\n', "refused", ("row 1",)),
            ("no question", b'{"q": "What is one?"}\n', "refused", ("row 1",)),
            ("empty question", b'{"question": "ok"}\n{"question": ""}\n', "either", ("row 2",)),
            ("number", b'{"question": 5}\n', "either", ("row 1",)),
            ("list", b'{"question": ["a"]}\n', "refused", ("row 1",)),
            ("surrogate", b'{"question": "\\ud800"}\n', "refused", ("row 1",)),
            ("empty", b"", "refused", ("held.jsonl",)),
            ("no UTF-8", b"\xff\n", "refused", ("held.jsonl",)),
            ("folder", None, "refused", ("held.jsonl",)),
        ]
    )
    files: dict[str, bytes | None] = {"held.jsonl": content}
    wanted = (names, ("held.jsonl",))
    overrides = ("data.decontaminate=['held.jsonl']",)
    return case("decontaminate", text_of("smoke"), must, wanted, files=files, overrides=overrides, note=what)


HUB = (
    'model = "tiny"\n[data]\nsource = "hub"\nname = "./hub"\ndemos_from = "train"\n[sft]\nbatch = 2\nmicro_batch = 2\n'
)


def hub_folder(r: Draw, name: str, text: str) -> Case | None:
    """A folder that `datasets.load_dataset` reads: what it says of a wrong one, in our words."""
    good = [{"question": f"What is {n} + 1?", "solution": str(n + 1)} for n in range(4)]
    made: tuple[str, bytes | None, str, Any, str]
    made = r.choice(
        [
            ("as it is", tables.as_jsonl(good), "train.jsonl", "taken", ""),
            ("broken", tables.as_jsonl([*good, b'{"question": ']), "train.jsonl", "refused", ""),
            ("no UTF-8", b"\xff\xfe\xff", "train.jsonl", "refused", ""),
            ("empty", b"", "train.jsonl", "refused", ""),
            ("mixed types", tables.as_jsonl([*good, {"question": [1], "solution": {}}]), "train.jsonl", "refused", ""),
            ("a null", tables.as_jsonl([*good, {"question": None, "solution": "x"}]), "train.jsonl", "refused", ""),
            ("another field", tables.as_jsonl([{"prompt": "x"}]), "train.jsonl", "refused", ""),
            ("no table", b"x", "readme.txt", "refused", ""),
            ("garbage", b"PAR1xxxxPAR1", "train.parquet", "refused", ""),
            ("a split that is not there", tables.as_jsonl(good), "train.jsonl", "refused", "data.demos_from=tset"),
            ("a range that is none", tables.as_jsonl(good), "train.jsonl", "refused", "data.demos_from=train[a:b]"),
            ("a config that is not there", tables.as_jsonl(good), "train.jsonl", "refused", "data.config=mian"),
            ("no folder", tables.as_jsonl(good), "train.jsonl", "refused", "data.name=./hbu"),
            ("no name", tables.as_jsonl(good), "train.jsonl", "refused", "data.name="),
        ]
    )
    what, content, file, must, override = made
    files: dict[str, bytes | None] = {f"hub/{file}": content}
    names = (("data.demos_from", "data.name", "data.config", "./hub"),)
    overrides = ("--dry-run",) if not override else (override, "--dry-run")
    argv = ("sft", "r.toml", *overrides)
    return case("hub folder", HUB, must, names, files=files, argv=argv, note=what)


MUTATIONS = (template, task, task, held_against, hub_folder)
