"""What the engines share: settings that are refused, seeds, end tokens, and which engine is opened."""

from pathlib import Path

import pytest
from transformers import GenerationConfig

from conftest import small_model, small_tokenizer
from heatbath.engines.api import ApiSampler
from heatbath.engines.local import LocalSampler
from heatbath.engines.sampling import Completion, Sampling, eos_ids_of, open_sampler, seed_of, seeds_of
from heatbath.errors import RecipeError


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ((-0.1, 1.0, 4), "temperature"),
        ((float("nan"), 1.0, 4), "temperature"),
        ((float("inf"), 1.0, 4), "temperature"),
        ((1.0, 0.0, 4), "top_p"),
        ((1.0, 1.01, 4), "top_p"),
        ((1.0, 1.0, 0), "max_new_tokens"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: tuple, word: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Sampling(*settings)
    assert caught.value.where == word


def test_a_completion_is_finished_where_something_other_than_a_limit_ended_it() -> None:
    finished = {finish: Completion(0, [1], finish).finished for finish in ("eos", "stop", "length", "content_filter")}
    assert finished == {"eos": True, "stop": True, "length": False, "content_filter": False}
    assert not Completion(0, [1], "eos").retokenised and Completion(0, [], "stop", "").retokenised


def test_each_sample_has_a_seed_of_its_own() -> None:
    seeds = {seed_of(run, task, problem, n) for run in (0, 1) for task in "ab" for problem in "xyz" for n in range(50)}
    assert len(seeds) == 2 * 2 * 3 * 50
    assert all(0 <= seed < 2**31 for seed in seeds)
    many = [seed_of(0, "task", "p", n) for n in range(5000)]
    assert len(set(many)) == 5000  # of one problem none twice, whatever the hash
    assert seed_of(0, "a", "bc", 0) != seed_of(0, "ab", "c", 0)
    assert seed_of(7, "gsm8k", "3", 2) == 108384690  # as it was when a run was begun


def test_seeds_are_given_or_counted() -> None:
    assert seeds_of(5, 3) == [5, 6, 7]
    assert seeds_of([9, 9, 1], 3) == [9, 9, 1]
    with pytest.raises(ValueError, match="2 seeds for 3 prompts"):
        seeds_of([1, 2], 3)


def test_end_tokens_are_those_of_the_tokenizer_and_of_the_model(tmp_path: Path) -> None:
    tokenizer, model = small_tokenizer(), small_model()
    model.generation_config = GenerationConfig(eos_token_id=[7, 3])
    assert eos_ids_of(model, tokenizer) == [1, 3, 7]
    model.save_pretrained(tmp_path / "listed")
    assert eos_ids_of(str(tmp_path / "listed"), tokenizer) == [1, 3, 7]
    (tmp_path / "listed" / "generation_config.json").unlink()
    assert eos_ids_of(str(tmp_path / "listed"), tokenizer) == [1]
    model.generation_config = GenerationConfig(eos_token_id=2)
    assert eos_ids_of(model, tokenizer) == [1, 2]


def test_the_engine_that_is_asked_for_is_opened(small_base: Path) -> None:
    tokenizer, model = small_tokenizer(), small_model()
    with open_sampler("transformers", str(small_base), tokenizer, precision="fp32", batch=3) as sampler:
        assert isinstance(sampler, LocalSampler) and sampler.batch == 3
        assert sampler.model.dtype.itemsize == 4
    assert not hasattr(sampler, "model")  # closed: its memory may be used
    with open_sampler("transformers", model, tokenizer) as sampler:
        assert isinstance(sampler, LocalSampler) and sampler.model is model
    api = open_sampler("api", str(small_base), tokenizer, batch=5, endpoint="http://localhost:1/v1", served="m")
    assert isinstance(api, ApiSampler)
    api.close()


@pytest.mark.parametrize(
    ("given", "where"),
    [
        ({"engine": "sglang"}, "eval.engine"),
        ({"engine": "api", "served": "m"}, "eval.endpoint"),
        ({"engine": "api", "endpoint": "http://localhost:1/v1"}, "eval.served"),
        ({"engine": "vllm"}, "eval.engine"),  # not installed
    ],
)
def test_an_engine_that_cannot_be_had_is_named(small_base: Path, given: dict, where: str) -> None:
    with pytest.raises(RecipeError) as caught:
        open_sampler(model=str(small_base), tokenizer=small_tokenizer(), **given)
    assert caught.value.where == where


def test_only_transformers_takes_over_a_loaded_model() -> None:
    for engine in ("vllm", "api"):
        with pytest.raises(RecipeError, match="loaded model"):
            open_sampler(engine, small_model(), small_tokenizer(), endpoint="http://localhost:1/v1", served="m")
