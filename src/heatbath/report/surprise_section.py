"""What the page says about the surprise of the demonstrations, and the page of `heatbath surprise`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from heatbath.report import profile_figures, tables
from heatbath.report.rendering import rendered
from heatbath.run import write_atomically
from heatbath.surprise import left, reading

BANDS = (1.0, 3.0, 6.0, 10.0)  # nats at which a token's colour gets stronger
# What the section is made of; a profile without one of these was made by an earlier version.
NEEDED = (
    *("beta", "smoothing", "floor", "vocab_size", "tokens", "rows", "histogram", "betas", "objective", "kinds"),
    *("suggested_beta", "suggested_share", "most_surprising"),
)


def note(profile: Mapping[str, Any]) -> str:
    """Why a profile cannot be shown, or nothing."""
    lacking = [key for key in NEEDED if key not in profile]
    made = "surprise.json was made by an earlier version of heatbath and lacks"
    return f"{made} {', '.join(lacking)}; heatbath surprise measures it anew." if lacking else ""


def section(profile: Mapping[str, Any], *, open_details: bool = False) -> dict[str, Any]:
    """The values of `_surprise.html`; `note` must have nothing to say."""
    shown = profile.get("examples", [])
    with_w = any(len(token) > 2 for example in shown for token in example["tokens"])
    return {
        "text": text(profile),
        "tokens": profile["tokens"],
        "rows": profile["rows"],
        "figure": Markup(profile_figures.surprise(profile)),
        "beta_rows": tables.beta_rows(profile),
        "kind_rows": tables.kind_rows(profile) if profile["kinds"] else [],
        "most_surprising": profile["most_surprising"],
        "examples": [_example(example) for example in shown],
        "examples_text": _told(shown, with_w),
        "with_w": with_w,
        "bands": [f"{low:g}–{high:g}" for low, high in itertools.pairwise(BANDS)] + [f"{BANDS[-1]:g}+"],
        "open": open_details,
    }


def text(profile: Mapping[str, Any]) -> str:
    """What the run's own β does here, and which one would leave the usual share."""
    own = profile["objective"]
    tail = f"A share of {profile['suggested_share']:.0%} would be β = {profile['suggested_beta']:.1f}."
    if own is None:
        return f"This start does not use β. {tail}"
    told = reading(own).lstrip("; ")
    told = told or "GIFT differs from SFT here; whether for the better, only a comparison with SFT tells"
    name = "The target" if profile["beta"] is None else f"β = {profile['beta']:.4g}"
    share = f"{own['w_below_0.5']:.2%}"
    return f"{name} leaves {share} of the supervised tokens to the base (w < 0.5): {told}. {left(profile)}{tail}"


def _told(shown: Sequence[Mapping[str, Any]], with_w: bool) -> str:
    said = "The first demonstrations, and those that surprise the base most per token. The darker a token, the more it "
    said += "surprises; grey is context."
    said += " Where a token is underlined the target is the base's more than the demonstration's." if with_w else ""
    return said + ("" if all(example["ends"] for example in shown) else " Long ones are cut.")


def _example(found: Mapping[str, Any]) -> dict[str, Any]:
    tokens = _tokens(found["tokens"])
    dots = {"text": "…", "css": "context", "told": ""}
    return {
        "row": found["row"],
        "tokens": [*([] if found["begins"] else [dots]), *tokens, *([] if found["ends"] else [dots])],
    }


def _tokens(tokens: Sequence[Sequence[Any]]) -> list[dict[str, str]]:
    """Text, CSS class and numbers of each token; neighbours that look alike and have no number are one."""
    out: list[dict[str, str]] = []
    for shown, *numbers in tokens:
        if not numbers:
            css, told = "context", ""
        else:
            nats, w = numbers[0], numbers[1] if len(numbers) > 1 else None
            band = sum(nats >= edge for edge in BANDS)
            css = " ".join([*([f"heat-{band}"] if band else []), *(["left"] if w is not None and w < 0.5 else [])])
            told = f"{nats:.1f} nats" + ("" if w is None else f", w {w:.2f}") if css else ""
        if out and not told and not out[-1]["told"] and out[-1]["css"] == css:
            out[-1]["text"] += shown
        else:
            out.append({"text": shown, "css": css, "told": told})
    return out


def write_surprise(folder: Path, found: dict[str, Any], command: str) -> Path:
    """Writes surprise.html of a profile with its cache sizes; returns its path."""
    values = {
        "title": f"What β does: {found['model']}",
        "subtitle": f"{found['rows']:,} demonstrations, {found['tokens']:,} supervised tokens",
        "surprise": section(found, open_details=True),
        "cache_rows": tables.cache_rows(found),
        "cache_text": tables.cache_text(found),
        "command": command,
    }
    write_atomically(folder / "surprise.html", rendered("surprise.html", values))
    return folder / "surprise.html"
