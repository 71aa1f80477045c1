"""A stage killed in the middle and resumed ends in the very weights of the uninterrupted one, bit for bit."""

import json
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from forked import Forked
from heatbath import samples as kept
from heatbath.opening import Opening, open_run
from heatbath.progress import Progress
from heatbath.recipe import Recipe, load, parse
from heatbath.run import CHECKPOINTS, COMPLETE, Run
from heatbath.sections import Lora
from heatbath.stages.evaluate import rescore, run_evaluation
from heatbath.stages.rl import run_rl
from heatbath.stages.sft import run_sft
from mistakes import call

pytestmark = pytest.mark.thorough

RECIPE = """
model = "tiny"
[data]
source = "arithmetic"
demos = 96
validation = 16
prompts = 40
test = 10
[sft]
objective = { name = "gift", beta = 8.0 }
lr = 5e-4
epochs = 4
batch = 16
micro_batch = 8
save_every = 4
log_every = 3
[rl]
lr = 1e-4
epochs = 2
prompts = 8
update_prompts = 4
group_size = 4
micro_batch = 8
max_new_tokens = 28
kl_every = 2
save_every = 3
[eval]
samples = 4
k = [1]
max_new_tokens = 28
"""
# Of the rows of the log, what no clock decides.
TIMED = ("time", "tokens_per_second", "step_seconds")


def kill_at(folder: Path, stage: str, step: int, *arguments: str) -> int:
    """Starts the stage and kills it with -9 as soon as it has logged that step; returns the step of the newest complete
    checkpoint, which is an earlier or a slightly later one."""
    process = Forked(*arguments, cwd=folder)
    out = folder / arguments[arguments.index("--out") + 1]
    log, deadline = out / "metrics.jsonl", time.monotonic() + 240
    try:
        while time.monotonic() < deadline and process.poll() is None:
            rows = [json.loads(line) for line in log.read_bytes().split(b"\n")[:-1]] if log.exists() else []
            if any(row["stage"] == stage and row["step"] >= step for row in rows):
                break
            time.sleep(0.002)
        assert process.poll() is None, f"the stage ended before it could be killed\n{process.said()}"
        process.kill()
        assert process.wait() == -signal.SIGKILL
    finally:
        if process.poll() is None:
            process.kill()
    complete = (out / "checkpoints" / f".{stage}").glob(f"checkpoint-*/{COMPLETE}")
    return max(int(path.parent.name.rpartition("-")[2]) for path in complete)


def weights(folder: Path, policy: str) -> dict:
    return load_file(folder / "checkpoints" / policy / "model.safetensors")


def assert_same_weights(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] == two[name]).all(), f"{name} differs"


def untimed(folder: Path, stage: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rows if row["stage"] == stage]


@pytest.fixture(scope="module")
def whole(tiny_base: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small.toml and a run of it that nobody interrupted."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "small.toml").write_text(RECIPE)
    code, said = call(folder, "run small.toml --out whole")
    assert code == 0, said
    return folder


def test_killed_in_sft_and_in_rl_the_run_ends_where_the_uninterrupted_one_does(whole: Path) -> None:
    arguments = ("run", "small.toml", "--out", "killed")
    step = kill_at(whole, "sft", 13, *arguments)
    assert 12 <= step < 24 and not (whole / "killed" / "checkpoints" / "init").exists()
    code, said = call(whole, " ".join(arguments))
    assert code == 2 and "--resume to go on with it" in said
    step = kill_at(whole, "rl", 13, *arguments, "--resume")  # in the second epoch
    assert 12 <= step < 20 and step % 2 == 0, "RL is resumed only where a generation ends"
    assert_same_weights(weights(whole / "killed", "init"), weights(whole / "whole", "init"))
    code, said = call(whole, " ".join([*arguments, "--resume"]))
    assert code == 0 and "rl: going on after step" in said
    assert "sft: finished before, kept" in said
    assert_same_weights(weights(whole / "killed", "final"), weights(whole / "whole", "final"))
    for stage in ("sft", "rl"):
        assert untimed(whole / "killed", stage) == untimed(whole / "whole", stage)
    ours, theirs = (json.loads((whole / n / "results.json").read_text()) for n in ("killed", "whole"))
    assert ours == theirs
    assert sorted(p.name for p in (whole / "killed" / "checkpoints").iterdir()) == ["final", "init"]


def test_more_samples_are_added_and_all_can_be_scored_again(whole: Path) -> None:
    """Neither samples anything that is there already."""
    folder = whole / "whole"
    more = load(whole / "small.toml", ["eval.samples=5"])
    opened = open_run(folder, more, ("eval",), Opening(resume=True, change=["eval.samples"]))
    before = samples(folder)
    run_evaluation(opened, more, Progress(quiet=True))
    after = samples(folder)
    assert after[: len(before)] == before and len(after) == len(before) * 5 // 4
    spoiled = [{**row, "status": "wrong", "score": 0.0} for row in after]
    opened.replace_samples(spoiled)
    results = rescore(opened, more, Progress(quiet=True))
    again = samples(folder)
    kept = ("completion", "status", "score", "answer", "rule")
    assert [[r[k] for k in kept] for r in again] == [[r[k] for k in kept] for r in after]
    right = sum(r["status"] == "right" for r in after if r["policy"] == "base")
    assert results["policies"]["base"]["verdicts"]["right"] == right > 0


def samples(folder: Path) -> list[dict]:
    return kept.read(folder / "samples.jsonl.gz")


class Died(BaseException):
    """Stands for a kill at one point; nothing of the library catches it."""


def small(base: Path, **changes: dict) -> Recipe:
    """6 SFT steps and 4 RL steps an epoch, 3 epochs each; a checkpoint at every second step."""
    tables = {
        "data": {"source": "arithmetic", "demos": 24, "validation": 4, "prompts": 8, "test": 2},
        "sft": {
            "objective": {"name": "gift", "beta": 4.0},
            "lr": 3e-3,
            "epochs": 3,
            "batch": 4,
            "micro_batch": 4,
            "save_every": 2,
            "log_every": 4,
        },
        "rl": {
            "lr": 1e-2,
            "epochs": 3,
            "prompts": 4,
            "update_prompts": 2,
            "group_size": 2,
            "micro_batch": 4,
            "max_new_tokens": 6,
            "save_every": 2,
            "kl_every": 3,
        },
    }
    for table, change in changes.items():
        tables[table] = tables.get(table, {}) | change
    return parse({"model": str(base), "precision": "fp32", **tables})


def lengths(completions: list, **_: object) -> list[float]:
    """A reward that the small model does not always fail: any two completions differ in it."""
    return [float(sum(map(ord, completion[0]["content"])) % 7) for completion in completions]


def carried_out(folder: Path, recipe: Recipe, stage: str) -> tuple[dict, list]:
    run = Run(folder, recipe)
    (run_sft if stage == "sft" else run_rl)(run, recipe, Progress(quiet=True))
    return weights(folder, CHECKPOINTS[stage]), untimed(folder, stage)


DROPOUT = {"rank": 4, "dropout": 0.2}


@pytest.mark.parametrize(
    ("objective", "more"),
    [
        ({"name": "psft", "refresh": 5}, {}),  # its old policy is four steps old at the kill
        ({"name": "psft", "refresh": 5}, {"lora": Lora(**DROPOUT)}),
        ({"name": "gift", "beta": {"start": 9.0, "end": 2.0, "steps": 15}}, {}),
        ({"name": "gift", "beta": {"left_to_base": 0.2}}, {"reference": "surprise", "epsilon": 0.01}),
        ({"name": "gift_sequence", "mass": 0.8}, {"reference": "hidden", "packing": True}),
        ({"name": "sed", "topk": 3}, {}),
    ],
)
def test_what_an_objective_carries_from_step_to_step_is_resumed(
    small_base: Path, tmp_path: Path, monkeypatch, objective: dict, more: dict
) -> None:
    """PSFT's copy of the weights, β of the step, what was measured on the base, the place in a cache."""
    monkeypatch.setattr("heatbath.stages.measuring.cache_root", lambda: tmp_path / "cache")
    lora, settings = more.get("lora"), {k: v for k, v in more.items() if k != "lora"}
    recipe = small(small_base, sft={"objective": objective, **settings}).model_copy(update={"lora": lora})
    Run.create(tmp_path / "whole", recipe)
    expected = carried_out(tmp_path / "whole", recipe, "sft")
    Run.create(tmp_path / "cut", recipe)
    original = Run.complete

    def dying(self: Run, checkpoint: Path, stage: str) -> None:
        original(self, checkpoint, stage)
        if checkpoint.name == "checkpoint-8":
            raise Died

    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(Run, "complete", dying)
        carried_out(tmp_path / "cut", recipe, "sft")
    found = carried_out(tmp_path / "cut", recipe, "sft")
    assert_same_weights(found[0], expected[0])
    assert found[1] == expected[1]


@pytest.mark.parametrize(
    ("stage", "step", "where", "lora"),
    [
        ("sft", 8, "log", None),
        ("sft", 18, "complete", None),  # the last step, not evaluated, the policy not saved
        ("sft", 6, "complete", DROPOUT),  # an epoch's end, saved and not evaluated
        ("sft", 6, "log", DROPOUT),  # ... and evaluated
        ("rl", 4, "complete", None),  # an epoch's end
        ("rl", 5, "log", DROPOUT),
        ("rl", 6, "complete", None),  # in the second epoch
        ("rl", 12, "complete", None),
    ],
)
def test_resumed_anywhere_it_is_the_same_run(
    small_base: Path, tmp_path: Path, monkeypatch, stage: str, step: int, where: str, lora: dict | None
) -> None:
    """Weights and log, with dropout and validation drawing from the random states in between."""
    monkeypatch.setattr("heatbath.stages.rl.reward_functions", lambda settings, grader: [lengths])
    recipe = small(small_base) if stage == "sft" else small(small_base).model_copy(update={"sft": None})
    recipe = recipe.model_copy(update={"lora": None if lora is None else Lora(**lora)})
    Run.create(tmp_path / "whole", recipe)
    expected = carried_out(tmp_path / "whole", recipe, stage)
    original = getattr(Run, where)

    def dying(self: Run, *arguments: object) -> None:
        original(self, *arguments)
        at = arguments[1] if where == "log" else int(arguments[0].name.rpartition("-")[2])
        if at == step:
            raise Died

    Run.create(tmp_path / "cut", recipe)
    with monkeypatch.context() as patch, pytest.raises(Died):
        patch.setattr(Run, where, dying)
        carried_out(tmp_path / "cut", recipe, stage)
    assert not Run(tmp_path / "cut", recipe).finished(stage)
    found = carried_out(tmp_path / "cut", recipe, stage)
    assert_same_weights(found[0], expected[0])
    assert found[1] == expected[1]
    start = load_file(small_base / "model.safetensors")
    assert any((found[0][name] != start[name]).any() for name in start), "a stage that changes nothing proves nothing"


def test_how_often_to_save_may_change_on_the_way(small_base: Path, tmp_path: Path, monkeypatch) -> None:
    recipe = small(small_base)
    run, saved = Run.create(tmp_path / "run", recipe), []
    original = Run.complete

    def dying(self: Run, checkpoint: Path, stage: str) -> None:
        original(self, checkpoint, stage)
        saved.append(int(checkpoint.name.rpartition("-")[2]))
        if saved[-1] == 4:
            raise Died

    monkeypatch.setattr(Run, "complete", dying)
    with pytest.raises(Died):
        run_sft(run, recipe, Progress(quiet=True))
    changed = small(small_base, sft={"save_every": 5, "log_every": 1})
    how = Opening(resume=True, change=["sft.save_every", "sft.log_every"])
    run_sft(open_run(run.folder, changed, ("sft",), how), changed, Progress(quiet=True))
    assert saved == [2, 4, 5, 10, 15, 18]
    assert [row["step"] for row in run.metrics("sft") if "nll" in row] == [4, *range(5, 19)]
