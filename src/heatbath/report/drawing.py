"""How figures are drawn: inline SVG whose colours are the page's own (so they follow light, dark and print), text kept
as text, small enough to be read on a phone."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# A colour here stands for the page's CSS variable of that name; `svg` swaps them.
INK, GRID, MUTED, CARD = "#010101", "#020202", "#030303", "#070707"
POLICIES = {"base": "#040404", "init": "#050505", "final": "#060606"}
RUNS = tuple(f"#0b0b0{i}" for i in range(1, 7))
VARIABLES = {INK: "ink", GRID: "grid", MUTED: "muted", CARD: "card", **{c: name for name, c in POLICIES.items()}}
VARIABLES |= {colour: f"run-{i}" for i, colour in enumerate(RUNS, 1)}

PANEL, WIDE = (3.3, 1.8), (4.9, 3.1)  # inches, at 10 points
MOST_POINTS = 240  # of a line; a longer one is drawn as means of as many steps each
SHORT = 16  # characters of a label inside a figure

STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlesize": 10,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class Look:
    """How a policy or a run is told apart: by colour, and without colours by dashes and marker."""

    label: str
    colour: str
    dash: Any = "-"
    marker: str = "o"
    css: str = "final"  # the class of its name in the page

    @property
    def short(self) -> str:
        return self.label if len(self.label) <= SHORT else f"{self.label[: SHORT - 1].rstrip()}…"


POLICY_LOOKS = {
    "base": Look("base", POLICIES["base"], (0, (1, 1.4)), "s", "policy-base"),
    "init": Look("init", POLICIES["init"], (0, (5, 2)), "D", "policy-init"),
    "final": Look("final", POLICIES["final"], "-", "o", "policy-final"),
}
DASHES = ("-", (0, (5, 2)), (0, (1, 1.4)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1)), (0, (8, 3)))
MARKERS = ("o", "D", "s", "^", "v", "P")


def run_looks(names: Sequence[str]) -> list[Look]:
    """One look per run. Colours come again after six runs, with other dashes."""
    n = len(RUNS)
    return [
        Look(name, RUNS[i % n], DASHES[(i + i // n) % n], MARKERS[(i + i // n) % n], f"run-{i % n + 1}")
        for i, name in enumerate(names)
    ]


def swatch(look: Look) -> str:
    """The line of a look as it is drawn, for a legend beside its name."""
    dash = "" if look.dash == "-" else f' stroke-dasharray="{" ".join(f"{2 * x:g}" for x in look.dash[1])}"'
    line = f'<path d="M1 6H33" stroke="var(--{VARIABLES[look.colour]})" stroke-width="2.5" fill="none"{dash}/>'
    return f'<svg class="swatch" width="34" height="12" aria-hidden="true">{line}</svg>'


@contextmanager
def style() -> Iterator[None]:
    """Our style, and no complaint about a letter that the measuring font lacks: the browser has its own fonts."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        yield


def frame(size: tuple[float, float]) -> tuple[Figure, Axes]:
    """A figure of one panel, `size` in inches, with as much margin as its text needs."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots()


def small_frame(*, labelled: bool) -> tuple[Figure, Axes]:
    """A small panel whose axes lie where those of its neighbours do; `labelled` leaves room for names at line ends."""
    figure = Figure(figsize=PANEL)
    axes = figure.subplots()
    figure.subplots_adjust(left=0.155, right=0.7 if labelled else 0.945, top=0.87, bottom=0.25)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}".replace("-", "−"))
    return figure, axes


def svg(figure: Figure, description: str) -> str:
    """The figure as SVG; `description` is what a screen reader says, and the same in every figure never twice."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": description}):  # ids of their own: a page holds many figures
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(buffer, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    parts = r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>|<!--.*?-->"
    text = re.sub(parts, "", text, flags=re.DOTALL)
    text = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", text)  # counted, so the same in every figure
    text = re.sub(r"\n\s*", "\n", text)
    for colour, name in VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)


def standalone(drawn: str) -> str:
    """The figure as a file of its own, in the page's light colours on its paper."""
    style = files("heatbath.report").joinpath("style.css").read_text("utf-8")
    light = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]+)", style.partition("@media")[0]))
    text = re.sub(r"var\(--([a-z0-9-]+)\)", lambda found: light[found[1]], drawn)
    whole = '<rect width="100%" height="100%" fill="' + light["paper"] + '"/>'
    text = re.sub(r"(<svg [^>]*>)", lambda found: found[1] + whole, text, count=1)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + text


def thinned(points: Sequence[tuple[float, float]], most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """Steps and values; of more than `most` points means over as many neighbours each, so that a long run stays
    small."""
    x, y = np.array([p[0] for p in points], dtype=float), np.array([p[1] for p in points], dtype=float)
    if len(x) > most:
        parts = np.array_split(np.arange(len(x)), most)
        x, y = (np.array([column[part].mean() for part in parts]) for column in (x, y))
    return x.tolist(), y.tolist()


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions for labels in order of `wanted`, at least `gap` apart where there is room, near where they belong."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    placed = [min(max(wanted[i], low), high) for i in order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], high - gap * (len(placed) - 1 - i))
    out = [0.0] * len(wanted)
    for i, value in zip(order, placed, strict=True):
        out[i] = value
    return out


def label_ends(figure: Figure, axes: Axes, ends: Sequence[tuple[float, float, Look]]) -> None:
    """Writes each line's name right of its end; `ends` are its last x and y. Call it when the limits stand."""
    low, high = axes.get_ylim()
    rows = figure.get_size_inches()[1] * 72 * 0.72 / 12.5  # lines of text that fit
    heights = spread([y for _, y, _ in ends], (high - low) / rows, low, high)
    right = max(x for x, _, _ in ends)
    for (_, _, look), y in zip(ends, heights, strict=True):
        axes.annotate(
            look.short, (right, y), xytext=(6, 0), textcoords="offset points", va="center", color=look.colour,
            annotation_clip=False,
        )  # fmt: skip


def transition_look(start: str, end: str) -> Look:
    """Of a transition between two policies: the colour of the one it leads to, dashed where it skips one."""
    look = POLICY_LOOKS.get(end, POLICY_LOOKS["final"])
    dash: Any = (0, (2, 1.5)) if (start, end) == ("base", "final") else "-"
    return Look(f"{start} → {end}", look.colour, dash, "s" if dash != "-" else "o", look.css)
