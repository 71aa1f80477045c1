"""The seam into TRL: one outer wrapper around the model's forward, inside which the loss is computed.

TRL already replaces `model.forward` by one that can return log-probabilities without logits. Ours delegates to it
unless an objective is passed. The loss must be computed inside forward, because there DDP, FSDP2 and ZeRO-3 have the
head's weights at hand; the trainer outside only normalises and logs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor

from heatbath.data.rendering import IGNORE
from heatbath.heads import logit_transform, output_head
from heatbath.ideas.engine import linear_loss_with_sums, linear_stats
from heatbath.ideas.statistics import Objective, needs_reference
from heatbath.reference import at_supervised, segment_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from heatbath.reference import Reference


def add_objective_forward(model: PreTrainedModel) -> None:
    """Makes `model(input_ids, attention_mask, labels, objective=…, reference=…, columns=…)` return a dict with the
    summed loss, the number of supervised tokens, and the token sums of what is logged; and with `statistics=("logp",)`
    in place of an objective a dict of these statistics of the supervised tokens, of the logits over `temperature`. Call
    it after TRL has patched `forward`.

    A column is [B, T], aligned with the labels. Raises RunError for heads that the engine does not cover.
    """
    transform = logit_transform(model)
    trl_forward = model.forward

    @functools.wraps(type(model).forward)  # generate() validates its arguments against this signature
    def forward(
        self: Any,
        *args: Any,
        objective: Objective | None = None,
        reference: Reference | None = None,
        columns: Mapping[str, Tensor] | None = None,
        statistics: tuple[str, ...] = (),
        temperature: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        if objective is None and not statistics:
            return trl_forward(*args, **kwargs)
        labels: Tensor = kwargs.pop("labels")
        kwargs.pop("use_cache", None)
        kwargs.pop("num_items_in_batch", None)  # transformers hands it to models that would divide their own loss
        target = labels[:, 1:]
        supervised = target != IGNORE
        options: dict[str, Any] = dict(transform)
        if objective is not None:
            options["columns"] = {name: column[:, 1:][supervised] for name, column in (columns or {}).items()}
            options["segments"] = segment_ids(kwargs, labels)[:, 1:][supervised]
            if reference is not None and needs_reference(objective):  # first: adapters are on again for the graph
                view = reference.view(kwargs, labels)
                options |= {"ref_hidden": view.hidden, "ref_head": reference.head}
                options |= {"ref_logp": view.logp, "ref_rows": view.rows, "ref_epsilon": view.epsilon}
        hidden = at_supervised(self.base_model(*args, **kwargs, use_cache=False).last_hidden_state, labels)
        head = output_head(self)
        if objective is None:
            # c·tanh(s·z / c) / T is the same form with s / T and c / T
            for name, default in (("scale", 1.0), ("softcap", None)):
                if temperature != 1.0 and (value := options.get(name, default)) is not None:
                    options[name] = value / temperature
            found = linear_stats(hidden, head, target[supervised], need=statistics, **options)
            return {name: getattr(found, name) for name in statistics}  # a dict, in which FSDP finds the tensors
        loss, tokens, sums = linear_loss_with_sums(objective, hidden, head, target[supervised], **options)
        return {"loss": loss, "tokens": tokens, "sums": sums}

    model.forward = MethodType(forward, model)
