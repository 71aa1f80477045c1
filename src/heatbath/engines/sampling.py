"""What every engine offers: prompts as tokens in, completions as tokens out, each drawn with a seed of its own.

A completion depends on the weights, its prompt, the settings and its seed alone: not on what else is asked, in which
batches, or where an earlier attempt was killed. So a sample can be drawn again, and more can be added to those there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from heatbath.errors import RecipeError, RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ENDED = ("eos", "stop")
SEEDS = 2**31  # every engine takes seeds below it (llama.cpp reads 32 bits, of which one value means "random")


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn: from softmax(logits / temperature), of it the smallest set of most likely tokens that
    holds `top_p` of the mass; temperature 0 takes the likeliest token. At most `max_new_tokens`, EOS counted."""

    temperature: float
    top_p: float
    max_new_tokens: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RecipeError(f"a temperature of {self.temperature}", "temperature", "0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"top_p of {self.top_p}", "top_p", "above 0 and at most 1 (1 keeps every token)")
        if self.max_new_tokens < 1:
            raise RecipeError(f"{self.max_new_tokens} new tokens", "max_new_tokens", "at least 1")


@dataclass(frozen=True)
class Completion:
    """A continuation of prompt `prompt` (its index), and why it ended.

    `finish` is "eos" (then EOS is the last of `ids`), "length" (cut at max_new_tokens or at the end of the engine's
    context) or, from servers, "stop" (ended by something else than EOS) or "content_filter". `text` is None where the
    ids came from the engine; else it is what the engine said, and the ids are our tokenizer's of it.
    """

    prompt: int
    ids: list[int]
    finish: str
    text: str | None = None

    @property
    def finished(self) -> bool:
        return self.finish in ENDED

    @property
    def retokenised(self) -> bool:
        return self.text is not None


class LeftOutError(RunError):
    """The engine does not take some prompts (too long, filtered), and will not take them when asked again. Raised only
    after the completions of all others."""


class Sampler(Protocol):
    """An engine with its model loaded; used as a context manager, it is closed at the end."""

    def sample(
        self, prompts: Sequence[list[int]], settings: Sampling, seeds: int | Sequence[int]
    ) -> Iterator[list[Completion]]:
        """Yields batches of completions, one of each prompt, in any order; what was yielded stays good if it raises.

        `seeds` holds one for each prompt, or is a number from which prompt i gets that plus i.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


class Closing:
    """The context manager of a sampler that has `close`."""

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def open_sampler(
    engine: str,
    model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    precision: str = "auto",
    batch: int | None = None,
    endpoint: str | None = None,
    served: str | None = None,
) -> Sampler:
    """The engine "transformers", "vllm" or "api" for a model named in a recipe (or, for transformers, one loaded).

    `batch` is the number of prompts sampled together; None takes what fits (transformers), 512 (vllm), 32 requests in
    flight (api). The api engine asks the server at `endpoint` for its model `served`. Raises RecipeError where the
    engine or the model is not to be had.
    """
    if engine == "transformers":
        from heatbath.engines.local import LocalSampler

        return LocalSampler(model, tokenizer, precision=precision, batch=batch)
    if not isinstance(model, str):
        raise RecipeError(f"the engine '{engine}' cannot take over a loaded model", "eval.engine", "give its folder")
    if engine == "vllm":
        from heatbath.engines.vllm import VllmSampler

        return VllmSampler(model, tokenizer, precision=precision, batch=batch or 512)
    if engine == "api":
        from heatbath.engines.api import ApiSampler

        if endpoint is None:
            raise RecipeError("no server is named", "eval.endpoint", "for example http://localhost:8000/v1")
        if served is None:
            raise RecipeError(
                "the server's name of the model is missing", "eval.served", 'for example served = { init = "my-model" }'
            )
        return ApiSampler(endpoint, served, tokenizer, eos_ids_of(model, tokenizer), concurrency=batch or 32)
    raise RecipeError(f"no engine is called '{engine}'", "eval.engine", "transformers, vllm or api")


def seed_of(seed: int, *names: str | int) -> int:
    """A seed below 2**31 for what `names` name, whose last is a number: how many-th sample of its problem it is.

    Different numbers of the same problem (below 2**31 of them) have different seeds.
    """
    *rest, number = names
    digest = hashlib.sha256(repr((seed, *rest)).encode()).digest()
    return (int.from_bytes(digest[:8]) + int(number)) % SEEDS


def seeds_of(seeds: int | Sequence[int], count: int) -> list[int]:
    """One seed for each of `count` prompts."""
    found = [seeds + i for i in range(count)] if isinstance(seeds, int) else list(seeds)
    if len(found) != count:
        raise ValueError(f"{len(found)} seeds for {count} prompts")
    return found


def until_eos(ids: Sequence[int], eos_ids: Sequence[int]) -> list[int]:
    """Tokens up to and including the first that ends a completion, or all."""
    return list(next((ids[: i + 1] for i, token in enumerate(ids) if token in eos_ids), ids))


def eos_ids_of(model: str | PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the tokenizer's EOS and those of the model's generation config."""
    config = _generation_config(model) if isinstance(model, str) else model.generation_config
    own = config.eos_token_id if config is not None else None
    listed = own if isinstance(own, list) else [own]
    return sorted({i for i in [*listed, tokenizer.eos_token_id] if i is not None})


def _generation_config(name: str):  # type: ignore[no-untyped-def]
    """That of the model named in a recipe, or None where it has none."""
    from transformers import GenerationConfig

    from heatbath import models

    try:
        return GenerationConfig.from_pretrained(models.resolve(name), trust_remote_code=False)
    except OSError:
        return None
