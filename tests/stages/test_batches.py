"""The same rows give the same loss packed and padded, on either side, in any order; adapters off is the base."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from conftest import small_model, small_tokenizer
from heatbath.data import arithmetic
from heatbath.data.rendering import IGNORE, Rendered, render
from heatbath.errors import RunError
from heatbath.ideas.gift import Gift
from heatbath.ideas.objectives import Sft
from heatbath.progress import Progress
from heatbath.recipe import parse
from heatbath.reference import AdaptersOff, FrozenBase, sequence_starts
from heatbath.run import Run
from heatbath.sections import Lora
from heatbath.stages.fused_forward import add_objective_forward
from heatbath.stages.objective_trainer import ObjectiveTrainer
from heatbath.stages.sft import run_sft
from heatbath.stages.training import RowCollator, lora_config, require_isolation


def rows(count: int = 6) -> list[Rendered]:
    """Rendered demonstrations of different lengths."""
    sums = [p for digits in (1, 2, 3) for p in arithmetic.problems(digits, ("+",), count // 3, 0, held_out=False)]
    made = arithmetic.rows(sums, arithmetic.FORMS, paths=1, label_noise=0.0, seed=0)
    return [render(small_tokenizer(), row) for row in made]


def table(rendered: list[Rendered]) -> list[dict]:
    return [{"input_ids": r.input_ids, "labels": r.labels} for r in rendered]


def left_padded(made: list[dict], pad: int) -> dict[str, torch.Tensor]:
    width = max(len(r["input_ids"]) for r in made)
    fill = [width - len(r["input_ids"]) for r in made]
    return {
        "input_ids": torch.tensor([[pad] * f + r["input_ids"] for f, r in zip(fill, made, strict=True)]),
        "labels": torch.tensor([[IGNORE] * f + r["labels"] for f, r in zip(fill, made, strict=True)]),
        "attention_mask": torch.tensor([[0] * f + [1] * (width - f) for f in fill]),
    }


# Masks of transformers' eager attention overflow in float64 where a whole row is padding. With padding on the left the
# positions shift, and their angles are computed in float32 even in a float64 model: hence 1e-8.
DTYPE = {"sdpa": torch.float64, "eager": torch.float32}
TOLERANCE = {"sdpa": 1e-8, "eager": 1e-5}


def loss_and_gradient(batches: list[dict], objective: object, attention: str) -> tuple[float, int, torch.Tensor]:
    policy, base = small_model(0), FrozenBase(small_model(1))
    for model in (policy, base._model[0]):
        model.to(DTYPE[attention])
    for model in (policy, base._model[0]):
        model.set_attn_implementation(attention)
    add_objective_forward(policy)
    outs = [policy(**batch, objective=objective, reference=base) for batch in batches]
    loss = sum(out["loss"] for out in outs)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
    return loss.item(), sum(int(out["tokens"]) for out in outs), gradient


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("objective", [Sft(), Gift(3.0)])
def test_packed_padded_and_reordered_rows_have_the_same_loss_and_gradient(objective, attention: str) -> None:
    made = table(rows())
    assert len({len(r["input_ids"]) for r in made}) > 3, "rows of one length would test nothing"
    alone = loss_and_gradient([RowCollator(1)([r]) for r in made], objective, attention)
    shuffled = made[:]
    random.Random(0).shuffle(shuffled)
    ways = {
        "padded": [RowCollator(1)(made)],
        "padded with another token": [RowCollator(7)(made)],
        "padded on the left": [left_padded(made, 1)],
        "in another order": [RowCollator(1)(shuffled[:2]), RowCollator(1)(shuffled[2:])],
        "packed": [RowCollator(1, packing=True)(made)],
        "packed in another order": [RowCollator(1, packing=True)(shuffled)],
    }
    for name, batches in ways.items():
        loss, tokens, gradient = loss_and_gradient(batches, objective, attention)
        assert tokens == alone[1] == sum(label != IGNORE for r in made for label in r["labels"]), name
        assert loss == pytest.approx(alone[0], rel=TOLERANCE[attention]), name
        assert torch.linalg.norm(gradient - alone[2]) < 100 * TOLERANCE[attention] * torch.linalg.norm(alone[2])


def test_a_packed_row_without_positions_would_be_another_loss() -> None:
    """The test above can fail: sequences that see each other have another loss."""
    packed = RowCollator(1, packing=True)(table(rows()))
    right, _, _ = loss_and_gradient([packed], Sft(), "sdpa")
    leaking, _, _ = loss_and_gradient([{k: v for k, v in packed.items() if k != "position_ids"}], Sft(), "sdpa")
    assert abs(leaking - right) > 1e-3 * right


def test_a_model_that_does_not_keep_packed_sequences_apart_is_refused() -> None:
    require_isolation(small_model(0), rows())
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    }
    leaking = OPTForCausalLM(OPTConfig(vocab_size=101, max_position_embeddings=256, init_std=0.2, **shape)).eval()
    with pytest.raises(RunError, match="OPTForCausalLM does not keep packed sequences apart"):
        require_isolation(leaking, rows())


def test_the_trainer_takes_the_same_steps_packed_and_padded(small_base: Path, tmp_path: Path) -> None:
    final = []
    for packing in (False, True):
        recipe = small(small_base, packing=packing)
        run = Run.create(tmp_path / str(packing), recipe)
        run_sft(run, recipe, Progress(quiet=True))
        weights = load_file(run.checkpoint("init") / "model.safetensors")
        final.append((torch.cat([w.flatten() for w in weights.values()]), run.metrics("sft")))
    (padded, log), (packed, packed_log) = final
    assert torch.linalg.norm(padded - packed) < 1e-4 * torch.linalg.norm(padded)
    for one, other in zip(log, packed_log, strict=True):
        assert one.keys() == other.keys()
        for key in ("objective", "nll", "val/nll", "val/objective"):
            assert one.get(key, 0.0) == pytest.approx(other.get(key, 0.0), rel=1e-4), key


def small(base: Path, *, lora: dict | None = None, rl: dict | None = None, **sft: object):
    return parse(
        {
            "model": str(base),
            "precision": "fp32",
            "data": {"source": "arithmetic", "demos": 24, "validation": 6, "prompts": 8, "test": 4},
            "lora": lora,
            "sft": {
                "objective": {"name": "gift", "beta": 4.0},
                "reduction": "sequence_sum",
                "lr": 3e-3,
                "epochs": 2,
                "batch": 8,
                "micro_batch": 4,
                **sft,
            },
            "rl": rl,
        }
    )


def adapted(folder: Path, objective: object) -> ObjectiveTrainer:
    """A trainer of LoRA adapters on the small model, after a few steps."""
    import trl
    from datasets import Dataset

    trainer = ObjectiveTrainer(
        model=small_model(0),
        args=trl.SFTConfig(
            output_dir=str(folder),
            max_steps=4,
            learning_rate=1e-2,
            per_device_train_batch_size=6,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=Dataset.from_list(table(rows())),
        processing_class=small_tokenizer(),
        data_collator=RowCollator(1),
        objective=objective,
        peft_config=lora_config(Lora(rank=4, dropout=0.1)),
    )
    trainer.train()
    return trainer


def test_adapters_off_is_a_frozen_copy_of_the_base(tmp_path: Path) -> None:
    trainer = adapted(tmp_path, Gift(3.0))
    assert isinstance(trainer.reference, AdaptersOff), "no second model in memory"
    base = FrozenBase(small_model(0))
    batch = RowCollator(1)(table(rows()))
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    trainer.model.train()
    off = trainer.reference.hidden(**inputs)
    assert torch.allclose(off, base.hidden(**inputs), atol=1e-6) and torch.equal(trainer.reference.head, base.head)
    with torch.no_grad():
        on = trainer.model.get_base_model().base_model(**inputs).last_hidden_state
    assert (on - off).abs().max() > 1e-2, "the adapters have learned something, and are on again"
    assert trainer.model.training
    trained = [n for n, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n for n in trained)


def test_the_loss_against_adapters_off_is_the_loss_against_a_frozen_copy(tmp_path: Path) -> None:
    trainer = adapted(tmp_path, Gift(3.0))
    trainer.model.eval()
    batch = RowCollator(1)(table(rows()))
    found = []
    for reference in (trainer.reference, FrozenBase(small_model(0))):
        trainer.model.zero_grad()
        out = trainer.model(**batch, objective=Gift(3.0), reference=reference)
        out["loss"].backward()
        grads = [p.grad for n, p in trainer.model.named_parameters() if "lora_" in n]
        found.append((out["loss"].item(), torch.cat([g.flatten() for g in grads])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert torch.linalg.norm(found[0][1] - found[1][1]) < 1e-5 * torch.linalg.norm(found[1][1])
    assert found[0][1].abs().max() > 0


def test_lora_through_both_stages_leaves_plain_models(small_base: Path, tmp_path: Path) -> None:
    from heatbath.stages.rl import run_rl

    rl = {"lr": 1e-2, "prompts": 4, "update_prompts": 4, "group_size": 4, "micro_batch": 8, "max_new_tokens": 8}
    recipe = small(small_base, lora={"rank": 4}, rl=rl)
    run = Run.create(tmp_path / "run", recipe)
    run_sft(run, recipe, Progress(quiet=True))
    rows = run.metrics("sft")
    first, last = (next(r for r in order if "val/nll" in r) for order in (rows, rows[::-1]))
    assert last["val/nll"] < first["val/nll"] and last["val/objective"] < first["val/objective"]
    init = AutoModelForCausalLM.from_pretrained(run.checkpoint("init"))
    base = AutoModelForCausalLM.from_pretrained(small_base)
    assert [n for n, _ in init.named_parameters()] == [n for n, _ in base.named_parameters()]
    moved = [n for n, p in init.named_parameters() if not torch.equal(p, base.get_parameter(n))]
    assert moved and all("_proj" in n for n in moved), "merged adapters move the projections and nothing else"
    run_rl(run, recipe, Progress(quiet=True))
    assert not list(run.checkpoint("final").glob("adapter_*"))
    kl = [row["kl_init"] for row in run.metrics("rl")]
    assert abs(kl[0]) < 1e-5 and len(kl) == 2, "the start of RL is the model with its adapters off"


def test_where_sequences_begin() -> None:
    """By row, by positions, by a mask that numbers them; padding on either side begins none."""
    labels = torch.zeros(2, 6, dtype=torch.long)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 0, 1, 2, 3]])
    left = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]])
    numbered = torch.tensor([[1, 1, 2, 2, 3, 0], [1, 1, 1, 1, 0, 0]])

    def starts(**inputs: torch.Tensor) -> list[list[int]]:
        return [row.nonzero().squeeze(-1).tolist() for row in sequence_starts(inputs, labels)]

    assert starts() == [[0], [0]]
    assert starts(attention_mask=left) == [[0], [2]]
    assert starts(position_ids=positions) == [[0, 3, 5], [0, 2]]
    assert starts(position_ids=positions, attention_mask=left) == [[0, 3, 5], [2]]
    assert starts(position_ids=positions, attention_mask=torch.ones_like(left)) == [[0, 3, 5], [0, 2]]
    assert starts(attention_mask=numbered) == [[0, 2, 4], [0]]


def test_the_collator_takes_no_rows_that_are_padded_already() -> None:
    row = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    assert "columns" not in RowCollator(0)([{**row, "attention_mask": [1, 1, 1]}])
    for extra in ({"attention_mask": [0, 1, 1]}, {"position_ids": [0, 1, 2]}):
        with pytest.raises(ValueError, match="makes masks and positions itself"):
            RowCollator(0)([{**row, **extra}])
