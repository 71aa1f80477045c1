"""Verdicts on programs: data-set rows and their canonical solutions, wrong solutions, and programs that cheat."""

from __future__ import annotations

import asyncio
import gzip
import json
import multiprocessing
import os
import pickle
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heatbath.errors import RunError
from heatbath.verify import code, sandbox
from heatbath.verify.code import BUBBLEWRAP, UNISOLATED, CodeGrader, available, find_programs
from heatbath.verify.code_tests import BadGoldError, read_tests
from heatbath.verify.verdict import Verdict

SUMS = {"entry_point": "f", "inputs": [[1, 2], [3, 4], [0, -1]], "outputs": [3, 7, -1]}
SHAPES = {"entry_point": "f", "inputs": [[3]], "reference": "def f(n): return [(i, {i}) for i in range(n)]"}


def fenced(program: str) -> str:
    return f"Here it is:\n```python\n{program}\n```\n"


@pytest.fixture(scope="module")
def grader() -> Iterator[CodeGrader]:
    reason = available(BUBBLEWRAP)
    if reason:
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    with CodeGrader(deadline=1.0, memory_gib=0.5) as made:
        yield made


@pytest.fixture(scope="module")
def roomy(grader: CodeGrader) -> Iterator[CodeGrader]:
    with CodeGrader() as made:  # HumanEval/15 and /130 have values of some 10 MB
        yield made


def verdict(grader: CodeGrader, program: str, gold: Any = SUMS) -> Verdict:
    return grader.grade([fenced(program)], [gold])[0]


def verdicts(grader: CodeGrader, pairs: Iterable[tuple[str, Any]]) -> list[Verdict]:
    programs, golds = zip(*pairs, strict=True)
    return grader.grade([fenced(program) for program in programs], golds)


# Programs that cheat, hang or fight ----------------------------------------------------------------------------------

ANYTHING = "class A:\n    def __eq__(self, o): return True\n    def __hash__(self): return 0\n"
FAILING = {
    "wrong value": ("def f(a, b): return a - b", "wrong", "wrong value"),
    "right at first": ("def f(a, b): return 3", "wrong", "1 of 3 inputs right; input 2"),
    "always equal": (ANYTHING + "def f(a, b): return A()", "wrong", "not plain data, but a value of type A"),
    "always equal int": (ANYTHING.replace("A:", "A(int):") + "def f(a, b): return A(9)", "wrong", "not plain"),
    "always equal text": (ANYTHING.replace("A:", "A(str):") + "def f(a, b): return A('x')", "wrong", "not plain"),
    "always equal list": (ANYTHING.replace("A:", "A(list):") + "def f(a, b): return A()", "wrong", "not plain"),
    "always equal inside": (ANYTHING + "def f(a, b): return [A()]", "wrong", "not plain"),
    "a type as a name": (ANYTHING + "A.__name__ = 'int'\ndef f(a, b): return A()", "wrong", "not plain"),
    "sys.exit": ("import sys\ndef f(a, b): sys.exit(0)", "wrong", "raised SystemExit: 0"),
    "sys.exit at the top": ("import sys\nsys.exit(0)", "wrong", "before the first: raised SystemExit"),
    "os._exit": ("import os\ndef f(a, b): os._exit(0)", "wrong", "ended early (exit code 0)"),
    "os._exit at the top": ("import os\nos._exit(0)", "wrong", "ended early (exit code 0)"),
    "exception": ("def f(a, b): return 1 / 0", "wrong", "raised ZeroDivisionError"),
    "exception of an exception": (
        "class E(Exception):\n    def __str__(self): raise self\ndef f(a, b): raise E", "wrong", "exit code 96"),
    "no function": ("def g(a, b): return a + b", "wrong", "f is not defined"),
    "does not compile": ("def f(a, b) return a + b", "wrong", "does not compile"),
    "NUL": ("def f(a, b): return a + b\0", "wrong", "does not compile"),
    "nested parentheses": ("x = " + "(" * 5000 + ")" * 5000, "wrong", "does not compile"),
    "generator": ("def f(a, b): yield a + b", "wrong", "not plain data, but a value of type generator"),
    "infinite generator": ("def f(a, b):\n    while True: yield 1", "wrong", "not plain"),
    "self-containing list": ("def f(a, b):\n    x = []\n    x.append(x)\n    return x", "wrong", "too deep"),
    "huge value": ("def f(a, b): return 'x' * 20_000_000", "wrong", "too large"),
    "many large values": ("def f(a, b): return 'x' * 9_000_000", "wrong", "wrong value"),
    "patched json": (
        "import json\njson.dumps = lambda *a, **k: '[\"value\", 0, 3]'\ndef f(a, b): return 3", "wrong", "wrong value"),
    "patched builtins": (
        "import builtins\nbuiltins.type = lambda *a: int\nbuiltins.len = lambda x: 0\ndef f(a, b): return 9",
        "wrong", ""),
    "forged results": (
        "import os\ndef f(a, b):\n    for i in range(3): os.write(3, b'[\"value\", %d, 3]\\n' % i)\n    os._exit(0)",
        "wrong", "1 of 3 inputs right; input 2: wrong value"),
    "forged junk": (
        "import os\ndef f(a, b):\n    os.write(3, b'\\xff[[[\\n' * 99)\n    os._exit(0)", "wrong", "unreadable"),
    "forged depth": (
        "import os\ndef f(a, b):\n    os.write(3, b'[' * 10**4 + b'\\n')\n    os._exit(0)", "wrong", "unreadable"),
    "forged hash collisions": (
        "import os\ndef f(a, b):\n    s = ','.join('[\"i\",\"%x\"]' % (i * (2**61 - 1)) for i in range(2000))\n"
        "    os.write(3, ('[\"value\",0,[\"s\",%s]]\\n' % s).encode())\n    os._exit(0)", "wrong", "unreadable"),
    "polluted output": (
        "print('[\"value\", 0, 3]' * 1000)\ndef f(a, b):\n    print('\\0E' * 999); return 8", "wrong", "wrong value"),
    "closed files": ("import os\nos.closerange(0, 99)\ndef f(a, b): return a + b", "wrong", ""),
    "exit handlers": (
        "import atexit, os\natexit.register(lambda: os.write(3, b'[\"value\", 2, -1]\\n'))\n"
        "def f(a, b):\n    if a == 0: raise SystemExit\n    return a + b", "wrong", "2 of 3 inputs right"),
    "replaced exit": ("import os\nos._exit = lambda c: None\ndef f(a, b): raise ValueError", "wrong", "ValueError"),
    "reads the gold from the runner": (
        "import gc\ndef f(a, b):\n    seen = [o for o in gc.get_objects() if isinstance(o, dict) and 'outputs' in o]\n"
        "    return seen[0]['outputs'][0]", "wrong", "raised IndexError"),
    "infinite loop": ("def f(a, b):\n    while True: pass", "timeout", "no end within 1"),
    "sleep": ("import time\ntime.sleep(999)", "timeout", "before the first"),
    "memory": ("def f(a, b): return [bytes(10**8) for _ in range(99)]", "crashed", "out of memory"),
    "segmentation fault": ("import ctypes\ndef f(a, b): ctypes.string_at(0)", "crashed", "killed by signal 11"),
    "kill -1": ("import os\ndef f(a, b): os.kill(-1, 9)", "wrong", "raised ProcessLookupError"),
    "10 GB of output": (
        "def f(a, b):\n    for _ in range(10**4): print('x' * 10**6)\n    return a + b", "refused", "output"),
    "fork bomb": (
        "import os\ndef f(a, b):\n    while True:\n        try: os.fork()\n        except OSError: pass",
        ("timeout", "crashed"), ""),
    "doubled process": ("import os\ndef f(a, b):\n    os.fork()\n    return a + b + 1", "wrong", ""),
    "network": (
        "import urllib.request as u\ndef f(a, b): return u.urlopen('http://1.1.1.1').status", "wrong", "URLError"),
    "shadow": ("def f(a, b): return open('/etc/shadow').read()", "wrong", "raised FileNotFoundError"),
    "not on the module path": ("import heatbath\ndef f(a, b): return a + b", "wrong", "raised ModuleNotFoundError"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILING)
def test_a_program_that_does_not_compute_it_is_not_right(grader: CodeGrader, name: str) -> None:
    program, statuses, words = FAILING[name]
    got = verdict(grader, program)
    assert got.status in ((statuses,) if isinstance(statuses, str) else statuses), got
    assert words in got.rule and got.rule.startswith("bubblewrap: "), got
    assert got.score == 0.0 and got.answer is not None and program.startswith(got.answer[:50].strip())


# Formats -------------------------------------------------------------------------------------------------------------

ADD = "def f(a, b): return a + b"
RIGHT = {
    "outputs": (ADD, SUMS),
    "JSON text": (ADD, json.dumps(SUMS)),
    "reference": ("def f(n): return [(k, set([k])) for k in range(n)]", SHAPES),
    "debug prints": ("def f(a, b):\n    print('adding', a, b)\n    return a + b", SUMS),
    "a class with helpers": (
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int'\ndef f(a, b): return P(a).x + P(b).x",
        SUMS),
    "only run as a script": (
        ADD + "\nif __name__ == '__main__': raise SystemExit(f(*map(int, input().split())))", SUMS),
    "near a float": (
        "def f(x): return x * 0.1 * 3", {"entry_point": "f", "inputs": [[1]], "outputs": [0.3]}),
    "atol": ("def f(x): return 3.14", {"entry_point": "f", "inputs": [[1]], "outputs": [3.1415], "atol": 0.01}),
    "a tuple for a list of JSON": (
        "def f(x): return (x, x)", json.dumps({"entry_point": "f", "inputs": [[1]], "outputs": [[1, 1]]})),
    "nan": (
        "def f(x): return float('nan')",
        {"entry_point": "f", "inputs": [[1]], "reference": "def f(x): return 1e999 - 1e999"}),
    "counter": (
        "from collections import Counter as f",
        {"entry_point": "f", "inputs": [["aab"]], "outputs": [{"a": 2, "b": 1}]}),
    "a compatible name": ("def ﬁ(x): return x", {"entry_point": "\ufb01", "inputs": [[1]], "outputs": [1]}),
    "large integer": (
        "def f(n): return 10**n", {"entry_point": "f", "inputs": [[9999]], "reference": "def f(n): return 10**n"}),
    "input is changed": (
        "def f(x):\n    x.append(1)\n    return x",
        {"entry_point": "f", "inputs": [[[0]]] * 2, "outputs": [[0, 1]] * 2}),
    "stdin": (
        "a, b = map(int, input().split())\nprint(a + b)", {"stdin": ["1 2\n", "3 4\n"], "stdout": ["3\n", "7"]}),
    "white space": ("print(' 1  2 \\n3\\n\\n')", {"stdin": [""], "stdout": ["1 2\n3\n"]}),
    "numbers of a text": ("print('x', 0.3333)", {"stdin": [""], "stdout": ["x 0.33333333"], "atol": 1e-3}),
    "a script's exit": ("import sys\nprint(1)\nsys.exit()", {"stdin": [""], "stdout": ["1"]}),
    "a script's thread": (
        "import threading\nthreading.Thread(target=lambda: print(input())).start()", {"stdin": ["é"], "stdout": ["é"]}),
    "a script's main": (
        "if __name__ == '__main__': print(open('/dev/stdin').read())", {"stdin": ["a"], "stdout": ["a"]}),
}  # fmt: skip


def test_right_programs(roomy: CodeGrader) -> None:
    found = zip(RIGHT, verdicts(roomy, RIGHT.values()), strict=True)
    assert [(name, got) for name, got in found if got.status != "right" or got.score != 1.0] == []


WRONG = {
    "list for tuple": ("def f(n): return [[k, {k}] for k in range(n)]", SHAPES),
    "off by 1e-3": ("def f(x): return 0.301", {"entry_point": "f", "inputs": [[1]], "outputs": [0.3]}),
    "500 for 5": ("def f(x): return 500", {"entry_point": "f", "inputs": [[1]], "outputs": [5]}),
    "text for number": ("def f(x): return '5'", {"entry_point": "f", "inputs": [[1]], "outputs": [5]}),
    "one case wrong": ("print(3)", {"stdin": ["1 2\n", "3 4\n"], "stdout": ["3\n", "7"]}),
    "a line too many": ("print(1)\nprint(2)", {"stdin": [""], "stdout": ["1"]}),
    "words joined": ("print('12')", {"stdin": [""], "stdout": ["1 2"]}),
    "a script that fails": ("print(1)\nraise ValueError", {"stdin": [""], "stdout": ["1"]}),
    "a script's bad exit": ("import sys\nprint(1)\nsys.exit(1)", {"stdin": [""], "stdout": ["1"]}),
    "a script's quick exit": ("import os\nprint(1)\nos._exit(0)", {"stdin": [""], "stdout": ["1"]}),
    "no number": ("print('nan')", {"stdin": [""], "stdout": ["1"], "atol": 1.0}),
}


def test_wrong_programs(roomy: CodeGrader) -> None:
    found = zip(WRONG, verdicts(roomy, WRONG.values()), strict=True)
    assert [(name, got) for name, got in found if got.status != "wrong"] == []


ASSERTIONS = [  # the program, the assertion, the status
    ("def f(x): return x + 1", "assert f(1) == 2", "right"),
    ("def f(x): return x + 1", "assert 2 == f(1), 'message'", "right"),
    ("def f(x): return x + 1", "assert (f(1)) == 3", "wrong"),
    ("def f(x): return (x,)", "assert f(1) == (1,)", "right"),
    ("def f(x): return [x]", "assert f(1) == (1,)", "wrong"),
    ("def f(x): return [x, x]", "assert set(f(1)) == set([1])", "right"),
    ("def set(x): return 5\ndef f(x): return 5", "assert set(f(1)) == set([5, 6])", "wrong"),
    ("def f(x): return 0.3333", "assert math.isclose(f(1), 1 / 3, rel_tol=1e-3)", "right"),
    ("class math: isclose = lambda *a, **k: True\ndef f(x): return 9", "assert math.isclose(f(1), 1 / 3)", "wrong"),
    ("def abs(x): return 0\ndef f(x): return 9", "assert abs(f(1) - 3) < 1e-6", "wrong"),
    ("def f(x): return 3.0000001", "assert abs(f(1) - 3) < 1e-6", "right"),
    ("def f(x): return None", "assert abs(f(1) - 3) < 1e-6", "wrong"),
    ("def f(x): return 'no'", "assert f(1)", "right"),
    ("def f(x): return 0", "assert f(1)", "wrong"),
    ("import re\ndef f(x): return re.match('a', x)", "assert f('a')", "right"),
    ("import re\ndef f(x): return re.match('a', x)", "assert not f('a')", "wrong"),
    ("def f(x): return []", "assert not f(1)", "right"),
    ("def f(x): return 1", "assert f(1) is True", "wrong"),
    ("def f(x): return True", "assert f(1) is True", "right"),
    ("def f(x): return None", "assert f(1) is None", "right"),
    ("def f(x): return 4", "assert f(1) in (3, 4) and f(2) > 3", "right"),
    ("def f(x): return 4", "assert f(1) != f(2)", "wrong"),
    ("def f(x): return x", "assert [f(1), f(2)] == [1, 2]", "right"),
    ("def f(x): return x", "assert len(str(f(1))) == 1", "right"),
    ("class S:\n    def f(self, x): return [x]", "assert S().f(1)[0] == 1", "right"),
    (ANYTHING + "def f(x): return A()", "assert f(1) == 2", "wrong"),
    (ANYTHING + "def f(x): return A()", "assert len(f(1)) == 2", "wrong"),
    ("f = 3", "assert f(1) == 2", "wrong"),
    ("def f(x): return 1", "assert all(f(x) == 1 for x in range(3))", "bad_gold"),
    ("def f(x): return 1", "assert sorted([1], key=f) == [1]", "bad_gold"),
    ("def f(x): return 1", "assert True", "bad_gold"),
    ("def f(x): return 1", "assert len([1]) == 1", "wrong"),
    ("def sum(x, y): return x + y", "assert sum(1, 2) == 3", "right"),
    ("def statistics(x): return x", "assert statistics(1) == 1", "right"),
    ("def f(x): return 1", "f(1)", "bad_gold"),
    ("def f(x): return 1", "assert f(1) == 1; import os", "bad_gold"),
    ("def f(x): return 1", "assert f(1 ==", "bad_gold"),
    ("def f(x): return 1", "assert f(1) == " + "-" * 5000 + "1", "bad_gold"),
]


def test_assertions_are_judged_without_the_program(roomy: CodeGrader) -> None:
    found = verdicts(roomy, [(program, {"test_list": [assertion]}) for program, assertion, _ in ASSERTIONS])
    assert [got.status for got in found] == [status for _, _, status in ASSERTIONS]
    assert all(got.rule and (got.score is None) == (got.status == "bad_gold") for got in found)


def test_assertions_may_have_a_setup_of_the_programs_own_classes(grader: CodeGrader) -> None:
    gold = {"test_setup_code": "root = Node(3)", "test_list": ["assert f(root) == 3"], "test_imports": ["import math"]}
    program = "class Node:\n    def __init__(self, x): self.x = x\ndef f(n): return n.x"
    assert verdict(grader, program, gold).status == "right"
    gold["test_list"] = ["assert abs(f(root)) < math.inf"]  # judged without Node
    assert verdict(grader, program, gold).status == "bad_gold"


BAD_GOLDS = {
    "not JSON": "{",
    "not a mapping": "[1]",
    "nothing": {"entry_point": "f"},
    "no inputs": {**SUMS, "inputs": []},
    "inputs are no lists": {**SUMS, "inputs": [1, 2, 3]},
    "a missing output": {**SUMS, "outputs": [3]},
    "neither outputs nor reference": {"entry_point": "f", "inputs": [[1]]},
    "no entry point": {"inputs": [[1]], "outputs": [1]},
    "entry point is code": {**SUMS, "entry_point": "f; import os"},
    "entry point is a keyword": {**SUMS, "entry_point": "clas\uff53"},
    "inputs are a number": {**SUMS, "inputs": 5},
    "base_input is a number": {"task_id": "Mbpp/3", "base_input": 5, "plus_input": 6},
    "atol beyond floats": {**SUMS, "atol": 10**400},
    "input is an object": {**SUMS, "inputs": [[object()]] * 3},
    "negative atol": {**SUMS, "atol": -1},
    "atol is text": {**SUMS, "atol": "1"},
    "reference fails": {"entry_point": "f", "inputs": [[1]], "reference": "def f(x): return 1 / 0"},
    "reference has another name": {"entry_point": "f", "inputs": [[1]], "reference": "def g(x): return 1"},
    "reference returns an object": {"entry_point": "f", "inputs": [[1]], "reference": "def f(x): return object()"},
    "no assertions": {"test_list": []},
    "stdin without stdout": {"stdin": ["1"], "stdout": []},
    "stdin is not text": {"stdin": [1], "stdout": [1]},
    "HumanEval's check": {"entry_point": "f", "prompt": "", "test": "def check(f): assert f(1) == 1"},
    "neither plus set": {**SUMS, "task_id": "Other/1", "base_input": [[1]]},
    "a broken row of MBPP+": {"task_id": "Mbpp/2", "entry_point": "f", "canonical_solution": "", "base_input": [[1]]},
}


@pytest.mark.parametrize("name", BAD_GOLDS)
def test_a_bad_gold_is_named(grader: CodeGrader, name: str) -> None:
    got = verdict(grader, "def f(*a): return 1", BAD_GOLDS[name])
    assert got.status == "bad_gold" and got.score is None and len(got.rule) > 10, got


# The program in a completion -----------------------------------------------------------------------------------------

PROMPT = 'import math\n\ndef f(x: int) -> int:\n    """ Twice x. """\n'
COMPLETIONS = {  # completion, the rule of the program that is run (None: no answer), whether it is right
    "block": ("```python\ndef f(x): return 2 * x\n```", "last Python block", True),
    "the last block": (
        "```python\ndef f(x): return 1\n```\nNo:\n```python\ndef f(x): return 2 * x\n```", "last Python", True),
    "an example after it": ("```python\ndef f(x): return 2 * x\n```\n```python\nprint(f(1))\n```", "last Python", True),
    "another language after it": ("```py\ndef f(x): return 2 * x\n```\n```bash\npython f.py\n```", "last Python", True),
    "output after it": ("```python\ndef f(x): return 2 * x\n```\nprints\n```\n4\n```", "last Python block", True),
    "unnamed block": ("So\n```\ndef f(x): return 2 * x\n```", "last block", True),
    "block without an end": ("So\n```python\ndef f(x): return 2 * x\n", "no end", True),
    "tildes and longer fences": (
        "~~~~python\ndef f(x):\n    '''\n~~~\n'''\n    return 2 * x\n~~~~", "last Python", True),
    "block with the body": ("```python\n    return 2 * x\n```", "last Python block", True),
    "uses the prompt's import": ("```python\ndef f(x): return int(2 * math.fabs(x))\n```", "last Python", True),
    "from the future": (
        "```python\nfrom __future__ import annotations\ndef f(x: y): return 2 * x\n```", "last", True),
    "body": ("    return 2 * x\n", "continues the prompt", True),
    "body, then more": ("    return 2 * x\n\n\ndef g(:\nThis is", "continues the prompt", True),
    "body, then a fence": ("    return 2 * x\n```\nIt doubles x.\n", "continues the prompt", True),
    "body, then a fence and a block": ("    return 2 * x\n```\nUse:\n```python\nf(2)\n```", "continues", True),
    "function, then a fence": ("def f(x):\n    return 2 * x\n```\nIt doubles x.", "up to the closing fence", True),
    "whole text": ("def f(x):\n    return 2 * x", "whole text", True),
    "wrong body": ("    return 3 * x\n", "continues the prompt", False),
    "prose": ("I would multiply it by two, that is all.", None, False),
    "indented prose": ("  I would multiply it by two.", None, False),
    "empty": ("", None, False),
    "white space": (" \n\t\n", None, False),
    "text in another block": ("```text\nhello\n```", None, False),
}  # fmt: skip


def test_the_program_in_a_completion(roomy: CodeGrader) -> None:
    gold = {"entry_point": "f", "prompt": PROMPT, "inputs": [[2], [5]], "outputs": [4, 10]}
    found = roomy.grade([completion for completion, _, _ in COMPLETIONS.values()], [gold] * len(COMPLETIONS))
    for got, (name, (_, rule, right)) in zip(found, COMPLETIONS.items(), strict=True):
        assert got.status == ("no_answer" if rule is None else "right" if right else "wrong"), (name, got)
        assert (rule or "no code") in got.rule and (rule is None) == (got.answer is None), (name, got)


def test_without_a_prompt_text_that_defines_nothing_is_no_answer() -> None:
    assert find_programs("42", "", ("f",)) == [] and find_programs("print(1)")
    assert find_programs("f = lambda x: x", "", ("f",))[0].rule == "whole text"


def test_a_long_completion_is_refused(grader: CodeGrader) -> None:
    got = verdict(grader, "#" * code.MAX_COMPLETION)
    assert got.status == "refused" and "200000" in got.rule


# The grader ----------------------------------------------------------------------------------------------------------


def test_order_is_kept_and_one_bomb_delays_only_itself(grader: CodeGrader) -> None:
    programs = [f"def f(a, b): return a + b + {i % 2}" for i in range(8)]
    programs[3] = "def f(a, b):\n    while True: pass"
    statuses = [got.status for got in grader.grade([fenced(p) for p in programs], [SUMS] * 8)]
    assert statuses == ["right", "wrong", "right", "timeout", "right", "wrong", "right", "wrong"]


def test_the_reference_and_equal_programs_run_once(grader: CodeGrader, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, real = [], sandbox.run

    def counted(job: Any, limits: Any, isolation: str) -> sandbox.Outcome:
        runs.append(job)
        return real(job, limits, isolation)

    monkeypatch.setattr(sandbox, "run", counted)
    grader.close()
    program = fenced("def f(n): return [(k, {k}) for k in range(n)]")
    for _ in range(2):
        verdicts = grader.grade([program, "no code", program, fenced("f = 1"), program], [SHAPES] * 5)
        assert [got.status for got in verdicts] == ["right", "no_answer", "right", "wrong", "right"]
    assert len(runs) == 1 + 2 * 2
    grader.grade([program] * 2, [SHAPES, SUMS])  # another problem's tests are other inputs
    assert len(runs) == 1 + 2 * 2 + 2
    killed = fenced("import os\nos.kill(os.getpid(), 9)")  # a failure may be the machine's: every copy has its own
    assert [got.status for got in grader.grade([killed] * 3, [SUMS] * 3)] == ["crashed"] * 3
    assert len(runs) == 1 + 2 * 2 + 2 + 3


def test_a_starved_program_is_tried_again_alone(grader: CodeGrader, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, real = [], sandbox.run

    def starved(job: Any, limits: Any, isolation: str) -> sandbox.Outcome:
        outcome = real(job, limits, isolation)
        runs.append(job)
        late = [replace(case, how="deadline", code=9, cpu_seconds=0.1, results=b"") for case in outcome.cases]
        return replace(outcome, cases=tuple(late)) if len(runs) == 1 else outcome

    monkeypatch.setattr(sandbox, "run", starved)
    assert verdict(grader, ADD).status == "right" and len(runs) == 2


def in_a_fork(grader: CodeGrader, connection: Any) -> None:
    connection.send(verdict(grader, ADD).status)


def test_from_threads_event_loops_forks_and_pickles(grader: CodeGrader) -> None:
    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(lambda _: verdict(grader, ADD).status, range(8))) == {"right"}

    async def main() -> list[Verdict]:
        return (await asyncio.gather(*(asyncio.to_thread(grader.grade, [fenced(ADD)], [SUMS]) for _ in range(4))))[0]

    assert asyncio.run(main())[0].status == "right"
    with grader._lock, grader._gate.shared():  # as another thread may hold them when a worker is forked
        ours, theirs = multiprocessing.Pipe()
        worker = multiprocessing.get_context("fork").Process(target=in_a_fork, args=(grader, theirs))
        worker.start()
        assert ours.poll(60) and ours.recv() == "right"
        worker.join(60)
    assert verdict(pickle.loads(pickle.dumps(grader)), ADD).status == "right"


def test_without_bubblewrap_everything_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.shutil, "which", lambda _: None)
    monkeypatch.setattr(sandbox, "_WORKING", set())
    for gold in (SUMS, SHAPES, {"test_list": ["assert f(1, 2) == 3"]}, {"stdin": [""], "stdout": ["1"]}):
        got = verdict(CodeGrader(), ADD, gold)
        assert got.status == "refused" and "bwrap is not installed (apt-get install bubblewrap)" in got.rule
        assert UNISOLATED in got.rule and got.score == 0.0


def test_the_weak_level_says_so_in_every_verdict() -> None:
    weak = CodeGrader(isolation=UNISOLATED, deadline=1.0)
    assert verdict(weak, ADD).rule.startswith("not isolated: 3 of 3 inputs right")
    assert verdict(weak, "def f(a, b):\n    while True: pass").status == "timeout"
    with pytest.raises(RunError, match="run model code as my own user"):
        CodeGrader(isolation="none")


@pytest.mark.parametrize("settings", [{"workers": 0}, {"deadline": 0}, {"deadline": 601}, {"memory_gib": 0}])
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(RunError, match=r"remedy: give it"):
        CodeGrader(**settings)
    assert CodeGrader(deadline=600).deadline == 600


def test_as_many_golds_as_completions(grader: CodeGrader) -> None:
    assert grader.grade([], []) == []
    with pytest.raises(ValueError, match="1 completions, but 2 golds"):
        grader.grade([""], [SUMS, SUMS])


# Data sets -----------------------------------------------------------------------------------------------------------


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / name
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return json.loads(text) if text.startswith("[") else [json.loads(line) for line in text.splitlines()]


PLUS = {"humaneval": "humanevalplus/HumanEvalPlus.jsonl.gz", "mbpp": "mbppplus/MbppPlus.jsonl.gz"}
SPECIAL = {"HumanEval/32", "Mbpp/2", "Mbpp/115", "Mbpp/124", "Mbpp/252", "Mbpp/558", "Mbpp/581", "Mbpp/737", "Mbpp/793"}


def solution(row: dict[str, Any], old: str = "", new: str = "") -> str:
    body = row["canonical_solution"].replace(old, new, 1) if old else row["canonical_solution"]
    return body if row["task_id"].startswith("HumanEval") else fenced(body)


def spread(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """20 over the whole set, none of the few that take seconds, and those of special rules."""
    return [row for i, row in enumerate(rows) if i % (len(rows) // 20) == 5][:20] + [
        row for row in rows if row["task_id"] in SPECIAL
    ]


@pytest.mark.thorough
@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PLUS)
def test_canonical_solutions_are_right(roomy: CodeGrader, shared_data: Path, name: str, full: bool) -> None:
    rows = rows_of(shared_data, PLUS[name])
    assert len(rows) == {"humaneval": 164, "mbpp": 378}[name]
    rows = rows if full else spread(rows)
    found = roomy.grade([solution(row) for row in rows], rows)
    failed = [(row["task_id"], got) for row, got in zip(rows, found, strict=True) if got.status != "right"]
    assert not failed and len(rows) >= 20


@pytest.mark.parametrize("name", [pytest.param("humaneval", marks=pytest.mark.slow), "mbpp"])
def test_canonical_solutions_with_a_fault_are_wrong(roomy: CodeGrader, shared_data: Path, name: str) -> None:
    """The first return gives another value: a text around it."""
    rows = [row for row in spread(rows_of(shared_data, PLUS[name])) if "return " in row["canonical_solution"]]
    faulty = [re.sub(r"return (.+)", r"return [str(\1)]", solution(row)) for row in rows]
    found = roomy.grade(faulty, rows)
    passed = [(row["task_id"], got) for row, got in zip(rows, found, strict=True) if got.status == "right"]
    # "matched or not" asks only whether there is a value
    assert [task for task, _ in passed if task != "Mbpp/737"] == [] and len(rows) >= 10


@pytest.mark.parametrize("name", ["spread", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sanitized", "mbpp"))])
def test_mbpp_assertions(roomy: CodeGrader, shared_data: Path, name: str) -> None:
    rows = rows_of(shared_data, f"mbpp/{name.replace('spread', 'mbpp')}.jsonl")
    rows = spread(rows) if name == "spread" else rows
    found = roomy.grade([fenced(row["code"]) for row in rows], rows)
    failed = [(row["task_id"], got) for row, got in zip(rows, found, strict=True) if got.status != "right"]
    assert not failed and len(rows) >= 10


def test_humaneval_without_plus_is_refused_by_name(shared_data: Path) -> None:
    with pytest.raises(BadGoldError, match="beside the program"):
        read_tests(rows_of(shared_data, "humaneval/HumanEval.jsonl.gz")[0])
