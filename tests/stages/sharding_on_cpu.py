"""accelerate's FSDP2 and DeepSpeed on CPU processes: the trainers' own path of sharded weights, without a GPU."""

import os
from typing import Any

from accelerate.commands import launch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from heatbath.launch import Launch


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
    begin = AcceleratorState.__init__

    def sharded(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = sharded
