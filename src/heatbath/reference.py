"""Where the base's view of each token comes from: a frozen model, or the policy with its adapters off.

`cache.py` has the third, which needs no base body.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from heatbath.data.rendering import IGNORE, Rendered
from heatbath.errors import RunError
from heatbath.heads import gathered, logit_transform, output_head
from heatbath.ideas.engine import label_logps

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PASS_TOKENS = 8192  # of one forward pass over rows of about the same length


class BaseView(NamedTuple):
    """The base at the N supervised tokens of a batch, as `engine.linear_loss` takes it.

    `hidden` [M, d] at the tokens `rows` [M] (None: at all), `logp` [N] where it is known without a product; `epsilon`
    is how much an objective may leave the base at the other tokens.
    """

    hidden: Tensor
    logp: Tensor | None = None
    rows: Tensor | None = None
    epsilon: float | None = None


class Reference(Protocol):
    """Where the base's view of the same inputs comes from."""

    def view(self, inputs: Mapping[str, Tensor], labels: Tensor) -> BaseView:
        """The base at the supervised tokens of a batch, in the order of the batch; `inputs` are the policy's own,
        `labels` [B, T] with -100 where nothing is learned."""
        ...

    @property
    def head(self) -> Tensor:
        """Output embedding, [V, d]."""
        ...


def shard_layers(model: PreTrainedModel, root: torch.nn.Module, *units: torch.nn.Module, **how: Any) -> None:
    """Spreads the weights of a frozen model over the processes: a unit for each layer, those that are named, and
    `root`, which is called, with the rest. `how` goes to `fully_shard`."""
    from torch.distributed.fsdp import fully_shard

    kinds = model._no_split_modules or ()
    for unit in [*(m for m in root.modules() if type(m).__name__ in kinds), *units, root]:
        fully_shard(unit, reshard_after_forward=True, **how)


class FrozenBase:
    """A frozen copy of the base model, run beside the policy. Holds the model outside any module tree."""

    def __init__(self, model: PreTrainedModel):
        self._model = [model.eval().requires_grad_(False)]
        self._gathered_in: torch.dtype | None = None
        self.transform = logit_transform(model)

    def shard(self, **how: Any) -> None:
        """Spreads the weights over the processes, as FSDP2 does with the policy's: each layer is gathered while it
        works, the head where it is read. `how` goes to `fully_shard`."""
        model = self._model[0]
        head, tied = model.get_output_embeddings(), model.get_input_embeddings()
        own = [head] if head.weight is not tied.weight else []
        shard_layers(model, model.base_model, *own, **how)
        if not own:  # it stands outside the body, which holds its weight in parts now
            head.weight = tied.weight
        self._gathered_in = how["mp_policy"].param_dtype if "mp_policy" in how else None

    @torch.no_grad()
    def hidden(self, **inputs: Tensor) -> Tensor:
        """Final hidden states, [B, T, d], of the same inputs the policy gets."""
        out: Tensor = self._model[0].base_model(**inputs, use_cache=False).last_hidden_state
        return out

    def view(self, inputs: Mapping[str, Tensor], labels: Tensor) -> BaseView:
        return BaseView(at_supervised(self.hidden(**inputs), labels))

    @property
    def head(self) -> Tensor:
        """Output embedding, [V, d]; of sharded weights in the precision in which they are gathered."""
        if self._gathered_in is None:
            return output_head(self._model[0])
        return gathered(self._model[0].get_output_embeddings().weight.to(self._gathered_in))


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

    def view(self, inputs: Mapping[str, Tensor], labels: Tensor) -> BaseView:
        return BaseView(at_supervised(self.hidden(**inputs), labels))

    @property
    def head(self) -> Tensor:
        """Output embedding, [V, d]; adapters on it would not be the base's. Raises RunError where it has some."""
        head = self._model[0].get_base_model().get_output_embeddings()
        if hasattr(head, "original_module"):  # PEFT trains a copy of it (modules_to_save)
            return gathered(head.original_module.weight).detach()
        return output_head(self._model[0].get_base_model()).detach()


def at_supervised(hidden: Tensor, labels: Tensor) -> Tensor:
    """Of [B, T, d], the positions that predict a supervised token: [N, d]."""
    return hidden[:, :-1].flatten(0, 1)[(labels[:, 1:] != IGNORE).flatten()]


def sequence_starts(inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Whether a sequence begins at a token, [B, T]: at the first real token of a row, where `position_ids` begin anew,
    and where an `attention_mask` that numbers packed sequences changes."""
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(labels) if mask is None or mask.dim() != 2 else mask.long()
    fresh = torch.ones_like(labels, dtype=torch.bool)
    fresh[:, 1:] = mask[:, 1:] != mask[:, :-1]
    positions = inputs.get("position_ids")
    if positions is not None:
        positions = positions.expand_as(labels)
        fresh[:, 1:] |= (positions[:, 1:] == 0) & (positions[:, :-1] != 0)
    return fresh & (mask != 0)


def segment_ids(inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """The sequence of each token, [B, T]: another number for each."""
    return sequence_starts(inputs, labels).flatten().cumsum(0).view(labels.shape)


def sequences(inputs: Mapping[str, Tensor], labels: Tensor) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids and labels of each sequence of a batch, without its padding, in the order of the batch."""
    segment = segment_ids(inputs, labels).tolist()
    ids, target = inputs["input_ids"].tolist(), labels.tolist()
    mask = inputs.get("attention_mask")
    real = [[1] * len(row) for row in ids] if mask is None else mask.tolist()
    for b in range(len(ids)):
        held: dict[int, tuple[list[int], list[int]]] = {}
        for t in range(len(ids[b])):
            if real[b][t]:
                one, two = held.setdefault(segment[b][t], ([], []))
                one.append(ids[b][t])
                two.append(target[b][t])
        yield from held.values()


def padded(
    rows: Sequence[Rendered], *, pad_id: int, tokens: int = PASS_TOKENS, device: torch.device | None = None
) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Rows of about the same length at a time, longest first: their numbers, and ids, mask and labels [B, T], padded on
    the right; B·T ≤ `tokens`, or one row."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    while order:
        width = len(rows[order[0]].input_ids)
        count = max(1, tokens // max(width, 1))
        picked, order = order[:count], order[count:]
        ids = torch.full((len(picked), width), pad_id)
        labels = torch.full((len(picked), width), IGNORE)
        mask = torch.zeros((len(picked), width), dtype=torch.long)
        for k, i in enumerate(picked):
            n = len(rows[i].input_ids)
            ids[k, :n], labels[k, :n] = torch.tensor(rows[i].input_ids), torch.tensor(rows[i].labels)
            mask[k, :n] = 1
        yield picked, ids.to(device), mask.to(device), labels.to(device)


def base_pass(
    base: FrozenBase,
    rows: Sequence[Rendered],
    *,
    pad_id: int,
    autocast: torch.dtype | None = None,
    tokens: int = PASS_TOKENS,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of each row its number, the base's hidden states [n, d] and log p_base [n] at its supervised tokens.

    One forward pass over rows of about the same length at a time, longest first; on the CPU, in float32 (float64 of a
    float64 model). Rows come in no particular order.
    """
    device = base.head.device
    for picked, ids, mask, labels in padded(rows, pad_id=pad_id, tokens=tokens, device=device):
        with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            hidden = at_supervised(base.hidden(input_ids=ids, attention_mask=mask), labels)
            targets = labels[:, 1:]
            logp = label_logps(hidden, base.head, targets[targets != IGNORE], **base.transform)
        counts = (targets != IGNORE).sum(-1).tolist()
        parts = zip(picked, hidden.cpu().split(counts), logp.cpu().split(counts), strict=True)
        yield from parts


def require_same_vocabulary(policy: torch.nn.Module, reference: Reference) -> None:
    """Raises RunError when the reference cannot be the base of the policy: its head has another vocabulary."""
    embeddings: Any = policy.get_output_embeddings()  # type: ignore[operator]
    ours, theirs = embeddings.weight.shape[0], reference.head.shape[0]
    if ours != theirs:
        raise RunError(
            f"the reference is not the base of the policy: {theirs:,} against {ours:,} tokens in the vocabulary",
            "reference",
            "give the model that the policy was started from",
        )
