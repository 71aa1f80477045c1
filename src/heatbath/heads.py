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
SAME_LOGITS = 1e-2  # relative; rounding to 16 bits is 3e-3, a factor or cap left out far more
PROBED = 256  # entries of the vocabulary


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

    The model is asked on a few tokens. Raises RunError for a transformation or a bias that is not covered.
    """
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise RunError("the model's head has a bias, which the engine does not cover", "model", "use another model")
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        raise RunError(
            "the model adds a router loss to its own, which objectives do not",
            "model",
            "set output_router_logits = false in its configuration",
        )
    if model.device.type == "meta":
        return {}
    head = output_head(model)
    caps = {k: float(v) for k in SOFTCAPS if (v := getattr(config, k, None))}
    factors = {k: float(v) for k in FACTORS if (v := getattr(config, k, None)) not in (None, 1, 1.0)}
    few = torch.arange(0, head.shape[0], max(1, head.shape[0] // PROBED), device=head.device)
    ids = torch.arange(1, 5, device=model.device)[None] % head.shape[0]
    training = model.training
    logits = model.eval()(input_ids=ids).logits[0][:, few].double()
    plain = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0].double() @ head[few].double().T
    model.train(training)
    product = math.prod(factors.values())
    candidates = [
        (float(torch.linalg.norm(made - logits) / torch.linalg.norm(logits)), scale, cap)
        for scale in {product: 0, 1 / product: 0, 1.0: 0}
        for cap in (None, *caps.values())
        for made in [plain * scale if cap is None else cap * torch.tanh(plain * scale / cap)]
    ]
    off, scale, cap = min(candidates, key=lambda candidate: candidate[0])
    if off > SAME_LOGITS:
        names = f" ({', '.join(caps | factors)})" if caps or factors else ""
        raise RunError(
            f"{type(model).__name__} transforms its logits{names} in a way that the engine does not cover",
            "model",
            "use a model whose logits are its head's, scaled or soft-capped",
        )
    return {**({"scale": scale} if scale != 1.0 else {}), **({"softcap": cap} if cap else {})}
