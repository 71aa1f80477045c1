"""The grader of each kind of answer, and what a row's gold answer is to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal, Protocol, Self, get_args

from heatbath.errors import RunError
from heatbath.verify.verdict import JUDGED, Verdict

Kind = Literal["math", "choice", "code"]


class Grader(Protocol):
    """Whatever gives a verdict for each completion, in order. A failure is a status, never an exception."""

    def grade(self, completions: Sequence[str], golds: Sequence[Any]) -> list[Verdict]: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: Any) -> None: ...


def grader(
    kind: Kind,
    *,
    profile: str = "strict",
    workers: int = 2,
    deadline: float = 10.0,
    stages: Sequence[str] = (),
    isolation: str | None = None,
) -> Grader:
    """The grader of a kind. `profile` and `stages` are for math, `isolation` for code; raises RunError where they are
    given for another kind."""
    if kind not in get_args(Kind):
        raise RunError(f"no grader {kind!r}", "kind", f"one of {', '.join(get_args(Kind))}")
    if kind != "math" and (profile != "strict" or stages):
        raise RunError(f"{kind} answers have no profiles and no stages", "profile, stages", "leave them out")
    if kind != "code" and isolation is not None:
        raise RunError(f"{kind} answers are not run", "isolation", "leave it out")
    if kind == "choice":
        from heatbath.verify.choice import ChoiceGrader

        return ChoiceGrader()
    if kind == "code":
        from heatbath.verify.code import CodeGrader

        own = {} if isolation is None else {"isolation": isolation}
        return CodeGrader(workers=workers, deadline=deadline, **own)
    from heatbath.verify.math import MathGrader

    return MathGrader(profile=profile, workers=workers, deadline=deadline, stages=stages)  # type: ignore[arg-type]


def as_gold(kind: Kind, value: Any) -> Any:
    """A gold answer as its grader takes it. A table or a framework carries one text: options and tests are JSON in it.
    What is no gold answer stays what it is, and is `bad_gold` to the grader."""
    if kind == "math" or not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def failures(verdicts: Sequence[Verdict]) -> list[int]:
    """Which verdicts are no judgement but a failure of grading."""
    return [i for i, verdict in enumerate(verdicts) if verdict.status not in JUDGED]


def require_few_failures(
    verdicts: Sequence[Verdict], completions: Sequence[str], golds: Sequence[Any], share: float, where: str
) -> None:
    """Raises RunError with the first case when more than `share` of the verdicts, and more than one, are failures."""
    failed = failures(verdicts)
    if len(failed) <= max(share * len(verdicts), 1 if share > 0 else 0):
        return
    first = verdicts[failed[0]]
    raise RunError(
        f"{len(failed):,} of {len(verdicts):,} verdicts failed; the first is {first.status} ({first.rule}) on "
        f"{(first.answer or completions[failed[0]])[-200:]!r}, gold {str(golds[failed[0]])[:80]!r}",
        where,
        "a longer reward.deadline, another gold answer, or a larger reward.failed_share where that is to be borne",
    )
