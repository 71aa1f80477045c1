"""Where the model's context ends: completions cut there, prompts that leave no room."""

import random

import pytest
import torch
from test_local import EOS, literal, sampled
from transformers import BloomConfig, GPT2Config, GPT2LMHeadModel

from conftest import small_model, small_tokenizer
from heatbath import models
from heatbath.engines import local
from heatbath.engines.local import LocalSampler
from heatbath.engines.sampling import LeftOutError, Sampling


@pytest.mark.parametrize("droppable", [True, False])
def test_a_completion_ends_where_the_context_does(droppable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GPT2Config(vocab_size=101, n_positions=24, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()  # learned positions: there is none beyond the last
    model.generation_config.eos_token_id = ends = [EOS, 5]
    measured = local._cache_of
    monkeypatch.setattr(local, "_cache_of", lambda model: (measured(model)[0], droppable))
    draw = random.Random(0)
    asked = [[draw.randrange(9, 101) for _ in range(n)] for n in (23, 20, 22, 3, 20, 9, 23, 12)]
    for batch in (None, 3):
        found = sampled(model, asked, Sampling(1.0, 1.0, 14), 0, batch=batch)
        for i, prompt in enumerate(asked):
            limited = Sampling(1.0, 1.0, min(14, 24 - len(prompt)))
            assert found[i].ids == literal(model, prompt, limited, i, tuple(ends))
    assert {(len(c.ids), c.finish) for c in found} >= {(1, "length"), (4, "length"), (14, "length")}


def test_prompts_beyond_the_context_are_told_after_all_others() -> None:
    model, found = small_model(), []
    model.config.max_position_embeddings = 12
    asked = [[5] * 12, [6] * 3, [7] * 11, [8] * 40]
    with pytest.raises(LeftOutError, match=r"2 of 4 prompts do not fit .* of 12 tokens .the longest has 40"):
        for group in LocalSampler(model, small_tokenizer()).sample(asked, Sampling(1.0, 1.0, 5), 0):
            found += group
    assert sorted(c.prompt for c in found) == [1, 2]


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "default"}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "linear", "factor": 2.0}, 512),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 128}, 256),
    ],
    ids=str,
)
def test_the_context_is_that_of_the_configuration(rope: dict, context: int) -> None:
    config = small_model().config
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    assert models.context_of(config) == context
    assert models.context_of(BloomConfig()) is None  # which counts no positions
