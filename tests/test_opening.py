"""How the folder of a run is opened: what is refused, what stays, and what goes."""

import json
from pathlib import Path

import pytest

from heatbath import samples
from heatbath.errors import HeatbathError, RecipeError, RunError
from heatbath.opening import Opening, open_run
from heatbath.recipe import changes, parse
from heatbath.run import Run

ALL = ("sft", "rl", "eval")


def recipe(**sections: dict):
    tables = {"sft": {}, "rl": {}, "eval": {}} | sections
    return parse({"model": "m", "data": {"source": "arithmetic"}, **tables})


def finished(folder: Path, *stages: str) -> Run:
    """A run whose stages have left what they leave."""
    run = Run.create(folder, recipe())
    for stage in stages:
        if stage == "eval":
            run.add_samples([{"policy": p, "problem": "x"} for p in run.policies])
            run.write_json("results.json", {})
            (folder / "report.html").write_text("page")
        else:
            run.log(stage, 1, {"nll": 1.0})
            policy = run.checkpoint({"sft": "init", "rl": "final"}[stage])
            policy.mkdir(parents=True)
            (policy / "config.json").write_text("{}")
            if stage == "sft":
                run.write_json("surprise.json", {})
    return run


def begin(run: Run, stage: str, *steps: int) -> None:
    """An attempt at a stage that was cut off, with complete checkpoints at these steps and a half one later."""
    run.log(stage, 0, {"nll": 1.0})
    for step in (*steps, 99):
        folder = run.working(stage) / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        run.log(stage, step, {"nll": 1.0})
        if step != 99:
            run.complete(folder, stage)


def snapshot(folder: Path) -> dict:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def policies(folder: Path) -> list[str]:
    return [row["policy"] for row in samples.read(folder / "samples.jsonl.gz")]


@pytest.mark.parametrize("stages", [ALL, ("sft",), ("rl",)])
def test_a_folder_that_holds_something_is_refused_and_untouched(tmp_path: Path, stages: tuple) -> None:
    run = finished(tmp_path / "r", *ALL)
    before = snapshot(run.folder)
    with pytest.raises(HeatbathError) as caught:
        open_run(run.folder, recipe(), stages, Opening(), whole=stages == ALL)
    assert "--fresh" in caught.value.remedy and snapshot(run.folder) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    for how in (Opening(), Opening(resume=True), Opening(fresh=True)):
        with pytest.raises(RecipeError, match="something else than a run"):
            open_run(tmp_path / "mine", recipe(), stages, how, whole=stages == ALL)
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_a_stage_that_comes_next_needs_no_option_and_an_evaluation_never(tmp_path: Path) -> None:
    run = finished(tmp_path / "r", "sft")
    assert open_run(run.folder, recipe(), ("rl",), Opening()).finished("sft")
    finished(tmp_path / "e", *ALL)
    open_run(tmp_path / "e", recipe(), ("eval",), Opening())


def test_an_unfinished_stage_asks_which_is_meant(tmp_path: Path) -> None:
    run = finished(tmp_path / "r", "sft")
    begin(run, "rl", 4, 8)
    with pytest.raises(RunError, match="begun and not finished") as caught:
        open_run(run.folder, recipe(), ("rl",), Opening())
    assert "--resume" in caught.value.remedy and "--fresh" in caught.value.remedy
    resumed = open_run(run.folder, recipe(), ("rl",), Opening(resume=True))
    assert resumed.last_checkpoint("rl", print).name == "checkpoint-8"
    assert not (run.working("rl") / "checkpoint-99").exists(), "a checkpoint without its mark is half of one"
    with resumed.new_checkpoint("final"):
        assert [row["step"] for row in resumed.metrics("rl")] == [0, 4, 8]
    assert not run.working("rl").exists() and run.finished("rl")


def test_fresh_of_one_stage_drops_it_and_what_came_after(tmp_path: Path) -> None:
    run = finished(tmp_path / "r", *ALL)
    before = snapshot(run.folder)
    open_run(run.folder, recipe(), ("rl",), Opening(fresh=True), dry=True)
    assert snapshot(run.folder) == before
    open_run(run.folder, recipe(), ("rl",), Opening(fresh=True))
    assert run.finished("sft") and not run.begun("rl") and run.metrics("sft") and not run.metrics("rl")
    assert policies(run.folder) == ["base", "init"] and not run.finished("eval")
    open_run(run.folder, recipe(), ("sft",), Opening(fresh=True))
    assert not run.begun("sft") and policies(run.folder) == ["base"] and run.read_json("surprise.json") is None


def test_fresh_of_the_whole_run_starts_over(tmp_path: Path) -> None:
    run = finished(tmp_path / "r", *ALL)
    (run.folder / "notes.txt").write_text("mine")
    other = recipe(rl={"lr": 3e-6})
    assert open_run(run.folder, other, ALL, Opening(fresh=True), whole=True).recipe == other
    left = sorted(p.name for p in run.folder.rglob("*") if p.is_file())
    assert left == ["env.json", "notes.txt", "recipe.toml"]
    assert Run.read(run.folder).recipe == other


@pytest.mark.parametrize(
    ("done", "change", "named", "refusal"),
    [
        (("sft",), {"rl": {"lr": 2e-6}}, [], "another recipe"),
        (("sft",), {"rl": {"lr": 2e-6}}, ["rl.lrr"], "names no key of a recipe: rl.lrr"),
        (("sft",), {"rl": {"lr": 2e-6}}, ["rl.lr"], None),
        (("sft",), {"rl": {"lr": 2e-6, "group_size": 16}}, ["rl.lr"], "rl.group_size: 8 → 16"),
        (("sft",), {"rl": {"lr": 2e-6, "group_size": 16}}, ["rl"], None),
        (("sft",), {"sft": {"lr": 2e-6}}, ["sft.lr"], "the sft stage is finished under its former value"),
        (("sft",), {"sft": {"save_every": 7}}, ["sft.save_every"], None),
        (("sft", "rl"), {"lora": {}}, ["lora"], "the sft stage is finished"),
        (ALL, {"eval": {"samples": 16}}, ["eval"], None),
        (ALL, {"eval": {"temperature": 1.0}}, ["eval"], "the eval stage is finished"),
        (ALL, {"reward": {"deadline": 1.0}}, ["reward"], "the rl stage is finished"),
        (ALL, {"reward": {"workers": 4}}, ["reward"], None),
    ],
)
def test_a_changed_recipe(tmp_path: Path, done: tuple, change: dict, named: list, refusal: str | None) -> None:
    run = finished(tmp_path / "r", *done)
    new = recipe(**change)
    how = Opening(resume=True, change=named)
    if refusal is not None:
        before = snapshot(run.folder)
        with pytest.raises(RecipeError, match=refusal):
            open_run(run.folder, new, ALL, how, whole=True)
        assert snapshot(run.folder) == before
        return
    open_run(run.folder, new, ALL, how, whole=True)
    assert Run.read(run.folder).recipe == new
    noted = [json.loads(line) for line in (run.folder / "changes.jsonl").read_text().splitlines()]
    assert {n["key"]: (n["before"], n["after"]) for n in noted} == changes(recipe(), new)
    assert all(run.finished(stage) for stage in done)


def test_a_change_restarts_the_unfinished_stage_that_reads_it(tmp_path: Path) -> None:
    """An optimizer restored from a checkpoint would silently keep its former learning rate."""
    run = finished(tmp_path / "r", "sft")
    begin(run, "rl", 4)
    open_run(run.folder, recipe(rl={"save_every": 3}), ("rl",), Opening(resume=True, change=["rl"]))
    assert run.last_checkpoint("rl") is not None
    new = recipe(rl={"save_every": 3, "lr": 2e-6})
    open_run(run.folder, new, ("rl",), Opening(resume=True, change=["rl.lr"]))
    assert run.last_checkpoint("rl") is None and not run.metrics("rl") and run.finished("sft")


def test_what_a_change_drops_is_said_and_a_new_model_may_be_another_base(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "r", recipe())
    run.require_same_base("aa")
    begin(run, "sft", 4)
    said: list[str] = []
    new = parse({**recipe().model_dump(exclude_none=True), "model": "other"})
    how = Opening(resume=True, change=["model"])
    open_run(run.folder, new, ALL, how, whole=True, say=said.append).require_same_base("bb")
    assert said == ["sft: what was begun under another model is dropped; the stage begins again"]


def test_rl_under_a_new_reward_drops_all_verdicts_under_the_old(tmp_path: Path) -> None:
    run = finished(tmp_path / "r", *ALL)
    new = recipe(reward={"deadline": 1.0})
    open_run(run.folder, new, ("rl",), Opening(fresh=True, change=["reward"]))
    assert run.finished("sft") and not run.begun("rl") and not run.begun("eval")


def test_a_recipe_of_the_users_own_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "recipe.toml").write_text("# my notes")
    for how in (Opening(), Opening(resume=True), Opening(fresh=True)):
        with pytest.raises(RecipeError, match="something else than a run"):
            open_run(tmp_path / "exp", recipe(), ALL, how, whole=True)
    assert (tmp_path / "exp" / "recipe.toml").read_text() == "# my notes"


def test_a_checkpoint_counts_as_something_before_any_number_is_logged(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "r", recipe())
    checkpoint = run.working("rl") / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    run.complete(checkpoint, "rl")
    with pytest.raises(RecipeError, match="unfinished run"):
        open_run(run.folder, recipe(), ALL, Opening(), whole=True)


def test_a_kill_in_the_middle_of_a_fresh_start_does_not_stop_the_next(tmp_path: Path) -> None:
    run = finished(tmp_path / "r", *ALL)
    left = run.checkpoint("init").with_name(".init.removed")
    left.mkdir()
    (left / "config.json").write_text("{}")
    open_run(run.folder, recipe(), ("sft",), Opening(fresh=True))
    assert not run.begun("sft") and not left.exists()


def test_two_processes_do_not_work_on_one_run(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "r", recipe())
    with run.locked(), pytest.raises(RunError, match="another process"), Run(run.folder, recipe()).locked():
        pass
    with run.locked():
        pass


def test_going_on_is_noted_with_versions(tmp_path: Path) -> None:
    run = finished(tmp_path / "r", "sft")
    open_run(run.folder, recipe(), ("rl",), Opening())
    (noted,) = run.read_json("env.json")["resumed"]
    assert noted["versions"]["trl"] and noted["command"]


def test_resume_and_fresh_exclude_each_other() -> None:
    with pytest.raises(RecipeError, match="exclude each other"):
        Opening(resume=True, fresh=True)


def test_a_base_that_changed_on_disk_is_refused(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "r", recipe())
    run.require_same_base("aa")
    run.require_same_base("aa")
    with pytest.raises(RunError, match="not the one this run began with"):
        run.require_same_base("bb")
