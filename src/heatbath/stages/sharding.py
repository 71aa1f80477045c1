"""Weights that FSDP2 spreads over the processes of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
import torch
from transformers import Trainer

from heatbath.errors import RunError


def weights_are_sharded() -> bool:
    """Whether accelerate has started this process for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def settle_sharding(trainer: Trainer) -> None:
    """What heatbath has otherwise than accelerate under FSDP2. Of gradients each process keeps its part after every
    micro-batch, not only after the step. In 16 bits accelerate would cast what leaves the model, losses and
    log-probabilities, and what goes in: only the weights are gathered in 16 bits here, and gradients are added up in
    float32. Raises RunError for adapters, which nobody could merge at the end."""
    accelerator: Any = trainer.accelerator
    if not accelerator.is_fsdp2:
        return
    if isinstance(trainer.model, peft.PeftModel):
        raise RunError("adapters of sharded weights cannot be merged yet", "lora", "train them under DDP")
    accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=plugin.mixed_precision_policy.param_dtype,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        )


def as_sharded(accelerator: Any) -> dict[str, Any]:
    """How a frozen model is sharded under FSDP2 beside the policy: gathered in the same precision."""
    precision = accelerator.state.fsdp_plugin.mixed_precision_policy
    return {} if precision is None else {"mp_policy": precision}


@contextmanager
def gathered_weights(model: torch.nn.Module, accelerator: Any) -> Iterator[None]:
    """Within it weights that FSDP2 shards lie whole in every process, which may then call the model as often as it has
    tokens to sample: else each call would gather them, and wait for a process that samples fewer."""
    if not accelerator.is_fsdp2:
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    units = [m for m in model.modules() if isinstance(m, FSDPModule)]
    model._is_fsdp_managed_module = False  # by which `generate` would have all wait for the longest
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        model._is_fsdp_managed_module = True
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(accelerator.state.fsdp_plugin.reshard_after_forward, recurse=False)


def own_part(weight: Any) -> torch.Tensor:
    """Of a weight or gradient that FSDP2 shards what this process holds; any other as it is."""
    part: torch.Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    return part
