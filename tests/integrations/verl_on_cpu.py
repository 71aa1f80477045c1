"""verl on a CPU, for tests alone: a platform named "cpu", its FSDP2 engine for it, and gloo for its processes.

Used by VERL_USE_EXTERNAL_MODULES=verl_on_cpu VERL_PLATFORM=cpu; verl itself supports no such platform. What it leaves
untouched: the trainer, the engine's forward and backward, the loss, the optimizer, the checkpoints.
"""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from verl.plugin.platform import platform_manager
from verl.plugin.platform.platform_base import PlatformBase


def _nothing(*_: object, **__: object) -> None:
    return None


class _Memory(SimpleNamespace):
    """torch.cuda's questions about memory, answered with 0."""

    def __getattr__(self, name: str) -> object:
        return (lambda *_, **__: 0) if "memory" in name else getattr(torch.cpu, name)


@platform_manager.PlatformRegistry.register(platform="cpu")
class Cpu(PlatformBase):
    device_name, vendor_name = "cpu", "none"
    device_module = _Memory(
        set_device=_nothing,
        empty_cache=_nothing,
        synchronize=_nothing,
        ipc_collect=_nothing,
        mem_get_info=lambda *_: (0, 1),
        get_device_name=lambda *_: "CPU",
    )

    def is_available(self) -> bool:
        return True

    def current_device(self) -> torch.device:
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CPU_VISIBLE_DEVICES"

    @contextmanager
    def nvtx_range(self, msg: str):
        yield

    def ray_resource_name(self) -> str:
        return "CPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def rollout_env_vars(self) -> dict[str, str]:
        return {}

    set_device = synchronize = manual_seed = manual_seed_all = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = _nothing


_init_process_group = torch.distributed.init_process_group


def _gloo(*given: object, backend: str = "gloo", **more: object) -> None:
    """verl asks for "cpu:gloo,cpu:gloo", which torch refuses."""
    _init_process_group(*given, backend="gloo" if backend == "cpu:gloo,cpu:gloo" else backend, **more)


torch.distributed.init_process_group = _gloo


def register_engine() -> None:
    from verl.workers.engine import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

    EngineRegistry.register(model_type="language_model", backend=["fsdp2"], device=["cpu"])(FSDPEngineWithLMHead)


register_engine()
