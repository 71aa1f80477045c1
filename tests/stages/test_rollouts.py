"""What happens between sampling and training: demonstrations inside groups, refilled groups, the buffer of ReLIFT,
held-out answers, the gap between sampler and trainer. Real trainers, a small model, rewards that the test decides."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from policy_trainers import (
    HYPER,
    LONGEST,
    PROMPTS,
    G,
    even_letters,
    make,
    move,
    prompt_of,
    recorded_window,
    rows_of,
    steps,
)

from heatbath.data.rendering import IGNORE
from heatbath.errors import RunError
from heatbath.ideas.policy import policy
from heatbath.stages import rollouts
from heatbath.stages.relift import ReliftTrainer

DOUBLE = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "steps_per_generation": 4}


def completions_of(batches: list[dict]) -> list[tuple[int, list[int], int]]:
    """(group, token ids, copied tokens) of every row."""
    out = []
    for batch in batches:
        for i, group in enumerate(batch["groups"].tolist()):
            ids = batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()
            expert = batch["expert"][i].bool().tolist() if "expert" in batch else []
            copied = sum(expert)
            assert not any(expert[copied:]), "what is copied stands at the beginning"
            out.append((group, ids, copied))
    return out


def trained(folder: Path, goal=None, **kwargs):
    """A trainer after its training; the seed is set when it is made."""
    trainer = make(folder, goal, **kwargs)
    trainer.train()
    return trainer


def assert_same(one, two) -> None:
    for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(p, q)


def demo(trainer, group: int) -> list[int]:
    return trainer.train_dataset[group]["demo"]


def test_luffys_groups_hold_one_whole_demonstration(tmp_path: Path) -> None:
    trainer = make(tmp_path, policy("luffy"))
    rows = completions_of(recorded_window(trainer))
    for group in range(PROMPTS):
        copied = [ids for g, ids, n in rows if g == group and n]
        assert copied == [demo(trainer, group)] and sum(g == group for g, _, _ in rows) == G
    share = sum(n for _, _, n in rows) / sum(len(ids) for _, ids, _ in rows)
    assert trainer._metrics["train"]["expert_share"] == [pytest.approx(share)]


def test_the_trace_is_graded_with_the_others_and_reward_is_the_policys_own(tmp_path: Path) -> None:
    trainer = make(tmp_path, policy("luffy"))
    batches = recorded_window(trainer)
    rows = completions_of(batches)
    decoded = trainer.processing_class.batch_decode([ids for _, ids, _ in rows], skip_special_tokens=True)
    scores = even_letters([[{"content": text}] for text in decoded])
    assert rows_of(batches, "rewards").tolist() == scores
    own = [s for s, (_, _, n) in zip(scores, rows, strict=True) if not n]
    assert trainer._metrics["train"]["own_reward"] == [pytest.approx(sum(own) / len(own))]


def test_luffy_without_traces_is_its_on_policy_part(tmp_path: Path) -> None:
    """The same as the policy of the same parts, trained for three steps: bit by bit."""
    parts = {"surrogate": "linear", "reduction": "sum_over_width", "entropy": 0.001}
    one = trained(tmp_path / "a", policy("luffy", traces=0))
    assert_same(one, trained(tmp_path / "b", policy("paper", **parts)))


@pytest.mark.parametrize(("reward", "shares"), [(0.0, (0.0, 0.5, 1.0)), (0.6, (0.0, 0.0, 1.0)), (3.0, (0.0, 0.0, 0.0))])
def test_trapo_gives_more_of_the_demonstration_while_the_group_fails(tmp_path: Path, reward, shares) -> None:
    trainer = make(
        tmp_path, policy("trapo", **HYPER["trapo"]), reward=lambda completions, **_: [reward] * len(completions)
    )
    rows = completions_of(recorded_window(trainer))
    for group in range(PROMPTS):
        whole = demo(trainer, group)
        copied = sorted(n for g, _, n in rows if g == group)
        first, second, third = (round(share * len(whole)) for share in shares)
        assert copied == sorted([first, first, second, third])
        assert all(ids[:n] == whole[:n] for g, ids, n in rows if g == group)
    assert len(trainer._metrics["train"]["informative_share"]) == 1  # rounds are graded, but only whole groups logged


def test_ufts_hints_are_the_groups_and_end_with_the_schedule(tmp_path: Path) -> None:
    trainer = make(tmp_path, policy("uft", hint_steps=3, high=0.6), **DOUBLE)
    rows = completions_of(recorded_window(trainer))
    lengths = {group: {n for g, _, n in rows if g == group} for group in range(PROMPTS)}
    for group, copied in lengths.items():
        whole = len(demo(trainer, group))
        assert len(copied) == 1 and copied <= {round(k / 5 * whole) for k in range(6)}
    assert any(copied != {0} for copied in lengths.values())
    trainer.state.global_step, trainer._buffered_inputs = 3, None
    assert all(n == 0 for _, _, n in completions_of(recorded_window(trainer)))


def test_a_prompt_without_a_demonstration_is_named(tmp_path: Path) -> None:
    trainer = make(tmp_path, policy("luffy"))
    trainer.train_dataset = trainer.train_dataset.remove_columns("demo")
    with pytest.raises(RunError, match="without a demonstration"):
        recorded_window(trainer)


def by_prompt(table: dict[str, float]):
    """Rewards by the problem's text; where the problem is not named, alternating."""

    def reward(completions, prompts, **_):
        return [
            next((v for k, v in table.items() if k in p[0]["content"]), float(i % 2)) for i, p in enumerate(prompts)
        ]

    return reward


def test_dynamic_sampling_replaces_groups_without_a_signal(tmp_path: Path) -> None:
    dead = {f"{i}?": 1.0 for i in (10, 12)}
    trainer = make(tmp_path, policy("dapo"), reward=by_prompt(dead))
    batches = recorded_window(trainer)
    assert bool(rows_of(batches, "informative").all())
    counts = Counter(rows_of(batches, "groups").tolist())
    assert len(counts) == PROMPTS and set(counts.values()) == {G}
    assert trainer._metrics["train"]["generations"][0] >= 2
    prompts = {
        tuple(b["prompt_ids"][i][b["prompt_mask"][i].bool()].tolist()) for b in batches for i in range(len(b["groups"]))
    }
    assert not prompts & {tuple(prompt_of(trainer, i)) for i in (0, 2)}


def test_dynamic_sampling_ends_where_nothing_carries_a_signal(tmp_path: Path) -> None:
    trainer = make(tmp_path, policy("dapo", overlong=0.0), reward=lambda completions, **_: [1.0] * len(completions))
    batches = recorded_window(trainer)
    assert trainer._metrics["train"]["generations"] == [rollouts.MOST_GENERATIONS]
    assert not rows_of(batches, "advantages").any() and len(rows_of(batches, "groups")) == PROMPTS * G


def test_spare_prompts_are_all_rows_before_any_comes_again() -> None:
    whole, parts = rollouts.Spare(7, seed=3), rollouts.Spare(7, seed=3)
    drawn = whole.take(21)
    assert [*parts.take(5), *parts.take(1), *parts.take(15)] == drawn
    for start in (0, 7, 14):
        assert sorted(drawn[start : start + 7]) == list(range(7))
    assert drawn[:7] != drawn[7:14]
    resumed = rollouts.Spare(7, seed=3)
    resumed.drawn = 9
    assert resumed.take(12) == drawn[9:]


def test_overlong_completions_lose_reward(tmp_path: Path) -> None:
    trainer = make(
        tmp_path,
        policy("dapo", overlong=0.4, dynamic_sampling=False),
        reward=lambda completions, **_: [1.0] * len(completions),
    )
    batches = recorded_window(trainer)
    lengths, buffer = rows_of(batches, "completion_mask").sum(1), 0.4 * LONGEST
    expected = 1 - ((lengths - (LONGEST - buffer)) / buffer).clamp(min=0)
    torch.testing.assert_close(rows_of(batches, "rewards"), expected.double())
    assert len(expected.unique()) > 1


def relift(tmp_path: Path, reward, **hyper) -> ReliftTrainer:
    goal = policy("relift", **{"sft_batch": 3, "sft_lr": 1e-2, **hyper})
    return make(tmp_path, goal, ReliftTrainer, reward, **DOUBLE)


def test_relift_buffers_unsolved_prompts_newest_first_and_takes_the_newest(tmp_path: Path) -> None:
    trainer = relift(tmp_path, by_prompt({f"{i}?": 0.0 for i in (10, 12, 13)} | {"11?": -1.0}))
    recorded_window(trainer)
    first = [(prompt_of(trainer, i), demo(trainer, i)) for i in (0, 2, 3)]
    assert trainer.buffer == first  # −1 is not unsolved, and what one of four solved is not either
    trainer._one_generation([trainer.train_dataset[i] for i in (4, 2) for _ in range(G)])
    newest = (prompt_of(trainer, 2), demo(trainer, 2))
    assert trainer.buffer == [newest, *first]
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.fine_tune()
    assert trainer.buffer == [first[2]]
    trainer.fine_tune()  # not enough of them: nothing happens
    assert trainer.buffer == [first[2]] and trainer._metrics["train"]["sft_rows"] == [3.0]
    assert any((p != q).any() for p, q in zip(trainer.model.parameters(), before, strict=True))


def test_relifts_sft_step_is_adamw_on_nll_minus_entropy(tmp_path: Path) -> None:
    trainer = relift(tmp_path, by_prompt({}), sft_batch=5, sft_entropy=0.3, sft_max_grad_norm=0.1)
    trainer.model.train()
    rows = [(prompt_of(trainer, i), demo(trainer, i)) for i in range(5)]
    trainer.buffer = list(rows)
    twin = make(tmp_path / "twin", policy("paper")).model
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, betas=(0.9, 0.999), weight_decay=0.01)
    for _ in range(2):  # two, so that the moments count
        total, tokens = torch.zeros((), dtype=torch.float64), sum(len(d) for _, d in rows)
        for prompt, solution in rows:
            ids = torch.tensor([prompt + solution])
            log_pi = twin(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            nll = -log_pi.gather(-1, torch.tensor(solution)[:, None]).sum()
            total = total + (nll + 0.3 * (log_pi.exp() * log_pi).sum()) / tokens
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.1)
        optimizer.step()
        trainer.buffer = list(rows)
        trainer.fine_tune()
        assert trainer._metrics["train"]["sft_grad_norm"][-1] == pytest.approx(float(norm), rel=1e-5)
    for p, q in zip(trainer.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_relift_trains_between_generations_and_carries_its_buffer(tmp_path: Path) -> None:
    trainer = relift(tmp_path, by_prompt({f"{i}?": 0.0 for i in range(10, 18)}), sft_batch=3)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "reward" in row]
    assert [row["buffer"] for row in logs] == [4.0, 5.0]  # four unsolved, three taken, four more
    state = trainer.carried()
    torch.save(state, tmp_path / "state.pt")
    other = relift(tmp_path / "other", by_prompt({}))
    other.carry_on(torch.load(tmp_path / "state.pt", weights_only=True))
    assert other.buffer == trainer.buffer and len(other.buffer) == 2
    mine, theirs = trainer._optimizer().state_dict()["state"], other._optimizer().state_dict()["state"]
    assert all(torch.equal(mine[i]["exp_avg"], theirs[i]["exp_avg"]) for i in mine) and mine


def test_held_out_answers_are_logged_and_change_nothing(tmp_path: Path) -> None:
    plain = trained(tmp_path / "a", max_steps=4)
    often = trained(
        tmp_path / "b",
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        num_generations_eval=1,
        per_device_eval_batch_size=3,
        eval_on_start=True,
    )
    assert_same(plain, often)
    rows = [row for row in often.state.log_history if "held_out/reward" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert {
        "held_out/reward",
        "held_out/tokens",
        "held_out/truncated_share",
        "held_out/kl_init",
        "held_out/entropy",
    } <= set(rows[0])
    assert rows[-1]["held_out/kl_init"] != rows[0]["held_out/kl_init"]
    assert json.dumps(rows)


def test_the_gap_between_sampler_and_trainer_is_logged_and_corrected(tmp_path: Path) -> None:
    """A sampler in vLLM's place, whose log-probabilities are 0.2 nats off at every token."""
    trainer = make(tmp_path, vllm_importance_sampling_mode="token_truncate", vllm_importance_sampling_clip_max=10.0)
    original = trainer._generate_single_turn

    def sampler(prompt_ids, *rest):
        trainer.use_vllm = False
        ids, _ = original(prompt_ids, *rest)
        trainer.use_vllm = True
        rows = [torch.tensor(x) for x in ids]
        found = []
        with torch.no_grad():
            for prompt, row in zip(prompt_ids, rows, strict=True):
                whole = torch.cat([torch.tensor(prompt), row])
                log_pi = trainer.model(input_ids=whole[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                found.append((log_pi.gather(-1, row[:, None])[:, 0] - 0.2).tolist())
        return ids, found

    trainer._generate_single_turn, trainer.use_vllm, trainer.vllm_generation = sampler, True, SimpleNamespace()
    batches = recorded_window(trainer)
    assert trainer._metrics["train"]["sampling/sampling_logp_difference/mean"] == [pytest.approx(0.2, rel=1e-4)]
    weight = torch.tensor(0.2).exp()
    move(trainer.model)
    loss = sum(trainer._compute_loss(trainer.model, batch) for batch in batches[:2])
    for batch in batches[:2]:
        torch.testing.assert_close(
            batch["importance_sampling_ratio"],
            weight.expand(batch["completion_ids"].shape).double() * batch["completion_mask"]
            + (1 - batch["completion_mask"]),
            rtol=1e-4,
            atol=1e-4,
            check_dtype=False,
        )
        del batch["importance_sampling_ratio"]
    plain = sum(trainer._compute_loss(trainer.model, batch) for batch in batches[:2])
    assert float(loss) == pytest.approx(float(plain * weight), rel=1e-3)


def test_moving_the_policy_changes_what_the_second_step_compares_with(tmp_path: Path) -> None:
    """The first step of a generation trains the policy that sampled; the second compares with what it was then."""
    trainer = make(tmp_path)
    batches = recorded_window(trainer)
    assert "old_per_token_logps" not in batches[0] and "old_per_token_logps" in batches[-1]
    before = trainer.logps(batches[-1])
    torch.testing.assert_close(batches[-1]["old_per_token_logps"], before, rtol=1e-5, atol=1e-6)
    move(trainer.model)
    assert (trainer.logps(batches[-1]) - before).abs().max() > 1e-3


def test_labels_cover_the_completion_and_nothing_else(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    batch = recorded_window(trainer)[0]
    seen = {}
    forward = trainer.model.forward
    trainer.model.forward = lambda **kwargs: seen.update(kwargs) or forward(**kwargs)
    trainer._compute_loss(trainer.model, batch)
    labels = seen["labels"]
    for i in range(len(labels)):
        scored = labels[i][labels[i] != IGNORE].tolist()
        assert scored == batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()


def test_spare_prompts_come_in_another_order_than_training_takes_them(tmp_path: Path) -> None:
    """In the same order a dead group would give way to one of the same prompt."""
    trainer = make(tmp_path, policy("dapo"))
    taken = [i for k, i in enumerate(trainer._get_train_sampler()) if k % G == 0][:PROMPTS]
    assert taken != rollouts.Spare(2 * PROMPTS, trainer.args.seed).take(PROMPTS)


def test_a_ratio_beyond_all_bounds_leaves_the_gradient_finite(tmp_path: Path) -> None:
    trainer = make(tmp_path, policy("rloo"))
    window = steps(trainer, recorded_window(trainer))[1]
    for batch in window:
        batch["old_per_token_logps"] = batch["old_per_token_logps"] - 200.0
        trainer._compute_loss(trainer.model, batch).backward()
    assert all(torch.isfinite(p.grad).all() for p in trainer.model.parameters())


def test_a_broken_gradient_is_named_before_it_reaches_the_weights(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    weight = next(trainer.model.parameters())
    weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(RunError, match="a gradient at step 1"):
        trainer.train()
    assert torch.isfinite(weight).all()


def test_a_rank_without_rows_takes_part_in_relifts_step(tmp_path: Path) -> None:
    """Rows that fill up a pass hold no label: they change neither loss nor gradient."""
    trainer = relift(tmp_path, by_prompt({}), sft_batch=3)
    twin = relift(tmp_path / "twin", by_prompt({}), sft_batch=3)
    rows = [(prompt_of(trainer, i), demo(trainer, i)) for i in range(3)]
    for one, micro in ((trainer, 2), (twin, 3)):  # 2 + 1 and one that fills up, against 3
        one._train_batch_size, one.buffer = micro, list(rows)
        one.fine_tune()
    assert trainer._metrics["train"]["sft_nll"] == pytest.approx(twin._metrics["train"]["sft_nll"], rel=1e-6)
    for p, q in zip(trainer.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_truncated_completions_have_their_own_length(tmp_path: Path) -> None:
    """Masked completions lose their tokens in the loss, not in the length by which a reward is divided."""
    goal = policy("paper", sqrt_length=True)
    reward = {"reward": lambda completions, **_: [1.0] * len(completions), "mask_truncated_completions": True}
    trainer = make(tmp_path, goal, **reward)
    batches = recorded_window(trainer)
    masked = rows_of(batches, "completion_mask").sum(1) == 0
    assert masked.any()
    torch.testing.assert_close(
        rows_of(batches, "rewards")[masked], torch.full((int(masked.sum()),), LONGEST**-0.5, dtype=torch.float64)
    )
    coupled = make(tmp_path / "b", policy("implicit"), mask_truncated_completions=True)
    batches = recorded_window(coupled)
    masked = rows_of(batches, "completion_mask").sum(1) == 0
    assert rows_of(batches, "rewards")[masked].isnan().all() and not rows_of(batches, "rewards")[~masked].isnan().any()


def test_dropout_is_off(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    for module in trainer.model.modules():
        if hasattr(module, "attention_dropout"):
            assert module.attention_dropout == 0.0
    batch = recorded_window(trainer)[0]
    assert torch.equal(trainer.logps(batch), trainer.logps(batch))


def test_a_function_of_ones_own_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def broken(rewards, groups):\n    return [1.0]\n\n\ndef raising(ratio, a, logp):\n    raise KeyError('x')\n"
    )
    with pytest.raises(RunError, match=r"broken returned list, not a tensor\n.*rl.policy.advantage"):
        recorded_window(make(tmp_path / "a", policy("grpo", advantage=f"{tmp_path}/mine.py:broken")))
    trainer = make(tmp_path / "b", policy("grpo", surrogate=f"{tmp_path}/mine.py:raising"))
    with pytest.raises(RunError, match=r"raising raised KeyError"):
        trainer._compute_loss(trainer.model, recorded_window(trainer)[0])


def test_a_hint_that_is_the_whole_solution_goes_through_a_sampler_with_log_probabilities(tmp_path: Path) -> None:
    trainer = make(tmp_path, policy("uft", high=1.0, low=1.0))
    trainer.use_vllm, trainer.model.training = True, True
    trainer._asked = [trainer.train_dataset[i // G] for i in range(PROMPTS * G)]
    prompts = [prompt_of(trainer, i // G) for i in range(PROMPTS * G)]
    ids, logps, copied = rollouts.guided(trainer, trainer.policy, prompts, trainer._asked, None)
    assert [len(x) for x in ids] == copied and logps == [[None] * n for n in copied]
