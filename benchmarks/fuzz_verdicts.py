"""Verdicts under fuzzing, at scale: what escapes, what hangs, and numbers that are taken for others.

    python benchmarks/fuzz_verdicts.py --out benchmarks/results/fuzz-verdicts-NAME.json     # about half an hour
    python benchmarks/fuzz_verdicts.py --inputs 20000 --pool 0                              # a minute or two

The texts are those of tests/verify/strategies.py, drawn here without hypothesis: `--inputs` in this process on the
rules of extraction and comparison, half of them hard texts and broken completions, half plain numbers of known value
(equal ones have to be right and others wrong), then `--pool` through `MathGrader`, its workers and Math-Verify.
The same `--seed` draws the same texts. Exits with 1 when an exception escaped, a part of a verdict took more than a
second of this process, a number got a wrong verdict, or a verdict of the pool outlived its deadline.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from made_with import commit

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "verify"))

SLOWEST = 10  # cases that the log keeps
SHOWN = 120
GRACE_SECONDS = 5.0  # of a worker's end, past its deadline
BATCH = 500  # texts of one call of the grader


class Log:
    """What was seen: statuses, failures with their case, and the slowest."""

    def __init__(self) -> None:
        self.statuses: Counter[str] = Counter()
        self.failures: list[dict[str, str]] = []
        self.kinds: Counter[str] = Counter()
        self.slow: list[tuple[float, str, str]] = []

    def fail(self, what: str, completion: str, gold: str) -> None:
        self.kinds[what] += 1
        if self.kinds[what] <= 5:
            self.failures.append({"what": what, "completion": shown(completion), "gold": shown(gold)})

    def took(self, seconds: float, completion: str, gold: str) -> None:
        self.slow.append((seconds, completion, gold))
        if len(self.slow) > 100 * SLOWEST:
            self.slow = sorted(self.slow, reverse=True)[:SLOWEST]

    def written(self) -> dict[str, Any]:
        slow = sorted(self.slow, reverse=True)[:SLOWEST]
        return {
            "statuses": dict(self.statuses.most_common()),
            "failures": dict(self.kinds.most_common()),
            "failed_cases": self.failures,
            "slowest": [{"seconds": round(s, 4), "completion": shown(c), "gold": shown(g)} for s, c, g in slow],
        }


def shown(text: str) -> str:
    return ascii(text[:SHOWN])[1:-1] + (f"… of {len(text)}" if len(text) > SHOWN else "")


def one(log: Log, completion: str, gold: str, expected: str | None = None) -> None:
    from strategies import verdict

    started = time.process_time()
    try:
        status = verdict(completion, gold)
    except Exception as error:  # noqa: BLE001 - what escapes is what is looked for
        log.statuses["escaped"] += 1
        log.fail(f"{type(error).__name__}: {str(error)[:80]}", completion, gold)
    else:
        log.statuses[status or "asked of Math-Verify"] += 1
        if expected and status != expected:
            log.fail(f"a number is {status}, not {expected}", completion, gold)
    log.took(time.process_time() - started, completion, gold)


def in_process(inputs: int, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The logs of hard texts and of numbers."""
    import strategies as made

    r = random.Random(seed)
    texts, numbers = Log(), Log()
    for _ in range(inputs - inputs // 2):
        one(texts, *made.case(random.Random(r.getrandbits(64))))
    for k in range(inputs // 2):
        drawn = random.Random(r.getrandbits(64))
        number = made.value(drawn)
        answer = number if k % 2 else made.other_value(drawn, number)
        gold, text = made.written(drawn, number), f"So \\boxed{{{made.written(drawn, answer)}}}"
        one(numbers, text, gold, "right" if k % 2 else "wrong")
    return texts.written(), numbers.written()


def through_the_pool(inputs: int, seed: int, deadline: float, workers: int) -> dict[str, Any]:
    import strategies as made

    from heatbath.verify.math import MathGrader
    from heatbath.verify.verdict import STATUSES

    r, log, started = random.Random(seed + 1), Log(), time.perf_counter()
    with MathGrader(workers=workers, deadline=deadline) as grader:
        for first in range(0, inputs, BATCH):
            cases = [made.case(random.Random(r.getrandbits(64))) for _ in range(min(BATCH, inputs - first))]
            verdicts = grader.grade([completion for completion, _ in cases], [gold for _, gold in cases])
            for (completion, gold), verdict in zip(cases, verdicts, strict=True):
                log.statuses[verdict.status] += 1
                log.took(verdict.seconds, completion, gold)
                if verdict.status not in STATUSES or verdict.status == "crashed":
                    log.fail(f"{verdict.status}: {verdict.rule[-80:]}", completion, gold)
                if verdict.seconds > deadline + GRACE_SECONDS:
                    log.fail("outlived its deadline", completion, gold)
    return {"wall_seconds": round(time.perf_counter() - started, 1), **log.written()}


def about(options: argparse.Namespace) -> dict[str, Any]:
    names = ("heatbath", "math-verify", "latex2sympy2_extended", "sympy", "mpmath")
    models = (
        [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().split("\n")
            if "model name" in line
        ]
        if Path("/proc/cpuinfo").exists()
        else []
    )
    return {
        "command": " ".join(["python", "benchmarks/fuzz_verdicts.py", *sys.argv[1:]]),
        "commit": options.commit or commit(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "cpu": f"{models[0] if models else platform.processor()}, {os.cpu_count()} cores",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--inputs", type=int, default=200_000, help="texts in this process")
    parser.add_argument("--pool", type=int, default=5_000, help="texts through the pool")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deadline", type=float, default=2.0, help="seconds of a verdict in the pool")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--commit", default="", help="written into the result")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    texts, numbers = in_process(options.inputs, options.seed)
    log = {**about(options), "inputs": options.inputs, "pool_inputs": options.pool, "seed": options.seed}
    log |= {"wall_seconds": round(time.perf_counter() - started, 1), "texts": texts, "numbers": numbers}
    parts = [texts, numbers]
    if options.pool:
        log["deadline"] = options.deadline
        log["pool"] = through_the_pool(options.pool, options.seed, options.deadline, options.workers)
        parts.append(log["pool"])
    log["failures"] = sum(sum(part["failures"].values()) for part in parts)
    text = json.dumps(log, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")
    sys.exit(bool(log["failures"]))


if __name__ == "__main__":
    main()
