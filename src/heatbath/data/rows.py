"""The row every source yields, the disjoint splits a run reads, and the rule by which a problem is held out."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any

HELD_OUT = 0.25  # of all problems of a procedural task; they are only ever used for validation and test


@dataclass(frozen=True)
class Row:
    """A problem, and where known one worked solution and its final answer.

    `history` holds the turns before the question as (role, content); `origin` is where the row came from, in the
    user's words, and `kind` the part of the data it belongs to (a form, a field, the user's own label). `columns` are
    numbers that an objective reads: one for the row, or one per supervised token.
    """

    question: str
    solution: str | None = None
    answer: str | None = None
    history: tuple[tuple[str, str], ...] = ()
    origin: str = field(default="", compare=False)
    kind: str = field(default="", compare=False)
    columns: dict[str, float | list[float]] = field(default_factory=dict, compare=False)

    @property
    def id(self) -> str:
        """Content hash of problem and answer: the same problem has the same id in every run."""
        turns = "".join(f"{role}\0{content}\0" for role, content in self.history)
        return hashlib.sha256(f"{turns}{self.question}\0{self.answer}".encode()).hexdigest()[:12]

    @property
    def problem(self) -> str:
        """The problem as it is compared between splits: what the user says, in all turns. Case, white space and a
        system message do not make another problem of it."""
        return normalised(self.asked)

    @property
    def asked(self) -> str:
        """Every user turn, the question last."""
        return " ".join([*(content for role, content in self.history if role == "user"), self.question])


@dataclass(frozen=True)
class Splits:
    """What a run reads: demonstrations for SFT and its validation, prompts for RL, problems for evaluation.

    `notes` are what a user should hear about how they came to be (duplicates dropped, contaminated rows removed).
    """

    demos: list[Row]
    validation: list[Row]
    prompts: list[Row]
    test: list[Row]
    notes: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def report(self) -> dict[str, Any]:
        """What a run keeps about its data: sizes, notes, every row that decontamination removed, and a digest."""
        sizes = {name: len(rows) for name, rows in self.named().items()}
        facts = {"notes": list(self.notes), "removed": list(self.removed), "digest": self.digest()}
        return {"rows": sizes, **facts}

    def digest(self) -> str:
        """The same for the same rows in the same order, whatever they were read from."""
        rows = [[name, row.id, row.solution, row.columns] for name, own in self.named().items() for row in own]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode("utf-8", "replace")).hexdigest()[:16]

    def named(self) -> dict[str, list[Row]]:
        """Name → rows, in the order of the fields."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("notes", "removed")}


def normalised(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().casefold()


def position(problem: str, salt: str = "") -> float:
    """Where a problem falls in [0, 1), by its content alone (and `salt`): the order in which splits are drawn."""
    digest = hashlib.sha256(f"{salt}\0{normalised(problem)}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_by_content(rows: Iterable[Row], sizes: dict[str, int], seed: int) -> Splits:
    """Draws the splits from one pool of rows, whole problems at a time.

    `test` and then `validation` are the problems that come first by content hash: they are the same for every seed, and
    whatever the sizes of the others. `demos` and then `prompts` are drawn from the rest in an order fixed by the seed.
    Several rows of one problem (several solutions) stay together; a size counts problems. Raises ValueError when the
    pool is too small.
    """
    by_problem: dict[str, list[Row]] = {}
    for row in rows:
        by_problem.setdefault(row.problem, []).append(row)
    wanted = sum(sizes.values())
    if wanted > len(by_problem):
        raise ValueError(f"{wanted:,} problems wanted, but the pool holds {len(by_problem):,} different ones")
    fixed = sorted(by_problem, key=position)
    front = sizes["test"] + sizes["validation"]
    rest = sorted(fixed[front:], key=lambda problem: position(problem, f"seed {seed}"))
    parts = {
        "test": fixed[: sizes["test"]],
        "validation": fixed[sizes["test"] : front],
        "demos": rest[: sizes["demos"]],
        "prompts": rest[sizes["demos"] : sizes["demos"] + sizes["prompts"]],
    }
    # One row of a problem is enough where no solution is read.
    return Splits(
        demos=[row for problem in parts["demos"] for row in by_problem[problem]],
        validation=[row for problem in parts["validation"] for row in by_problem[problem]],
        prompts=[by_problem[problem][0] for problem in parts["prompts"]],
        test=[by_problem[problem][0] for problem in parts["test"]],
    )
