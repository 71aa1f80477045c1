"""The head of a model: its weight wherever PEFT or FSDP keep it, and what the model does to its logits afterwards."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.tensor import Partial

from heatbath.errors import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Config keys by which some families transform the logits after the head. What they make of these differs (Granite
# divides by `logits_scaling`, HyperCLOVA X multiplies), so a model that has one is asked which it is.
SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap")
FACTORS = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier", "logits_mup_width_multiplier")
SAME_LOGITS = 1e-3  # relative, in float32 or 16 bits; a factor left out is off by far more


def output_head(model: PreTrainedModel) -> Tensor:
    """The weight [V, d] of the model's head, looked up at every call (PEFT and FSDP replace it) and gathered once."""
    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):
        raise RunError("an adapter sits on the output head", "lora.targets", "leave lm_head out of the targets")
    return gathered(head.weight)


def gathered(weight: Any) -> Tensor:
    """A weight whole on every rank. The gradient of one that FSDP2 shards in a unit of its own is averaged over the
    ranks and cut up again, as FSDP does with all others. Raises RunError for sharding that is not covered."""
    if hasattr(weight, "ds_id") and not weight.numel():
        raise RunError("DeepSpeed ZeRO-3 holds the head, which is not covered", "model", "take FSDP2 or ZeRO-2")
    if not hasattr(weight, "full_tensor"):
        whole: Tensor = weight
        return whole
    mesh = weight.device_mesh
    if "tp" in (mesh.mesh_dim_names or ()):
        raise RunError("the head is tensor-parallel, which the engine does not cover", "model", "shard it with FSDP2")
    whole = weight.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole


@torch.no_grad()
def logit_transform(model: PreTrainedModel) -> dict[str, float]:
    """What the model does to its logits after the head, as options of the engine: `scale`, `softcap`.

    Raises RunError for a transformation or a bias that the engine does not cover.
    """
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise RunError("the model's head has a bias, which the engine does not cover", "model", "use another model")
    config = model.config.get_text_config()
    caps = {k: float(v) for k in SOFTCAPS if (v := getattr(config, k, None))}
    factors = {k: float(v) for k in FACTORS if (v := getattr(config, k, None)) not in (None, 1, 1.0)}
    if not caps and not factors:
        return {}
    ids = torch.arange(1, 5, device=model.device)[None]
    training = model.training
    logits = model.eval()(input_ids=ids).logits[0].double()
    plain = (
        model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0].double() @ output_head(model).double().T
    )
    model.train(training)
    product = math.prod(factors.values())
    for scale in (product, 1 / product, 1.0):
        for cap in (*caps.values(), None):
            made = plain * scale if cap is None else cap * torch.tanh(plain * scale / cap)
            if torch.linalg.norm(made - logits) <= SAME_LOGITS * torch.linalg.norm(logits):
                return {**({"scale": scale} if scale != 1.0 else {}), **({"softcap": cap} if cap else {})}
    raise RunError(
        f"the model transforms its logits ({', '.join(caps | factors)}) in a way that the engine does not cover",
        "model",
        "use a model without it",
    )
