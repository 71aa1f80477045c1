"""`--dry-run` on real text: what it counts is what the rows hold, and nothing is trained or written."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from heatbath import recipe as recipes
from heatbath.data import sources
from heatbath.errors import DataError
from heatbath.recipe import Recipe, parse
from heatbath.stages import memory
from heatbath.stages.plan import plan, show

FIXTURES = Path(__file__).parents[1] / "fixtures"
GSM8K = {
    "source": "files",
    "folder": str(FIXTURES),
    "pool": "gsm8k.jsonl",
    "demos": 20,
    "validation": 5,
    "prompts": 15,
    "test": 10,
    "fields": {"solution": "answer", "answer_after": "####"},
}


def recipe(base: Path, data: dict | None = None, **sft: object) -> Recipe:
    rl = {"prompts": 4, "update_prompts": 2, "group_size": 2, "micro_batch": 4, "max_new_tokens": 8}
    return parse({"model": str(base), "data": data or GSM8K, "sft": {"batch": 4, "micro_batch": 4, **sft}, "rl": rl})


def test_real_problems_pass_every_check_and_are_counted(small_base: Path) -> None:
    made = recipe(small_base, epochs=3)
    found = plan(made, ["run", "r.toml"])
    demos = sources.load(made.data, made.seed).demos
    assert found["rows"] == {"demos": 20, "validation": 5, "prompts": 15, "test": 10}
    # one token per character of the solution, and EOS
    assert found["sft"]["supervised_tokens"] == sum(len(row.solution) + 1 for row in demos)
    assert found["sft"]["steps"] == 15 and found["sft"]["truncated"] == 0 and found["sft"]["ends_with_eos"] == 20
    assert found["rl"]["steps"] == 6 and found["rl"]["completions"] == 24
    text = show(found)
    for part in ("20 demos", "15 steps of sft", "0 of 20 truncated (0.0%)", "checks    passed", "-m heatbath run r.toml"):
        assert part in text
    assert json.loads(json.dumps(found)) == found


def test_the_cut_rate_of_deepmath_is_told(small_base: Path, tmp_path: Path) -> None:
    """A file of DeepMath-103K's shape, a quarter of whose traces are longer than the limit."""
    rows = [
        {
            "question": f"Find {i}.",
            "final_answer": str(i),
            "difficulty": 5.0,
            "topic": "Algebra",
            **{f"r1_solution_{k}": "x" * (300 if i % 4 == 0 else 50) for k in (1, 2, 3)},
        }
        for i in range(200)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "deepmath.parquet")
    exam = tmp_path / "exam.parquet"
    pq.write_table(pa.Table.from_pylist([{"question": "Exam?", "final_answer": "1"}]), exam)
    sizes = {"demos": 80, "prompts": 80, "validation": 40}
    data = {"source": "deepmath", "pool": str(tmp_path / "deepmath.parquet"), "test_from": str(exam), **sizes}
    with pytest.raises(DataError, match="longer than sft.max_length = 200"):
        plan(recipe(small_base, data, max_length=200), [])
    found = plan(recipe(small_base, data, max_length=200, truncate=True), [])
    cut = sum(int(r.question[5:-1]) % 4 == 0 for r in sources.load(parse({"model": "m", "data": data}).data, 0).demos)
    assert found["sft"]["truncated"] == cut > 5 and found["sft"]["ends_with_eos"] == 80 - cut


def test_nothing_is_written_and_the_tiny_base_is_not_made(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEATBATH_CACHE", str(tmp_path / "cache"))
    found = plan(recipes.load("smoke"), ["run", "smoke"])
    assert found["memory"]["sft"]["weights"] > 0 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_the_estimate_counts_weights_gradients_and_moments(small_base: Path, lora: dict | None) -> None:
    made = recipe(small_base).model_copy(update={"precision": "fp32"})
    made = parse({**made.model_dump(exclude={"lora"}), "lora": lora})
    monkey, memory.ROUND = memory.ROUND, 12
    try:
        parts = memory.estimate(made, 100, 50)["sft"]
    finally:
        memory.ROUND = monkey
    model = AutoModelForCausalLM.from_pretrained(small_base)
    size = 4 * model.num_parameters() / 2**30
    assert parts["weights"] == pytest.approx(size * (1 if lora else 2))
    trained = size
    if lora:
        linear = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
        trained = sum(4 * 4 * (m.in_features + m.out_features) for m in linear) / 2**30
    assert parts["gradients"] == pytest.approx(trained) and parts["optimizer"] == pytest.approx(2 * trained)
