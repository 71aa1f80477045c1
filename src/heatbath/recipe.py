"""One typed TOML file describes a whole run. Unknown keys are refused; nothing a user sets is ever overwritten.

The tables and their defaults are in sections.py. Importing this module imports no torch.
"""

from __future__ import annotations

import difflib
import importlib.resources
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from heatbath import toml_files
from heatbath.compare_sections import Compare
from heatbath.errors import RecipeError, got
from heatbath.sections import INERT, RL, SFT, AnyData, Eval, Recipe, contradictions
from heatbath.strategies import STRATEGIES, lay, left_out, over

__all__ = ["RL", "SFT", "Compare", "Eval", "Recipe", "as_toml", "changes", "comparison", "copy", "find", "load"]
__all__ += ["parse", "shipped", "surface"]
RENAMED = {"sft.objective", "sft.objective.name", "rl.policy", "rl.policy.name"}
IN_THE_FILE = ("extends", "strategy", "strategies", "compare")  # keys that belong to a recipe's file, not to a run
CHECKED_LATER = ("missing", "value_error")  # what a strategy that is not chosen may still get from an override
SOURCES = {get_args(cls.model_fields["source"].annotation)[0]: cls for cls in get_args(get_args(AnyData)[0])}


def load(path: str | Path, overrides: list[str] | None = None, *, inert: bool = False) -> Recipe:
    """The recipe in a TOML file (or a shipped one by its bare name), with `section.key=value` overrides applied.

    `strategy` lays the tables of a strategy over the file's before any other override. An override of
    `….objective.name` starts that objective from its own defaults. Python code that the recipe names is imported, to
    check it; not where it is `inert`, only to be read. Raises RecipeError listing every mistake at once.
    """
    file = find(path)
    table = _read(file, path)
    if problems := _beside(table, inert=inert):
        raise _mistakes(problems, str(file))
    table.pop("compare", None)
    own = table.pop("strategies", {})
    chosen = table.pop("strategy", None)
    given = dict(_keyed(override) for override in overrides or [])
    chosen = given.pop("strategy", chosen)
    if chosen is not None:
        table = {**lay(table, chosen, own), "name": chosen}
        for stage in left_out(chosen, own) - table.keys():
            if against := next((key for key in given if key.startswith(f"{stage}.")), None):
                said = f"the strategy '{chosen}' has no [{stage}]"
                raise RecipeError(said, f"{against}={given[against]}", "leave it out, or take another strategy")
    if RENAMED & given.keys():  # it is no longer what the strategy's name says
        table.pop("name", None)
    for key, value in sorted(given.items(), key=lambda item: not item[0].endswith("objective.name")):
        _override(table, key, value)
    return parse(table, str(file), inert=inert)


def _beside(table: dict[str, Any], *, inert: bool = False) -> list[str]:
    """Mistakes in what a run is not made of, but its file holds: `strategy`, [compare], the tables of strategies."""
    chosen, own = table.get("strategy"), table.get("strategies", {})
    found = _of_compare(table)
    if chosen is not None and not isinstance(chosen, str):
        found.append(f"strategy: the name of one{got(chosen)}")
    if not isinstance(own, dict):
        return [*found, f"strategies: tables of their own, such as [strategies.mine]{got(own)}"]
    rest = {key: value for key, value in table.items() if key not in IN_THE_FILE}
    errors = _errors(rest, inert) if own or chosen is not None else []
    # A strategy's table would come in the place of a value that is none.
    found += [_explain(e) for e in errors if e["type"] == "model_type" and len(e["loc"]) == 1]
    known = {(e["loc"], e["type"]) for e in errors}
    for name, layer in own.items():
        if not isinstance(layer, dict):
            found.append(f"strategies.{name}: a table of its own, such as [strategies.{name}]{got(layer)}")
            continue
        new = [e for e in _errors(lay(rest, name, own), inert) if (e["loc"], e["type"]) not in known]
        found += [f"strategies.{name}.{_explain(e)}" for e in new if e["type"] not in CHECKED_LATER]
    return found


def _of_compare(table: dict[str, Any]) -> list[str]:
    try:
        Compare.model_validate(table.get("compare", {}))
    except ValidationError as error:
        return [_explain(e | {"loc": ("compare", *e["loc"])}) for e in error.errors()]
    return []


def _errors(table: dict[str, Any], inert: bool) -> list[Any]:
    try:
        Recipe.model_validate(table, context={INERT: inert})
    except ValidationError as error:
        return error.errors()
    return []


def _keyed(override: str) -> tuple[str, str]:
    key, equals, value = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError("an override is section.key=value", override, "for example sft.lr=2e-5")
    return key.strip(), value


def strategy_of(path: str | Path, overrides: Sequence[str] = ()) -> str | None:
    """The strategy that `load` would lay over a recipe, and None where there is none."""
    given = dict(_keyed(override) for override in overrides)
    return given.get("strategy", _read(find(path), path).get("strategy"))


def stages_without(path: str | Path, strategy: str | None) -> set[str]:
    """The stages that a strategy leaves out of a recipe."""
    own = _read(find(path), path).get("strategies", {})
    return left_out(strategy, own) if strategy is not None else set()


def comparison(path: str | Path) -> Compare:
    """The `[compare]` table of a recipe; one of defaults where it has none. Raises RecipeError."""
    file = find(path)
    table = _read(file, path)
    if problems := _beside(table):
        raise _mistakes(problems, str(file))
    return Compare.model_validate(table.get("compare", {}))


def strategies_of(path: str | Path) -> list[str]:
    """The strategies that may be named with this recipe: its own, and those of the package."""
    own = _read(find(path), path).get("strategies", {})
    return list(dict.fromkeys([*own, *STRATEGIES]))


def _read(file: Path, where: str | Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tables of a file, laid over those of a recipe that it `extends`; of [compare] only the nearest counts."""
    table = toml_files.read(file, str(where), "heatbath recipes lists the shipped ones")
    parent = table.pop("extends", None)
    if parent is None:
        return table
    found = _extended(parent, file)
    if found.resolve() in (*below, file.resolve()):
        raise RecipeError("the recipe extends itself", f"{file}, extends", "name another one in extends")
    under = _read(found, f"{found}, which {file} extends", (*below, file.resolve()))
    return over(under, table) | {key: table[key] for key in ("compare",) if key in table}


def _extended(parent: Any, file: Path) -> Path:
    """The file that `extends` names: one beside the recipe, or another recipe."""
    where = f"{file}, extends"
    if not isinstance(parent, str) or not parent.strip():
        raise RecipeError(f"extends is the name or the path of a recipe{got(parent)}", where, 'extends = "smoke"')
    try:
        beside = [file.parent / parent, file.parent / f"{parent}.toml"]
        return next((path for path in beside if path.is_file()), None) or find(parent)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise RecipeError(f"no such recipe: {error.strerror}", where, "name another one in extends") from None
    except RecipeError as error:
        raise RecipeError(f"{error.what}: '{parent}'", where, error.remedy) from None


def parse(table: dict[str, Any], where: str = "recipe", *, inert: bool = False) -> Recipe:
    """The recipe of an already parsed table. Raises RecipeError listing every mistake at once."""
    problems = contradictions(table) + unwritable(table)
    made = None
    try:
        made = Recipe.model_validate(table, context={INERT: inert})
    except ValidationError as error:
        problems += [_explain(e) for e in error.errors()]
    if made is None or problems:
        raise _mistakes(problems, where)
    return made


def shipped_folder() -> Path:
    """Where what comes with the package lies: recipes, and configurations of the launcher."""
    installed = Path(str(importlib.resources.files("heatbath"))) / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "recipes"


def _mistakes(problems: list[str], where: str) -> RecipeError:
    count = f"{len(problems)} mistake{'s' if len(problems) > 1 else ''}"
    listed = "".join(f"\n  - {p}" for p in problems)
    return RecipeError(f"{count} in the recipe:{listed}", where, "fix the keys named above")


def shipped() -> dict[str, Path]:
    """Name → file of the recipes that come with the package."""
    return {p.stem: p for p in sorted(shipped_folder().glob("*.toml"))}


def copy(name: str, to: Path | None = None) -> Path:
    """Copies a shipped recipe, or a configuration of the launcher (`fsdp2`), to `to` (default: its name in the working
    folder). Raises RecipeError if that exists."""
    launcher = {path.stem: path for path in (shipped_folder() / "launch").glob("*.yaml")}
    source = shipped().get(name.removesuffix(".toml")) or launcher.get(name.removesuffix(".yaml")) or find(name)
    target = to if to is not None else Path(source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise RecipeError("the file exists already; nothing was written", str(target), "name another file to copy to")
    shutil.copyfile(source, target)
    return target


def find(path: str | Path) -> Path:
    """The file itself, that of a run's folder, or the shipped recipe of that bare name."""
    recipes = shipped()
    try:
        if (Path(path) / "recipe.toml").is_file():
            return Path(path) / "recipe.toml"
        if Path(path).is_file() or (Path(path).exists() and str(path) not in recipes):
            return Path(path)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise RecipeError(f"no such recipe: {error.strerror}", str(path), "check the path") from None
    if str(path) in recipes:  # also beside a folder of that name
        return recipes[str(path)]
    near = difflib.get_close_matches(Path(path).stem, recipes, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"shipped recipes: {', '.join(recipes)}"
    raise RecipeError("no such recipe", str(path), hint)


def as_toml(recipe: Recipe) -> str:
    """The resolved recipe, every default written out."""
    top, tables = [], []
    for key, value in recipe.model_dump(mode="json").items():
        if isinstance(value, dict):
            body = "\n".join(f"{k} = {literal(v)}" for k, v in value.items() if v is not None)
            tables.append(f"[{key}]\n{body}")
        elif value is not None:
            top.append(f"{key} = {literal(value)}")
    return "\n\n".join(["\n".join(top), *tables]) + "\n"


def literal(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # a JSON string is a TOML string
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(k)} = {literal(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(literal(v) for v in value) + "]"
    return repr(value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else literal(key)


def _override(table: dict[str, Any], key: str, value: str) -> None:
    text = f"{key}={value}"
    *path, last = key.split(".")
    parsed: Any = {"True": True, "False": False}.get(value, toml_files.value(value, text))
    if path and path[-1] == "objective" and last == "name":
        path, last, parsed = path[:-1], "objective", {"name": parsed}
        stage = table.get(path[0]) if path else None
        there = stage.get(last) if isinstance(stage, dict) else None
        if isinstance(there, dict) and there.get("name") == parsed["name"]:
            return  # the same objective keeps its numbers
    for part in path:
        inner = table.setdefault(part, {})
        if isinstance(inner, str) and part == "objective":
            inner = table[part] = {"name": inner}
        if not isinstance(inner, dict):
            raise RecipeError(f"'{part}' is not a table", text, "heatbath recipes shows recipes with every table")
        table = inner
    table[last] = parsed


def unwritable(value: Any, key: str = "") -> list[str]:
    """Keys and values with a character that no file name and no UTF-8 text can hold: NUL, and what the command line
    got as bytes that are no UTF-8."""
    if isinstance(value, dict):
        named = ((f"{key}.{part}" if key else str(part), inner) for part, inner in value.items())
        return [said for name, inner in named for said in unwritable(name, name) or unwritable(inner, name)]
    if isinstance(value, list):
        return [said for inner in value for said in unwritable(inner, key)]
    bad = next((c for c in value if c == "\0" or "\ud800" <= c <= "\udfff"), None) if isinstance(value, str) else None
    return [f"{key}: holds {'a NUL character' if bad == chr(0) else 'bytes that are not UTF-8'}"] if bad else []


def changes(before: Recipe, after: Recipe) -> dict[str, tuple[Any, Any]]:
    """Key → (value before, value after) of every key in which two recipes differ."""
    old, new = flat(before.model_dump(mode="json")), flat(after.model_dump(mode="json"))
    return {key: (old.get(key), new.get(key)) for key in sorted(old | new) if old.get(key) != new.get(key)}


def flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Key with its tables → value."""
    out: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[prefix + key] = value
    return out


def _explain(error: Any) -> str:
    path = [part for part in error["loc"] if part not in SOURCES]
    key = ".".join(str(p) for p in path)
    if error["type"] == "extra_forbidden" and key in IN_THE_FILE:
        return f"{key}: stands only in a recipe's file, at its top"
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key{_did_you_mean(path, error['loc'])}"
    if error["type"] == "missing":
        return f"{key}: required"
    if error["type"] == "union_tag_invalid":
        given = error["ctx"]["tag"]
        return f"{key}.source: no source is called '{given}'{_near(given, list(SOURCES))}"
    if error["type"] == "union_tag_not_found":
        return f"{key}.source: required, one of {', '.join(SOURCES)}"
    if error["type"] == "model_type":
        return f"{key}: a table of its own, such as [{key}]{got(error['input'])}"
    message = "a path, written as text" if error["type"] == "path_type" else error["msg"].removeprefix("Value error, ")
    return f"{key or 'recipe'}: {message[0].lower() + message[1:]}{got(error['input'])}"


def _near(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f", did you mean '{near[0]}'?" if near else f" (known: {', '.join(known)})"


def _did_you_mean(path: list[Any], location: tuple[Any, ...]) -> str:
    """The nearest key of the same table, or the table in which a key of that very name lives."""
    from heatbath.ideas.objectives import OBJECTIVES

    word = str(path[-1])
    source = next((part for part in location if part in SOURCES), None)
    if path[0] == "data" and source is not None and len(path) == 2:
        if word in SOURCES[source].model_fields:
            return ""
        near = difflib.get_close_matches(word, SOURCES[source].model_fields, n=1, cutoff=0.6)
        if near:
            return f", did you mean '{near[0]}'?"
        owners = [name for name, cls in SOURCES.items() if word in cls.model_fields]
        if owners:
            return f" of source '{source}'; it belongs to {' and '.join(owners)}"
    keys = surface() + [f"sft.objective.{f}" for cls in OBJECTIVES.values() for f in cls.__dataclass_fields__]
    table = ".".join(str(p) for p in path[:-1])
    elsewhere = sorted({k for k in keys if k.rpartition(".")[2] == word and k != ".".join(map(str, path))})
    elsewhere = [k for k in elsewhere if table and k.startswith(f"{table}.")] or elsewhere
    if elsewhere:
        return f" here, did you mean {' or '.join(repr(k) for k in elsewhere)}?"
    inside = [k.removeprefix(f"{table}.") for k in keys if not table or k.startswith(f"{table}.")]
    here = sorted({k.partition(".")[0] for k in inside})
    near = difflib.get_close_matches(word, here, n=1, cutoff=0.6)
    if near:
        return f", did you mean '{near[0]}'?"
    return f" (known here: {', '.join(here)})" if here else ""


def surface() -> list[str]:
    """Every key a recipe may hold, sorted; an objective's hyper-parameters are its own."""
    keys = {"extends", "strategy", "strategies"}

    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, info in model.model_fields.items():
            arguments = getattr(info.annotation, "__args__", (info.annotation,))
            nested = [a for a in arguments if isinstance(a, type) and issubclass(a, BaseModel)]
            for inner in nested:
                walk(inner, f"{prefix}{name}.")
            if not nested:
                keys.add(prefix + name)

    walk(Recipe, "")
    walk(Compare, "compare.")
    return sorted(keys)
