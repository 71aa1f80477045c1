"""What the base is asked before it is trained: its surprise at the demonstrations, and what an objective left open."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from heatbath import models, ranks, surprise
from heatbath.cache import CachedBase, Needed, NeededBy, ReferenceCache, everything, nothing
from heatbath.data.rendering import IGNORE, Rendered
from heatbath.errors import DataError, RunError
from heatbath.ideas.engine import linear_stats
from heatbath.ideas.gift import Gift, LeftToBase
from heatbath.ideas.passes import BASE_ROWS
from heatbath.ideas.statistics import TOPK, Objective, TokenStats, needs_reference
from heatbath.progress import Progress
from heatbath.recipe import SFT, Recipe
from heatbath.reference import FrozenBase, Reference, base_pass
from heatbath.run import Run

PROFILE_ROWS = 512  # demonstrations the profile reads where no cache holds all of them; more sharpen only its tail


class MeasuredBase:
    """The base of the stage before it is trained on: its surprise at rows, and what it leaves for training."""

    def __init__(
        self,
        recipe: Recipe,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        goal: Objective,
        *,
        keep: bool = False,
    ):
        """`keep` fills the cache whether or not the recipe trains from it."""
        assert recipe.sft is not None
        self.settings, self.lora, self.model = recipe.sft, recipe.lora is not None, model
        self.pad_id, self.autocast = tokenizer.pad_token_id, models.autocast_dtype(recipe.precision)
        self.vocab_size = model.get_output_embeddings().weight.shape[0]
        self.read = needs_reference(goal)
        cached = keep or (self.read and self.settings.reference != "model")
        self.cache = ReferenceCache.of(model, cache_root(), self.autocast) if cached else None

    def fill(self, goal: Objective, rows: list[Rendered], progress: Progress) -> None:
        """Adds to the cache, if there is one, what it lacks of these rows; of an objective not settled yet that is
        their surprise alone."""
        if self.cache is None:
            return
        needed = nothing if left_open(goal) else needed_rows(self.settings, goal, self.vocab_size)
        if count := len(self.cache.missing(rows, needed)):
            with self.frozen() as base, progress.bar("reference cache", count):
                self.cache.fill(base, rows, needed, pad_id=self.pad_id, autocast=self.autocast, said=progress.update)

    def surprises(self, rows: list[Rendered]) -> list[surprise.Nats]:
        """−log p_base of every supervised token, in nats, from the cache where it knows them all."""
        if self.cache is not None and not self.cache.missing(rows, nothing):
            return [-self.cache.logp(row).double().numpy() for row in rows]
        with self.frozen() as base:
            return surprise.surprises(base, rows, pad_id=self.pad_id, autocast=self.autocast)

    def statistics(self, goal: Objective, rows: list[Rendered]) -> TokenStats:
        """What the objective reads of the policy, of the base in its place, over all rows: [N] each."""
        names = tuple(name for name in goal.needs if not name.startswith("ref_") and name != "rev_ce")
        parts: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        with self.frozen() as base:
            on = base.head.device
            for number, hidden, _ in base_pass(base, rows, pad_id=self.pad_id, autocast=self.autocast):
                labels = torch.tensor([x for i, x in enumerate(rows[number].labels) if i and x != IGNORE])
                with torch.no_grad(), torch.autocast(on.type, self.autocast, enabled=self.autocast is not None):
                    options = {"topk": getattr(goal, "topk", TOPK), **base.transform}
                    stats = linear_stats(hidden.to(on), base.head, labels.to(on), need=names, **options)
                for name in names:
                    parts[name].append(getattr(stats, name).cpu())
        return TokenStats(vocab_size=self.vocab_size, **{name: torch.cat(found) for name, found in parts.items()})

    def reference(self) -> Reference | None:
        """Where training finds the base: None where the objective does not read it, and with LoRA (adapters off)."""
        if self.cache is not None:
            return CachedBase(self.cache, self.settings.epsilon)
        return FrozenBase(copy.deepcopy(self.model)) if self.read and not self.lora else None

    @contextmanager
    def frozen(self) -> Iterator[FrozenBase]:
        """The model as the base; it can be trained again afterwards."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        yield FrozenBase(self.model)
        for p in trained:
            p.requires_grad_(True)


def settle(
    run: Run,
    base: MeasuredBase,
    tokenizer: PreTrainedTokenizerBase,
    goal: Objective,
    demos: list[Rendered],
    kinds: list[str],
    progress: Progress,
) -> Objective:
    """The objective with what it leaves open measured on the base: β = {left_to_base = …}, constants of `calibrate`.

    Measured once and stored in surprise.json, with the profile that a user reads before training starts.
    """
    settled = ranks.agreed(lambda: _settled(run, base, tokenizer, goal, demos, kinds, progress))
    return dataclasses.replace(goal, **settled) if settled else goal  # type: ignore[type-var]


def _settled(
    run: Run,
    base: MeasuredBase,
    tokenizer: PreTrainedTokenizerBase,
    goal: Objective,
    demos: list[Rendered],
    kinds: list[str],
    progress: Progress,
) -> dict[str, float]:
    found, source = run.read_json("surprise.json"), source_hash(goal)
    if found is not None and found.get("source") != source:
        raise RunError(
            f"the file of the objective {type(goal).__name__} has changed since this stage began",
            str(inspect.getsourcefile(type(goal))),
            "put it back, or --fresh",
        )
    if found is not None and ("settled" in found or not (left_open(goal) or hasattr(goal, "calibrate"))):
        return found.get("settled") or {}
    progress.say("measuring how surprising the base finds the demonstrations")
    measured = demos if left_open(goal) or base.cache is not None else demos[:PROFILE_ROWS]
    nats = base.surprises(measured)
    settled: dict[str, float] = {}
    if left_open(goal):
        goal = surprise.resolve(goal, nats, base.vocab_size)
        settled["beta"] = goal.beta  # type: ignore[attr-defined]
    if hasattr(goal, "calibrate"):
        constants = goal.calibrate(base.statistics(goal, demos[:PROFILE_ROWS]))
        goal = dataclasses.replace(goal, **constants)
        settled |= constants
    profile = surprise.profile(
        measured, nats, tokenizer, goal, vocab_size=base.vocab_size, kinds=kinds[: len(measured)]
    )
    run.write_json("surprise.json", {"demonstrations": len(demos), "settled": settled, "source": source, **profile})
    progress.say(surprise.describe(profile))
    for name, value in settled.items():
        progress.say(f"measured on the base: {name} = {value:.6g}")
    return settled


def source_hash(goal: Objective) -> str | None:
    """SHA-256 of the file that a user's own objective stands in, None for ours: resuming under an edited one would be
    another loss in the same run."""
    if type(goal).__module__.startswith("heatbath.ideas."):
        return None
    path = inspect.getsourcefile(type(goal))
    return None if path is None else hashlib.sha256(Path(path).read_bytes()).hexdigest()


def left_open(goal: Objective) -> bool:
    """Whether β is still to be found from the surprise of the demonstrations."""
    return isinstance(goal, Gift) and isinstance(goal.beta, LeftToBase)


def needed_rows(settings: SFT, goal: Objective, vocab_size: int) -> Needed:
    """Which tokens' hidden states a recipe's cache must hold."""
    if settings.reference == "hidden":
        return everything
    if not BASE_ROWS.intersection(goal.needs) or (settings.reference == "model" and not hasattr(goal, "target_mass")):
        return nothing
    return NeededBy(goal, vocab_size, settings.epsilon)


def cache_root() -> Path:
    """Where the reference caches of all bases lie."""
    return models.cache_folder() / "reference"


def require_columns(goal: Objective, demos: list[Rendered], split: str = "demos") -> None:
    """Raises DataError where a demonstration lacks a column that the objective reads."""
    made = ("old_logp",) if hasattr(goal, "refresh") else ()
    for name in getattr(goal, "columns", ()):
        lacking = [i for i, row in enumerate(demos) if name not in row.columns]
        if lacking and name not in made:
            raise DataError(
                f"{type(goal).__name__} reads the column '{name}', which {len(lacking):,} of {len(demos):,} rows lack",
                f"data.{split}, row {lacking[0] + 1}",
                f"put it into the rows and name it: data.fields.columns = ['{name}']",
            )
