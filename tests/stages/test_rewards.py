"""Rewards of a recipe: kinds of answers from tables, sums, the stop when grading fails; through the real RL stage."""

import json
from pathlib import Path

import pytest

from heatbath import recipe as recipes
from heatbath.data import sources
from heatbath.errors import RunError
from heatbath.progress import Progress
from heatbath.run import Run
from heatbath.stages.evaluate import rescore, run_evaluation
from heatbath.stages.rewards import grader_of, reward_functions, verdict_reward
from heatbath.stages.rl import run_rl
from heatbath.verify.graders import as_gold, require_few_failures
from heatbath.verify.sandbox import BUBBLEWRAP, available
from heatbath.verify.verdict import Verdict

BREVITY = "def brevity(completions, **_):\n    return [1.0 / (1 + len(c[0]['content'])) for c in completions]\n"
CHOICE = {"question": "Which is a colour?", "answer": "B", "choices": ["seven", "red", "Paris"]}
CODE = {
    "question": "Write f(x) that doubles x.",
    "tests": {"entry_point": "f", "inputs": [[1], [4]], "outputs": [2, 8]},
}


def recipe(base: Path, folder: Path, row: dict, reward: dict, **fields: str) -> recipes.Recipe:
    rows = [row | {"question": f"{row['question']} ({i})"} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data = {"source": "files", "folder": str(folder), "prompts_from": "rows.jsonl", "test": 2, "pool": "rows.jsonl"}
    return recipes.parse(
        {
            "model": str(base),
            "precision": "fp32",
            "data": {**data, "test_from": None, "prompts_from": None, "prompts": 4, "fields": fields},
            "rl": {"prompts": 4, "update_prompts": 2, "group_size": 2, "micro_batch": 4, "max_new_tokens": 6},
            "eval": {"samples": 1, "k": [1], "max_new_tokens": 6},
            "reward": reward,
        }
    )


def test_options_are_asked_with_the_question_and_graded(small_base: Path, tmp_path: Path) -> None:
    made = recipe(small_base, tmp_path, CHOICE, {"kind": "choice"}, options="choices")
    row = sources.load(made.data, 0).prompts[0]
    assert row.question.endswith("\nA. seven\nB. red\nC. Paris")
    with grader_of(made.reward) as grader:
        gold = as_gold("choice", str(row.answer))
        verdicts = grader.grade(["The answer is (B).", "The answer is red.", "Paris", "no idea"], [gold] * 4)
    assert [v.status for v in verdicts] == ["right", "right", "wrong", "no_answer"]


@pytest.mark.skipif(available(BUBBLEWRAP) is not None, reason=str(available(BUBBLEWRAP)))
def test_programs_are_rewarded_evaluated_and_graded_again(small_base: Path, tmp_path: Path) -> None:
    made = recipe(small_base, tmp_path, CODE, {"kind": "code"}, tests="tests")
    gold = sources.load(made.data, 0).prompts[0].answer
    with grader_of(made.reward) as grader:
        reward = verdict_reward(grader, "code")
        programs = ["```python\ndef f(x):\n    return 2 * x\n```", "```python\ndef f(x):\n    return 2\n```", "dunno !"]
        assert reward(completions=programs, gold=[gold] * 3) == [1.0, 0.0, 0.0]
    run = Run.create(tmp_path / "run", made)
    run_rl(run, made, Progress(quiet=True))
    assert sum(v for k, v in run.metrics("rl")[0].items() if k.startswith("verdict/")) == pytest.approx(1.0)
    run_evaluation(run, made, Progress(quiet=True))
    samples = run.samples()
    assert len(samples) == 4 and all(s["gold"] is None for s in samples)  # tests are not written with every sample
    rescore(run, made, Progress(quiet=True))
    assert [s["status"] for s in run.samples()] == [s["status"] for s in samples]


def test_rewards_are_summed_with_their_weights(
    small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(BREVITY)
    monkeypatch.chdir(tmp_path)
    weights = {"verdict": 2.0, "mine.py:brevity": 0.5}
    made = recipe(small_base, tmp_path, {"question": "1 + 1?", "answer": "2"}, {"weights": weights})
    run = Run.create(tmp_path / "run", made)
    run_rl(run, made, Progress(quiet=True))
    row, second = run.metrics("rl")  # two optimizer steps of one generation, which is rewarded once
    assert "reward" not in second and second["grad_norm"] > 0
    assert row["reward/brevity"] > 0
    assert row["reward"] == pytest.approx(2.0 * row["reward/verdict"] + 0.5 * row["reward/brevity"])
    assert row["informative_share"] > 0  # told by the weighted sum: the verdicts alone are all alike


def test_a_reward_model_is_the_whole_reward_unless_weights_say_otherwise() -> None:
    alone = recipes.parse({"model": "m", "data": {"source": "arithmetic"}, "reward": {"model": "judge"}}).reward
    assert alone.weighted == {"verdict": 0.0, "model": 1.0}
    beside = alone.model_copy(update={"weights": {"verdict": 1.0, "model": 0.2}})
    assert beside.weighted == {"verdict": 1.0, "model": 0.2}
    plain = recipes.parse({"model": "m", "data": {"source": "arithmetic"}}).reward
    with grader_of(plain) as grader:
        assert [f.__name__ for f in reward_functions(plain, grader)] == ["verdict"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "def f(completions, **_): return [None] * len(completions)",
            "no completion of this step got a reward",
        ),
        (
            "def f(completions, **_): return [1.0, float('nan')] * (len(completions) // 2)",
            "gave nan for completion 1",
        ),
        ("def f(completions): return [1.0] * len(completions)", "mine.py:f raised TypeError"),
        ("def f(completions, **_): return [1.0]", "mine.py:f gave 1 rewards for 8"),
        ("def f(completions, **_): return 'text'", "mine.py:f raised ValueError"),
    ],
)
def test_faults_of_ones_own_function_stop_the_run(
    small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str
) -> None:
    (tmp_path / "mine.py").write_text(body + "\n")
    monkeypatch.chdir(tmp_path)
    row = {"question": "1 + 1?", "answer": "2"}
    made = recipe(small_base, tmp_path, row, {"weights": {"verdict": 0.0, "mine.py:f": 1.0}})
    if "None" in body:  # the verdicts, too, give no signal
        monkeypatch.setattr(Verdict, "score", property(lambda self: None))
    with pytest.raises(RunError, match=said):
        run_rl(Run.create(tmp_path / "run", made), made, Progress(quiet=True))


def test_too_many_failures_stop_the_run_and_show_the_first() -> None:
    fine, bad = Verdict("wrong", "5", "boxed+value"), Verdict("timeout", "9^9", "boxed+deadline")
    golds, said = ["4"] * 200, ["so 9^9"] * 200
    require_few_failures([bad] + [fine] * 19, said[:20], golds[:20], 0.01, "[reward]")  # one alone never stops
    require_few_failures([bad] * 2 + [fine] * 198, said, golds, 0.01, "[reward]")  # 1 % is not above 1 %
    with pytest.raises(RunError, match=r"3 of 200 verdicts failed; the first is timeout .* on '9\^9', gold '4'"):
        require_few_failures([bad] * 3 + [fine] * 197, said, golds, 0.01, "[reward]")
    with pytest.raises(RunError, match="1 of 1 verdicts failed"):
        require_few_failures([bad], said[:1], golds[:1], 0.0, "[reward]")
