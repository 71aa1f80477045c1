"""The reference caches: equal to the base on the fly, never stale, resumable, within their bound."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from conftest import small_model, small_tokenizer
from heatbath import heads
from heatbath.cache import CachedBase, NeededBy, ReferenceCache, everything, nothing, row_key, weights_hash
from heatbath.data import arithmetic
from heatbath.data.rendering import IGNORE, Rendered, render
from heatbath.errors import RunError
from heatbath.ideas.engine import dense_loss, linear_loss
from heatbath.ideas.gift import Gift, GiftSequence
from heatbath.ideas.objectives import Asft, IwSft, Kd
from heatbath.reference import FrozenBase
from heatbath.stages.fused_forward import add_objective_forward
from heatbath.stages.training import RowCollator

EPSILON = 0.02


def rows(count: int = 12) -> list[Rendered]:
    sums = [p for digits in (1, 2, 3) for p in arithmetic.problems(digits, ("+",), count // 3, 0, held_out=False)]
    made = arithmetic.rows(sums, arithmetic.FORMS, paths=1, label_noise=0.0, seed=0)
    return [render(small_tokenizer(), row) for row in made]


def table(rendered: list[Rendered]) -> list[dict]:
    return [{"input_ids": r.input_ids, "labels": r.labels, **r.columns} for r in rendered]


def filled(root: Path, needed=everything, seed: int = 1) -> ReferenceCache:
    model = small_model(seed)
    cache = ReferenceCache.of(model, root)
    cache.fill(FrozenBase(model), rows(), needed, pad_id=1)
    return cache


def loss_and_gradient(batches: list[dict], objective: object, reference: object) -> tuple[float, torch.Tensor]:
    policy = small_model(0)
    add_objective_forward(policy)
    outs = [policy(**batch, objective=objective, reference=reference) for batch in batches]
    loss = sum(out["loss"] for out in outs)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in policy.parameters()])


@pytest.mark.parametrize(
    "objective", [Gift(3.0), Gift(3.0, smoothing=0.05), GiftSequence(0.7), Kd(0.3), Asft(), IwSft()]
)
def test_the_hidden_cache_is_the_base_on_the_fly(tmp_path: Path, objective) -> None:
    """Padded, packed, shuffled, in another split: only rounding is left between the two."""
    made = table(rows())
    batches = {
        "padded": [RowCollator(1)(made)],
        "packed": [RowCollator(1, packing=True)(made)],
        "split and shuffled": [RowCollator(1)(made[7:]), RowCollator(7)(made[:7][::-1])],
    }
    cached = CachedBase(filled(tmp_path))
    for name, some in batches.items():
        expected, gradient = loss_and_gradient(some, objective, FrozenBase(small_model(1)))
        found, own = loss_and_gradient(some, objective, cached)
        assert found == pytest.approx(expected, rel=1e-5), name
        assert torch.linalg.norm(own - gradient) < 1e-5 * torch.linalg.norm(gradient), name


def test_an_objective_of_the_surprise_alone_needs_no_hidden_state(tmp_path: Path) -> None:
    made = [RowCollator(1)(table(rows()))]
    cache = filled(tmp_path, nothing)
    assert cache.row(made[0]["input_ids"][0].tolist(), made[0]["labels"][0].tolist()) is None  # padded: another row
    expected, gradient = loss_and_gradient(made, IwSft(), FrozenBase(small_model(1)))
    found, own = loss_and_gradient(made, IwSft(), CachedBase(cache))
    assert found == pytest.approx(expected, rel=1e-5)
    assert torch.linalg.norm(own - gradient) < 1e-5 * torch.linalg.norm(gradient)


@pytest.mark.parametrize(
    "objective", [Gift(8.0), Gift(8.0, smoothing=0.1), Gift(8.0, floor=1e-4), GiftSequence(0.9), GiftSequence(0.9, 0.5)]
)
def test_the_surprise_cache_moves_no_tokens_logit_gradient_by_more_than_two_epsilon(tmp_path: Path, objective) -> None:
    """‖∂L/∂logits − exact‖₁ ≤ 2ε for every token; with the identity for a head, ∂L/∂hidden is ∂L/∂logits."""
    base, V = small_model(1), small_model(1).config.vocab_size
    cache = filled(tmp_path, NeededBy(objective, V, EPSILON))
    batch = RowCollator(1)(table(rows()))
    view = CachedBase(cache).view(batch, batch["labels"])
    full = FrozenBase(base).view({k: batch[k] for k in ("input_ids", "attention_mask")}, batch["labels"])
    target = batch["labels"][:, 1:]
    segments = torch.arange(len(target))[:, None].expand_as(target)[target != IGNORE]
    target = target[target != IGNORE]
    assert 0 < len(view.rows) < len(target), "the case has tokens on both sides of the bound"
    logits = (3 * torch.randn(len(target), V, generator=torch.Generator().manual_seed(0))).requires_grad_()
    loss = linear_loss(
        objective,
        logits,
        torch.eye(V),
        target,
        ref_hidden=view.hidden,
        ref_head=cache.head,
        ref_logp=view.logp,
        ref_rows=view.rows,
        segments=segments,
    )
    (found,) = torch.autograd.grad(loss, logits)
    exact = dense_loss(
        objective,
        logits.double(),
        target,
        ref_logits=(full.hidden @ heads.output_head(base).T).double().detach(),
        segments=segments,
    )
    (expected,) = torch.autograd.grad(exact.sum(), logits)
    off = (found - expected).abs().sum(-1)
    assert off.max() <= 2 * EPSILON + 1e-5
    assert off.max() > 0.2 * EPSILON, "the bound is not vacuous here"
    held = torch.zeros(len(target), dtype=torch.bool)
    held[view.rows] = True
    assert off[held].max() < 1e-5, "where the hidden state is held the gradient is exact"


def test_another_model_template_text_or_precision_is_another_cache_or_not_found(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    one = small_model(1)
    assert ReferenceCache.of(one, tmp_path).folder == cache.folder
    changed = small_model(1)
    with torch.no_grad():  # one value of one weight, far from any sample of them
        changed.model.layers[1].mlp.down_proj.weight[17, 31] += 1e-6
    assert ReferenceCache.of(changed, tmp_path).folder != cache.folder
    scaled = small_model(1)
    scaled.config.rope_parameters = {**scaled.config.rope_parameters, "rope_theta": 5e5}
    assert weights_hash(scaled) != weights_hash(one)
    assert ReferenceCache.of(one, tmp_path, torch.bfloat16).folder != cache.folder

    row = rows()[0]
    assert cache.row(row.input_ids, row.labels) is not None
    text = [*row.input_ids[:-2], row.input_ids[-2] + 1, row.input_ids[-1]]
    assert cache.row(text, row.labels) is None
    boundary = [IGNORE if i < 20 else x for i, x in enumerate(row.labels)]
    assert boundary != row.labels and cache.row(row.input_ids, boundary) is None
    assert row_key([1, 2, 3], [IGNORE, 2, 3]) == row_key([1, 2, 3], [1, 2, 3]), "the first token is never predicted"
    batch = RowCollator(1)([{"input_ids": text, "labels": row.labels}])
    with pytest.raises(RunError, match="does not hold a sequence"):
        CachedBase(cache).view(batch, batch["labels"])


def test_a_smaller_beta_extends_the_cache_and_is_refused_until_then(tmp_path: Path) -> None:
    V = small_model().config.vocab_size
    wide, narrow = NeededBy(Gift(5.0), V, EPSILON), NeededBy(Gift(9.0), V, EPSILON)
    cache = filled(tmp_path, narrow)
    assert not cache.missing(rows(), narrow) and cache.missing(rows(), wide)
    batch = [RowCollator(1)(table(rows()))]
    loss_and_gradient(batch, Gift(9.0), CachedBase(cache, EPSILON))
    for goal, epsilon in ((Gift(5.0), EPSILON), (Gift(9.0), EPSILON / 100)):
        with pytest.raises(ValueError, match=r"Gift leaves the base .* whose hidden state is not held"):
            loss_and_gradient(batch, goal, CachedBase(cache, epsilon))
    with pytest.raises(ValueError, match=r"Kd needs the base at every token; `ref_hidden` holds it at \d+ of 266"):
        loss_and_gradient(batch, Kd(), CachedBase(cache, EPSILON))
    assert cache.missing(rows(), NeededBy(Gift({"start": 9.0, "end": 5.0, "steps": 10}), V, EPSILON))
    before = {i: cache.row(r.input_ids, r.labels) for i, r in enumerate(rows())}
    passed = cache.fill(FrozenBase(small_model(1)), rows(), wide, pad_id=1)
    assert passed > 0 and not cache.missing(rows(), wide) and not cache.missing(rows(), narrow)
    for i, r in enumerate(rows()):
        now = cache.row(r.input_ids, r.labels)
        assert set(before[i].held.tolist()) <= set(now.held.tolist())
    assert not ReferenceCache(cache.folder).missing(rows(), wide), "and so it stands on the disk"
    cache, other = filled(tmp_path / "other", narrow), NeededBy(GiftSequence(0.5), V, EPSILON)
    assert cache.fill(FrozenBase(small_model(1)), rows(), other, pad_id=1) > 0  # needs other tokens: what is held stays
    assert not cache.missing(rows(), other) and not cache.missing(rows(), narrow)


def test_beta_of_each_token_decides_what_is_needed(tmp_path: Path) -> None:
    V = small_model().config.vocab_size
    low, high = ([dataclasses.replace(r, columns={"b": [x] * len(r.input_ids)}) for r in rows()] for x in (1.0, 30.0))
    goal = NeededBy(Gift({"column": "b"}), V, EPSILON)
    cache = filled(tmp_path, nothing)
    assert cache.missing(low, goal) and not cache.missing(high, goal)


def test_a_shard_that_is_lost_or_broken_is_filled_again(tmp_path: Path, monkeypatch) -> None:
    """Whatever a user, a kill or a power cut has done to the folder."""
    monkeypatch.setattr("heatbath.cache.SHARD_TOKENS", 40)
    cache = filled(tmp_path)
    shards = sorted(cache.folder.glob("shard-*"))
    assert len(shards) > 4
    shutil.rmtree(shards[0])
    (shards[1] / "logp.npy").write_bytes(b"cut off")
    (shards[2] / "hidden.npy").unlink()
    left = cache.folder / ".shard-000099-killed"
    left.mkdir()
    again = ReferenceCache(cache.folder)
    assert again.missing(rows(), everything)
    assert again.fill(FrozenBase(small_model(1)), rows(), everything, pad_id=1) < len(rows())
    assert not again.missing(rows(), everything) and not left.exists()
    assert not ReferenceCache(cache.folder).missing(rows(), everything)


def test_more_shards_than_a_process_may_open_are_neither_lost_nor_thrown_away(tmp_path: Path, monkeypatch) -> None:
    resource = pytest.importorskip("resource")
    monkeypatch.setattr("heatbath.cache.SHARD_TOKENS", 1)  # a shard for each row
    cache = filled(tmp_path)
    for number in range(30):
        for shard in list(cache.folder.glob("shard-0000*")):
            shutil.copytree(shard, cache.folder / f"shard-{1000 * (number + 1) + int(shard.name[6:]):06d}")
    shards = len(list(cache.folder.glob("shard-*")))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, hard), hard))
    try:
        again = ReferenceCache(cache.folder)
        assert again.fill(FrozenBase(small_model(1)), rows(), everything, pad_id=1) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(list(cache.folder.glob("shard-*"))) == shards > 512 // 3


def test_rows_alike_but_for_their_columns_are_passed_over_once_for_all_their_needs(tmp_path: Path) -> None:
    model, row = small_model(1), rows()[0]
    twins = [dataclasses.replace(row, columns={"b": [x] * len(row.input_ids)}) for x in (0.0, 50.0)]
    needed = NeededBy(Gift({"column": "b"}), model.config.vocab_size, EPSILON)
    cache = ReferenceCache.of(model, tmp_path)
    assert cache.fill(FrozenBase(model), twins, needed, pad_id=1) == 1
    assert not cache.missing(twins, needed)


def test_what_trainers_change_in_a_configuration_is_no_other_model(tmp_path: Path) -> None:
    model = small_model(1)
    before = weights_hash(model)
    model.config.use_cache, model.config.pad_token_id = False, 7
    assert weights_hash(model) == before


def test_only_the_two_gifts_may_train_from_the_surprise_cache() -> None:
    with pytest.raises(RunError, match="Kd is not the base lifted at one token"):
        NeededBy(Kd(), 100)


FILL = """
import sys, time, torch
sys.path[:0] = sys.argv[2:4]
from conftest import small_model
import heatbath.cache as cache_module
from heatbath.cache import ReferenceCache, everything
from heatbath.reference import FrozenBase
from test_cache import rows
from pathlib import Path
cache_module.SHARD_TOKENS = 40  # one or two rows a shard
model = small_model(1)
def said(done):
    print(done, flush=True)
    if sys.argv[4] == "slow":
        time.sleep(0.3)
cache = ReferenceCache.of(model, Path(sys.argv[1]))
print(cache.fill(FrozenBase(model), rows(), everything, pad_id=1, said=said), "passed")
"""


def fill_in_a_process(root: Path, pace: str) -> subprocess.Popen:
    here = Path(__file__).parent
    command = [sys.executable, "-c", FILL, str(root), str(here), str(here), pace]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.thorough
def test_a_fill_killed_in_the_middle_goes_on_where_it_was(tmp_path: Path) -> None:
    process = fill_in_a_process(tmp_path / "killed", "slow")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.stdout.readline().strip() != "7":
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    again = fill_in_a_process(tmp_path / "killed", "fast")
    passed = int(again.communicate()[0].split()[-2])
    assert 0 < passed < len(rows()), "what was written before the kill is not passed over again"
    model = small_model(1)
    cache, whole = ReferenceCache.of(model, tmp_path / "killed"), filled(tmp_path / "whole")
    for row in rows():
        found, expected = cache.row(row.input_ids, row.labels), whole.row(row.input_ids, row.labels)
        torch.testing.assert_close(found.logp, expected.logp)
        torch.testing.assert_close(found.hidden, expected.hidden, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.held, expected.held)


def test_the_cache_tells_above_which_surprise_it_holds_hidden_states(tmp_path: Path) -> None:
    V = small_model().config.vocab_size
    cache = filled(tmp_path, NeededBy(Gift(8.0), V, EPSILON))
    (about,) = [json.loads(p.read_text()) for p in cache.folder.glob("shard-*/about.json")]
    stats = torch.cat([cache.logp(r) for r in rows()])
    held = torch.cat([cache._held(r)[1] for r in rows()])
    assert (-stats[~held]).max().item() == pytest.approx(about["holds_hidden_above_nats"])
    assert (-stats[held]).min().item() > about["holds_hidden_above_nats"]
    assert about["hidden"] == int(held.sum()) and about["tokens"] == len(stats)
