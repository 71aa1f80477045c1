"""accelerate's FSDP2 and DeepSpeed on CPU processes: the trainers' own path of sharded weights, without a GPU.

As a program it is heatbath under one of them: `torchrun … sharding_on_cpu.py fsdp2 sft r.toml`.
"""

import os
import sys
from typing import Any

from accelerate.commands import launch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import FSDPModule

from heatbath.launch import Launch

DEFERRED: list[bool] = []
"""Each time that a gradient was to be kept whole for a later micro-batch."""


def allow(sharding: str) -> None:
    """From here on this process shards as `--sharding` has it: the shipped file, read by accelerate's launcher. Of
    FSDP2 accelerate's state has one branch that asks for GPUs; DeepSpeed takes a CPU as it is."""
    line = Launch(2, 1, sharding).command(["sft", "r.toml"], gpu=True)
    read, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(line[2:]))
    read.deepspeed_fields_from_accelerate_config = ""
    told = prepare_multi_gpu_env(read) if sharding == "fsdp2" else prepare_deepspeed_cmd_env(read)[1]
    os.environ |= {name: value for name, value in told.items() if name.startswith(("FSDP_", "ACCELERATE_"))}
    if sharding == "zero2":
        os.environ["DS_ACCELERATOR"] = "cpu"
        return
    begin, synchronise = AcceleratorState.__init__, FSDPModule.set_requires_gradient_sync

    def counted(self: Any, wanted: bool, **kwargs: Any) -> None:
        if not wanted:
            DEFERRED.append(wanted)
        synchronise(self, wanted, **kwargs)

    def sharded(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__, FSDPModule.set_requires_gradient_sync = sharded, counted


if __name__ == "__main__":
    allow(sys.argv.pop(1))
    from heatbath.cli import main

    main()
