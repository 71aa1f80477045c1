"""The shift between two models against plain loops through the models themselves, and its invariances."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import small_model
from heatbath.data.rendering import IGNORE, Rendered
from heatbath.errors import RecipeError, RunError
from heatbath.ideas.intervals import mean_with_interval
from heatbath.progress import Progress
from heatbath.stages import shift, shift_summary
from heatbath.stages.shift_rows import Sequences
from heatbath.stages.shift_settings import Settings
from heatbath.states import LastStates, final_norm

QUIET = Progress(quiet=True)
KS = (1, 3, 10)


def moved(seed: int, by: float = 0.05, *, tied: bool = True) -> LlamaForCausalLM:
    """The small model with noise on every weight."""
    model = small_model(tied=tied)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += by * torch.randn(weight.shape, generator=draw)
    return model


def sequences(lengths: tuple[int, ...] = (9, 5, 14, 6), *, skip: int = 1) -> Sequences:
    """Random tokens, of which the first three are the prompt (with `skip` the first so many are not compared)."""
    draw = torch.Generator().manual_seed(7)
    rows = []
    for n in lengths:
        ids = torch.randint(5, 100, (n,), generator=draw).tolist()
        rows.append(Rendered(ids, [IGNORE] * skip + ids[skip:], truncated=False))
    return Sequences(rows, ["a", "b", "a", "c"][: len(rows)], "here", 100)


def measured(a: Any, b: Any, on: Sequences, settings: Settings | None = None, **more: Any) -> dict[str, Any]:
    settings = settings or Settings(topk=KS)
    return shift.measured_pair(LastStates(a), LastStates(b), on, settings, pad_id=1, **more)


def plain(a: LlamaForCausalLM, b: LlamaForCausalLM, row: Rendered, temperature: float) -> dict[str, list[float]]:
    """Every metric of each compared token of a row, read off the models themselves, one row at a time, unpadded."""
    ids = torch.tensor(row.input_ids)[None]
    states: dict[str, list[torch.Tensor]] = {"before": [], "after": [], "logits": []}
    for model in (a, b):
        with torch.no_grad():
            states["after"].append(model(ids, output_hidden_states=True).hidden_states[-1][0].double())
            states["logits"].append(model(ids).logits[0].double())
            norm, model.model.norm = model.model.norm, nn.Identity()
            states["before"].append(model.model(ids).last_hidden_state[0].double())
            model.model.norm = norm
    out: dict[str, list[float]] = {}
    for t in (i - 1 for i, label in enumerate(row.labels) if label != IGNORE):
        p, q = ((z[t] / temperature).log_softmax(-1) for z in states["logits"])
        values = {
            "kl_from_to": p.exp() @ (p - q),
            "kl_to_from": q.exp() @ (q - p),
            "entropy_from": -p.exp() @ p,
            "entropy_to": -q.exp() @ q,
            "logp_from": p[row.labels[t + 1]],
            "logp_to": q[row.labels[t + 1]],
        }
        for k in KS:
            one, two = (set(z[t].topk(k).indices.tolist()) for z in states["logits"])
            values |= {f"overlap@{k}": len(one & two) / k, f"jaccard@{k}": len(one & two) / len(one | two)}
        for layer in ("before", "after"):
            x, y = (h[t] for h in states[layer])
            values |= {f"cosine_{layer}": x @ y / x.norm() / y.norm(), f"l2_{layer}": (x - y).norm()}
            for name, h in (("x", x), ("y", y)):
                out.setdefault(f"{name}_{layer}", []).append(h.numpy())  # type: ignore[arg-type]
        for name, value in values.items():
            out.setdefault(name, []).append(float(value))
    return out


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("skip", [1, 2, 3])
def test_every_number_equals_plain_loops_through_the_models(skip: int, temperature: float) -> None:
    a, b, on = small_model(), moved(1), sequences(skip=skip)
    settings = Settings(topk=KS, temperature=temperature)
    found = measured(a, b, on, settings)
    truth = [plain(a, b, row, temperature) for row in on.rows]
    table = {"problem": on.problems, "tokens": on.tokens}
    tokens = {
        name: np.concatenate([row[name] for row in truth]) for name in truth[0] if not name.startswith(("x_", "y_"))
    }
    for name, values in tokens.items():
        assert found["means"][name] == pytest.approx([np.mean(row[name]) for row in truth], rel=2e-5, abs=2e-5), name
        if name.startswith("l2"):
            share = np.sort(values)[::-1][: max(1, round(0.01 * len(values)))].sum() / values.sum()
            assert found["l2_top_share"][name[3:]] == pytest.approx(share, rel=1e-4)
    for mean in ("token", "sequence"):
        shown = shift_summary.transition(("base", "init"), found, table, dataclasses.replace(settings, mean=mean))
        assert (shown["from"], shown["to"]) == ("base", "init")
        flat = {f"{kind}@{k}": shown[kind][str(k)] for kind in ("overlap", "jaccard") for k in KS}
        flat |= {name: shown[name] for name in shift_summary.DISTRIBUTION}
        for layer in ("before", "after"):
            flat |= {f"{name}_{layer}": shown["geometry"][layer][mean][name] for name in ("cosine", "l2")}
        for name, number in flat.items():
            by_sequence = [np.mean(row[name]) for row in truth]
            wanted = tokens[name].mean() if mean == "token" else np.mean(by_sequence)
            assert number["mean"] == pytest.approx(wanted, rel=2e-5, abs=2e-5), name
            assert number["low"] <= number["mean"] <= number["high"]
        assert shown["cosine"] == shown["geometry"]["before"][mean]["cosine"]
        assert shown["l2"] == shown["geometry"]["before"][mean]["l2"]
    for layer in ("before", "after"):
        pairs = [(np.array(row[f"x_{layer}"]), np.array(row[f"y_{layer}"])) for row in truth]
        ways = {"pooled": lambda h: h.mean(0), "last": lambda h: h[-1], "flat": np.ravel}
        for pool, way in ways.items():
            cosines = [way(x) @ way(y) / np.linalg.norm(way(x)) / np.linalg.norm(way(y)) for x, y in pairs]
            lengths = [np.linalg.norm(way(x) - way(y)) for x, y in pairs]
            chosen = dataclasses.replace(settings, layer=layer, pool=pool)
            shown = shift_summary.transition(("base", "init"), found, table, chosen)
            assert shown["cosine"] == shown["geometry"][layer][pool]["cosine"]
            assert shown["cosine"]["mean"] == pytest.approx(np.mean(cosines), rel=2e-5)
            assert shown["l2"]["mean"] == pytest.approx(np.mean(lengths), rel=2e-5)
            assert shown["kl_from_to"]["mean"] == pytest.approx(tokens["kl_from_to"].mean(), rel=2e-5, abs=2e-5)


def test_intervals_are_over_problems_and_cut_where_the_metric_ends() -> None:
    found, on = measured(small_model(), moved(1), sequences()), sequences()
    table = {"problem": on.problems, "tokens": on.tokens}
    shown = shift_summary.transition(("base", "init"), found, table, Settings(topk=KS, mean="sequence"))
    x = np.array(found["means"]["l2_before"])
    values = [x.mean() + 3 / 4 * sum(x[i] - x.mean() for i in range(4) if on.problems[i] == p) for p in "abc"]
    wanted = mean_with_interval(values)
    assert shown["l2"]["mean"] == pytest.approx(wanted.mean) and shown["l2"]["high"] == pytest.approx(wanted.high)
    assert shown["overlap"]["1"]["low"] >= 0 and shown["overlap"]["1"]["high"] <= 1
    assert shown["cosine"]["high"] <= 1 and shown["kl_from_to"]["low"] >= 0 and shown["logp_to"]["high"] <= 0
    one = shift_summary.transition(("a", "b"), found, {"problem": ["p"] * 4, "tokens": on.tokens}, Settings(topk=KS))
    assert one["l2"]["low"] is None and one["l2"]["high"] is None


def test_padding_and_order_of_the_rows_change_nothing() -> None:
    a, b, on = small_model(), moved(1), sequences()
    whole = measured(a, b, on)
    single = measured(a, b, on, tokens=1)
    turned = dataclasses.replace(on, rows=on.rows[::-1], problems=on.problems[::-1])
    backwards = measured(a, b, turned, tokens=20)
    for name, column in whole["means"].items():
        assert single["means"][name] == pytest.approx(column, rel=1e-4, abs=2e-5), name
        assert backwards["means"][name][::-1] == pytest.approx(column, rel=1e-4, abs=2e-5), name
    assert whole["l2_top_share"] == pytest.approx(backwards["l2_top_share"], rel=1e-4)


def test_a_model_is_no_distance_from_itself() -> None:
    model, on = small_model(), sequences()
    table = {"problem": on.problems, "tokens": on.tokens}
    shown = shift_summary.transition(("base", "init"), measured(model, small_model(), on), table, Settings(topk=KS))
    for layer in ("before", "after"):
        for way in shown["geometry"][layer].values():
            assert way["cosine"]["mean"] == pytest.approx(1, abs=1e-6) and way["l2"]["mean"] == 0
    assert shown["kl_from_to"]["mean"] == shown["kl_to_from"]["mean"] == 0
    assert {number["mean"] for kind in ("overlap", "jaccard") for number in shown[kind].values()} == {1.0}


def test_said_and_token_budget() -> None:
    seen: list[int] = []
    measured(small_model(), moved(1), sequences(), tokens=20, said=seen.append)
    assert seen == sorted(seen) and seen[-1] == 4 and len(seen) > 1


def lora_of(model: LlamaForCausalLM) -> Any:
    config = LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)
    adapted = get_peft_model(model, config)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=draw))
    return adapted


def test_an_adapter_measures_as_its_merged_form() -> None:
    on = sequences()
    adapter = measured(small_model(), lora_of(small_model()).train(), on)  # whose dropout must be off
    merged = measured(small_model(), lora_of(small_model()).merge_and_unload(), on)
    for name, column in adapter["means"].items():
        assert merged["means"][name] == pytest.approx(column, rel=1e-3, abs=1e-5), name
    assert min(adapter["means"]["kl_from_to"]) > 1e-3


def test_final_norm_is_found_by_what_it_does() -> None:
    model = small_model()
    assert final_norm(model.model) is model.model.norm
    model.model.norm = nn.Identity()
    with pytest.raises(RunError, match="no final norm"):
        final_norm(model.model)


def test_models_that_cannot_be_compared() -> None:
    config = LlamaConfig(
        **(small_model().config.to_dict() | {"hidden_size": 16, "head_dim": 4, "num_attention_heads": 4})
    )
    with pytest.raises(RunError, match="width 32 and 16"):
        measured(small_model(), LlamaForCausalLM(config), sequences())
    with pytest.raises(RecipeError, match="of 101 tokens"):
        measured(small_model(), moved(1), sequences(), Settings(topk=(500,)))


@pytest.mark.parametrize(("dtype", "says"), [("float32", "broken"), ("float16", "dtype=float32")])
def test_states_that_are_not_finite_are_an_error(dtype: str, says: str) -> None:
    broken = small_model()
    broken.model.layers[0].mlp.down_proj.weight.data[:, 0] = torch.inf
    with pytest.raises(RunError, match=r"is nan of a sequence") as caught:
        measured(small_model(), broken, sequences(), Settings(topk=KS, dtype=dtype))
    assert caught.value.where == "problem a" and says in caught.value.remedy


def test_padded_rows_of_the_head_can_be_left_out() -> None:
    a, b, on = small_model(tied=False), moved(1, tied=False), sequences()
    wanted, rows = measured(a, b, on), a.get_output_embeddings().weight.shape[0]
    padded = [small_model(tied=False), moved(1, tied=False)]
    for model in padded:
        model.resize_token_embeddings(rows + 11, mean_resizing=False)
        model.get_output_embeddings().weight.data[rows:] = 3.0
    found = measured(*padded, on, vocab_size=rows)
    assert found["vocab_size"] == rows and found["means"] == wanted["means"]
    assert measured(*padded, on)["vocab_size"] == rows + 11
    assert measured(*padded, on)["means"]["kl_from_to"] != wanted["means"]["kl_from_to"]
    with pytest.raises(RunError, match="vocabulary=tokenizer"):
        measured(a, padded[1], on)
