"""Sampling with vLLM's offline engine, for models that are slow with transformers: many sequences in flight, a paged
cache. `pip install 'heatbath[vllm]'`, a GPU.

Written against the source of vLLM 0.22 and 0.31 and tested with a stand-in of their signatures; it has not run on a GPU
yet. vLLM's kernels round otherwise than transformers', so its completions are other draws from the same policy.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from heatbath import models
from heatbath.engines.sampling import Closing, Completion, Sampling, eos_ids_of, seeds_of
from heatbath.errors import RecipeError, RunError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLDEST, HOTTEST = 0.01, 2.0  # vLLM takes lower temperatures above 0 for this one, and refuses higher ones


class VllmSampler(Closing):
    """Samples a model named in a recipe, `batch` prompts at a time: what is lost when it is killed.

    Tokens go in and come out; neither a tokenizer nor the model's generation settings are loaded.
    """

    def __init__(self, model: str, tokenizer: PreTrainedTokenizerBase, *, precision: str = "auto", batch: int = 512):
        self._vllm = _vllm()
        self._batch, self._eos_ids = batch, eos_ids_of(model, tokenizer)
        self._engine: Any = self._vllm.LLM(
            model=models.resolve(model),
            dtype=str(models.autocast_dtype(precision) or "float32").removeprefix("torch."),
            skip_tokenizer_init=True,
            generation_config="vllm",
            max_model_len=-1,  # the model's, or what fits into memory
            trust_remote_code=isinstance(model, models.TrustedName),
        )

    def sample(
        self, prompts: Sequence[list[int]], settings: Sampling, seeds: int | Sequence[int]
    ) -> Iterator[list[Completion]]:
        """Yields batches in the order of the prompts. Raises RecipeError for a temperature or a prompt that vLLM does
        not take, RunError where a completion ended neither with EOS nor at its length."""
        own = seeds_of(seeds, len(prompts))
        if settings.temperature and not COLDEST <= settings.temperature <= HOTTEST:
            raise RecipeError(
                f"vLLM samples at no temperature of {settings.temperature:g}",
                "temperature",
                f'0, or between {COLDEST:g} and {HOTTEST:g}; or engine = "transformers"',
            )
        longest, context = max(map(len, prompts), default=0), self._engine.model_config.max_model_len
        if longest >= context:
            raise RecipeError(
                f"a prompt has {longest:,} tokens, and vLLM's context ends at {context:,}",
                "eval.engine",
                "a model with a longer context, a GPU with more memory, or shorter prompts",
            )
        for start in range(0, len(prompts), self._batch):
            rows = range(start, min(start + self._batch, len(prompts)))
            outputs = self._engine.generate(
                [self._vllm.TokensPrompt(prompt_token_ids=prompts[i]) for i in rows],
                [self._parameters(settings, own[i]) for i in rows],
                use_tqdm=False,
            )
            yield [self._completion(i, output.outputs[0]) for i, output in zip(rows, outputs, strict=True)]

    def close(self) -> None:
        """Frees the GPU's memory, as vLLM documents it."""
        if self._engine is not None:
            from vllm.distributed import cleanup_dist_env_and_memory

            self._engine = None
            gc.collect()
            cleanup_dist_env_and_memory()

    def _parameters(self, settings: Sampling, seed: int) -> Any:
        return self._vllm.SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_new_tokens,
            seed=seed,
            stop_token_ids=self._eos_ids,
            detokenize=False,
        )

    def _completion(self, prompt: int, output: Any) -> Completion:
        ids, why = list(output.token_ids), output.finish_reason
        if why == "stop" and ids and ids[-1] in self._eos_ids:
            return Completion(prompt, ids, "eos")
        if why != "length":
            raise RunError(
                f"vLLM ended a completion with '{why}'", f"prompt {prompt}", "run again: it goes on where it stopped"
            )
        return Completion(prompt, ids, "length")


def _vllm() -> ModuleType:
    try:
        import vllm
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise RecipeError("vLLM is not installed", "eval.engine", "pip install 'heatbath[vllm]'") from None
    return vllm  # type: ignore[no-any-return]
