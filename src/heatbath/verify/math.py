"""Verdicts on mathematical answers: what can be read is compared here, exactly; the rest is asked of Math-Verify in a
worker process that is killed at a deadline. Nothing of a completion is ever evaluated as code."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from heatbath.errors import RunError
from heatbath.verify import algebra, paper
from heatbath.verify.answers.equality import EXACT, Rules
from heatbath.verify.answers.symbols import RefusedError
from heatbath.verify.cascade import BOMB, compare, gold_answer
from heatbath.verify.extract import POLICIES, Policy, clean, extract, last_boxed
from heatbath.verify.pool import Outcome, WorkerPool
from heatbath.verify.verdict import Verdict

Profile = Literal["strict", "paper"]
SUM = ["\\sum_{k=1}^{n} k", "\\frac{n(n+1)}{2}"]  # what a worker is warmed up with: the first of its kind is slow
SHOWN = 500  # characters of an answer that a verdict keeps


class MathGrader:
    """Grades completions against gold answers, `workers` at a time, each within `deadline` seconds of work.

    `profile`: `strict` compares exactly; `paper` accepts what the first GIFT paper's rewards accept (`paper.py`, then
    Math-Verify on the whole response). For `strict`: `policy` names where an answer may stand (`extract.py`), `rules`
    what counts as the same (`equality.py`), `finished` refuses plain arithmetic that nobody worked out, and `stages`
    are import paths (`package.module:function`, `file.py:function`) of functions (gold, answer) -> True, False or None,
    asked in the worker before Math-Verify about every answer that is not right so far.
    """

    def __init__(
        self,
        *,
        profile: Profile = "strict",
        workers: int = 2,
        deadline: float = 10.0,
        policy: Policy = "any",
        rules: Rules = EXACT,
        finished: bool = True,
        stages: Sequence[str] = (),
    ):
        if profile not in get_args(Profile) or policy not in POLICIES:
            raise RunError(
                f"no profile {profile!r} with policy {policy!r}",
                "MathGrader",
                f"profiles: {', '.join(get_args(Profile))}; policies: {', '.join(POLICIES)}",
            )
        self.profile, self.policy, self.rules, self.finished = profile, policy, rules, finished
        own = [stages] if isinstance(stages, str) else stages
        for stage in own:
            algebra.require_stage(stage)
        self.stages = [*map(_resolved, own), algebra.MATH_VERIFY]
        strict = profile == "strict"
        self.pool = WorkerPool(
            "heatbath.verify.algebra:decide" if strict else "heatbath.verify.algebra:whole_response",
            workers=workers,
            deadline=deadline,
            warm_up=[[algebra.MATH_VERIFY], *SUM] if strict else [SUM[0], f"so ${SUM[1]}$, or \\boxed{{2}}."],
        )

    def __enter__(self) -> MathGrader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.pool.close()

    def grade(self, completions: Sequence[str], golds: Sequence[Any]) -> list[Verdict]:
        """A verdict for each completion, in order. A gold answer is a text or a number; anything else is `bad_gold`."""
        first = self._strictly if self.profile == "strict" else self._as_in_the_paper
        found = [_caught(first, c or "", _text(g)) for c, g in zip(completions, golds, strict=True)]
        hard = [i for i, verdict in enumerate(found) if not isinstance(verdict, Verdict)]
        outcomes = self.pool.map([found[i].task for i in hard])
        for i, outcome in zip(hard, outcomes, strict=True):
            found[i] = found[i].verdict(outcome)
        return found

    def _strictly(self, completion: str, gold: str) -> Verdict | Asked:
        expected = gold_answer(gold)
        answer, rule = extract(completion, self.policy)
        if expected is None:
            return Verdict("bad_gold", _shown(answer), rule)
        if not answer:
            return Verdict("no_answer", answer, rule)
        status, why = compare(expected, answer, self.rules, self.finished)
        if status is None:
            return Asked([self.stages, expected.text, answer], answer, rule)
        found = Verdict(status, _shown(answer), f"{rule}+{why}")
        if status in ("wrong", "bad_gold") and len(self.stages) > 1:  # a stage may read what nobody here can
            return Asked([self.stages[:-1], expected.text, answer], answer, rule, otherwise=found)
        return found

    def _as_in_the_paper(self, completion: str, gold: str) -> Verdict | Asked:
        expected = gold_answer(gold)
        if expected is None:
            return Verdict("bad_gold", None, "none")
        answer = last_boxed(clean(completion))
        if answer and len(answer) > paper.MAX_ANSWER * 2:
            return Verdict("refused", _shown(answer), "boxed+too long")
        try:
            if answer and paper.accepts(expected.text, answer):
                return Verdict("right", _shown(answer), "boxed+paper")
        except RefusedError as error:
            return Verdict("refused", _shown(answer), f"boxed+{error}")
        if answer and BOMB.search(answer):
            return Verdict("refused", _shown(answer), "boxed+bounds")
        return Asked([expected.text, completion[-algebra.MAX_RESPONSE :]], answer, "response")


class Asked:
    """A question for a worker, and how its outcome becomes a verdict: `otherwise` where no stage decides."""

    def __init__(self, task: list[object], answer: str | None, rule: str, otherwise: Verdict | None = None):
        self.task, self.answer, self.rule, self.otherwise = task, answer, rule, otherwise

    def verdict(self, outcome: Outcome) -> Verdict:
        if outcome.status != "done":
            rule = f"{self.rule}+{outcome.message or outcome.status}"
            return Verdict(outcome.status, _shown(self.answer), rule, outcome.seconds)
        status, decided = outcome.value
        if decided == algebra.NO_STAGE and self.otherwise is not None:
            return self.otherwise
        return Verdict(status, _shown(self.answer), f"{self.rule}+{decided}", outcome.seconds)


def _caught(grade: Callable[[str, str], Verdict | Asked], completion: str, gold: str) -> Verdict | Asked:
    started = time.perf_counter()
    try:
        found = grade(completion, gold)
    except Exception as error:  # noqa: BLE001 - the edge to model text: whatever it breaks is counted, not raised
        found = Verdict("crashed", None, f"{type(error).__name__}: {error}"[:200])
    if isinstance(found, Verdict):
        return Verdict(found.status, found.answer, found.rule, time.perf_counter() - started)
    return found


def _text(gold: Any) -> str:
    """A gold answer as text; nothing for what is none, such as a missing value."""
    if isinstance(gold, bool) or not isinstance(gold, str | int | float) or gold != gold:
        return ""
    return str(gold)


def _resolved(stage: str) -> str:
    """An import path that does not change its meaning when the working folder does."""
    home, _, name = stage.rpartition(":")
    return f"{Path(home).resolve()}:{name}" if home.endswith(".py") else stage


def _shown(answer: str | None) -> str | None:
    return answer if answer is None else answer[:SHOWN]
