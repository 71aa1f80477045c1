"""The ways to start reinforcement learning that the first paper compares, and their relatives, each under one name.

`strategy = "gift"` in a recipe (or `strategy=gift` behind a command) lays the tables of that strategy over the recipe's
own; a recipe's `[strategies.gift]` table comes on top, with what this strategy needs there. `false` leaves a stage out.
Importing this module imports no torch.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from heatbath.errors import RecipeError

NAMED = ("objective", "policy")  # keys that hold a name, or a table with `name`


@dataclass(frozen=True)
class Strategy:
    """What it does, where it is from, and the tables that it lays over a recipe."""

    says: str
    source: str
    tables: Mapping[str, Any]


def _start(objective: str) -> dict[str, Any]:
    return {"sft": {"objective": objective}}


def _alone(policy: str) -> dict[str, Any]:
    return {"sft": False, "rl": {"policy": policy}}


PAPER = "arXiv 2601.09233, Table 1"
STRATEGIES: dict[str, Strategy] = {
    "direct-sft": Strategy(
        "SFT on the demonstrations of both stages, no RL",
        PAPER,
        {"sft": {"objective": "sft", "splits": ["demos", "prompts"]}, "rl": False},
    ),
    "direct-rl": Strategy("RL from the base", PAPER, {"sft": False}),
    "luffy": Strategy("RL from the base, a demonstration in every group", "arXiv 2504.14945", _alone("luffy")),
    "relift": Strategy("RL from the base, and SFT on prompts it cannot solve", "arXiv 2506.07527", _alone("relift")),
    "sft": Strategy("SFT", PAPER, _start("sft")),
    "sft-entropy": Strategy("SFT with an entropy bonus", PAPER, _start("entropy")),
    "sft-label-smoothing": Strategy("SFT with label smoothing", PAPER, _start("label_smoothing")),
    "sft-kd": Strategy("SFT with distillation from the base", PAPER, _start("kd")),
    "dft": Strategy("SFT weighted by the policy's own probability", "arXiv 2508.05629", _start("dft")),
    "asft": Strategy("DFT anchored to the base", "arXiv 2509.23753", _start("asft")),
    "psft": Strategy("SFT clipped as PPO is", "arXiv 2508.17784", _start("psft")),
    "gift": Strategy("SFT to the base's own distribution, β on the demonstration", PAPER, _start("gift")),
    "gift-sequence": Strategy("the exact sequence-level Gibbs target", "docs/gift.md", _start("gift_sequence")),
    "pear": Strategy("SFT weighted by how likely the rest of a demonstration is", "arXiv 2602.01058", _start("pear")),
    "sed": Strategy("SFT with entropy kept where the base is undecided", "arXiv 2602.07464", _start("sed")),
    "idft": Strategy("DFT weighted by how usual a token is to the policy", "arXiv 2602.12222", _start("idft")),
    "trapo": Strategy("RL from the base, beginnings of demonstrations given", "arXiv 2512.17636", _alone("trapo")),
    "uft": Strategy("RL from the base, with hints that get shorter", "arXiv 2505.16984", _alone("uft")),
}


def lay(table: dict[str, Any], name: str, own: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's table under a strategy: what `STRATEGIES` says of it, then the recipe's `own` tables of strategies.

    Raises RecipeError for a name that neither knows.
    """
    if name not in STRATEGIES and name not in own:
        known = [*own, *(n for n in STRATEGIES if n not in own)]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"one of {', '.join(known)}, or a [strategies.{name}] table"
        raise RecipeError(f"no strategy is called '{name}'", "strategy", hint)
    for layer in (STRATEGIES[name].tables if name in STRATEGIES else {}, own.get(name, {})):
        table = over(table, layer)
    return table


def left_out(name: str, own: Mapping[str, Any]) -> set[str]:
    """The stages that are false in a strategy's tables."""
    layers = (STRATEGIES[name].tables if name in STRATEGIES else {}, own.get(name, {}))
    return {key for layer in layers for key, value in layer.items() if value is False}


def over(table: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's tables over a recipe's, key by key; a stage that is false there is left out."""
    laid = copy.deepcopy({key: value for key, value in table.items() if layer.get(key) is not False})
    _merge(laid, {key: value for key, value in layer.items() if value is not False})
    return laid


def _merge(table: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        there = table.get(key)
        if key in NAMED and isinstance(there, str) and isinstance(value, Mapping):
            there = table[key] = {"name": there}
        named = value if isinstance(value, str) else value.get("name") if isinstance(value, Mapping) else None
        if key in NAMED and isinstance(there, dict) and named is not None and named != there.get("name"):
            there = table[key] = None  # another objective or policy starts from its own defaults
        if key in NAMED and isinstance(there, dict) and isinstance(value, str):
            continue
        if isinstance(value, Mapping) and isinstance(there, dict):
            _merge(there, value)
        else:
            table[key] = copy.deepcopy(value)


def listed() -> list[dict[str, Any]]:
    """Name, what it does, source and tables of every strategy."""
    return [{"name": n, "says": s.says, "source": s.source, "tables": dict(s.tables)} for n, s in STRATEGIES.items()]


def shown() -> str:
    """The list as text."""
    lines = [f"{name:20} {strategy.says} ({strategy.source})" for name, strategy in STRATEGIES.items()]
    use = 'Use: strategy = "gift" in a recipe, or strategy=gift behind a command (docs/compare.md).'
    return "\n".join([*lines, "Where nothing else is said, the recipe's RL follows.", use])
