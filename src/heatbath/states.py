"""The hidden states of a model's last block before and after its final norm, and the head that reads the latter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from heatbath.errors import RunError
from heatbath.heads import logit_transform, output_head
from heatbath.ideas.shift import View
from heatbath.reference import at_supervised

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class LastStates:
    """A frozen model, asked for its last hidden states. A PEFT model answers with its adapters on.

    Raises RunError where no final norm is found, and for heads that the engine does not cover.
    """

    def __init__(self, model: PreTrainedModel | PeftModel):
        whole: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        whole.eval().requires_grad_(False)
        self.body: Any = whole.base_model
        self.head = output_head(whole).detach()
        self.transform = logit_transform(whole)
        self.norm = final_norm(self.body)

    @torch.no_grad()
    def view(self, ids: Tensor, mask: Tensor, labels: Tensor) -> View:
        """The model at the positions that predict a supervised token, in the order of the batch; all are [B, T]."""
        held: list[Tensor] = []

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            held.append(at_supervised(_first_tensor(args, kwargs), labels))

        handle = self.norm.register_forward_pre_hook(keep, with_kwargs=True)
        try:
            out = self.body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        finally:
            handle.remove()
        return View(at_supervised(out, labels), self.head, held[-1], **self.transform)


@torch.no_grad()
def final_norm(body: nn.Module) -> nn.Module:
    """The module whose output is the body's last hidden state, and which has no matrix of its own.

    It is found by what it does, on a few tokens, because families name it differently. Raises RunError where there is
    none: what stands before it is then unknown.
    """
    found: list[tuple[nn.Module, Tensor, Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if isinstance(out, Tensor) and (args or kwargs) and all(p.dim() < 2 for p in module.parameters()):
            found.append((module, _first_tensor(args, kwargs), out))

    handles = [m.register_forward_hook(note, with_kwargs=True) for m in body.modules() if m is not body]
    try:
        ids = torch.arange(1, 5, device=next(body.parameters()).device)[None]
        last = body(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    for module, before, out in reversed(found):
        same = out.data_ptr() == last.data_ptr() and out.numel() == last.numel()
        if same and before.data_ptr() != out.data_ptr() and before.shape[-1] == last.shape[-1]:
            return module
    raise RunError(
        f"no final norm is found in {type(body).__name__}: nothing without a matrix makes its last hidden state",
        "model",
        "the shift is measured for decoders that end in one norm",
    )


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first positional argument of a norm, or the only named one."""
    first: Tensor = args[0] if args else next(iter(kwargs.values()))
    return first
