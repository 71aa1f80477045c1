"""The policies that do not move while RL runs: the start ("init") and the base, as models or as adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft
from transformers import PreTrainedModel

from heatbath.reference import shard_layers
from heatbath.stages.fused_forward import add_objective_forward

INIT = "init"  # the adapter that holds the start, where RL goes on training the warm start's own


class FixedPolicies:
    """Without PEFT a frozen model each. With it no copy is needed: "init" is the frozen adapter of that name, or where
    there is none the model with its adapters off; "base" is the model with its adapters off."""

    def __init__(self, model: Any, initial: PreTrainedModel | None, base: PreTrainedModel | None, device: Any = "cpu"):
        self.trained = model
        self.adapters = isinstance(model, peft.PeftModel)
        self.models: dict[str, PreTrainedModel] = {}
        if not self.adapters:
            for name, given in (("init", initial), ("base", base)):
                if given is not None:
                    self.models[name] = given.eval().requires_grad_(False).to(device)
            for one in {id(m): m for m in self.models.values()}.values():
                add_objective_forward(one)

    def shard(self, **how: Any) -> None:
        """Spreads the frozen models over the processes, as FSDP2 does with the policy's weights."""
        for one in {id(m): m for m in self.models.values()}.values():
            shard_layers(one, one, **how)

    def has(self, name: str) -> bool:
        return name == "old" or self.adapters or name in self.models

    def same(self, one: str, other: str) -> bool:
        """Whether two names are one policy."""
        if self.adapters:
            return one == other or INIT not in self.trained.peft_config
        return one == other or self.models.get(one) is self.models.get(other)

    @contextmanager
    def model_of(self, name: str | None) -> Iterator[Any]:
        """The model to call for a fixed policy; None is the one being trained."""
        if name is None:
            yield self.trained
        elif not self.adapters:
            yield self.models[name]
        elif name == "init" and INIT in self.trained.peft_config:
            active = self.trained.active_adapter
            self.trained.set_adapter(INIT, inference_mode=True)
            try:
                yield self.trained
            finally:
                self.trained.set_adapter(active)
        else:
            with self.trained.disable_adapter():
                yield self.trained
