"""What a recipe would cost on several GPUs: operations and GPU-hours of each stage, and memory where weights are
sharded. An estimate from counts alone, for models that no single device trains; every assumption is in `ASSUMED`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from heatbath.ideas.objectives import objective
from heatbath.ideas.policy import policy
from heatbath.ideas.statistics import needs_reference
from heatbath.recipe import Recipe

DEVICES = 8
DEVICE = "H200"
PEAK = 989e12  # dense bf16 operations per second of an H200, NVIDIA's data sheet
TRAINING, SAMPLING = 0.4, 0.1  # of the peak; sampling waits for memory
LARGE = 1_000_000_000  # parameters, above which a plan shows the cost
FORWARD, BACKWARD = 2, 4  # operations per parameter and token
CAPACITY = 141e9 / 2**30  # GiB of an H200
FROZEN = ("base", "frozen start", "frozen base")
# What every device holds only its part of.
SHARDINGS = {
    "ddp": (),
    "zero2": ("gradients", "optimizer"),
    "fsdp2": ("weights", "gradients", "optimizer", *FROZEN),
}
CACHED = "sampling"  # keys and values; every device holds those of its share of the completions

ASSUMED = (
    f"{FORWARD}·P operations per token forward and {BACKWARD}·P backward, activations recomputed (+{FORWARD}·P), "
    "attention scores not counted (about a tenth more at 8,192 tokens); every completion as long as it may be, so that "
    f"rl and eval take less; {TRAINING:.0%} of {PEAK / 1e12:,.0f} TFLOP/s in training, {SAMPLING:.0%} in sampling"
)


@dataclass(frozen=True)
class Work:
    """Operations of a stage: in passes over whole sequences, and token by token."""

    passes: float = 0.0
    sampled: float = 0.0

    @property
    def gpu_hours(self) -> float:
        return (self.passes / TRAINING + self.sampled / SAMPLING) / PEAK / 3600


def sft_work(recipe: Recipe, parameters: int, tokens: int, steps: int, rows: int) -> Work:
    """The warm start on demonstrations of `tokens` tokens in `rows` rows: `steps` steps of up to `sft.batch` rows."""
    settings = recipe.sft
    assert settings is not None
    goal = objective(settings.objective.name, **settings.objective.hyper)
    seen = tokens / rows * min(steps * settings.batch, rows * settings.epochs)
    per_token = 2 * FORWARD + BACKWARD  # with recomputation
    once = 0
    if needs_reference(goal):
        if settings.reference == "model":
            per_token += FORWARD
        else:
            once = FORWARD  # to fill the cache
    if hasattr(goal, "refresh"):
        per_token += FORWARD  # the old policy's view
    return Work(passes=parameters * (per_token * seen + once * tokens))


def rl_work(recipe: Recipe, parameters: int, prompt: float, counts: Mapping[str, int]) -> Work:
    """RL on prompts of `prompt` tokens in the mean; `counts` are the plan's of its stage."""
    settings = recipe.rl
    assert settings is not None
    method = policy(settings.policy.name, **settings.policy.hyper)
    views = float(method.needs_reference) + float(method.couples_groups)  # scores of whole groups come first
    if method.reads_old:  # the first step of a generation trains the very policy that sampled it
        views += 1 - settings.update_prompts / settings.prompts
    if not (method.needs_reference and method.reference == "init"):
        views += 1 / settings.kl_every  # the start's, to measure the KL
    per_token = 2 * FORWARD + BACKWARD + FORWARD * views
    whole, trained = prompt + settings.max_new_tokens, counts["completions"]
    sampled = trained + counts["readiness_completions"] + counts["held_out_completions"]
    return Work(passes=parameters * per_token * trained * whole, sampled=parameters * FORWARD * sampled * whole)


def preference_work(parameters: int, tokens: int) -> Work:
    """Learning from at most so many tokens of pairs, beside the frozen start."""
    return Work(passes=parameters * (3 * FORWARD + BACKWARD) * tokens)


def eval_work(parameters: int, tokens: int) -> Work:
    """Sampling of at most so many tokens."""
    return Work(sampled=parameters * FORWARD * tokens)


def sharded(parts: Mapping[str, float], devices: int = DEVICES, sharding: str = "fsdp2") -> dict[str, float]:
    """GiB on each of the devices, from those on one: what is sharded is divided, and so are the completions that are
    sampled; activations and logits are of each device's own micro-batch."""
    divided = (*SHARDINGS[sharding], CACHED)
    return {name: gib / devices if name in divided else gib for name, gib in parts.items()}


def gathered(parts: Mapping[str, float]) -> float:
    """GiB of the weights, whole in the precision of the step, that RL's own sampler gathers under FSDP2."""
    return parts["weights"] - parts["gradients"] or parts["gradients"]


def loading(parts: Mapping[str, float]) -> float:
    """GiB on each device before FSDP2 shards what was loaded whole: the weights (as large as their gradients) and the
    frozen models beside them."""
    return parts["gradients"] + sum(parts.get(name, 0.0) for name in FROZEN)


def summary(work: Mapping[str, Work]) -> dict[str, dict[str, float]]:
    """Operations and GPU-hours by stage, and their total."""
    total = Work(sum(w.passes for w in work.values()), sum(w.sampled for w in work.values()))
    return {
        stage: {"operations": w.passes + w.sampled, "gpu_hours": round(w.gpu_hours, 3)}
        for stage, w in {**work, "total": total}.items()
    }
