"""What a grader returns. A failure of the grader is never silently a 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Status = Literal["right", "wrong", "no_answer", "timeout", "crashed", "refused", "bad_gold"]
STATUSES: tuple[str, ...] = get_args(Status)
# Outcomes of grading as it should go; every other one is a failure, counted and shown wherever scores are.
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
        """1.0 right, None where the gold answer is at fault, else 0.0.

        A completion that hangs, crashes or is refused by the grader scores like a wrong one: were it left out, a
        policy could raise its mean by breaking the grader instead of being wrong.
        """
        return None if self.status == "bad_gold" else float(self.status == "right")
