"""ReLIFT (arXiv 2506.07527): RL, and between its steps fine-tuning on the questions that no rollout solved."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from heatbath.data.rendering import IGNORE
from heatbath.errors import RunError
from heatbath.ideas.guided import Relift
from heatbath.ideas.objectives import objective
from heatbath.stages.policy_trainer import PolicyTrainer
from heatbath.stages.rollouts import demonstration
from heatbath.stages.training import RowCollator, require_finite


class ReliftTrainer(PolicyTrainer):
    """`PolicyTrainer` with a buffer of unsolved prompts and their demonstrations, the newest in front, and an optimizer
    of its own for them.

    After each generation's last RL step, where the buffer holds `policy.sft_batch`, one SFT step is taken on that many;
    the rest stays. A prompt is unsolved where every completion got 0 (not: less than 0).
    """

    policy: Relift

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise RunError("ReLIFT's second optimizer is not sharded", "rl.policy", "train it under DDP")
        self.buffer: list[tuple[list[int], list[int]]] = []  # prompt ids, demonstration ids
        self._sft_optimizer: torch.optim.AdamW | None = None
        self._sft_state: dict[str, Any] | None = None
        self.add_callback(_FineTune(self))

    def _one_generation(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._one_generation(inputs)
        if self.model.training:
            size, rewards = self.num_generations, self._rewards
            unsolved = (rewards.view(-1, size) == 0).all(1).tolist()
            everyone = gather_object([(x["prompt"], demonstration(x)) for x in inputs])
            found = [everyone[g * size] for g, failed in enumerate(unsolved) if failed]
            prompts, _, _ = self._tokenize_prompts([prompt for prompt, _ in found])
            self.buffer = [(ids, demo) for ids, (_, demo) in zip(prompts, found, strict=True)] + self.buffer
            self._metrics["train"]["buffer"].append(float(len(self.buffer)))
        return output

    def fine_tune(self) -> None:
        """One step on the newest unsolved prompts, if there are enough of them."""
        policy = self.policy
        if len(self.buffer) < policy.sft_batch:
            return
        taken, self.buffer = self.buffer[: policy.sft_batch], self.buffer[policy.sft_batch :]
        world, rank, micro = self.accelerator.num_processes, self.accelerator.process_index, self._train_batch_size
        rows = [
            {"input_ids": prompt + demo, "labels": [IGNORE] * len(prompt) + demo, "length": len(prompt) + len(demo)}
            for prompt, demo in taken
        ]
        rows.sort(key=lambda row: row.pop("length"))
        passes = -(-len(rows) // (world * micro))  # every rank makes as many, or DDP would wait for ever
        ignored = {"input_ids": rows[0]["input_ids"], "labels": [IGNORE] * len(rows[0]["labels"])}
        mine = (rows + [ignored] * (passes * world * micro - len(rows)))[rank::world]
        tokens = sum(len(demo) for _, demo in taken)
        collate, goal = (
            RowCollator(self.processing_class.pad_token_id),
            objective("entropy", coefficient=policy.sft_entropy),
        )
        optimizer, nll = self._optimizer(), 0.0
        for start in range(0, len(mine), micro):
            batch = {k: v.to(self.accelerator.device) for k, v in collate(mine[start : start + micro]).items()}
            with self.accelerator.autocast():
                out = self.model_wrapped(**batch, objective=goal)
            loss = out["loss"] / tokens * world  # DDP averages gradients
            require_finite(loss, f"SFT after step {self.state.global_step}", "lower the policy's sft_lr")
            self.accelerator.backward(loss)
            nll += float(out["sums"].get("nll", 0.0))
        norm = torch.nn.utils.clip_grad_norm_(self._trained(), policy.sft_max_grad_norm)
        require_finite(norm, f"the gradient of SFT after step {self.state.global_step}", "lower the policy's sft_lr")
        optimizer.step()
        optimizer.zero_grad()
        total = self.accelerator.reduce(torch.tensor(nll, device=self.accelerator.device), "sum")
        for name, value in (
            ("sft_nll", float(total) / tokens),
            ("sft_grad_norm", float(norm)),
            ("sft_rows", len(taken)),
        ):
            self._metrics["train"][name].append(float(value))

    def _trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def _optimizer(self) -> torch.optim.AdamW:
        """Made at the first use: its moments are nobody else's."""
        if self._sft_optimizer is None:
            self._sft_optimizer = torch.optim.AdamW(
                self._trained(), lr=self.policy.sft_lr, betas=(0.9, 0.999), weight_decay=0.01
            )
            if self._sft_state is not None:
                self._sft_optimizer.load_state_dict(self._sft_state)
        return self._sft_optimizer

    def carried(self) -> dict[str, Any]:
        optimizer = self._sft_optimizer
        return super().carried() | {
            "buffer": self.buffer,
            "sft_optimizer": self._sft_state if optimizer is None else optimizer.state_dict(),
        }

    def carry_on(self, state: dict[str, Any]) -> None:
        super().carry_on(state)
        self.buffer, self._sft_state = [tuple(row) for row in state["buffer"]], state["sft_optimizer"]


class _FineTune(TrainerCallback):
    def __init__(self, trainer: ReliftTrainer):
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer = self.trainer
        if trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) == 0:
            trainer.fine_tune()
