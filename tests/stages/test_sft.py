"""The SFT trainer, real TRL underneath: Algorithm 1, accumulation, masks, logging, hand-over."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from conftest import small_model, small_tokenizer
from heatbath import recipe as recipes
from heatbath.data import arithmetic
from heatbath.data.rendering import render
from heatbath.errors import RunError
from heatbath.ideas.gift import Gift, GiftSequence
from heatbath.ideas.objectives import Sft
from heatbath.progress import Progress
from heatbath.reference import FrozenBase
from heatbath.run import Run
from heatbath.stages.objective_trainer import ObjectiveTrainer
from heatbath.stages.sft import run_sft
from heatbath.surprise import profile, surprises

BETA = 3.0


class Caught(TrainerCallback):
    """Keeps the gradient as the optimizer would see it."""

    def __init__(self):
        self.gradients = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})


def demonstrations(count: int) -> list:
    tokenizer = small_tokenizer()
    sums = arithmetic.problems(2, ("+", "-"), count, 0, held_out=False)
    rows = arithmetic.rows(sums, ("tens", "columns", "round"), paths=1, label_noise=0.0, seed=0)
    return [render(tokenizer, row) for row in rows]


def models() -> tuple:
    """A policy and another model as its base, both float64: far apart, so that no term of the loss is small."""
    return small_model(0).double(), FrozenBase(small_model(1).double())


def one_step(
    folder: Path,
    *,
    micro: int,
    accumulation: int,
    ranks=1,
    reduction="token_mean",
    objective=None,
    reference=None,
    policy=None,
) -> tuple:
    base = models()[1]
    caught = Caught()
    trainer = ObjectiveTrainer(
        model=policy or models()[0],
        args=trl.SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            max_grad_norm=0.0,
            logging_steps=1,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            seed=0,
        ),
        train_dataset=Dataset.from_list(
            [{"input_ids": r.input_ids, "labels": r.labels} for r in demonstrations(micro * accumulation * ranks)]
        ),
        processing_class=small_tokenizer(),
        data_collator=DataCollatorForLanguageModeling(pad_token_id=1),
        objective=objective or Gift(BETA),
        reference=reference or base,
        reduction=reduction,
        callbacks=[caught],
    )
    trainer.train()
    return caught.gradients[0], trainer.state.log_history[0]


def literal_algorithm_1(rows: list) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """arXiv 2601.09233, Algorithm 1: one row at a time, full vocabulary, sum over tokens, mean over rows."""
    policy, base = small_model(0).double(), small_model(1).double()
    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids, labels = torch.tensor([row.input_ids]), torch.tensor(row.labels)
        z, z_base = policy(ids).logits[0], base(ids).logits[0].detach()
        for t in range(len(labels) - 1):
            if labels[t + 1] == -100:
                continue
            onehot = F.one_hot(labels[t + 1], z.shape[-1]).double()
            target = (z_base[t].log_softmax(-1) + BETA * onehot).softmax(-1)
            total = total - (target * z[t].log_softmax(-1)).sum()
    loss = total / len(rows)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in policy.named_parameters()}


def distance(found: dict, expected: dict) -> float:
    norm = sum(g.norm() ** 2 for g in expected.values()) ** 0.5
    return float(sum((found[n] - expected[n]).norm() ** 2 for n in expected) ** 0.5 / norm)


def test_gift_through_the_trainer_is_algorithm_1(tmp_path: Path) -> None:
    loss, gradient = literal_algorithm_1(demonstrations(8))
    found, logged = one_step(tmp_path, micro=2, accumulation=4, reduction="sequence_sum")
    assert distance(found, gradient) < 1e-10
    tokens = sum(r.supervised for r in demonstrations(8))
    assert logged["objective"] * tokens / 8 == pytest.approx(loss.item(), rel=1e-10)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_sum"])
def test_accumulation_does_not_change_the_gradient(tmp_path: Path, reduction: str) -> None:
    whole, _ = one_step(tmp_path / "8", micro=8, accumulation=1, reduction=reduction)
    for micro in (1, 2):
        split, _ = one_step(tmp_path / str(micro), micro=micro, accumulation=8 // micro, reduction=reduction)
        assert distance(split, whole) < 1e-10


def test_microbatch_token_mean_adds_the_means_of_the_micro_batches(tmp_path: Path) -> None:
    """The authors' code: with one row per micro-batch, the sum over rows of each row's own token mean."""
    found, _ = one_step(tmp_path, micro=1, accumulation=4, reduction="microbatch_token_mean", objective=Sft())
    policy = small_model(0).double()
    for row in demonstrations(4):
        z = policy(torch.tensor([row.input_ids])).logits[0]
        F.cross_entropy(z[:-1], torch.tensor(row.labels)[1:], ignore_index=-100).backward()
    assert distance(found, {n: p.grad for n, p in policy.named_parameters()}) < 1e-10


def test_sft_is_the_models_own_cross_entropy(tmp_path: Path) -> None:
    found, logged = one_step(tmp_path, micro=8, accumulation=1, objective=Sft())
    rows = demonstrations(8)
    batch = DataCollatorForLanguageModeling(pad_token_id=1)(
        [{"input_ids": r.input_ids, "labels": r.labels} for r in rows]
    )
    policy = small_model(0).double()
    loss = policy(**batch).loss
    loss.backward()
    assert logged["nll"] == pytest.approx(loss.item(), rel=1e-6)  # transformers reports its loss through float32
    assert distance(found, {n: p.grad for n, p in policy.named_parameters()}) < 1e-6


def test_generation_is_unchanged_by_the_wrapper(tmp_path: Path) -> None:
    policy, base = models()
    ids = torch.tensor([demonstrations(1)[0].input_ids[:10]])
    before = copy.deepcopy(policy).generate(ids, max_new_tokens=8, do_sample=False)
    ObjectiveTrainer(
        model=policy,
        args=trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_length=None),
        train_dataset=Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}]),
        processing_class=small_tokenizer(),
        objective=Gift(BETA),
        reference=base,
    )
    assert torch.equal(policy.generate(ids, max_new_tokens=8, do_sample=False), before)


def test_a_nan_loss_stops_the_run(tmp_path: Path) -> None:
    class Broken:
        needs = ("logp",)

        def __call__(self, stats):
            return stats.logp * float("nan")

    with pytest.raises(RunError, match="the loss is nan"):
        one_step(tmp_path, micro=2, accumulation=1, objective=Broken())


def test_surprise_is_the_bases_cross_entropy_whatever_the_batch() -> None:
    rows = demonstrations(7)
    model = small_model(1).double()
    expected = []
    for row in rows:
        z = model(torch.tensor([row.input_ids])).logits[0, :-1].log_softmax(-1)
        labels = torch.tensor(row.labels)[1:]
        expected.append(-z[labels != -100].gather(-1, labels[labels != -100, None]).squeeze(-1))
    for tokens in (1, 150, 8192):
        found = surprises(FrozenBase(model), rows, pad_id=1, tokens=tokens)
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(f), e.detach())


def test_the_exact_target_writes_a_demonstration_with_its_mass() -> None:
    """Π w of `gift_sequence` telescopes to P(y*) = m + (1 − m)·p_base(y*), whatever the tokens."""
    rows = demonstrations(20)
    nats = surprises(FrozenBase(small_model(1)), rows, pad_id=1)
    made = profile(rows, nats, small_tokenizer(), GiftSequence(mass=0.3), vocab_size=small_model().config.vocab_size)
    expected = [0.3 + 0.7 * math.exp(-float(own.sum())) for own in nats]
    assert made["objective"]["whole"] == pytest.approx(sum(expected) / len(expected))


@pytest.mark.parametrize("smoothing", [0.0, 0.05])
def test_profile_shares_and_suggested_beta_agree_with_their_definition(smoothing: float) -> None:
    V = small_model().config.vocab_size
    rows = demonstrations(40)
    nats = surprises(FrozenBase(small_model(1)), rows, pad_id=1)
    found = profile(rows, nats, small_tokenizer(), Gift(2.5, smoothing), vocab_size=V)
    p = torch.cat([torch.from_numpy(-n).exp() for n in nats])
    p = (1 - smoothing) * p + smoothing / V
    assert 2.5 in [entry["beta"] for entry in found["betas"]]
    for entry in found["betas"]:
        mass = torch.sigmoid(entry["beta"] + torch.logit(p))
        assert entry["w_below_0.5"] == pytest.approx((mass < 0.5).double().mean().item())
        assert entry["w_below_0.99"] == pytest.approx((mass < 0.99).double().mean().item())
        each = iter(mass.tolist())
        whole = [math.prod(next(each) for _ in own) for own in nats]
        assert entry["whole"] == pytest.approx(sum(whole) / len(whole))
    mass = torch.sigmoid(found["suggested_beta"] + torch.logit(p))
    assert (mass < 0.5).double().mean().item() == pytest.approx(found["suggested_share"], abs=2 / len(p))
    assert sum(found["histogram"]) == found["tokens"] == sum(r.supervised for r in rows)
    own, places = torch.sigmoid(2.5 + torch.logit(p)) < 0.5, {}
    learned = [token for row in rows for token, label in zip(row.input_ids, row.labels, strict=True) if label >= 0]
    for token, low in zip(learned, own.tolist(), strict=True):
        places.setdefault(small_tokenizer().decode([token]), []).append(low)
    most = sorted((sum(low) ** 2 / len(low) for low in places.values()), reverse=True)
    assert [one["left"] ** 2 / one["of"] for one in found["left"]] == pytest.approx(most[:10]) and most[0] > 0
    for one in found["left"]:
        assert (one["left"], one["of"]) == (sum(places[one["token"]]), len(places[one["token"]]))
    assert found["most_surprising"][0]["nats"] == pytest.approx(found["max"])


def test_the_stage_writes_a_plain_checkpoint_with_the_same_logits(small_base: Path, tmp_path: Path) -> None:
    recipe = recipes.parse(
        {
            "model": str(small_base),
            "precision": "fp32",
            "data": {"source": "arithmetic", "demos": 16, "validation": 8, "prompts": 0, "test": 2},
            "sft": {"objective": {"name": "gift", "beta": 4.0}, "lr": 1e-3, "epochs": 2, "batch": 8, "micro_batch": 4},
        }
    )
    run = Run.create(tmp_path / "run", recipe)
    kept = {}
    original = ObjectiveTrainer.save_model

    def spy(self, *args, **kwargs):
        ids = torch.tensor([demonstrations(1)[0].input_ids])
        kept["logits"] = self.model.eval()(ids).logits.detach()
        return original(self, *args, **kwargs)

    ObjectiveTrainer.save_model = spy
    try:
        run_sft(run, recipe, Progress(quiet=True))
    finally:
        ObjectiveTrainer.save_model = original
    folder = run.checkpoint("init")
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")  # as heatbath on a CPU
    ids = torch.tensor([demonstrations(1)[0].input_ids])
    assert torch.equal(loaded(ids).logits, kept["logits"])
    assert not torch.equal(loaded(ids).logits, small_model()(ids).logits)
    assert AutoTokenizer.from_pretrained(folder).chat_template == small_tokenizer().chat_template
    assert not list(folder.glob("*.bin"))

    rows = run.metrics("sft")
    train, val = [r for r in rows if "nll" in r], [r for r in rows if "val/nll" in r]
    assert [r["step"] for r in train] == [1, 2, 3, 4] and [r["step"] for r in val] == [0, 2, 4]
    assert val[0]["val/nll"] == pytest.approx(val[0]["val/surprise"])  # before training the policy is the base
    assert val[-1]["val/nll"] < val[0]["val/nll"]
    assert all({"keep", "w", "surprise", "entropy", "tokens_per_second", "grad_norm"} <= set(r) for r in train)
    assert all("loss" not in r for r in rows)
    assert all(r["step_seconds"] * r["tokens_per_second"] == pytest.approx(r["tokens"]) for r in train)
    assert all(0 < r["supervised_tokens"] < r["tokens"] for r in train)
    assert json.loads((run.folder / "surprise.json").read_text())["beta"] == 4.0


def small_recipe(base: Path, **sft) -> recipes.Recipe:
    return recipes.parse(
        {
            "model": str(base),
            "precision": "fp32",
            "data": {"source": "arithmetic", "demos": 16, "validation": 4, "prompts": 0, "test": 2},
            "sft": {"lr": 1e-3, "epochs": 1, "batch": 4, "micro_batch": 4, **sft},
        }
    )


def test_steps_that_the_log_interval_does_not_divide_are_logged_and_saved(small_base: Path, tmp_path: Path) -> None:
    made = small_recipe(small_base, log_every=3)
    run = Run.create(tmp_path / "run", made)
    run_sft(run, made, Progress(quiet=True))
    assert [r["step"] for r in run.metrics("sft") if "nll" in r] == [3, 4]
    assert run.checkpoint("init").is_dir()


def test_weights_broken_by_the_last_step_are_not_saved(small_base: Path, tmp_path: Path) -> None:
    made = small_recipe(small_base, lr=1e38, batch=16)
    made = made.model_copy(update={"data": made.data.model_copy(update={"validation": 0})})
    run = Run.create(tmp_path / "run", made)
    with pytest.raises(RunError, match="NaN or infinite weights"):
        run_sft(run, made, Progress(quiet=True))
    assert not run.checkpoint("init").exists()


def test_a_second_attempt_at_a_stage_leaves_one_log(small_base: Path, tmp_path: Path) -> None:
    made = small_recipe(small_base)
    run = Run.create(tmp_path / "run", made)
    run.log("sft", 7, {"nll": 1.0})
    run.log("rl", 7, {"reward": 1.0})
    run_sft(run, made, Progress(quiet=True))
    assert [r["step"] for r in run.metrics("sft") if "nll" in r] == [1, 2, 3, 4] and len(run.metrics("rl")) == 1


def test_models_that_take_no_token_count_are_normalised_all_the_same(tmp_path: Path, monkeypatch) -> None:
    """transformers leaves num_items_in_batch out for models with accepts_loss_kwargs = False."""
    whole, _ = one_step(tmp_path / "a", micro=8, accumulation=1)
    monkeypatch.setattr(type(small_model()), "accepts_loss_kwargs", False, raising=False)
    split, _ = one_step(tmp_path / "b", micro=2, accumulation=4)
    assert distance(split, whole) < 1e-10


MODES = ("token_mean", "sequence_sum", "hidden_cache")
RL = ("rl_implicit", "rl_grpo")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the gradient that rank 0 of two sees in each mode, by two_processes.py."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0"]
    done = subprocess.run(
        [*command, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(script), str(folder), *MODES, "una", *RL],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.thorough
def test_two_processes_take_the_step_of_one(tmp_path: Path, two_processes: Path, mode: str) -> None:
    """Over gloo, 2 ranks × 2 rows × 2 micro-batches have the gradient of 1 × 8 × 1, under both exact reductions and
    from a cache. test_sharded.py has FSDP2."""
    reduction = "sequence_sum" if mode == "sequence_sum" else "token_mean"
    whole, _ = one_step(tmp_path / mode, micro=8, accumulation=1, reduction=reduction)
    found = torch.load(two_processes / f"{mode}.pt")
    assert distance(found, whole) < (1e-6 if mode == "hidden_cache" else 1e-10)


@pytest.mark.parametrize("mode", RL)
@pytest.mark.thorough
def test_two_processes_take_the_steps_of_one_in_rl(tmp_path: Path, two_processes: Path, mode: str) -> None:
    """Three groups of four completions, the middle one torn between the ranks: 2 × 3 × 2 against 1 × 4 × 3."""
    from policy_trainers import two_steps

    found = torch.load(two_processes / f"{mode}.pt")
    whole = two_steps(tmp_path, mode.removeprefix("rl_"), micro=4, accumulation=3)
    start = dict(small_model().named_parameters())
    for name, p in whole.items():
        moved = (p - start[name]).norm()
        assert moved > 1e-4 and (found[name] - p).norm() < 1e-5 * moved


@pytest.mark.thorough
def test_two_processes_take_the_steps_of_one_in_preference(tmp_path: Path, two_processes: Path) -> None:
    """UNA of pairs, scores and labels, 2 ranks × 1 row × 2 against 1 × 1 × 4, and a smaller step at the end."""
    from test_preference import two_steps

    found, whole = torch.load(two_processes / "una.pt"), two_steps(tmp_path)
    assert max(float((found[name] - p).abs().max()) for name, p in whole.items()) < 1e-5


def test_validation_is_token_weighted(small_base: Path, tmp_path: Path) -> None:
    """With batches of unequal token counts the mean of batch means is another number; ours is the token mean."""
    recipe = recipes.parse(
        {
            "model": str(small_base),
            "precision": "fp32",
            "data": {"source": "arithmetic", "digits": 3, "demos": 4, "validation": 7, "prompts": 0, "test": 0},
            "sft": {"epochs": 1, "batch": 4, "micro_batch": 4},
        }
    )
    run = Run.create(tmp_path / "run", recipe)
    run_sft(run, recipe, Progress(quiet=True))
    from heatbath.data import sources

    rows = [render(small_tokenizer(), r) for r in sources.load(recipe.data, 0).validation]
    nats = surprises(FrozenBase(small_model()), rows, pad_id=1)
    expected = sum(n.sum() for n in nats) / sum(len(n) for n in nats)
    assert run.metrics("sft")[0]["val/nll"] == pytest.approx(expected, rel=1e-6)
