"""Verdicts on mathematical answers: plain numbers compared exactly here, everything else by math-verify in a worker.

Nothing of a completion is ever evaluated as code. The worker may hang or die; it is killed and replaced.
"""

from __future__ import annotations

import logging
import re
import time
from fractions import Fraction

from heatbath.verify.extract import extract
from heatbath.verify.pool import WorkerPool
from heatbath.verify.verdict import Verdict

MAX_ANSWER = 500  # characters; a longer "answer" is refused before any parser sees it
PLAIN = re.compile(r"([+-]?)([0-9]{1,60}|[0-9]{1,3}(?:,[0-9]{3}){1,20}|(?=\.[0-9]))(?:\.([0-9]{1,60}))?")
FRACTION = re.compile(r"([+-]?[0-9]{1,60}) ?/ ?([0-9]{1,60})")


def plain_number(text: str) -> Fraction | None:
    """The exact value of an integer, decimal or a/b, with optional $…$, thousands commas and a final dot."""
    text = text.strip().strip("$").strip().rstrip(".").replace("−", "-")
    if match := PLAIN.fullmatch(text):
        sign, whole, decimals = match.groups()
        digits = whole.replace(",", "") + (decimals or "")
        return Fraction(int(sign + digits), 10 ** len(decimals or ""))
    if (match := FRACTION.fullmatch(text)) and int(match.group(2)):
        return Fraction(int(match.group(1)), int(match.group(2)))
    return None


class MathGrader:
    """Grades completions against gold answers, `workers` at a time, each verdict within `deadline` seconds of work."""

    def __init__(self, *, workers: int = 2, deadline: float = 10.0):
        self.pool = WorkerPool(_math_verify, workers=workers, deadline=deadline, warm_up=("1", "1"))

    def __enter__(self) -> MathGrader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.pool.close()

    def grade(self, completions: list[str], golds: list[str]) -> list[Verdict]:
        """A verdict for each completion, in order."""
        verdicts: list[Verdict | None] = [_without_worker(c, g) for c, g in zip(completions, golds, strict=True)]
        hard = [i for i, verdict in enumerate(verdicts) if verdict is None]
        answers = {i: extract(completions[i]) for i in hard}
        results = self.pool.map([(golds[i], answers[i][0] or "") for i in hard])
        for i, (outcome, seconds) in zip(hard, results, strict=True):
            answer, rule = answers[i]
            verdicts[i] = Verdict(outcome, answer, f"{rule}+math_verify", seconds)
        return [v for v in verdicts if v is not None]


def _without_worker(completion: str, gold: str) -> Verdict | None:
    """The verdict where no parser is needed, or None."""
    started = time.perf_counter()
    answer, rule = extract(completion)
    expected = plain_number(gold)
    if not gold.strip() or len(gold) > MAX_ANSWER:
        return Verdict("bad_gold", answer, rule)
    if answer is None or not answer:
        return Verdict("no_answer", answer, rule)
    if len(answer) > MAX_ANSWER:
        return Verdict("refused", answer[:MAX_ANSWER], rule)
    found = plain_number(answer)
    if found is None or expected is None:
        return None
    status = "right" if found == expected else "wrong"
    return Verdict(status, answer, f"{rule}+exact", time.perf_counter() - started)


def _math_verify(gold: str, answer: str) -> str:
    """Runs in a worker process. The deadline there is the pool's: math-verify's own uses signals and is left off."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at every call that its timeouts are off
    expected = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    if not expected:
        return "bad_gold"
    found = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    if not found:
        return "wrong"
    return "right" if verify(expected, found, timeout_seconds=None) else "wrong"
