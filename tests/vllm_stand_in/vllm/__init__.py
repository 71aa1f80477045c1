"""As much of vLLM as TRL's colocate mode uses. See README.md."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from vllm.drawing import drawn

__version__ = "0.31.0"


@dataclass
class SamplingParams:
    n: int = 1
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = 16
    logprobs: int | None = None
    structured_outputs: Any = None


@dataclass
class CompletionOutput:
    token_ids: list[int]
    logprobs: list[dict[int, Any]]
    finish_reason: str


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class LLM:
    """The engine in the trainer's own process."""

    def __init__(
        self,
        model: str,
        *,
        tensor_parallel_size: int = 1,
        gpu_memory_utilization: float = 0.92,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        enable_sleep_mode: bool = False,
        model_impl: str = "auto",
        distributed_executor_backend: str | None = None,
        seed: int = 0,
        max_num_batched_tokens: int | None = None,
        logprobs_mode: str = "raw_logprobs",
        quantization: str | None = None,
        trust_remote_code: bool = False,
    ):
        assert logprobs_mode == "processed_logprobs" and not trust_remote_code
        self.policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        for parameter in self.policy.parameters():  # so that only what TRL loads can be right
            torch.nn.init.normal_(parameter, std=1.0)
        runner = SimpleNamespace(model=SimpleNamespace(load_weights=self._load_weights))
        worker = SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner))
        self.llm_engine = SimpleNamespace(model_executor=worker)

    def _load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        own = dict(self.policy.named_parameters())
        for name, value in weights:
            own[name].data.copy_(value)

    def reset_prefix_cache(self) -> bool:
        return True

    def generate(
        self, prompts: list[dict[str, Any]], sampling_params: SamplingParams, *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        assert not torch.is_autocast_enabled("cpu")  # vLLM chooses the precision of its own model
        out = []
        for prompt in prompts:
            ids = prompt["prompt_token_ids"]
            rows = drawn(self.policy, ids, sampling_params.n, sampling_params.temperature, sampling_params.max_tokens)
            outputs = [
                CompletionOutput(
                    tokens,
                    [{t: SimpleNamespace(logprob=x, rank=1)} for t, x in zip(tokens, logps, strict=True)],
                    finish,
                )
                for tokens, logps, finish in rows
            ]
            out.append(RequestOutput(ids, outputs))
        return out
