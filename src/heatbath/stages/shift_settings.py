"""What the paper leaves open about the shift between two models (arXiv 2601.09233, Table 4), each with its default."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heatbath.errors import RecipeError
from heatbath.ideas.shift import POOLS, TOPK

LAYERS, MEANS = ("before", "after"), ("token", "sequence")
CHOICES = {
    "split": ("validation", "test", "demos"),
    "tokens": ("response", "all", "all-but-first"),
    "layer": LAYERS,
    "mean": MEANS,
    "pool": ("none", *POOLS),
    "vocabulary": ("head", "tokenizer"),
    "dtype": ("float32", "bfloat16", "float16"),
}
ONLY_CHOOSE = ("layer", "mean", "pool")  # among numbers that are measured anyway


@dataclass(frozen=True)
class Settings:
    """Which sequences, which tokens, which numbers.

    on           "demos": held-out demonstrations; "samples:POLICY": what that policy of the run answered
    split        of the demonstrations
    problems     the first so many problems of it
    tokens       "response", EOS included; "all": the prompt's too; "all-but-first": those without the first state
    layer        of the cosine and L2 that head the table: the last block, "before" or "after" the final norm
    mean         over all tokens, or over each "sequence" first
    pool         cosine and L2 of whole sequences instead: their mean state, their last, or all of them as one vector
    temperature  that the logits are divided by
    topk         the K of the overlaps
    max_length   tokens of a sequence, cut on the right; None: that of the recipe's [sft]
    vocabulary   all rows of the head, or only those that the tokenizer has
    dtype        of the bodies; heads and softmax are float32 always
    """

    on: str = "demos"
    split: str = "validation"
    problems: int = 1000
    tokens: str = "response"
    layer: str = "before"
    mean: str = "token"
    pool: str = "none"
    temperature: float = 1.0
    topk: tuple[int, ...] = TOPK
    max_length: int | None = None
    vocabulary: str = "head"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        where = "command line"
        for key, known in CHOICES.items():
            if getattr(self, key) not in known:
                raise RecipeError(f"{key} = {getattr(self, key)!r}", where, f"one of {', '.join(known)}")
        if self.on != "demos" and not (self.on.startswith("samples:") and self.policy):
            raise RecipeError(f"--on {self.on}", where, "demos, or samples:POLICY, such as samples:final")
        if not 0 < self.temperature < math.inf:
            raise RecipeError(f"temperature = {self.temperature:g}", where, "give a number above 0")
        for key, value, least in (("topk", min(self.topk, default=0), 1), ("problems", self.problems, 1)):
            if value < least:
                raise RecipeError(f"{key} = {getattr(self, key)}", where, f"give {least} or more")
        if self.max_length is not None and self.max_length < 2:
            raise RecipeError(f"max_length = {self.max_length}", where, "give 2 or more: the first token predicts none")

    @property
    def policy(self) -> str:
        """Whose samples are read; "" with demonstrations."""
        return self.on.partition(":")[2]

    def recorded(self) -> dict[str, Any]:
        """As it stands in shift.json."""
        return dataclasses.asdict(self) | {"topk": list(self.topk)}


def named_and_set(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Models or runs, and settings, of a command line: a setting is `key=value`, and no file or folder of that name."""
    set_ = [w for w in words if re.fullmatch(r"\w+=.*", w) and not Path(w).exists()]
    return [w for w in words if w not in set_], set_


def parse(texts: Sequence[str], on: str = "demos") -> Settings:
    """The settings of `key=value` texts. Raises RecipeError for a key or a value that there is not."""
    known = [field.name for field in dataclasses.fields(Settings) if field.name != "on"]
    given: dict[str, Any] = {"on": on}
    for text in texts:
        key, _, value = text.partition("=")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
            raise RecipeError(f"no setting of the shift is called '{key}'", text, hint)
        given[key] = _typed(key, value, text)
    return Settings(**given)


def _typed(key: str, value: str, text: str) -> Any:
    try:
        if key == "topk":
            return tuple(sorted({int(k) for k in value.strip("[] ").split(",") if k.strip()}))
        if key in ("problems", "max_length"):
            return int(value)
        return float(value) if key == "temperature" else value
    except ValueError:
        form = {"topk": "numbers such as 1,10,100", "temperature": "a number"}.get(key, "a whole number")
        raise RecipeError(f"{key} = {value!r}", text, f"give {form}") from None
