"""Evaluation through a real OpenAI-compatible server in a process of its own: `transformers serve` with the tiny base.

It takes prompts as text alone, answers with text, and knows no field beyond OpenAI's; and it samples only where the
model's own generation settings say so (`do_sample`), whatever temperature a request names.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.utils.import_utils import is_serve_available

from heatbath.engines import api
from heatbath.errors import RunError
from heatbath.progress import Progress
from heatbath.recipe import Recipe, parse
from heatbath.report.page import write_report
from heatbath.run import Run
from heatbath.stages.evaluate import run_evaluation
from heatbath.verify.endpoint import Endpoint

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(
        not is_serve_available(), reason="the server is not installed: pip install 'transformers[serving]'"
    ),
]
PROBLEMS, TOKENS = 12, 48


class Served:
    """A `transformers serve` that can be killed and started again at the same address."""

    def __init__(self, model: str, log: Path):
        self.model, self.log = model, log
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port = taken.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def begin(self) -> None:
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", self.model, "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--device", "cpu", "--dtype", "float32"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})

    def start(self) -> "Served":
        self.begin()
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(600):
            try:
                with direct.open(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return self
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                assert self.process is not None and self.process.poll() is None, self.log.read_text()
                time.sleep(0.2)
        raise AssertionError("the server did not start")

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


@pytest.fixture(scope="module")
def base(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A copy of the tiny base that a server samples from where it is asked to."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    shutil.copytree(tiny_base, folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"do_sample": True}))
    return str(folder)


@pytest.fixture(scope="module")
def server(base: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(base, tmp_path_factory.mktemp("log") / "server.log").start()
    yield served
    served.kill()


@pytest.fixture(autouse=True)
def quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def recipe(base: str, server: Served | None, **settings: object) -> Recipe:
    common = {"samples": 1, "k": [1], "temperature": 0.0, "max_new_tokens": TOKENS, "batch": 2}
    through = {"engine": "api", "endpoint": server.url, "served": {"base": server.model}} if server else {}
    data = {"source": "arithmetic", "demos": 0, "validation": 0, "prompts": 0, "test": PROBLEMS}
    return parse({"model": base, "precision": "fp32", "data": data, "eval": common | through | settings})


def evaluated(folder: Path, made: Recipe) -> tuple[Run, dict]:
    run = Run(folder, made).write()
    return run, run_evaluation(run, made, Progress(quiet=True))


def drawn(run: Run) -> dict[tuple[str, int], dict]:
    """Samples by problem and seed: what a kill may neither lose nor repeat."""
    rows = run.samples()
    found = {(row["problem"], row["seed"]): row for row in rows}
    assert len(found) == len(rows)
    return found


def test_greedy_answers_are_those_of_the_local_engine_token_for_token(
    tmp_path: Path, base: str, server: Served
) -> None:
    here, scores = evaluated(tmp_path / "here", recipe(base, None))
    there, through = evaluated(tmp_path / "there", recipe(base, server))
    ours, theirs = drawn(here), drawn(there)
    assert ours.keys() == theirs.keys() and len(ours) == PROBLEMS
    for key, row in ours.items():
        assert theirs[key]["ids"] == row["ids"] and theirs[key]["completion"] == row["completion"]
        assert (theirs[key]["finish"], theirs[key]["status"]) == (row["finish"], row["status"])
        assert theirs[key]["retokenised"]  # what came was text
    assert len({row["completion"] for row in ours.values()}) > 1
    assert {row["finish"] for row in ours.values()} >= {"eos"}
    assert through["policies"] == scores["policies"]


def test_a_seed_is_honoured_where_one_request_is_in_flight(tmp_path: Path, base: str, server: Served) -> None:
    settings = {"temperature": 1.0, "samples": 2, "k": [1, 2], "batch": 1}
    first, again = (drawn(evaluated(tmp_path / name, recipe(base, server, **settings))[0]) for name in "ab")
    assert {key: row["ids"] for key, row in first.items()} == {key: row["ids"] for key, row in again.items()}
    assert len({tuple(row["ids"]) for row in first.values()}) > 4  # different seeds are different draws
    assert "alike" not in json.loads((tmp_path / "a" / "results.json").read_text())


def test_a_server_killed_in_the_middle_is_a_named_error_and_nothing_is_lost_or_repeated(
    tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, made = Served(base, tmp_path / "log").start(), None
    monkeypatch.setattr(api, "Endpoint", lambda *a, **k: Endpoint(*a, **{**k, "first_wait": 0.01, "retries": 2}))
    try:
        made = recipe(base, server, samples=4, temperature=1.0)
        run = Run(tmp_path / "run", made).write()
        killer = threading.Thread(target=killed_at, args=(server, run, 6), daemon=True)
        killer.start()
        with pytest.raises(RunError) as caught:
            run_evaluation(run, made, Progress(quiet=True))
        killer.join()
        assert "no usable answer in 3 tries" in caught.value.what and caught.value.where == server.url
        assert "completions came and are kept, and the same command asks for the rest" in caught.value.remedy
        kept = drawn(run)
        assert 6 <= len(kept) < 4 * PROBLEMS
        assert not (run.folder / "results.json").exists()
        server.start()
        results = run_evaluation(run, made, Progress(quiet=True))
        whole = drawn(run)
        assert len(whole) == 4 * PROBLEMS and results["incomplete"] == []
        assert all(whole[key] == row for key, row in kept.items())  # nothing was asked again
    finally:
        server.kill()


def test_a_server_that_draws_greedily_at_a_temperature_is_told_of(tmp_path: Path, tiny_base: str, capsys) -> None:
    """The tiny base as it is: nothing in its generation settings says do_sample."""
    server = Served(tiny_base, tmp_path / "log").start()
    try:
        made = recipe(tiny_base, server, temperature=1.0, samples=2, k=[1, 2])
        run = Run(tmp_path / "run", made).write()
        results = run_evaluation(run, made, Progress())
        assert results["alike"] == [{"task": "test", "policy": "base", "problems": PROBLEMS, "temperature": 1.0}]
        assert f"warning: All samples of each of {PROBLEMS} problems are the same" in capsys.readouterr().err
        write_report(run)
        assert "draw greedily" in (run.folder / "report.md").read_text()
    finally:
        server.kill()


def killed_at(server: Served, run: Run, count: int) -> None:
    while len(run.samples()) < count:
        time.sleep(0.01)
    server.kill()


@pytest.mark.slow
def test_a_server_that_goes_away_and_comes_back_is_survived(tmp_path: Path, base: str) -> None:
    """As it is set up by default: no answer for the seconds in which it starts again."""
    server = Served(base, tmp_path / "log").start()
    try:
        made = recipe(base, server)
        run, refused = Run(tmp_path / "run", made).write(), []

        def restart() -> None:
            killed_at(server, run, 4)
            time.sleep(3)
            with socket.socket() as probe:
                refused.append(probe.connect_ex(("127.0.0.1", server.port)) != 0)
            server.begin()

        away = threading.Thread(target=restart, daemon=True)
        away.start()
        run_evaluation(run, made, Progress(quiet=True))
        away.join()
        assert refused == [True]
        here, _ = evaluated(tmp_path / "here", recipe(base, None))
        assert {k: r["ids"] for k, r in drawn(run).items()} == {k: r["ids"] for k, r in drawn(here).items()}
    finally:
        server.kill()
