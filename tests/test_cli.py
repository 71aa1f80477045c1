"""The command line: exit codes, and messages instead of tracebacks."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from heatbath import cli, cli_stages
from heatbath.allocator import keep_freed_memory


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["heatbath", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nowhere.toml"], "no such recipe"),
        (["run", "demo", "sft.lrr=3"], "sft.lrr: unknown key, did you mean 'lr'?"),
        (["run", "demo", "sft.objective.beta=-2"], "beta must be a finite number ≥ 0"),
        (["run", "demo", "sft.objectiv=gift"], "sft.objectiv: unknown key, did you mean 'objective'?"),
        (["run", "demo", "data.source=files"], "data.digits: unknown key of source 'files'; it belongs to arithmetic"),
        (["run", "demo", "model=/nowhere", "--dry-run"], "cannot load the model '/nowhere': it is no folder"),
        (["run", "demo", "data.demos=5000", "--dry-run"], "but only 3,054 exist"),
        (["run", "demo", "model=SmolLM2-135"], "did you mean 'smollm2-135m'?"),
        (["run", "demo", "seed.x.y=1"], "'seed' is not a table"),
        (["run", "demo", "data.operations.x=1"], "data.operations: input should be a valid list"),
        (["run", "demo", 'sft.objective.name="gfit"'], "unknown objective 'gfit', did you mean 'gift'?"),
        (["run", "demo", "data.prompts=3", "--dry-run"], "3 prompts, but one generation takes rl.prompts = 6"),
        (["run", "demo", "data.test=0", "--dry-run"], "no test problems"),
        (["run", "demo", "eval.k=[]"], "eval.k: list should have at least 1 item"),
        (["run", "demo", 'data.operations=["+", "+"]'], "data.operations: each may be named once"),
        (["run", "demo", "sft.epochs=inf"], "sft.epochs: input should be a finite number"),
        (["report", "nowhere"], "not a run"),
    ],
)
def test_what_is_wrong_with_the_input_exits_2(monkeypatch, capsys, arguments: list[str], message: str) -> None:
    assert call(monkeypatch, *arguments) == 2
    out = capsys.readouterr()
    assert message in out.err and "where:" in out.err and "remedy:" in out.err
    assert "Traceback" not in out.err and out.out == ""


def test_a_wrong_option_exits_2(monkeypatch, capsys) -> None:
    assert call(monkeypatch, "run", "demo", "--nope") == 2


def test_an_empty_dataset_is_named(monkeypatch, capsys, tmp_path: Path, small_base: Path) -> None:
    code = call(monkeypatch, "run", "demo", f"model={small_base}", "data.demos=0", "--out", str(tmp_path / "r"))
    assert code == 2 and "no demonstrations" in capsys.readouterr().err
    assert not (tmp_path / "r").exists(), "a wrong recipe must not use up the folder's name"


def test_a_nan_loss_exits_1_and_loses_nothing(monkeypatch, capsys, tmp_path: Path, small_base: Path) -> None:
    # a step size that overflows float32 at once: the loss of the second step is not a number
    tiny = [f"model={small_base}", "data.demos=32", "data.validation=0", "precision=fp32", "sft.lr=1e38"]
    assert call(monkeypatch, "sft", "demo", *tiny, "--out", str(tmp_path / "r")) == 1
    error = capsys.readouterr().err
    assert "the loss is nan" in error and "step 2" in error and "lower sft.lr" in error
    assert (tmp_path / "r" / "metrics.jsonl").is_file() and not (tmp_path / "r" / "checkpoints" / "init").exists()


def test_interrupting_exits_130(monkeypatch, capsys, tmp_path: Path, small_base: Path) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_stages, "_call", interrupted)
    assert call(monkeypatch, "run", "demo", f"model={small_base}", "--out", str(tmp_path / "r")) == 130
    error = capsys.readouterr().err
    assert "Traceback" not in error and "interrupted" in error and str(tmp_path / "r") in error.replace("\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_in_a_finaliser_still_ends_the_command(number: signal.Signals) -> None:
    script = f"""
import signal, time, weakref
from heatbath import interruption

class Held: pass

interruption.listen()
held = Held()
weakref.finalize(held, lambda: signal.raise_signal({int(number)}))
try:
    del held
    print("lost", flush=True)
    time.sleep(20)
    print("went on", flush=True)
except KeyboardInterrupt:
    print("ended", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout.split(), done.stderr) == (["lost", "ended"], "")


def test_recipes_and_doctor(monkeypatch, capsys) -> None:
    assert call(monkeypatch, "recipes", "--json") == 0
    assert json.loads(capsys.readouterr().out)["demo"].startswith("heatbath run recipes/demo.toml")
    assert call(monkeypatch, "doctor", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and {"torch", "trl", "transformers"} <= {p["name"] for p in found["packages"]}
    assert call(monkeypatch, "doctor") == 0
    assert "tested" in capsys.readouterr().out


def test_the_allocator_setting_is_accepted_where_it_applies() -> None:
    assert keep_freed_memory() == (sys.platform == "linux")


def test_one_command_lists_every_policy_and_preference_method(monkeypatch, capsys) -> None:
    """Generated from the tables: names, sources, needs, and defaults that build the policy again."""
    from heatbath.ideas.policy import POLICIES, policy

    assert call(monkeypatch, "recipes", "--policies", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == [*POLICIES, "dpo", "una"]
    for row in rows:
        assert row["source"] and row["says"] and row["defaults"]
        if row["table"] == "rl":
            assert policy(row["name"], **row["defaults"]) == policy(row["name"])
    needing = {row["name"] for row in rows if "solution" in row["needs"]}
    assert needing == {name for name in POLICIES if policy(name).needs_demonstrations}
    assert call(monkeypatch, "recipes", "--policies") == 0
    text = capsys.readouterr().out
    assert all(f"\n{row['name']} " in f"\n{text}" and row["source"] in text for row in rows)
    assert "std_floor = 0.1" in text and "clip_high = 0.28" in text


def test_one_command_lists_every_task(monkeypatch, capsys) -> None:
    """Generated from the definitions, and readable: one line for each with its licence."""
    from heatbath.data.tasks import find

    assert call(monkeypatch, "recipes", "--tasks", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) >= 14
    for row in rows:
        task = find(row["name"])
        assert (row["kind"], row["problems"], row["licence"]) == (task.kind, task.problems, task.licence)
    assert call(monkeypatch, "recipes", "--tasks") == 0
    text = capsys.readouterr().out
    assert all(f"\n{row['name']} " in text and row["licence"] in text for row in rows) and "lm_eval:TASK" in text
