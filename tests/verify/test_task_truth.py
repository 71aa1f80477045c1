"""Every row of every task that is graded here: the reference sent as a completion is right, a corrupted one is not.

No exception is needed. A reference is sent in the form that the prompt asks for; a corrupted one has another last
number, another option, or another value returned. Fast: all rows of the mathematics tasks and of ARC, a spread of the
larger sets. Slow: every row.
"""

import json
import re
import string
from pathlib import Path

import pytest

from heatbath.data.rows import Row
from heatbath.data.tasks import Task, find
from heatbath.verify.code import CodeGrader
from heatbath.verify.graders import as_gold

MATH = ["gsm8k", "math500", "aime24", "aime25", "olympiadbench"]
BUILT_IN = ["arithmetic", "reasoning_gym:chain_sum"]
CHOICE = ["mmlu_pro", "mmlu_redux", "mmlu_redux_v1", "arc_challenge"]
STRIDE = {"mmlu_pro": 12, "mmlu_redux": 5, "mmlu_redux_v1": 5, "arc_challenge": 1}
# Programs that need seconds (their references compute that long): left to the slow set.
LONG = {"HumanEval/15", "HumanEval/139", "Mbpp/255", "Mbpp/599"}


def statuses(task: Task, completions: list[str], rows: list[Row]) -> list[str]:
    golds = [as_gold(task.kind, str(row.answer)) for row in rows]
    with task.grader(workers=2) as grader:
        return [verdict.status for verdict in grader.grade(completions, golds)]


def unlike(found: list[str], status: str, completions: list[str], rows: list[Row]) -> list[tuple[str, ...]]:
    """The rows whose verdict is another one."""
    told = zip(found, completions, rows, strict=True)
    return [(got, text[-200:], str(row.answer)[-200:], row.origin) for got, text, row in told if got != status]


def corrupted(answer: str) -> str:
    """The answer with its last number raised by one; one without a number is added 1 to."""
    numbers = list(re.finditer(r"[0-9]+", answer))
    if not numbers:
        return f"({answer}) + 1"
    last = numbers[-1]
    return f"{answer[: last.start()]}{int(last.group()) + 1}{answer[last.end() :]}"


def check_mathematics(task: Task, rows: list[Row]) -> None:
    for form in ("We get the result step by step.\n\nThe final answer is \\boxed{%s}.", "\\boxed{%s}"):
        right = [form.replace("%s", str(row.answer)) for row in rows]
        wrong = [form.replace("%s", corrupted(str(row.answer))) for row in rows]
        assert not unlike(statuses(task, right, rows), "right", right, rows)
        assert not unlike(statuses(task, wrong, rows), "wrong", wrong, rows)


@pytest.mark.parametrize("name", MATH)
def test_mathematics(shared_data: Path, name: str) -> None:
    check_mathematics(find(name), find(name).rows(shared_data))


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_mathematics(name: str) -> None:
    check_mathematics(find(name), find(name).rows())


def labels(row: Row) -> tuple[list[str], str]:
    gold = json.loads(str(row.answer))
    options = gold["options"]
    named = list(options) if isinstance(options, dict) else list(string.ascii_uppercase[: len(options)])
    return named, gold["gold"]


def check_choices(task: Task, rows: list[Row]) -> None:
    for form in ("Let us see.\nThe answer is (%s).", "Let us see. So it is \\boxed{%s}."):
        right = [form.replace("%s", labels(row)[1]) for row in rows]
        assert not unlike(statuses(task, right, rows), "right", right, rows)
        for shift in (1, -1):
            wrong = []
            for row in rows:
                named, gold = labels(row)
                wrong.append(form.replace("%s", named[(named.index(gold) + shift) % len(named)]))
            assert not unlike(statuses(task, wrong, rows), "wrong", wrong, rows)


@pytest.mark.parametrize("name", CHOICE)
def test_choices(shared_data: Path, name: str) -> None:
    rows = find(name).rows(shared_data)[:: STRIDE[name]]
    assert len(rows) >= 600
    check_choices(find(name), rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOICE)
def test_every_choice(shared_data: Path, name: str) -> None:
    check_choices(find(name), find(name).rows(shared_data))


def program(row: Row) -> tuple[str, str]:
    """The reference in a Python block, whole as the prompt wants it, and one whose functions return another value."""
    gold = json.loads(str(row.answer))
    prompt = gold["prompt"] if gold["task_id"].startswith("HumanEval") else ""
    source = prompt + gold["canonical_solution"]
    name = gold["entry_point"]
    broken = (
        f"{source}\n\n_right = {name}\n\n\ndef {name}(*given, **more):\n    return ['no', _right(*given, **more)]\n"
    )
    return f"Here it is:\n```python\n{source}\n```\n", f"```python\n{broken}\n```"


def check_programs(task: Task, rows: list[Row]) -> None:
    golds = [json.loads(str(row.answer)) for row in rows]
    told = [program(row) for row in rows]
    with CodeGrader(workers=2, deadline=30.0) as grader:
        found = grader.grade([right for right, _ in told], golds)
        failed = [
            (gold["task_id"], verdict) for gold, verdict in zip(golds, found, strict=True) if verdict.status != "right"
        ]
        assert not failed
        found = grader.grade([wrong for _, wrong in told], golds)
    assert not [(g["task_id"], v) for g, v in zip(golds, found, strict=True) if v.status != "wrong"]


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["humaneval_plus", "mbpp_plus"])
def test_a_spread_of_programs(shared_data: Path, name: str, needs) -> None:
    needs("bwrap")
    rows = find(name).rows(shared_data)[3 :: 16 if name == "humaneval_plus" else 38]
    check_programs(find(name), [row for row in rows if json.loads(str(row.answer))["task_id"] not in LONG])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["humaneval_plus", "mbpp_plus"])
def test_every_program(shared_data: Path, name: str, needs) -> None:
    needs("bwrap")
    check_programs(find(name), find(name).rows(shared_data))
