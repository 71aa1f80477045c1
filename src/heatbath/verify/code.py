"""Verdicts on model-written programs: run in a sandbox, compared here, on plain data.

The program is run with the inputs only. What it returns arrives as numbers, texts and containers of them, and is
compared with values that were never in its sandbox. Its own comparisons, exit code and output prove nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import re
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any, cast

from heatbath.errors import RunError
from heatbath.verify import sandbox
from heatbath.verify.code_tests import (
    ROOM,
    Assertion,
    Assertions,
    BadGoldError,
    FunctionTests,
    Streams,
    Tests,
    read_tests,
    room_of,
)
from heatbath.verify.inside import decode, encode
from heatbath.verify.sandbox import (
    BUBBLEWRAP,
    LEVELS,
    UNISOLATED,
    Limits,
    Outcome,
    Values,
    available,
    lost,
    read_values,
)
from heatbath.verify.verdict import JUDGED, Status, Verdict

__all__ = ["BUBBLEWRAP", "UNISOLATED", "CodeGrader", "Program", "available", "find_programs"]

MAX_COMPLETION = 200_000  # characters
SHOWN = 400  # characters of a program in its verdict
MAX_SECONDS = 600.0  # the longest deadline
REFERENCE_SECONDS = 60.0  # (or the deadline) for a reference; also the most that a slow one gains a program
REFERENCE_FACTOR = 4.0  # a program may take this many times what the reference took, where the deadline is less
REFERENCE_BYTES = 512 << 20  # of its results: HumanEval/15 has 140 MiB of them
OUTPUT_FACTOR = 2  # a program may write this many times what the reference's results take, beside the usual limit
KEPT_PROBLEMS = 4096  # whose expected values are kept
STARVED = 0.9  # a program that timed out with less than this share of its deadline in processor time is tried again
RETRIES = 2  # of one call of `grade`: each is alone, and most programs that wait all the time sleep
_LANGUAGES = ("python", "python3", "py")


# The program in a completion -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
    """One reading of a completion: `source` is what is run, `text` the model's part of it."""

    source: str
    text: str
    rule: str
    marked: bool = True  # as code; else text that does not compile is no answer


def find_programs(completion: str, prompt: str = "", names: Sequence[str] = ()) -> list[Program]:
    """Readings in order of preference: the first that compiles is the program; none is no answer.

    The last fenced Python block (of those that define one of `names`, if any does), after `prompt` and alone; before it
    an indented start, which continues `prompt`; where no block is, the whole text if it defines one of `names`.
    """
    if not completion.strip():
        return []
    blocks, preamble = _blocks(completion)
    defining = [block for block in blocks if _defines(block[1], names)]
    found = []
    first = next(line for line in completion.splitlines() if line.strip())
    if prompt and first[0].isspace():
        parts = dict.fromkeys((completion, _until(completion, lambda line: not line[0].isspace())))
        found += [Program(f"{prompt}{part}", part, "continues the prompt", False) for part in parts]
    if preamble.strip():  # the prompt ended with an open fence
        found += [Program(f"{prompt}\n{preamble}", preamble, "up to the closing fence")] if prompt else []
        found.append(Program(preamble, preamble, "up to the closing fence"))
    for rule, text in (defining or blocks)[-1:]:
        found += [Program(f"{prompt}\n{text}", text, rule)] if prompt else []
        found.append(Program(text, text, rule))
    if not blocks and (not names or _defines(completion, names)):
        found.append(Program(completion, completion, "whole text", False))
    return found


def _defines(text: str, names: Sequence[str]) -> bool:
    return any(
        re.search(rf"^[ \t]*(?:(?:async[ \t]+)?def|class)[ \t]+{name}\b|^{name}[ \t]*=", text, re.M) for name in names
    )


def _until(text: str, stop: Callable[[str], bool]) -> str:
    """The lines before the first that `stop` says, of those that are not blank."""
    lines = text.splitlines(keepends=True)
    return "".join(lines[: next((i for i, line in enumerate(lines) if line.strip() and stop(line)), len(lines))])


def _blocks(completion: str) -> tuple[list[tuple[str, str]], str]:
    """Rule and text of the fenced blocks that may be Python, and the text before a first fence that only closes.

    Blocks named Python come before unnamed ones, and closed ones before one that has no end.
    """
    closed, fence, language, lines, unpaired = list[tuple[str, str]](), "", "", list[str](), False
    for line in completion.splitlines(keepends=True):
        mark = line.strip()
        run = mark[: len(mark) - len(mark.lstrip(mark[0]))] if mark[:3] in ("```", "~~~") else ""
        info = mark[len(run) :].strip(" {}.").lower().split(" ")[0]
        if fence and run.startswith(fence) and not info:
            closed.append((language, "".join(lines)))
            fence = ""
        elif run and (not fence or (info and not language)):  # in an unnamed block a named fence opens: it was an end
            unpaired = unpaired or (bool(fence) and not closed)
            fence, language, lines = run, info, []
        else:
            lines.append(line)
    unpaired = unpaired or (bool(fence) and not closed and not language)
    preamble = _until(completion, lambda line: line.strip()[:3] in ("```", "~~~")) if unpaired else ""
    named = [("last Python block", text) for language, text in closed if language in _LANGUAGES]
    unnamed = [("last block", text) for language, text in closed if not language]
    endless = [("last block, which has no end", "".join(lines))] if fence and language in ("", *_LANGUAGES) else []
    return named or unnamed or endless, preamble


# The grader ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Expected:
    """Expected values: the gold's, or the results of its reference, kept compressed and decoded one at a time."""

    values: tuple[Any, ...] = ()
    room: tuple[int, ...] = ()  # the most items of each value of a program
    packed: bytes = b""
    size: int = 0
    seconds: float = 0.0
    failure: tuple[Status, str] | None = None
    passing: bool = False  # the failure may have been this machine's, and is kept for one call only

    def each(self) -> Iterator[Any]:
        yield from self.values
        for line in zlib.decompress(self.packed).splitlines() if self.packed else ():
            record = json.loads(line)
            if record[0] == "value":
                yield decode(record[2])


@dataclasses.dataclass
class _Call:
    """What the completions of one call of `grade` share."""

    retries: int
    failed: dict[str, _Expected] = dataclasses.field(default_factory=dict)
    lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def may_retry(self) -> bool:
        with self.lock:
            self.retries -= 1
            return self.retries >= 0


class CodeGrader:
    """Grades programs, `workers` at a time, from any thread, event loop or forked process; may be pickled.

    `deadline` is wall seconds for all tests of one program; it becomes four times what the reference took where that is
    more. A program that the deadline ended while it did not compute is tried once more, alone: two of one call at most.
    """

    def __init__(
        self, *, workers: int = 2, deadline: float = 10.0, isolation: str = BUBBLEWRAP, memory_gib: float = 2.0
    ) -> None:
        if isolation not in LEVELS:
            raise RunError(
                f"{isolation!r} is no isolation level", "isolation", f"choose one of {', '.join(map(repr, LEVELS))}"
            )
        for where, value, right, wanted in (
            ("workers", workers, workers >= 1, "at least 1"),
            ("deadline", deadline, 0 < deadline <= MAX_SECONDS, f"seconds above 0 and up to {MAX_SECONDS:g}"),
            ("memory_gib", memory_gib, memory_gib >= 0.1, "at least 0.1 GiB"),
        ):
            if not right:
                raise RunError(f"{where} is {value}, which a code grader cannot have", where, f"give it {wanted}")
        self.workers, self.deadline, self.isolation, self.memory_gib = workers, deadline, isolation, memory_gib
        self._fresh()

    def grade(self, completions: Sequence[str], golds: Sequence[Mapping[str, Any] | str]) -> list[Verdict]:
        """A verdict for each completion, in order; no process it started goes on after that. The same completion to
        the same gold is run once, unless it fails."""
        if len(completions) != len(golds):
            raise ValueError(f"{len(completions)} completions, but {len(golds)} golds")
        if self._pid != os.getpid():  # forked: the locks may be held by threads that are not here
            self._fresh()
        call, keys = _Call(RETRIES), [_key(gold) for gold in golds]
        tests = {key: _read(gold) for key, gold in dict(zip(keys, golds, strict=True)).items()}  # once for a group
        texts = [text if isinstance(text, str) else None for text in completions]
        pairs = list(zip(texts, keys, strict=True))
        first: dict[tuple[str | None, str], int] = {}
        for number, pair in enumerate(pairs):
            first.setdefault(pair, number)
        with ThreadPoolExecutor(max_workers=max(1, min(self.workers, len(golds)))) as pool:

            def graded(numbers: Sequence[int]) -> dict[int, Verdict]:
                run = pool.map(lambda i: self._grade(completions[i], tests[keys[i]], call), numbers)
                return dict(zip(numbers, run, strict=True))

            found = graded([*first.values()])
            # One failure, perhaps of this machine, must not count for all its copies: these are run themselves.
            failed = [i for i, pair in enumerate(pairs) if found[first[pair]].status not in JUDGED and i not in found]
            found |= graded(failed)
        return [found[i] if i in found else found[first[pair]] for i, pair in enumerate(pairs)]

    def close(self) -> None:
        """Forgets the expected values; between calls of `grade` there is no process to end."""
        self._fresh()

    def __enter__(self) -> CodeGrader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._fresh()

    def _fresh(self) -> None:
        self._pid, self._gate, self._lock = os.getpid(), _Gate(self.workers), threading.Lock()
        self._kept: OrderedDict[str, Future[_Expected]] = OrderedDict()

    def _grade(self, completion: str, tests: Tests | str, call: _Call) -> Verdict:
        began = time.perf_counter()
        text = ""
        if isinstance(tests, str):
            status, rule = "bad_gold", tests
        elif not isinstance(completion, str) or len(completion) > MAX_COMPLETION:
            status, rule = "refused", f"the completion is not a text of at most {MAX_COMPLETION} characters"
        else:
            try:
                status, rule, text = self._decide(completion, tests, call)
            except Exception as error:  # noqa: BLE001 - the edge to model text: whatever it breaks is counted, not raised
                status, rule = "crashed", f"{type(error).__name__}: {error}"[:200]
        return Verdict(cast(Status, status), text[:SHOWN] or None, rule, time.perf_counter() - began)

    def _decide(self, completion: str, tests: Tests, call: _Call) -> tuple[str, str, str]:
        prompt = tests.prompt if isinstance(tests, FunctionTests) else ""
        programs = find_programs(completion, prompt, tests.names)
        if not programs:
            return "no_answer", "no code", ""
        sources = [program.source for program in programs]
        if isinstance(tests, FunctionTests):
            status, rule, run = self._function(sources, tests, call)
        elif isinstance(tests, Assertions):
            status, rule, run = self._assertions(sources, tests, call)
        else:
            status, rule, run = self._streams(sources, tests, call)
        if run.ran and run.source is None and status == "wrong" and not any(program.marked for program in programs):
            return "no_answer", "no code", ""
        source = -1 if run.source is None else min(max(run.source, 0), len(programs) - 1)
        program = programs[source]  # the index is the program's word, and serves only to show its text
        return status, f"{_SHORT[self.isolation]}: {rule} ({program.rule})", program.text

    # Each of the three returns the status, the rule, and what the (first) process of the program left.

    def _function(self, sources: Sequence[str], tests: FunctionTests, call: _Call) -> tuple[str, str, Values]:
        expected = self._expected(tests, call)
        if expected.failure:
            return *expected.failure, Values()
        job = {"mode": "call", "sources": sources, "entry_point": tests.entry_point, "defines": tests.names}
        job |= {"inputs": tests.inputs, "reduce": tests.reduce}
        outcome = self._run(job, call, REFERENCE_FACTOR * expected.seconds, OUTPUT_FACTOR * expected.size)
        right, room = expected.each(), expected.room
        run = read_values(outcome, len(tests.inputs), lambda i, value: tests.agrees(i, value, next(right)), room)
        status, rule = _report("input", run.values, len(tests.inputs), run.failure, run.loaded)
        return status, rule + (f", rule: {tests.rule}" if tests.rule else ""), run

    def _assertions(self, sources: Sequence[str], tests: Assertions, call: _Call) -> tuple[str, str, Values]:
        calls = [text for item in tests.items for text in item.calls]
        truths = all(item.literal and item.literal[0] == "truth" for item in tests.items)
        job = {"mode": "eval", "sources": sources, "defines": tests.names, "setup": tests.setup}
        job |= {"expressions": calls, "reduce": "truth" if truths else ""}
        run = read_values(self._run(job, call), len(calls), room=tests.room)
        flags, at, left = list[bool | None](), 0, list[tuple[Assertion, tuple[Any, ...]]]()
        for item in tests.items:
            values = run.values[at : at + len(item.calls)]
            at += len(item.calls)
            if len(values) < len(item.calls):
                break
            flags.append(item.agrees(values[0], tests.atol) if item.literal else None)
            left += [] if item.literal else [(item, values)]
        if left and False not in flags:
            judged = self._judge(left, tests, call)
            if judged.failure and (judged.failure[0] != "wrong" or not judged.loaded):
                status = "bad_gold" if not judged.loaded and judged.failure[0] == "wrong" else judged.failure[0]
                return status, f"the assertions alone: {judged.failure[1]}", run
            answers = iter([*judged.values, *[False] * len(left)])
            flags = [next(answers) is True if flag is None else flag for flag in flags]
        return *_report("assertion", flags, len(tests.items), run.failure, run.loaded), run

    def _judge(self, left: Sequence[tuple[Assertion, tuple[Any, ...]]], tests: Assertions, call: _Call) -> Values:
        """The truth of what remains of assertions, with the program's values put in: in a sandbox without it."""
        names: dict[str, Any] = {}
        expressions = []
        for row, (item, values) in enumerate(left):
            own = {f"_{i}": f"_{row}_{i}" for i in range(len(values))}
            names |= {name: encode(value) for name, value in zip(own.values(), values, strict=True)}
            expressions.append(f"(lambda {', '.join(own)}: bool({item.remainder}))({', '.join(own.values())})")
        source = "\n".join([*(f"import {module}" for module in tests.modules), *tests.setup])
        job = {"mode": "eval", "sources": [source], "names": names, "expressions": expressions}
        return read_values(self._run(job, call), len(expressions))

    def _streams(self, sources: Sequence[str], tests: Streams, call: _Call) -> tuple[str, str, Values]:
        outcome = self._run({"mode": "stdin", "sources": sources, "stdin": tests.stdin}, call)
        flags, failure = list[bool](), None
        ends = [read_values(dataclasses.replace(outcome, cases=(case,)), 0, room=[ROOM]) for case in outcome.cases]
        for case, end, text in zip(outcome.cases, ends, tests.stdout, strict=False):
            if (case.how, case.code) != ("exit", 0):
                failure = end.failure
                break
            flags.append(same_text(case.output.decode("utf-8", "replace"), text, tests.atol))
        if failure is None and (len(flags) < len(tests.stdin) or not outcome.complete):
            failure = lost(outcome)
        return *_report("case", flags, len(tests.stdin), failure, bool(outcome.cases)), (ends or [Values()])[0]

    def _expected(self, tests: FunctionTests, call: _Call) -> _Expected:
        """What the gold says, or what its reference returns: computed once, and kept, unless it may be otherwise."""
        if tests.outputs is not None:
            return _Expected(tests.outputs, tests.room)
        if tests.key in call.failed:
            return call.failed[tests.key]
        with self._lock:
            kept, own = self._kept, Future[_Expected]()
            future = kept.setdefault(tests.key, own)
            kept.move_to_end(tests.key)
            while len(kept) > KEPT_PROBLEMS:
                kept.popitem(last=False)
        if future is own:
            try:
                own.set_result(self._compute(tests, call))
            except BaseException as error:
                own.set_exception(error)
                raise
            finally:
                if own.exception() or own.result().passing:
                    with self._lock:
                        call.failed.update({} if own.exception() else {tests.key: own.result()})
                        kept.pop(tests.key, None)
        return future.result()

    def _compute(self, tests: FunctionTests, call: _Call) -> _Expected:
        job = {"mode": "call", "sources": [tests.reference], "entry_point": tests.entry_point}
        job |= {"inputs": tests.inputs, "reduce": tests.reduce}
        outcome = self._run(job, call, REFERENCE_SECONDS, REFERENCE_BYTES)
        run = read_values(outcome, len(tests.inputs), lambda _, value: None)
        if run.failure is None:
            results = outcome.cases[0].results
            room = tuple(room_of(line) for line in results.split(b"\n") if line.startswith(b'["value"'))
            return _Expected(room=room, packed=zlib.compress(results, 1), size=len(results), seconds=run.seconds)
        status, reason = run.failure
        if status == "refused" and not run.ran:
            return _Expected(failure=("refused", reason), passing=True)
        reason = f"the reference, input {len(run.values) + 1}: {reason}"
        return _Expected(failure=("bad_gold", reason), passing=status in ("timeout", "crashed"))

    def _run(self, job: Mapping[str, Any], call: _Call, seconds: float = 0.0, more_output: int = 0) -> Outcome:
        """In its turn; and once more, alone, if it timed out without having had the processor for that time."""
        seconds = max(self.deadline, min(REFERENCE_SECONDS, seconds))
        limits = Limits(seconds, self.memory_gib, Limits.output_bytes + more_output)
        with self._gate.shared():
            outcome = sandbox.run(job, limits, self.isolation)
        computed = sum(case.cpu_seconds for case in outcome.cases)
        timed_out = outcome.late or any(case.how == "deadline" for case in outcome.cases)
        if timed_out and computed < STARVED * seconds and call.may_retry():
            with self._gate.alone():
                outcome = sandbox.run(job, limits, self.isolation)
        return outcome


_SHORT = {BUBBLEWRAP: "bubblewrap", UNISOLATED: "not isolated"}


class _Gate:
    """Lets `width` programs run at a time, or one alone."""

    def __init__(self, width: int) -> None:
        self._width, self._running, self._waiting = width, 0, 0
        self._changed = threading.Condition()

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._running < self._width and not self._waiting)
            self._running += 1
        try:
            yield
        finally:
            self._leave(1)

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._waiting += 1
            self._changed.wait_for(lambda: self._running == 0)
            self._waiting -= 1
            self._running += self._width
        try:
            yield
        finally:
            self._leave(self._width)

    def _leave(self, count: int) -> None:
        with self._changed:
            self._running -= count
            self._changed.notify_all()


def _read(gold: Mapping[str, Any] | str) -> Tests | str:
    """The tests, or why there are none."""
    try:
        return read_tests(gold)
    except BadGoldError as error:
        return str(error)


def _key(gold: Mapping[str, Any] | str) -> Any:
    """Equal for golds of the same content: callers make a mapping anew for each completion."""
    try:
        return hashlib.sha256(pickle.dumps(gold if isinstance(gold, str) else dict(gold))).digest()
    except Exception:  # noqa: BLE001 - the edge to the caller's objects: `_read` says what is wrong with them
        return id(gold)


def _report(
    unit: str, flags: Sequence[bool | None], total: int, failure: tuple[Status, str] | None, loaded: bool
) -> tuple[str, str]:
    """Status and rule from the tests that gave a value, in order (None: not judged), and what ended the run."""
    count = f"{sum(flag is True for flag in flags)} of {total} {unit}s right"
    if False in flags:
        return "wrong", f"{count}; {unit} {flags.index(False) + 1}: wrong value"
    if failure is None:
        return "right", count
    status, reason = failure
    if status == "refused" and not flags and not loaded:
        return status, reason
    return status, f"{count}; {f'{unit} {len(flags) + 1}' if loaded else 'before the first'}: {reason}"


def same_text(output: str, expected: str, atol: float = 0.0) -> bool:
    """Line by line, words compared; blank lines at the end do not count. With `atol`, two numbers may differ by it."""
    wanted = [line.split() for line in expected.rstrip().split("\n")]
    got = output.rstrip().split("\n", len(wanted))  # of an enemy's output no more is taken apart than that
    return len(got) == len(wanted) and all(
        _same_words(line, words, atol) for line, words in zip(got, wanted, strict=True)
    )


def _same_words(line: str, wanted: list[str], atol: float) -> bool:
    words = line.split(None, len(wanted))
    return len(words) == len(wanted) and all(
        a == b or (atol > 0 and _near(a, b, atol)) for a, b in zip(words, wanted, strict=True)
    )


def _near(word: str, expected: str, atol: float) -> bool:
    try:
        return abs(float(word) - float(expected)) <= atol
    except ValueError:
        return False
