"""Sampling with transformers on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

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
    samples: int,
    temperature: float,
    max_new_tokens: int,
    eos_ids: list[int],
    pad_id: int,
    batch: int = 64,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Iterator[list[Completion]]:
    """Yields batches of completions, `samples` of each prompt in all; whole vocabulary, no top-p or top-k.

    Prompts are taken in order of length so that a batch holds little padding (left, so that the continuation follows
    the prompt directly). The seed fixes the draw for a given batch size.
    """
    torch.manual_seed(seed)
    order = sorted((i for i in range(len(prompts)) for _ in range(samples)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        width = max(len(prompts[i]) for i in rows)
        ids = torch.tensor([[pad_id] * (width - len(prompts[i])) + prompts[i] for i in rows], device=model.device)
        mask = torch.tensor(
            [[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows], device=model.device
        )
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=temperature,
            top_p=1.0,
            top_k=0,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_ids,
            pad_token_id=pad_id,
        )
        yield [_completion(i, row, eos_ids) for i, row in zip(rows, out[:, width:].tolist(), strict=True)]
        if progress is not None:
            progress(len(rows))


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
