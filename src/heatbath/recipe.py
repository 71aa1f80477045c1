"""One typed TOML file describes a whole run. Unknown keys are refused; nothing a user sets is ever overwritten.

The tables and their defaults are in sections.py. Importing this module imports no torch.
"""

from __future__ import annotations

import difflib
import importlib.resources
import json
import re
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from heatbath.addresses import without_credentials
from heatbath.compare_sections import Compare
from heatbath.errors import RecipeError
from heatbath.sections import INERT, RL, SFT, AnyData, Eval, Recipe, contradictions
from heatbath.strategies import STRATEGIES, lay, left_out, over

__all__ = ["RL", "SFT", "Compare", "Eval", "Recipe", "as_toml", "changes", "comparison", "copy", "find", "load"]
__all__ += ["parse", "shipped", "surface"]
RENAMED = {"sft.objective", "sft.objective.name", "rl.policy", "rl.policy.name"}
SOURCES = {get_args(cls.model_fields["source"].annotation)[0]: cls for cls in get_args(get_args(AnyData)[0])}


def load(path: str | Path, overrides: list[str] | None = None, *, inert: bool = False) -> Recipe:
    """The recipe in a TOML file (or a shipped one by its bare name), with `section.key=value` overrides applied.

    `strategy` lays the tables of a strategy over the file's before any other override. An override of
    `….objective.name` starts that objective from its own defaults. Python code that the recipe names is imported, to
    check it; not where it is `inert`, only to be read. Raises RecipeError listing every mistake at once.
    """
    file = find(path)
    table = _read(file, path)
    table.pop("compare", None)
    own = table.pop("strategies", {})
    chosen = table.pop("strategy", None)
    given = dict(_keyed(override) for override in overrides or [])
    chosen = given.pop("strategy", chosen)
    if chosen is not None:
        table = {**lay(table, str(chosen), own if isinstance(own, dict) else {}), "name": str(chosen)}
        for stage in left_out(str(chosen), own) - table.keys():
            if against := next((key for key in given if key.startswith(f"{stage}.")), None):
                said = f"the strategy '{chosen}' has no [{stage}]"
                raise RecipeError(said, f"{against}={given[against]}", "leave it out, or take another strategy")
    if RENAMED & given.keys():  # it is no longer what the strategy's name says
        table.pop("name", None)
    for key, value in sorted(given.items(), key=lambda item: not item[0].endswith("objective.name")):
        _override(table, key, value)
    return parse(table, str(file), inert=inert)


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
    table = _read(file, path).get("compare", {})
    try:
        return Compare.model_validate(table)
    except ValidationError as error:
        listed = "".join(f"\n  - compare.{_explain(e)}" for e in error.errors())
        raise RecipeError(f"mistakes in the [compare] table:{listed}", str(file), "fix the keys named above") from None


def strategies_of(path: str | Path) -> list[str]:
    """The strategies that may be named with this recipe: its own, and those of the package."""
    own = _read(find(path), path).get("strategies", {})
    return list(dict.fromkeys([*own, *STRATEGIES]))


def _read(file: Path, path: str | Path, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The tables of a file, laid over those of a recipe that it `extends`; of [compare] only the nearest counts."""
    if file.resolve() in below:
        raise RecipeError("the recipe extends itself", str(path), "name another one in extends")
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"cannot read the recipe: {error}", str(path), "heatbath recipes lists the shipped ones"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"not valid TOML: {error}", str(file), "see https://toml.io") from None
    parent = table.pop("extends", None)
    if parent is None:
        return table
    beside = [file.parent / str(parent), file.parent / f"{parent}.toml"]
    found = next((path for path in beside if path.is_file()), None) or find(str(parent))
    under = _read(found, str(parent), (*below, file.resolve()))
    return over(under, table) | {key: table[key] for key in ("compare",) if key in table}


def parse(table: dict[str, Any], where: str = "recipe", *, inert: bool = False) -> Recipe:
    """The recipe of an already parsed table. Raises RecipeError listing every mistake at once."""
    problems = contradictions(table)
    made = None
    try:
        made = Recipe.model_validate(table, context={INERT: inert})
    except ValidationError as error:
        problems += [_explain(e) for e in error.errors()]
    if made is None or problems:
        count = f"{len(problems)} mistake{'s' if len(problems) > 1 else ''}"
        listed = "".join(f"\n  - {p}" for p in problems)
        raise RecipeError(f"{count} in the recipe:{listed}", where, "fix the keys named above")
    return made


def shipped_folder() -> Path:
    """Where what comes with the package lies: recipes, and configurations of the launcher."""
    installed = Path(str(importlib.resources.files("heatbath"))) / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "recipes"


def shipped() -> dict[str, Path]:
    """Name → file of the recipes that come with the package."""
    return {p.stem: p for p in sorted(shipped_folder().glob("*.toml"))}


def copy(name: str, to: Path | None = None) -> Path:
    """Copies a shipped recipe to `to` (default: its name in the working folder). Raises RecipeError if that exists."""
    source = shipped().get(name.removesuffix(".toml")) or find(name)
    target = to if to is not None else Path(source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise RecipeError("the file exists already; nothing was written", str(target), "name another file to copy to")
    shutil.copyfile(source, target)
    return target


def find(path: str | Path) -> Path:
    """The file itself, that of a run's folder, or the shipped recipe of that bare name."""
    if (Path(path) / "recipe.toml").is_file():
        return Path(path) / "recipe.toml"
    recipes = shipped()
    if Path(path).is_file() or (Path(path).exists() and str(path) not in recipes):
        return Path(path)
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
    try:
        parsed = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = {"True": True, "False": False}.get(value, value)
    if path and path[-1] == "objective" and last == "name":
        path, last, parsed = path[:-1], "objective", {"name": parsed}
        there = table.get(path[0], {}).get(last) if path else None
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
        return f"{key}: a table of its own, such as [{key}] (got {error['input']!r})"
    message = error["msg"].removeprefix("Value error, ")
    got = "" if isinstance(error["input"], dict) else f" (got {without_credentials(repr(error['input']))})"
    return f"{key or 'recipe'}: {message[0].lower() + message[1:]}{got}"


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
