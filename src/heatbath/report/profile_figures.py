"""Figures of what was measured on the models themselves: the base's surprise, and how far a policy has moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator, NullLocator

from heatbath.ideas.gift import Gift
from heatbath.ideas.statistics import TokenStats
from heatbath.report.drawing import POLICIES, WIDE, Look, frame, label_ends, style, svg
from heatbath.report.score_figures import bounds


def surprise(profile: Mapping[str, Any]) -> str:
    """Histogram of the base's surprise at the demonstrations, with w at this run's β, or at the suggested one."""
    counts = np.array(profile["histogram"], dtype=float)
    last = min(int(np.flatnonzero(counts)[-1]) + 3, len(counts))
    used = profile["beta"] is not None
    beta = float(profile["beta"] if used else profile["suggested_beta"])
    with style():
        figure, axes = frame((6.2, 3.0))
        axes.bar(np.arange(last) + 0.5, counts[:last] / counts.sum(), width=0.92, color=POLICIES["base"])
        axes.set_yscale("log")
        rest = f"; the last bar is {last - 1} and above" if last == len(counts) else ""
        axes.set(xlabel=f"surprise of the base, −log p (nats{rest})", ylabel="share of tokens (log)")
        axes.set_ylim(0.4 / counts.sum(), 1.0)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(MaxNLocator(9, integer=True))
        nats = np.linspace(1e-3, max(last, beta + 2), 200)
        at = TokenStats(vocab_size=profile["vocab_size"], ref_logp=torch.from_numpy(-nats))
        w = Gift(beta, profile["smoothing"], profile["floor"]).target_mass(at).numpy()
        right = axes.twinx()
        right.plot(nats, w, color=POLICIES["init"], linewidth=2)
        right.axvline(beta, color=POLICIES["init"], linewidth=1, linestyle=":")
        right.set_ylim(0, 1.05)
        right.set_ylabel("w, the target's mass on the token", color=POLICIES["init"])
        right.tick_params(axis="y", colors=POLICIES["init"])
        right.grid(visible=False)
        right.text(beta + 0.3, 0.93, f"β = {beta:.3g}" + ("" if used else " (suggested)"), color=POLICIES["init"])
        told = f"surprise histogram of {profile['tokens']} tokens with the curve of w at β = {beta:.3g}"
        return svg(figure, told)


def overlap(lines: Sequence[tuple[Look, Mapping[str, Any]]], title: str, description: str) -> str:
    """Overlap of the K likeliest tokens over K, with 95 % bands; each line is `overlap` of a transition."""
    with style():
        figure, axes = frame(WIDE)
        ends, every = [], set()
        for look, found in lines:
            ks = sorted(int(k) for k in found)
            low, high = zip(*(bounds(found[str(k)]) for k in ks), strict=True)
            mean = [found[str(k)]["mean"] for k in ks]
            axes.fill_between(ks, low, high, color=look.colour, alpha=0.13, linewidth=0)
            axes.plot(ks, mean, color=look.colour, linestyle=look.dash, marker=look.marker, markersize=4)
            ends.append((ks[-1], mean[-1], look))
            every |= set(ks)
        axes.set_xscale("log")
        axes.set_xticks(sorted(every), [str(k) for k in sorted(every)])
        axes.set_xticks([], minor=True)
        axes.set(xlabel="K", ylabel="share of the top K in common")
        axes.set_title(title)
        axes.set_ylim(max(0.0, axes.get_ylim()[0]), min(1.005, axes.get_ylim()[1]))
        label_ends(figure, axes, ends)
        return svg(figure, description)
