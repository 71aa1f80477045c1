"""Completions of a model, one token at a time, with the log-probability of each under the policy that drew it."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def drawn(
    model: PreTrainedModel, prompt: list[int], n: int, temperature: float, most: int
) -> list[tuple[list[int], list[float], str]]:
    """Token ids, log-probabilities and why it ended, `n` times; temperature 0 is greedy."""
    listed = model.generation_config.eos_token_id
    ends = listed if isinstance(listed, list) else [listed]
    out = []
    for _ in range(n):
        ids: list[int] = []
        logps: list[float] = []
        while len(ids) < most and not (ids and ids[-1] in ends):
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].float()
            logp = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
            token = int(torch.multinomial(logp.exp(), 1)) if temperature else int(logp.argmax())
            ids.append(token)
            logps.append(float(logp[token]))
        out.append((ids, logps, "stop" if ids[-1] in ends else "length"))
    return out
