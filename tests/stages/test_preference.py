"""Offline preference, real TRL underneath: its DPO, UNA against it and against the formulas, and the whole stage."""

import json
import math
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from safetensors.torch import load_file

from conftest import small_model, small_tokenizer
from heatbath import recipe as recipes
from heatbath.data import preferences
from heatbath.errors import RecipeError
from heatbath.opening import Opening, open_run
from heatbath.progress import Progress
from heatbath.recipe import Recipe
from heatbath.run import Run
from heatbath.stages import memory
from heatbath.stages.plan import plan, show
from heatbath.stages.preference import (
    CompletionCollator,
    DpoTrainer,
    UnaTrainer,
    dataset,
    run_preference,
    training_arguments,
    without_dropout,
)
from mistakes import call

PAIRS = [
    {"question": f"What is {a} + {a}?", "chosen": f"{a} + {a} = {2 * a}", "rejected": "it is " + "9" * (a % 5 + 1)}
    for a in range(10, 18)
]
SCORES = [{"prompt": f"What is {a} + 2?", "response": "it is " + "7" * (a % 4), "score": a / 20} for a in range(10, 18)]
LABELS = [{"prompt": f"What is {a} + 3?", "response": f"{a + 3 + a % 2}", "label": a % 2 == 0} for a in range(10, 18)]


def written(folder: Path, rows: list[dict]) -> Path:
    path = folder / "preferences.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(base: Path | str, folder: Path, rows: list[dict], lora: dict | None = None, **settings: object) -> Recipe:
    table = {"data": str(written(folder, rows)), "batch": 4, "micro_batch": 2, "lr": 1e-3, **settings}
    made = {
        "model": str(base),
        "precision": "fp32",
        "data": {"source": "arithmetic", "demos": 8, "validation": 0, "prompts": 0, "test": 2},
        "preference": table,
        "eval": {"samples": 1, "k": [1], "max_new_tokens": 4},
    }
    return recipes.parse(made | ({"lora": lora} if lora else {}))


def trained(base: Path, folder: Path, rows: list[dict], progress: Progress | None = None, **settings: object) -> Run:
    folder.mkdir(exist_ok=True)
    made = recipe(base, folder, rows, **settings)
    run = Run(folder / "run", made).write() if (folder / "run").exists() else Run.create(folder / "run", made)
    run_preference(run, made, progress or Progress(quiet=True))
    return run


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.checkpoint("final") / "model.safetensors")


def assert_close(one: dict, two: dict, **tolerance: float) -> None:
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], **tolerance)


def trainer_of(folder: Path, rows: list[dict], **settings: object) -> DpoTrainer:
    """The trainer of a recipe with another reference than its start, so that no reward is zero."""
    made = recipe("unused", folder, rows, **settings)
    tokenizer = small_tokenizer()
    ready = preferences.rendered(tokenizer, preferences.load(made, [])[0], made)
    common = {
        "model": small_model(0),
        "ref_model": small_model(1),
        "args": training_arguments(made, folder / "out"),
        "train_dataset": dataset(ready, made.preference),
        "processing_class": tokenizer,
    }
    if made.preference.method == "dpo":
        return DpoTrainer(**common)
    collator = CompletionCollator(tokenizer.pad_token_id)
    return UnaTrainer(**common, data_collator=collator, comparison=made.preference.loss or "mse")


def log_ratio(model: torch.nn.Module, reference: torch.nn.Module, row: dict, completion: str) -> torch.Tensor:
    """Σ log π − Σ log π_ref of one completion alone, without padding, through transformers' own logits."""
    ids = torch.tensor([row["prompt_ids"] + row[completion]])
    sums = []
    for m in (model, reference):
        logp = m(input_ids=ids).logits[0, :-1].double().log_softmax(-1).gather(-1, ids[0, 1:, None])
        sums.append(logp[len(row["prompt_ids"]) - 1 :].sum())
    return sums[0] - sums[1].detach()


def by_hand(model: torch.nn.Module, reference: torch.nn.Module, row: dict, comparison: str) -> torch.Tensor:
    """The loss of a row as arXiv 2305.18290 (eq. 7) and 2408.15339 write it, in float64."""
    first = torch.sigmoid(row["beta"] * log_ratio(model, reference, row, "chosen_ids"))
    if row["rejected_ids"]:
        difference = log_ratio(model, reference, row, "chosen_ids") - log_ratio(model, reference, row, "rejected_ids")
        return -torch.log(torch.sigmoid(row["beta"] * difference))
    s = row["target"]
    return (first - s) ** 2 if comparison == "mse" else -s * first.log() - (1 - s) * (1 - first).log()


@pytest.mark.parametrize("micro", [1, 2, 3])
@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (PAIRS[:3], {"method": "dpo"}),
        (PAIRS[:3], {"method": "una"}),
        (SCORES[:3], {"method": "una"}),
        (LABELS[:3], {"method": "una", "loss": "bce", "beta": 0.2}),
        ([SCORES[0], PAIRS[0], LABELS[1]], {"method": "una"}),
    ],
    ids=["dpo", "una pairs", "una scores", "una labels", "una mixed"],
)
def test_a_step_is_the_mean_over_its_rows_however_they_are_split(
    tmp_path: Path, rows: list[dict], settings: dict, micro: int
) -> None:
    """One step of plain gradient descent on three rows, 1 + 1 + 1, 2 + 1 or 3 at a time, against the papers' losses."""
    plain = {"optim": "sgd"}
    size = {"batch": 6 if micro == 3 else 4, "micro_batch": micro, "lr": 0.5, "schedule": "constant"}
    trainer = trainer_of(tmp_path, rows, trainer=plain, max_steps=1, max_grad_norm=1e9, **size, **settings)
    trainer.train()
    model, reference = small_model(0).train(), small_model(1)
    losses = [by_hand(model, reference, row, settings.get("loss", "mse")) for row in trainer.train_dataset]
    loss = sum(losses) / len(rows)
    loss.backward()
    found = trainer.accelerator.unwrap_model(trainer.model)
    for p, q in zip(found.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), (q - 0.5 * q.grad).detach(), rtol=1e-4, atol=2e-6)
    (logged,) = [row for row in trainer.state.log_history if "objective" in row]
    assert logged["objective"] == pytest.approx(loss.item(), rel=1e-5)
    assert "loss" not in logged


def two_steps(folder: Path, ranks: int = 1) -> dict[str, torch.Tensor]:
    """Weights after UNA's steps on four and on two of six rows, of which a rank may see no pair."""
    rows = [SCORES[0], PAIRS[0], LABELS[1], LABELS[2], PAIRS[1], SCORES[1]]
    plain = {"trainer": {"optim": "sgd"}, "max_steps": 2, "lr": 0.5, "schedule": "constant", "max_grad_norm": 1e9}
    trainer = trainer_of(folder, rows, method="una", batch=4, micro_batch=1, log_every=2, **plain)
    trainer.train()
    assert trainer.accelerator.num_processes == ranks
    (logged,) = [row for row in trainer.state.log_history if "objective" in row]
    assert {"accuracy", "score_error"} <= logged.keys()
    return {n: p.detach().clone() for n, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}


def test_una_of_pairs_is_trls_dpo_in_loss_and_gradient(tmp_path: Path) -> None:
    """TRL's own trainer and collator on the same rows; a batch of UNA."""
    ours = trainer_of(tmp_path, PAIRS, method="una")
    theirs = trl.DPOTrainer(
        model=small_model(0),
        ref_model=small_model(1),
        args=trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, beta=0.1),
        train_dataset=as_text(PAIRS),
        processing_class=small_tokenizer(),
    )
    rows = [ours.train_dataset[i] for i in range(5)]
    batch = theirs.data_collator([theirs.train_dataset[i] for i in range(5)])
    losses = ours.compute_loss(ours.model, ours.data_collator(rows)), theirs.compute_loss(theirs.model, batch)
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for p, q in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7)


def as_text(rows: list[dict]) -> Dataset:
    """The same pairs as TRL takes them: text that it tokenises itself."""
    return Dataset.from_list(
        [
            {
                "prompt": f"<|user|>{row['question']}<|end|>\n<|assistant|>",
                "chosen": row["chosen"],
                "rejected": row["rejected"],
            }
            for row in rows
        ]
    )


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_a_dpo_recipe_ends_in_the_weights_of_trls_own_trainer(small_base: Path, tmp_path: Path, loss: str) -> None:
    """Eight pairs in steps of 2 × 2 rows, so that TRL's mean of means is the mean; TRL renders the text by itself."""
    run = trained(small_base, tmp_path, PAIRS, loss=loss, epochs=2)
    settings = training_arguments(run.recipe, tmp_path / "theirs")
    settings.save_strategy = "no"
    model = small_model()
    theirs = trl.DPOTrainer(
        model=model,
        ref_model=small_model(),
        args=settings,
        train_dataset=as_text(PAIRS),
        processing_class=small_tokenizer(),
    )
    theirs.train()
    assert_close(weights(run), {n: p for n, p in model.state_dict().items() if n in weights(run)}, rtol=0, atol=1e-6)
    moved = (weights(run)["model.embed_tokens.weight"] - small_model().model.embed_tokens.weight).abs().max()
    assert moved > 1e-3
    una = trained(small_base, tmp_path / "una", PAIRS, method="una", epochs=2) if loss == "sigmoid" else run
    assert_close(weights(run), weights(una), rtol=0, atol=1e-6)


PAIR_NAMES = {"reward_chosen", "reward_rejected", "reward_margin", "accuracy"}


@pytest.mark.parametrize(
    ("rows", "settings", "names"),
    [
        (PAIRS, {"method": "dpo"}, PAIR_NAMES),
        (PAIRS, {"method": "una"}, PAIR_NAMES),
        (SCORES, {"method": "una", "beta": 0.3}, {"score_error"}),
        (LABELS, {"method": "una", "beta": 0.3, "loss": "bce"}, {"score_error"}),
        (PAIRS + SCORES, {"method": "una", "beta": 0.3, "batch": 16}, {*PAIR_NAMES, "score_error"}),
    ],
    ids=["dpo", "una pairs", "una scores", "una labels", "una mixed"],
)
def test_a_recipe_of_every_kind_learns_its_file(
    small_base: Path, tmp_path: Path, rows: list[dict], settings: dict, names: set[str]
) -> None:
    run = trained(small_base, tmp_path, rows, epochs=12, **settings)
    logged = run.metrics("preference")
    assert len(logged) == 12 * math.ceil(len(rows) / settings.get("batch", 4))
    always = {"stage", "step", "time", "epoch", "objective", "grad_norm", "learning_rate"}
    assert all(set(row) == always | names for row in logged)
    first, last = logged[0], logged[-1]
    assert last["objective"] < 0.7 * first["objective"]
    if "accuracy" in names:  # before the first step policy and reference are one, and a tie is not accurate
        assert (first["reward_margin"], first["accuracy"]) == (0.0, 0.0) and last["accuracy"] == 1.0
        assert last["reward_margin"] == pytest.approx(last["reward_chosen"] - last["reward_rejected"], abs=1e-5)
    if "score_error" in names:
        assert last["score_error"] < 0.7 * first["score_error"]
    assert run.policies == ["base", "final"]
    assert not run.working("preference").exists()


def test_adapters_start_at_their_own_reference_and_end_as_a_plain_model(small_base: Path, tmp_path: Path) -> None:
    for method in ("dpo", "una"):
        run = trained(small_base, tmp_path / method, PAIRS, lora={"rank": 4, "dropout": 0.5}, method=method, epochs=4)
        first, last = run.metrics("preference")[0], run.metrics("preference")[-1]
        assert first["reward_chosen"] == 0.0 and last["reward_margin"] > 0.01  # dropout would show at once
        assert weights(run).keys() == load_file(small_base / "model.safetensors").keys()
    assert_close(weights(Run.read(tmp_path / "dpo" / "run")), weights(run), rtol=0, atol=1e-6)


def test_a_reference_read_off_beforehand_is_the_same(small_base: Path, tmp_path: Path) -> None:
    ahead = trained(small_base, tmp_path, PAIRS, trainer={"precompute_ref_log_probs": True})
    assert_close(weights(ahead), weights(trained(small_base, tmp_path / "b", PAIRS)), rtol=0, atol=1e-6)


def untimed(run: Run) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "time"} for row in run.metrics("preference")]


class Interrupting(Progress):
    """Breaks off as soon as a step is shown."""

    def __init__(self, step: int):
        super().__init__(quiet=True)
        self.step = step

    def update(self, done: int, *args: object) -> None:
        if done >= self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["dpo", "una"])
def test_a_resumed_stage_ends_where_the_uninterrupted_one_does(small_base: Path, tmp_path: Path, method: str) -> None:
    settings = {"method": method, "epochs": 4, "save_every": 4, "log_every": 3}
    rows = PAIRS if method == "dpo" else PAIRS[:3] + SCORES[:3] + LABELS[:2]
    whole = trained(small_base, tmp_path / "whole", rows, **settings)
    with pytest.raises(KeyboardInterrupt):
        trained(small_base, tmp_path, rows, Interrupting(6), **settings)
    assert Run.read(tmp_path / "run").last_checkpoint("preference").name == "checkpoint-4"
    resumed = trained(small_base, tmp_path, rows, **settings)
    assert_close(weights(whole), weights(resumed), rtol=0, atol=0)
    assert untimed(whole) == untimed(resumed) and len(untimed(whole)) == 3


RECIPE = """
model = "{base}"
precision = "fp32"
[data]
source = "arithmetic"
demos = 8
validation = 0
prompts = 0
test = 3
[sft]
batch = 8
micro_batch = 8
epochs = 1
lr = 1e-3
[preference]
data = "preferences.jsonl"
batch = 4
lr = 1e-3
[eval]
samples = 1
k = [1]
max_new_tokens = 4
"""


@pytest.mark.thorough
def test_the_command_runs_from_the_warm_start_to_the_report(small_base: Path, tmp_path: Path, capsys) -> None:
    written(tmp_path, PAIRS)
    (tmp_path / "r.toml").write_text(RECIPE.format(base=small_base))
    code, said = call(tmp_path, "run r.toml")
    assert code == 0, said
    assert "stages: sft → preference → eval (of base, init, final) → report" in said
    assert "preferences.jsonl: 8 pairs" in said
    folder = tmp_path / "runs" / "r"
    assert (folder / "report.html").is_file()
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["final", "init"]
    assert {row["policy"] for row in Run.read(folder).samples()} == {"base", "init", "final"}
    first = Run.read(folder).metrics("preference")[0]
    assert first["reward_chosen"] == 0.0  # the reference is the warm start, not the base
    code, said = call(tmp_path, "run r.toml --resume")
    assert code == 0 and "preference: finished before, kept" in said
    code, said = call(tmp_path, "run r.toml preference.lr=1 --resume --change preference.lr")
    assert code == 2 and "the preference stage is finished under its former value" in said and "heatbath run" in said


def test_the_plan_counts_what_the_file_holds(small_base: Path, tmp_path: Path) -> None:
    made = recipe(small_base, tmp_path, [*PAIRS, *SCORES], method="una", epochs=3, micro_batch=4)
    found = plan(made, ("preference", "eval"), ["run", "r.toml"])
    longest = max(len(f"<|user|>{r['question']}<|end|>\n<|assistant|>{r['chosen']}<|end|>") for r in PAIRS)
    specials = sum(map(len, ("<|user|>", "<|end|>", "<|assistant|>", "<|end|>"))) - 4
    assert found["preference"] == {
        "method": "una",
        "steps": 12,
        "rows": 16,
        "longest": longest - specials,
        "truncated": 0,
        "notes": ["preferences.jsonl: 8 pairs, 8 scores"],
    }
    assert "preference 12 steps of una; of 16 rows 0 truncated" in show(found) and found["eval"]["policies"] == 2
    one, two = (memory.estimate(made, 0, 0, tokens)["preference"] for tokens in (100, 200))
    assert two["activations"] == pytest.approx(2 * one["activations"], abs=2e-4) and list(found["memory"]) == [
        "preference"
    ]


def test_dropout_inside_attention_is_off_too() -> None:
    model = small_model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    ids = torch.arange(5, 25)[None]
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    without_dropout(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    assert torch.equal(model(ids).logits, small_model()(ids).logits)


def test_defaults_are_trls_and_the_papers(tmp_path: Path) -> None:
    theirs = trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    table = {"model": "m", "precision": "fp32", "data": {"source": "arithmetic"}, "preference": {"data": "p.jsonl"}}
    made = recipes.parse(table)
    ours = training_arguments(made, tmp_path)
    same = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2")
    for name in (*same, "max_grad_norm", "beta", "loss_type", "disable_dropout"):
        assert getattr(ours, name) == getattr(theirs, name), name
    # arXiv 2305.18290, appendix B: batch 64, one epoch in the authors' script
    assert (made.preference.batch, made.preference.epochs, made.preference.max_length) == (64, 1, theirs.max_length)
    assert [made.preference.beta_of(kind) for kind in ("pair", "score", "label")] == [0.1, 0.03, 0.01]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "bce"}, "loss 'bce' is none of method 'dpo', which has sigmoid"),
        ({"method": "una", "loss": "ipo"}, "loss 'ipo' is none of method 'una', which has mse, bce"),
        ({"loss": "aot"}, "loss 'aot' is none of method 'dpo'"),
        ({"loss": "robust"}, "needs trainer.label_smoothing"),
        ({"trainer": {"label_smoothing": 0.1}}, "label_smoothing is not read by loss 'sigmoid' of dpo, only by robust"),
        ({"method": "una", "trainer": {"ld_alpha": 0.5}}, "ld_alpha is not read by loss 'mse' of una"),
        ({"trainer": {"beta": 0.5}}, "beta is set by preference.beta"),
        ({"trainer": {"sync_ref_model": True}}, "sync_ref_model cannot be set: a resumed run would not be"),
        ({"trainer": {"disable_dropout": False}}, "disable_dropout cannot be set"),
        ({"batch": 5}, "batch (5) must be a multiple of micro_batch (2)"),
        ({"beta": 0}, "preference.beta"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_wrong_tables_are_told(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe("m", tmp_path, PAIRS, **settings)
    assert message in str(caught.value)


def test_the_policy_final_belongs_to_the_stage_that_the_recipe_has(small_base: Path, tmp_path: Path) -> None:
    made = recipe(small_base, tmp_path, PAIRS)
    table = made.model_dump(mode="json")
    with pytest.raises(RecipeError, match=r"\[preference\] and \[rl\] both make the policy 'final'"):
        recipes.parse({**table, "rl": {}})
    rl = recipes.parse({k: v for k, v in table.items() if k != "preference"} | {"rl": {}, "lora": {"rank": 4}})
    run = Run.create(tmp_path / "run", rl)
    run.checkpoint("final").mkdir(parents=True)
    assert run.stage_of("final") == "rl" and run.finished("rl") and not run.finished("preference")
    assert Run(run.folder, made).stage_of("final") == "preference" and Run(run.folder, made).finished("preference")
    changed = rl.model_copy(update={"lora": rl.lora.model_copy(update={"rank": 8})})
    with pytest.raises(RecipeError, match=r"lora\.rank has changed, and the rl stage is finished"):
        open_run(run.folder, changed, ("eval",), Opening(resume=True, change=["lora.rank"]))


@pytest.mark.slow
@pytest.mark.thorough
def test_the_shipped_recipe_runs_with_both_methods(tiny_base: str, tmp_path: Path) -> None:
    for more in ("", "preference.method=una preference.data=sums-labelled"):
        code, said = call(tmp_path, f"run preference-tiny eval.samples=1 eval.k=[1] {more} --fresh")
        assert code == 0, said
