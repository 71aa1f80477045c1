"""`trl.GRPOTrainer` with a `Policy` for its loss: TRL samples and synchronises, the policy decides what is learned.

A generation's completions are split into optimizer steps of whole groups, and those into micro-batches of similar
length, without the padding that only other micro-batches need. Every mean is over the optimizer step, so the result
does not depend on the split.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor

from heatbath.data import rendering
from heatbath.errors import RunError
from heatbath.ideas.guided import Guided
from heatbath.ideas.implicit import Implicit
from heatbath.ideas.surrogates import ESTIMATORS, Counts, Policy, Rows, informative
from heatbath.stages import rollouts
from heatbath.stages.fixed_policies import FixedPolicies
from heatbath.stages.fused_forward import add_objective_forward
from heatbath.stages.sharding import as_sharded, gathered_weights, own_part, settle_sharding
from heatbath.stages.training import float32_adapters, require_finite, without_dropout
from heatbath.stages.vllm_server import explained
from heatbath.verify.verdict import STATUSES

# What TRL measures, under the name it has here; everything else TRL logs is dropped, above all its "loss", which is
# zero in expectation on-policy and tells nothing.
NAMES = {
    "own_reward": "reward",
    "hinted_reward": "hinted_reward",
    "expert_reward": "expert_reward",
    "expert_share": "expert_share",
    "informative_share": "informative_share",
    "generations": "generations",
    "completions/mean_length": "completion_tokens",
    "completions/clipped_ratio": "truncated_share",
    "sampling/sampling_logp_difference/mean": "sampler_gap",
    "implicit_loss": "implicit_loss",
    "score_deviation": "score_deviation",
    "buffer": "buffer",
    "sft_rows": "sft_rows",
    "sft_nll": "sft_nll",
    "sft_grad_norm": "sft_grad_norm",
    "step_time": "step_seconds",
    **{f"verdict/{status}": f"verdict/{status}" for status in STATUSES},
}
HELD_OUT = {"own_reward": "reward", "verdict/right": "right", "completions/mean_length": "tokens"}
HELD_OUT |= {"completions/clipped_ratio": "truncated_share"}


class PolicyTrainer(trl.GRPOTrainer):
    """`trl.GRPOTrainer` whose loss is a `Policy` over the optimizer step; log-probabilities and entropy come from the
    fused engine, for completion tokens only.

    Prompts are rendered by `data/rendering.py`, the one place that does it. `initial` is a frozen copy of the policy at
    the start and `base` the base model, for policies with a reference and for the KL to the start, which is measured
    every `kl_every` generations; under PEFT they are the adapter "init" (adapters off where there is none) and the
    model with its adapters off. Policies that learn from demonstrations read the column `demo`: the token ids of a
    solution, EOS included. Raises RunError for what the policy would need and is not given.
    """

    def __init__(
        self,
        *args: Any,
        policy: Policy,
        initial: transformers.PreTrainedModel | None = None,
        base: transformers.PreTrainedModel | None = None,
        kl_every: int = 1,
        **kwargs: Any,
    ):
        given = kwargs.get("args") or (args[2] if len(args) > 2 else trl.GRPOConfig())
        require_only_what_the_policy_does(given)
        if kwargs.get("tools"):
            raise RunError("heatbath renders no tools into prompts", "tools", "use TRL's own trainer for them")
        with explained(given):
            super().__init__(*args, **kwargs)
        float32_adapters(self.model)
        self.policy, self.kl_every = policy.at_length(self.max_completion_length), kl_every
        settle_sharding(self)
        without_dropout(self.model)
        self.fixed = FixedPolicies(self.model, initial, base, self.accelerator.device)
        if self.accelerator.is_fsdp2:
            self.fixed.shard(**as_sharded(self.accelerator))
        if policy.needs_reference and not self.fixed.has(policy.reference):
            raise RunError(
                f"the policy's reference '{policy.reference}' is not there",
                "PolicyTrainer",
                "pass `initial` (a frozen copy of the model) or `base`, or set the policy's kl to 0",
            )
        self._require_whole_groups()
        add_objective_forward(self.model.get_base_model() if self.fixed.adapters else self.model)
        self._token_sums: dict[str, dict[str, Any]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        self._generations = self._epochs_done = 0
        self._spare = rollouts.Spare(len(self.train_dataset) if policy.dynamic_sampling else 0, self.args.seed)
        self._asked: list[dict[str, Any]] = []
        self._copied: list[int] = []
        self._rewards = self._lengths = torch.zeros(0)
        self.add_callback(_FiniteGradients(self))

    # --- sampling ---------------------------------------------------------------------------------------------------

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        tokenizer = self.processing_class
        ids = [tokenizer(p)["input_ids"] if isinstance(p, str) else rendering.prompt_ids(tokenizer, p) for p in prompts]
        return ids, None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        # One outer autocast context keeps the 16-bit copies of the weights for the whole generation; without it they
        # are cast again at every token. vLLM has a precision of its own.
        sampling = explained(self.args) if self.use_vllm else gathered_weights(self.model, self.accelerator)
        with sampling, nullcontext() if self.use_vllm else self.accelerator.autocast():
            if isinstance(self.policy, Guided) and self.model.training:
                completions, logps, self._copied = rollouts.guided(
                    self, self.policy, prompt_ids, self._asked, super()._generate_single_turn
                )
                return completions, logps
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = self._one_generation(inputs)
        if self.policy.dynamic_sampling and self.model.training:
            output, rounds = rollouts.refilled(self, output, inputs, self._spare)
            self._metrics["train"]["generations"].append(rounds)
        return output

    def _one_generation(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's generation with this policy's advantages, the rewards and group numbers behind them, [B], and a mask of
        what was copied from demonstrations, [B, T]."""
        mode = "train" if self.model.training else "eval"
        self._asked, self._copied = inputs, [0] * len(inputs)
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        copied = torch.tensor(self._copied, device=output["completion_ids"].device)
        mask = _scored(output)
        everyone = self.accelerator.gather(torch.stack([mask.sum(1), copied], 1))
        scored, everyone_copied = everyone[:, 0], everyone[:, 1]
        size = self.num_generations if mode == "train" else self.num_generations_eval
        groups = torch.arange(len(self._rewards), device=mask.device) // size
        rewards = self.policy.shaped(self._rewards, self._lengths)
        if self.policy.couples_groups:  # a completion of which nothing is scored has no implicit reward to compare with
            rewards = rewards.masked_fill(scored == 0, torch.nan)
        mine = slice(len(inputs) * (i := self.accelerator.process_index), len(inputs) * (i + 1))
        output |= {
            "advantages": self._advantages(rewards, groups)[mine] if mode == "train" else rewards[mine] * 0.0,
            "rewards": rewards[mine],
            "groups": groups[mine],
            "informative": informative(self._rewards, groups)[mine],
        }
        measured = self._metrics[mode]
        measured["rows"].append(len(inputs))
        traces = (everyone_copied > 0) & (everyone_copied >= self._lengths)
        kinds = {
            "own_reward": everyone_copied == 0,
            "hinted_reward": (everyone_copied > 0) & ~traces,
            "expert_reward": traces,
        }
        for name, rows in kinds.items():
            if bool(rows.any()):
                measured[name].append(self._rewards[rows].nanmean().item())
        if isinstance(self.policy, Guided) and mode == "train":
            output["expert"] = mask * (torch.arange(mask.shape[1], device=mask.device) < copied[:, None])
            measured["expert_share"].append((everyone_copied.sum() / scored.sum().clamp(min=1)).item())
        return output

    def _advantages(self, rewards: Tensor, groups: Tensor) -> Tensor:
        try:
            return self.policy.advantages(rewards, groups)
        except ValueError as error:  # a function of the user's own
            raise RunError(
                str(error), "rl.policy.advantage", "f(rewards [B], groups [B]) -> [B], docs/rl.md"
            ) from error

    def _calculate_rewards(self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """TRL's rewards of all ranks; kept are their weighted sum, [B] (NaN: no reward function gave one), and the
        tokens of the completions, [B], truncated ones included."""
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        mode = "train" if self.model.training else "eval"
        lengths = torch.tensor([len(ids) for ids in completion_ids_list], device=rewards.device)
        self._lengths = self.accelerator.gather(lengths)
        if rewards.isnan().all() and mode == "train" and len(inputs) == len(self._asked):
            raise RunError(
                "no completion of this step got a reward: every one was missing or not a number",
                f"step {self.state.global_step + 1}, {', '.join(self.reward_func_names)}",
                "check the gold answers, and what the reward functions return",
            )
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        self._rewards = total.double().masked_fill(rewards.isnan().all(1), torch.nan)
        size = self.num_generations if mode == "train" else self.num_generations_eval
        groups = torch.arange(len(total), device=total.device) // size
        if len(total) % size == 0:  # rounds of guided groups are graded in parts
            share = informative(self._rewards, groups).float().mean().item()
            self._metrics[mode]["informative_share"].append(share)
        return rewards

    # --- the split into steps and micro-batches ---------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """The next micro-batch; at the start of a generation samples it first (TRL's method, whose shuffle would tear
        groups apart and whose padding is the whole generation's)."""
        if not self.model.training:
            output: dict[str, Any] = self._generate_and_score_completions(generation_batch)
            if self.fixed.has("init"):
                output["initial_logps"] = self.logps(output, "init")
            return output
        per_generation, window = self.args.steps_per_generation, self.args.gradient_accumulation_steps
        if self._step % (per_generation * self.num_iterations) == 0 or self._buffered_inputs is None:
            self._buffered_inputs = self._split(self._generate_and_score_completions(generation_batch))
            self._generations += 1
        index = self._step % per_generation
        if index % window == 0 and self.policy.couples_groups:
            self._couple(self._buffered_inputs[index : index + window])
        batch: dict[str, Any] = self._buffered_inputs[index]
        return batch

    def _split(self, output: dict[str, Any]) -> list[dict[str, Any]]:
        """Micro-batches in the order in which they are trained on, each with the counts of its optimizer step and the
        log-probabilities that the policy compares with."""
        window = self.args.gradient_accumulation_steps
        steps = self.args.steps_per_generation // window
        measure = self._generations % self.kl_every == 0 and self.fixed.has("init")
        out = []
        for step, rows in enumerate(rollouts.whole_groups(output["groups"], steps)):
            length = output["prompt_mask"][rows].sum(1) + output["completion_mask"][rows].sum(1)
            order = rows[length.argsort(descending=True, stable=True)]
            batches = [rollouts.trimmed(output, part) for part in order.tensor_split(window)]
            counts = self._counts(batches)
            for batch in batches:
                batch["counts"] = counts
                # The first step of a generation trains the very policy that sampled it.
                again = self.policy.reads_old and (step > 0 or self.num_iterations > 1)
                if again and "old_per_token_logps" not in batch:
                    batch["old_per_token_logps"] = self.logps(batch)
                if self.policy.needs_reference:
                    batch["ref_logps"] = self.logps(batch, self.policy.reference)
                if measure:
                    same = self.policy.needs_reference and self.fixed.same(self.policy.reference, "init")
                    batch["initial_logps"] = batch["ref_logps"] if same else self.logps(batch, "init")
            out += batches
        return out

    def _counts(self, batches: list[dict[str, Any]]) -> Counts:
        """Of an optimizer step, over its micro-batches and all ranks."""
        sums = torch.zeros(3, device=self.accelerator.device)
        for batch in batches:
            rows = _rows(batch, None)
            sums += torch.stack([rows.own.sum(), torch.tensor(float(len(rows.mask))), (rows.mask - rows.own).sum()])
        tokens, sequences, expert = self.accelerator.gather(sums[None]).sum(0)
        return Counts(tokens, sequences, expert)

    def _couple(self, window: list[dict[str, Any]]) -> None:
        """Gives each completion of an optimizer step the derivative of its group's loss in its score, for which all
        scores of the step are computed first, without gradient, on every rank."""
        policy = self.policy
        assert isinstance(policy, Implicit)
        if len(window) == 1 and self.accelerator.num_processes == 1:
            return  # the forward pass with gradient sees them all
        scores = torch.cat([policy.scores(self.logps(batch), _rows(batch, None)) for batch in window])
        coefficients = self._coefficients(window, scores)
        for batch, part in zip(window, coefficients.split([len(b["groups"]) for b in window]), strict=True):
            batch["coefficient"] = part

    def _coefficients(self, window: list[dict[str, Any]], scores: Tensor) -> Tensor:
        policy = self.policy
        assert isinstance(policy, Implicit)
        rewards, groups = (torch.cat([batch[name] for batch in window]) for name in ("rewards", "groups"))
        lengths = torch.cat([_rows(batch, None).own.sum(1) for batch in window])
        columns = [x.double() for x in (scores.detach(), rewards, groups, lengths)]
        everyone = self.accelerator.gather(torch.stack(columns, 1))
        score, reward, group, length = everyone.unbind(1)
        a, loss = policy.coefficients(score, reward, group.long(), length)
        self._metrics["train"]["implicit_loss"].append(loss.item())
        self._metrics["train"]["score_deviation"].append(policy.deviation(score, reward, group.long()).item())
        first = self.accelerator.process_index * len(scores)
        return a[first : first + len(scores)]

    def _require_whole_groups(self) -> None:
        """Steps of whole groups need as many rows of each rank; some policies cannot do without."""
        args = self.args
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        several = args.steps_per_generation > args.gradient_accumulation_steps
        coupled = self.policy.couples_groups and several
        if rows % self.num_generations and (coupled or self.policy.dynamic_sampling or isinstance(self.policy, Guided)):
            raise RunError(
                f"a step of {rows} completions on each process does not hold whole groups of {self.num_generations}",
                "per_device_train_batch_size × gradient_accumulation_steps",
                "make it a multiple of num_generations",
            )

    # --- the loss ---------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *_: Any, **__: Any
    ) -> tuple[Tensor | None, None, None]:
        """TRL asks for the log-probabilities of the policy that sampled: with vLLM they are compared with vLLM's own;
        otherwise `_split` makes those that are needed."""
        if not self.use_vllm:
            return None, None, None
        prompt = input_ids.shape[1] - logits_to_keep
        whole = {
            "prompt_ids": input_ids[:, :prompt],
            "prompt_mask": attention_mask[:, :prompt],
            "completion_ids": input_ids[:, prompt:],
            "completion_mask": attention_mask[:, prompt:],
        }
        return self.logps(whole), None, None

    @torch.no_grad()
    def logps(self, output: dict[str, Any], fixed: str | None = None) -> Tensor:
        """ℓ of each completion token, [B, T] (0 where nothing is scored), of the policy as it is or of a fixed one."""
        rows = torch.arange(len(output["completion_ids"]), device=output["completion_ids"].device)
        parts, T = rows.split(self.args.per_device_train_batch_size), output["completion_ids"].shape[1]
        found = []
        with self.fixed.model_of(fixed) as model:
            for part in parts:
                logp = self._statistics(model, rollouts.trimmed(output, part), ("logp",))["logp"]
                found.append(torch.nn.functional.pad(logp, (0, T - logp.shape[1])))
        return torch.cat(found)

    def _statistics(self, model: Any, batch: dict[str, Any], names: tuple[str, ...]) -> dict[str, Tensor]:
        """Statistics of the completion tokens, each [B, T] with 0 where nothing is scored."""
        scored = _scored(batch).bool()
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        counted = torch.cat([torch.zeros_like(batch["prompt_mask"]).bool(), scored], dim=1)
        with self.accelerator.autocast():
            found = model(
                input_ids=ids,
                attention_mask=torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
                labels=ids.masked_fill(~counted, rendering.IGNORE),
                statistics=names,
                temperature=self.temperature,
            )
        return {name: v.new_zeros(scored.shape).masked_scatter(scored, v) for name, v in found.items()}

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        if not self.model.training:
            for rows in torch.arange(len(inputs["completion_ids"])).split(self.args.per_device_train_batch_size):
                part = rollouts.trimmed(inputs, rows.to(inputs["completion_ids"].device))
                found = self._statistics(model, part, ("logp", "entropy"))
                self._measure("eval", part, found["logp"], {"entropy": found["entropy"]})
            return torch.zeros((), device=self.accelerator.device)
        found = self._statistics(model, inputs, ("logp", "entropy"))
        logp, entropy = found["logp"], found["entropy"]
        if self.policy.couples_groups and "coefficient" not in inputs:
            assert isinstance(self.policy, Implicit)
            scores = self.policy.scores(logp, _rows(inputs, None))
            inputs = inputs | {"coefficient": self._coefficients([inputs], scores)}
        try:
            loss, measured = self.policy.loss(logp, _rows(inputs, entropy), inputs["counts"])
        except ValueError as error:  # a function of the user's own
            remedy = "f(ratio [B, T], advantage [B, 1], logp [B, T]) -> [B, T], docs/rl.md"
            raise RunError(str(error), "rl.policy.surrogate", remedy) from error
        require_finite(loss, f"step {self.state.global_step + 1}", "lower rl.lr")
        self._measure("train", inputs, logp, {"entropy": entropy.detach(), **measured})
        return loss * self.accelerator.num_processes  # DDP averages gradients; the counts already span all ranks

    def _measure(self, mode: str, batch: dict[str, Any], logp: Tensor, values: dict[str, Tensor]) -> None:
        """Adds to the token sums, on the device; means are taken at the next log."""
        own = _rows(batch, None).own
        if "initial_logps" in batch:
            values["kl_init"] = ESTIMATORS["k3"](logp.detach(), batch["initial_logps"])
        for name, value in values.items():
            kept = torch.where(own.bool(), value, 0.0)  # 0·inf is NaN
            self._token_sums[mode][name] += torch.stack([kept.sum(), own.sum()]).double()

    # --- evaluation, resuming, the log -------------------------------------------------------------------------------

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with torch.random.fork_rng():  # the same draw at every evaluation, and none of the training's
            torch.manual_seed(self.args.seed + self.accelerator.process_index)
            found: dict[str, float] = super().evaluate(*args, **kwargs)
        return found

    def carried(self) -> dict[str, Any]:
        """What a resumed stage must know; everything else is empty where a generation ends."""
        epochs = int(self.state.epoch + 1e-6)
        return {"generations": self._generations, "epochs": epochs, "spare": self._spare.drawn}

    def carry_on(self, state: dict[str, Any]) -> None:
        self._generations, self._epochs_done = state["generations"], state["epochs"]
        self._spare.drawn = state.get("spare", 0)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Any:
        """TRL's sampler shuffles with one generator that goes on from epoch to epoch: a resumed one is moved up."""
        sampler = super()._get_train_sampler(dataset)
        for _ in range(self._epochs_done):
            torch.randperm(sampler.num_samples, generator=sampler.generator)
        return sampler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Token-weighted means since the last log, and what TRL measured once per generation."""
        held_out = any(key.startswith("eval_") for key in logs)
        mode = "eval" if held_out else "train"
        sums = self._token_sums[mode]
        if not sums:
            return  # the closing summary of transformers
        rows = self._metrics[mode].pop("rows", [])
        measured = {
            name: _mean(values, rows if held_out and len(values) == len(rows) else None)
            for name, values in self._metrics[mode].items()
            if values
        }
        self._metrics[mode].clear()
        values = {o: measured[t] for t, o in (HELD_OUT if held_out else NAMES).items() if t in measured}
        if len(self.reward_funcs) > 1:
            means = {f"reward/{name}": f"rewards/{name}/mean" for name in self.reward_func_names}
            values |= {ours: measured[theirs] for ours, theirs in means.items() if theirs in measured}
        for name in sorted(sums):
            total, count = self.accelerator.reduce(sums[name], "sum").tolist()
            values[name] = total / max(count, 1.0)
        sums.clear()
        if held_out:
            values = {f"held_out/{name}": value for name, value in values.items()}
        values |= {k: logs[k] for k in ("grad_norm", "learning_rate") if k in logs}
        transformers.Trainer.log(self, values, start_time)


class _FiniteGradients(transformers.TrainerCallback):
    """Raises RunError before a NaN or infinite gradient reaches the weights: a finite loss may have one."""

    def __init__(self, trainer: PolicyTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: transformers.TrainerState, control: Any, **_: Any) -> None:
        gradients = [own_part(p.grad) for p in self.trainer.model.parameters() if p.grad is not None]
        if gradients:
            largest = torch.stack([g.abs().max() for g in gradients if g.numel()]).max()
            require_finite(largest, f"a gradient at step {state.global_step + 1}", "lower rl.lr")


def _mean(values: list[float], weights: list[float] | None) -> float:
    pairs = [(v, w) for v, w in zip(values, weights or itertools.repeat(1.0), strict=False) if v == v]
    return sum(v * w for v, w in pairs) / sum(w for _, w in pairs) if pairs else float("nan")


def _scored(batch: dict[str, Any]) -> Tensor:
    """The completion tokens the policy itself wrote or was shown, [B, T]: what a tool returned is not its doing."""
    mask: Tensor = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def _rows(batch: dict[str, Any], entropy: Tensor | None) -> Rows:
    """A micro-batch as the policy reads it."""
    expert = batch.get("expert")
    return Rows(
        mask=_scored(batch).float(),
        advantage=batch["advantages"],
        old_logp=batch.get("old_per_token_logps"),
        ref_logp=batch.get("ref_logps"),
        entropy=entropy,
        expert=None if expert is None else expert.float(),
        correction=batch.get("importance_sampling_ratio"),
        coefficient=batch.get("coefficient"),
    )


# Settings of TRL that change its loss, and the values each may have: here the Policy decides.
LEFT_TO_THE_POLICY: dict[str, tuple[Any, ...]] = {
    "beta": (0.0,),
    "epsilon": (0.2,),
    "epsilon_high": (None, 0.2),
    "delta": (None,),
    "loss_type": ("dapo",),
    "scale_rewards": ("group", "none"),
    "multi_objective_aggregation": ("sum_then_normalize",),
    "importance_sampling_level": ("token",),
    "top_entropy_quantile": (1.0,),
    "entropy_coef": (0.0,),
    "use_adaptive_entropy": (False,),
    "chat_template_kwargs": (None, {}),
    "off_policy_mask_threshold": (None,),
}


def require_only_what_the_policy_does(arguments: trl.GRPOConfig) -> None:
    """Raises RunError for settings of TRL that would be ignored, or that would tear an optimizer step apart."""
    for name, allowed in LEFT_TO_THE_POLICY.items():
        given = getattr(arguments, name)
        if given not in allowed:
            raise RunError(f"{name} = {given!r} would be ignored", f"GRPOConfig.{name}", "set it in the policy instead")
    if arguments.steps_per_generation % arguments.gradient_accumulation_steps:
        raise RunError(
            f"{arguments.steps_per_generation} micro-batches per generation do not divide into optimizer steps of "
            f"{arguments.gradient_accumulation_steps}",
            "GRPOConfig.steps_per_generation",
            "make it a multiple of gradient_accumulation_steps",
        )
