"""An evaluation of tasks beside the run's own problems: what is asked, what is kept, what a kill loses."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from forked import Forked
from heatbath import models, samples
from heatbath.data.sources import load as load_data
from heatbath.data.tasks import Task
from heatbath.engines.sampling import LeftOutError, seed_of
from heatbath.errors import RecipeError, RunError
from heatbath.ideas.intervals import holm
from heatbath.progress import Progress
from heatbath.recipe import Recipe, parse
from heatbath.report.page import write_report
from heatbath.report.scores import scored
from heatbath.run import Run
from heatbath.stages import evaluate, scoring
from heatbath.stages.evaluate import missing, rescore, run_evaluation
from heatbath.stages.exams import exams

TASK = """
name = "capitals"
version = 3
kind = "choice"
licence = "none"
file = "capitals.jsonl"
prompt = "{question}\\nAnswer with a letter."
fields = { options = "options" }
sampling = { temperature = 0.0, max_new_tokens = 3 }
"""
ROWS = [
    {"question": "The capital of France?", "options": ["Paris", "Bonn", "Rome"], "answer": "A"},
    {"question": "The capital of Italy?", "options": ["Paris", "Bonn", "Rome"], "answer": "C"},
    {"question": "The capital of Peru?", "options": ["Lima", "Quito"], "answer": "A"},
]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    (tmp_path / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "capitals.toml").write_text(TASK)
    return tmp_path / "capitals.toml"


def recipe(base: Path, tasks: list, *, own: int = 2, **settings: object) -> Recipe:
    common = {"samples": 2, "k": [1, 2], "max_new_tokens": 4, "temperature": 1.0, "batch": 4}
    data = {"source": "arithmetic", "demos": 0, "validation": 0, "prompts": 0, "test": own} if own else None
    table = {"model": str(base), "precision": "fp32", "eval": common | {"tasks": tasks} | settings}
    return parse(table | ({"data": data} if data else {}))


def evaluated(folder: Path, made: Recipe) -> tuple[Run, dict]:
    run = Run(folder, made).write()
    return run, run_evaluation(run, made, Progress(quiet=True))


def test_a_task_is_sampled_as_the_entry_else_its_definition_else_the_recipe_says(small_base: Path, task: Path) -> None:
    entry = {"name": str(task), "samples": 5, "k": [1, 5], "max_new_tokens": 2}
    made = recipe(small_base, [entry, "arithmetic"], problems=3, top_p=0.9)
    own, capitals, sums = exams(made, load_data(made.data, made.seed))
    assert (own.name, own.samples, own.k, own.sampling.temperature) == ("test", 2, (1, 2), 1.0)
    assert (capitals.name, capitals.version, capitals.kind, len(capitals.rows)) == ("capitals", 3, "choice", 3)
    assert (capitals.samples, capitals.k) == (5, (1, 5))
    s = capitals.sampling
    assert (s.max_new_tokens, s.temperature, s.top_p) == (2, 0.0, 0.9)
    assert (sums.samples, len(sums.rows), sums.sampling.max_new_tokens) == (2, 3, 4)
    one = recipe(small_base, [{"name": str(task), "samples": 1}])
    assert exams(one, load_data(one.data, 0))[1].k == (1,)  # pass@2 of [eval] needs two samples
    with pytest.raises(RecipeError, match="arithmetic' is there twice"):
        recipe(small_base, ["arithmetic", "arithmetic"])
    more = recipe(small_base, [{"name": str(task), "k": [1, 3]}])  # of a table without samples, [eval] has 2
    with pytest.raises(RecipeError, match=r"pass@3 of capitals needs at least 3 samples, not 2"):
        exams(more, load_data(more.data, 0))
    task.write_text(TASK.replace("max_new_tokens = 3", "max_new_tokens = 3, samples = 4, k = [4]"))
    fewer = recipe(small_base, [{"name": str(task), "samples": 1}])
    with pytest.raises(RecipeError, match="pass@4 of capitals needs") as caught:
        exams(fewer, load_data(fewer.data, 0))
    assert caught.value.remedy.endswith("samples = 1, k = [1] }")


def test_two_files_with_tasks_of_one_name_are_refused(small_base: Path, task: Path) -> None:
    other = task.with_name("other.toml")
    other.write_text(TASK)
    made = recipe(small_base, [str(task), "arithmetic", str(other)])
    with pytest.raises(RecipeError, match="two tasks are called 'capitals'") as caught:
        exams(made, load_data(made.data, 0))
    assert caught.value.where == f"eval.tasks, {task} and {other}"


def test_results_are_those_of_each_exam_alone(small_base: Path, task: Path, tmp_path: Path) -> None:
    run, found = evaluated(tmp_path / "run", recipe(small_base, [str(task), "arithmetic"], problems=3))
    assert list(found["tasks"]) == ["capitals", "arithmetic"]
    assert found["tasks"]["capitals"]["version"] == 3 and found["tasks"]["capitals"]["kind"] == "choice"
    rows = run.samples()
    for name, part in {"test": found, **found["tasks"]}.items():
        mine = [row for row in rows if row["task"] == name]
        assert part["policies"]["base"]["samples"] == len(mine) == {"test": 4, "capitals": 6, "arithmetic": 6}[name]
        right = np.mean([row["status"] == "right" for row in mine])
        assert part["policies"]["base"]["pass"]["1"]["mean"] == pytest.approx(right)
    greedy = [row for row in rows if row["task"] == "capitals"]
    by_problem = {row["problem"]: row["completion"] for row in greedy}
    assert all(row["completion"] == by_problem[row["problem"]] for row in greedy), "temperature 0 is greedy"
    assert all("Answer with a letter." in row["question"] and "A. " in row["question"] for row in greedy)
    alone, _ = evaluated(tmp_path / "alone", recipe(small_base, ["arithmetic"], own=0, problems=3))
    drawn = [(r["problem"], r["seed"], r["completion"]) for r in rows if r["task"] == "arithmetic"]
    assert sorted(drawn) == sorted((r["problem"], r["seed"], r["completion"]) for r in alone.samples())


def test_tasks_and_samples_are_added_to_those_there(small_base: Path, task: Path, tmp_path: Path) -> None:
    run, _ = evaluated(tmp_path / "run", recipe(small_base, [str(task)], problems=2))
    before = run.samples()
    more = recipe(small_base, [{"name": str(task), "samples": 3}, "arithmetic"], samples=4)
    found = run_evaluation(Run(run.folder, more), more, Progress(quiet=True))
    after = run.samples()
    assert after[: len(before)] == before
    assert found["tasks"]["capitals"]["policies"]["base"]["samples"] == 3 * 3
    fresh, _ = evaluated(tmp_path / "fresh", more)
    drawn = {(r["task"], r["problem"], r["seed"], r["completion"]) for r in after}
    assert len(drawn) == len(after) and drawn == {
        (r["task"], r["problem"], r["seed"], r["completion"]) for r in fresh.samples()
    }


def test_what_is_missing_is_known_by_its_seed(small_base: Path, tmp_path: Path) -> None:
    made = recipe(small_base, [], samples=4)
    run, found = evaluated(tmp_path / "run", made)
    (exam,), whole = exams(made, load_data(made.data, made.seed)), run.samples()
    asked = {(row.id, n): seed_of(made.seed, "test", row.id, n) for row in exam.rows for n in range(4)}
    assert sorted(asked.values()) == sorted(row["seed"] for row in whole)
    first, second = (row.id for row in exam.rows)
    gone = {asked[first, 1], asked[second, 0], asked[second, 2]}
    run.replace_samples([row for row in whole if row["seed"] not in gone])  # as a killed draw from a server leaves it
    lacking = [(row.id, n) for row, n in missing(run.samples(), exam, made.seed)]
    assert lacking == [(first, 1), (second, 0), (second, 2)]
    assert run_evaluation(run, made, Progress(quiet=True)) == found
    facts = [sorted((row["seed"], row["completion"]) for row in rows) for rows in (whole, run.samples())]
    assert facts[0] == facts[1]
    former = [{k: v for k, v in row.items() if k != "seed"} for row in whole if row["problem"] == first][:3]
    lacking = [(row.id, n) for row, n in missing(former, exam, made.seed)]
    assert lacking == [(first, 3), *((second, n) for n in range(4))]


def test_fewer_problems_later_are_scored_alone(small_base: Path, task: Path, tmp_path: Path) -> None:
    run, _ = evaluated(tmp_path / "run", recipe(small_base, [str(task)]))
    fewer = recipe(small_base, [str(task)], problems=1)
    found = run_evaluation(Run(run.folder, fewer), fewer, Progress(quiet=True))
    assert found["tasks"]["capitals"]["policies"]["base"]["problems"] == 1
    assert len(run.samples(task="capitals")) == 6
    (first,) = found["tasks"]["capitals"]["asked"].split()
    left = [row for row in scored(run.samples(), found) if row["task"] == "capitals"]
    assert [row["problem"] for row in left] == [first, first]


def test_a_policy_that_lacks_samples_is_named_and_not_scored(
    small_base: Path, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cold = recipe(small_base, [str(task)])
    run, found = evaluated(tmp_path / "run", cold)
    assert found["incomplete"] == []
    warm = parse(cold.model_dump(mode="json") | {"sft": {}})
    rows = [row | {"policy": "init"} for row in run.samples()]
    run.add_samples([row for row in rows if row["task"] == "capitals" or row is not rows[0]])  # killed before the last
    run = Run(run.folder, warm).write()
    again = rescore(run, warm, Progress())
    assert again["policies"] == found["policies"] and again["differences"] == []
    assert list(again["tasks"]["capitals"]["policies"]) == ["base", "init"]
    assert {d["mean"] for d in again["tasks"]["capitals"]["differences"]} == {0.0}
    lacking = {"task": "test", "policy": "init", "lacking": 1, "problems": 2, "samples": 2}
    assert again["incomplete"] == [lacking]
    said = "init is not scored: 1 of 2 problems have fewer than the 2 samples that pass@2 takes"
    assert said in capsys.readouterr().err and f"{said}." in write_report(run)["html"].read_text()
    run.replace_samples(rows[:1] + [row for row in run.samples() if row["task"] == "capitals"][:5])
    none = rescore(run, warm, Progress(quiet=True))
    assert (none["policies"], none["tasks"]) == ({}, {}) and len(none["incomplete"]) == 2
    assert "base in capitals is not scored" in write_report(run)["md"].read_text()


def test_prompts_that_do_not_fit_cost_the_other_scores_nothing(small_base: Path, task: Path, tmp_path: Path) -> None:
    long = [
        ROWS[0],
        {**ROWS[1], "question": "The capital of Italy? " * 12},
        ROWS[2],
    ]  # 264 tokens, a context of 256
    task.with_name("capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    made = parse(recipe(small_base, [str(task)]).model_dump(mode="json") | {"sft": {}})
    run = Run(tmp_path / "run", made).write()
    shutil.copytree(small_base, run.checkpoint("init"))
    for _ in range(2):  # and a rerun says the same
        with pytest.raises(LeftOutError, match=r"2 of \d prompts do not fit") as caught:
            run_evaluation(run, made, Progress(quiet=True))
        assert "again" not in caught.value.remedy
        found = run.read_json("results.json")
        assert list(found["policies"]) == ["base", "init"] and found["tasks"] == {}
        assert [(one["policy"], one["lacking"]) for one in found["incomplete"]] == [("base", 1), ("init", 1)]
        assert len(run.samples()) == 2 * (4 + 4)


def test_a_stop_text_of_the_task_ends_a_completion(
    small_base: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, found = evaluated(tmp_path / "a", recipe(small_base, [str(task)], own=0))
    rows = run.samples()
    assert {row["finish"] for row in rows} == {"length"}
    monkeypatch.setattr(Task, "stops", [rows[0]["completion"][1]])
    run, stopped = evaluated(tmp_path / "b", recipe(small_base, [str(task)], own=0))
    for row in run.samples():
        ends = Task.stops[0] in row["completion"]
        assert (row["finish"], row["finished"]) == (("stop", True) if ends else ("length", False))
    cut = [part["tasks"]["capitals"]["policies"]["base"]["truncated_share"] for part in (found, stopped)]
    assert cut[0] == 1.0 > cut[1]


def test_a_changed_base_is_noticed_whichever_engine_samples(
    small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = recipe(small_base, [])
    run, _ = evaluated(tmp_path / "run", made)
    assert run.read_json("base.json")["fingerprint"] == models.fingerprint_of(str(small_base))
    run.write_json("base.json", {"model": "x", "fingerprint": "other"})
    more = recipe(small_base, [], samples=3, engine="vllm")
    monkeypatch.setattr(evaluate, "open_sampler", None)  # it does not come to that
    with pytest.raises(RunError, match="not the one this run began with"):
        run_evaluation(Run(run.folder, more), more, Progress(quiet=True))


def test_samples_of_other_conditions_are_not_mixed(small_base: Path, task: Path, tmp_path: Path) -> None:
    run, _ = evaluated(tmp_path / "run", recipe(small_base, [str(task)]))
    hotter = recipe(small_base, [{"name": str(task), "temperature": 0.5}])
    with pytest.raises(RunError, match=r"capitals were drawn under other conditions: temperature 0.0 → 0.5"):
        run_evaluation(Run(run.folder, hotter), hotter, Progress(quiet=True))
    task.write_text(TASK.replace("version = 3", "version = 4"))
    newer = recipe(small_base, [str(task)])
    with pytest.raises(RunError, match="version 3 → 4"):
        run_evaluation(Run(run.folder, newer), newer, Progress(quiet=True))


def test_rescoring_samples_nothing_and_knows_every_exam(small_base: Path, task: Path, tmp_path: Path) -> None:
    made = recipe(small_base, [str(task)])
    run, found = evaluated(tmp_path / "run", made)
    rows = run.samples()
    run.replace_samples([row | {"status": "right", "score": 1.0} for row in rows])
    assert rescore(run, made, Progress(quiet=True)) == found
    assert [row["status"] for row in run.samples()] == [row["status"] for row in rows]


@pytest.mark.thorough
def test_an_evaluation_killed_anywhere_loses_at_most_the_batch_in_flight(small_base: Path, tmp_path: Path) -> None:
    """Killed with -9 again and again; in the end the samples are those of an evaluation that nobody killed."""
    made = recipe(small_base, [], own=40, samples=3, k=[1], max_new_tokens=60)
    whole, found = evaluated(tmp_path / "whole", made)
    killed = Run(tmp_path / "killed", made).write()
    path, kept, kills = killed.folder / "samples.jsonl.gz", 0, 0
    command = ("eval", str(killed.folder), "--json")
    for stop in (8, 40, 80):
        process = Forked(*command, cwd=tmp_path)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and len(samples.read(path)) < stop:
            time.sleep(0.001)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
        there = len(samples.read(path))
        assert there >= kept and there % 4 == 0, "only whole batches, and none that was kept is lost"
        kept = there
    assert kills >= 2
    last = Forked(*command, cwd=tmp_path)
    assert last.wait(200) == 0, last.said()
    ours = json.loads(last.said())
    assert {key: ours[key] for key in found} == json.loads(json.dumps(found))
    facts = ("problem", "seed", "ids", "completion", "status")
    drawn = sorted([[row[key] for key in facts] for row in run.samples()] for run in (killed, whole))
    assert sorted(map(str, drawn[0])) == sorted(map(str, drawn[1]))


def test_differences_carry_tests_corrected_for_their_number() -> None:
    rng = np.random.default_rng(0)
    rows = {
        policy: [
            {"problem": f"p{q:02}", "status": "right" if rng.random() < rate else "wrong", "finished": True}
            | {"tokens": 1, "answer": "1", "completion": "1"}
            for q in range(40)
            for _ in range(4)
        ]
        for policy, rate in (("base", 0.2), ("init", 0.5), ("final", 0.5))
    }
    found = scoring.summarise(rows, [1, 4])["differences"]
    scoring.correct(found)
    assert [(d["from"], d["to"], d["k"]) for d in found[-2:]] == [("base", "final", 1), ("base", "final", 4)]
    assert [d["p_holm"] for d in found] == pytest.approx(list(holm([d["p"] for d in found])))
    first = found[0]
    assert first["p"] < first["p_holm"] <= 0.001 and first["low"] > 0 and first["mde"] > 0
    counted = [scoring.per_problem(rows[policy]) for policy in ("base", "init")]
    assert scoring.compared(*counted, 1)["mean"] == pytest.approx(first["mean"])
    with pytest.raises(ValueError, match="not asked the same"):
        scoring.compared(counted[0], (["other"], *counted[1][1:]), 1)
