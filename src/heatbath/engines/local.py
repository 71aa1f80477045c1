"""Sampling with transformers on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Completion:
    """One sampled continuation of prompt `prompt` (its index): ids up to and including EOS, and whether it ended."""

    prompt: int
    ids: list[int]
    finished: bool


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    prompts: list[list[int]],
    *,
    temperature: float,
    max_new_tokens: int,
    eos_ids: list[int],
    pad_id: int,
    batch: int = 64,
    seed: int = 0,
) -> Iterator[list[Completion]]:
    """Yields batches of completions, one of each prompt; the whole vocabulary at that temperature, nothing else.

    Prompts are taken in order of length so that a batch holds little padding (left, so that the continuation follows
    the prompt directly). The seed fixes the draw for a given batch size. The model's own generation settings
    (penalties, top-p, ...) are set aside meanwhile: they would make another policy of it.
    """
    torch.manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    own, model.generation_config = model.generation_config, GenerationConfig(eos_token_id=eos_ids, pad_token_id=pad_id)
    try:
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            width = max(len(prompts[i]) for i in rows)
            ids = torch.tensor([[pad_id] * (width - len(prompts[i])) + prompts[i] for i in rows])
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows])
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                do_sample=True,
                temperature=temperature,
                top_p=1.0,
                top_k=0,
                max_new_tokens=max_new_tokens,
            )
            yield [_completion(i, row, eos_ids) for i, row in zip(rows, out[:, width:].tolist(), strict=True)]
    finally:
        model.generation_config = own


def _completion(prompt: int, ids: list[int], eos_ids: list[int]) -> Completion:
    for position, token in enumerate(ids):
        if token in eos_ids:
            return Completion(prompt, ids[: position + 1], True)
    return Completion(prompt, ids, False)


def eos_ids_of(model: PreTrainedModel, tokenizer_eos: int | None) -> list[int]:
    """Every token that ends a completion: the tokenizer's EOS and those of the generation config."""
    config = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = config if isinstance(config, list) else [config]
    return sorted({i for i in [*listed, tokenizer_eos] if i is not None})
