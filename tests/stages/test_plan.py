"""`--dry-run` on real text: what it counts is what the rows hold, and nothing is trained or written."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from conftest import small_model, small_tokenizer
from heatbath import recipe as recipes
from heatbath.data import sources
from heatbath.errors import DataError, RecipeError
from heatbath.opening import Opening
from heatbath.progress import Progress
from heatbath.recipe import Recipe, parse
from heatbath.run import Run
from heatbath.stages import memory, sft
from heatbath.stages.plan import folder_line, plan, show

FIXTURES = Path(__file__).parents[1] / "fixtures"
ALL = ("sft", "rl", "eval")
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


@pytest.fixture(autouse=True)
def ascii_copy(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The small tokenizer knows ASCII alone; a few of the problems hold other quotation marks."""
    folder = tmp_path_factory.mktemp("ascii")
    text = (FIXTURES / "gsm8k.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    ascii_lines = [{k: v.encode("ascii", "ignore").decode() for k, v in row.items()} for row in lines]
    (folder / "gsm8k.jsonl").write_text("\n".join(map(json.dumps, ascii_lines)))
    GSM8K["folder"] = str(folder)


def recipe(base: Path, data: dict | None = None, **sft: object) -> Recipe:
    rl = {"prompts": 4, "update_prompts": 2, "group_size": 2, "micro_batch": 4, "max_new_tokens": 8}
    return parse({"model": str(base), "data": data or GSM8K, "sft": {"batch": 4, "micro_batch": 4, **sft}, "rl": rl})


def test_real_problems_pass_every_check_and_are_counted(small_base: Path) -> None:
    made = recipe(small_base, epochs=3)
    found = plan(made, ALL, ["run", "r.toml"])
    demos = sources.load(made.data, made.seed).demos
    assert found["rows"] == {"demos": 20, "validation": 5, "prompts": 15, "test": 10}
    # one token per character of the solution, and EOS
    assert found["sft"]["supervised_tokens"] == sum(len(row.solution) + 1 for row in demos)
    assert found["sft"]["steps"] == 15 and found["sft"]["truncated"] == 0 and found["sft"]["ends_with_eos"] == 20
    assert found["rl"]["steps"] == 6 and found["rl"]["completions"] == 24
    text = show(found)
    for part in (
        "20 demos",
        "15 steps of sft",
        "0 of 20 truncated (0.0%)",
        "checks    passed",
        "launcher  heatbath run r.toml",
    ):
        assert part in text
    assert json.loads(json.dumps(found)) == found


def test_what_goes_beyond_the_models_context_is_said_once(small_base: Path, tmp_path: Path) -> None:
    data = {"source": "arithmetic", "demos": 8, "validation": 0, "prompts": 8, "test": 4}
    longer = recipe(small_base, data)
    (note,) = plan(longer, ALL, [])["notes"]  # the small model's context is 256, and eval.max_new_tokens 8,192
    assert note.startswith("test: a prompt of 20 tokens and eval.max_new_tokens = 8,192 exceed the model's context of")
    fits = longer.model_copy(update={"eval": longer.eval.model_copy(update={"max_new_tokens": 236})})
    assert plan(fits, ALL, [])["notes"] == []
    settings = fits.rl.model_copy(update={"max_new_tokens": 237})
    wordy = fits.model_copy(update={"rl": settings})
    (note,) = plan(wordy, ALL, [])["notes"]
    assert note.startswith("a prompt of 20 tokens and rl.max_new_tokens = 237") and "learned nothing" in note
    config = GPT2Config(vocab_size=101, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    small_tokenizer().save_pretrained(tmp_path)
    ending = fits.model_copy(update={"model": str(tmp_path), "rl": fits.rl.model_copy(update={"max_new_tokens": 45})})
    with pytest.raises(RecipeError, match="context of 64 tokens") as caught:
        plan(ending, ALL, [])
    assert caught.value.remedy.startswith("rl.max_new_tokens = 44 or less")


def test_a_real_row_with_characters_unknown_to_the_tokenizer_is_named(small_base: Path) -> None:
    with pytest.raises(DataError, match="1 of 20 rows hold characters that the tokenizer does not know") as caught:
        plan(recipe(small_base, GSM8K | {"folder": str(FIXTURES)}), ALL, [])
    assert "gsm8k.jsonl, row 29" in caught.value.where


def test_the_cut_rate_of_deepmath_is_told(small_base: Path, tmp_path: Path) -> None:
    """A file of DeepMath-103K's shape, a quarter of whose traces are longer than the limit."""
    rows = [
        {
            "question": f"Find {i}.",
            "final_answer": str(i),
            "difficulty": 5.0,
            "topic": "Algebra",
            **{f"r1_solution_{k}": "x" * (300 if i % 4 == 0 else 50) + f" = {i}" for k in (1, 2, 3)},
        }
        for i in range(200)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "deepmath.parquet")
    exam = tmp_path / "exam.parquet"
    pq.write_table(pa.Table.from_pylist([{"question": "Exam?", "answer": "1"}]), exam)
    sizes = {"demos": 80, "prompts": 80, "validation": 40}
    data = {"source": "deepmath", "pool": str(tmp_path / "deepmath.parquet"), "test_from": str(exam), **sizes}
    with pytest.raises(DataError, match=r"longer than sft\.max_length = 200"):
        plan(recipe(small_base, data, max_length=200), ALL, [])
    found = plan(recipe(small_base, data, max_length=200, truncate=True), ALL, [])
    cut = sum(int(r.question[5:-1]) % 4 == 0 for r in sources.load(parse({"model": "m", "data": data}).data, 0).demos)
    assert found["sft"]["truncated"] == cut > 5 and found["sft"]["ends_with_eos"] == 80 - cut


def test_nothing_is_written_and_the_tiny_base_is_not_made(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HEATBATH_CACHE", str(tmp_path / "cache"))
    found = plan(recipes.load("smoke"), ALL, ["run", "smoke"])
    assert found["memory"]["sft"]["weights"] > 0 and not list(tmp_path.iterdir())


def test_one_stage_is_planned_alone(small_base: Path) -> None:
    data = {k: v for k, v in GSM8K.items() if k != "test"}
    found = plan(recipe(small_base, data), ("sft",), [])
    assert "sft" in found and "rl" not in found and "eval" not in found and list(found["memory"]) == ["sft"]


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"sft": {"trainer": {"optim": "nonsense"}}}, "TRL refuses the settings"),
        ({"lora": {"targets": ["q_prj"]}}, "the adapters do not fit the model"),
        ({"lora": {"targets": ["lm_head"]}}, "an adapter on the output head"),
    ],
)
def test_what_trl_and_peft_would_refuse_later_is_said_now(small_base: Path, tables: dict, message: str) -> None:
    made = recipe(small_base).model_dump(exclude_none=True)
    made["sft"] |= tables.pop("sft", {})
    with pytest.raises(RecipeError, match=message):
        plan(parse(made | tables), ALL, [])


def test_the_folder_of_the_real_command_is_looked_at(small_base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    made = recipe(small_base)
    assert "something else than a run" in folder_line(tmp_path / "mine", made, ALL, Opening(), True)
    assert folder_line(tmp_path / "new", made, ALL, Opening(), True) == str(tmp_path / "new")


@pytest.mark.parametrize("lora", [None, {"rank": 4}])
def test_the_estimate_counts_weights_gradients_and_moments(small_base: Path, lora: dict | None) -> None:
    made = recipe(small_base).model_copy(update={"precision": "fp32"})
    whole = made.model_dump(exclude={"lora"}) | {"lora": lora}
    monkey, memory.ROUND = memory.ROUND, 12
    weights = {}
    try:
        for goal, source in ((None, "model"), ("gift", "model"), ("gift", "hidden")):
            spec = {"name": "gift", "beta": 4.0} if goal else {"name": "sft"}
            table = {**whole, "sft": {**whole["sft"], "objective": spec, "reference": source}}
            parts = memory.estimate(parse(table), 100, 50)["sft"]
            weights[goal, source] = (parts["weights"], parts.get("base"))
    finally:
        memory.ROUND = monkey
    model = AutoModelForCausalLM.from_pretrained(small_base)
    size = 4 * model.num_parameters() / 2**30
    assert weights[None, "model"] == weights["gift", "hidden"] == (pytest.approx(size), None)
    assert weights["gift", "model"] == (pytest.approx(size), None if lora else pytest.approx(size))
    trained = size
    if lora:
        linear = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
        trained = sum(4 * 4 * (m.in_features + m.out_features) for m in linear) / 2**30
    assert parts["gradients"] == pytest.approx(trained) and parts["optimizer"] == pytest.approx(2 * trained)


def test_the_estimate_counts_the_base_where_the_reference_is_another_model(small_base: Path) -> None:
    table = {"model": str(small_base), "data": {"source": "arithmetic"}, "sft": {}, "rl": {"policy": "grpo"}}
    spec = {"name": "grpo", "kl": 0.1, "reference": "base"}

    def base(**changes) -> float | None:
        return memory.estimate(parse({**table, **changes}), 100, 50)["rl"].get("frozen base")

    assert base() is None and base(rl={"policy": {**spec, "reference": "init"}}) is None
    weights = 4 * sum(p.numel() for p in small_model().parameters()) / 2**30
    assert base(rl={"policy": spec}) == pytest.approx(weights, abs=1e-4)
    assert base(rl={"policy": spec}, lora={}) is None and base(rl={"policy": spec}, sft=None) is None


@pytest.mark.parametrize("name", ["sft", "psft"])
def test_a_checkpoint_is_as_large_as_was_counted(
    small_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Weights, AdamW's moments, and the old policy that PSFT goes on with; beside them less than 128 KiB."""

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt  # before the stage ends and its checkpoints go

    monkeypatch.setattr(sft, "save_policy", stopped)
    table = recipe(small_base).model_dump()
    small = {"objective": {"name": name}, "epochs": 1, "batch": 4, "micro_batch": 4, "save_every": 1}
    made = parse({**table, "sft": {**table["sft"], **small}})
    run = Run(tmp_path / "run", made).write()
    with pytest.raises(KeyboardInterrupt):
        sft.run_sft(run, made, Progress(quiet=True))
    kept = sorted(run.working("sft").glob("checkpoint-*"))
    sizes = [sum(p.stat().st_size for p in one.rglob("*") if p.is_file()) for one in kept]
    weights = 4 * sum(p.numel() for p in small_model().parameters())
    counted = (memory.disk(made, "sft") - memory.LOGS - weights) / (made.sft.save_total_limit + 1)
    assert len(kept) == made.sft.save_total_limit
    assert all(counted <= size < counted + 2**17 for size in sizes), (counted, sizes)
