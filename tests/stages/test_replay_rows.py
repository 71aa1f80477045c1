"""The base's own answers beside the demonstrations: drawn once, weighed, learned."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from heatbath import recipe as recipes
from heatbath.data import sources
from heatbath.data.rendering import messages, prompt_ids, render
from heatbath.errors import DataError
from heatbath.progress import Progress
from heatbath.run import Run
from heatbath.stages import pipeline, replay
from heatbath.stages.plan import plan
from heatbath.stages.sft import run_sft

QUIET = Progress(quiet=True)
DATA = {"source": "arithmetic", "demos": 4, "validation": 2, "prompts": 0, "test": 0, "paths": 2}


def recipe(base: Path, own: dict, **sft) -> recipes.Recipe:
    settings = {"objective": {"name": "gift", "beta": 3.0}, "batch": 64, "micro_batch": 4, "epochs": 1, "save_every": 0}
    table = {"model": str(base), "precision": "fp32", "data": DATA, "sft": {**settings, **sft, "replay": own}}
    return recipes.parse(table)


def trained(folder: Path, made: recipes.Recipe) -> Run:
    run = Run.create(folder, made)
    run_sft(run, made, QUIET)
    return run


def logps(base: Path, ids: list[int], prompt: int) -> torch.Tensor:
    """log p_base of what follows the prompt, [n, V], and the ids there."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, prompt - 1 : -1].double().log_softmax(-1)


def test_the_first_loss_is_that_of_demonstrations_and_weighted_answers(small_base: Path, tmp_path: Path) -> None:
    """One step over all rows, which the base itself takes: its loss is computed here row by row."""
    made = recipe(small_base, {"samples": 3, "weight": 0.6, "max_new_tokens": 12})
    run = trained(tmp_path / "run", made)
    rows = sources.of(made).demos
    tokenizer = AutoTokenizer.from_pretrained(small_base)
    answers = run.read_json("replay.json")
    assert len(rows) == 8 and len(answers) == 3 * 4, "two demonstrations of a problem are answered once"
    total, count = 0.0, 0
    for row in rows:
        ids = render(tokenizer, row).input_ids
        prompt = len(prompt_ids(tokenizer, messages(row)))
        logp, label = logps(small_base, ids, prompt), torch.tensor(ids[prompt:])
        lifted = logp.clone()
        lifted[torch.arange(len(label)), label] += 3.0
        total += float(-(lifted.softmax(-1) * logp).sum())
        count += len(label)
    asked = {row.id: prompt_ids(tokenizer, messages(row)) for row in rows}
    for one in answers:
        prompt, ids = asked[one["problem"]], one["ids"]
        assert 1 <= len(ids) <= 12
        logp = logps(small_base, prompt + ids, len(prompt))
        total += 0.2 * float(-logp[torch.arange(len(ids)), torch.tensor(ids)].sum())
        count += len(ids)
    first = next(row for row in run.metrics("sft") if "objective" in row)
    assert first["objective"] == pytest.approx(total / count, rel=1e-5)
    assert first["supervised_tokens"] == count
    assert plan(made, ("sft",), [])["sft"]["steps"] == 1 and replay.count(made, rows) == 8 + 12


def test_answers_are_the_base_s_own_drawn_once(small_base: Path, tmp_path: Path) -> None:
    made = recipe(small_base, {"samples": 2, "max_new_tokens": 8})
    run = trained(tmp_path / "a", made)
    again = trained(tmp_path / "b", made)
    assert run.read_json("replay.json") == again.read_json("replay.json")
    other = trained(tmp_path / "c", made.model_copy(update={"seed": 1}))
    assert [one["seed"] for one in run.read_json("replay.json")] != [
        one["seed"] for one in other.read_json("replay.json")
    ]
    # an interrupted stage goes on with the answers it had
    kept = [{**one, "ids": [1]} for one in run.read_json("replay.json")]
    resumed = Run.create(tmp_path / "d", made)
    resumed.write_json("replay.json", kept)
    run_sft(resumed, made, QUIET)
    first, fresh = (next(r for r in x.metrics("sft") if "objective" in r) for x in (resumed, run))
    assert first["supervised_tokens"] < fresh["supervised_tokens"]
    resumed.forget("sft")
    assert not (resumed.folder / "replay.json").exists()


def test_a_verifier_lifts_right_answers(small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """e^β for a right one, and all weights together what they are without it; `alone` leaves the demonstrations out."""
    made = recipe(small_base, {"samples": 4, "beta": 2.0, "alone": True, "max_new_tokens": 6}, max_length=60)
    rows = sources.of(made).demos
    right = {row.id for row in rows[:2]}
    draw = replay._drawn

    def answering(run, recipe, tokenizer, wanted, progress):  # a random model is never right: give it some answers
        found = draw(run, recipe, tokenizer, wanted, progress)
        answer = {row.id: str(row.answer) for row, _ in wanted}
        for one in found:
            said = f"= {answer[one['problem']]}" if one["problem"] in right else "= 5000"
            one["ids"] = tokenizer(said, add_special_tokens=False)["input_ids"]
        return found

    monkeypatch.setattr(replay, "_drawn", answering)
    run = trained(tmp_path / "run", made)
    scores = [one["score"] for one in run.read_json("replay.json")]
    assert sum(scores) == 4 * len(right) and len(scores) == 16
    tokenizer = AutoTokenizer.from_pretrained(small_base)
    built = replay.with_replay(run, made, tokenizer, rows, [render(tokenizer, r) for r in rows], (), QUIET)
    assert len(built) == 16, "no demonstration"
    weights = [max(row.columns["replay"]) for row in built]
    assert sum(weights) == pytest.approx(16 / 4)
    lifted, plain = ({w for w, s in zip(weights, scores, strict=True) if s == value} for value in (1.0, 0.0))
    assert len(lifted) == len(plain) == 1 and lifted.pop() / plain.pop() == pytest.approx(math.exp(2))
    assert all(len(row.columns["replay"]) == len(row.input_ids) == len(row.labels) for row in built)


def test_what_a_verifier_cannot_grade_is_told_before_training(tmp_path: Path, small_base: Path) -> None:
    rows = [{"question": f"What is {a} + 1?", "solution": f"{a + 1}", "answer": "n/a"} for a in range(10, 14)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": "files", "demos_from": str(tmp_path / "d.jsonl"), "demos": 4}
    table = {"model": str(small_base), "data": data, "sft": {"objective": "sft", "replay": {"beta": 1.0}}}
    with pytest.raises(DataError, match="gold answers cannot be graded"):
        pipeline.check(recipes.parse(table), ("sft",))
    pipeline.check(recipes.parse({**table, "sft": {"objective": "sft", "replay": {}}}), ("sft",))


def test_a_cache_serves_it_too(small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEATBATH_CACHE", str(tmp_path / "cache"))
    losses = []
    for reference in ("model", "surprise", "hidden"):
        made = recipe(small_base, {"samples": 2, "max_new_tokens": 8}, reference=reference, epsilon=1e-6)
        run = trained(tmp_path / reference, made)
        losses.append(next(row["objective"] for row in run.metrics("sft") if "objective" in row))
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
