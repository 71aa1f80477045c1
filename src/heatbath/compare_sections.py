"""The `[compare]` table of a recipe: which settings `heatbath compare` runs, with which seeds.

Importing this module imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from heatbath.data_sections import Positive, Section, Switch, Whole

Values = Annotated[list[Any], Field(min_length=1)]
Grid = dict[str, Values]
Seeds = Annotated[list[Annotated[Whole, Field(ge=0, lt=2**32)]], Field(min_length=1)]


def trials(grid: Grid) -> int:
    """How many settings a grid has: one for each combination of its values."""
    count = 1
    for values in grid.values():
        count *= len(values)
    return count


class Tune(Section):
    """How each setting of a comparison finds what is not compared, its learning rate for example: every combination of
    the values in `grid` is run with `seeds`, and the one with the best pass@`k` of the validation problems after the
    last stage is taken. `grids` are those of settings that need other keys; all must be of one size, so that none has
    more trials than another. `overrides` are keys that trials have otherwise, to make them shorter."""

    grid: Grid
    grids: dict[str, Grid] = {}
    overrides: dict[str, Any] = {}
    seeds: Seeds = [100]
    k: Positive = 1

    @model_validator(mode="after")
    def equal_trials(self) -> Self:
        for name, grid in self.grids.items():
            if trials(grid) != trials(self.grid):
                raise ValueError(
                    f"'{name}' has {trials(grid)} trials and the others {trials(self.grid)}: give all the same number"
                )
        return self


class Compare(Section):
    """`vary` maps a key of the recipe, or `strategy`, to its values; every combination is a setting, run with each of
    `seeds`. Differences are to `baseline`, the name of a setting (without it the first). `shift` measures how far each
    stage moves the policy, too."""

    vary: Grid = {}
    seeds: Seeds = [0, 1, 2]
    baseline: str | None = None
    shift: Switch = False
    tune: Tune | None = None

    @model_validator(mode="after")
    def distinct(self) -> Self:
        for key, values in {**self.vary, "seeds": self.seeds}.items():
            if twice := next((value for value in values if values.count(value) > 1), None):
                raise ValueError(f"{key} has {twice!r} twice")
        if "seed" in self.vary:
            raise ValueError("seed is varied by seeds, not by vary")
        if self.tune is not None and set(self.tune.seeds) & set(self.seeds):
            raise ValueError("tune.seeds and seeds share a seed: settings would be chosen on what they are compared by")
        return self
