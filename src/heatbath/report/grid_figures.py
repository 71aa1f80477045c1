"""Figures of a comparison: where settings start and end, how they differ from the baseline, their curves over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from heatbath.ideas.intervals import mean_with_interval
from heatbath.report.drawing import MUTED, POLICY_LOOKS, WIDE, frame, label_ends, run_looks, style, svg
from heatbath.report.score_figures import bounds, forest

Found = Mapping[str, Any]
MOST_CURVES = 6  # lines that can be told apart


def of_task(found: Found, settings: Mapping[str, Found], task: str) -> list[str]:
    """Start and end of every setting at the smallest and the largest k, and the differences to the baseline."""
    ks = sorted({int(k) for own in settings.values() for scores in own["tasks"].get(task, {}).values() for k in scores})
    drawn = [starts_and_ends(settings, task, k) for k in dict.fromkeys([ks[0], ks[-1]])]
    groups: dict[str, list[tuple[str, Any, str]]] = {}
    for row in found["differences"][task]:
        if row["to_baseline"] and row["low"] is not None:
            groups.setdefault(f"pass@{row['k']}", []).append((row["to"], row, POLICY_LOOKS["final"].colour))
    if groups:
        said = f"difference to {found['baseline']}"
        drawn.append(forest(groups, said, f"{said} after the last stage, 95 % intervals ({task})"))
    return drawn


def starts_and_ends(settings: Mapping[str, Found], task: str, k: int) -> str:
    """pass@k of every setting's policies: the end filled with its interval, the start hollow beside it, the base as a
    line."""
    with style():
        figure, axes = frame((WIDE[0], 0.3 * len(settings) + 0.8))
        bases = []
        for at, own in enumerate(settings.values()):
            for policy, scores in own["tasks"].get(task, {}).items():
                if str(k) not in scores:
                    continue
                estimate, look = scores[str(k)], POLICY_LOOKS.get(policy, POLICY_LOOKS["final"])
                if policy == "base":
                    bases.append(estimate["mean"])
                    continue
                last = policy == own["last"]
                low, high = bounds(estimate)
                lift = at + (0.14 if not last else -0.14)
                axes.plot([low, high], [lift, lift], color=look.colour, linewidth=2.5 if last else 1.5)
                axes.plot(estimate["mean"], lift, look.marker, color=look.colour, markersize=6 if last else 5)
                if last:
                    axes.plot(estimate["seeds"], [lift] * len(estimate["seeds"]), "|", color=look.colour, markersize=7)
        if bases:
            axes.axvline(float(np.mean(bases)), color=MUTED, linewidth=1, linestyle=(0, (1, 1.4)))
        axes.set_yticks(range(len(settings)), list(settings))
        axes.set(ylim=(len(settings) - 0.5, -0.5), xlabel=f"pass@{k}: end (large), start (small), base (line)")
        axes.grid(axis="y", visible=False)
        return svg(figure, f"pass@{k} of every setting before and after its last stage, 95 % intervals ({task})")


def curves(settings: Mapping[str, Found], baseline: str | None) -> list[str]:
    """Held-out accuracy over the steps of RL, six settings to a figure, the baseline in each."""
    there = {name: own["curve"] for name, own in settings.items() if len(own["curve"]) > 1}
    return _lines(there, baseline, "step of RL", "held-out accuracy")


def validation(settings: Mapping[str, Found]) -> list[str]:
    """NLL of held-out demonstrations over the epochs of the warm start."""
    there = {name: own["validation"] for name, own in settings.items() if len(own["validation"]) > 1}
    return _lines(there, None, "epoch of the warm start", "NLL of held-out demonstrations (nats)")


def _lines(there: Mapping[str, Sequence[Any]], first: str | None, xlabel: str, ylabel: str) -> list[str]:
    others = [name for name in there if name != first]
    size = MOST_CURVES - (first in there)
    parts = [others[i : i + size] for i in range(0, len(others), size)] or ([[]] if first in there else [])
    drawn = []
    for part in parts:
        names = [*([first] if first in there and first is not None else []), *part]
        drawn.append(_one(names, there, xlabel, ylabel))
    return drawn


def _one(names: Sequence[str], there: Mapping[str, Sequence[Any]], xlabel: str, ylabel: str) -> str:
    with style():
        figure, axes = frame(WIDE)
        ends = []
        for look in run_looks(names):
            rows = there[look.label]
            x = [step for step, _ in rows]
            found = [mean_with_interval(each) for _, each in rows]
            mean = [estimate.mean for estimate in found]
            if len(rows[0][1]) > 1:
                low, high = [e.low for e in found], [e.high for e in found]
                axes.fill_between(x, low, high, color=look.colour, alpha=0.12, linewidth=0)
            axes.plot(x, mean, color=look.colour, linestyle=look.dash, linewidth=2)
            ends.append((x[-1], mean[-1], look))
        axes.set(xlabel=xlabel, ylabel=ylabel)
        label_ends(figure, axes, ends)
        return svg(figure, f"{ylabel} over the {xlabel}, mean and 95 % band over seeds, of {', '.join(names)}")
