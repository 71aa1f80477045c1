"""`heatbath compare` as a user runs it: real cells, shared work, kills, failures, and a table that can be checked."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from forked import Forked
from heatbath import samples
from heatbath.recipe import comparison
from heatbath.stages.compare import Comparison, listed
from mistakes import call

pytestmark = pytest.mark.thorough

RECIPE = """
model = "{base}"
precision = "fp32"
[data]
source = "arithmetic"
demos = 16
validation = 5
prompts = 8
test = 6
[sft]
lr = 3e-3
epochs = 1
batch = 8
micro_batch = 8
[rl]
lr = 1e-3
prompts = 4
update_prompts = 4
group_size = 4
micro_batch = 16
max_new_tokens = 8
readiness = 4
eval_every = 1
eval_prompts = 6
[eval]
samples = 4
k = [1, 4]
temperature = 1.0
max_new_tokens = 8
[strategies.gift.sft.objective]
beta = 4.0
[compare]
vary = {{ strategy = ["direct-rl", "sft", "gift"] }}
seeds = [0, 1]
shift = true
"""
TUNE = """
[compare.tune]
seeds = [9]
grid = { "sft.lr" = [1e-9, 3e-3] }
grids = { "direct-rl" = { "rl.lr" = [1e-9, 1e-3] } }
overrides = { "rl.max_steps" = 1 }
"""


def compare(folder: Path, *arguments: object) -> str:
    """What `heatbath compare study.toml …` says in that folder, where it succeeds."""
    code, said = call(folder, " ".join(["compare study.toml", *map(str, arguments)]))
    assert code == 0, said
    return said


@pytest.fixture(scope="module")
def study(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished comparison of three settings and two seeds, by a process of its own."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "study.toml").write_text(RECIPE.format(base=small_base))
    command = [sys.executable, "-m", "heatbath", "compare", "study.toml", "--jobs", "2", "--json", "--out", "out"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((folder / "out" / "compare.json").read_text())
    return folder


def found(folder: Path) -> dict:
    return json.loads((folder / "compare.json").read_text())


def test_the_table_is_what_the_cells_files_say(study: Path) -> None:
    """The scores once more from the samples themselves, without any of our statistics."""
    told = found(study / "out")
    assert told["baseline"] == "direct-rl" and told["cells"] == 6
    for name, policies in (("direct-rl", ("base", "final")), ("gift", ("base", "init", "final"))):
        for policy in policies:
            means = []
            for seed in (0, 1):
                rows = samples.read(study / "out" / name / str(seed) / "samples.jsonl.gz")
                own = [row["status"] == "right" for row in rows if row["policy"] == policy]
                assert len(own) == 6 * 4
                means.append(sum(own) / len(own))
            numbers = told["settings"][name]["tasks"]["test"][policy]["1"]
            assert numbers["seeds"] == pytest.approx(means) and numbers["mean"] == pytest.approx(np.mean(means))
    rows = [row for row in told["differences"]["test"] if (row["from"], row["to"], row["k"]) == ("sft", "gift", 1)]
    ends = {name: told["settings"][name]["tasks"]["test"]["final"]["1"]["seeds"] for name in ("sft", "gift")}
    assert rows[0]["each"] == pytest.approx(np.subtract(ends["gift"], ends["sft"]))
    own = told["settings"]["gift"]
    assert [step for step, _ in own["curve"]] == [0.0, 1.0, 2.0] and len(own["validation"]) == 2
    assert set(own["shift"]) == {"base → init", "init → final", "base → final"}
    assert own["cost"]["sft"]["tokens"] > 0 and len(own["readiness"]) == 2


def test_what_cells_have_in_common_is_made_once(study: Path) -> None:
    logs = [path.read_text() for path in sorted((study / "out").glob("*/*.log"))]
    assert len(logs) == 6
    assert sum("taken: samples of base" in log for log in logs) >= 2, "the last of each seed finds it there"
    first, second = (samples.read(study / "out" / name / "1" / "samples.jsonl.gz") for name in ("sft", "gift"))
    drawn = [[(r["seed"], r["ids"]) for r in rows if r["policy"] == "base"] for rows in (first, second)]
    assert drawn[0] == drawn[1], "taken over, or drawn once more, they are the same"


def test_a_start_is_shared_by_settings_that_differ_after_it(study: Path) -> None:
    compare(study, "strategy=sft", "--vary rl.lr=1e-3,1e-4", "--seeds 0", "--out lr")
    weights = [
        study / "lr" / name / "0" / "checkpoints" / "init" / "model.safetensors" for name in ("lr=0.001", "lr=0.0001")
    ]
    assert os.path.samefile(*weights)
    alone = study / "out" / "sft" / "0" / "checkpoints" / "init" / "model.safetensors"
    assert alone.read_bytes() == weights[0].read_bytes(), "the same start as in a run of its own"
    assert "One seed" in (study / "lr" / "compare.md").read_text()


def test_runs_that_are_there_make_the_same_table(study: Path) -> None:
    """Grouped by what their recipes say: nobody names the settings."""
    cells = " ".join(f"out/{name}/{seed}" for name in ("sft", "gift") for seed in (1, 0))
    code, said = call(study, f"compare {cells} --baseline sft --out pair")
    assert code == 0, said
    told, whole = found(study / "pair"), found(study / "out")
    assert told["settings"] == {name: whole["settings"][name] for name in ("sft", "gift")}
    pair = [row for row in whole["differences"]["test"] if {row["from"], row["to"]} == {"sft", "gift"}]
    assert [row["mean"] for row in told["differences"]["test"]] == [row["mean"] for row in pair]
    code, said = call(study, "compare out/sft/0 alone-not-there")
    assert code == 2 and "override" in said
    code, said = call(study, "compare out/sft/0 out/sft/0 --out twice")
    assert code == 2 and "the same seed" in said


def test_a_second_time_nothing_is_done_again(study: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (study / "out").glob("*/*/**/*") if p.is_file()}
    said = compare(study, "--out out")
    assert "cells" not in said.splitlines()
    assert {p: p.stat().st_mtime_ns for p in (study / "out").glob("*/*/**/*") if p.is_file()} == before


def test_a_cell_by_itself_is_the_same_cell(study: Path) -> None:
    compare(study, "--out out --dry-run")
    asked = Comparison("study.toml", comparison(study / "study.toml"), (), Path("out"))
    with contextlib.chdir(study):
        cells = listed(asked)
    assert [cell["state"] for cell in cells] == ["done"] * 6 and [cell["number"] for cell in cells] == list(range(1, 7))
    command = cells[2]["command"]
    code, said = call(study, " ".join([*command[1:-1], "alone"]))
    assert code == 0, said
    cell = json.loads((study / cells[2]["folder"] / "results.json").read_text())
    assert json.loads((study / "alone" / "results.json").read_text()) == cell


def test_a_comparison_killed_anywhere_ends_as_if_it_had_not_been(study: Path) -> None:
    """kill -9 of every process of it at random moments, until it is through."""
    draw, kills = random.Random(7), 0
    command = [sys.executable, "-m", "heatbath", "compare", "study.toml", "--seeds", "0", "--out", "killed", "--json"]
    for attempt in range(12):
        process = subprocess.Popen(
            command, cwd=study, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        while attempt < 4 and not list((study / "killed").glob("*/*.log")) and process.poll() is None:
            time.sleep(0.1)  # until the first cell has begun
        try:
            process.wait(draw.uniform(0, 8) if attempt < 4 else 300)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            time.sleep(0.2)
    assert process.returncode == 0 and kills >= 2
    ours, theirs = (found(study / out)["settings"] for out in ("killed", "out"))
    for name in ("direct-rl", "sft", "gift"):
        for file in ("results.json", "readiness.json"):
            one, other = (json.loads((study / out / name / "0" / file).read_text()) for out in ("killed", "out"))
            assert one == other
        for arrow, measures in ours[name]["shift"].items():
            assert all(values[0] == theirs[name]["shift"][arrow][measure][0] for measure, values in measures.items())


def begun(study: Path, out: str, *more: str) -> Forked:
    """A comparison of which a cell has begun."""
    process = Forked("compare", "study.toml", "--out", out, *more, cwd=study)
    while not list((study / out).glob("*/*.log")):
        assert process.poll() is None
        time.sleep(0.1)
    return process


def test_the_death_of_the_command_ends_its_cells(study: Path) -> None:
    process = begun(study, "orphans", "--seeds", "5,6")
    process.kill()
    process.wait()
    ends_at = time.monotonic() + 60
    while (alive := working_on(study / "orphans")) and time.monotonic() < ends_at:
        time.sleep(0.2)
    assert not alive


def working_on(folder: Path) -> list[str]:
    """Processes that have a file of that folder open."""
    held = []
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if str(folder.resolve()) in os.readlink(link):
                held.append(link.parts[2])
        except OSError:
            continue
    return held


def test_an_interrupt_saves_and_is_told(study: Path) -> None:
    process = begun(study, "stopped", "--seeds", "7")
    process.kill(signal.SIGINT)
    assert process.wait(90) == 130 and "the same command goes on" in process.said()
    assert not working_on(study / "stopped")


def test_a_failed_cell_is_told_and_the_others_go_on(study: Path) -> None:
    (study / "fail").mkdir()
    (study / "fail" / "comparison.json").write_text(json.dumps({"recipe": "study.toml", "overrides": []}) + "\n")
    (study / "fail" / "sft" / "0").mkdir(parents=True)
    (study / "fail" / "sft" / "0" / "mine.txt").write_text("somebody's own")
    code, said = call(study, "compare study.toml --seeds 0 --jobs 2 --out fail")
    assert code == 1 and "1 cell failed" in said
    assert "sft seed 0: the output folder exists and holds something else than a run" in said
    assert (study / "fail" / "sft" / "0" / "mine.txt").read_text() == "somebody's own"
    told = found(study / "fail")["settings"]
    assert told["sft"]["seeds"] == [] and told["gift"]["seeds"] == [0] and told["direct-rl"]["seeds"] == [0]


def test_a_cell_of_another_recipe_is_not_counted(study: Path, small_base: Path) -> None:
    """The recipe was edited after a cell was run: it is neither averaged with the others nor overwritten."""
    folder = study / "edited"
    folder.mkdir()
    (folder / "study.toml").write_text(RECIPE.format(base=small_base))
    compare(folder, "--vary strategy=sft --seeds 0 --out out")
    (folder / "study.toml").write_text(RECIPE.format(base=small_base).replace("lr = 3e-3", "lr = 1e-3"))
    code, said = call(folder, "compare study.toml --vary strategy=sft --seeds 0,1 --out out")
    assert code == 1 and "sft seed 0: the folder holds a run of another recipe" in said
    assert found(folder / "out")["settings"]["sft"]["seeds"] == [1]
    assert "lr = 0.003" in (folder / "out" / "sft" / "0" / "recipe.toml").read_text()


def test_two_processes_share_the_work(study: Path) -> None:
    both = [Forked("compare", "study.toml", "--seeds", "0", "--out", "shared", "--json", cwd=study) for _ in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    assert all(json.loads(process.said())["cells"] == 3 for process in both), "and neither complains"
    attempts = [path.read_text().count("--- attempt") for path in (study / "shared").glob("*/*.log")]
    trained = [path.read_text().count("\nrl (paper)") for path in (study / "shared").glob("*/*.log")]
    assert sum(attempts) > 3 and trained == [1, 1, 1], "each cell was trained by one of them"


def test_tuning_chooses_what_is_compared(study: Path, small_base: Path) -> None:
    """A learning rate of nothing loses against one that learns, unless both fail alike."""
    folder = study / "tuned"
    folder.mkdir()
    (folder / "study.toml").write_text(RECIPE.format(base=small_base) + TUNE)
    compare(folder, "--vary strategy=direct-rl,sft --jobs 2 --out out --cell 1")
    code, said = call(folder, "compare study.toml --vary strategy=direct-rl,sft --out out --cell 5")
    assert code == 1 and "run cells 1 to 4 first" in said
    assert not (folder / "out" / "chosen.json").exists(), "three trials are not there yet"
    compare(folder, "--vary strategy=direct-rl,sft --jobs 2 --out out")
    chosen = json.loads((folder / "out" / "chosen.json").read_text())
    assert len(chosen["tried"]) == 4
    for name, trial in chosen["trials"].items():
        own = {row["trial"]: row["score"] for row in chosen["tried"] if row["setting"] == name}
        assert own[trial] == max(own.values()) and list(own)[[*own.values()].index(max(own.values()))] == trial
        path = folder / "out" / "tuning" / name / trial / "9" / "results.json"
        last = list(json.loads(path.read_text())["policies"].values())[-1]
        assert last["pass"]["1"]["mean"] == own[trial] and last["problems"] == 5
        key, value = chosen["overrides"][name][0].split("=")
        for seed in (0, 1):
            made = (folder / "out" / name / str(seed) / "recipe.toml").read_text()
            assert f"\n{key.rpartition('.')[2]} = {float(value)}\n" in made


def test_mistakes_are_told_before_anything_runs(study: Path) -> None:
    for arguments, said in (
        ("--vary strategy=gfit", "did you mean 'gift'"),
        ("--vary sft.lrr=1,2", "unknown key"),
        ("--cell 99", "there is no cell 99"),
        ("--seeds x", "not a list of seeds"),
        ("--out .", "holds something else"),
    ):
        code, message = call(study, f"compare study.toml {arguments}")
        assert code == 2 and said in message, message
    code, message = call(study, "compare study.toml sft.lr=1 --out out")
    assert code == 2 and "another comparison" in message
