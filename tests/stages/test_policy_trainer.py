"""The policy trainer, real TRL underneath: each policy's split computation against its truth and against TRL's own."""

from pathlib import Path

import pytest
import torch
import trl
from policy_trainers import (
    HYPER,
    LONGEST,
    PROMPTS,
    G,
    gradient,
    make,
    move,
    plain,
    recorded_window,
    rows_of,
    steps,
    texts,
    truth,
)

from heatbath.errors import RunError
from heatbath.ideas.policy import POLICIES, policy
from heatbath.ideas.surrogates import ESTIMATORS
from heatbath.stages.policy_trainer import PolicyTrainer
from heatbath.stages.relift import ReliftTrainer


def same(found: torch.Tensor, expected: torch.Tensor, limit: float = 2e-6) -> None:
    """Relative distance; Llama's norms are float32 whatever its weights are, and padding moves the last bit."""
    assert float((found - expected).norm() / expected.norm()) < limit


def check(trainer: PolicyTrainer) -> list[torch.Tensor]:
    """Each optimizer step of a generation against the truth; returns the gradients."""
    batches = recorded_window(trainer)
    with torch.no_grad():
        old = [plain(trainer.model, window, trainer.temperature)[0] for window in steps(trainer, batches)]
    move(trainer.model)
    out = []
    for number, window in enumerate(steps(trainer, batches)):
        expected = truth(trainer, window, old[number] if number else None)
        if trainer.policy.couples_groups:
            trainer._couple(window)
        found = sum(trainer._compute_loss(trainer.model, batch) for batch in window)
        out.append(gradient(found, trainer.model))
        same(out[-1], gradient(expected, trainer.model))
        if not trainer.policy.couples_groups:
            assert found.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-9)
        assert out[-1].abs().max() > 1e-6
    return out


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_its_truth_however_a_generation_is_split(tmp_path: Path, name: str) -> None:
    goal = policy(name, **HYPER.get(name, {}))
    cls = ReliftTrainer if name == "relift" else PolicyTrainer
    check(
        make(
            tmp_path,
            goal,
            cls,
            temperature=0.8,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=4,
            steps_per_generation=8,
        )
    )


@pytest.mark.parametrize("name", ["paper", "grpo", "gspo", "implicit", "luffy"])
def test_the_gradient_does_not_depend_on_the_micro_batch(tmp_path: Path, name: str) -> None:
    goal, found = policy(name, **HYPER.get(name, {})), []
    for micro in (1, 2, 8, 16):
        accumulation = 16 // micro
        trainer = make(
            tmp_path / str(micro),
            goal,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            steps_per_generation=accumulation,
        )
        found.append(check(trainer)[0])
    for other in found[1:]:
        same(other, found[0])


@pytest.mark.parametrize(
    "hyper",
    [
        {"std": "detached"},
        {"reference": "old"},
        {"reference": "base", "score": "kl_mean"},
        {"ddof": 0, "scale": 0.7, "std_floor": 0.01},
        {"kl": 0.1, "entropy": 0.01, "sqrt_length": True},
    ],
    ids=str,
)
def test_options_of_implicit_reach_the_trainer(tmp_path: Path, hyper: dict) -> None:
    check(make(tmp_path, policy("implicit", **hyper)))


TRL = {
    "grpo": {"loss_type": "grpo", "scale_rewards": "group"},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "dapo": {"loss_type": "dapo", "scale_rewards": "group", "epsilon_high": 0.28},
    "gspo": {
        "loss_type": "grpo",
        "scale_rewards": "group",
        "importance_sampling_level": "sequence",
        "epsilon": 0.01,
        "epsilon_high": 0.02,
    },
    "cispo": {"loss_type": "cispo", "scale_rewards": "group", "epsilon_high": 1.05},
    "paper": {"loss_type": "dapo", "scale_rewards": "none"},
}


@pytest.mark.parametrize("name", TRL)
def test_loss_and_gradient_are_trls_own(tmp_path: Path, name: str) -> None:
    """On the same completions and rewards. TRL's dapo and cispo divide by a rescaled generation batch, which is the
    optimizer step's own count where all steps have as many tokens: for these every completion counts in full."""
    hyper = (
        HYPER.get(name, {}) | ({"overlong": 0.0} if name == "dapo" else {}) | ({"kl": 0.0} if name == "grpo" else {})
    )
    ours = make(tmp_path / "a", policy(name, **hyper), max_completion_length=6)
    theirs = make(tmp_path / "b", cls=trl.GRPOTrainer, max_completion_length=6, **TRL[name])
    theirs.model.train()
    theirs.current_gradient_accumulation_steps = 2
    batches = recorded_window(ours)
    if TRL[name]["loss_type"] in ("dapo", "cispo"):
        for batch in batches:
            batch["completion_mask"] = torch.ones_like(batch["completion_mask"])
    scored = theirs_advantages(theirs, texts(ours, batches), rows_of(batches, "groups"))
    with torch.no_grad():
        old = [plain(ours.model, [batch], 1.0)[0] for batch in batches]
    move(ours.model)
    theirs.model.load_state_dict(ours.model.state_dict())
    tokens = sum(int(b["completion_mask"].sum()) for b in batches)
    for number, window in enumerate(steps(ours, batches)):
        counts = ours._counts(window)
        mine = torch.zeros((), dtype=torch.float64)
        reference = torch.zeros((), dtype=torch.float64)
        for k, batch in enumerate(window):
            at = 2 * number + k
            batch |= {"counts": counts, "old_per_token_logps": old[at]}
            if "groups" in batch and TRL[name]["loss_type"] not in ("dapo", "cispo"):
                torch.testing.assert_close(batch["advantages"], scored[4 * at : 4 * at + 4], check_dtype=False)
            batch["advantages"] = scored[4 * at : 4 * at + 4].double()
            mine = mine + ours._compute_loss(ours.model, batch)
            reference = reference + theirs._compute_loss(
                theirs.model, batch | {"num_items_in_batch": torch.tensor(tokens)}
            )
        assert mine.item() == pytest.approx(reference.item(), rel=1e-5, abs=1e-8)
        same(gradient(mine, ours.model), gradient(reference, theirs.model))


def theirs_advantages(trainer: trl.GRPOTrainer, completions: list, groups: torch.Tensor) -> torch.Tensor:
    """TRL's advantages of given completions, by its own code: its generation is replaced by what is given."""
    order = groups.argsort(stable=True)
    listed = [completions[i] for i in order.tolist()]
    rewards = trainer.reward_funcs[0](completions=listed)
    trainer._calculate_rewards = lambda *_: torch.tensor(rewards, dtype=torch.float32)[:, None]
    rows = [trainer.train_dataset[i // G] for i in range(len(listed))]
    torch.manual_seed(0)
    found = trainer._generate_and_score_completions(rows)["advantages"]
    out = torch.empty_like(found)
    out[order] = found
    return out


def test_every_step_holds_whole_groups(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    batches = recorded_window(trainer)
    held = [sorted(rows_of(window, "groups").tolist()) for window in steps(trainer, batches)]
    assert all(len(set(groups)) == PROMPTS // 2 and len(groups) == 2 * G for groups in held)
    assert sorted(held[0] + held[1]) == sorted(list(range(PROMPTS)) * G)


def test_a_micro_batch_holds_no_padding_of_the_others(tmp_path: Path) -> None:
    batches = recorded_window(
        make(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=8, steps_per_generation=16)
    )
    for batch in batches:
        assert batch["prompt_mask"].all() and batch["completion_mask"].all()
    widths = {batch["completion_ids"].shape[1] for batch in batches}
    assert len(widths) > 1
    lengths = [int(b["prompt_mask"].sum() + b["completion_mask"].sum()) for b in batches[:8]]
    assert lengths == sorted(lengths, reverse=True)


def test_the_kl_to_the_start_is_k3_over_the_policys_tokens(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    batches = recorded_window(trainer)
    for batch in batches:
        trainer._compute_loss(trainer.model, batch)
    total, tokens = trainer._token_sums["train"]["kl_init"].tolist()
    with torch.no_grad():
        logp, ref = (plain(m, batches, 1.0)[0] for m in (trainer.model, trainer.fixed.models["init"]))
    assert tokens == sum(int(b["completion_mask"].sum()) for b in batches)
    assert total == pytest.approx(float(ESTIMATORS["k3"](logp, ref).sum()), rel=1e-6)


def test_a_reference_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="reference 'init' is not there"):
        make(tmp_path, policy("grpo", kl=0.1), own={"initial": None})
    with pytest.raises(RunError, match="reference 'base' is not there"):
        make(tmp_path, policy("implicit", reference="base"), own={"base": None})


def test_coupled_groups_must_be_whole_in_a_step(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not hold whole groups"):
        make(
            tmp_path,
            policy("implicit"),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=1,
            steps_per_generation=4,
        )


def test_the_first_step_of_implicit_is_finite_and_moves(tmp_path: Path) -> None:
    """Policy and reference are the same: every score is 0."""
    trainer = make(tmp_path, policy("implicit"), max_steps=3)
    trainer.fixed.models["init"].load_state_dict(trainer.model.state_dict())
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    logs = [row for row in trainer.state.log_history if "reward" in row]
    assert logs[0]["score_deviation"] == pytest.approx(0.0, abs=1e-9) and logs[-1]["score_deviation"] > 0
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert any((p != q).any() for p, q in zip(trainer.model.parameters(), before, strict=True))
    assert max(len(i) for i in texts(trainer, recorded_window(trainer))) <= LONGEST
