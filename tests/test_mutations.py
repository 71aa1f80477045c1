"""Mutated recipes and data files: nothing escapes, and each refusal names key or row (mutation_oracle.py).

A part of the campaign of benchmarks/mutated_inputs.py, and by name every fault that it found.
"""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

import mutated_data
import mutated_forms
import mutated_recipes
import mutated_tables as tables
from grounded_recipes import text_of
from mutation_oracle import Case, failures, observe

SMOKE = text_of("smoke")
HEAD, _, REST = SMOKE.partition("\n\n")
GOOD = {"question": "What is 1 + 1?", "solution": "1 + 1 = 2", "answer": "2"}


@pytest.fixture(autouse=True)
def small(small_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own small model in place of the tiny base, which takes minutes to make."""
    monkeypatch.setattr("heatbath.stages.pretrain.tiny_base", lambda: small_base)


def checked(case: Case, folder: Path) -> str:
    """What was said, which was what the case demands."""
    seen = observe(case, folder)
    assert not failures(case, seen), f"{case.kind}, {case.note}: {failures(case, seen)}\n{seen.said}\n{seen.escaped}"
    return seen.said


def drawn(cases: list[Case], most: int) -> list[Case]:
    """So many of them, of as many kinds as there are."""
    kinds: dict[str, list[Case]] = {}
    for case in cases:
        if not case.isolated:
            kinds.setdefault(case.kind, []).append(case)
    turns = max(map(len, kinds.values()))
    return [own[turn] for turn in range(turns) for own in kinds.values() if turn < len(own)][:most]


@pytest.mark.parametrize("number", range(3))
def test_mutated_recipes(number: int, tmp_path: Path) -> None:
    chosen = drawn(mutated_recipes.cases(300, seed=11), 33)
    for each, case in enumerate(chosen[number::3]):
        (tmp_path / str(each)).mkdir()
        checked(case, tmp_path / str(each))


@pytest.mark.parametrize("number", range(3))
def test_mutated_data_files(number: int, tmp_path: Path) -> None:
    chosen = drawn(mutated_data.cases(400, seed=11), 42)
    for each, case in enumerate(chosen[number::3]):
        (tmp_path / str(each)).mkdir()
        checked(case, tmp_path / str(each))


@pytest.mark.thorough
def test_unmutated_inputs_are_taken(tmp_path: Path) -> None:
    for number, case in enumerate([*mutated_recipes.unmutated(), *mutated_data.unmutated()]):
        (tmp_path / str(number)).mkdir()
        checked(case, tmp_path / str(number))


# --- what the campaign found ---------------------------------------------------------------------------------------
# Title → the recipe's text, and what the message has to hold; nothing where it must be taken.
RECIPES: dict[str, tuple[str | bytes, tuple[str, ...]]] = {
    "a byte order mark": (b"\xef\xbb\xbf" + SMOKE.encode(), ()),
    "no UTF-8": (SMOKE.encode() + b'name = "\xff"\n', ("not UTF-8 at line", "0xff")),
    "nested too deeply": (f"{HEAD}\nname = {'[' * 3000}{']' * 3000}\n", ("nested too deeply (at line",)),
    "a number of 5,000 digits": (f"seed = {'1' * 5000}\n", ("too large a number (at line 1)",)),
    "a misspelt key of [compare]": (f"{SMOKE}\n[compare]\nsedes = [1]\n", ("compare.sedes: unknown key", "'seeds'")),
    "a wrong value in [compare]": (f"{SMOKE}\n[compare]\nseeds = [true]\n", ("compare.seeds",)),
    "a misspelt key of a strategy that is not chosen": (
        f"{SMOKE}\n[strategies.mine]\nsft.lrr = 1\n",
        ("strategies.mine.sft.lrr: unknown key", "'lr'"),
    ),
    "strategies that are none": (f"{HEAD}\nstrategies = 5\n{REST}", ("strategies: tables of their own",)),
    "a strategy that is no table": (f"{HEAD}\nstrategies = {{ a = 5 }}\n{REST}", ("strategies.a: a table of its own",)),
    "a strategy by number": (f"{HEAD}\nstrategy = 5\n{REST}", ("strategy: the name of one (got 5)",)),
    "a strategy over no table": ('model = "tiny"\nstrategy = "gift"\nsft = []\n', ("sft: a table of its own",)),
    "extends by number": ("extends = 5\n", ("extends is the name", "(got 5)")),
    "extends nothing": ('extends = ""\n', ("extends is the name",)),
    "extends a folder": ('extends = "."\n', ("which r.toml extends",)),
    "extends a name that no file has": (f'extends = "{"x" * 300}"\n', ("r.toml, extends",)),
    "extends what is not there": ('extends = "smok"\n', ("'smok'", "r.toml, extends", "'smoke'")),
    "an escape sequence in a value": (f'{HEAD}\npublished = "\\u001b[31mred"\n{REST}', ("\\x1b[31mred",)),
    "a long value": (f'{HEAD}\nprecision = "{"x" * 9000}"\n{REST}', ("precision", "…")),
}  # fmt: skip
# Overrides of smoke, and what the message has to hold.
OVERRIDES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "true for a number": (("rl.eval_prompts=true",), ("rl.eval_prompts: input should be a number (got True)",)),
    "true in a list of numbers": (("eval.k=[true]",), ("eval.k.0: input should be a number",)),
    "yes for true": (("rl.truncate=yes",), ("rl.truncate", "'yes'")),
    "an infinite temperature": (("rl.temperature=inf",), ("rl.temperature", "finite")),
    "an infinite deadline": (("reward.deadline=inf",), ("reward.deadline", "finite")),
    "a weight that is no number": (("reward.weights={verdict=nan}",), ("reward.weights.verdict", "finite")),
    "layers without end": (("model=false", "pretrain.layers=1_000_000_000"), ("pretrain.layers", "1000")),
    "NUL in a path": (("template=a\0b",), ("template: holds a NUL character",)),
    "NUL in a folder": (("eval.data_dir=a\0b",), ("eval.data_dir: holds a NUL character",)),
    "bytes that are not UTF-8": (("name=\udcff",), ("name: holds bytes that are not UTF-8",)),
    "a template that no file can be": (("template=" + "x" * 5000,), ("no chat template", "where:  template")),
    "a home that nobody has": (
        ("eval.data_dir=~no-such-user/x",),
        ("eval.data_dir: there is no home folder '~no-such-user'",),
    ),
    "an objective over a table that is none": (("sft=5", "sft.objective.name=gift"), ("sft",)),
    "splits that are none": (("sft.splits=5", "data.source=files"), ("sft.splits",)),
    "splits that cannot be": (("sft.splits=[[1]]", "data.source=files"), ("sft.splits.0",)),
    "a part that is true": (("rl.policy={name='grpo',advantage=true}",), ("rl.policy", "advantage must be")),
    "a part that is a list": (("rl.policy={name='grpo',advantage=[]}",), ("advantage must be one of",)),
    "two keys in one override": (("seed=1\nmodel='x'",), ("more than one value",)),
    "an override nested too deeply": (("eval.k=" + "[" * 5000 + "]" * 5000,), ("nested too deeply",)),
    "an override of what only a file holds": (("compare.seeds=[1]",), ("compare: stands only in a recipe's file",)),
    "targets that are no pattern": (("lora.targets=((",), ("lora.targets", "unterminated")),
    "an empty file name": (("data.source=files", "data.test_from="), ("data.test_from",)),
    "no file with the trainer's settings": (
        ("sft.trainer.accelerator_config=./nothing.json",),
        ("TRL refuses the settings", "[sft.trainer]"),
    ),
    "a path that is a number": (("data.data_dir=5",), ("data.data_dir: a path, written as text (got 5)",)),
}
TEMPLATES = {
    "refuses": "{{ raise_exception('roles must alternate') }}",
    "is no template": "{% for m in messages %}{{ m.content }}",
    "divides by zero": "{{ 1 / 0 }}",
    "adds a number to a text": "{{ messages[0].content + 1 }}",
}


@pytest.mark.parametrize("title", RECIPES)
def test_a_recipe(title: str, tmp_path: Path) -> None:
    text, says = RECIPES[title]
    case = mutated_recipes.case(title, text, "refused" if says else "taken", tuple((s,) for s in says))
    checked(case, tmp_path)


@pytest.mark.parametrize("title", OVERRIDES)
def test_an_override(title: str, tmp_path: Path) -> None:
    overrides, says = OVERRIDES[title]
    checked(mutated_recipes.case(title, SMOKE, "refused", tuple((s,) for s in says), overrides=overrides), tmp_path)


@pytest.mark.parametrize("title", TEMPLATES)
def test_a_template_that(title: str, tmp_path: Path) -> None:
    files = {"t.jinja": TEMPLATES[title].encode()}
    says = (("the chat template refuses a conversation of user",), ("where:  template",))
    checked(mutated_recipes.case(title, SMOKE, "refused", says, files=files, overrides=("template=t.jinja",)), tmp_path)


def test_a_task_does_not_set_what_its_problems_say(tmp_path: Path) -> None:
    text = 'name = "mine"\nkind = "math"\nsource = "arithmetic"\noptions = { test = 5 }\n'
    says = (("takes no option 'test'",), ("task mine, options",))
    task = {"mine.toml": text.encode()}
    asked = ("eval.tasks=['mine.toml']",)
    checked(mutated_recipes.case("task", SMOKE, "refused", says, files=task, overrides=asked), tmp_path)


# Title → the rows of a file in its own bytes, and what the message has to hold beside the file.
LINES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "nested too deeply": (b"[" * 100_000, ("row 2", "nested too deeply")),
    "a number of 5,000 digits": (b'{"question": ' + b"1" * 5000 + b"}", ("row 2", "4300 digits")),
    "half a surrogate pair": (b'{"question": "\\ud800", "solution": "x"}', ("row 2", "surrogate")),
    "no UTF-8": (b'{"question": "\xff"}', ("row 2", "not UTF-8: byte 0xff")),
    "a key twice": (b'{"question": "a", "question": "b", "solution": "c"}', ("row 2", "'question' is there twice")),
}


@pytest.mark.parametrize("title", LINES)
def test_a_line(title: str, tmp_path: Path) -> None:
    line, says = LINES[title]
    checked(demos(tables.as_jsonl([GOOD, line]), says), tmp_path)


def demos(content: bytes, says: tuple[str, ...], extension: str = ".jsonl", form: str = "demos") -> Case:
    chosen = next(f for f in mutated_forms.FORMS if f.name == form)
    names = ((f"rows{extension}",), *((s,) for s in says))
    return mutated_forms.case(chosen, extension, "named", content, "refused" if says else "taken", names)


PACKED = tables.as_gzip(tables.as_jsonl([GOOD | {"question": f"{n}?"} for n in range(9)]))
FILES: dict[str, tuple[str, bytes, str]] = {
    "a gzip file cut off": (".jsonl.gz", PACKED[:-9], "not a whole gzip file"),
    "a gzip file spoilt": (".jsonl.gz", PACKED[:20] + b"\0\xff" * 20 + PACKED[40:], "not a whole gzip file"),
    "a packed CSV file": (".csv.gz", PACKED, "no reader for '.gz' files"),
    "a packed JSON file": (".json.gz", PACKED, "no reader for '.gz' files"),
    "a CSV file that is not UTF-8": (".csv", b"question,solution\na,b\nc,\xff\n", "line 3"),
    "a JSON file nested too deeply": (".json", b"[" * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("title", FILES)
def test_a_file(title: str, tmp_path: Path) -> None:
    extension, content, says = FILES[title]
    checked(demos(content, (says,), extension), tmp_path)


def test_numbers_beyond_a_float(tmp_path: Path) -> None:
    """JSON's integers have no end, and a float has."""
    for form, field in (("columns", "generator_logp"), ("scores", "score")):
        folder = tmp_path / form
        folder.mkdir()
        row = {**GOOD, "prompt": "1?", "response": "2", field: 10**400}
        checked(demos(tables.as_jsonl([row]), ("row 1", "score" if form == "scores" else field), form=form), folder)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("calendar", "cannot read the column 'solution'"),
        ("twice", "two columns have the same name, 'question'"),
        ("dates", "'tests' holds no tests"),
    ],
)
def test_a_parquet_file(name: str, says: str, tmp_path: Path) -> None:
    import datetime

    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.array(["a", "b"])
    columns = {
        "calendar": [texts, pyarrow.array([2**62] * 2, pyarrow.timestamp("us"))],
        "twice": [texts, texts],
        "dates": [texts, pyarrow.array([[datetime.date(2026, 1, 1)]] * 2)],
    }[name]
    names = {"calendar": ["question", "solution"], "twice": ["question", "question"], "dates": ["question", "tests"]}
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns, names=names[name]), sink)
    case = demos(sink.getvalue(), (says,), ".parquet", "code" if name == "dates" else "demos")
    checked(case, tmp_path)


@pytest.mark.parametrize(("content", "says"), [(b'{"question": ', "train"), (b"", "holds no rows")])
def test_a_folder_for_the_hubs_reader(content: bytes, says: str, tmp_path: Path) -> None:
    recipe = 'model = "tiny"\n[data]\nsource = "hub"\nname = "./hub"\ndemos_from = "train"\n[sft]\n'
    case = mutated_recipes.case("hub", recipe, "refused", (("cannot load the split 'train'",), (says,)))
    files = {**case.files, "hub/train.jsonl": content}
    checked(replace(case, argv=("sft", "r.toml", "--dry-run"), files=files), tmp_path)


def test_a_message_is_for_a_terminal() -> None:
    from heatbath.errors import DataError

    told = str(DataError("a\x1b[31mred\x07 \udcff", "é\u2028", "x" * 5000))
    assert told.split("\n")[0] == "a\\x1b[31mred\\x07 \\udcff" and "é\\u2028" in told
    assert "… (5,010 characters)" in told and len(told) < 1200


def test_the_campaign_draws_the_same_inputs_again() -> None:
    for module in (mutated_recipes, mutated_data):
        first, second = (module.cases(40, seed=5) for _ in range(2))
        assert [(c.argv, c.files, c.must, c.names) for c in first] == [
            (c.argv, c.files, c.must, c.names) for c in second
        ]
