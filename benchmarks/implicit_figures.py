"""Figures and tables of docs/results/implicit.md from what benchmarks/implicit.py measured.

python benchmarks/implicit_figures.py benchmarks/results/implicit-cpu2.json docs/results
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

from heatbath.ideas.intervals import mean_with_interval

GROUPS = (2, 4, 8, 16, 32)
COLOURS = {"grpo": "#1f6f8b", "implicit": "#c8553d", "kl_mean": "#8a6fae"}


def seeds(cells: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [cells[f"{name}-{seed}"] for seed in range(9) if f"{name}-{seed}" in cells]


def over_seeds(values: list[float]) -> str:
    """Mean and 95 % t interval over the seeds."""
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "–"
    e = mean_with_interval(np.array(values))
    return f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]"


def curve(
    cells: list[dict[str, Any]], key: str
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Mean over the seeds and half a 95 % interval, per step."""
    rows = np.array([cell[key] for cell in cells], dtype=float)
    half = (
        stats.t.ppf(0.975, max(len(rows) - 1, 1)) * rows.std(0, ddof=1) / math.sqrt(len(rows))
        if len(rows) > 1
        else 0 * rows[0]
    )
    return np.arange(1, rows.shape[1] + 1), rows.mean(0), half


def band(axes: Any, cells: list[dict[str, Any]], key: str, name: str, **how: Any) -> None:
    steps, mean, half = curve(cells, key)
    axes.plot(steps, mean, color=COLOURS[name], label=how.get("label", name), linestyle=how.get("linestyle", "-"))
    axes.fill_between(steps, mean - half, mean + half, color=COLOURS[name], alpha=0.15, linewidth=0)


def held_out(axes: Any, cells: list[dict[str, Any]], name: str) -> None:
    steps = [step for step, _, _ in cells[0]["held_out"]]
    rows = np.array([[right for _, right, _ in cell["held_out"]] for cell in cells])
    axes.plot(steps, rows.mean(0), "o--", color=COLOURS[name], markersize=3, label=f"{name}, held out")


def figure_groups(cells: dict[str, Any], folder: Path) -> None:
    found = {n: seeds(cells, f"n{n}") for n in GROUPS}
    found = {n: rows for n, rows in found.items() if rows}
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8), layout="constrained")
    for n, rows in found.items():
        left.plot([n] * len(rows), [r["pass@1"] for r in rows], "o", color=COLOURS["implicit"], alpha=0.5, markersize=4)
        right.plot(
            [n] * len(rows), [r["seconds"] for r in rows], "o", color=COLOURS["implicit"], alpha=0.5, markersize=4
        )
    for axes, key in ((left, "pass@1"), (right, "seconds")):
        axes.plot(list(found), [np.mean([r[key] for r in rows]) for rows in found.values()], color=COLOURS["implicit"])
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(found), [str(n) for n in found])
        axes.set_xlabel("completions of a prompt, N")
    starts = [r["start pass@1"] for rows in found.values() for r in rows]
    left.axhline(float(np.mean(starts)), color="grey", linewidth=0.8, linestyle=":")
    left.set_title("pass@1 after 16 steps (dotted: the base)", loc="left", fontsize=9)
    right.set_title("seconds of training", loc="left", fontsize=9)
    figure.savefig(folder / "implicit-groups.svg")


def figure_curves(cells: dict[str, Any], folder: Path) -> None:
    figure, panels = plt.subplots(2, 2, figsize=(7.2, 5.0), layout="constrained")
    for name in ("grpo", "implicit"):
        rows = seeds(cells, name)
        if not rows:
            continue
        band(panels[0, 0], rows, "reward", name, label=f"{name}, training")
        held_out(panels[0, 0], rows, name)
        band(panels[0, 1], rows, "completion_tokens", name)
        band(panels[1, 0], rows, "grad_norm", name)
        for row in rows:
            accuracy, tokens = zip(*[(right, tokens) for _, right, tokens in row["held_out"]], strict=True)
            panels[1, 1].plot(tokens, accuracy, "o-", color=COLOURS[name], markersize=2.5, linewidth=0.7, alpha=0.7)
    titles = (
        "accuracy over steps",
        "tokens per completion",
        "gradient norm (before clipping at 1)",
        "held-out accuracy over tokens",
    )
    for axes, title in zip(panels.flat, titles, strict=True):
        axes.set_title(title, loc="left", fontsize=9)
    panels[1, 0].set_yscale("log")
    panels[0, 0].legend(fontsize=7, frameon=False)
    for axes in (panels[0, 0], panels[0, 1], panels[1, 0]):
        axes.set_xlabel("step")
    panels[1, 1].set_xlabel("tokens")
    figure.savefig(folder / "implicit-curves.svg")


def table(cells: dict[str, Any]) -> str:
    lines = ["| cell | pass@1 | pass@4 | start pass@1 | tokens | seconds |", "|---|---|---|---|---|---|"]
    for name in dict.fromkeys(key.rpartition("-")[0] for key in cells if key.rpartition("-")[2] in "012"):
        rows = seeds(cells, name)
        columns = [over_seeds([r[key] for r in rows]) for key in ("pass@1", "pass@4")]
        means = [np.mean([r[key] for r in rows]) for key in ("start pass@1", "tokens")]
        seconds = f"{np.mean([r['seconds'] for r in rows]):.0f}" if "seconds" in rows[0] else "–"
        lines.append(f"| {name} | {columns[0]} | {columns[1]} | {means[0]:.3f} | {means[1]:.1f} | {seconds} |")
    return "\n".join(lines)


def compared(cells: dict[str, Any], one: str, other: str, key: str = "pass@1") -> str:
    """Paired over seeds: one − other."""
    a, b = seeds(cells, one), seeds(cells, other)
    differences = [x[key] - y[key] for x, y in zip(a, b, strict=False)]
    return f"{one} − {other}: {over_seeds(differences)} ({', '.join(f'{d:+.3f}' for d in differences)})"


def main() -> None:
    found = json.loads(Path(sys.argv[1]).read_text())
    folder, cells = Path(sys.argv[2]), found["cells"]
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "heatbath", "font.size": 8, "axes.spines.top": False})
    figure_groups(cells, folder)
    figure_curves(cells, folder)
    print(table(cells))
    print()
    pairs = [("implicit", "grpo"), ("implicit", "kl_mean"), ("implicit", "dpo"), ("implicit", "una"), ("dpo", "una")]
    pairs += [
        ("implicit", "reward_model"),
        ("narrow-kl_sum", "narrow-kl_mean"),
        ("wide-kl_sum", "wide-kl_mean"),
        ("n16", "n8"),
    ]
    for one, other in pairs:
        if seeds(cells, one) and seeds(cells, other):
            print(compared(cells, one, other))
    print(json.dumps(found["reward models"]))


if __name__ == "__main__":
    main()
