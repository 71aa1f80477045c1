"""`heatbath shift` on runs and models, as a user calls it: what it reads, keeps, compares and refuses."""

from __future__ import annotations

import gc
import json
import math
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from test_shift_models import lora_of
from transformers import LlamaForCausalLM

from conftest import small_model, small_tokenizer
from heatbath.data.rendering import IGNORE
from heatbath.data.rows import Row, Splits
from heatbath.errors import DataError, RecipeError, RunError
from heatbath.ideas.intervals import mean_with_interval, paired_difference
from heatbath.progress import Progress
from heatbath.run import Run
from heatbath.stages import shift, shift_rows, shift_summary
from heatbath.stages.shift_settings import Settings, named_and_set, parse
from mistakes import call

QUIET = Progress(quiet=True)
KS = (1, 3, 10)
RECIPE = """
model = "{base}"
precision = "fp32"
[data]
source = "arithmetic"
demos = 8
validation = 5
prompts = 4
test = 3
[sft]
objective = {{ name = "gift", beta = 4.0 }}
lr = 3e-3
epochs = 1
batch = 4
micro_batch = 4
[rl]
lr = 1e-3
prompts = 4
update_prompts = 4
group_size = 2
micro_batch = 8
max_new_tokens = 8
[eval]
samples = 2
k = [1]
max_new_tokens = 8
"""


@pytest.fixture(scope="module")
def work(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/gift (sft, rl, eval), runs/sft (sft alone), and what the command says of them side by side."""
    folder = tmp_path_factory.mktemp("shift")
    (folder / "small.toml").write_text(RECIPE.format(base=small_base))
    for command in (
        "run small.toml --out runs/gift",
        "sft small.toml sft.objective.name=sft --out runs/sft",
        "shift runs/gift runs/sft --out both.json topk=1,3,10",
    ):
        code, said = call(folder, command)
        assert code == 0, said
    return folder


@pytest.fixture
def runs(work: Path, tmp_path: Path) -> Path:
    """A copy to write into."""
    shutil.copytree(work, tmp_path / "work")
    return tmp_path / "work"


def read_shift(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "shift.json").read_text())


def test_a_finished_run(work: Path) -> None:
    found = read_shift(work / "runs" / "gift")
    pairs = [("base", "init"), ("init", "final"), ("base", "final")]
    assert [(t["from"], t["to"]) for t in found["transitions"]] == pairs
    assert found["options"] == Settings(topk=KS).recorded() and list(found["models"]) == ["base", "init", "final"]
    assert len({m["fingerprint"] for m in found["models"].values()}) == 3
    assert found["data"]["sequences"] == found["data"]["problems"] == 5 and found["vocab_size"] == 101
    for t in found["transitions"]:
        assert t["kl_from_to"]["mean"] > 0 and t["cosine"]["mean"] < 1 and set(t["overlap"]) == {"1", "3", "10"}
    one, two, both = found["transitions"]
    assert one["entropy_to"] == two["entropy_from"] and one["entropy_from"] == both["entropy_from"]
    assert two["logp_to"] == both["logp_to"] and one["logp_to"]["mean"] > one["logp_from"]["mean"]  # it has learned
    values = found["sequences"]["transitions"][0]["l2_before"]
    assert values == [float(f"{x:.8g}") for x in values] and len(values) == 5
    assert not list((work / "runs" / "gift").glob(".shift*"))


def test_the_rows_are_the_validation_demonstrations_as_the_loss_sees_them(runs: Path) -> None:
    run = Run.read(runs / "runs" / "gift")
    tokenizer = small_tokenizer()
    by_tokens = {
        tokens: shift_rows.demonstrations(run.recipe, tokenizer, Settings(tokens=tokens), "x")
        for tokens in ("response", "all", "all-but-first")
    }
    for row, every, rest in zip(*(found.rows for found in by_tokens.values()), strict=True):
        prompt = tokenizer.decode([i for i, label in zip(row.input_ids, row.labels, strict=True) if label == IGNORE])
        assert prompt.startswith("<|user|>What is") and prompt.endswith("<|assistant|>")
        assert row.labels[-1] == tokenizer.eos_token_id
        assert every.labels == [IGNORE, *row.input_ids[1:]] and rest.labels == [IGNORE, IGNORE, *row.input_ids[2:]]
    few = shift_rows.demonstrations(run.recipe, tokenizer, Settings(problems=2, max_length=25), "x")
    assert len(few.rows) == 2 and {len(row.input_ids) for row in few.rows} == {25}
    assert few.report()["truncated"] == 2 and few.report()["max_length"] == 25
    assert few.problems == by_tokens["response"].problems[:2]
    assert len({found.report()["fingerprint"] for found in (few, *by_tokens.values())}) == 4
    with pytest.raises(DataError, match="no sequence has a token"):
        shift_rows.demonstrations(run.recipe, tokenizer, Settings(max_length=3), "x")
    bare = run.recipe.model_copy(update={"data": run.recipe.data.model_copy(update={"validation": 0})})
    with pytest.raises(DataError, match="no validation demonstrations"):
        shift_rows.demonstrations(bare, tokenizer, Settings(), "x")
    assert len(shift_rows.demonstrations(bare, tokenizer, Settings(split="test"), "x").rows) == 3


def test_a_problem_without_a_solution_is_no_demonstration(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row("1 + 1?", "2", "2"), Row("1 + 2?", None, "3"), Row("1 + 1?", "it is 2", "2")]
    monkeypatch.setattr(shift_rows.sources, "load", lambda *_: Splits([], [], [], rows))
    recipe = Run.read(work / "runs" / "gift").recipe
    found = shift_rows.demonstrations(recipe, small_tokenizer(), Settings(split="test", problems=2), "x")
    assert found.problems == [rows[0].id, rows[2].id] and found.report()["problems"] == 1


def test_a_prompt_that_leaves_no_room_is_left_out_and_counted(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [Row("1 + 1?", "2", "2"), Row("How much is 1 + 2, if you please?", "3", "3")]
    monkeypatch.setattr(shift_rows.sources, "load", lambda *_: Splits([], rows, [], []))
    recipe = Run.read(work / "runs" / "gift").recipe
    found = shift_rows.demonstrations(recipe, small_tokenizer(), Settings(max_length=20), "x")
    assert found.problems == [rows[0].id] and found.report()["left_out"] == 1
    told = shift_summary.described({**read_shift(work / "runs" / "gift"), "data": found.report()})
    assert "1 left out, whose prompt fills 20 tokens" in told


def test_samples_follow_their_prompt(runs: Path) -> None:
    run, tokenizer = Run.read(runs / "runs" / "gift"), small_tokenizer()
    found = shift_rows.samples(run, run.recipe, tokenizer, Settings(on="samples:final"), "x")
    drawn = run.samples("final", "test")
    assert len(found.rows) == len(drawn) == 6 and found.problems == [s["problem"] for s in drawn]
    assert found.retokenised == 0 and found.report()["problems"] == 3
    for row, sample in zip(found.rows, drawn, strict=True):
        answer = [label for label in row.labels if label != IGNORE]
        assert answer == sample["ids"] and row.input_ids[-len(answer) :] == answer
        prompt = tokenizer.decode(row.input_ids[: -len(answer)])
        assert prompt == f"<|user|>{sample['question']}<|end|>\n<|assistant|>"
    assert len(shift_rows.samples(run, run.recipe, tokenizer, Settings(on="samples:init", problems=1), "x").rows) == 2
    former = [
        {"policy": "init", "problem": drawn[0]["problem"], "completion": "1+1", "finished": end, "tokens": 3}
        for end in (True, False)
    ]
    for name in ("samples.jsonl.gz", "samples.jsonl"):
        (run.folder / name).unlink(missing_ok=True)
    (run.folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in former))
    old = shift_rows.samples(run, run.recipe, tokenizer, Settings(on="samples:init"), "x")
    wanted = [[*tokenizer("1+1")["input_ids"], 1], tokenizer("1+1")["input_ids"]]
    assert old.retokenised == 2
    assert [row.input_ids[-len(answer) :] for row, answer in zip(old.rows, wanted, strict=True)] == wanted
    with pytest.raises(RunError, match="no samples of 'final'"):
        shift_rows.samples(run, run.recipe, tokenizer, Settings(on="samples:final"), "x")


def test_on_samples_of_a_policy(runs: Path) -> None:
    code, said = call(runs, "shift runs/gift --on samples:final topk=1,3")
    assert code == 0, said
    found = read_shift(runs / "runs" / "gift")
    assert found["options"]["on"] == "samples:final" and list(found["transitions"][0]["overlap"]) == ["1", "3"]
    assert found["data"]["sequences"] == 6 and found["data"]["problems"] == 3


def test_what_is_there_is_kept(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = []
    real = shift.measured_pair
    monkeypatch.setattr(shift, "measured_pair", lambda *a, **k: counted.append(1) or real(*a, **k))

    def again(command: str) -> tuple[str, int]:
        counted.clear()
        code, said = call(runs, command)
        assert code == 0, said
        return said, len(counted)

    sft, asked = runs / "runs" / "sft", "shift runs/sft topk=1,3,10"
    first = read_shift(sft)
    said, anew = again(asked)
    assert anew == 0 and "1 of 1 transitions measured before, kept" in said and read_shift(sft) == first
    assert again(f"{asked} --fresh")[1] == 1 and read_shift(sft) == first
    assert again(f"{asked} layer=after mean=sequence pool=flat")[1] == 0
    after = read_shift(sft)
    assert after["transitions"][0]["l2"] == first["transitions"][0]["geometry"]["after"]["flat"]["l2"]
    assert again(asked)[1] == 0
    for other in ("temperature=0.7", "problems=2", "max_length=25"):
        said, anew = again(f"{asked} {other}")
        assert anew == 1 and "which this one replaces" in said
    (runs / "fewer.toml").write_text((runs / "small.toml").read_text().replace("validation = 5", "validation = 4"))
    assert again(asked)[1] == 1
    (sft / "shift.json").write_text(json.dumps({"format": 0}))  # of another version
    assert again(asked)[1] == 1
    assert again(f"{asked} --data fewer.toml")[1] == 1 and read_shift(sft)["data"]["sequences"] == 4


def test_only_what_has_changed_is_measured_again(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, settings = runs / "runs" / "gift", Settings(topk=KS)
    monkeypatch.chdir(runs)
    before = read_shift(run)
    model = LlamaForCausalLM.from_pretrained(run / "checkpoints/final")
    with torch.no_grad():
        model.model.norm.weight += 0.1
    model.save_pretrained(run / "checkpoints/final")
    pairs = []
    real = shift.Shelf.pair
    monkeypatch.setattr(shift.Shelf, "pair", lambda self, a, b: pairs.append((a, b)) or real(self, a, b))
    after = shift.run_shift([str(run)], settings, progress=QUIET)
    assert pairs == [("init", "final"), ("base", "final")] and after["transitions"][0] == before["transitions"][0]
    assert after["transitions"][1] != before["transitions"][1]
    Run.read(run).forget("rl")
    assert not (run / "shift.json").exists()


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_16_bits_the_models_are_the_runs_own(dtype: str, runs: Path) -> None:
    whole = read_shift(runs / "runs" / "gift")
    code, said = call(runs, f"shift runs/gift topk=1,3,10 dtype={dtype}")
    assert code == 0, said
    found = read_shift(runs / "runs" / "gift")
    assert found["models"] == whole["models"] and found["options"]["dtype"] == dtype
    a, b = (each["transitions"][0]["l2"]["mean"] for each in (found, whole))
    assert a == pytest.approx(b, rel=0.1)


@pytest.mark.thorough
def test_two_models_in_memory_at_most(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    real = shift.load_model

    def counted(*arguments: Any) -> Any:
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 1
        model = real(*arguments)
        alive.append(weakref.ref(model.model))
        return model

    monkeypatch.setattr(shift, "load_model", counted)
    for _ in range(2):  # measured, then only asked for their fingerprints
        shift.run_shift([str(runs / "runs" / "gift")], Settings(problems=1), progress=QUIET)
    assert len(alive) == 4 + 3


def test_two_runs_side_by_side(work: Path) -> None:
    both = json.loads((work / "both.json").read_text())
    one, two = (read_shift(work / "runs" / name) for name in ("gift", "sft"))
    assert (
        [run["run"] for run in both["runs"]] == ["runs/gift", "runs/sft"]
        and both["same_base"]
        and both["same_sequences"]
    )
    assert [run["transitions"] for run in both["runs"]] == [one["transitions"], two["transitions"]]
    assert {(d["from"], d["to"]) for d in both["differences"]} == {("base", "init")}
    found = {d["metric"]: d for d in both["differences"]}
    assert set(found) == {"cosine", "l2", *shift_summary.DISTRIBUTION} | {
        f"{kind}@{k}" for kind in ("overlap", "jaccard") for k in (1, 3, 10)
    }
    first, second = one["sequences"], two["sequences"]
    w = np.array(first["tokens"])
    for name, column in (("kl_from_to", "kl_from_to"), ("l2", "l2_before"), ("overlap@3", "overlap@3")):
        x, y = (np.array(table["transitions"][0][column]) for table in (first, second))
        apart, mean = y - x, np.average(y - x, weights=w)
        wanted = mean_with_interval(mean + len(w) * w * (apart - mean) / w.sum())
        assert found[name]["mean"] == pytest.approx(wanted.mean, abs=1e-9) and found[name]["problems"] == 5
        assert found[name]["low"] == pytest.approx(wanted.low, abs=1e-9)
        key, _, k = name.partition("@")
        ours, theirs = ((run["transitions"][0][key][k] if k else run["transitions"][0][key]) for run in (one, two))
        assert found[name]["mean"] == pytest.approx(theirs["mean"] - ours["mean"], abs=1e-9)
    assert found["entropy_from"]["mean"] == found["entropy_from"]["high"] == 0  # the same base on the same tokens
    again = {**one, "run": "x"}
    assert {d["mean"] for d in shift_summary.differences([again, again], Settings(topk=(1, 3, 10)))} == {0.0}


def test_differences_are_over_the_common_problems() -> None:
    def run(problems: list[str], values: list[float]) -> dict[str, Any]:
        columns = dict.fromkeys((*shift_summary.DISTRIBUTION, "cosine_before", "l2_before"), values)
        table = {"problem": problems, "tokens": [1] * len(values), "transitions": [columns]}
        return {"transitions": [{"from": "base", "to": "init"}], "sequences": table}

    a = run(["p", "q", "r", "x"], [1.0, 2.0, 4.0, 90.0])
    b = run(["r", "y", "q", "p", "p"], [9.0, 70.0, 3.0, 1.0, 3.0])
    found = {d["metric"]: d for d in shift_summary.differences([a, b], Settings(mean="sequence"))}["l2"]
    # b's mean over its four sequences of common problems is 4, with p counted twice
    assert found["problems"] == 3 and found["mean"] == pytest.approx(4 - 7 / 3)
    weighted = {"p": 4 + 3 / 4 * (1 - 4 + 3 - 4), "q": 4 + 3 / 4 * (3 - 4), "r": 4 + 3 / 4 * (9 - 4)}
    wanted = paired_difference([1.0, 2.0, 4.0], [weighted[p] for p in "pqr"])
    assert (found["low"], found["high"]) == pytest.approx((wanted.low, wanted.high))
    assert shift_summary.differences([a, run(["z"], [1.0])], Settings()) == []
    # a transition is found by its name, wherever it stands; what only one run has is left out
    b["transitions"] = [{"from": "base", "to": "final"}]
    assert shift_summary.differences([a, b], Settings()) == []
    late = run(["p", "q", "r", "x"], [5.0, 6.0, 7.0, 8.0])
    a["transitions"].append({"from": "base", "to": "final"})
    a["sequences"]["transitions"] += late["sequences"]["transitions"]
    found = shift_summary.differences([a, b], Settings(mean="sequence"))
    assert {(d["from"], d["to"]) for d in found} == {("base", "final")} and found[1]["mean"] == pytest.approx(4 - 6)


def test_plain_models_and_an_adapter(runs: Path, small_base: Path) -> None:
    adapted = lora_of(small_model())
    adapted.peft_config["default"].base_model_name_or_path = str(small_base)
    adapted.save_pretrained(runs / "adapter")
    adapted.merge_and_unload().save_pretrained(runs / "merged")
    small_tokenizer().save_pretrained(runs / "merged")
    for name in ("adapter", "merged"):
        code, said = call(runs, f"shift {small_base} ./{name} --data small.toml --out {name}.json")
        assert code == 0, said
    one, two = (json.loads((runs / f"{name}.json").read_text()) for name in ("adapter", "merged"))
    assert one["data"] == two["data"] and [(t["from"], t["to"]) for t in one["transitions"]] == [("base", "init")]
    for name, column in one["sequences"]["transitions"][0].items():
        assert two["sequences"]["transitions"][0][name] == pytest.approx(column, rel=1e-3, abs=1e-5)
    final = runs / "runs/gift/checkpoints/final"
    code, said = call(runs, f"shift {small_base} ./merged {final} --data runs/gift --out three.json")
    assert code == 0, said
    three = json.loads((runs / "three.json").read_text())["transitions"]
    assert len(three) == 3 and three[2]["l2"] == read_shift(runs / "runs" / "gift")["transitions"][2]["l2"]


def spoiled(how: str) -> Callable[[Path], None]:
    """Changes to the tokenizer of the final policy."""

    def change(folder: Path) -> None:
        tokenizer = small_tokenizer()
        if how == "vocabulary":
            tokenizer.add_tokens(["<|think|>"])
        elif how == "end":
            tokenizer.eos_token = "<|user|>"
        else:  # the same vocabulary, other merges
            tokenizer._tokenizer.pre_tokenizer = None
        tokenizer.save_pretrained(folder)

    return change


@pytest.mark.parametrize("how", ["vocabulary", "end", "pieces"])
def test_another_tokenizer_is_an_error(how: str, runs: Path) -> None:
    spoiled(how)(runs / "runs/gift/checkpoints/final")
    code, said = call(runs, "shift runs/gift")
    assert code == 1 and "'final'" in said and "another tokenizer than 'base'" in said


@pytest.mark.parametrize(
    ("command", "exit_code", "says"),
    [
        ("shift runs/gift runs/nothing", 2, "runs/nothing is no run"),
        ("shift runs/gift runs/sft runs/gift", 2, "more than two runs"),
        ("shift runs/nothing", 2, "runs/nothing is no run"),
        ("shift a b c d --data small.toml", 2, "4 models given"),
        ("shift ./a --data small.toml", 2, "1 models given"),
        ("shift layer=after", 2, "nothing is no run"),
        ("shift runs/gift layer=middle", 2, "before, after"),
        ("shift runs/gift laier=after", 2, "did you mean 'layer'?"),
        ("shift runs/gift topk=0", 2, "1 or more"),
        ("shift runs/gift topk=many", 2, "numbers such as"),
        ("shift runs/gift problems=few", 2, "a whole number"),
        ("shift runs/gift problems=0", 2, "1 or more"),
        ("shift runs/gift max_length=1", 2, "2 or more"),
        ("shift runs/gift temperature=0", 2, "above 0"),
        ("shift runs/gift temperature=warm", 2, "a number"),
        ("shift runs/gift --on answers", 2, "samples:POLICY"),
        ("shift runs/gift --on samples:", 2, "samples:POLICY"),
        ("shift runs/gift --on samples:best", 2, "base, init, final"),
        ("shift runs/gift --on samples:init --data small.toml", 2, "samples of its own"),
        ("shift runs/sft --on samples:init", 1, "no samples of 'init'"),
        (
            "shift runs/gift runs/sft --on samples:final",
            1,
            "no samples of 'final'",
        ),  # in the second, which is read first
        ("shift runs/gift --out small.toml", 2, "would be lost"),
        ("shift runs/gift runs/sft --out runs/gift/env.json", 2, "would be lost"),
        ("shift runs/gift --out runs", 2, "runs/shift.json"),
    ],
)
def test_mistakes_are_named(command: str, exit_code: int, says: str, work: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in work.rglob("*") if path.is_file()}
    code, said = call(work, command)
    assert (code, says in said) == (exit_code, True), said
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_run_with_one_policy_and_a_changed_base_are_errors(runs: Path, small_base: Path) -> None:
    shutil.rmtree(runs / "runs/sft/checkpoints/init")
    code, said = call(runs, "shift runs/sft")
    assert code == 1 and "has only base so far" in said
    (runs / "runs/gift/base.json").write_text(json.dumps({"model": "x", "fingerprint": "other"}))
    code, said = call(runs, "shift runs/gift")
    assert code == 1 and "not the one this run began with" in said


def test_settings_of_a_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=3").mkdir()
    words = ["lr=3", "runs/x", "layer=after", "runs/a=b", "topk=[1, 5]"]
    assert named_and_set(words) == (["lr=3", "runs/x", "runs/a=b"], ["layer=after", "topk=[1, 5]"])
    assert parse(["topk=[5,1,5]", "temperature=0.6", "problems=3", "tokens=all"]) == Settings(
        topk=(1, 5), temperature=0.6, problems=3, tokens="all"
    )
    assert parse([], "samples:init").policy == "init" and parse([]).policy == ""
    with pytest.raises(RecipeError, match="temperature"):
        Settings(temperature=math.inf)


def test_tables(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = json.loads((work / "both.json").read_text())
    one = both["runs"][0]
    table = shift_summary.rows(one)
    assert table[0][1:] == ["base → init", "init → final", "base → final"] and len(table) == 1 + 8 + 3
    assert table[2][0] == "L2" and table[2][1].startswith(f"{one['transitions'][0]['l2']['mean']:.4f} [")
    two = shift_summary.rows_of_two(both)
    assert [row[0] for row in two if row[0]] == ["base → init", "init → final", "base → final"]
    assert len(two) == 1 + 3 * 11 and {row[3] for row in two[12:]} == {""}  # the second run has no final policy
    assert two[1][2:4] == [f"{run['transitions'][0]['cosine']['mean']:.4f}" for run in both["runs"]]
    assert two[1][4].startswith(f"{both['differences'][0]['mean']:+.4f} [")
    assert len(shift_summary.geometry_rows(one)) == 1 + 10
    for found in (read_shift(work / "runs/gift"), both):
        shift_summary.show(found, Console(width=200, highlight=False))
        said = capsys.readouterr().out
        for text in ("5 sequences of 5 problems", "T = 1;", "KL(from ‖ to), nats", "top-1 overlap", "1% of the tokens"):
            assert text in said
