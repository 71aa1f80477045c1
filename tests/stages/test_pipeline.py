"""All stages on a small model through the command line, as a user runs them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from jinja2 import Environment
from safetensors import SafetensorError
from safetensors.torch import load_file

from heatbath import recipe as recipes
from heatbath import samples
from heatbath.errors import RunError
from heatbath.progress import Progress
from heatbath.run import Run
from heatbath.stages import rl, sft
from heatbath.stages.pipeline import run_stage
from heatbath.stages.scoring import correct, summarise
from mistakes import call

RECIPE = """
model = "{base}"
precision = "fp32"
[data]
source = "arithmetic"
demos = 16
validation = 4
prompts = 8
test = 5
[sft]
objective = {{ name = "gift", beta = 4.0 }}
lr = 3e-3
epochs = 2
batch = 8
micro_batch = 8
[rl]
lr = 1e-3
prompts = 4
update_prompts = 2
group_size = 4
micro_batch = 8
max_new_tokens = 12
kl_every = 1
[eval]
samples = 4
k = [1, 4]
max_new_tokens = 12
"""


def heatbath(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "heatbath", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, env=os.environ)


@pytest.fixture(scope="module")
def finished(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of all stages."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "small.toml").write_text(RECIPE.format(base=small_base))
    done = heatbath("run", "small.toml", "sft.epochs=3", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result = json.loads(done.stdout)
    assert result["run"] == "runs/small" and list(result["policies"]) == ["base", "init", "final"]
    return folder / "runs" / "small"


def test_the_run_is_the_folder_that_was_promised(finished: Path) -> None:
    for name in ("recipe.toml", "env.json", "metrics.jsonl", "surprise.json", "samples.jsonl.gz", "results.json"):
        assert (finished / name).stat().st_size > 0
    for name in ("report.html", "report.md", "report.json"):
        assert (finished / name).stat().st_size > 0
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["final", "init"]
    assert "epochs = 3.0" in (finished / "recipe.toml").read_text()
    env = json.loads((finished / "env.json").read_text())
    assert env["command"] == "heatbath run small.toml sft.epochs=3 --json" and env["versions"]["trl"]


def test_results_can_be_computed_again_from_the_samples(finished: Path) -> None:
    rows = samples.read(finished / "samples.jsonl.gz")
    assert len(rows) == 3 * 5 * 4
    assert {"completion", "answer", "status", "rule", "finish", "gold", "problem", "ids", "seed", "task"} <= set(
        rows[0]
    )
    assert len({(r["policy"], r["problem"], r["seed"]) for r in rows}) == len(rows)
    assert all(r["tokens"] == len(r["ids"]) and (r["finish"] == "length") != r["finished"] for r in rows)
    by_policy = {p: [r for r in rows if r["policy"] == p] for p in ("base", "init", "final")}
    again = summarise(by_policy, [1, 4])
    correct(again["differences"])
    written = json.loads((finished / "results.json").read_text())
    assert set(written.pop("asked").split()) == {r["problem"] for r in rows}
    assert again | {"tasks": {}, "incomplete": []} == written
    for policy, drawn in by_policy.items():
        mean = sum(r["status"] == "right" for r in drawn) / len(drawn)
        found = json.loads((finished / "results.json").read_text())["policies"][policy]
        assert found["pass"]["1"]["mean"] == pytest.approx(mean)


def test_an_existing_folder_is_refused_and_untouched(finished: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    code, said = call(finished.parents[1], "run small.toml")
    assert code == 2 and "holds a run with its report" in said and "--out" in said
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before
    code, said = call(finished.parents[1], "eval small.toml")  # without sft.epochs=3: another recipe
    assert code == 2 and "another recipe" in said


def test_stages_one_by_one_are_the_same_run(finished: Path) -> None:
    folder = finished.parents[1]
    for stage in ("sft", "rl", "eval"):
        code, said = call(folder, f"{stage} small.toml sft.epochs=3 --out runs/steps")
        assert code == 0, said
    ours, theirs = (json.loads((p / "results.json").read_text()) for p in (folder / "runs" / "steps", finished))
    assert ours == theirs
    code, said = call(folder, "sft small.toml sft.epochs=3 --out runs/steps")
    assert code == 1 and "already trained" in said
    code, said = call(folder, "report runs/steps")
    assert code == 0 and (folder / "runs" / "steps" / "report.html").is_file(), said


@pytest.mark.thorough
def test_dry_run_counts_what_the_run_then_does(finished: Path) -> None:
    done = heatbath("run", "small.toml", "sft.epochs=3", "--dry-run", "--json", cwd=finished.parents[1])
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert plan["sft"]["steps"] == max(r["step"] for r in metrics if r["stage"] == "sft")
    assert plan["rl"]["steps"] == max(r["step"] for r in metrics if r["stage"] == "rl")
    assert plan["eval"]["samples"] == len(samples.read(finished / "samples.jsonl.gz"))
    assert plan["sft"]["ends_with_eos"] == plan["rows"]["demos"] == 16 and plan["sft"]["truncated"] == 0


def test_model_output_is_escaped_in_the_report(finished: Path) -> None:
    environment = Environment(autoescape=True)
    page = (finished / "report.html").read_text()
    rows = samples.read(finished / "samples.jsonl.gz")
    hostile = [r["completion"] for r in rows if "<" in r["completion"]]
    for text in hostile:
        if text in page:
            assert text == environment.from_string("{{ t }}").render(t=text)


def test_an_evaluation_cut_off_in_the_middle_ends_as_if_it_had_not_been(finished: Path) -> None:
    """Every draw depends on its problem and number alone: what was lost is drawn again as it was."""
    path = finished / "samples.jsonl.gz"
    whole, rows = path.read_bytes(), samples.read(path)
    try:
        samples.replace(path, [])
        for first in range(0, 27, 9):  # all of base, a part of init, and a batch cut off
            samples.add(path, rows[first : first + 9])
        path.write_bytes(path.read_bytes()[:-9])
        assert samples.read(path) == rows[:18]
        code, said = call(finished.parents[1], "eval runs/small --json")  # the run's own recipe
        assert code == 0, said
        again = samples.read(path)
        assert again[:18] == rows[:18] and len(again) == 60
        key = lambda row: (row["policy"], row["problem"], row["seed"])  # noqa: E731
        untimed = [{k: v for k, v in row.items() if k != "seconds"} for row in sorted(again, key=key)]
        assert untimed == [{k: v for k, v in row.items() if k != "seconds"} for row in sorted(rows, key=key)]
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("when", ["save_policy", "to_disk"])
def test_an_interruption_after_the_last_step_waits_for_the_policy(
    small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """With save_every = 0 there is no checkpoint: ended at once, the whole stage would be lost."""
    (tmp_path / "r.toml").write_text(RECIPE.format(base=small_base))
    made = recipes.load(tmp_path / "r.toml", ["sft.save_every=0"])
    run, said, progress = Run.create(tmp_path / "run", made), [], Progress(quiet=True)
    progress.say = said.append
    module = sft if when == "save_policy" else sys.modules[Run.__module__]
    real = getattr(module, when)

    def told_meanwhile(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        real(*arguments)

    monkeypatch.setattr(module, when, told_meanwhile)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run_stage("sft", run, made, progress)
    assert run.finished("sft") and any("interrupted" in line for line in said)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_resumed_from_the_checkpoint_of_the_last_step_no_other_is_taken(
    small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Where max_steps ends a stage within an epoch; the first attempt dies before the policy is saved."""
    (tmp_path / "r.toml").write_text(RECIPE.format(base=small_base))
    steps = ["sft.max_steps=3", "sft.save_every=3", "rl.epochs=4", "rl.max_steps=2", "rl.save_every=2"]
    made = recipes.load(tmp_path / "r.toml", steps)
    module = {"sft": sft, "rl": rl}[stage]
    real, policy = module.save_policy, {"sft": "init", "rl": "final"}[stage]

    def trained(name: str, dies: bool) -> tuple[Run, list[dict]]:
        run = Run.create(tmp_path / name, made)
        if stage == "rl":
            run_stage("sft", run, made, Progress(quiet=True))
        if dies:
            monkeypatch.setattr(module, "save_policy", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run_stage(stage, run, made, Progress(quiet=True))
            monkeypatch.setattr(module, "save_policy", real)
        run_stage(stage, run, made, Progress(quiet=True))
        timed = ("time", "tokens_per_second", "step_seconds")
        return run, [{k: v for k, v in row.items() if k not in timed} for row in run.metrics(stage)]

    (whole, expected), (resumed, found) = trained("whole", False), trained("died", True)
    assert found == expected and max(row["step"] for row in found) == {"sft": 3, "rl": 2}[stage]
    one, two = (load_file(run.checkpoint(policy) / "model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"),
    ],
)
def test_a_disk_that_fills_up_while_a_policy_is_saved_is_told(
    small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    (tmp_path / "r.toml").write_text(RECIPE.format(base=small_base))
    made = recipes.load(tmp_path / "r.toml", ["sft.max_steps=1"])
    run = Run.create(tmp_path / "run", made)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(sft, "save_policy", fail)
    with pytest.raises(RunError, match="the disk is full") as caught:
        run_stage("sft", run, made, Progress(quiet=True))
    assert "MiB free" in caught.value.where and "--resume" in caught.value.remedy
    other = RuntimeError("size mismatch")
    monkeypatch.setattr(sft, "save_policy", lambda *_: (_ for _ in ()).throw(other))
    with pytest.raises(RuntimeError, match="size mismatch"):
        run_stage("sft", run, made, Progress(quiet=True))
