"""Shipped recipes, mutated: keys, values, TOML itself, overrides, tables, trainer fields, contradictions.

`cases(count, seed)` draws them; each kind of mutation says whether a mutated recipe must be refused, and what of.
"""

from __future__ import annotations

import itertools
import random
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from grounded_recipes import NAMES, beside, text_of
from mutation_oracle import Case

RUN = ("run", "r.toml", "--dry-run")


@dataclass(frozen=True)
class Entry:
    """A key of a recipe with its value as it is written, and the lines that it takes."""

    table: str
    key: str
    text: str
    first: int
    last: int

    @property
    def path(self) -> str:
        return f"{self.table}.{self.key}" if self.table else self.key

    @property
    def value(self) -> Any:
        return tomllib.loads(f"v = {self.text}")["v"]


@cache
def entries_of(text: str) -> tuple[Entry, ...]:
    """The keys of a recipe's text, inline tables whole."""
    found, table, start = [], "", None
    key = written = ""
    for number, line in enumerate(text.split("\n")):
        if start is None:
            if header := re.fullmatch(r"\[([^\[\]]+)\]\s*(#.*)?", line):
                table = header[1].strip()
                continue
            match = re.match(r"([A-Za-z0-9_.\-]+)\s*=\s*(.*)", line)
            if match is None:
                continue
            start, key, written = number, match[1], match[2]
        else:
            written += "\n" + line
        try:
            tomllib.loads(f"v = {written}")
        except tomllib.TOMLDecodeError:
            continue
        found.append(Entry(table, key, written, start, number))
        start = None
    return tuple(found)


def case(
    kind: str, text: str | bytes, must: Any = "refused", names: tuple[tuple[str, ...], ...] = (), **more: Any
) -> Case:
    """The dry run of a recipe of that text."""
    content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    overrides = more.pop("overrides", ())
    argv = more.pop("argv", (*RUN[:2], *overrides, *RUN[2:]))
    files = {**beside(), **more.pop("files", {}), "r.toml": content}
    return Case(kind, tuple(argv), files, must, names, **more)


def named(path: str) -> tuple[str, ...]:
    """How a message may name a key: whole, or its table with it at the head of a line."""
    table, _, key = path.rpartition(".")
    return (path, f"- {table}: ", f"[{table}]") if table else (path, f"'{key}'")


# --- the kinds -----------------------------------------------------------------------------------------------------
Draw = random.Random
Mutation = Callable[[Draw, str, str], Case | None]


def lines_with(text: str, entry: Entry, instead: str) -> str:
    lines = text.split("\n")
    return "\n".join([*lines[: entry.first], instead, *lines[entry.last + 1 :]])


def set_to(text: str, entry: Entry, value: str) -> str:
    return lines_with(text, entry, f"{entry.key} = {value}")


def any_entry(r: Draw, text: str, fits: Callable[[Entry], bool] = lambda _: True) -> Entry | None:
    fitting = [entry for entry in entries_of(text) if fits(entry)]
    return r.choice(fitting) if fitting else None


def misspelt_word(r: Draw, word: str) -> str:
    """The word with a letter dropped, doubled, swapped or exchanged; never the word itself."""
    at = r.randrange(len(word))
    made = r.choice(
        [
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[:at] + word[at : at + 2][::-1] + word[at + 2 :],
            word[:at] + r.choice("abcdexyz") + word[at + 1 :],
            word + "s",
            word.upper(),
        ]
    )
    return made if made not in (word, "") else word + "x"


KNOWN = {
    *("epochs", "lr", "k", "test", "seed", "model", "name", "demos", "batch", "data", "fields"),
    *("prompts", "pool", "digits", "width", "layers", "heads", "vary", "grid", "grids", "seeds", "kind"),
}


def key_misspelt(r: Draw, name: str, text: str) -> Case | None:
    entry = any_entry(r, text, lambda e: "." not in e.key and not free(e))
    if entry is None:
        return None
    wrong = misspelt_word(r, entry.key)
    if wrong in KNOWN:
        return None
    names = (wrong, "data.source: required") if entry.path == "data.source" else (wrong,)
    return case("key misspelt", lines_with(text, entry, f"{wrong} = {entry.text}"), names=(names,), note=entry.path)


def free(entry: Entry) -> bool:
    """Whether the keys of a table are the user's own names."""
    return entry.table == "compare.tune.grids"


def key_moved(r: Draw, name: str, text: str) -> Case | None:
    """Into a table where there is no such key."""
    entry = any_entry(r, text, lambda e: "." not in e.key and e.table in ("sft", "rl", "eval", "data", "pretrain"))
    tables = [t for t in re.findall(r"(?m)^\[(\w+)\]", text) if entry is not None and t != entry.table]
    if entry is None or not tables:
        return None
    to = r.choice(["", *tables])
    if (to, entry.key) in SHARED or entry.key in SHARED_BY.get(to, ()):
        return None
    lines = lines_with(text, entry, "").split("\n")
    at = 0 if not to else next(n for n, line in enumerate(lines) if line.startswith(f"[{to}]")) + 1
    lines[at:at] = [f"{entry.key} = {entry.text}"]
    return case("key in another table", "\n".join(lines), names=((f"{to}.{entry.key}" if to else entry.key,),))


_OPTIMIZER = {"lr", "schedule", "warmup_steps", "weight_decay", "adam_betas", "max_grad_norm", "save_every", "epochs"}
_OPTIMIZER |= {"batch", "micro_batch", "max_steps", "truncate", "trainer", "log_every", "max_length"}
SHARED_BY = {
    "sft": _OPTIMIZER,
    "rl": _OPTIMIZER | {"temperature", "max_new_tokens", "prompts", "epochs"},
    "preference": _OPTIMIZER | {"data"},
    "pretrain": _OPTIMIZER,
    "eval": {"batch", "temperature", "max_new_tokens", "problems", "samples", "k", "data_dir"},
    "data": {"prompts", "name", "paths", "test"},
    "reward": {"kind", "model"},
}
SHARED = {("", "name"), ("", "template"), ("sft", "batch"), ("", "seed"), ("compare", "seeds")}


def key_deleted(r: Draw, name: str, text: str) -> Case | None:
    entry = any_entry(r, text)
    if entry is None:
        return None
    loose = entry.path in ("model", "data.source", "preference.data", "extends", "strategy")
    return case(
        "key deleted", lines_with(text, entry, ""), "either", (() if loose else (related(entry),)), note=entry.path
    )


def related(entry: Entry) -> tuple[str, ...]:
    """What a refusal may name when a key is gone or has another legal value: the key, its table, or what it is held
    against."""
    table = entry.path.partition(".")[0]
    return (*named(entry.path), f"{table}.", f"{table}:", "data.", "eval.", "rl.", "sft.", "strategy")


def key_twice(r: Draw, name: str, text: str) -> Case | None:
    entry = any_entry(r, text)
    if entry is None:
        return None
    again = f"{entry.key} = {entry.text}\n{entry.key} = {entry.text}"
    return case("key twice", lines_with(text, entry, again), names=(("at line", "at end of document"),))


NUMBER_WRONG = ('"fast"', '""', "[1, 2]", "{ a = 1 }", "true", "false", "2026-01-01", "[[1]]", '"1,5"', '"ünï"')
TEXT_WRONG = ("5", "true", "[1]", "{ a = 1 }", "1.5", "2026-01-01", "[[[]]]", "nan")
BOOL_WRONG = ('"maybe"', "2", "[true]", "0.5", "{ a = true }", '"false"', "1", '"no"')
LIST_WRONG = ("5", "true", "{ a = 1 }", "[{ a = 1 }]", "[[1]]", "[2026-01-01]", "[true]", "nan", "[nan]")
GARBLED = ('"ünï €"', '"a\\u0000b"', '""', '" "', '"%s"' % ("x" * 5000), '"../.."', '"\\u001b[31mred"', "'''a\nb'''")


def kind_of(entry: Entry) -> str:
    value = entry.value
    if isinstance(value, bool):
        return "bool"
    return {int: "number", float: "number", str: "text", list: "list", dict: "table"}.get(type(value), "other")


def validated(entry: Entry) -> bool:
    """Whether the value is read by `run`: not of a strategy, which may not be the chosen one."""
    return not entry.table.startswith("strategies")


def wrong_type(r: Draw, name: str, text: str) -> Case | None:
    entry = any_entry(
        r, text, lambda e: validated(e) and not free(e) and kind_of(e) in ("number", "text", "bool", "list")
    )
    if entry is None:
        return None
    pool = {"number": NUMBER_WRONG, "text": TEXT_WRONG, "bool": BOOL_WRONG, "list": LIST_WRONG}[kind_of(entry)]
    value = r.choice(pool)
    return case(
        "value of the wrong type",
        set_to(text, entry, value),
        names=(named(entry.path),),
        note=f"{entry.path} = {value}"[:90],
    )


def out_of_range(r: Draw, name: str, text: str) -> Case | None:
    entry = any_entry(r, text, lambda e: validated(e) and kind_of(e) == "number")
    if entry is None:
        return None
    value = r.choice(["-1", "-0.5", "nan", "inf", "-inf", "+nan", "-9223372036854775809", "-1e300"])
    return case(
        "value out of range", set_to(text, entry, value), names=(named(entry.path),), note=f"{entry.path} = {value}"
    )


# Keys where 0 means something; everywhere else it must be refused.
ZERO = {"seed", "warmup_steps", "weight_decay", "save_every", "readiness", "eval_every", "label_noise", "failed_share"}
ZERO |= {"demos", "validation", "prompts", "test", "epsilon", "dropout", "smoothing", "coefficient", "alpha", "beta"}


def zero(r: Draw, name: str, text: str) -> Case | None:
    entry = any_entry(r, text, lambda e: validated(e) and kind_of(e) == "number")
    if entry is None:
        return None
    last, table = entry.path.rpartition(".")[2], entry.table
    allowed = (last in ZERO and not (table == "rl" and last == "prompts")) or entry.path == "eval.temperature"
    value = r.choice(["0", "0.0", "-0"])
    must = "either" if allowed else "refused"
    names = (related(entry) if allowed else named(entry.path),)
    kept = {entry.path: 0} if must == "either" and validated(entry) and table in ("data", "sft", "rl") else {}
    return case("zero", set_to(text, entry, value), must, names, kept=kept, note=entry.path)


HUGE = (
    "9223372036854775808",
    "1" + "0" * 30,
    "1" + "0" * 400,
    "1e300",
    "1_000_000_000",
    "4294967296",
    "1e18",
    "1" * 5000,
)


def huge(r: Draw, name: str, text: str) -> Case | None:
    entry = any_entry(r, text, lambda e: validated(e) and kind_of(e) == "number")
    if entry is None:
        return None
    value = r.choice(HUGE)
    names = (related(entry) + (("at line",) if len(value) > 4000 else ()),)
    return case("huge value", set_to(text, entry, value), "either", names, note=f"{entry.path} = {value[:40]}")


def in_quotes(r: Draw, name: str, text: str) -> Case | None:
    """A number written as text: refused, or read as that number."""
    entry = any_entry(r, text, lambda e: validated(e) and kind_of(e) == "number" and not e.table.startswith("compare"))
    if entry is None:
        return None
    value = entry.text.partition("#")[0].strip().replace("_", "")
    kept = {entry.path: value}
    return case(
        "number in quotes",
        set_to(text, entry, f'"{value}"'),
        "either",
        (named(entry.path),),
        kept=kept,
        note=entry.path,
    )


TEXT_FREE = {"name", "endpoint", "revision", "config", "baseline"}


def garbled_text(r: Draw, name: str, text: str) -> Case | None:
    entry = any_entry(r, text, lambda e: validated(e) and kind_of(e) == "text" and e.key not in TEXT_FREE)
    if entry is None:
        return None
    value = r.choice(GARBLED)
    names = named(entry.path) if entry.path != "strategy" else ("strategy",)
    return case("garbled text", set_to(text, entry, value), names=(names,), note=f"{entry.path} = {value}"[:90])


def misspelt_value(r: Draw, name: str, text: str) -> Case | None:
    entry = any_entry(r, text, lambda e: validated(e) and kind_of(e) == "text" and e.key not in TEXT_FREE)
    if entry is None:
        return None
    wrong = misspelt_word(r, entry.value)
    if entry.path == "rl.policy" or not re.fullmatch(r"[\w./:-]+", wrong):
        return None
    return case(
        "misspelt value", set_to(text, entry, f'"{wrong}"'), names=(named(entry.path),), note=f"{entry.path} = {wrong}"
    )


NESTED = (
    "[" * 40 + "]" * 40,
    "[" * 3000 + "]" * 3000,
    "{ a = { b = { c = { d = [[{}]] } } } }",
    "{ a = " * 2000 + "1" + " }" * 2000,
)


def nested(r: Draw, name: str, text: str) -> Case | None:
    entry = any_entry(r, text, lambda e: validated(e) and not free(e) and kind_of(e) != "table")
    if entry is None:
        return None
    value = r.choice(NESTED)
    names = ((*named(entry.path), "at line", "nested"),)
    return case("nested value", set_to(text, entry, value), names=names, note=f"{entry.path} = {value[:20]}…")


# --- TOML ----------------------------------------------------------------------------------------------------------
def syntax(kind: str, content: bytes, **more: Any) -> Case:
    """A recipe of these bytes; where they are no TOML, the message has to say where."""
    try:
        tomllib.loads(content.decode("utf-8"))
    except UnicodeDecodeError:
        return case(kind, content, names=(("line", "UTF-8"),), **more)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError):
        return case(kind, content, names=(("at line", "at end of document", "nested"),), **more)
    return case(kind, content, "either", **more)


def cut(r: Draw, name: str, text: str) -> Case | None:
    whole = text.encode()
    return syntax("TOML cut in the middle", whole[: r.randrange(1, len(whole))])


def quotes(r: Draw, name: str, text: str) -> Case | None:
    places = [n for n, c in enumerate(text) if c in "\"[]=,{}'"]
    at = r.choice(places)
    instead = r.choice(["", "'", '"', "“", ":", "]", "[[", "=="])
    return syntax("TOML punctuation", (text[:at] + instead + text[at + 1 :]).encode())


def foreign_bytes(r: Draw, name: str, text: str) -> Case | None:
    raw = text.encode()
    at = r.randrange(len(raw))
    piece = r.choice(
        [b"\xff", b"\xc3(", b"\x00", b"\xed\xa0\x80", b"\x1b[0m", b"\x07", b"\xe2\x80\xa8", b"\x0c", b"\r"]
    )
    return syntax("TOML with foreign bytes", raw[:at] + piece + raw[at:])


def encoding(r: Draw, name: str, text: str) -> Case | None:
    """Other encodings are refused, a BOM and the line ends of Windows are not."""
    how = r.choice(["utf-16", "utf-16-le", "utf-32", "latin-1 ü", "bom", "crlf", "bom+crlf", "empty", "only a comment"])
    if how in ("bom", "crlf", "bom+crlf"):
        raw = text.replace("\n", "\r\n").encode() if "crlf" in how else text.encode()
        return case(f"TOML: {how}", b"\xef\xbb\xbf" * ("bom" in how) + raw, "taken")
    if how == "empty" or how == "only a comment":
        return case(f"TOML: {how}", "" if how == "empty" else "# nothing\n", names=(("model",),))
    raw = ("# ü\n" + text).encode("latin-1", "replace") if "latin" in how else text.encode(how)
    return case(f"TOML: {how}", raw, names=(("line", "UTF-8"),))


def unknown_table(r: Draw, name: str, text: str) -> Case | None:
    made = r.choice(
        ["sfft", "optimizer", "sft.sft", "rl.sampling", "eval.test", "data.rows", "x.y.z", "Sft", '"sft "', "compares"]
    )
    if any(made.startswith(f"{e.table}.") for e in entries_of(text) if e.table == made):
        return None
    end = r.choice(["", "a = 1\n", "lr = 1e-5\n"])
    return case(
        "unknown table", f"{text}\n[{made}]\n{end}", names=((made.strip('"'), made.partition(".")[0]),), note=made
    )


def table_shape(r: Draw, name: str, text: str) -> Case | None:
    """A table that is a list of tables, or a value."""
    tables = [t for t in re.findall(r"(?m)^\[(\w+)\]", text) if t not in ("compare", "strategies")]
    if not tables:
        return None
    table = r.choice(tables)
    if r.random() < 0.5:
        made = text.replace(f"\n[{table}]", f"\n[[{table}]]", 1)
        return case("table as a list", made, names=((*named(table), "at line"),), note=table)
    entries = [e for e in entries_of(text) if e.table == table or e.table.startswith(f"{table}.")]
    lines = text.split("\n")
    for entry in entries:
        for n in range(entry.first, entry.last + 1):
            lines[n] = ""
    value = r.choice(["5", '"x"', "[]", "[1]", "true", "nan", "2026-01-01"])
    kept = "\n".join(line for line in lines if not re.match(rf"\[{table}(\.|\])", line))
    return case("table as a value", f"{table} = {value}\n{kept}", names=((table,),), note=f"{table} = {value}")


MUTATIONS: tuple[Mutation, ...] = (
    *(key_misspelt, key_moved, key_deleted, key_twice, wrong_type, out_of_range, zero, huge, in_quotes, garbled_text),
    *(misspelt_value, nested, cut, quotes, foreign_bytes, encoding, unknown_table, table_shape),
    *(key_misspelt, wrong_type, out_of_range),  # what users do most
)


def unmutated() -> Iterator[Case]:
    """Each recipe as it is, which has to be taken."""
    for name in NAMES:
        files = {f"{other}.toml": text_of(other).encode() for other in NAMES}
        yield case("unmutated", text_of(name), "taken", note=name, files=files)


def cases(count: int, seed: int) -> list[Case]:
    """That many mutated recipes, every kind in turn over every recipe; the same for the same seed."""
    import mutated_beside
    import mutated_overrides

    r = random.Random(seed)
    kinds: list[Mutation] = [*MUTATIONS, *mutated_overrides.MUTATIONS, *mutated_beside.MUTATIONS]
    made: list[Case] = []
    files = {f"{other}.toml": text_of(other).encode() for other in ("study-initialisation", "study-adaptive", "demo")}
    for turn in itertools.count():
        if len(made) >= count:
            return made
        mutation, name = kinds[turn % len(kinds)], r.choice(NAMES)
        found = mutation(random.Random(r.getrandbits(64)), name, text_of(name))
        if found is not None:
            found.files.update({k: v for k, v in files.items() if k not in found.files})
            made.append(found)
    raise AssertionError
