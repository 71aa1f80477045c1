"""The files of a run survive what kills a process."""

import json
from pathlib import Path

import pytest

from heatbath import recipe as recipes
from heatbath.errors import RecipeError, RunError
from heatbath.run import Run, append_jsonl, read_jsonl

RECIPE = recipes.parse({"model": "m", "data": {"source": "arithmetic"}, "sft": {}, "rl": {}})


def test_a_line_cut_off_by_a_kill_is_dropped_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"a": 1}, {"a": "é\n"}])
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        before = read_jsonl(path)
        append_jsonl(path, [{"a": 3}])
        assert read_jsonl(path) == [*before, {"a": 3}]


def test_numbers_that_are_none_are_left_out_of_the_log(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "r", RECIPE)
    run.log("rl", 1, {"reward": float("nan"), "entropy": 1.0, "kl_init": float("inf")})
    (row,) = run.metrics("rl")
    assert row["entropy"] == 1.0 and not {"reward", "kl_init"} & set(row)


def test_a_run_that_ended_before_its_first_number_does_not_use_up_its_folder(tmp_path: Path) -> None:
    Run.create(tmp_path / "r", RECIPE)
    other = RECIPE.model_copy(update={"seed": 1})
    assert Run.create(tmp_path / "r", other).recipe.seed == Run.read(tmp_path / "r").recipe.seed == 1
    Run.read(tmp_path / "r").log("sft", 1, {"nll": 1.0})
    with pytest.raises(RecipeError, match="the output folder exists"):
        Run.create(tmp_path / "r", other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(RecipeError, match="the output folder exists"):
        Run.create(tmp_path / "mine", other)


def test_a_checkpoint_takes_its_name_only_when_complete(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "r", RECIPE)
    with pytest.raises(OSError, match="disk"), run.new_checkpoint("init") as folder:
        (folder / "half").write_text("")
        raise OSError("disk full")
    assert not run.checkpoint("init").exists()
    with run.new_checkpoint("init") as folder:
        assert not (folder / "half").exists()
        (folder / "whole").write_text("")
    assert [p.name for p in run.checkpoint("init").iterdir()] == ["whole"]
    with pytest.raises(RunError, match="already trained"), run.new_checkpoint("init"):
        pass


def test_a_forgotten_policy_leaves_no_samples_behind_where_a_kill_comes_between(tmp_path: Path, monkeypatch) -> None:
    run = Run.create(tmp_path / "r", RECIPE)
    with run.new_checkpoint("init"):
        pass
    rows = [{"task": "mt_bench", "policy": policy, "problem": "a"} for policy in ("base", "init")]
    run.add_samples(rows)
    append_jsonl(run.folder / "judgments.jsonl", rows)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        run.forget("sft")
    assert run.samples() == read_jsonl(run.folder / "judgments.jsonl") == rows[:1]


def test_the_command_can_be_pasted_back(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.argv", ["heatbath", "run", "demo", "eval.k=[1, 2]"])
    run = Run.create(tmp_path / "r", RECIPE)
    assert json.loads((run.folder / "env.json").read_text())["command"] == "heatbath run demo 'eval.k=[1, 2]'"
