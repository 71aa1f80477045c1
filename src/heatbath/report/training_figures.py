"""Learning curves as small panels, one number each: of one run, or of several laid over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from heatbath.report.drawing import MOST_POINTS, POLICY_LOOKS, Look, label_ends, small_frame, style, svg, thinned
from heatbath.report.seen import series
from heatbath.verify.verdict import JUDGED

Rows = Sequence[Mapping[str, Any]]
OVERLAID = 48  # points of a line that lies over others; more of a noisy number hide each other


@dataclass(frozen=True)
class Panel:
    """`key` of a logged row; `beside` another one of the same unit, measured more rarely, drawn over it."""

    key: str
    title: str
    beside: str | None = None
    share: bool = False


STAGES: dict[str, tuple[Panel, ...]] = {
    "pretrain": (Panel("nll", "NLL per token (nats)"),),
    "sft": (
        Panel("nll", "NLL per token (nats)", "val/nll"),
        Panel("entropy", "entropy per token (nats)", "val/entropy"),
        Panel("left_to_base", "tokens left to the base", share=True),
    ),
    "preference": (
        Panel("objective", "objective"),
        Panel("accuracy", "pairs in the right order", share=True),
        Panel("reward_margin", "margin of the implicit rewards (nats)"),
        Panel("score_error", "distance to the score"),
        Panel("grad_norm", "gradient norm"),
    ),
    "rl": (
        Panel("reward", "mean reward"),
        Panel("held_out/right", "held-out accuracy", share=True),
        Panel("informative_share", "informative groups", share=True),
        Panel("truncated_share", "truncated completions", share=True),
        Panel("clip_share", "tokens clipped", share=True),
        Panel("entropy", "entropy (nats)"),
        Panel("kl_init", "KL to the start (nats per token)"),
        Panel("completion_tokens", "tokens per completion"),
        Panel("no_answer_share", "completions without an answer", share=True),
        Panel("failed_share", "verdicts that failed", share=True),
    ),
}
MAKES = {"pretrain": "base", "sft": "init", "preference": "final", "rl": "final"}


def learning_curves(stage: str, rows: Rows) -> list[str]:
    """One figure per number that the stage of a run has logged."""
    look = POLICY_LOOKS[MAKES[stage]]
    return [_panel(stage, panel, [(look, rows)], named=False) for panel in measured(stage, [rows])]


def overlaid_curves(stage: str, runs: Sequence[tuple[Look, Rows]]) -> list[str]:
    """The same of several runs: one line each, and held-out numbers in panels of their own."""
    panels = [part for panel in measured(stage, [rows for _, rows in runs]) for part in _apart(panel)]
    return [
        _panel(stage, panel, runs, named=True)
        for panel in panels
        if any(series(rows, panel.key) for _, rows in _with_shares(runs))
    ]


def _apart(panel: Panel) -> list[Panel]:
    if panel.beside is None:
        return [panel]
    return [Panel(panel.key, panel.title), Panel(panel.beside, f"held-out {panel.title}")]


def measured(stage: str, runs: Sequence[Rows]) -> list[Panel]:
    """The panels of a stage that any of the runs has numbers for, without shares too small to be seen."""
    return [panel for panel, values in _logged(stage, runs) if values and not _nothing(panel, values)]


def unseen(stage: str, runs: Sequence[Rows]) -> str:
    """Says which shares were measured and never reached 1 %, as the end of a caption."""
    named = [panel.title for panel, values in _logged(stage, runs) if values and _nothing(panel, values)]
    return f" Below 1 % throughout: {', '.join(named)}." if named else ""


def _logged(stage: str, runs: Sequence[Rows]) -> list[tuple[Panel, list[float]]]:
    shown = [with_shares(rows) for rows in runs]
    return [
        (panel, [v for rows in shown for key in (panel.key, panel.beside) if key for _, v in series(rows, key)])
        for panel in STAGES[stage]
    ]


def _nothing(panel: Panel, values: Sequence[float]) -> bool:
    return panel.share and max(values) < 0.01


def with_shares(rows: Rows) -> list[dict[str, Any]]:
    """The rows, and of a step's verdicts the share without an answer, and the share that is a failure of grading."""
    return [dict(row) | _verdict_shares(row) for row in rows]


def _panel(stage: str, panel: Panel, runs: Sequence[tuple[Look, Rows]], *, named: bool) -> str:
    single = len(runs) == 1
    ends: list[tuple[float, float, Look]] = []
    values: list[float] = []
    with style():
        figure, axes = small_frame(labelled=named)
        for look, rows in _with_shares(runs):
            rare = series(rows, panel.beside) if panel.beside else []
            for points, marked in ((series(rows, panel.key), False), (rare, True)):
                if not points:
                    continue
                x, y = thinned(points, MOST_POINTS if single else OVERLAID)
                few: dict[str, Any] = {"marker": look.marker, "markersize": 4 if marked else 3}
                axes.plot(
                    x,
                    y,
                    color=look.colour,
                    linestyle=look.dash if not single else "-",
                    alpha=0.5 if rare and not marked else 1.0,
                    **(few if marked or (single and len(points) < 12) else {}),
                )
                values += y
                if not marked:
                    ends.append((x[-1], y[-1], look))
        axes.set_title(panel.title)
        axes.set_xlabel("optimizer step")
        if panel.share or (panel.key == "reward" and all(0 <= y <= 1 for y in values)):
            axes.set(ylim=(-0.03, 1.03), yticks=(0, 0.5, 1))
        else:
            axes.set_ylim(min(0.0, *values, 0.0) * 1.08, max(0.0, *values, 0.0) * 1.08 or 1.0)
        if named and ends:
            label_ends(figure, axes, ends)
        names = "" if not named else f" of {', '.join(look.label for look, _ in runs)}"
        return svg(figure, f"{panel.title} over the optimizer steps of {TITLES[stage]}{names}")


def _with_shares(runs: Sequence[tuple[Look, Rows]]) -> list[tuple[Look, list[dict[str, Any]]]]:
    return [(look, with_shares(rows)) for look, rows in runs]


TITLES = {
    "pretrain": "pretraining",
    "sft": "the warm start",
    "preference": "the preference stage",
    "rl": "reinforcement learning",
}


def _verdict_shares(row: Mapping[str, Any]) -> dict[str, float]:
    shares = {name.removeprefix("verdict/"): value for name, value in row.items() if name.startswith("verdict/")}
    if not shares:
        return {}
    failed = sum(value for status, value in shares.items() if status not in JUDGED)
    return {"no_answer_share": shares.get("no_answer", 0.0), "failed_share": failed}
