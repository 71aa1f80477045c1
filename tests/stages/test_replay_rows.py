"""The base's own answers beside the demonstrations: drawn once, weighed, learned."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from heatbath import recipe as recipes
from heatbath.data import sources
from heatbath.data.rendering import messages, prompt_ids, render
from heatbath.errors import DataError, RecipeError, RunError
from heatbath.ideas.objectives import Sft
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


def kept(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.folder / "replay.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("beta", [3.0, None])
def test_the_first_loss_is_that_of_demonstrations_and_weighted_answers(
    small_base: Path, tmp_path: Path, beta: float | None
) -> None:
    """One step over all rows, which the base itself takes: its loss is computed here row by row. GIFT holds the base's
    share along the demonstration itself, SFT does not."""
    own = {"samples": 3, "weight": 0.6, "max_new_tokens": 12}
    goal = "sft" if beta is None else {"name": "gift", "beta": beta}
    made = recipe(small_base, own, objective=goal)
    run = trained(tmp_path / "run", made)
    rows = sources.of(made).demos
    tokenizer = AutoTokenizer.from_pretrained(small_base)
    answers, shown = kept(run), {row.id: [] for row in rows}
    assert len(rows) == 8 and len(answers) == 3 * 4, "two demonstrations of a problem are answered once"
    total, count = 0.0, 0
    for row in rows:
        ids = render(tokenizer, row).input_ids
        prompt = len(prompt_ids(tokenizer, messages(row)))
        logp, label = logps(small_base, ids, prompt), torch.tensor(ids[prompt:])
        lifted = logp.clone()
        lifted[torch.arange(len(label)), label] += 300.0 if beta is None else beta
        shown[row.id].append(ids[prompt:])
        total += float(-(lifted.softmax(-1) * logp).sum())
        count += len(label)
    asked = {row.id: prompt_ids(tokenizer, messages(row)) for row in rows}
    for one in answers:
        prompt, ids = asked[one["problem"]], one["ids"]
        assert 1 <= len(ids) <= 12
        logp = logps(small_base, prompt + ids, len(prompt))
        known = [demo[:t] for demo in shown[one["problem"]] for t in range(len(demo) + 1)]
        learned = [t for t in range(len(ids)) if beta is None or ids[:t] not in known]
        # two demonstrations of each problem, which together weigh 2
        total += 2 * 0.2 * float(-logp[learned, torch.tensor(ids)[learned]].sum())
        count += len(learned)
    first = next(row for row in run.metrics("sft") if "objective" in row)
    assert first["objective"] == pytest.approx(total / count, rel=1e-5)
    assert first["supervised_tokens"] == count
    assert plan(made, ("sft",), [])["sft"]["steps"] == 1 and replay.count(made, rows) == 8 + 12


def test_answers_are_the_base_s_own_drawn_once(small_base: Path, tmp_path: Path) -> None:
    made = recipe(small_base, {"samples": 2, "max_new_tokens": 8})
    run = trained(tmp_path / "a", made)
    again = trained(tmp_path / "b", made)
    assert kept(run) == kept(again)
    other = trained(tmp_path / "c", made.model_copy(update={"seed": 1}))
    assert not {one["seed"] for one in kept(run)} & {one["seed"] for one in kept(other)}
    # an interrupted stage goes on with the answers it had, and draws the others as it would have
    resumed = Run.create(tmp_path / "d", made)
    half = [{**one, "ids": [1]} for one in kept(run)[:3]]
    (resumed.folder / "replay.jsonl").write_text("".join(json.dumps(one) + "\n" for one in half) + '{"cut')
    assert resumed.begun("sft")
    run_sft(resumed, made, QUIET)
    both = {(one["problem"], one["seed"]): one["ids"] for one in kept(resumed)}
    assert both == {(o["problem"], o["seed"]): o["ids"] for o in kept(run)} | {
        (o["problem"], o["seed"]): [1] for o in half
    }
    resumed.forget("sft")
    assert not (resumed.folder / "replay.jsonl").exists()


def test_a_verifier_lifts_right_answers(small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """e^β for a right one among those of its problem; all weights of a problem together are what they are without."""
    made = recipe(small_base, {"samples": 4, "lift": 2.0, "alone": True, "max_new_tokens": 6}, max_length=60)
    rows = sources.of(made).demos
    ids = list(dict.fromkeys(row.id for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(small_base)
    golds = {row.id: str(row.answer) for row in rows}
    right = {ids[0]: 4, ids[1]: 1, ids[2]: 0, ids[3]: 0}  # of 4; one of the last cannot be graded

    def written(right: dict[str, int]) -> Run:  # a random model is never right: give it some answers
        run = Run.create(tmp_path / f"run{sum(right.values())}", made)
        answers = []
        for row in replay.problems(rows):
            for number in range(4):
                score = 1.0 if number < right[row.id] else None if (row.id, number) == (ids[3], 3) else 0.0
                said = f"= {golds[row.id]}" if score else "= 5000"
                tokens = tokenizer(said, add_special_tokens=False)["input_ids"]
                seed = replay._seed(made, row, number)
                answers.append({"problem": row.id, "seed": seed, "ids": tokens, "finished": True, "score": score})
        (run.folder / "replay.jsonl").write_text("".join(json.dumps(one) + "\n" for one in answers))
        return run

    def built(run: Run) -> list:
        demos = [render(tokenizer, r) for r in rows]
        model = AutoModelForCausalLM.from_pretrained(small_base)
        return replay.with_replay(run, made, model, tokenizer, rows, demos, Sft(), QUIET)

    found = built(written(right))
    assert len(found) == 15, "no demonstration, and none that could not be graded"
    weights = [max(row.columns["replay"]) for row in found]
    assert weights[:4] == pytest.approx([0.5] * 4), "all right: as if there were no verifier, two demonstrations / 4"
    assert weights[4] / weights[5] == pytest.approx(math.exp(2)) and weights[5:8] == [weights[5]] * 3
    assert [sum(weights[i : i + 4]) for i in (0, 4, 8, 12)] == pytest.approx([2.0] * 4)
    assert all(len(row.columns["replay"]) == len(row.input_ids) == len(row.labels) for row in found)
    with pytest.raises(RunError, match="none of 15 answers of the base is right"):
        built(written(dict.fromkeys(ids, 0)))


def test_a_real_verifier_grades_what_was_drawn(small_base: Path, tmp_path: Path, monkeypatch) -> None:
    made = recipe(small_base, {"samples": 2, "lift": 1.0, "max_new_tokens": 4})
    sums = {row.id: str(row.answer) for row in sources.of(made).demos}
    drawn = replay.LocalSampler.sample
    tokenizer, first = AutoTokenizer.from_pretrained(small_base), next(iter(sums.values()))

    def answering(self, prompts, settings, seeds):
        for batch in drawn(self, prompts, settings, seeds):
            yield [
                dataclasses.replace(one, ids=tokenizer(first, add_special_tokens=False)["input_ids"]) for one in batch
            ]

    monkeypatch.setattr(replay.LocalSampler, "sample", answering)
    run = trained(tmp_path / "run", made)
    for one in kept(run):
        assert one["score"] == float(sums[one["problem"]] == first)
    assert sum(one["score"] for one in kept(run)) >= 2


def test_other_columns_of_the_demonstrations_are_zero_on_answers(small_base: Path, tmp_path: Path) -> None:
    """A column that no objective names, as a comparison with GIFT's β column has it in its SFT cells."""
    rows = [
        {"question": f"What is {a} + 1?", "solution": f"{a + 1}", "answer": f"{a + 1}", "beta": 3.5} for a in (4, 7)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": "files", "demos_from": str(tmp_path / "d.jsonl"), "fields": {"columns": ["beta"]}}
    sft = {"objective": "sft", "batch": 4, "micro_batch": 2, "epochs": 1, "replay": {"max_new_tokens": 5}}
    made = recipes.parse({"model": str(small_base), "precision": "fp32", "data": data, "sft": sft})
    assert trained(tmp_path / "run", made).metrics("sft")
    with pytest.raises(RecipeError, match="'replay' is the name of something else"):
        recipes.parse({"model": "m", "data": {**data, "fields": {"columns": ["replay"]}}, "sft": sft})


def test_what_a_verifier_cannot_grade_is_told_before_training(tmp_path: Path, small_base: Path) -> None:
    rows = [{"question": f"What is {a} + 1?", "solution": f"{a + 1}", "answer": "n/a"} for a in range(10, 14)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": "files", "demos_from": str(tmp_path / "d.jsonl"), "demos": 4}
    table = {"model": str(small_base), "data": data, "sft": {"objective": "sft", "replay": {"lift": 1.0}}}
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
