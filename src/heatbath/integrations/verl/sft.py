"""verl's SFT trainer with one of heatbath's objectives for its loss; runs in verl's environment.

    torchrun --nproc_per_node 8 -m heatbath.integrations.verl.sft model.path=… data.train_files=… \\
        +heatbath.objective.name=gift +heatbath.objective.beta=10.0 +heatbath.base=…

Where it enters: verl hands the logits of a micro-batch to its loss function, where `distillation_use_topk` is set, and
carries the numbers per token that come back to the loss, whatever the layout (`prepare_model_outputs` of its FSDP
engine). A frozen base runs on the same micro-batch beside the policy. The loss is `dense_loss` of `ideas/engine.py`, in
chunks that are computed again in backward; its mean is over all supervised tokens of the batch, as verl's own.

Not covered, and refused: sequence parallelism, fused kernels, objectives that read columns or change over the steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from heatbath.errors import RecipeError, RunError
from heatbath.ideas.engine import dense_statistics
from heatbath.ideas.objectives import objective
from heatbath.ideas.statistics import STATS, TOPK, Objective, TokenStats, needs_reference

LOSS = "heatbath_loss"
CHUNK_ELEMENTS = 2**27  # of one [C, V] buffer in float32: 512 MiB


def require_carried(spec: Any) -> Objective:
    """The objective of a recipe's `sft.objective`. Raises RecipeError for one that verl's trainer cannot feed."""
    goal = objective(spec.name, **spec.hyper)
    reads = [*getattr(goal, "columns", ()), *(("old_logp",) if hasattr(goal, "refresh") else ())]
    beta = getattr(goal, "beta", 0.0)
    trouble = None
    if reads:
        trouble = f"'{spec.name}' reads {', '.join(reads)}, which verl's rows do not carry"
    elif not isinstance(beta, float):
        trouble = f"beta = {spec.hyper['beta']} is not a number"
    elif hasattr(goal, "calibrate") and getattr(goal, "threshold", 0.0) is None:
        trouble = f"'{spec.name}' has no threshold yet"
    if trouble:
        raise RecipeError(trouble, "sft.objective", "give a number (heatbath surprise measures), or take heatbath sft")
    return goal


class RenderedRows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The rows of heatbath's `sft.parquet` for verl's SFT trainer (`data.custom_cls`): token ids and loss mask as they
    were rendered, whatever verl would make of the chat template."""

    def __init__(self, parquet_files: Any, tokenizer: Any = None, config: Any = None, **_: Any):
        import pyarrow.parquet

        paths = [parquet_files] if isinstance(parquet_files, str) else list(parquet_files)
        self.rows = [row for path in paths for row in pyarrow.parquet.read_table(path).to_pylist()]
        if (config or {}).get("pad_mode", "no_padding") != "no_padding":
            raise RecipeError("rows are not padded here", "data.pad_mode", "no_padding")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.tensor(self.rows[index]["input_ids"])
        return {
            "input_ids": ids,
            "position_ids": torch.arange(len(ids)),
            "loss_mask": torch.tensor(self.rows[index]["loss_mask"]),
        }


class ObjectiveLoss:
    """verl's loss function: called with the logits of a micro-batch for each token's loss, then for their mean."""

    def __init__(self, goal: Objective, base: Any | None):
        """`base` is a `heatbath.reference.FrozenBase`, for objectives that read the base."""
        if needs_reference(goal) and base is None:
            raise RecipeError(f"{type(goal).__name__} reads the base model", "heatbath.base", "name its folder")
        self.goal, self.base = goal, base if needs_reference(goal) else None

    def __call__(self, *, data: Any, student_logits: Tensor | None = None, model_output: Any = None, **_: Any) -> Any:
        if student_logits is not None:
            return {LOSS: self.per_token(student_logits[0], data)[None]}
        total = model_output[LOSS].values().sum()
        return total / data["batch_num_tokens"] * data["dp_size"], {}

    def per_token(self, logits: Tensor, data: Any) -> Tensor:
        """Loss of each position of a packed micro-batch, from its logits [M, V]; 0 where nothing is learned. [M]"""
        ids, ends = data["input_ids"].values(), data["input_ids"].offsets()[1:] - 1
        if len(logits) != len(ids):
            raise RunError("sequence parallelism is not covered", "engine.ulysses_sequence_parallel_size", "1")
        labels = ids.roll(-1)
        supervised = data["loss_mask"].values().roll(-1).bool()
        supervised[ends] = False  # what follows the end is another sequence's beginning
        segments = torch.repeat_interleave(
            torch.arange(len(ends), device=ids.device), data["input_ids"].offsets().diff()
        )
        hidden = None if self.base is None else self._base_hidden(data)[supervised]
        with torch.autocast(logits.device.type, enabled=False):
            stats = self._statistics(logits[supervised], labels[supervised], hidden)
            if hasattr(self.goal, "sequence_weights"):
                with torch.no_grad():
                    stats.columns["sequence_weight"] = self.goal.sequence_weights(stats, segments[supervised])
            loss = self.goal(stats)
        return torch.zeros(len(ids), dtype=loss.dtype, device=loss.device).masked_scatter(supervised, loss)

    def _statistics(self, logits: Tensor, labels: Tensor, hidden: Tensor | None) -> TokenStats:
        """What the objective reads, [N]; the [C, V] of a chunk live only while it is worked on."""
        wanted = {*self.goal.needs, "logp", *getattr(self.goal, "sequence_needs", ())}
        names = [name for name in STATS if name in wanted]
        topk = getattr(self.goal, "topk", TOPK)

        def of(z: Tensor, y: Tensor, h: Tensor | None) -> tuple[Tensor, ...]:
            made = dense_statistics(wanted, z, None if h is None else self._base_logits(h), y, topk)
            return tuple(getattr(made, name) for name in names)

        size = max(1, CHUNK_ELEMENTS // logits.shape[-1])
        starts = range(0, max(len(labels), 1), size)
        parts = [
            checkpoint(
                of,
                logits[i : i + size],
                labels[i : i + size],
                None if hidden is None else hidden[i : i + size],
                use_reentrant=False,
            )
            for i in starts
        ]
        found = dict(zip(names, (torch.cat(column) for column in zip(*parts, strict=True)), strict=True))
        return TokenStats(vocab_size=logits.shape[-1], columns={}, **found)

    @torch.no_grad()
    def _base_hidden(self, data: Any) -> Tensor:
        """The base's final hidden states of the same tokens, [M, d]."""
        assert self.base is not None
        ids, lengths = data["input_ids"], data["input_ids"].offsets().diff()
        width = int(lengths.max())
        real = torch.arange(width, device=lengths.device)[None] < lengths[:, None]
        padded = torch.nested.to_padded_tensor(ids, padding=0, output_size=(len(lengths), width))
        positions = torch.arange(width, device=padded.device)[None].expand_as(padded)
        with torch.autocast(padded.device.type, enabled=False):
            hidden: Tensor = self.base.hidden(input_ids=padded, attention_mask=real.long(), position_ids=positions)
        return hidden[real]

    @torch.no_grad()
    def _base_logits(self, hidden: Tensor) -> Tensor:
        """[C, V] in float32 at least."""
        assert self.base is not None
        head, given = self.base.head, self.base.transform
        wide = torch.promote_types(head.dtype, torch.float32)
        z = hidden.to(wide) @ head.to(wide).T * given.get("scale", 1.0)
        return given["softcap"] * torch.tanh(z / given["softcap"]) if "softcap" in given else z


def frozen_base(path: str, dtype: torch.dtype, device: Any) -> Any:
    """The base, whole on every process."""
    from transformers import AutoModelForCausalLM

    from heatbath.reference import FrozenBase

    return FrozenBase(AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device))


def trainer_class() -> type:
    """verl's SFT trainer with the objective of `config.heatbath`."""
    from verl.trainer.sft_trainer import SFTTrainer
    from verl.utils.device import get_device_id
    from verl.utils.torch_dtypes import PrecisionType

    class ObjectiveSFTTrainer(SFTTrainer):  # type: ignore[misc]
        def _build_engine(self) -> None:
            super()._build_engine()
            own, engine = self.config.heatbath, self.engine
            if self.model_config.use_fused_kernels:
                raise RecipeError("fused kernels hand over no logits", "model.use_fused_kernels", "false")
            hyper = {key: value for key, value in own.objective.items() if key != "name"}
            goal = objective(own.objective.name, **hyper)
            base = None
            if needs_reference(goal):
                mixed = self.engine_config.mixed_precision or {}
                dtype = PrecisionType.to_dtype(own.get("dtype") or mixed.get("param_dtype", "bf16"))
                base = frozen_base(str(own.base), dtype, get_device_id())
            self.loss_fn = ObjectiveLoss(goal, base)
            self.training_client.set_loss_fn(self.loss_fn)
            engine.forward_backward_batch = functools.partial(_with_logits, engine.forward_backward_batch)

    return ObjectiveSFTTrainer


def _with_logits(run: Callable[..., Any], data: Any, *given: Any, **more: Any) -> Any:
    """Asks verl to hand the logits to the loss function, and to leave its own log-probabilities out."""
    from verl.utils import tensordict_utils

    tensordict_utils.assign_non_tensor(data, distillation_use_topk=True, distillation_only=True)
    return run(data, *given, **more)


def main() -> None:
    """verl's own main function with that trainer."""
    import hydra
    from verl.trainer import sft_trainer
    from verl.utils.device import auto_set_device

    @hydra.main(config_path="pkg://verl.trainer.config", config_name="sft_trainer_engine", version_base=None)
    def run(config: Any) -> None:
        auto_set_device(config)
        sft_trainer.SFTTrainer = trainer_class()
        sft_trainer.run_sft(config)

    run()


if __name__ == "__main__":
    main()
