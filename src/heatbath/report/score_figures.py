"""Figures of scores: pass@k over k, one dot per policy and task, and paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from heatbath.report.drawing import CARD, INK, MUTED, POLICY_LOOKS, WIDE, Look, frame, label_ends, style, svg
from heatbath.report.scores import Curve

Estimates = Mapping[str, Any]


def pass_curves(curves: Sequence[tuple[Look, Curve]], description: str, title: str = "") -> str:
    """pass@k over k on a logarithmic axis, each curve with its 95 % band and its name at its end."""
    with style():
        figure, axes = frame(WIDE)
        top = 0.0
        for look, curve in curves:
            ks, low, mean, high = ([point[i] for point in curve] for i in range(4))
            axes.fill_between(ks, low, high, color=look.colour, alpha=0.13, linewidth=0)
            axes.plot(ks, mean, color=look.colour, linestyle=look.dash, linewidth=2)
            axes.plot([ks[0], ks[-1]], [mean[0], mean[-1]], look.marker, color=look.colour, markersize=5)
            top = max(top, *high)
        last = max(curve[-1][0] for _, curve in curves)
        axes.set_xscale("log", base=2)
        ticks = [k for k in (2**i for i in range(20)) if k < last * 0.75] + [last]
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="k, samples a problem may take", ylabel="pass@k", ylim=(0, min(1.0, max(top * 1.08, 0.05))))
        axes.set_title(title)
        label_ends(figure, axes, [(curve[-1][0], curve[-1][2], look) for look, curve in curves])
        return svg(figure, description)


def dots(rows: Sequence[tuple[str, Mapping[str, Estimates]]], xlabel: str, description: str) -> str:
    """For every row (a k, a task) one dot with its 95 % interval per policy, all from 0 to 1."""
    lines = sum(len(found) for _, found in rows)
    with style():
        figure, axes = frame((WIDE[0], 0.27 * lines + 0.16 * len(rows) + 0.75))
        ticks, labels, at = [], [], 0.0
        for name, found in rows:
            ticks.append(at + (len(found) - 1) / 2)
            labels.append(name)
            for policy, estimate in found.items():
                look = POLICY_LOOKS[policy]
                low, high = bounds(estimate)
                axes.plot([low, high], [at, at], color=look.colour, linewidth=2.5, solid_capstyle="round")
                axes.plot(estimate["mean"], at, look.marker, color=look.colour, markersize=6)
                _beside(axes, estimate["mean"], low, high, at, f"{policy} {estimate['mean']:.2f}", look.colour)
                at += 1
            at += 0.6
        axes.set_yticks(ticks, labels)
        axes.set(xlim=(-0.01, 1.01), ylim=(at - 1.0, -0.7), xlabel=xlabel)
        axes.grid(axis="y", visible=False)
        return svg(figure, description)


def forest(
    groups: Mapping[str, Sequence[tuple[str, Estimates, str]]], xlabel: str, description: str, title: str = ""
) -> str:
    """Paired differences with 95 % intervals around 0: a filled dot where the interval leaves 0 out, else a hollow
    one. Each group has a title; its rows are (label, difference, colour)."""
    rows = [row for group in groups.values() for row in group]
    reach = max(max(abs(x) for x in (*bounds(d), d["mean"])) for _, d, _ in rows) or 0.1
    with style():
        figure, axes = frame((WIDE[0], max(0.27 * len(rows) + 0.3 * len(groups) + 0.7, 1.6)))
        at, ticks, labels = 0.0, [], []
        for name, group in groups.items():
            axes.annotate(
                name, (0, at - 0.1), xycoords=("axes fraction", "data"), xytext=(4, 0), va="center", color=MUTED,
                textcoords="offset points", fontweight="bold",
            )  # fmt: skip
            for label, d, colour in group:
                at += 1
                ticks.append(at)
                labels.append(label)
                low, high = bounds(d)
                face = colour if d["low"] is not None and (low > 0 or high < 0) else CARD
                axes.plot([low, high], [at, at], color=colour, linewidth=2.5, solid_capstyle="round")
                axes.plot(d["mean"], at, "o", color=colour, markersize=7, markerfacecolor=face, markeredgewidth=1.6)
                axes.annotate(
                    signed(d["mean"]), (1, at), xycoords=("axes fraction", "data"), xytext=(6, 0), va="center",
                    textcoords="offset points", color=INK, annotation_clip=False,
                )  # fmt: skip
            at += 1.2
        axes.set_title(title)
        axes.axvline(0, color=MUTED, linewidth=1)
        axes.set_yticks(ticks, labels)
        axes.tick_params(axis="y", length=0)
        axes.set(xlim=(-1.08 * reach, 1.08 * reach), ylim=(at - 0.6, -0.6), xlabel=xlabel)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:+.2g}".replace("-", "−") if value else "0")
        axes.grid(axis="y", visible=False)
        return svg(figure, description)


def signed(value: float) -> str:
    """`+0.12`, `−0.12`, `0.00`."""
    shown = f"{value:+.2f}"
    return "0.00" if shown in ("+0.00", "-0.00") else shown.replace("-", "−")


def bounds(estimate: Estimates) -> tuple[float, float]:
    """Those of the interval; of a single problem, which has none, the mean twice."""
    low, high = (estimate["mean"] if estimate[end] is None else estimate[end] for end in ("low", "high"))
    return low, high


def _beside(axes: Axes, mean: float, low: float, high: float, at: float, text: str, colour: str) -> None:
    """A number right of its interval, left of it, or above it where neither side has room."""
    place: dict[str, Any] = {"xytext": (7, 0), "ha": "left", "va": "center"}
    x = high
    if high > 0.78:
        place, x = {"xytext": (-7, 0), "ha": "right", "va": "center"}, low
    if high > 0.78 and low < 0.22:
        place, x = {"xytext": (0, 4), "ha": "center", "va": "bottom"}, mean
    axes.annotate(text, (x, at), textcoords="offset points", color=colour, **place)
