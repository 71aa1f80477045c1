"""Every objective through the real trainer: columns, packing, PSFT's old policy, schedules, any trainer's loss."""

import copy
import json
from pathlib import Path

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from test_sft import Caught, demonstrations, distance

from conftest import small_model, small_tokenizer
from heatbath.errors import RunError
from heatbath.ideas.engine import dense_loss
from heatbath.ideas.gift import Gift
from heatbath.ideas.objectives import OBJECTIVES, Psft, objective
from heatbath.ideas.statistics import needs_reference
from heatbath.progress import Progress
from heatbath.recipe import parse
from heatbath.reference import FrozenBase
from heatbath.run import Run
from heatbath.stages.objective_trainer import ObjectiveMixin, ObjectiveTrainer
from heatbath.stages.sft import run_sft
from heatbath.stages.training import RowCollator
from mistakes import call

HYPER = {
    "gift": {"beta": {"column": "beta"}},
    "power": {"a": 0.5},
    "sed": {"threshold": 0.6, "topk": 3},
    "eaft": {"topk": 5},
}
COLUMNS = ("old_logp", "generator_logp", "beta", "advantage")
ROWS = 8


def rows_with_columns() -> list[dict]:
    """Rows whose columns differ from token to token, and one given once for the row."""
    g = torch.Generator().manual_seed(5)
    made = []
    for row in demonstrations(ROWS):
        columns = {name: (-2 * torch.rand(len(row.labels), generator=g)).tolist() for name in COLUMNS[:2]}
        columns["beta"] = (4 * torch.rand(len(row.labels), generator=g)).tolist()
        columns["advantage"] = float(torch.randn(1, generator=g))
        made.append({"input_ids": row.input_ids, "labels": row.labels, **columns})
    return made


def arguments(folder: Path, **changes) -> trl.SFTConfig:
    return trl.SFTConfig(
        output_dir=str(folder),
        **{
            "max_steps": 1,
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "max_length": None,
            "dataset_kwargs": {"skip_prepare_dataset": True},
            "remove_unused_columns": False,
            **changes,
        },
    )


def trained(folder: Path, goal, *, micro: int = ROWS, packing: bool = False) -> dict:
    caught = Caught()
    ObjectiveTrainer(
        model=small_model(0).double(),
        args=arguments(folder, per_device_train_batch_size=micro, gradient_accumulation_steps=ROWS // micro),
        train_dataset=Dataset.from_list(rows_with_columns()),
        processing_class=small_tokenizer(),
        data_collator=RowCollator(1, packing=packing),
        objective=goal,
        reference=FrozenBase(small_model(1).double()) if needs_reference(goal) else None,
        callbacks=[caught],
    ).train()
    return caught.gradients[0]


def literal(goal) -> dict:
    """Row by row over full logits in plain autograd, divided by all supervised tokens."""
    policy, base = small_model(0).double(), small_model(1).double()
    total, tokens = 0.0, 0
    for number, row in enumerate(rows_with_columns()):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        columns = {name: torch.tensor(row[name], dtype=torch.float32).expand(len(labels) + 1)[1:] for name in COLUMNS}
        loss = dense_loss(
            goal,
            policy(ids).logits[0, :-1],
            labels,
            ref_logits=base(ids).logits[0, :-1].detach(),
            columns=columns,
            segments=torch.full_like(labels, number),
        )
        total, tokens = total + loss.sum(), tokens + int((labels != -100).sum())
    (total / tokens).backward()
    return {name: p.grad for name, p in policy.named_parameters()}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.thorough
def test_every_objective_through_the_trainer_is_its_dense_self(tmp_path: Path, name: str) -> None:
    """Whole, accumulated and packed, with its columns: the gradient of the optimizer step is one and the same."""
    goal = objective(name, **HYPER.get(name, {}))
    expected = literal(goal)
    assert distance(trained(tmp_path / "whole", goal), expected) < 1e-8
    assert distance(trained(tmp_path / "split", goal, micro=2), expected) < 1e-8
    assert distance(trained(tmp_path / "packed", goal, micro=4, packing=True), expected) < 1e-8


def test_psft_against_a_literal_loop_with_a_copy_every_three_steps(tmp_path: Path) -> None:
    goal, steps, lr = Psft(0.05, 0.06, refresh=3), 8, 0.05
    rows = [{k: row[k] for k in ("input_ids", "labels")} for row in rows_with_columns()]
    trainer = ObjectiveTrainer(
        model=small_model(0).double(),
        args=arguments(
            tmp_path,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=steps,
            optim="sgd",
            learning_rate=lr,
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=small_tokenizer(),
        data_collator=RowCollator(1),
        objective=goal,
    )
    order = []
    original = trainer.compute_loss

    def spy(model, inputs, **kwargs):
        order.append(
            [
                [t for t, m in zip(r, k, strict=True) if m]
                for r, k in zip(*map(torch.Tensor.tolist, (inputs["input_ids"], inputs["attention_mask"])), strict=True)
            ]
        )
        return original(model, inputs, **kwargs)

    trainer.compute_loss = spy
    trainer.train()
    policy, known = small_model(0).double(), {tuple(r["input_ids"]): r["labels"] for r in rows}
    clipped = 0
    for step in range(steps):
        if step % goal.refresh == 0:
            old = copy.deepcopy(policy)
        picked = [ids for micro in order[2 * step : 2 * step + 2] for ids in micro]
        total, tokens = 0.0, 0
        for ids in picked:
            labels = torch.tensor(known[tuple(ids)])[1:]
            at = labels != -100
            now, before = (
                m(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)[at].gather(-1, labels[at, None])
                for m in (policy, old)
            )
            ratio = (now - before.detach()).exp()
            total = total - torch.minimum(ratio, ratio.clamp(0.95, 1.06)).sum()
            clipped += int((ratio > 1.06).sum())
            tokens += int(at.sum())
        policy.zero_grad()
        (total / tokens).backward()
        with torch.no_grad():
            for p in policy.parameters():
                p -= lr * p.grad
    assert clipped > 0, "a case in which nothing is clipped proves little"
    ours = dict(trainer.model.named_parameters())
    for name, p in policy.named_parameters():
        torch.testing.assert_close(ours[name], p, rtol=1e-8, atol=1e-10)


def test_beta_follows_its_schedule_over_the_steps(tmp_path: Path) -> None:
    seen = []

    class Spy(Gift):
        def __call__(self, stats):
            seen.append(self.beta)
            return super().__call__(stats)

    ObjectiveTrainer(
        model=small_model(0),
        args=arguments(tmp_path, per_device_train_batch_size=4, max_steps=5),
        train_dataset=Dataset.from_list([{k: r[k] for k in ("input_ids", "labels")} for r in rows_with_columns()]),
        processing_class=small_tokenizer(),
        data_collator=RowCollator(1),
        objective=Spy({"start": 8.0, "end": 2.0, "steps": 3}),
        reference=FrozenBase(small_model(1)),
    ).train()
    assert seen == [8.0, 6.0, 4.0, 2.0, 2.0]


def test_the_mixin_gives_any_trainer_an_objective(tmp_path: Path) -> None:
    """A plain transformers.Trainer, columns and all, takes the very gradient of the TRL one."""

    class Mine(ObjectiveMixin, transformers.Trainer):
        pass

    caught, goal = Caught(), objective("pear")
    plain = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        max_grad_norm=0.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        eval_strategy="steps",
        eval_steps=1,
        logging_steps=1,
    )
    trainer = Mine(
        model=small_model(0).double(),
        args=plain,
        train_dataset=Dataset.from_list(rows_with_columns()).remove_columns(["old_logp", "beta", "advantage"]),
        eval_dataset=Dataset.from_list(rows_with_columns()[:3]),
        data_collator=RowCollator(1),
        objective=goal,
        callbacks=[caught],
    )
    trainer.train()
    assert distance(caught.gradients[0], literal(goal)) < 1e-8
    assert {"objective", "nll", "sequence_weight"} <= set(trainer.state.log_history[0])
    assert any("val/nll" in row for row in trainer.state.log_history)


PAGE = (Path(__file__).parents[2] / "docs" / "objectives" / "your-own.md").read_text(encoding="utf-8")
MINE = PAGE.partition("```python\n")[2].partition("```")[0]  # the page's own example


def test_an_objective_in_a_users_own_file_trains_through_the_command_line(small_base: Path, tmp_path: Path) -> None:
    assert "class Focal" in MINE and len(MINE.strip().splitlines()) <= 10
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "mine.toml").write_text(
        f"""
model = "{small_base}"
precision = "fp32"
[data]
source = "arithmetic"
demos = 12
validation = 4
prompts = 0
test = 2
[sft]
objective = {{ name = "mine.py:Focal", gamma = 1.5 }}
lr = 1e-3
epochs = 1
batch = 4
micro_batch = 4
"""
    )
    code, said = call(tmp_path, "sft mine.toml --out run")
    assert code == 0, said
    run = Run.read(tmp_path / "run")
    rows = [row for row in run.metrics("sft") if "objective" in row]
    assert len(rows) == 3 and all(row["objective"] < row["nll"] for row in rows)
    assert str(tmp_path / "mine.py") in (tmp_path / "run" / "recipe.toml").read_text()  # goes on from any folder
    (tmp_path / "broken.toml").write_text((tmp_path / "mine.toml").read_text().replace("Focal", "Fokal"))
    code, said = call(tmp_path, "sft broken.toml --out other")
    assert code == 2 and "has no class 'Fokal'" in said


def recipe(base: Path, **sft):
    return parse(
        {
            "model": str(base),
            "precision": "fp32",
            "data": {"source": "arithmetic", "demos": 24, "validation": 4, "prompts": 0, "test": 2},
            "sft": {"lr": 1e-3, "epochs": 1, "batch": 4, "micro_batch": 4, **sft},
        }
    )


def test_the_stage_trains_from_either_cache_without_a_base_body(small_base: Path, tmp_path: Path, monkeypatch) -> None:
    """hidden: the metrics of the run on the fly; surprise: close to them; neither makes a second model."""
    monkeypatch.setattr("heatbath.stages.measuring.cache_root", lambda: tmp_path / "cache")
    logs, copies = {}, []
    original = copy.deepcopy

    def counting(value, *arguments):
        if isinstance(value, transformers.PreTrainedModel):
            copies.append(value)
        return original(value, *arguments)

    monkeypatch.setattr(copy, "deepcopy", counting)
    for source in ("model", "hidden", "surprise"):
        copies.clear()
        chosen = recipe(small_base, objective={"name": "gift", "beta": 3.0}, reference=source, epsilon=1e-4)
        run = Run.create(tmp_path / source, chosen)
        run_sft(run, chosen, Progress(quiet=True))
        assert len(copies) == (1 if source == "model" else 0)
        logs[source] = [row["objective"] for row in run.metrics("sft") if "objective" in row]
    assert logs["hidden"] == pytest.approx(logs["model"], rel=1e-4)
    assert logs["surprise"] == pytest.approx(logs["model"], rel=1e-2)


def test_a_share_of_tokens_chooses_beta_and_sed_its_threshold(small_base: Path, tmp_path: Path) -> None:
    """Measured on the base before training, stored, and not measured again when the stage goes on."""
    chosen = recipe(small_base, objective={"name": "gift", "beta": {"left_to_base": 0.1}})
    run = Run.create(tmp_path / "gift", chosen)
    run_sft(run, chosen, Progress(quiet=True))
    found = json.loads((run.folder / "surprise.json").read_text())
    assert found["settled"]["beta"] == found["beta"] > 0
    assert found["objective"]["w_below_0.5"] == pytest.approx(0.1, abs=1.5 / found["tokens"])
    logged = [row["left_to_base"] for row in run.metrics("sft") if "left_to_base" in row]
    assert sum(logged) / len(logged) == pytest.approx(0.1, abs=0.05)

    chosen = recipe(small_base, objective={"name": "sed", "topk": 3})
    run = Run.create(tmp_path / "sed", chosen)
    run_sft(run, chosen, Progress(quiet=True))
    threshold = json.loads((run.folder / "surprise.json").read_text())["settled"]["threshold"]
    first = next(row for row in run.metrics("sft") if "undecided_share" in row)
    assert 0 < threshold < 1 and first["undecided_share"] == pytest.approx(0.3, abs=0.15)  # ratio 0.7 of them above


def test_a_column_that_the_objective_reads_must_be_in_the_rows(tmp_path: Path, small_base: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps({"question": f"What is {i} + 1?", "solution": f"{i + 1}", "g": -0.5}) + "\n" for i in range(8)
        )
    )
    data = {"source": "files", "folder": str(tmp_path), "demos_from": "rows.jsonl"}
    base = {"model": str(small_base), "precision": "fp32", "sft": {"objective": "pear", "batch": 4, "epochs": 1}}
    without = parse({**base, "data": data})
    run = Run.create(tmp_path / "without", without)
    with pytest.raises(Exception, match="reads the column 'generator_logp', which 8 of 8 rows lack"):
        run_sft(run, without, Progress(quiet=True))
    (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text().replace('"g"', '"generator_logp"'))
    given = parse({**base, "data": {**data, "fields": {"columns": ["generator_logp"]}}})
    run = Run.create(tmp_path / "given", given)
    run_sft(run, given, Progress(quiet=True))
    assert all("sequence_weight" in row for row in run.metrics("sft") if "nll" in row)


def plain_trainer(folder: Path, goal, rows: list[dict], **changes) -> ObjectiveMixin:
    class Mine(ObjectiveMixin, transformers.Trainer):
        pass

    settings = {"max_steps": 1, "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1}
    return Mine(
        model=small_model(0),
        args=transformers.TrainingArguments(output_dir=str(folder), **{**settings, **changes}),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        data_collator=RowCollator(1),
        objective=goal,
    )


def test_a_column_that_an_objective_may_do_without_is_not_lost_on_the_way(tmp_path: Path) -> None:
    """LUFFY's advantage turns its sign; transformers removes columns that the model does not name."""
    rows = [{k: r[k] for k in ("input_ids", "labels")} for r in rows_with_columns()]
    trainer = plain_trainer(tmp_path, objective("luffy"), [{**row, "advantage": -2.0} for row in rows])
    trainer.train()
    assert trainer.state.log_history[0]["objective"] > 0


def test_a_step_without_supervised_tokens_changes_nothing(tmp_path: Path) -> None:
    rows = [{"input_ids": r["input_ids"], "labels": [-100] * len(r["labels"])} for r in rows_with_columns()]
    trainer = plain_trainer(tmp_path, objective("sft"), rows, weight_decay=0.0)
    trainer.train()
    for name, p in small_model(0).named_parameters():
        assert torch.equal(trainer.model.get_parameter(name), p)


def test_psft_in_a_plain_trainer_is_validated_against_its_old_policy_and_resumed(tmp_path: Path) -> None:
    rows = [{k: r[k] for k in ("input_ids", "labels")} for r in rows_with_columns()]
    often = {"max_steps": 12, "learning_rate": 5e-3, "lr_scheduler_type": "constant", "save_steps": 6}
    often |= {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 2, "per_device_train_batch_size": 4}
    whole = plain_trainer(tmp_path / "whole", objective("psft", refresh=4), rows, **often)
    whole.train()
    ratios = [row["val/ratio"] for row in whole.state.log_history if "val/ratio" in row]
    assert len(ratios) == 6 and min(abs(r - 1) for r in ratios) > 1e-4, "no evaluation renews the copy"
    again = plain_trainer(tmp_path / "whole", objective("psft", refresh=4), rows, **often)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    for name, p in whole.model.named_parameters():
        assert torch.equal(again.model.get_parameter(name), p)


def test_the_seconds_before_a_checkpoint_are_carried_with_its_sums_and_a_pause_is_not(tmp_path: Path) -> None:
    rows = [{k: r[k] for k in ("input_ids", "labels")} for r in rows_with_columns()]
    trainer = plain_trainer(tmp_path, objective("sft"), rows)
    trainer._window_started -= 1000
    carried = trainer.carried()
    assert 1000 <= carried["seconds"] < 1100
    again = plain_trainer(tmp_path, objective("sft"), rows)
    again._window_started -= 5000  # what passed before it is known that the stage goes on
    again.carry_on(carried)
    again.train()
    assert 1000 < again.state.log_history[0]["step_seconds"] < 1200
    again = plain_trainer(tmp_path, objective("sft"), rows)
    again.carry_on({"sums": carried["sums"]})  # by an earlier version
    again.train()
    assert again.state.log_history[0]["step_seconds"] < 200


def test_validation_in_a_plain_trainer_returns_the_token_mean(tmp_path: Path) -> None:
    rows = [{k: r[k] for k in ("input_ids", "labels")} for r in rows_with_columns()]
    found = plain_trainer(tmp_path, objective("sft"), rows, per_device_eval_batch_size=3).evaluate()
    assert found["eval_loss"] == found["val/objective"] == pytest.approx(found["val/nll"])
    with pytest.raises(RunError, match="compute_metrics would never be called"):
        ObjectiveTrainer(model=small_model(0), objective=objective("sft"), compute_metrics=print)


def test_an_objective_file_edited_in_the_middle_stops_the_resumed_run(small_base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    chosen = recipe(small_base, objective={"name": f"{tmp_path}/mine.py:Focal"}, save_every=1)
    run = Run.create(tmp_path / "run", chosen)
    trained = ObjectiveTrainer.train

    def dying(self, *arguments, **kwargs):
        raise KeyboardInterrupt

    try:
        ObjectiveTrainer.train = dying
        with pytest.raises(KeyboardInterrupt):
            run_sft(run, chosen, Progress(quiet=True))
    finally:
        ObjectiveTrainer.train = trained
    (tmp_path / "mine.py").write_text(MINE.replace("* -stats.logp", "* -7 * stats.logp"))
    with pytest.raises(RunError, match="file of the objective Focal has changed"):
        run_sft(run, chosen, Progress(quiet=True))
