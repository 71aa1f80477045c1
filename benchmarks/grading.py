"""Graders side by side: verdicts a second, latency, one RL step with and without bombs, and the parent's memory.

    python benchmarks/grading.py --out benchmarks/results/grading-NAME.json        # everything; about half an hour
    python benchmarks/grading.py --responses 600 --step 256 --many 5000            # a small form: minutes

Responses are GSM8K solutions of models, each with a label that says whether it is right (`--data`). Their last line is
"A: N"; the others are given the box they look for in its place. Rounds alternate between the graders on the same rows;
a ratio is the median over rounds. A grader's agreement with the labels stands beside its speed.

    heatbath         MathGrader with two workers
    pool             every response to heatbath's worker pool, which runs math-verify on it: what a hard answer costs
    math-verify      parse and verify in this process, with its own timeouts
    TRL              trl.rewards.accuracy_reward
    process pool     math-verify in a spawned ProcessPoolExecutor of 4, as in verl: a future is abandoned after 30 s

A step is `--step` responses (128 prompts × 8 in the paper), clean, or 1 % of them replaced by bombs. heatbath refuses
those before any worker sees them, so its pool is also measured with tasks that hang for good (`hanging`).
"""

from __future__ import annotations

import argparse
import gzip
import importlib.metadata
import itertools
import json
import logging
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

from made_with import commit

DATA = Path(__file__).parents[2] / "shared" / "data" / "verdicts_gsm8k" / "model_solutions_labelled.jsonl.gz"
BOMBS = (
    r"\boxed{9^{9^{9}}}",
    r"\boxed{(10^9)!}",
    r"\boxed{\binom{10^9}{5\cdot 10^8}}",
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{\prod_{k=1}^{10^9} k}",
    r"\boxed{\lfloor 7^{10^{10}} / 3 \rfloor}",
)
WARM_UP = ("It is $3 + 4 = 7$ dollars.\nThe answer is \\boxed{\\frac{1}{2}}", "0.5")
HANG = "hang"
ABANDON_AFTER = 30.0  # seconds
Grader = Callable[[list[str], list[str]], list[bool]]


def math_verify(response: str, gold: str) -> bool:
    """In this process, with its own timeouts: five seconds to parse and five to verify, by SIGALRM."""
    from math_verify import parse, verify

    return bool(verify(parse(f"\\boxed{{{gold}}}"), parse(response)))


def pool_job(response: str, gold: str) -> bool:
    """What a worker of the pool runs: math-verify, its timeouts left off, or nothing that ever ends."""
    from math_verify import parse, verify

    while response == HANG:
        pass
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    expected = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    return bool(verify(expected, parse(response, parsing_timeout=None), timeout_seconds=None))


class Graders:
    """The graders compared, started once."""

    def __init__(self, deadline: float) -> None:
        from heatbath.verify.math import MathGrader
        from heatbath.verify.pool import WorkerPool

        self.ours = MathGrader(workers=2, deadline=deadline)
        self.pool = WorkerPool(f"{__file__}:pool_job", workers=2, deadline=deadline, warm_up=WARM_UP)
        self.executor = ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn"))

    def heatbath(self, responses: list[str], golds: list[str]) -> list[bool]:
        return [v.status == "right" for v in self.ours.grade(responses, golds)]

    def through_pool(self, responses: list[str], golds: list[str]) -> list[bool]:
        return [o.value is True for o in self.pool.map(list(zip(responses, golds, strict=True)))]

    def in_process(self, responses: list[str], golds: list[str]) -> list[bool]:
        return [math_verify(r, g) for r, g in zip(responses, golds, strict=True)]

    def trl(self, responses: list[str], golds: list[str]) -> list[bool]:
        from trl.rewards import accuracy_reward

        return [s == 1.0 for s in accuracy_reward([[{"role": "assistant", "content": r}] for r in responses], golds)]

    def process_pool(self, responses: list[str], golds: list[str]) -> list[bool]:
        end = time.monotonic() + ABANDON_AFTER
        futures = [self.executor.submit(math_verify, r, g) for r, g in zip(responses, golds, strict=True)]
        found = []
        for future in futures:
            try:
                found.append(future.result(max(end - time.monotonic(), 0.0)))
            except FutureTimeoutError:
                found.append(False)
        return found

    def all(self) -> dict[str, Grader]:
        return {
            "heatbath": self.heatbath,
            "pool": self.through_pool,
            "math-verify": self.in_process,
            "TRL": self.trl,
            "process pool": self.process_pool,
        }

    def close(self) -> None:
        self.ours.close()
        self.pool.close()
        processes = list((self.executor._processes or {}).values())
        self.executor.shutdown(wait=False, cancel_futures=True)
        for process in processes:  # nothing else ends one that hangs
            process.kill()


def boxed(response: str) -> str:
    """The response with its answer where the other graders look for it."""
    body, _, answer = response.rpartition("A:")
    return f"{body}The answer is \\boxed{{{answer.strip()}}}"


def timed(grader: Grader, responses: list[str], golds: list[str]) -> tuple[float, list[bool]]:
    started = time.perf_counter()
    found = grader(responses, golds)
    return time.perf_counter() - started, found


def warm(grader: Grader, rows: list[dict[str, Any]]) -> None:
    """Starts whatever it starts, and fills its caches; a training run pays that once."""
    grader([boxed(r["response"]) for r in rows], [r["gold"] for r in rows])


def throughput(graders: dict[str, Grader], rows: list[dict[str, Any]], block: int) -> list[dict[str, Any]]:
    """Verdicts a second over blocks of rows, the graders in turn on each, and agreement with the labels."""
    seconds: dict[str, list[float]] = {name: [] for name in graders}
    agreed = dict.fromkeys(graders, 0)
    raw_agreed = 0
    for start in range(0, len(rows), block):
        part = rows[start : start + block]
        golds, expected = [r["gold"] for r in part], [r["expected"] for r in part]
        responses = [boxed(r["response"]) for r in part]
        for name, grader in graders.items():
            spent, found = timed(grader, responses, golds)
            seconds[name].append(spent / len(part))
            agreed[name] += sum(a == b for a, b in zip(found, expected, strict=True))
        raw = graders["heatbath"]([r["response"] for r in part], golds)
        raw_agreed += sum(a == b for a, b in zip(raw, expected, strict=True))
    table = [
        {
            "grader": name,
            "verdicts per second": round(1 / statistics.mean(times), 1),
            "times math-verify's rate": round(
                statistics.median(a / b for a, b in zip(seconds["math-verify"], times, strict=True)), 3
            ),
            "agrees with the labels": f"{agreed[name]}/{len(rows)}",
        }
        for name, times in seconds.items()
    ]
    table[0]["agrees on the responses as they are"] = f"{raw_agreed}/{len(rows)}"
    return table


def latency(graders: dict[str, Grader], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Milliseconds for one response alone."""
    table = []
    for name, grader in graders.items():
        spent = [timed(grader, [boxed(r["response"])], [r["gold"]])[0] * 1000 for r in rows]
        cuts = statistics.quantiles(spent, n=100)
        table.append({"grader": name, "p50 ms": round(cuts[49], 3), "p99 ms": round(cuts[98], 3)})
    return table


def step(name: str, grader: Grader, rows: list[dict[str, Any]], bombs: list[str]) -> dict[str, Any]:
    """Seconds for one step, some of whose responses are bombs spread over it, and how many labels it met."""
    responses = [boxed(r["response"]) for r in rows]
    expected = [r["expected"] for r in rows]
    for i, bomb in enumerate(bombs):
        place = (2 * i + 1) * len(rows) // (2 * len(bombs))
        responses[place], expected[place] = bomb, False
    spent, found = timed(grader, responses, [r["gold"] for r in rows])
    agreed = sum(a == b for a, b in zip(found, expected, strict=True))
    fact = {"grader": name, "seconds": round(spent, 2), "agrees": f"{agreed}/{len(rows)}", "bombs": len(bombs)}
    print(json.dumps(fact), file=sys.stderr)
    return fact


def steps(options: argparse.Namespace, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Clean, with bombs, and with tasks that hang for good (those through our pool only: no other ends them)."""
    table = []
    rows = list(itertools.islice(itertools.cycle(rows), options.step))
    count = max(round(options.step * options.bombs), 1)
    kinds = {
        "clean": [],
        "bombs": list(itertools.islice(itertools.cycle(BOMBS), count)),
        "hanging": [HANG] * count,
    }
    for kind, bombs in kinds.items():
        graders = Graders(options.deadline)
        chosen = graders.all() if kind != "hanging" else {"pool": graders.through_pool}
        for name, grader in chosen.items():
            warm(grader, rows)
            table.append({"step": kind, **step(name, grader, rows, bombs)})
        graders.close()
    return table


def resident() -> float:
    """MiB of this process now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def memory(options: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The parent's resident memory along many gradings in one pool, every answer through a worker."""
    graders, seen = Graders(options.deadline), []
    rows = list(itertools.islice(itertools.cycle(rows), max(options.many // 10, 1)))
    responses, golds = [boxed(r["response"]) for r in rows], [r["gold"] for r in rows]
    for _ in range(10):
        graders.through_pool(responses, golds)
        graders.heatbath(responses, golds)
        seen.append(round(resident(), 1))
    graders.close()
    return {"gradings by each": 10 * len(rows), "MiB after each tenth": seen}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="labelled responses, JSON lines, gzip")
    parser.add_argument("--responses", type=int, default=5276)
    parser.add_argument("--block", type=int, default=200, help="responses of one round")
    parser.add_argument("--step", type=int, default=1024)
    parser.add_argument("--bombs", type=float, default=0.01, help="share of a step")
    parser.add_argument("--many", type=int, default=100_000, help="gradings over which the parent's memory is followed")
    parser.add_argument("--deadline", type=float, default=10.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it prints a traceback for every timeout
    with gzip.open(options.data, "rt") as file:
        rows = [json.loads(line) for line in file][: options.responses]
    graders = Graders(options.deadline)
    for grader in graders.all().values():
        warm(grader, rows[: options.step])
    rates = throughput(graders.all(), rows, options.block)
    alone = latency(graders.all(), rows[:500])
    graders.close()
    sizes = ("responses", "block", "step", "bombs", "many", "deadline")
    facts = {
        "command": f"python benchmarks/grading.py {' '.join(f'--{n} {getattr(options, n)}' for n in sizes)}",
        "commit": commit(),
        "device": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("math-verify", "sympy", "trl")},
            "gmpy2": next((d.version for d in importlib.metadata.distributions(name="gmpy2")), None),
        },
        "deadline": options.deadline,
        "throughput": rates,
        "latency of one response": alone,
        "steps": steps(options, rows),
        "memory of the parent": memory(options, rows),
    }
    print(json.dumps(facts, indent=1))
    if options.out:
        options.out.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
