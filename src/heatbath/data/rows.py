"""The row every source yields, and the disjoint splits a run reads."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """A problem, and where known its worked solution and its final answer."""

    question: str
    solution: str | None = None
    answer: str | None = None

    @property
    def id(self) -> str:
        """Content hash of question and answer: the same problem has the same id in every run."""
        return hashlib.sha256(f"{self.question}\0{self.answer}".encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Splits:
    """What a run reads: demonstrations for SFT and its validation, prompts for RL, problems for evaluation."""

    demos: list[Row]
    validation: list[Row]
    prompts: list[Row]
    test: list[Row]
