"""Scores that papers print, by table and strategy. Anchors to look at, never targets: docs/paper.md.

Importing this module imports no torch.
"""

from __future__ import annotations

import difflib
import functools
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Score:
    """One printed number: where it stands, of which policy ("last" or "init"), and what was measured of each task."""

    table: str
    policy: str
    measured: tuple[tuple[str, str], ...]  # (task, metric); of several the mean
    printed: float  # a percentage, or a rating of 10

    @property
    def share(self) -> bool:
        """Whether it is a share of problems, printed as a percentage."""
        return self.measured[0][1].startswith("pass@")


@functools.cache
def _tables() -> dict[str, list[dict[str, Any]]]:
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def require(key: str) -> None:
    """Raises ValueError where no scores are kept under that key."""
    if key not in _tables():
        near = difflib.get_close_matches(key, _tables(), n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(_tables())}"
        raise ValueError(f"no published scores are called '{key}', {hint}")


def scores(key: str, strategy: str) -> Iterator[Score]:
    """Every number that is printed of a strategy, in the order of the paper."""
    for table in _tables()[key]:
        columns, metrics = table["columns"], table.get("metrics", {})
        alone = [(task, metrics.get(task, "pass@1")) for task in columns if task != "mean"]
        for column, printed in zip(columns, table["scores"].get(strategy, ()), strict=False):
            if "tasks" in table:
                measured = [(task, column) for task in table["tasks"]]
            else:
                measured = alone if column == "mean" else [(column, metrics.get(column, "pass@1"))]
            yield Score(table["name"], table.get("policy", "last"), tuple(measured), printed)
