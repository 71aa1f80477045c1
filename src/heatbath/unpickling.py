"""The pickles of a checkpoint, looked at before anything reads them: a pickle is a program, and a checkpoint is data.

transformers and accelerate read most of them with torch's restricted reader (`weights_only`), which refuses a program
in the middle of a resume; torch's sharded checkpoints have an index (`.metadata`) and single values that torch reads
without restriction. All are asked here first, so that a checkpoint of a stranger's is refused by name and none of it
runs.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

from heatbath.errors import RunError

INDEX = ".metadata"
# What the index of a sharded checkpoint is made of. All of it is types and constants, none of it does anything.
OF_THE_INDEX = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.filesystem",
    "torch.distributed.checkpoint.planner",
)
CONSTANTS = {("torch", "Size"), ("torch", "device"), ("torch.serialization", "_get_layout")}
OF_ZERO = re.compile(r"(zero_pp_rank_\d+_)?mp_rank_\d+_(model|optim)_states\.pt")
CONSTANTS |= {(module, "PosixPath") for module in ("pathlib", "pathlib._local")}


class _IndexOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        import torch

        if (module, name) in CONSTANTS:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if module in OF_THE_INDEX and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def require_data(checkpoint: Path) -> None:
    """Raises RunError where a file of a checkpoint would do something when it is read, instead of holding numbers."""
    for path in sorted(checkpoint.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        try:
            if path.name == INDEX:
                _require_plain_shards(path)
            elif path.suffix in (".pt", ".pth", ".bin") and path.name != "training_args.bin":  # which nobody reads
                _require_numbers(path)
        except (pickle.UnpicklingError, AttributeError, EOFError, ImportError, IndexError, TypeError) as error:
            said = " ".join(str(error).split())
            raise RunError(
                f"a file of the checkpoint is a program, or is broken: {_reason(said)}",
                str(path),
                "go on only with checkpoints of your own; --fresh starts the stage again",
            ) from None


def _require_plain_shards(index: Path) -> None:
    """Reads the index of a sharded checkpoint, and the values in it that are no tensors."""
    import torch
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    with index.open("rb") as stream:
        found = _IndexOnly(stream).load()
    for at, place in (found.storage_data or {}).items():
        if isinstance(found.state_dict_metadata.get(at.fqn), BytesStorageMetadata):
            with (index.parent / place.relative_path).open("rb") as stream:
                stream.seek(place.offset)
                torch.load(io.BytesIO(stream.read(place.length)), weights_only=True)


def _require_numbers(path: Path) -> None:
    """Reads a file as torch does under its restrictions, the tensors themselves left on the disk."""
    import torch
    from transformers.trainer_pt_utils import safe_globals

    of_zero = _of_deepspeed() if OF_ZERO.fullmatch(path.name) else []
    with safe_globals(), torch.serialization.safe_globals(of_zero):
        try:
            torch.load(path, weights_only=True, map_location="meta", mmap=True)
        except RuntimeError as error:  # not in torch's own container: an older format, which cannot be mapped
            if "mmap" not in str(error):
                raise pickle.UnpicklingError(str(error)) from None
            torch.load(path, weights_only=True, map_location="cpu")


def _of_deepspeed() -> list[type]:
    """The classes of numbers in DeepSpeed's files. Raises ImportError where it is not installed."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def _reason(said: str) -> str:
    """The part of torch's long explanation that names what the file wanted to do."""
    named = re.search(r"GLOBAL ([\w.]+)", said)
    if named is not None:
        return f"it names {named[1]}"
    return (said.partition("WeightsUnpickler error: ")[2] or said)[:80] or "it cannot be read"
