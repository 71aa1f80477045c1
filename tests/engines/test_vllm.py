"""The vLLM engine against a stand-in with the signatures of vLLM 0.22 to 0.31, which samples with transformers."""

import gc
import sys
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import small_model, small_tokenizer
from heatbath.engines.local import LocalSampler
from heatbath.engines.sampling import Sampling, open_sampler
from heatbath.errors import RecipeError, RunError

ENGINE_ARGS = {"max_model_len", "generation_config"}  # of the fields that LLM takes as **kwargs, those in use


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True


class TokensPrompt(dict):
    def __init__(self, *, prompt_token_ids: list[int], prompt: str | None = None):
        super().__init__(prompt_token_ids=prompt_token_ids)


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Any
    cumulative_logprob: float | None
    logprobs: Any
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class LLM:
    made: ClassVar[list["LLM"]] = []

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        enforce_eager: bool = False,
        **kwargs: Any,
    ):
        assert set(kwargs) <= ENGINE_ARGS and kwargs["max_model_len"] in (None, -1)
        self.given = {"skip_tokenizer_init": skip_tokenizer_init, "dtype": dtype, **kwargs}
        self.policy = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.model_config = SimpleNamespace(max_model_len=self.policy.config.max_position_embeddings)
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.reasons: dict[int, str] = {}
        LLM.made.append(self)

    def generate(
        self,
        prompts: Any,
        sampling_params: Any = None,
        *,
        use_tqdm: bool = True,
        lora_request: Any = None,
        priority: list[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        assert len(prompts) == len(sampling_params) and not use_tqdm
        outputs = []
        for prompt, params in zip(prompts, sampling_params, strict=True):
            ids, most = prompt["prompt_token_ids"], self.model_config.max_model_len
            assert len(ids) < most and not params.detokenize
            self.asked.append((ids, params))
            new, reason, stop = list[int](), "length", None
            while len(new) < params.max_tokens and len(ids) + len(new) < most:
                with torch.no_grad():
                    new.append(int(self.policy(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
                if new[-1] in (params.stop_token_ids or []):
                    reason, stop = "stop", new[-1]
                    break
            reason = self.reasons.get(len(self.asked), reason)
            output = CompletionOutput(0, "", tuple(new), None, None, finish_reason=reason, stop_reason=stop)
            outputs.append(SimpleNamespace(outputs=[output], finished=True, prompt_token_ids=ids))
        return outputs


@dataclass
class Machine:
    freed: list[int] = field(default_factory=list)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine, LLM.made = Machine(), []
    module, distributed = ModuleType("vllm"), ModuleType("vllm.distributed")
    module.LLM, module.SamplingParams, module.TokensPrompt = LLM, SamplingParams, TokensPrompt
    distributed.cleanup_dist_env_and_memory = lambda shutdown_ray=False: machine.freed.append(1)
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    return machine


PROMPTS = [[10 + i, 20, 30 + i] for i in range(7)]
ENDS = [1, 7, 9, 26, 33]


@pytest.fixture
def ending_base(tmp_path: Path) -> str:
    """The small model with so many end tokens that greedy completions end."""
    model = small_model()
    model.generation_config.eos_token_id = ENDS
    model.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_its_completions_are_those_of_the_engine_token_by_token(vllm: Machine, ending_base: str) -> None:
    settings = Sampling(0, 1.0, 30)
    with open_sampler("vllm", ending_base, small_tokenizer(), precision="fp32", batch=3) as sampler:
        batches = list(sampler.sample(PROMPTS, settings, 5))
        (engine,) = LLM.made
        assert engine.given == {
            "skip_tokenizer_init": True,
            "dtype": "float32",
            "generation_config": "vllm",
            "max_model_len": -1,
        }
    assert [[c.prompt for c in batch] for batch in batches] == [[0, 1, 2], [3, 4, 5], [6]]
    found = [c for batch in batches for c in batch]
    local = LocalSampler(ending_base, small_tokenizer(), precision="fp32")
    expected = {c.prompt: c for batch in local.sample(PROMPTS, settings, 5) for c in batch}
    assert {c.prompt: c for c in found} == expected
    assert {c.finish for c in found} == {"eos", "length"}


def test_each_prompt_is_asked_with_its_own_seed_and_the_whole_policy(vllm: Machine, ending_base: str) -> None:
    with open_sampler("vllm", ending_base, small_tokenizer(), precision="fp32") as sampler:
        list(sampler.sample(PROMPTS, Sampling(0.7, 0.9, 3), [50, 51, 52, 3, 4, 5, 6]))
        asked = LLM.made[0].asked
    assert [ids for ids, _ in asked] == PROMPTS
    assert [params.seed for _, params in asked] == [50, 51, 52, 3, 4, 5, 6]
    for _, params in asked:
        assert (params.temperature, params.top_p, params.max_tokens, params.n) == (0.7, 0.9, 3, 1)
        assert params.stop_token_ids == ENDS and params.logprobs is None
        assert (params.top_k, params.min_p, params.repetition_penalty) == (0, 0.0, 1.0)


def test_what_is_not_asked_for_yet_is_not_sampled_yet(vllm: Machine, ending_base: str) -> None:
    with open_sampler("vllm", ending_base, small_tokenizer(), precision="fp32", batch=2) as sampler:
        batches = sampler.sample(PROMPTS, Sampling(0, 1.0, 3), 0)
        next(batches)
        assert len(LLM.made[0].asked) == 2  # a kill now loses nothing that was yielded, and nothing more


def test_the_dtype_is_that_of_the_other_engine(vllm: Machine, ending_base: str) -> None:
    open_sampler("vllm", ending_base, small_tokenizer(), precision="bf16").close()
    assert LLM.made[0].given["dtype"] == "bfloat16"


def test_memory_is_freed_once_and_the_engine_dropped_before(vllm: Machine, ending_base: str) -> None:
    sampler = open_sampler("vllm", ending_base, small_tokenizer(), precision="fp32")
    engine = weakref.ref(LLM.made.pop())
    alive: list[bool] = []
    sys.modules["vllm.distributed"].cleanup_dist_env_and_memory = lambda: alive.append(engine() is not None)
    with sampler:
        pass
    sampler.close()
    gc.collect()
    assert alive == [False]


@pytest.mark.parametrize("reason", ["abort", "error", "repetition", None])
def test_a_completion_that_ended_for_another_reason_is_an_error(vllm: Machine, ending_base: str, reason) -> None:
    with open_sampler("vllm", ending_base, small_tokenizer(), precision="fp32", batch=2) as sampler:
        LLM.made[0].reasons = {4: reason}
        batches = sampler.sample(PROMPTS, Sampling(0, 1.0, 3), 0)
        assert len(next(batches)) == 2
        with pytest.raises(RunError, match=f"ended a completion with '{reason}'"):
            next(batches)


@pytest.mark.parametrize("temperature", [0.005, 2.5])
def test_a_temperature_that_vllm_would_change_is_refused(vllm: Machine, ending_base: str, temperature: float) -> None:
    with open_sampler("vllm", ending_base, small_tokenizer(), precision="fp32") as sampler:
        with pytest.raises(RecipeError, match=f"temperature of {temperature}"):
            list(sampler.sample(PROMPTS, Sampling(temperature, 1.0, 3), 0))
        assert LLM.made[0].asked == []
        assert len(list(sampler.sample(PROMPTS, Sampling(0.01, 1.0, 1), 0))) == 1


def test_the_context_is_a_limit_for_prompts_and_an_end_of_completions(vllm: Machine, ending_base: str) -> None:
    with open_sampler("vllm", ending_base, small_tokenizer(), precision="fp32") as sampler:
        with pytest.raises(RecipeError, match=r"256 tokens, and vLLM's context ends at 256"):
            list(sampler.sample([[5] * 10, [5] * 256], Sampling(0, 1.0, 3), 0))
        assert LLM.made[0].asked == []
        LLM.made[0].reasons = {1: "length"}
        ((cut,),) = sampler.sample([[5] * 254], Sampling(0, 1.0, 30), 0)
        assert cut.finish == "length" and len(cut.ids) <= 2


def test_an_import_that_fails_inside_vllm_is_not_taken_for_its_absence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_base: Path
) -> None:
    (tmp_path / "vllm.py").write_text("import a_library_that_vllm_needs\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    with pytest.raises(ModuleNotFoundError, match="a_library_that_vllm_needs"):
        open_sampler("vllm", str(small_base), small_tokenizer())
