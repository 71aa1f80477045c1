"""The sandbox under attack: every program here must fail, and leave this machine as it was."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heatbath.verify import code, inside, sandbox
from heatbath.verify.code import CodeGrader
from heatbath.verify.code_tests import read_tests, same
from heatbath.verify.inside import NotPlainError, decode, encode
from heatbath.verify.sandbox import BUBBLEWRAP, UNISOLATED, Limits

SECONDS = 1.0
HANG = 60.0  # no attack may hold the caller for longer


@pytest.fixture(scope="module")
def bubblewrap() -> str:
    reason = sandbox.available(BUBBLEWRAP)
    if reason:
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    return BUBBLEWRAP


def call(program: str, isolation: str = BUBBLEWRAP, **limits: Any) -> sandbox.Outcome:
    """`f()` of the program, as the only test."""
    job = {"mode": "call", "sources": [program], "entry_point": "f", "inputs": [encode([])]}
    began = time.monotonic()
    outcome = sandbox.run(job, Limits(**{"seconds": SECONDS, "memory_gib": 0.5, **limits}), isolation)
    assert time.monotonic() - began < HANG
    assert not outcome.refusal, outcome.refusal
    return outcome


def result(program: str, isolation: str = BUBBLEWRAP) -> str:
    """What `f()` returned, as the sandbox reported it."""
    outcome = call(program, isolation)
    assert outcome.complete and outcome.cases[0].how == "exit"
    return outcome.cases[0].results.decode()


MARK = f"# of the tests of process {os.getpid()}"


@pytest.fixture(autouse=True)
def _marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our processes are told from those of others who use sandboxes on this machine at the same time."""
    text = sandbox._inside() + MARK
    monkeypatch.setattr(sandbox, "_inside", lambda: text)


def processes() -> list[str]:
    """Commands of all processes of this machine that these tests started in a sandbox, or as one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes().decode("utf-8", "replace"))
        except OSError:
            continue
    return [command for command in found if MARK in command]


def all_ended() -> bool:
    """Within seconds: the kernel ends what was killed one process after the other."""
    ends_at = time.monotonic() + HANG / 2
    while processes() and time.monotonic() < ends_at:
        time.sleep(0.05)
    return not processes()


@pytest.mark.parametrize("isolation", sandbox.LEVELS)
def test_a_plain_value_comes_back_at_every_level(isolation: str) -> None:
    if sandbox.available(isolation):
        pytest.skip(str(sandbox.available(isolation)))
    assert '["value", 0, ["d", 1, ["t", 2.5, "\\u00fc", null]]]' in result(
        "def f(): return {1: (2.5, 'ü', None)}", isolation
    )


UNREACHABLE = {
    "shadow": "open('/etc/shadow').read()",
    "passwd": "open('/etc/passwd').read()",
    "home": "os.listdir(os.path.expanduser('~root'))[0] and os.listdir('/root/.ssh')",
    "this file": f"open({str(Path(__file__).resolve())!r}).read()",
    "network": "socket.create_connection(('1.1.1.1', 53), timeout=2)",
    "name lookup": "socket.getaddrinfo('example.org', 80)",
    "virtual machine socket": "socket.socket(40, socket.SOCK_STREAM)",
    "write to the system": "open('/usr/x', 'w')",
    "write to the root": "open('/x', 'w')",
    "shared memory file": "open('/dev/shm/x', 'w')",
    "memory file": "os.memfd_create('x')",
    "system settings": "open('/proc/sys/kernel/hostname', 'w')",
    "the runner's pipe": "open('/proc/%d/fd/1' % os.getppid(), 'w')",
    "the runner's memory": "open('/proc/%d/mem' % os.getppid(), 'rb').read(1)",
    "the first process's memory": "open('/proc/1/mem', 'r+b', buffering=0)",
    "the first process's memory, read": "open('/proc/1/mem', 'rb', buffering=0)",
    "the first process's job and secret": "open('/proc/1/fd/0', 'rb')",
    "the first process's frames": "open('/proc/1/fd/1', 'wb')",
    "the first process's system call": "open('/proc/1/syscall').read()",
    "a process of the host": f"os.kill({os.getpid()}, 0) if os.getppid() < 100 else None",
    "new namespace": "os.getuid() and subprocess.run(['unshare', '-U', 'true'], check=True)",
    "become root": "os.setuid(0)",
    "file of 1 GB": "open('/tmp/x', 'wb').truncate(1 << 30)",
    "full disk": "[open(f'/tmp/{i}', 'wb').write(b'x' * 2**24) for i in range(64)]",
}


@pytest.mark.parametrize("name", UNREACHABLE)
def test_the_host_is_out_of_reach(bubblewrap: str, name: str) -> None:
    program = f"import os, socket, subprocess\ndef f():\n    {UNREACHABLE[name]}\n    return 'done'"
    answer = result(program)
    assert '"error"' in answer and "done" not in answer


ATTACKS = {  # program, and how it may end
    "huge power": ("10**10**9", {"deadline", "memory"}),
    "infinite generator": ("import itertools; list(itertools.count())", {"memory", "deadline", "exit"}),
    "10 GB of output": ("import os\n    for _ in range(10**4): os.write(1, b'x' * 10**6)", {"output"}),
    "10 GB of results": ("import os\n    for _ in range(10**4): os.write(3, b'x' * 10**6)", {"output"}),
    "memory": ("[b'x' * 10**8 for _ in range(100)]", {"exit", "memory", "deadline"}),
    "memory in many processes": (
        "import os, time\n    for _ in range(8):\n        if os.fork() == 0: x = b'x' * (3 * 10**8); time.sleep(99)"
        "\n    time.sleep(99)",
        {"memory"},
    ),
    "segmentation fault": ("import ctypes; ctypes.string_at(0)", {"signal"}),
    "kill itself": ("import os; os.kill(os.getpid(), 9)", {"signal"}),
    "exit at once": ("import os; os._exit(0)", {"exit"}),
    "endless recursion": ("(lambda g: g(g))(lambda g: g(g))", {"exit", "signal"}),
    "deep stack": (
        "import sys; sys.setrecursionlimit(10**9)\n    def g(): return [g() for _ in 'x']\n    g()",
        {"exit", "signal", "memory", "deadline"},
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_ends_without_a_value(bubblewrap: str, name: str) -> None:
    body, ends = ATTACKS[name]
    outcome = call(f"def f():\n    {body}\n")
    assert outcome.complete and outcome.cases[0].how in ends
    assert b'"value"' not in outcome.cases[0].results
    assert all_ended()


SABOTAGE = {  # these end, stop or flood the runner too
    "fork bomb": "import os\n    while True:\n        try: os.fork()\n        except OSError: pass",
    "threads": "import threading, time\n    while True: threading.Thread(target=time.sleep, args=(999,)).start()",
    "kill every process": "import os\n    if os.fork() == 0: os.kill(-1, 9)\n    import time; time.sleep(9)",
    "orphans without end": "import os\n    while True:\n        try:\n            if os.fork(): os._exit(0)"
    "\n        except OSError: pass",
    "daemon": (
        "import os, time\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0: time.sleep(999)"
        "\n        os._exit(0)\n    os._exit(0)"
    ),
    "ignore every signal": (
        "import signal, os\n    for n in range(1, 32):\n        try: signal.signal(n, signal.SIG_IGN)"
        "\n        except OSError: pass\n    while True: pass"
    ),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_is_over_when_run_returns(bubblewrap: str, name: str) -> None:
    outcome = call(f"def f():\n    {SABOTAGE[name]}\n    return 1\n")
    assert not outcome.complete or b'"value", 0' not in outcome.cases[0].results
    assert all_ended()
    assert result("def f(): return 42").count('["value", 0, 42]') == 1  # and the next program runs as ever


def test_no_signal_of_a_program_reaches_the_runner(bubblewrap: str) -> None:
    signals = "for n in range(1, 65):\n        if n not in (32, 33): os.kill(1, n)"
    others = "[p for p in os.listdir('/proc') if p.isdigit() and p != str(os.getpid())]"
    assert '["value", 0, ["l", "1"]]' in result(f"import os\ndef f():\n    {signals}\n    return {others}")


def test_nothing_survives_the_death_of_the_caller(bubblewrap: str) -> None:
    script = (  # `available` runs a program of its own first, which is not the one to wait for
        "from heatbath.verify import sandbox\nassert sandbox.available('bubblewrap') is None\n"
        f"text = sandbox._inside() + {MARK!r}\nsandbox._inside = lambda: text\n"
        "sandbox.run({'mode': 'eval', 'sources': ['while True: pass']}, sandbox.Limits(50), 'bubblewrap')\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", script])
    ends_at = time.monotonic() + HANG
    while len(processes()) < 4 and time.monotonic() < ends_at:
        time.sleep(0.1)
    assert len(processes()) >= 4  # the caller, bubblewrap, the runner and the program
    os.kill(caller.pid, signal.SIGKILL)
    caller.wait()
    assert all_ended()


FORGED = [b"Cjunk", b"C[]", b"C{}", b"C" + b"[" * 900, b"X", b'C{"how":"exit","code":1e9,"cpu":0,"wall":0}']
FORGED += [b'C{"how":[],"code":0,"cpu":0,"wall":0}', b'C{"how":"exit","code":0,"cpu":NaN,"wall":0}', b"C\xff", b"C5"]


@pytest.mark.parametrize("frame", FORGED)
def test_a_frame_that_the_runner_cannot_have_sent_is_the_last(frame: bytes) -> None:
    frames, ended = sandbox._Frames(), b'{"how":"exit","code":0,"cpu":0,"wall":0}'
    for kind, body in ((frame[:1], frame[1:]), (b"C", ended), (b"E", b"secret")):
        frames.feed(kind + len(body).to_bytes(4, "big") + body)
    assert frames.lost and not frames.cases and not frames.secret


def test_the_secret_is_not_in_the_child(bubblewrap: str) -> None:
    program = (
        "import gc, os, sys\n"
        "def f():\n"
        "    frame, seen = sys._getframe(), []\n"
        "    while frame: seen.append(str(frame.f_locals) + str(frame.f_globals.keys())); frame = frame.f_back\n"
        "    seen += [str(o)[:10**4] for o in gc.get_objects() if isinstance(o, (dict, list, tuple, bytes))]\n"
        "    left = os.read(0, 100)\n"
        "    return [left, any(chr(83) + 'ECRET' in text for text in seen)]\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(secrets, "token_hex", lambda _: "SECRET" * 5 + "!!")
        assert '["value", 0, ["l", ["b", ""], false]]' in result(program)


def test_the_environment_is_empty(bubblewrap: str) -> None:
    os.environ["HEATBATH_TOKEN"] = "hidden"
    try:
        answer = result("import os\ndef f(): return [sorted(os.environ), os.getuid(), os.getcwd()]")
    finally:
        del os.environ["HEATBATH_TOKEN"]
    assert "HEATBATH_TOKEN" not in answer and '65534, "/tmp"' in answer


def test_the_order_of_a_set_is_the_same_in_every_run(bubblewrap: str) -> None:
    program = "def f(): return list({'a', 'b', 'c', 'd', 'e', 'f'})"
    assert result(program) == result(program)


def test_without_bubblewrap_nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(sandbox, "_WORKING", set())
    outcome = sandbox.run({"mode": "eval", "sources": [""], "expressions": ["1"]}, Limits(), BUBBLEWRAP)
    assert "bwrap is not installed (apt-get install bubblewrap)" in outcome.refusal and not outcome.cases
    assert UNISOLATED in outcome.refusal
    assert "unknown isolation" in str(sandbox.available("none"))


def test_as_an_unprivileged_user(bubblewrap: str) -> None:
    """Where the interpreter can be reached: as another user it may not be, and then the system's is tried."""
    if os.geteuid() != 0:
        pytest.skip("this is an unprivileged user already")
    drop = ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--", "sh", "-c", 'exec "$0" "$@"']
    for python in (sys.executable, "/usr/bin/python3"):
        script = "import sys; raise SystemExit(sys.version_info < (3, 11))"
        if subprocess.run([*drop, python, "-c", script], capture_output=True, check=False).returncode == 0:
            break
    else:
        pytest.skip("no Python 3.11 that an unprivileged user can run")
    source = Path(sandbox.__file__).parents[2]
    first = [("mem", "r+b"), ("mem", "rb"), ("fd/0", "rb"), ("fd/1", "wb")]
    program = (
        "import os\ndef refused(name, mode):\n    try: open(f'/proc/1/{name}', mode, buffering=0)\n"
        f"    except PermissionError: return True\nhidden = all(refused(*way) for way in {first})\n"
    )
    script = (
        f"import sys; sys.path.insert(0, {str(source)!r})\n"
        "from heatbath.verify import sandbox\n"
        "tests = {'expressions': ['os.getuid() and hidden and 42', 'open(\"/x\", \"w\")']}\n"
        f"job = {{'mode': 'eval', 'sources': [{program!r}], **tests}}\n"
        "print(sandbox.run(job, sandbox.Limits(), 'bubblewrap'))\n"
    )
    done = subprocess.run([*drop, python, "-c", script], capture_output=True, text=True, cwd="/", check=False)
    if "Permission" in done.stderr and "heatbath" in done.stderr:
        pytest.skip("an unprivileged user cannot read this working tree")
    assert '["value", 0, 42]' in done.stdout and "Read-only" in done.stdout, done.stdout + done.stderr


# The grader, where the sandbox fails or lies --------------------------------------------------------------------------

ONE = {"entry_point": "f", "inputs": [[1]], "outputs": [1]}
TWICE = {"entry_point": "f", "inputs": [[1]], "reference": "def f(x): return x"}
ANSWER = "```python\ndef f(x): return x\n```"


class _Runs:
    """In the sandbox's place: every run gives `outcome`, or raises it, and is counted."""

    def __init__(self, patch: pytest.MonkeyPatch, outcome: sandbox.Outcome | Exception) -> None:
        self.outcome, self.jobs = outcome, list[Any]()
        patch.setattr(sandbox, "run", self)

    def __call__(self, job: Any, limits: Limits, isolation: str) -> sandbox.Outcome:
        self.jobs.append(job)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def ended(*values: str, how: str = "exit", cpu: float = 0.0) -> sandbox.Outcome:
    lines = ['["program", 0]', '["loaded"]', *(f'["value", {i}, {value}]' for i, value in enumerate(values))]
    return sandbox.Outcome((sandbox.Case(how, 0, cpu, 1.0, "\n".join(lines).encode(), b""),), complete=True)


LIES = {
    "one value too many": (("1", "1"), ONE, "unreadable results"),
    "infinite complex": ((f'["c", 1{"0" * 400}, 0]',), ONE, "unreadable results"),
    "101 deep": (('["l", ' * 101 + "1" + "]" * 101,), {"test_list": ["assert f(1) in (1, 2)"]}, "unreadable results"),
    "large": (("[" + "[]," * 10**5 + "[]]",), ONE, "far larger than the right one"),
    "large, of a free value": (("[" + "[]," * 10**6 + "[]]",), {"test_list": ["assert f(1)"]}, "far larger"),
    "large, in a script": (("[" + "[]," * 10**5 + "[]]",), {"stdin": [""], "stdout": ["1"]}, "wrong value"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_forged_value_is_wrong_and_raises_nothing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    values, gold, words = LIES[name]
    _Runs(monkeypatch, ended(*values))
    [got] = CodeGrader().grade([ANSWER], [gold])
    assert got.status == "wrong" and words in got.rule, got


@pytest.mark.parametrize("gold", [ONE, TWICE])
def test_an_error_of_this_machine_is_counted(monkeypatch: pytest.MonkeyPatch, gold: Any) -> None:
    _Runs(monkeypatch, OSError("No space left on device"))
    assert [(got.status, got.rule) for got in CodeGrader().grade([ANSWER] * 2, [gold] * 2)] == [
        ("crashed", "OSError: No space left on device")
    ] * 2


def test_two_sleepers_of_a_call_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runs, grader = _Runs(monkeypatch, ended(how="deadline")), CodeGrader()
    for count in (1, 2):
        assert {got.status for got in grader.grade([ANSWER] * 16, [ONE] * 16)} == {"timeout"}
        assert len(runs.jobs) == count * (16 + 2)


def test_a_program_that_computed_all_the_time_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = _Runs(monkeypatch, ended(how="deadline", cpu=1.0))
    [got] = CodeGrader(deadline=1.0).grade([ANSWER], [ONE])
    assert got.status == "timeout" and len(runs.jobs) == 1


def test_a_reference_that_timed_out_is_tried_anew_in_the_next_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for outcome in (ended(how="deadline"), sandbox.Outcome(), sandbox.Outcome(late=True)):
        runs, grader = _Runs(monkeypatch, outcome), CodeGrader(workers=1)
        assert {got.status for got in grader.grade([ANSWER] * 4, [TWICE] * 4)} == {"bad_gold"}
        assert 1 <= len(runs.jobs) <= 2  # perhaps alone again
        runs.outcome = ended("1")
        assert {got.status for got in grader.grade([ANSWER] * 4, [TWICE] * 4)} == {"right"}


def test_golds_of_the_same_content_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _Runs(monkeypatch, ended("1"))
    seen = list[Any]()
    monkeypatch.setattr(code, "read_tests", lambda gold: seen.append(gold) or read_tests(gold))
    golds = [*(dict(ONE) for _ in range(8)), {**ONE, "outputs": [(1,)]}, {**ONE, "outputs": [[1]]}, json.dumps(ONE)]
    assert [got.status for got in CodeGrader().grade([ANSWER] * 11, golds)] == ["right"] * 8 + ["wrong"] * 2 + ["right"]
    assert len(seen) == 4


def test_members_of_one_hash_are_not_made_a_set() -> None:
    tests = replace(read_tests(ONE), rule="same members")
    assert (
        tests.agrees(0, [1, 2, 1], (2, 1)) and not tests.agrees(0, [1] * 10**6, (1,)) and not tests.agrees(0, 5, (1,))
    )
    assert not tests.agrees(0, [i * (2**61 - 1) for i in range(2000)], tuple(range(2000)))


def test_no_expression_takes_quadratic_time_on_a_text() -> None:
    for text in ("\n" * 190_000, " " * 190_000, "async " * 30_000, "class\t" * 30_000, "f " * 90_000, "def\n" * 40_000):
        began = time.process_time()
        code.find_programs("x" + text, "", ("f", "g"))
        code.find_programs("```" + text + "x", "def f():", ("f",))
        assert time.process_time() - began < 1.0


PLAIN = [None, True, -1, 2**200, 1.5, float("inf"), 1 + 2j, "é\ud800", b"\x00", [], (1, (2,)), {1, 2}, frozenset({3})]


@pytest.mark.parametrize("value", [*PLAIN, {"a": {(1, 2): [None]}}, PLAIN], ids=repr)
def test_plain_values_travel_unchanged(value: Any) -> None:
    back = decode(encode(value))
    assert back == value and type(back) is type(value)


class _Equal(int):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def _shared() -> list[Any]:
    value: list[Any] = [1]
    for _ in range(60):
        value = [value, value]
    return value


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside, "MAX_SIZE", 10_000)


@pytest.mark.parametrize("value", [_Equal(1), object(), iter([]), _nested(200), _shared(), type("S", (str,), {})("x")])
def test_other_values_do_not_travel(_small: None, value: Any) -> None:
    with pytest.raises(NotPlainError):
        encode([value])


@pytest.mark.parametrize(
    "wire", [[], ["x"], {}, [1], ["i", 5], ["s", ["l"]], ["d", 1], ["c", "1", 2], _nested(300), ["c", 10**400, 0]]
)
def test_forged_values_are_refused(wire: Any) -> None:
    with pytest.raises(ValueError):
        decode(wire)


@pytest.mark.parametrize("depth", [99, 100, 101, 102])
def test_both_sides_have_the_same_rule_of_depth(depth: int) -> None:
    value, wire = 1, 1
    for _ in range(depth):
        value, wire = [value], ["l", wire]  # type: ignore[assignment]
    if depth <= inside.MAX_DEPTH:
        assert encode(value) == wire and decode(wire) == value
    else:
        with pytest.raises(NotPlainError):
            encode(value)
        with pytest.raises(ValueError):
            decode(wire)


def test_members_that_share_a_hash_are_refused() -> None:
    with pytest.raises(ValueError, match="one hash"):
        decode(["s", *(["i", hex(i * (2**61 - 1))] for i in range(1, 10_000))])


SAME = [
    (1, 1.0, True), (True, 1, True), (1, 2, False), ("1", 1, False), (None, 0, False), (1.0, 1.0 + 1e-9, True),
    (1.0, 1.001, False), (1e20, 1e20 * (1 + 1e-8), True), (float("inf"), float("inf"), True),
    (float("inf"), 1e308, False), (1.0, float("inf"), False), (float("nan"), float("nan"), True),
    (float("nan"), 1.0, False), (1 + 1j, 1 + 1.0000000001j, True), ([1.0], [1.0 + 1e-9], True), ([1.0], (1.0,), False),
    ({"a": 0.1 + 0.2}, {"a": 0.3}, True), ({"a": 1}, {"a": 1, "b": 2}, False), ({1, 2}, {2, 1}, True),
    ([], [], True), ([1], [], False), (10**400, 1.0, False), (10**400, 10**400, True), ("a", "a", True),
]  # fmt: skip


@pytest.mark.parametrize(("value", "expected", "equal"), SAME)
def test_agreement(value: Any, expected: Any, equal: bool) -> None:
    assert same(value, expected, 1e-6) is equal and same(expected, value, 1e-6) is equal


def test_the_examples_of_the_page_are_read_and_run(bubblewrap: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "code.md").read_text(encoding="utf-8")
    golds = [json.loads(text) for text in re.findall(r"^```json\n(.*?)^```", page, re.M | re.S)]
    assert len(golds) == 4
    for gold in golds:
        read_tests(gold)
    [script] = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    exec(script, {})  # noqa: S102 - our own page
    said = re.search(r"# (right .*)$", script, re.M)
    assert said and capsys.readouterr().out.strip() == said[1]
