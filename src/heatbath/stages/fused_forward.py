"""The seam into TRL: one outer wrapper around the model's forward, inside which the loss is computed.

TRL already replaces `model.forward` by one that can return log-probabilities without logits. Ours delegates to it
unless an objective is passed. The loss must be computed inside forward, because there DDP, FSDP2 and ZeRO-3 have the
head's weights at hand; the trainer outside only normalises and logs.
"""

from __future__ import annotations

import functools
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from heatbath.data.rendering import IGNORE
from heatbath.errors import RunError
from heatbath.ideas.engine import linear_loss_with_sums
from heatbath.ideas.objectives import Objective, needs_reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from heatbath.reference import Reference

# Config keys by which some families transform the logits after the head; the engine multiplies by the head alone.
LOGIT_TRANSFORMS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
)


def add_objective_forward(model: PreTrainedModel) -> None:
    """Makes `model(input_ids, attention_mask, labels, objective=…, reference=…)` return a dict with the summed loss,
    the number of supervised tokens, and the token sums of what is logged. Call it after TRL has patched `forward`.

    Raises RunError for heads that the engine does not cover.
    """
    _require_plain_head(model)
    trl_forward = model.forward

    @functools.wraps(type(model).forward)  # generate() validates its arguments against this signature
    def forward(
        self: Any,
        *args: Any,
        objective: Objective | None = None,
        reference: Reference | None = None,
        **kwargs: Any,
    ) -> Any:
        if objective is None:
            return trl_forward(*args, **kwargs)
        labels: Tensor = kwargs.pop("labels")
        kwargs.pop("use_cache", None)
        target = labels[:, 1:].flatten()
        rows = (target != IGNORE).nonzero().squeeze(-1)

        def at_supervised(hidden: Tensor) -> Tensor:  # [B, T, d] -> [N, d]; position t predicts token t + 1
            return hidden[:, :-1].flatten(0, 1)[rows]

        ref_hidden = ref_head = None
        if reference is not None and needs_reference(objective):  # first: adapters are back on before the graph is made
            ref_hidden, ref_head = at_supervised(reference.hidden(**kwargs)), reference.head
        hidden = at_supervised(self.base_model(*args, **kwargs, use_cache=False).last_hidden_state)
        loss, tokens, sums = linear_loss_with_sums(
            objective,
            hidden,
            self.get_output_embeddings().weight,
            target[rows],
            ref_hidden=ref_hidden,
            ref_head=ref_head,
        )
        return {"loss": loss, "tokens": tokens, "sums": sums}

    model.forward = MethodType(forward, model)


def _require_plain_head(model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    transforms = [k for k in LOGIT_TRANSFORMS if getattr(config, k, None) not in (None, 1, 1.0)]
    if transforms:
        raise RunError(
            f"the model transforms its logits ({', '.join(transforms)}), which the engine does not cover",
            "model",
            "use a model without logit scaling or soft-capping",
        )
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise RunError("the model's head has a bias, which the engine does not cover", "model", "use another model")
