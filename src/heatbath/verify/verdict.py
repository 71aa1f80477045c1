"""What a grader returns. A failure of the grader is never silently a 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Status = Literal["right", "wrong", "no_answer", "timeout", "crashed", "refused", "bad_gold"]
STATUSES: tuple[str, ...] = get_args(Status)
# Outcomes that say something about the completion; any other says something about the grader.
JUDGED = ("right", "wrong", "no_answer")


@dataclass(frozen=True)
class Verdict:
    """`answer` is what was extracted, `rule` what decided, `seconds` how long the decision took."""

    status: Status
    answer: str | None = None
    rule: str = ""
    seconds: float = 0.0

    @property
    def score(self) -> float | None:
        """1.0 right, 0.0 wrong or no answer, None where the grader failed and nothing was judged."""
        return float(self.status == "right") if self.status in JUDGED else None
