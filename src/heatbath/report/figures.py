"""Figures as inline SVG whose colours are the page's own (so they follow light and dark), text kept as text."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from heatbath.ideas.gift import Gift
from heatbath.ideas.statistics import TokenStats
from heatbath.verify.verdict import JUDGED

# A colour here stands for the page's CSS variable of that name; `_themed` swaps them in the SVG.
INK, GRID, MUTED = "#010101", "#020202", "#030303"
COLOURS = {"base": "#040404", "init": "#050505", "final": "#060606"}
VARIABLES = {INK: "ink", GRID: "grid", MUTED: "muted", **{c: name for name, c in COLOURS.items()}}

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "heatbath",
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "DejaVu Sans"],
    "font.size": 10,
    "text.color": INK,
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


@matplotlib.rc_context(STYLE)
def pass_at_k(results: dict[str, Any]) -> str:
    """pass@k of each policy with its 95 % interval."""
    policies = results["policies"]
    ks = list(next(iter(policies.values()))["pass"])
    figure, (axes,) = _figure(1, width=6.4, height=0.55 * len(ks) * len(policies) + 0.9)
    labels, row = [], 0
    for k in ks:
        for name, found in policies.items():
            e = found["pass"][k]
            low, high = (e["mean"] if e[b] is None else e[b] for b in ("low", "high"))
            low, high = max(low, 0.0), min(high, 1.0)
            axes.plot([low, high], [row, row], color=COLOURS[name], linewidth=2.5, solid_capstyle="round")
            axes.plot(e["mean"], row, "o", color=COLOURS[name], markersize=7)
            beside, align = (high + 0.015, "left") if high < 0.85 else (low - 0.015, "right")
            height, vertical = row, "center"
            if low < 0.15 and high >= 0.85:  # no room on either side
                beside, align, height, vertical = e["mean"], "center", row - 0.18, "bottom"
            axes.text(beside, height, f"{e['mean']:.2f}", va=vertical, ha=align)
            labels.append(f"{name}  pass@{k}")
            row += 1
        row += 0.4
    positions = [i + 0.4 * (i // len(policies)) for i in range(len(labels))]
    axes.set_yticks(positions, labels)
    axes.set(xlim=(-0.01, 1.01), ylim=(row - 0.6, -0.7), xlabel="share of held-out problems (95 % interval)")
    axes.grid(axis="y", visible=False)
    return _svg(figure, "pass@k of each policy with 95 % intervals; the table beside it holds the numbers")


@matplotlib.rc_context(STYLE)
def surprise(profile: dict[str, Any]) -> str:
    """Histogram of the base's surprise at the demonstrations, with w at this run's β, or at the suggested one."""
    counts = np.array(profile["histogram"], dtype=float)
    last = min(int(np.flatnonzero(counts)[-1]) + 3, len(counts))
    figure, (axes,) = _figure(1, width=6.4, height=2.9)
    axes.bar(np.arange(last) + 0.5, counts[:last] / counts.sum(), width=0.92, color=COLOURS["base"])
    axes.set_yscale("log")
    rest = f"; the last bar is {last - 1} and above" if last == len(counts) else ""
    axes.set(xlabel=f"surprise of the base, −log p (nats{rest})", ylabel="share of tokens (log)")
    axes.set_ylim(0.4 / counts.sum(), 1.0)
    used = profile["beta"] is not None
    beta = float(profile["beta"] if used else profile["suggested_beta"])
    nats = np.linspace(1e-3, max(last, beta + 2), 400)
    at = TokenStats(vocab_size=profile["vocab_size"], ref_logp=torch.from_numpy(-nats))
    w = Gift(beta, profile["smoothing"], profile["floor"]).target_mass(at).numpy()
    right = axes.twinx()
    right.plot(nats, w, color=COLOURS["init"], linewidth=2)
    right.axvline(beta, color=COLOURS["init"], linewidth=1, linestyle=":")
    right.set_ylim(0, 1.05)
    right.set_ylabel("w, the target's mass on the token", color=COLOURS["init"])
    right.tick_params(axis="y", colors=COLOURS["init"])
    right.grid(visible=False)
    right.text(beta + 0.3, 0.93, f"β = {beta:.3g}" + ("" if used else " (suggested)"), color=COLOURS["init"])
    return _svg(figure, f"surprise histogram of {profile['tokens']} tokens with the curve of w at β = {beta:.3g}")


@matplotlib.rc_context(STYLE)
def sft_curves(rows: list[dict[str, Any]]) -> str:
    """Training and validation NLL over optimizer steps, and entropy."""
    train = [r for r in rows if "nll" in r]
    val = [r for r in rows if "val/nll" in r]
    figure, (left, right) = _figure(2, width=6.4, height=2.4)
    left.plot([r["step"] for r in train], [r["nll"] for r in train], color=COLOURS["init"], alpha=0.55, label="train")
    if val:
        left.plot(
            [r["step"] for r in val], [r["val/nll"] for r in val], "o-", color=COLOURS["init"], label="validation"
        )
        left.legend()
    left.set(title="NLL per token (nats)", xlabel="optimizer step")
    right.plot([r["step"] for r in train], [r["entropy"] for r in train], color=COLOURS["init"])
    right.set(title="entropy per token (nats)", xlabel="optimizer step")
    _from_zero(left, right)
    return _svg(figure, "training curves of the warm start")


PREFERENCE = (
    ("objective", "objective"),
    ("accuracy", "pairs in the right order"),
    ("reward_margin", "margin of the implicit rewards (nats)"),
    ("score_error", "distance to the score"),
    ("grad_norm", "gradient norm"),
)


@matplotlib.rc_context(STYLE)
def preference_curves(rows: list[dict[str, Any]]) -> str:
    """Whatever of a preference stage was measured, over optimizer steps."""
    panels = [(key, title) for key, title in PREFERENCE if any(key in row for row in rows)]
    figure, axes = _figure(len(panels), width=6.4, height=1.6 * -(-len(panels) // 2), columns=2)
    for panel, (key, title) in zip(axes, panels, strict=False):
        steps, values = zip(*[(row["step"], row[key]) for row in rows if key in row], strict=True)
        panel.plot(steps, values, "o-" if len(steps) < 12 else "-", markersize=3, color=COLOURS["final"])
        panel.set_title(title)
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    return _svg(figure, "training curves of the preference stage")


@matplotlib.rc_context(STYLE)
def rl_curves(rows: list[dict[str, Any]]) -> str:
    """What matters in RL, over optimizer steps: never a bare loss."""
    panels: tuple[tuple[str, str], ...] = (
        ("reward", "mean reward"),
        ("informative_share", "informative groups"),
        ("truncated_share", "truncated completions"),
        ("clip_share", "tokens clipped"),
        ("entropy", "entropy (nats)"),
        ("kl_init", "KL to the start (nats per token)"),
        ("no_answer_share", "completions without an answer"),
        ("failed_share", "verdicts that failed"),
    )
    if any("held_out/right" in row for row in rows):
        held_out = ("held_out/right", "held-out accuracy")
        panels = (panels[0], held_out, *panels[1:], ("completion_tokens", "tokens per completion"))
    rows = [row | _verdict_shares(row) for row in rows]
    figure, axes = _figure(len(panels), width=6.4, height=1.45 * -(-len(panels) // 2), columns=2)
    for panel, (key, title) in zip(axes, panels, strict=True):
        seen = [(r["step"], r[key]) for r in rows if key in r]
        if seen:
            steps, values = zip(*seen, strict=True)
            panel.plot(steps, values, "o-" if len(seen) < 12 else "-", markersize=3, color=COLOURS["final"])
        panel.set_title(title)
        if key.endswith(("share", "/right")) or (key == "reward" and all(0 <= value <= 1 for _, value in seen)):
            panel.set_ylim(-0.03, 1.03)
    _from_zero(*axes)
    for panel in axes[-2:]:
        panel.set_xlabel("optimizer step")
    return _svg(figure, "learning curves of reinforcement learning")


def _verdict_shares(row: dict[str, Any]) -> dict[str, float]:
    """Of a step's verdicts, the share without an answer, and the share that is a failure of grading."""
    shares = {name.removeprefix("verdict/"): value for name, value in row.items() if name.startswith("verdict/")}
    if not shares:
        return {}
    failed = sum(value for status, value in shares.items() if status not in JUDGED)
    return {"no_answer_share": shares.get("no_answer", 0.0), "failed_share": failed}


def _figure(panels: int, *, width: float, height: float, columns: int | None = None) -> tuple[Figure, list[Axes]]:
    columns = columns or panels
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(-(-panels // columns), columns, squeeze=False).flat)


def _from_zero(*axes: Axes) -> None:
    for panel in axes:
        panel.set_ylim(bottom=min(0.0, panel.get_ylim()[0]))


def _svg(figure: Figure, description: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, name in VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return text.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)
