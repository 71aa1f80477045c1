"""The base's view of each token: a frozen model on the fly, and the surprise profile measured with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from heatbath.data.rendering import IGNORE, Rendered
from heatbath.errors import RunError
from heatbath.ideas.engine import label_logps
from heatbath.ideas.objectives import Gift

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROFILE_BETAS = (5.0, 10.0, 15.0, 20.0, 25.0)
HISTOGRAM_NATS = 40
LEFT_TO_BASE = 0.02  # the share of tokens for which the profile suggests a β


class Reference(Protocol):
    """Where the base's view of the same inputs comes from."""

    def hidden(self, **inputs: Tensor) -> Tensor:
        """Final hidden states, [B, T, d]."""
        ...

    @property
    def head(self) -> Tensor:
        """Output embedding, [V, d]."""
        ...


class FrozenBase:
    """A frozen copy of the base model, run beside the policy. Holds the model outside any module tree."""

    def __init__(self, model: PreTrainedModel):
        self._model = [model.eval().requires_grad_(False)]

    @torch.no_grad()
    def hidden(self, **inputs: Tensor) -> Tensor:
        """Final hidden states, [B, T, d], of the same inputs the policy gets."""
        out: Tensor = self._model[0].base_model(**inputs, use_cache=False).last_hidden_state
        return out

    @property
    def head(self) -> Tensor:
        """Output embedding, [V, d]."""
        return self._model[0].get_output_embeddings().weight


class AdaptersOff:
    """The base as the policy's own weights with its LoRA adapters switched off: no second model in memory."""

    def __init__(self, model: PeftModel):
        self._model = [model]

    @torch.no_grad()
    def hidden(self, **inputs: Tensor) -> Tensor:
        """Final hidden states, [B, T, d], without adapters and without dropout."""
        policy = self._model[0]
        training = policy.training
        with policy.disable_adapter():
            policy.eval()
            try:
                out: Tensor = policy.get_base_model().base_model(**inputs, use_cache=False).last_hidden_state
            finally:
                policy.train(training)
        return out

    @property
    def head(self) -> Tensor:
        """Output embedding, [V, d]; adapters on it would not be the base's. Raises RunError where it has some."""
        head = self._model[0].get_base_model().get_output_embeddings()
        if isinstance(head, BaseTunerLayer):
            raise RunError("an adapter sits on the output head", "lora.targets", "leave lm_head out of the targets")
        weight: Tensor = head.weight.detach()
        return weight


def require_same_vocabulary(policy: torch.nn.Module, reference: Reference) -> None:
    """Raises RunError when the reference cannot be the base of the policy: its head has another vocabulary."""
    ours, theirs = policy.get_output_embeddings().weight.shape[0], reference.head.shape[0]
    if ours != theirs:
        raise RunError(
            f"the reference is not the base of the policy: {theirs:,} against {ours:,} tokens in the vocabulary",
            "reference",
            "give the model that the policy was started from",
        )


def surprises(
    base: FrozenBase, rows: Sequence[Rendered], *, pad_id: int, batch: int = 16, autocast: torch.dtype | None = None
) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """−log p_base of every supervised token of each row, in nats; one forward pass, batched by length."""
    device = base.head.device
    out: list[Any] = [None] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    for start in range(0, len(order), batch):
        picked = order[start : start + batch]
        width = max(len(rows[i].input_ids) for i in picked)
        ids = torch.full((len(picked), width), pad_id)
        labels = torch.full((len(picked), width), IGNORE)
        mask = torch.zeros((len(picked), width), dtype=torch.long)
        for k, i in enumerate(picked):
            n = len(rows[i].input_ids)
            ids[k, :n], labels[k, :n], mask[k, :n] = (
                torch.tensor(rows[i].input_ids),
                torch.tensor(rows[i].labels),
                1,
            )
        ids, labels, mask = ids.to(device), labels.to(device), mask.to(device)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            hidden = base.hidden(input_ids=ids, attention_mask=mask)
            logp = label_logps(hidden[:, :-1].flatten(0, 1), base.head, labels[:, 1:].flatten()).view(len(picked), -1)
        for k, i in enumerate(picked):
            out[i] = -logp[k][labels[k, 1:] != IGNORE].double().cpu().numpy()
    return out


def profile(
    rows: Sequence[Rendered],
    nats: Sequence[np.ndarray[Any, np.dtype[np.float64]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    beta: float | None = None,
    smoothing: float = 0.0,
) -> dict[str, Any]:
    """What β would do on this data: the surprise histogram (1 nat per bin), shares of tokens by w at each β, the β at
    which a share `LEFT_TO_BASE` of the tokens keeps w < 0.5, and the most surprising tokens in context. `beta` and
    `smoothing` are those of the run's objective, where it has them."""
    x = np.concatenate(nats)
    counts, _ = np.histogram(np.minimum(x, HISTOGRAM_NATS - 1e-9), bins=HISTOGRAM_NATS, range=(0, HISTOGRAM_NATS))
    logp = torch.from_numpy(-x)

    def shares(beta: float) -> dict[str, float]:
        target = Gift(beta, smoothing)
        w = target.mass(logp, vocab_size).numpy()
        return {
            "beta": beta,
            "w_below_0.99": float((w < 0.99).mean()),
            "w_below_0.5": float((w < 0.5).mean()),
            "w_below_0.1": float((w < 0.1).mean()),
            "keep": float(target.keep(logp, vocab_size).mean()),
        }

    # w < 0.5 where −logit p~ > β, so a share of tokens fixes β as a quantile of −logit p~.
    smoothed = -Gift(0.0, smoothing).smoothed(logp, vocab_size).numpy()
    minus_logit = smoothed + np.log(-np.expm1(-np.maximum(smoothed, 1e-12)))
    betas = {*PROFILE_BETAS, *(() if beta is None else (float(beta),))}
    return {
        "beta": beta,
        "smoothing": smoothing,
        "vocab_size": vocab_size,
        "tokens": int(x.size),
        "rows": len(rows),
        "mean": float(x.mean()),
        "quantiles": {str(q): float(np.quantile(x, q)) for q in (0.5, 0.9, 0.99, 0.999)},
        "max": float(x.max()),
        "histogram": counts.tolist(),
        "betas": [shares(b) for b in sorted(betas)],
        "suggested_beta": max(0.0, float(np.quantile(minus_logit, 1 - LEFT_TO_BASE))),
        "suggested_share": LEFT_TO_BASE,
        "most_surprising": _most_surprising(rows, nats, tokenizer),
    }


def _most_surprising(
    rows: Sequence[Rendered], nats: Sequence[Any], tokenizer: PreTrainedTokenizerBase, most: int = 10
) -> list[dict[str, Any]]:
    where = sorted(((float(v), r, t) for r, row in enumerate(nats) for t, v in enumerate(row)), reverse=True)
    listed, seen = [], set()
    for value, r, t in where:
        supervised = [i for i, label in enumerate(rows[r].labels) if label != IGNORE]
        position = supervised[t]
        token = tokenizer.decode(rows[r].input_ids[position])
        before = tokenizer.decode(rows[r].input_ids[supervised[0] : position])
        if (token, before[-4:]) not in seen:
            seen.add((token, before[-4:]))
            listed.append({"nats": value, "before": before[-60:], "token": token})
        if len(listed) == most:
            break
    return listed
