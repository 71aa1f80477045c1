"""Sampling with transformers, against a literal sampler: one sequence at a time, no cache, no padding, no batch."""

import random
from itertools import chain

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    Lfm2Config,
    Lfm2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from conftest import small_model, small_tokenizer
from heatbath.engines import local
from heatbath.engines.local import LocalSampler, choose
from heatbath.engines.sampling import Completion, Sampling
from heatbath.errors import RunError

EOS = 1
SETTINGS = [Sampling(0, 1.0, 24), Sampling(1.0, 1.0, 24), Sampling(1.5, 0.9, 24)]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(5, 101) for _ in range(draw.randrange(2, 15))] for _ in range(count)]


def literal(model: PreTrainedModel, prompt: list[int], settings: Sampling, seed: int, eos: tuple = (EOS,)) -> list[int]:
    """A completion token by token, each from the logits of the whole sequence so far, in float64."""
    uniform, ids = np.random.default_rng(seed), []
    while len(ids) < settings.max_new_tokens and not (ids and ids[-1] in eos):
        with torch.no_grad():
            z = model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].double().numpy()
        u = uniform.random()
        if settings.temperature == 0:
            ids.append(int(z.argmax()))
            continue
        p = np.exp((z - z.max()) / settings.temperature)
        p /= p.sum()
        order = range(len(p)) if settings.top_p == 1 else nucleus(p, settings.top_p)
        total, heap = sum(p[i] for i in order), 0.0
        for token in order:
            heap += p[token]
            if heap > u * total:
                break
        ids.append(int(token))
    return ids


def nucleus(p: np.ndarray, top_p: float) -> list[int]:
    """The most likely tokens, in order, until they hold top_p of the mass."""
    chosen: list[int] = []
    for token in sorted(range(len(p)), key=lambda i: -p[i]):
        chosen.append(token)
        if sum(p[i] for i in chosen) >= top_p:
            break
    return chosen


def sampled(
    model: PreTrainedModel, asked: list[list[int]], settings: Sampling, seeds, batch=None, pad=None
) -> list[Completion]:
    tokenizer = small_tokenizer()
    tokenizer.pad_token = pad or tokenizer.pad_token
    sampler = LocalSampler(model, tokenizer, batch=batch)
    found = [c for group in sampler.sample(asked, settings, seeds) for c in group]
    assert sorted(c.prompt for c in found) == list(range(len(asked)))
    return sorted(found, key=lambda c: c.prompt)


def forward_shapes(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of every forward pass from now on, its rows and its tokens."""
    shapes, forward = [], model.forward

    def counted(*args, **kwargs):
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", counted)
    return shapes


# --- which token ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [1.0, 0.8, 0.05])
def test_tokens_are_chosen_as_often_as_the_policy_says(temperature: float, top_p: float) -> None:
    """Over an even grid of u the counts are the probabilities, to within one of the grid."""
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 2
    p = (logits.double() / temperature).softmax(-1).numpy()
    kept = range(40) if top_p == 1 else nucleus(p, top_p)
    expected = np.zeros(40)
    expected[list(kept)] = p[list(kept)] / p[list(kept)].sum()
    N = 20_000
    u = (torch.arange(N, dtype=torch.float64) + 0.5) / N
    counts = np.bincount(choose(logits.expand(N, -1), Sampling(temperature, top_p, 1), u), minlength=40)
    assert np.abs(counts - N * expected).max() <= 1.01
    assert set(np.flatnonzero(counts)) <= set(kept)


def test_the_nucleus_is_the_smallest_set_that_holds_top_p() -> None:
    logits = torch.log(torch.tensor([[0.125, 0.5, 0.125, 0.25]]))
    u = torch.tensor([1 - 2**-53], dtype=torch.float64)  # the last token that there is
    last = {top_p: int(choose(logits, Sampling(1.0, top_p, 1), u)) for top_p in (0.4, 0.5, 0.51, 0.75, 0.8, 0.9)}
    assert last == {0.4: 1, 0.5: 1, 0.51: 3, 0.75: 3, 0.8: 0, 0.9: 2}  # of equals, the first comes first


def test_the_ends_of_the_range_are_tokens_with_mass() -> None:
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]])
    for top_p in (1.0, 0.999):
        ends = [
            int(choose(logits, Sampling(1.0, top_p, 1), torch.tensor([u], dtype=torch.float64)))
            for u in (0.0, 1 - 2**-53)
        ]
        assert sorted(ends) == [1, 3]


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45])
def test_a_temperature_near_0_is_greedy_without_overflow(temperature: float) -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * 100
    u = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(choose(logits, Sampling(temperature, 1.0, 1), u), logits.argmax(-1))
    assert torch.equal(choose(logits, Sampling(0, 0.3, 1), u), logits.argmax(-1))


def test_first_tokens_follow_softmax_of_the_logits_over_t() -> None:
    model, prompt = small_model(), [10, 20, 30]
    N = 4000
    first = [c.ids[0] for c in sampled(model, [prompt] * N, Sampling(1.3, 1.0, 1), 100)]
    with torch.no_grad():
        p = (model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / 1.3).softmax(-1).numpy()
    common = N * p >= 5
    counts = np.bincount(first, minlength=len(p))
    expected = [*(N * p[common]), N * p[~common].sum()]
    assert stats.chisquare([*counts[common], counts[~common].sum()], expected).pvalue > 1e-3


def test_second_tokens_follow_the_policy_given_the_first() -> None:
    """χ² over pairs: successive draws of a row are independent of each other."""
    model, prompt = small_model(), [10, 20, 30]
    N = 6000
    pairs = [tuple(c.ids) for c in sampled(model, [prompt] * N, Sampling(0.5, 1.0, 2), 0)]
    with torch.no_grad():
        z = model(input_ids=torch.tensor([[*prompt, t] for t in range(101)])).logits[:, -2:].double() / 0.5
    first, second = z[0, 0].softmax(-1), z[:, 1].softmax(-1)
    p = (first[:, None] * second).numpy()
    p[EOS] = 0
    p[EOS, 0] = first[EOS]  # ends there
    counts = np.zeros_like(p)
    for pair in pairs:
        counts[pair if len(pair) == 2 else (EOS, 0)] += 1
    common = N * p >= 5
    expected = [*(N * p[common]), N * p[~common].sum()]
    assert common.sum() > 50
    assert stats.chisquare([*counts[common], counts[~common].sum()], expected).pvalue > 1e-3


# --- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "T=1", "top-p"])
@pytest.mark.parametrize("batch", [1, 5, None])
def test_every_completion_is_that_of_its_prompt_alone(settings: Sampling, batch: int | None) -> None:
    model, asked, ends = small_model(), prompts(16), (EOS, 22, 33, 44)
    model.generation_config.eos_token_id = list(ends)
    seeds = [1000 + 7 * i for i in range(16)]
    found = sampled(model, asked, settings, seeds, batch)
    assert [c.ids for c in found] == [literal(model, p, settings, s, ends) for p, s in zip(asked, seeds, strict=True)]
    assert {c.finish for c in found} == {"eos", "length"}
    for c in found:
        assert (c.finish == "eos") == (c.ids[-1] in ends)
        assert not set(ends) & set(c.ids[:-1]) and len(c.ids) <= 24
        assert c.finish == "eos" or len(c.ids) == 24


def test_what_else_is_asked_changes_nothing() -> None:
    model, asked, settings = small_model(), prompts(12), Sampling(1.0, 1.0, 20)
    whole = sampled(model, asked, settings, list(range(12)))
    some = [11, 3, 4]
    part = sampled(model, [asked[i] for i in some], settings, some)
    assert [c.ids for c in part] == [whole[i].ids for i in some]


def test_samples_of_one_prompt_differ_by_seed_alone() -> None:
    model, prompt = small_model(), [10, 20, 30]
    found = sampled(model, [prompt] * 6, Sampling(1.0, 1.0, 20), [4, 5, 4, 6, 5, 4])
    assert found[0].ids == found[2].ids == found[5].ids and found[1].ids == found[4].ids
    assert len({tuple(c.ids) for c in found}) == 3


SHAPE = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
OTHERS = {
    "sliding window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=6)),
    "alternating, soft-capped": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, sliding_window=6)),
    "convolutions": lambda: Lfm2ForCausalLM(Lfm2Config(**SHAPE, layer_types=["conv", "full_attention", "conv"])),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_and_their_caches(kind: str) -> None:
    torch.manual_seed(0)
    model = OTHERS[kind]().eval()
    asked = [p for p in prompts(8, seed=3) for _ in range(2)]  # twice each: the prompt's cache is shared
    settings, ends = Sampling(1.5, 1.0, 20), (EOS, 2, 3)
    model.generation_config.eos_token_id = list(ends)
    found = sampled(model, asked, settings, 0, batch=16)
    assert [c.ids for c in found] == [literal(model, p, settings, i, ends) for i, p in enumerate(asked)]
    assert {c.finish for c in found} == {"eos", "length"}


def test_each_of_several_end_tokens_ends() -> None:
    model, asked, settings = small_model(), prompts(20), Sampling(1.5, 1.0, 12)
    model.generation_config.eos_token_id = [EOS, 40, 41, 42, 43]
    found = sampled(model, asked, settings, 0)
    ends = (EOS, 40, 41, 42, 43)
    assert [c.ids for c in found] == [literal(model, p, settings, i, ends) for i, p in enumerate(asked)]
    assert len({c.ids[-1] for c in found if c.finish == "eos"} & set(ends)) > 1


def test_an_end_at_the_last_place_is_an_end() -> None:
    model, settings = small_model(), Sampling(1.0, 1.0, 24)
    ended = next(c for c in sampled(model, prompts(16), settings, 0) if c.finish == "eos" and len(c.ids) > 2)
    asked, seed = prompts(16)[ended.prompt], ended.prompt
    (exact,) = sampled(model, [asked], Sampling(1.0, 1.0, len(ended.ids)), [seed])
    (short,) = sampled(model, [asked], Sampling(1.0, 1.0, len(ended.ids) - 1), [seed])
    assert (exact.ids, exact.finish) == (ended.ids, "eos")
    assert (short.ids, short.finish) == (ended.ids[:-1], "length")


def test_a_model_without_an_end_token_goes_on_to_the_limit() -> None:
    model, asked, tokenizer = small_model(), prompts(16), small_tokenizer()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    tokenizer.eos_token = None
    sampler = LocalSampler(model, tokenizer)
    assert sampler.eos_ids == []
    (group,) = sampler.sample(asked, Sampling(1.5, 1.0, 40), 0)
    assert {(len(c.ids), c.finish) for c in group} == {(40, "length")}
    assert any(EOS in c.ids[:-1] for c in group)


def test_prompts_of_a_single_token() -> None:
    model, settings = small_model(), Sampling(1.0, 1.0, 12)
    for asked in ([[5]] * 3, [[5], [5], [6, 7, 8], [6, 7, 8]]):
        found = sampled(model, asked, settings, 0)
        assert [c.ids for c in found] == [literal(model, p, settings, i) for i, p in enumerate(asked)]


def test_nothing_is_asked_of_no_prompts() -> None:
    assert sampled(small_model(), [], Sampling(1.0, 1.0, 4), 0) == []


# --- no wasted work -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "T=1", "top-p"])
@pytest.mark.parametrize("pad", ["<unk>", "<|end|>"])  # an end token or not
def test_dropping_rows_that_ended_changes_nothing_and_saves_work(
    settings: Sampling, pad: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = small_model(), prompts(64)
    model.generation_config.eos_token_id = [EOS, *range(5, 9)]
    shapes = forward_shapes(model, monkeypatch)
    dropped = sampled(model, asked, settings, 0, batch=64, pad=pad)
    work = sum(rows for rows, tokens in shapes if tokens == 1)
    shapes.clear()
    monkeypatch.setattr(local, "DROPPED", 1.0)
    kept = sampled(model, asked, settings, 0, batch=64, pad=pad)
    assert [c.ids for c in dropped] == [c.ids for c in kept]
    assert work < sum(rows for rows, tokens in shapes if tokens == 1)
    needed = sum(len(c.ids) for c in kept) - 64  # the first token comes from the pass over the prompts
    steps = max(len(c.ids) for c in kept)
    assert needed <= work <= needed + steps * 64 / 8  # rows that wait are at most an eighth


def test_a_prompt_that_is_there_often_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = small_model(), Sampling(1.0, 1.0, 3)
    asked = [p for p in prompts(3) for _ in range(4)]
    shapes = forward_shapes(model, monkeypatch)
    sampled(model, asked, settings, 0, batch=12)
    width = max(map(len, asked))
    assert (3, width - 1) in shapes and max(rows * tokens for rows, tokens in shapes) <= 3 * width
    shapes.clear()
    sampled(model, prompts(4), settings, 0, batch=4)  # each once: nothing to share
    assert (4, max(map(len, prompts(4)))) in shapes


def test_longest_prompts_come_first_with_those_of_their_length() -> None:
    model, asked = small_model(), prompts(20)
    sampler = LocalSampler(model, small_tokenizer(), batch=4)
    lengths = [[len(asked[c.prompt]) for c in group] for group in sampler.sample(asked, Sampling(1.0, 1.0, 2), 0)]
    assert list(chain(*lengths)) == sorted(map(len, asked), reverse=True)
    assert [len(group) for group in lengths] == [4] * 5


# --- memory ---------------------------------------------------------------------------------------------------------


def cuda_trouble() -> BaseException:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")


def cpu_trouble() -> BaseException:
    return RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.mark.parametrize("trouble", [cuda_trouble, cpu_trouble, MemoryError])
def test_a_batch_that_does_not_fit_is_halved_and_drawn_the_same(trouble, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked, settings = small_model(), prompts(13), Sampling(1.0, 1.0, 12)
    expected = [c.ids for c in sampled(model, asked, settings, 0)]
    tried, draw = [], LocalSampler._draw

    def small_machine(self, some, *rest):
        tried.append(len(some))
        if len(some) > 3:
            raise trouble()
        return draw(self, some, *rest)

    monkeypatch.setattr(LocalSampler, "_draw", small_machine)
    sampler = LocalSampler(model, small_tokenizer(), batch=10)
    groups = list(sampler.sample(asked, settings, 0))
    assert [c.ids for c in sorted(chain(*groups), key=lambda c: c.prompt)] == expected
    assert tried == [10, 5, 2, 2, 2, 2, 2, 2, 1]  # what fits is not tried anew for every batch
    assert [len(group) for group in groups] == [2] * 6 + [1]


def test_memory_that_ends_halfway_through_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real path: the pass itself fails after some tokens were drawn."""
    model, asked, settings = small_model(), prompts(8), Sampling(1.0, 1.0, 12)
    expected = [c.ids for c in sampled(model, asked, settings, 0)]
    forward, steps = model.forward, []

    def failing(*args, **kwargs):
        steps.append(kwargs["input_ids"].shape)
        if len(steps) == 6:
            raise cuda_trouble()
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", failing)
    own = model.generation_config
    assert [c.ids for c in sampled(model, asked, settings, 0)] == expected
    assert model.generation_config is own


def test_one_completion_that_does_not_fit_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [[5] * 12, [6] * 3, [7] * 3]
    draw = LocalSampler._draw

    def tiny_machine(self, some, *rest):
        if max(map(len, some)) > 3:
            raise cuda_trouble()
        return draw(self, some, *rest)

    monkeypatch.setattr(LocalSampler, "_draw", tiny_machine)
    with pytest.raises(RunError) as caught:
        sampled(small_model(), asked, Sampling(1.0, 1.0, 99), 0)
    assert "12 tokens of prompt and up to 99 new" in caught.value.what and "bf16" in caught.value.remedy


def test_another_failure_is_not_taken_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self, *_):
        raise RuntimeError("The size of tensor a (3) must match")

    monkeypatch.setattr(LocalSampler, "_draw", broken)
    with pytest.raises(RuntimeError, match="must match"):
        sampled(small_model(), prompts(4), Sampling(1.0, 1.0, 4), 0)


def test_the_cache_is_measured() -> None:
    model = small_model()
    c = model.config
    per_token, droppable = local._cache_of(model)
    assert per_token == 2 * c.num_hidden_layers * c.num_key_value_heads * (c.hidden_size // c.num_attention_heads) * 4
    assert droppable
    model.config.use_cache = False  # as training leaves it
    assert local._cache_of(model) == (per_token, True)
    assert local._cache_of(model.to(torch.bfloat16))[0] == per_token / 2


def test_the_automatic_batch_fits_and_is_the_largest_power_of_two_that_does(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    per_token, _ = local._cache_of(model)
    sizes = []
    for free in [0, 1e4, 1e5, 1e6, 3e6, 1e7, 1e8, 1e12]:
        monkeypatch.setattr(local, "_free_memory", lambda device, free=free: free)
        for width, new in [(1, 1), (100, 50), (50, 4000)]:
            size = local.fitting(model, width, new, per_token)
            held = (width + new) * per_token  # of a row, at the least
            assert size == 1 or size * held <= free
            assert size & (size - 1) == 0 and 1 <= size <= local.MOST
            # a row takes no more than this, so that twice the batch would not have fitted
            row = held + width * 20 * 32 * 4 + 64 * 101
            assert size == local.MOST or 2 * size * row > free
            sizes.append(size)
    assert len(set(sizes)) > 4 and max(sizes) == local.MOST and min(sizes) == 1
    monkeypatch.setattr(local, "_free_memory", lambda device: 1e12)
    monkeypatch.setattr(local, "LARGE", 100)
    assert local.fitting(model, 5, 5, per_token) == local.MOST_OF_LARGE


def test_the_automatic_batch_shrinks_with_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    asked = [[5] * 60] * 8 + [[6] * 4] * 32
    free = 8 * ((60 + 2) * local._cache_of(model)[0] + 60 * 20 * 32 * 4)
    monkeypatch.setattr(local, "_free_memory", lambda device: free)
    sampler = LocalSampler(model, small_tokenizer())
    groups = [len(group) for group in sampler.sample(asked, Sampling(1.0, 1.0, 2), 0)]
    assert groups[0] == 8 and max(groups) == 32


def test_free_memory_is_a_share_of_what_the_machine_has() -> None:
    free = local._free_memory(torch.device("cpu"))
    assert 0 < free <= local._available() / 2


# --- manners --------------------------------------------------------------------------------------------------------


def test_the_models_own_settings_are_set_aside_and_kept() -> None:
    model, asked, settings = small_model(), prompts(6), Sampling(1.0, 1.0, 12)
    expected = [c.ids for c in sampled(model, asked, settings, 0)]
    own = GenerationConfig(
        eos_token_id=EOS, do_sample=True, top_k=1, repetition_penalty=3.0, temperature=0.1, suppress_tokens=[20, 21]
    )
    model.generation_config = own
    before = own.to_dict()
    assert [c.ids for c in sampled(model, asked, settings, 0)] == expected
    assert model.generation_config is own and own.to_dict() == before


def test_a_suspended_draw_leaves_the_model_and_every_random_stream_as_they_were() -> None:
    model = small_model()
    own = model.generation_config
    torch.manual_seed(5)
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    groups = LocalSampler(model, small_tokenizer(), batch=2).sample(prompts(6), Sampling(1.0, 1.0, 4), 0)
    next(groups)
    assert model.generation_config is own
    assert torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1] == numbers).all()
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "T=1", "top-p"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_give_no_finite_logits_are_an_error(settings: Sampling, value: float) -> None:
    model = small_model()
    with torch.no_grad():
        model.lm_head.weight[7] = value
    with pytest.raises(RunError, match="not finite"):
        sampled(model, prompts(4), settings, 0)


@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "T=1", "top-p"])
def test_logits_that_are_not_finite_once_are_an_error(settings: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    forward, steps = model.forward, []

    def overflowing(*args, **kwargs):
        out = forward(*args, **kwargs)
        steps.append(out)
        if len(steps) == 4:
            out.logits[1, -1, 7] = torch.nan
        return out

    monkeypatch.setattr(model, "forward", overflowing)
    with pytest.raises(RunError, match="not finite"):
        sampled(model, prompts(4), settings, 0)


def test_a_vocabulary_padded_with_forbidden_tokens_is_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    model, forward = small_model(), small_model().forward

    def forbidding(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits[..., 90:] = -torch.inf
        return out

    monkeypatch.setattr(model, "forward", forbidding)
    found = sampled(model, prompts(8), Sampling(2.0, 1.0, 12), 0)
    assert max(max(c.ids) for c in found) < 90
