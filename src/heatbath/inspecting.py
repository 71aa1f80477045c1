"""`heatbath inspect`: demonstrations exactly as the loss sees them, token by token."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from heatbath import models
from heatbath.data import checks, sources
from heatbath.data.rendering import IGNORE
from heatbath.errors import DataError
from heatbath.recipe import SFT, Recipe
from heatbath.stages.pipeline import tokenizer_of
from heatbath.terminal import printable

# Surprise in nats → colour; a token of the last group is one that a usual β leaves to the base.
BANDS = ((1.0, "green"), (5.0, "yellow"), (10.0, "dark_orange"), (float("inf"), "red"))


def inspect(recipe: Recipe, *, count: int = 3, row: int | None = None, surprise: bool = False) -> list[dict[str, Any]]:
    """The first `count` demonstrations, or the one of that number (from 1): its place, and for each token its text, id,
    whether it is supervised, and with `surprise` how many nats it costs the base. Raises DataError or RecipeError."""
    if recipe.sft is None:
        recipe = recipe.model_copy(update={"sft": SFT()})
    splits = sources.of(recipe)
    if not splits.demos:
        raise DataError("no demonstrations", "data.demos", "inspect shows the rows that the sft stage learns")
    if row is not None and not 1 <= row <= len(splits.demos):
        raise DataError(f"there is no row {row}", "data.demos", f"rows go from 1 to {len(splits.demos)}")
    picked = range(row - 1, row) if row is not None else range(min(count, len(splits.demos)))
    tokenizer = tokenizer_of(recipe)
    rows = [splits.demos[i] for i in picked]
    made = checks.rendered(tokenizer, rows, recipe.model_copy(update={"sft": _cutting(recipe)}), "demos")
    nats: list[Any] = [None] * len(rows)
    if surprise:
        nats = _nats(recipe, made, tokenizer.pad_token_id)
    shown = []
    for number, source, rendered, costs in zip(picked, rows, made, nats, strict=True):
        cost = iter(()) if costs is None else iter(costs.tolist())
        tokens = []
        for i, label in zip(rendered.input_ids, rendered.labels, strict=True):
            text = tokenizer.decode([i])
            if "\ufffd" in text:  # a piece of a character: the tokenizer's own name for it says more
                text = str(tokenizer.convert_ids_to_tokens(i))
            token: dict[str, Any] = {"text": text, "id": i, "supervised": label != IGNORE}
            if costs is not None and label != IGNORE:
                token["nats"] = round(next(cost), 3)
            tokens.append(token)
        shown.append({"row": number + 1, "origin": source.origin, "truncated": rendered.truncated, "tokens": tokens})
    return shown


def show(found: list[dict[str, Any]], console: Console) -> None:
    """The same in colours: grey is context, the rest is learned, and with a surprise coloured by it."""
    for entry in found:
        learned = sum(token["supervised"] for token in entry["tokens"])
        origin = escape(printable(entry["origin"]))
        console.rule(
            f"row {entry['row']}  {origin}  {len(entry['tokens'])} tokens, {learned} supervised"
            + (", cut" if entry["truncated"] else ""),
            align="left",
        )
        text = Text()
        open_mark = False
        for token in entry["tokens"]:
            if not console.is_terminal and token["supervised"] != open_mark:  # no colour: marks around what is learned
                open_mark = token["supervised"]
                text.append("⟦" if open_mark else "⟧")
            text.append(printable(token["text"]), style=_style(token))
            if not console.is_terminal and token.get("nats", 0.0) >= BANDS[0][0]:
                text.append(f"{{{token['nats']:.1f}}}")
        text.append("⟧" * open_mark)
        console.print(text, soft_wrap=True)
    if not console.is_terminal:
        console.print("\n⟦learned⟧  {nats, from 1} behind a token that surprises the base")
        return
    legend = Text("\n")
    legend.append("context", style="dim")
    if any("nats" in token for entry in found for token in entry["tokens"]):
        low = 0.0
        for high, colour in BANDS:
            legend.append(f"  {low:g}{'+' if high == float('inf') else f'–{high:g}'} nats", style=colour)
            low = high
    else:
        legend.append("  supervised", style="bold green")
    console.print(legend)


def _style(token: dict[str, Any]) -> str:
    if not token["supervised"]:
        return "dim"
    if "nats" not in token:
        return "bold green"
    return next(colour for high, colour in BANDS if token["nats"] < high)


def _nats(recipe: Recipe, made: list[Any], pad_id: int) -> list[Any]:
    import torch

    from heatbath.errors import RecipeError
    from heatbath.reference import FrozenBase
    from heatbath.surprise import surprises

    if recipe.model is None:
        raise RecipeError("the base of this recipe is not made yet", "[pretrain]", "inspect a recipe that uses it")
    base = FrozenBase(models.load_model(recipe.model, torch.float32))
    return surprises(base, made, pad_id=pad_id, autocast=models.autocast_dtype(recipe.precision))


def _cutting(recipe: Recipe) -> Any:
    """Rows are shown as they are cut, whatever share of them that is."""
    assert recipe.sft is not None
    return recipe.sft.model_copy(update={"truncate": True})
