"""A step's gradient on weights that FSDP2 shards over the processes of a CPU mesh, or on whole ones in one process.

As a program it is one rank of the first kind: `torchrun --nproc-per-node 2 sharded.py FOLDER MODE …`.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from test_sft import BETA, demonstrations  # noqa: E402 - the path above comes first

from conftest import small_model  # noqa: E402
from heatbath import ranks  # noqa: E402
from heatbath.data.rendering import IGNORE  # noqa: E402
from heatbath.ideas.gift import Gift  # noqa: E402
from heatbath.ideas.policy import policy  # noqa: E402
from heatbath.ideas.surrogates import Counts, Rows  # noqa: E402
from heatbath.reference import AdaptersOff, FrozenBase  # noqa: E402
from heatbath.stages.fixed_policies import FixedPolicies  # noqa: E402
from heatbath.stages.fused_forward import add_objective_forward  # noqa: E402
from heatbath.stages.sharding import gathered_weights  # noqa: E402
from heatbath.stages.training import RowCollator  # noqa: E402

# What is sharded beside the policy, or how it is trained.
GIFT = ("plain", "own_head", "base", "checkpointed", "kept", "adapters")
RL = ("rl_paper", "rl_grpo", "rl_cispo", "rl_gspo", "rl_frozen", "rl_sampled")
HYPER = {"rl_grpo": {"kl": 0.05}, "rl_frozen": {"name": "grpo", "kl": 0.05}, "rl_sampled": {"name": "paper"}}


def gradient(mode: str, world: int) -> dict[str, torch.Tensor]:
    """Of the mean loss over 8 rows, by parameter, whole."""
    model = small_model(0, tied=mode != "own_head").double()
    base = FrozenBase(small_model(1).double())
    if mode == "adapters":
        torch.manual_seed(2)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
        for name, p in model.named_parameters():
            p.data = p.data.double() + 0.05 * torch.randn(p.shape, dtype=torch.float64) * ("lora_B" in name)
        base = AdaptersOff(model)
    inner = model.get_base_model() if mode == "adapters" else model
    add_objective_forward(inner)
    if mode == "checkpointed":
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if world > 1:
        shard(model, inner, own_head=mode == "own_head", kept=mode == "kept")
        if mode == "base":
            base.shard()
    if mode == "rl_sampled":
        sample(model, world)
    rows = [{"input_ids": r.input_ids, "labels": r.labels} for r in demonstrations(8)]
    batch = RowCollator(1)(rows[ranks.rank() if world > 1 else 0 :: world])
    fixed = FixedPolicies(model, small_model(1).double(), None)
    if world > 1:
        fixed.shard()
    loss = surrogate(model, batch, mode, rows, fixed) if mode in RL else objective(model, base, batch, rows)
    (loss * world).backward()  # FSDP averages over the ranks
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in found.items()}


def shard(model: torch.nn.Module, inner: torch.nn.Module, *, own_head: bool, kept: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for unit in (*inner.model.layers, *((inner.lm_head,) if own_head else ())):
        fully_shard(unit, mesh=mesh, reshard_after_forward=not kept)
    fully_shard(model, mesh=mesh)


def objective(model: torch.nn.Module, base, batch: dict, rows: list) -> torch.Tensor:
    tokens = sum(label != IGNORE for r in rows for label in r["labels"][1:])
    return model(**batch, objective=Gift(BETA), reference=base)["loss"] / tokens


@torch.no_grad()
def sample(model: torch.nn.Module, world: int) -> None:
    """Calls the model as often as this process has tokens: more often in the second one."""
    plugin = SimpleNamespace(fsdp_plugin=SimpleNamespace(reshard_after_forward=True))
    ids = torch.arange(6)[None] + 2
    with gathered_weights(model, SimpleNamespace(is_fsdp2=world > 1, state=plugin)):
        for _ in range(2 + 3 * ranks.rank()):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)


def surrogate(model: torch.nn.Module, batch: dict, mode: str, rows: list, fixed: FixedPolicies) -> torch.Tensor:
    """The policy's loss on the rows as completions, with advantages, old and reference log-probabilities by number;
    with a frozen policy ("rl_frozen") the reference's are its own."""
    goal = policy(**{"name": mode.removeprefix("rl_"), **HYPER.get(mode, {})}).at_length(64)
    numbers = range(ranks.rank(), 8, 2) if ranks.count() > 1 else range(8)
    scored = batch["labels"][:, 1:] != IGNORE
    found = model(**batch, statistics=("logp", "entropy"))
    logp, entropy = (found[n].new_zeros(scored.shape).masked_scatter(scored, found[n]) for n in ("logp", "entropy"))
    at = torch.arange(scored.shape[1]) - scored.long().argmax(1)[:, None]  # counted from the first completion token
    shift = 0.2 * torch.sin(torch.tensor([[float(i)] for i in numbers]) + at) * scored
    advantage = torch.tensor([(-1.0) ** i * (1 + i / 4) for i in numbers], dtype=torch.float64)
    reference = logp.detach() - shift
    if mode == "rl_frozen":
        with fixed.model_of("init") as init:
            known = init(**batch, statistics=("logp",))["logp"].detach()
            reference = known.new_zeros(scored.shape).masked_scatter(scored, known)
    part = Rows(
        mask=scored.double(),
        advantage=advantage,
        old_logp=logp.detach() + shift,
        ref_logp=reference,
        entropy=entropy,
        expert=None,
        correction=None,
        coefficient=None,
    )
    tokens = sum(label != IGNORE for r in rows for label in r["labels"][1:])
    counts = Counts(*(torch.tensor(float(n), dtype=torch.float64) for n in (tokens, 8, 0)))
    return goal.loss(logp, part, counts)[0]


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    for name in sys.argv[2:]:
        made = gradient(name, 2)
        if torch.distributed.get_rank() == 0:
            torch.save(made, Path(sys.argv[1]) / f"{name}.pt")
    torch.distributed.destroy_process_group()
