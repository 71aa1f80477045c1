"""Figures of a comparison: where settings start and end, how they differ from the baseline, their curves over steps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from heatbath.ideas.intervals import mean_with_interval
from heatbath.report.drawing import POLICY_LOOKS, SHORT, WIDE, Look, frame, label_ends, run_looks, style, svg
from heatbath.report.score_figures import bounds, forest

Found = Mapping[str, Any]
MOST_CURVES = 6  # lines that can be told apart
LONGEST = 24  # characters of a label beside a figure


def of_task(found: Found, settings: Mapping[str, Found], task: str) -> dict[str, str]:
    """Name → figure: start and end of every setting at the smallest and the largest k, how many different right answers
    they have, both over a varied number, and the differences to the baseline."""
    ks = sorted({int(k) for own in settings.values() for scores in own["tasks"].get(task, {}).values() for k in scores})
    drawn = {f"pass@{k}": starts_and_ends(settings, task, k) for k in dict.fromkeys([ks[0], ks[-1]])}
    counted = {k for own in settings.values() for scores in own["distinct"].get(task, {}).values() for k in scores}
    for k in {int(k) for k in counted} & {ks[-1]} - {1}:
        drawn[f"distinct@{k}"] = starts_and_ends(settings, task, k, "distinct")
    drawn |= numbered("over", over_values(found, task))
    groups: dict[str, list[tuple[str, Any, str]]] = {}
    for row in found["differences"][task]:
        if row["to_baseline"] and row["low"] is not None:
            groups.setdefault(f"pass@{row['k']}", []).append((row["to"], row, POLICY_LOOKS["final"].colour))
    if groups:
        said = f"difference to {found['baseline']}"
        drawn["differences"] = forest(groups, said, f"{said} after the last stage, 95 % intervals ({task})")
    return drawn


def numbered(name: str, drawn: Sequence[str]) -> dict[str, str]:
    """`name` → the figure; of several `name-1`, `name-2`, …"""
    return {name if len(drawn) == 1 else f"{name}-{i}": one for i, one in enumerate(drawn, 1)}


def starts_and_ends(settings: Mapping[str, Found], task: str, k: int, part: str = "tasks") -> str:
    """pass@k of every setting's policies (part "distinct": different right answers among k) with their intervals: the
    end large with a tick for each seed, the start smaller below it, the base as a small square above."""
    label = f"distinct@{k}" if part == "distinct" else f"pass@{k}"
    with style():
        figure, axes = frame((WIDE[0], 0.3 * len(settings) + 0.8))
        for at, own in enumerate(settings.values()):
            for policy, scores in own[part].get(task, {}).items():
                if str(k) not in scores:
                    continue
                estimate, look = scores[str(k)], POLICY_LOOKS.get(policy, POLICY_LOOKS["final"])
                if policy == "base":
                    axes.plot(estimate["mean"], at - 0.32, look.marker, color=look.colour, markersize=4)
                    continue
                last = policy == own["last"]
                low, high = bounds(estimate)
                lift = at + (0.14 if not last else -0.14)
                axes.plot([low, high], [lift, lift], color=look.colour, linewidth=2.5 if last else 1.5)
                axes.plot(estimate["mean"], lift, look.marker, color=look.colour, markersize=6 if last else 5)
                if last:
                    axes.plot(estimate["seeds"], [lift] * len(estimate["seeds"]), "|", color=look.colour, markersize=7)
        common, short = told_apart(list(settings), LONGEST)
        axes.set_yticks(range(len(settings)), [short[name] for name in settings])
        if common:
            axes.set_title(common)
        axes.set(ylim=(len(settings) - 0.5, -0.5), xlabel=f"{label}: end (large), start, base (square)")
        axes.grid(axis="y", visible=False)
        return svg(figure, f"{label} of every setting before and after its last stage, 95 % intervals ({task})")


def over_values(found: Found, task: str) -> list[str]:
    """Start and end over the one varied key whose values are numbers, a figure for each of the other settings."""
    axes = {key: values for key, values in found["vary"].items() if len(values) > 2 and all(map(_number, values))}
    if len(axes) != 1 or not found["settings"]:
        return []
    ((key, values),) = axes.items()
    order = list(found["vary"])
    every = zip(itertools.product(*found["vary"].values()), found["settings"].items(), strict=True)
    groups: dict[tuple[Any, ...], dict[float, Found]] = {}
    for chosen, (_, own) in every:
        others = tuple(value for name, value in zip(order, chosen, strict=True) if name != key)
        if own["tasks"].get(task):
            groups.setdefault(others, {})[chosen[order.index(key)]] = own["tasks"][task]
    return [_over(key, values, by_value, ", ".join(map(str, others)), task) for others, by_value in groups.items()]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _over(key: str, values: Sequence[float], by_value: Mapping[float, Found], of: str, task: str) -> str:
    ks = sorted({int(k) for scores in by_value.values() for own in scores.values() for k in own})
    policies = [p for p in ("init", "final") if any(p in scores for scores in by_value.values())]
    with style():
        figure, axes = frame(WIDE)
        ends = []
        for policy, k in itertools.product(policies, dict.fromkeys([ks[0], ks[-1]])):
            there = [
                (x, by_value[x][policy][str(k)]) for x in sorted(by_value) if str(k) in by_value[x].get(policy, {})
            ]
            look = POLICY_LOOKS[policy]
            look = Look(
                f"{policy} @{k}", look.colour, look.dash if k == ks[0] else (0, (1, 1.4)), look.marker, look.css
            )
            x, means = [x for x, _ in there], [e["mean"] for _, e in there]
            errors = np.array([[m - bounds(e)[0], bounds(e)[1] - m] for m, (_, e) in zip(means, there, strict=True)])
            axes.errorbar(x, means, yerr=errors.T, color=look.colour, linestyle=look.dash, marker=look.marker)
            ends.append((x[-1], means[-1], look))
        if min(values) > 0 and max(values) / min(values) > 30:
            axes.set_xscale("log")
        axes.set(xlabel=key, ylabel="pass@k", title=of)
        label_ends(figure, axes, ends)
        return svg(
            figure, f"pass@k before and after RL over {key}, 95 % intervals over seeds and problems {of} ({task})"
        )


def overlaps(settings: Mapping[str, Found]) -> list[str]:
    """Share of the K likeliest tokens that two policies have in common, over K, a figure for each transition."""
    arrows = list(dict.fromkeys(arrow for own in settings.values() for arrow in own["shift"]))
    drawn = []
    for arrow in arrows:
        there = {}
        for name, own in settings.items():
            found = {int(key[4:]): v for key, v in own["shift"].get(arrow, {}).items() if key.startswith("top-")}
            if found:
                there[name] = [[k, found[k]] for k in sorted(found)]
        drawn += _lines(there, None, f"K, {arrow}", "overlap of the K likeliest tokens", share=True)
    return drawn


def curves(settings: Mapping[str, Found], baseline: str | None) -> list[str]:
    """Held-out accuracy over the steps of RL, six settings to a figure, the baseline in each."""
    there = {name: own["curve"] for name, own in settings.items() if len(own["curve"]) > 1}
    return _lines(there, baseline, "step of RL", "held-out accuracy", share=True)


def validation(settings: Mapping[str, Found]) -> list[str]:
    """NLL of held-out demonstrations over the epochs of the warm start."""
    there = {name: own["validation"] for name, own in settings.items() if len(own["validation"]) > 1}
    return _lines(there, None, "epoch of the warm start", "NLL of held-out demonstrations (nats)")


def _lines(
    there: Mapping[str, Sequence[Any]], first: str | None, xlabel: str, ylabel: str, *, share: bool = False
) -> list[str]:
    others = [name for name in there if name != first]
    shared = [first] if first is not None and first in there else []
    size = MOST_CURVES - len(shared)
    parts = [others[i : i + size] for i in range(0, len(others), size)] or [[]] * len(shared)
    return [_one([*shared, *part], there, xlabel, ylabel, share) for part in parts]


def told_apart(names: Sequence[str], most: int = SHORT) -> tuple[str, dict[str, str]]:
    """What the names of settings have in common, and each without it, if it must be with its end alone: a label has
    room for `most` characters, and the values that vary fastest stand last."""
    words = [name.split(" ") for name in names]
    common = [word for word in words[0] if len(names) > 1 and all(word in own for own in words)]
    without = (" ".join(word for word in own if word not in common) for own in words)
    left = [short or name for name, short in zip(names, without, strict=True)]
    ends = [name if len(name) <= most else f"…{name[1 - most :].lstrip()}" for name in left]
    return " ".join(common), dict(zip(names, ends, strict=True))


def _one(names: Sequence[str], there: Mapping[str, Sequence[Any]], xlabel: str, ylabel: str, share: bool) -> str:
    with style():
        figure, axes = frame(WIDE)
        ends = []
        common, short = told_apart(names)
        for look in run_looks(names):
            rows = there[look.label]
            x = [step for step, _ in rows]
            found = [mean_with_interval(each) for _, each in rows]
            if len(rows[0][1]) > 2:  # of two seeds a band says nothing
                least, most = (0.0, 1.0) if share else (-np.inf, np.inf)
                low, high = np.clip([e.low for e in found], least, None), np.clip([e.high for e in found], None, most)
                axes.fill_between(x, low, high, color=look.colour, alpha=0.12, linewidth=0)
            axes.plot(x, [e.mean for e in found], color=look.colour, linestyle=look.dash, linewidth=2)
            ends.append((x[-1], found[-1].mean, replace(look, label=short[look.label])))
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if common:
            axes.set_title(common)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        label_ends(figure, axes, ends)
        return svg(figure, f"{ylabel} over {xlabel}, mean and 95 % band over seeds, of {', '.join(names)}")
