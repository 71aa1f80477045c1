"""One rank of `test_two_processes_take_the_step_of_one`; rank 0 writes the gradient it sees in each mode,
and the weights after steps on preferences."""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import policy_trainers  # noqa: E402
from test_preference import two_steps  # noqa: E402
from test_sft import BETA, demonstrations, one_step  # noqa: E402

from conftest import small_model  # noqa: E402 - the path above comes first
from heatbath.cache import CachedBase, ReferenceCache, everything  # noqa: E402
from heatbath.ideas.gift import Gift  # noqa: E402
from heatbath.reference import FrozenBase  # noqa: E402
from heatbath.stages.fused_forward import add_objective_forward  # noqa: E402
from heatbath.stages.training import RowCollator  # noqa: E402


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


def fully_sharded(mode: str) -> dict:
    """Every parameter a DTensor over two ranks: the head within the whole model, or as a unit of its own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    own_head = mode == "fsdp2_head"
    policy, base = small_model(0, tied=not own_head).double(), FrozenBase(small_model(1).double())
    add_objective_forward(policy)
    for unit in (*policy.model.layers, *((policy.lm_head,) if own_head else ())):
        fully_shard(unit, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    rows = [{"input_ids": r.input_ids, "labels": r.labels} for r in demonstrations(8)]
    tokens = sum(label != -100 for r in rows for label in r["labels"][1:])
    batch = RowCollator(1)(rows[torch.distributed.get_rank() :: 2])
    out = policy(**batch, objective=Gift(BETA), reference=base)
    (out["loss"] / tokens * 2).backward()  # FSDP averages over the ranks
    return {name: p.grad.full_tensor() for name, p in policy.named_parameters()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for mode in sys.argv[2:]:
        if not torch.distributed.is_initialized() and mode.startswith("fsdp2"):
            torch.distributed.init_process_group("gloo")
        out = folder / f"{mode}.pt"
        if mode == "una":
            gradient = preferred(out)
        elif mode.startswith("rl_"):
            found = policy_trainers.two_steps(out.with_suffix(""), mode.removeprefix("rl_"), micro=3, accumulation=2)
            gradient = {name.removeprefix("module."): p for name, p in found.items()}
        else:
            gradient = fully_sharded(mode) if mode.startswith("fsdp2") else data_parallel(out, mode)
        if int(torch.distributed.get_rank()) == 0:
            torch.save(gradient, out)
    torch.distributed.destroy_process_group()
