"""heatbath's verdicts as verl's `compute_score`.

    reward.custom_reward_function.path=pkg://heatbath.integrations.verl
    reward.custom_reward_function.name=compute_score

A row's `reward_model.ground_truth` is the gold answer; for multiple choice and programs JSON text (docs/verify.md).
Which grader it is for stands in `extra_info["kind"]` (math by default) and `extra_info["profile"]`. What else a grader
takes (`workers`, `deadline`, `stages`, `isolation`) is verl's `reward.custom_reward_function.reward_kwargs`.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from heatbath.verify.graders import Grader, Kind, as_gold, grader
from heatbath.verify.verdict import Verdict


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """verl's reward of one response: `score`, `acc`, and what became of it. A gold answer that nobody can read scores 0
    here, since verl knows no missing reward; its `status` says so."""
    return compute_scores([data_source], [solution_str], [ground_truth], [extra_info], **options)[0]


def compute_scores(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[str],
    extra_infos: Sequence[Mapping[str, Any] | None] | None = None,
    *,
    workers: int = 2,
    deadline: float = 10.0,
    stages: Sequence[str] = (),
    isolation: str | None = None,
    **_: Any,
) -> list[dict[str, Any]]:
    """The same for a batch (verl's `batch` reward manager): the graders work on all of it at once."""
    infos = [info or {} for info in (extra_infos if extra_infos is not None else [None] * len(solution_strs))]
    wanted = [(str(info.get("kind", "math")), str(info.get("profile", "strict"))) for info in infos]
    scores: list[dict[str, Any]] = [{}] * len(solution_strs)
    for kind, profile in dict.fromkeys(wanted):
        rows = [i for i, asked in enumerate(wanted) if asked == (kind, profile)]
        golds = [as_gold(kind, _plain(ground_truths[i])) for i in rows]  # type: ignore[arg-type]
        with _MAKING:  # verl asks from several threads, and each grader has processes of its own
            judge = _grader(kind, profile, workers, deadline, tuple(stages), isolation)  # type: ignore[arg-type]
        verdicts = judge.grade([solution_strs[i] for i in rows], golds)
        for i, verdict in zip(rows, verdicts, strict=True):
            scores[i] = _score(verdict)
    return scores


def _plain(value: Any) -> Any:
    """verl keeps rows in numpy arrays."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


_MAKING = threading.Lock()


@functools.cache
def _grader(
    kind: Kind, profile: str, workers: int, deadline: float, stages: tuple[str, ...], isolation: str | None
) -> Grader:
    return grader(kind, profile=profile, workers=workers, deadline=deadline, stages=stages, isolation=isolation or None)


def _score(verdict: Verdict) -> dict[str, Any]:
    return {
        "score": verdict.score or 0.0,
        "acc": float(verdict.status == "right"),
        "status": verdict.status,
        "pred": verdict.answer or "",
        "rule": verdict.rule,
    }
