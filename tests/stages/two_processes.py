"""One rank of `test_two_processes_take_the_step_of_one`; rank 0 writes the gradient it sees in each mode,
and the weights after steps on preferences."""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import policy_trainers  # noqa: E402
from test_preference import two_steps  # noqa: E402
from test_sft import demonstrations, one_step  # noqa: E402

from conftest import small_model  # noqa: E402 - the path above comes first
from heatbath.cache import CachedBase, ReferenceCache, everything  # noqa: E402
from heatbath.reference import FrozenBase  # noqa: E402


def data_parallel(out: Path, mode: str) -> dict:
    reference = None
    if mode == "hidden_cache":  # both ranks ask for it at once; one fills, the other finds it filled
        base = small_model(1)
        cache = ReferenceCache.of(base, out.parent / "cache")
        cache.fill(FrozenBase(base), demonstrations(8), everything, pad_id=1)
        reference = CachedBase(cache)
    reduction = "sequence_sum" if mode == "sequence_sum" else "token_mean"
    shape = {"micro": 2, "accumulation": 2, "ranks": 2}
    gradient, _ = one_step(out.with_suffix(""), **shape, reduction=reduction, reference=reference)
    return {name.removeprefix("module."): g for name, g in gradient.items()}


def preferred(out: Path) -> dict:
    folder = out.with_suffix("") / str(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    folder.mkdir(parents=True, exist_ok=True)
    return two_steps(folder, ranks=2)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for mode in sys.argv[2:]:
        out = folder / f"{mode}.pt"
        if mode == "una":
            gradient = preferred(out)
        elif mode.startswith("rl_"):
            found = policy_trainers.two_steps(out.with_suffix(""), mode.removeprefix("rl_"), micro=3, accumulation=2)
            gradient = {name.removeprefix("module."): p for name, p in found.items()}
        else:
            gradient = data_parallel(out, mode)
        if int(torch.distributed.get_rank()) == 0:
            torch.save(gradient, out)
    torch.distributed.destroy_process_group()
