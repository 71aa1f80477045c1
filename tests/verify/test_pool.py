"""The worker pool: outcomes of hostile tasks, every way a process may be used, and nothing left behind."""

import asyncio
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from heatbath.errors import HeatbathError
from heatbath.verify import worker as worker_module
from heatbath.verify.pool import WorkerPool

JOBS = str(Path(__file__).with_name("jobs.py"))
HANG = 60  # seconds; only a guard against a test that never ends


def pool(job: str, **settings: Any) -> WorkerPool:
    return WorkerPool(f"{JOBS}:{job}", **{"workers": 2, "deadline": 20.0, **settings})


@pytest.fixture(scope="module")
def shared() -> Iterator[WorkerPool]:
    with pool("identify") as p:
        yield p


def values(p: WorkerPool, tasks: list[list[Any]]) -> list[Any]:
    outcomes = p.map(tasks)
    assert [o.status for o in outcomes] == ["done"] * len(tasks), outcomes
    return [o.value for o in outcomes]


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie that nobody reaps does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def children() -> set[int]:
    text = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children").read_text()
    return {int(pid) for pid in text.split()}


# What a task can do to its worker, and to nobody else.


def test_hanging_tasks_are_killed_together_and_every_other_is_answered() -> None:
    with pool("hang", deadline=1.0) as p:
        outcomes = p.map([["power"], ["loop"], ["sleep"], ["deaf"]] * 2)
    assert [o.status for o in outcomes] == ["timeout"] * 8
    assert all(1.0 <= o.seconds < HANG and "deadline of 1 s" in o.message for o in outcomes)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("memory", "MemoryError"),
        ("exit", "exited with status 0"),
        ("segfault", "SIGSEGV"),
        ("killed", "SIGKILL"),
        ("quit", "SystemExit: 0"),
        ("set", "JSON cannot hold"),
        ("large", "returned 50,000,0"),
        ("flood", "printed more than"),
        ("forge", "breaks the protocol"),
        ("raise", "ValueError: no such luck"),
    ],
)
def test_a_failing_task_is_crashed_with_its_reason(failing: WorkerPool, kind: str, message: str) -> None:
    (outcome,) = failing.map([[kind]])
    assert outcome.status == "crashed" and message in outcome.message and outcome.value is None


def test_a_task_whose_worker_is_killed_is_given_to_another() -> None:
    """Somebody else's SIGKILL costs no answer; a task that is killed every time ("killed", above) is crashed."""
    with pool("identify", workers=1) as p:
        ((_, first),) = values(p, [[0]])
        killer = threading.Timer(0.3, os.kill, (first, signal.SIGKILL))
        killer.start()
        found = values(p, [["slow", 1.0], [1], [2]])
        killer.join()
    assert [value for value, _ in found] == ["slow", 1, 2]
    assert first not in {process for _, process in found}


@pytest.fixture(scope="module")
def failing() -> Iterator[WorkerPool]:
    with pool("fail", memory_gib=0.5) as p:
        yield p


def test_printing_cannot_break_or_forge_an_answer() -> None:
    with pool("talk") as p:
        assert values(p, [[i] for i in range(20)]) == list(range(20))


def test_values_arrive_as_json_whatever_their_text_or_size() -> None:
    sent = [None, True, -1.5, "\ud800\x00½", [1, {"a": []}], "y" * 5_000_000, 10**300]
    with pool("echo") as p:
        assert values(p, [[v] for v in sent]) == sent
        with pytest.raises(TypeError):
            p.map([[object()]])
        assert values(p, [[1]]) == [1] and p.map([]) == []


# Order, sharing, replacement.


def test_order_is_kept_when_tasks_take_different_times(shared: WorkerPool) -> None:
    tasks = [[i, 0.05 if i % 7 == 0 else 0.0] for i in range(60)]
    found = values(shared, tasks)
    assert [v[0] for v in found] == list(range(60)) and len({v[1] for v in found}) >= 2


def test_a_slow_task_goes_on_aside_and_holds_up_nobody(shared: WorkerPool) -> None:
    before = time.monotonic()
    found = values(shared, [["slow", 1.5], ["slow", 1.5]] + [[i] for i in range(50)])
    assert len({v[1] for v in found}) > 2  # others took over while both workers slept
    assert time.monotonic() - before < HANG
    assert len(shared._alive) <= 3 and shared._free_slots == 2 and shared._slow == 0


def test_a_slow_task_in_the_way_of_others_gets_what_they_leave() -> None:
    with pool("niceness", workers=1, slow_after=0.05) as p:
        outcomes = p.map([[1.0]] + [[0.01]] * 60 + [[-1.0]])
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    assert outcomes[0].value == 19 and outcomes[-1].value == usual


def test_only_so_many_are_aside_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heatbath.verify.pool.SLOW_AT_ONCE", 1)
    with pool("hang", deadline=0.5, slow_after=0.1, workers=1) as p:
        assert [o.status for o in p.map([["sleep"]] * 4)] == ["timeout"] * 4
        assert p._free_slots == 1 and p._slow == 0


def test_a_dead_worker_is_replaced(shared: WorkerPool) -> None:
    ((_, pid),) = values(shared, [["x"]])
    for worker in list(shared._alive):
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
    ((_, other),) = values(shared, [["x"]])
    assert other != pid and not alive(pid)


def test_a_worker_that_grew_is_replaced() -> None:
    with pool("grow", workers=1, memory_gib=0.5) as p:
        small = values(p, [[1024]] * 3)
        grown = values(p, [[200 << 20], [1024]])
    assert len({*small, grown[0]}) == 1 and grown[1] != grown[0]


def test_a_task_that_comes_at_once_ends_no_worker() -> None:
    """A writer tells of its data after the reader may have read them: some 1 task of 10,000 was lost to that signal."""
    with pool("identify", workers=1, slow_after=HANG) as p:
        values(p, [[i] for i in range(20_000)])


def test_a_worker_is_replaced_after_so_many_tasks() -> None:
    with pool("identify", workers=1, slow_after=HANG) as p:
        pids = [pid for _, pid in values(p, [[i] for i in range(worker_module.RECYCLE_AFTER + 1)])]
    assert len(set(pids)) == 2 and len(set(pids[:-1])) == 1


def test_threads_share_the_workers(shared: WorkerPool) -> None:
    found: dict[int, list[Any]] = {}

    def use(number: int) -> None:
        for part in range(3):
            found[number] = values(shared, [[[number, part, i], 0.002] for i in range(20)])

    threads = [threading.Thread(target=use, args=(n,), daemon=True) for n in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(HANG)
    assert {n: [v[0] for v in f] for n, f in found.items()} == {n: [[n, 2, i] for i in range(20)] for n in range(8)}
    assert shared._free_slots == 2 and not shared._queue and not shared._calls


def test_a_long_call_does_not_lock_out_a_short_one(shared: WorkerPool) -> None:
    done: list[str] = []

    def long() -> None:
        values(shared, [[i, 0.02] for i in range(150)])
        done.append("long")

    thread = threading.Thread(target=long, daemon=True)
    thread.start()
    until(lambda: shared._calls)
    values(shared, [["short"]])
    done.append("short")
    thread.join(HANG)
    assert done == ["short", "long"]


# Where a pool may be used.


def test_in_asyncio(shared: WorkerPool) -> None:
    async def several() -> list[list[Any]]:
        return list(await asyncio.gather(*(asyncio.to_thread(values, shared, [[i]]) for i in range(6))))

    assert [v[0] for (v,) in asyncio.run(several())] == list(range(6))


def in_child(shared: WorkerPool, parents: set[int], out: Any) -> None:
    out.send([pid for _, pid in values(shared, [[i, 0.02] for i in range(4)])])
    assert not parents & {w.process.pid for w in shared._alive}
    shared.close()


@pytest.mark.parametrize("daemon", [False, True])
def test_in_a_forked_process_even_a_daemonic_one(shared: WorkerPool, daemon: bool) -> None:
    parents = {pid for _, pid in values(shared, [[i, 0.02] for i in range(4)])}
    receive, send = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=in_child, args=(shared, parents, send), daemon=daemon)
    process.start()
    assert receive.poll(HANG)
    theirs = set(receive.recv())
    process.join(HANG)
    assert process.exitcode == 0 and theirs and not theirs & parents and not any(alive(pid) for pid in theirs)
    assert all(alive(pid) for pid in parents) and values(shared, [[1]])


def test_a_fork_while_another_thread_grades(shared: WorkerPool) -> None:
    thread = threading.Thread(target=values, args=(shared, [[i, 0.002] for i in range(300)]), daemon=True)
    thread.start()
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = 0 if values(shared, [["child"]])[0][0] == "child" else 1
                shared.close()
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
    thread.join(HANG)
    assert not thread.is_alive()


SCRIPT = f"""
import os, sys, time
from heatbath.verify.pool import WorkerPool
pool = WorkerPool({JOBS + ":identify"!r}, workers=2)
print(*[o.value[1] for o in pool.map([[i, 0.05] for i in range(4)])], flush=True)
"""


def script(tmp_path: Path, more: str = "") -> subprocess.Popen[str]:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT + textwrap.dedent(more))
    return subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True)


def test_in_a_script_without_a_main_guard_and_nothing_outlives_it(tmp_path: Path) -> None:
    process = script(tmp_path)
    out, _ = process.communicate(timeout=HANG)
    pids = [int(pid) for pid in out.split()]
    assert process.returncode == 0 and len(pids) == 4 and not any(alive(pid) for pid in pids)


@pytest.mark.parametrize("kind", ["idle", "power", "sleep"])
def test_no_worker_outlives_a_killed_parent_even_beside_a_forked_child(tmp_path: Path, kind: str) -> None:
    mark = tmp_path / "mark"
    process = script(
        tmp_path,
        f"""
        child = os.fork()
        if child == 0:
            time.sleep(3600)
        print(child, flush=True)
        if {kind!r} == "idle":
            open({str(mark)!r}, "w").write("0")
            time.sleep(3600)
        WorkerPool({JOBS + ":mark_then_hang"!r}, deadline=3600).map([[{str(mark)!r}, {kind!r}]])
        """,
    )
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    child = int(process.stdout.readline())
    until(lambda: mark.exists() and mark.read_text())
    pids.append(int(mark.read_text()))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    try:
        until(lambda: not any(alive(pid) for pid in pids if pid))
        assert alive(child)
    finally:
        os.kill(child, signal.SIGKILL)


def test_an_orphan_that_no_signal_reaches_ends_by_its_processor_time() -> None:
    with pool("spin", deadline=0.1, workers=1) as p:
        p.map([[0.0]])
        (worker, *_) = p._alive
        worker.begin(0, [3600.0])  # and nobody looks at the clock
        assert worker.process.wait(HANG) == -signal.SIGXCPU


def test_a_pickled_pool_starts_its_own_workers(shared: WorkerPool) -> None:
    with pickle.loads(pickle.dumps(shared)) as copy:
        assert values(copy, [["x"]])[0][0] == "x" and not copy._alive & shared._alive


# Starting and ending.


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("no_such_module:f", "No module named 'no_such_module'"),
        (f"{JOBS}:no_such_function", "no_such_function"),
        (f"{JOBS}:KEPT", "is not a function"),
        ("no/such/file.py:f", "No such file"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_named(function: str, said: str) -> None:
    with WorkerPool(function) as p, pytest.raises(HeatbathError) as caught:
        p.map([[1]])
    assert function.rpartition("/")[2] in str(caught.value) and said in str(caught.value)


def test_a_failing_warm_up_is_shown() -> None:
    with pool("fail", warm_up=["raise"]) as p, pytest.raises(HeatbathError, match="no such luck"):
        p.map([["exit"]])
    with pytest.raises(HeatbathError, match="names no function"):
        WorkerPool("fail")


@pytest.mark.parametrize(("times", "ends"), [(1, "an answer"), (9, "an error")])
def test_a_worker_that_is_killed_while_it_starts_is_started_again(tmp_path: Path, times: int, ends: str) -> None:
    """By whoever frees memory, also the very first; three times in a row are no accident."""
    (tmp_path / "dies.py").write_text(
        "import os, pathlib, signal\n"
        f"starts = pathlib.Path({str(tmp_path / 'starts')!r})\n"
        "starts.open('a').write('x')\n"
        f"if len(starts.read_text()) <= {times}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "def echo(value): return value\n"
    )
    with WorkerPool(f"{tmp_path / 'dies.py'}:echo", workers=1) as p:
        if ends == "an answer":
            assert values(p, [["x"]]) == ["x"]
        else:
            with pytest.raises(HeatbathError, match="killed by SIGKILL"):
                p.map([["x"]])
    assert len((tmp_path / "starts").read_text()) == min(times + 1, 3)


def test_loading_counts_for_no_deadline() -> None:
    with pool("spin", warm_up=[0.6], deadline=0.3, workers=1) as p:
        assert values(p, [[0.0]]) == [0.0]


def test_closing_twice_and_while_another_thread_waits() -> None:
    p, raised = pool("hang"), []

    def use() -> None:
        try:
            p.map([["sleep"]] * 3)
        except HeatbathError as error:
            raised.append(str(error))

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    until(lambda: any(w.task is not None for w in list(p._alive)))
    pids = [w.process.pid for w in p._alive]
    p.close()
    p.close()
    thread.join(HANG)
    assert raised and "closed" in raised[0] and not any(alive(pid) for pid in pids)
    with pytest.raises(HeatbathError, match="closed"):
        p.map([["sleep"]])


def test_an_interrupt_ends_the_tasks_in_hand() -> None:
    with pool("hang") as p:
        timer = threading.Timer(0.5, signal.raise_signal, [signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            p.map([["sleep"]] * 3)
        assert p._free_slots == 2 and not p._calls and not any(w.task is not None for w in p._alive)


def test_nothing_is_left_behind() -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    p = pool("fail")
    p.map([["raise"]] * 4)
    files = open_files()
    for _ in range(6):
        p.map([["exit"], ["raise"], ["segfault"]])
    assert open_files() <= files + 3 * 3 and len(p._alive) <= 3  # two workers, and perhaps a spare
    before, pids = open_files(), {w.process.pid for w in p._alive}
    del p
    gc.collect()
    assert open_files() < before and not pids & children()


def test_a_worker_starts_light() -> None:
    life, parent = os.pipe()
    command = [sys.executable, "-X", "importtime", "-P", "-m", "heatbath.verify.worker", "x:y", "0", "1", str(life)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True, pass_fds=(life,)
    )
    os.close(life)
    os.close(parent)
    imported = done.stderr
    assert not any(
        f" {name}\n" in imported for name in ("torch", "numpy", "transformers", "multiprocessing", "asyncio")
    )
