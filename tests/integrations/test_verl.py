"""What is written for verl, without verl: a recipe's settings in its keys, rows, refusals; the SFT loss function."""

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from conftest import small_model, small_tokenizer
from heatbath import recipe as recipes
from heatbath.data import checks, rendering, sources
from heatbath.errors import RecipeError, RunError
from heatbath.ideas.engine import dense_loss
from heatbath.ideas.objectives import objective
from heatbath.integrations.verl import files, launch, sft
from heatbath.integrations.verl.translate import Start, translated
from heatbath.progress import Progress
from heatbath.reference import FrozenBase
from heatbath.run import Run
from mistakes import call

START = Start("model", Path("tokenizer"), Path("train.parquet"), Path("val.parquet"), Path("checkpoints"))


def table(base: object = "./base", rl: dict | None = None, **more: object) -> dict:
    given = {
        "model": str(base),
        "data": {"source": "arithmetic", "demos": 10, "validation": 2, "prompts": 16, "test": 8, "system": "Be brief."},
        "sft": {"objective": {"name": "gift", "beta": 4.0}, "batch": 4, "micro_batch": 4},
        "rl": {"prompts": 8, "update_prompts": 4, "group_size": 8, "micro_batch": 4, "max_new_tokens": 20} | (rl or {}),
        **more,
    }
    return {key: value for key, value in given.items() if value is not None}


def keys(rl: dict | None = None, rows: int = 16, **more: object) -> tuple[dict, list[str]]:
    made = translated(recipes.parse(table(rl=rl, **more)), START, rows, longest_prompt=33)
    return recipes.flat(made.config), made.notes


def test_every_number_of_the_recipe_arrives() -> None:
    rl = {"lr": 3e-6, "weight_decay": 0.05, "adam_betas": [0.8, 0.9], "max_grad_norm": 0.5, "schedule": "cosine"}
    rl |= {"temperature": 0.7, "epochs": 3, "save_every": 4, "eval_every": 2, "warmup_steps": 4}
    found, notes = keys(rl=rl, seed=11)
    actor, rollout = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout."
    expected = {
        "data.train_batch_size": 8,
        "data.max_prompt_length": 33,
        "data.max_response_length": 20,
        "data.seed": 11,
        actor + "ppo_mini_batch_size": 4,
        actor + "ppo_micro_batch_size_per_gpu": 4,
        actor + "optim.lr": 3e-6,
        actor + "optim.weight_decay": 0.05,
        actor + "optim.betas": [0.8, 0.9],
        actor + "optim.lr_scheduler_type": "cosine",
        actor + "optim.lr_warmup_steps": 2,  # two optimizer steps to a generation
        actor + "grad_clip": 0.5,
        rollout + "n": 8,
        rollout + "temperature": 0.7,
        rollout + "val_kwargs.temperature": 0.7,
        rollout + "seed": 11,
        "trainer.total_training_steps": 6,  # 16 prompts, 8 at once, 3 epochs
        "trainer.total_epochs": 3,
        "trainer.save_freq": 2,
        "trainer.test_freq": 1,
        "reward.custom_reward_function.path": "pkg://heatbath.integrations.verl",
    }
    assert {key: found[key] for key in expected} == expected
    assert any("once per generation" in note for note in notes)


def test_what_is_rounded_is_said() -> None:
    found, notes = keys(rl={"max_steps": 3, "save_every": 3})
    assert found["trainer.total_training_steps"] == 2 and found["trainer.save_freq"] == 2
    assert "verl ends with a whole generation: 4 optimizer steps in place of 3" in notes
    assert any(note.startswith("rl.save_every = 3") for note in notes)
    assert keys(rl={"save_every": 0})[0]["trainer.save_freq"] == 2, "the last step is always saved"


def test_keys_of_verl_are_laid_over_and_never_contradict() -> None:
    found, _ = keys(
        rl={"verl": {"trainer": {"n_gpus_per_node": 4}, "actor_rollout_ref": {"rollout": {"name": "sglang"}}}}
    )
    assert found["trainer.n_gpus_per_node"] == 4 and found["actor_rollout_ref.rollout.name"] == "sglang"
    with pytest.raises(RecipeError, match=r"actor\.optim\.lr is set by the recipe") as told:
        keys(rl={"verl": {"actor_rollout_ref": {"actor": {"optim": {"lr": 1.0}}}}})
    assert told.value.where == "rl.verl"


@pytest.mark.parametrize(
    ("rl", "more", "where"),
    [
        *(
            ({"policy": name}, {}, "rl.policy")
            for name in ("implicit", "gvpo", "luffy", "relift", "trapo", "uft", "rloo")
        ),
        ({"policy": "reinforce"}, {}, "rl.policy.advantage"),
        ({"policy": {"name": "paper", "reduction": "sum_over_width"}}, {}, "rl.policy.reduction"),
        ({"policy": {"name": "gspo", "dual_clip": 3.0}}, {}, "rl.policy"),
        ({"policy": {"name": "grpo", "ddof": 0}}, {}, "rl.policy.ddof"),
        ({"policy": {"name": "grpo", "entropy": 0.1}}, {}, "rl.policy.entropy"),
        ({"policy": {"name": "grpo", "sqrt_length": True}}, {}, "rl.policy.sqrt_length"),
        ({"policy": {"name": "grpo", "kl": 0.1, "reference": "base"}}, {}, "rl.policy.reference"),
        ({"trainer": {"use_vllm": True}}, {}, "rl.trainer"),
        ({"schedule": "linear"}, {}, "rl.schedule"),
        ({"prompts": 32}, {}, "rl.prompts"),
        ({"micro_batch": 32}, {}, "rl.micro_batch"),
        ({}, {"lora": {}}, "lora"),
        ({}, {"reward": {"weights": {"rewards.py:f": 1.0}}}, "reward"),
        ({}, {"reward": {"model": "some/model"}}, "reward"),
    ],
)
def test_what_has_no_equal_is_refused_by_name(rl: dict, more: dict, where: str) -> None:
    with pytest.raises(RecipeError) as told:
        keys(rl=rl, **more)
    assert told.value.where == where and told.value.remedy


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, small_base: Path) -> tuple[Run, recipes.Recipe, files.Written]:
    recipe = recipes.parse(table(small_base, precision="fp32"))
    run = Run(tmp_path_factory.mktemp("runs") / "one", recipe).write()
    return run, recipe, files.write(run, recipe, sources.of(recipe), small_tokenizer())


def test_rows_are_in_verls_schema(written) -> None:
    _, recipe, made = written
    splits = sources.of(recipe)
    for name, rows, split in (("train", splits.prompts, "prompts"), ("val", splits.test, "test")):
        found = pq.read_table(made.folder / f"{name}.parquet").to_pylist()
        assert [row["reward_model"] for row in found] == [{"style": "rule", "ground_truth": r.answer} for r in rows]
        assert [row["prompt"] for row in found] == [
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": r.question}] for r in rows
        ]
        expected = {"split": split, "kind": "math", "profile": "strict"}
        assert [row["extra_info"] for row in found] == [
            {"index": i, "id": r.id, **expected} for i, r in enumerate(rows)
        ]
        assert {row["data_source"] for row in found} == {"heatbath/arithmetic"}


def test_the_longest_prompt_fits(written) -> None:
    _, recipe, made = written
    tokenizer = small_tokenizer()
    config = yaml.safe_load((made.folder / "rl.yaml").read_text())
    lengths = [
        len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"])
        for name in ("train", "val")
        for row in pq.read_table(made.folder / f"{name}.parquet").to_pylist()
    ]
    assert config["data"]["max_prompt_length"] == max(lengths) and recipe.rl is not None


def test_demonstrations_are_the_tokens_that_heatbath_learns(written) -> None:
    run, recipe, made = written
    rendered = checks.rendered(small_tokenizer(), sources.of(recipe).demos, recipe, "demos")
    rows = sft.RenderedRows([str(made.folder / "sft.parquet")], config={"pad_mode": "no_padding"})
    assert len(rows) == len(rendered) == 10
    for i, row in enumerate(rendered):
        found = rows[i]
        assert found["input_ids"].tolist() == row.input_ids
        assert [y if m else -100 for y, m in zip(row.input_ids, found["loss_mask"].tolist(), strict=True)] == row.labels
    config = yaml.safe_load((made.folder / "sft.yaml").read_text())
    assert config["heatbath"]["objective"] == {"name": "gift", "beta": 4.0}
    assert config["trainer"]["total_training_steps"] == made.sft_last == 12  # 10 rows, 4 at once, 6 epochs
    assert "sft: verl leaves out the 2 rows of an epoch that do not fill a batch" in made.notes
    assert str(run.working("sft").resolve()) in config["trainer"]["default_local_dir"]


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "psft"},
        {"name": "pear"},
        {"name": "sed"},
        {"name": "gift", "beta": {"left_to_base": 0.01}},
        {"name": "gift", "beta": {"start": 9.0, "end": 1.0, "steps": 5}},
    ],
    ids=lambda spec: spec["name"],
)
def test_an_objective_that_verl_cannot_feed_is_refused_and_rl_goes_on(spec, small_base, tmp_path) -> None:
    recipe = recipes.parse(table(small_base, sft={"objective": spec, "batch": 4, "micro_batch": 4}))
    made = files.write(Run(tmp_path / "r", recipe).write(), recipe, sources.of(recipe), small_tokenizer())
    assert made.sft_last is None and not (made.folder / "sft.yaml").exists() and (made.folder / "rl.yaml").is_file()
    assert any(note.startswith("[sft] stays with heatbath sft: ") for note in made.notes)


def test_a_missing_verl_is_named_and_the_files_stay(written, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, made = written
    monkeypatch.setenv(launch.PYTHON, sys.executable)
    if subprocess.run([sys.executable, "-c", "import verl"], capture_output=True).returncode:
        with pytest.raises(RunError, match="No module named 'verl'") as told:
            launch.require_verl(made.folder)
        assert told.value.where == launch.PYTHON and "rl.sh" in told.value.remedy
    monkeypatch.setenv(launch.PYTHON, "/no/such/python")
    with pytest.raises(RunError, match="FileNotFoundError"):
        launch.require_verl(made.folder)


def test_the_scripts_are_shell_and_name_no_python_of_this_machine(written) -> None:
    _, _, made = written
    for name in ("rl.sh", "sft.sh"):
        subprocess.run(["sh", "-n", str(made.folder / name)], check=True)
        assert sys.executable not in (made.folder / name).read_text()


def test_a_dry_run_shows_the_configuration_and_writes_nothing(small_base: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("\n".join(recipes.as_toml(recipes.parse(table(small_base))).splitlines()))
    code, said = call(tmp_path, "rl r.toml --engine verl --dry-run")
    assert code == 0, said
    assert not (tmp_path / "runs").exists()
    code, said = call(tmp_path, "rl r.toml --engine ray")
    assert code == 2 and "no engine is called 'ray'" in said
    shown = files.planned(Run(tmp_path / "runs" / "r", recipes.load(recipe)), recipes.load(recipe))["verl"]
    assert "adv_estimator" in shown and "-m verl.trainer.main_ppo --config-path" in shown
    assert not (tmp_path / "runs").exists()


def test_verls_last_checkpoint_becomes_the_policy(written, small_base: Path, tmp_path: Path, monkeypatch) -> None:
    """One with whole weights; nothing is started where the last step is there."""
    _, recipe, _ = written
    recipe = recipe.model_copy(update={"sft": None})
    run = Run(tmp_path / "run", recipe).write()
    last = run.working("rl") / "verl" / "global_step_2"
    small_model(seed=5).save_pretrained(last / "actor" / "huggingface")
    monkeypatch.setattr(launch, "require_verl", lambda folder: pytest.fail("nothing is to be started"))
    monkeypatch.setattr(launch, "_call", lambda *_: pytest.fail("nothing is to be started"))
    (last.parent / "latest_checkpointed_iteration.txt").write_text("2")
    launch.run_rl_on_verl(run, recipe, sources.of(recipe), Progress(quiet=True))
    from heatbath import models

    model, tokenizer = models.load_model(str(run.checkpoint("final")), torch.float32), small_tokenizer()
    for (name, mine), (_, theirs) in zip(model.named_parameters(), small_model(seed=5).named_parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert models.load_tokenizer(str(run.checkpoint("final"))).chat_template == tokenizer.chat_template
    assert run.finished("rl") and not run.working("rl").exists()


def batch(seed: int = 0) -> tuple[dict, torch.Tensor, torch.Tensor]:
    """Three sequences as verl packs them, float64 logits of a policy, and the labels that each position predicts."""
    g = torch.Generator().manual_seed(seed)
    lengths = (9, 5, 13)
    ids = [torch.randint(5, 100, (n,), generator=g) for n in lengths]
    masks = [torch.cat([torch.zeros(2, dtype=torch.long), torch.ones(n - 2, dtype=torch.long)]) for n in lengths]
    masks[1][:] = 1  # its first token has nothing to be predicted from
    data = {
        "input_ids": torch.nested.as_nested_tensor(ids, layout=torch.jagged),
        "loss_mask": torch.nested.as_nested_tensor(masks, layout=torch.jagged),
        "batch_num_tokens": sum(lengths) - 6,
        "dp_size": 1,
    }
    logits = 3 * torch.randn(sum(lengths), 101, generator=g, dtype=torch.float64)
    labels = [
        torch.cat([torch.where(m.bool(), i, -100)[1:], torch.tensor([-100])]) for i, m in zip(ids, masks, strict=True)
    ]
    return data, logits, torch.cat(labels)


@pytest.mark.parametrize(
    "spec",
    [
        ("gift", {"beta": 4.0}),
        ("gift_sequence", {}),
        ("iw_sft", {}),
        ("asft", {}),
        ("dft", {}),
        ("sft", {}),
        ("eaft", {}),
    ],
    ids=lambda spec: spec[0],
)
@pytest.mark.parametrize("chunk", [3, 2**27])
def test_the_loss_function_is_the_engines_mean(spec, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient, in float64: verl's two calls against `dense_loss` on each sequence's own logits."""
    monkeypatch.setattr(sft, "CHUNK_ELEMENTS", chunk * 101 if chunk < 100 else chunk)
    goal, base = objective(spec[0], **spec[1]), small_model(seed=3).double()
    data, logits, labels = batch()
    mine = logits.clone().requires_grad_()
    loss_of = sft.ObjectiveLoss(goal, FrozenBase(base))
    per_token = loss_of(student_logits=mine[None], data=data)["heatbath_loss"]
    assert per_token.shape == (1, len(logits))
    nested = torch.nested.nested_tensor_from_jagged(per_token[0], data["input_ids"].offsets())
    loss, _ = loss_of(model_output={"heatbath_loss": nested}, data=data)
    loss.backward()
    with torch.no_grad():
        ref = torch.cat([base(input_ids=row[None]).logits[0] for row in data["input_ids"].unbind()])
    theirs = logits.clone().requires_grad_()
    segments = torch.repeat_interleave(torch.arange(3), data["input_ids"].offsets().diff())
    truth = dense_loss(goal, theirs, labels, ref_logits=ref, segments=segments).sum() / data["batch_num_tokens"]
    truth.backward()
    torch.testing.assert_close(loss, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-10, atol=1e-13)


def test_a_base_that_is_wanted_and_missing_is_named() -> None:
    with pytest.raises(RecipeError, match="reads the base model"):
        sft.ObjectiveLoss(objective("gift", beta=1.0), None)
    data, logits, _ = batch()
    with pytest.raises(RunError, match="sequence parallelism"):
        sft.ObjectiveLoss(objective("sft"), None)(student_logits=logits[None, ::2], data=data)


def test_the_reward_reads_its_options() -> None:
    from heatbath.integrations.verl import compute_score

    found = compute_score("x", "so \\boxed{4}", "4", {"kind": "math", "profile": "paper"}, workers=1, deadline=3.0)
    assert found["status"] == "right"


def test_rendering_is_shared(written) -> None:
    """What verl is given as messages is what heatbath renders itself."""
    _, recipe, made = written
    row = sources.of(recipe).prompts[0]
    first = pq.read_table(made.folder / "train.parquet").to_pylist()[0]["prompt"]
    assert first == rendering.messages(row, recipe.data.system)
