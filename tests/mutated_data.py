"""Data files, mutated: rows and whole files of every form, in every kind of table.

`cases(count, seed)` draws them. A mutated row must be named by its number, a file that is wrong as a whole by its name.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import mutated_tables as tables
from mutated_forms import FORMS, GRADED, ROWS, Form, case, file_named, of_row
from mutation_oracle import Case

Mutation = Callable[[random.Random, Form, str], Case | None]


# --- rows ----------------------------------------------------------------------------------------------------------
def field_missing(r: random.Random, form: Form, extension: str) -> Case | None:
    rows, at = form.rows(), r.randrange(ROWS)
    field = r.choice([*rows[at]])
    if form.name == "graded choice" and field == "options":
        return None
    if form.name == "demos" and field == "answer":
        return None
    del rows[at][field]
    return of_row(form, extension, "row: a field missing", rows, at, note=field)


def field_renamed(r: random.Random, form: Form, extension: str) -> Case | None:
    rows = form.rows()
    if not form.texts or form.name in GRADED:
        return None
    field = r.choice(form.texts)
    renamed = [{(f"{k}_" if k == field else k): v for k, v in row.items()} for row in rows]
    content = tables.WRITERS[extension](renamed)
    return case(form, extension, "file: a field renamed", content, names=(*file_named(extension), (field,)), note=field)


NOTHING = (None, "", "  ", "\n\t", float("nan"))
NO_TEXT = (True, False, [], {}, {"a": 1}, [[]], [[["x"]]], [None], float("nan"), float("inf"), [1, "a"], [True])


def field_empty(r: random.Random, form: Form, extension: str) -> Case | None:
    if not form.texts:
        return None
    rows, at, field = form.rows(), r.randrange(ROWS), r.choice(form.texts)
    value = r.choice(NOTHING)
    rows[at][field] = value
    empty = form.name in GRADED and isinstance(value, str) and field == "response"
    empty = empty or (extension == ".csv" and isinstance(value, float))  # which is the text "nan" there
    return of_row(
        form, extension, "row: an empty field", rows, at, "either" if empty else "refused", note=f"{field} = {value!r}"
    )


def field_no_text(r: random.Random, form: Form, extension: str) -> Case | None:
    if not form.texts or extension == ".csv":
        return None
    rows, at, field = form.rows(), r.randrange(ROWS), r.choice(form.texts)
    value = r.choice(NO_TEXT)
    rows[at][field] = value
    several = field == "solution" and value in ([1, "a"],)
    parts = form.name == "task" and field == "answer" and isinstance(value, list)
    must = "either" if several or parts else "refused"
    return of_row(form, extension, "row: no text", rows, at, must, note=f"{field} = {value!r}")


def number_for_text(r: random.Random, form: Form, extension: str) -> Case | None:
    if not form.texts:
        return None
    rows, at, field = form.rows(), r.randrange(ROWS), r.choice(form.texts)
    value = r.choice([5, -1, 0, 1.5, 10**30, 1e300])
    rows[at][field] = value
    return of_row(form, extension, "row: a number for text", rows, at, "either", note=f"{field} = {value!r}")


STRANGE = ("\x00", "\x1b[31m", "\x07", "×", "ünï", "\u2028", "\ufeff", "\U0001f600", "\ufffd", "\x85")


def strange_characters(r: random.Random, form: Form, extension: str) -> Case | None:
    """The tiny base's tokenizer knows none of these."""
    rows, at = form.rows(), r.randrange(ROWS)
    field = r.choice(form.learned or form.texts or ("messages",))
    piece = r.choice(STRANGE)
    if field == "messages":
        rows[at][field][1]["content"] += piece
    else:
        rows[at][field] = f"{rows[at][field]}{piece}"
    must = "refused" if field in form.learned else "either"
    return of_row(form, extension, "row: strange characters", rows, at, must, note=f"{field} + {piece!a}")


def surrogates(r: random.Random, form: Form, extension: str) -> Case | None:
    """Halves of a surrogate pair, which JSON can write and no other text can hold."""
    if extension not in (".jsonl", ".json"):
        return None
    rows, at = form.rows(), r.randrange(ROWS)
    field = r.choice([name for name, value in rows[at].items() if isinstance(value, str)] or ["messages"])
    if field == "messages":
        rows[at][field][r.randrange(3)]["content"] += "\ud800"
    else:
        rows[at][field] += r.choice(["\ud800", "\udc00 x", "\udfff\ud800"])
    must = "either" if form.name in GRADED else "refused"
    return of_row(form, extension, "row: half a surrogate pair", rows, at, must, note=field)


def too_long(r: random.Random, form: Form, extension: str) -> Case | None:
    if not form.learned:
        return None
    rows, at, field = form.rows(), r.randrange(ROWS), r.choice(form.learned)
    rows[at][field] = "a 1 " * r.choice([200, 5_000, 100_000])
    must = "either" if form.name == "prompts" else "refused"
    return of_row(form, extension, "row: too long", rows, at, must, note=field)


def end_token(r: random.Random, form: Form, extension: str) -> Case | None:
    field = next((f for f in ("solution", "chosen", "response", "completion") if f in form.learned), None)
    if field is None:
        return None
    rows, at = form.rows(), r.randrange(ROWS)
    rows[at][field] = r.choice(["<|end|>", "a<|end|>b", "<|end|><|end|>"])
    return of_row(form, extension, "row: the end token", rows, at, note=field)


BAD_GOLD = ("N/A", "nan", "none", "!!!", "...", "\\", "\\frac{", "unknown", "-", "$$", "TODO", "∅?")


def unreadable_gold(r: random.Random, form: Form, extension: str) -> Case | None:
    if not form.answers or form.name == "pool":
        return None
    rows, at, gold = form.rows(), r.randrange(ROWS), r.choice(BAD_GOLD)
    rows[at][form.answers[0]] = gold
    return of_row(form, extension, "row: a gold answer nobody can read", rows, at, note=gold)


def wrong_messages(r: random.Random, form: Form, extension: str) -> Case | None:
    if form.name != "messages":
        return None
    rows, at = form.rows(), r.randrange(ROWS)
    system, user, answer = rows[at]["messages"]
    made: tuple[Any, str] = r.choice(
        [
            ([user], "refused"),
            ([answer], "refused"),
            ([system, answer], "refused"),
            ([user, answer, answer], "refused"),
            ([answer, user], "refused"),
            ([user, answer, system], "refused"),
            ([system, system, user, answer], "either"),
            ([user, system, user, answer], "either"),
            ([answer, user, answer], "either"),
            ([user, user, answer], "either"),
            ([], "refused"),
            (None, "refused"),
            ("text", "refused"),
            (5, "refused"),
            ({}, "refused"),
            ({"role": "user", "content": "x"}, "refused"),
            ([user, {"role": "assistant", "content": ""}], "refused"),
            ([user, {"role": "assistant", "content": None}], "refused"),
            ([user, {"role": "assistant", "content": 5}], "refused"),
            ([user, {"role": "assistant", "content": [{"type": "text", "text": "x"}]}], "refused"),
            ([user, {"role": "tool", "content": "x"}, answer], "refused"),
            ([user, {"role": "Assistant", "content": "x"}], "refused"),
            ([user, {"role": ["assistant"], "content": "x"}], "refused"),
            ([user, {"role": None, "content": "x"}], "refused"),
            ([user, {"content": "x"}], "refused"),
            ([user, {"from": "gpt", "value": "x"}], "refused"),
            ([user, None], "refused"),
            ([user, "x"], "refused"),
            ([[user, answer]], "refused"),
        ]
    )
    rows[at]["messages"] = made[0]
    return of_row(form, extension, "row: wrong messages", rows, at, made[1], note=str(made[0])[-70:])


def wrong_column(r: random.Random, form: Form, extension: str) -> Case | None:
    if form.name != "columns":
        return None
    rows, at = form.rows(), r.randrange(ROWS)
    value = r.choice(
        [None, "x", "", float("nan"), float("inf"), [], [0.5], [0.5] * 500, {}, [None], ["x"], [[1]], 10**400, "1e400"]
    )
    rows[at]["generator_logp"] = value
    return of_row(form, extension, "row: a wrong column", rows, at, note=str(value)[:40])


def wrong_preference(r: random.Random, form: Form, extension: str) -> Case | None:
    if form.name not in ("pairs", "scores", "labels"):
        return None
    rows, at = form.rows(), r.randrange(ROWS)
    row = rows[at]
    if form.name == "pairs":
        made = [
            *(row | {"rejected": row["chosen"]}, row | {"score": 0.5}, row | {"response": "x"}, row | {"label": True}),
            *({"question": row["question"]}, {"prompt": "3 + 3?", "response": "6", "score": 0.9}, {}),
            row | {"chosen": ["a"]},
        ]
    elif form.name == "scores":
        values = [1.5, -0.1, "high", float("nan"), None, [0.5], {}, True, 10**400, "", "0,5", float("inf")]
        made = [*(row | {"score": value} for value in values), row | {"label": True}, row | {"chosen": "x"}]
    else:
        values = ["maybe", 2, -1, None, [True], {}, float("nan"), "", 0.5, "yes"]
        made = [row | {"label": value} for value in values]
    rows[at] = r.choice(made)
    if extension == ".csv" and rows[at].get("score") is True:
        return None
    return of_row(form, extension, "row: a wrong preference", rows, at, note=str(rows[at])[-70:])


def wrong_options(r: random.Random, form: Form, extension: str) -> Case | None:
    if form.name != "choice":
        return None
    rows, at = form.rows(), r.randrange(ROWS)
    options: Any = r.choice(
        [
            None,
            "A) 1",
            5,
            [],
            {},
            [None],
            [[]],
            ["x", None],
            {"A": "1", "A ": "2"},
            {"text": ["1"], "label": ["A", "B"]},
            [True, {}],
            ["7"] * 30,
            {"": "x"},
            {"A": 5},
            ["same", "same"],
        ]
    )
    rows[at]["choices"] = options
    must = "either" if options in ({"A": 5}, ["same", "same"]) else "refused"  # where the answer is 5, or an index
    return of_row(form, extension, "row: wrong options", rows, at, must, note=str(options)[:60])


def wrong_tests(r: random.Random, form: Form, extension: str) -> Case | None:
    if form.name != "code":
        return None
    rows, at = form.rows(), r.randrange(ROWS)
    tests: Any = r.choice(
        [
            None,
            "",
            [],
            {},
            5,
            True,
            "x",
            "{",
            "not python (",
            ["assert f("],
            [5],
            [None],
            [[]],
            {"inputs": [1]},
            "[]",
            "null",
        ]
    )
    rows[at]["tests"] = tests
    return of_row(form, extension, "row: wrong tests", rows, at, note=str(tests)[:60])


def held_out(r: random.Random, form: Form, extension: str) -> Case | None:
    """A question that is a test problem, too."""
    if "test.jsonl" not in form.recipe:
        return None
    rows, at = form.rows(), r.randrange(ROWS)
    rows[at][form.asked] = r.choice(["How many are 0 and 50?", "how  many are 1 and 50? "])
    return of_row(form, extension, "row: a test problem", rows, at)


def duplicates(r: random.Random, form: Form, extension: str) -> Case | None:
    rows = form.rows()
    rows[r.randrange(ROWS)] = rows[0]
    if form.name == "pool":  # has one problem less than are wanted
        return case(form, extension, "row: twice", tables.WRITERS[extension](rows), "either", file_named(extension))
    return of_row(form, extension, "row: twice", rows, 0, "taken")


ROW_KINDS: tuple[Mutation, ...] = (
    *(field_missing, field_renamed, field_empty, field_no_text, number_for_text, strange_characters, surrogates),
    *(too_long, end_token, unreadable_gold, held_out, duplicates),
)
FORM_KINDS: dict[Mutation, tuple[str, ...]] = {
    wrong_messages: ("messages",),
    wrong_column: ("columns",),
    wrong_preference: ("pairs", "scores", "labels"),
    wrong_options: ("choice",),
    wrong_tests: ("code",),
}


def unmutated() -> list[Case]:
    """Each form as it is, which has to be taken."""
    made = []
    for form in FORMS:
        for extension in form.extensions:
            content = tables.WRITERS[extension](form.rows())
            made.append(case(form, extension, "unmutated", content, "taken"))
    return made


def cases(count: int, seed: int) -> list[Case]:
    """That many mutated files, every kind in turn; the same for the same seed."""
    import mutated_files

    r = random.Random(seed)
    kinds: list[Mutation] = [*ROW_KINDS, *FORM_KINDS, *mutated_files.MUTATIONS, *mutated_files.MUTATIONS]
    by_name = {form.name: form for form in FORMS}
    made: list[Case] = []
    for turn in itertools.count():
        if len(made) >= count:
            return made
        mutation, drawn = kinds[turn % len(kinds)], random.Random(r.getrandbits(64))
        form = by_name[drawn.choice(FORM_KINDS[mutation])] if mutation in FORM_KINDS else drawn.choice(FORMS)
        extension = drawn.choice(form.extensions)
        found = mutation(drawn, form, extension)
        if found is not None:
            made.append(found)
    raise AssertionError
