"""What the tests of the policy trainer share: a real TRL trainer on a model of 60 thousand parameters, and the truth
that its split computation must equal."""

from pathlib import Path

import torch
import trl
from datasets import Dataset

from conftest import small_model, small_tokenizer
from heatbath.data import rendering
from heatbath.ideas.policy import policy, policy_loss
from heatbath.ideas.surrogates import Policy
from heatbath.stages.policy_trainer import PolicyTrainer

G, PROMPTS, LONGEST = 4, 4, 10
# Hyper-parameters without which a policy would not fit these small groups, or its clips not bind.
HYPER = {
    "grpo": {"kl": 0.05},
    "dapo": {"dynamic_sampling": False},
    "gspo": {"clip_low": 0.01, "clip_high": 0.02},
    "cispo": {"clip_high": 1.05},
    "trapo": {"rounds": (2, 1, 1), "shares": (0.0, 0.5, 1.0), "thresholds": (-1.0, 0.5, 2.0)},
    "uft": {"hint_steps": 10, "kl": 0.1, "hint_loss": 0.5, "high": 0.5},
    "relift": {"sft_batch": 3},
}


def even_letters(completions, **_):
    """A reward with variance under a random model: the share of letters from the first half of the alphabet, in 64ths,
    which float32 holds exactly."""
    texts = [c[0]["content"].lower() for c in completions]
    return [round(64 * sum(ch < "n" for ch in t) / max(len(t), 1)) / 64 for t in texts]


def arguments(folder: Path, **kwargs) -> trl.GRPOConfig:
    settings = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "steps_per_generation": 4,
        "num_generations": G,
        "max_completion_length": LONGEST,
        "beta": 0.0,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    return trl.GRPOConfig(output_dir=str(folder), **{**settings, **kwargs})


def make(
    folder: Path,
    goal: Policy | None = None,
    cls=PolicyTrainer,
    reward=even_letters,
    dtype=torch.float64,
    own=None,
    **kwargs,
) -> trl.GRPOTrainer:
    """A trainer on 2·PROMPTS problems with demonstrations; `own` are arguments of PolicyTrainer, `kwargs` of TRL's."""
    tokenizer = small_tokenizer()
    rows = []
    for i in range(10, 10 + 2 * PROMPTS):
        demo = tokenizer.encode(f"{i} + {i} = {2 * i}"[: LONGEST - 1 - i % 3], add_special_tokens=False)
        rows.append({"prompt": [{"role": "user", "content": f"What is {'1' * (i % 4)}{i}?"}], "demo": [*demo, 1]})
    extra = {}
    if issubclass(cls, PolicyTrainer):
        extra = {
            "policy": goal or policy("paper"),
            "initial": small_model(3).to(dtype),
            "base": small_model(4).to(dtype),
            "kl_every": 1,
            **(own or {}),
        }
    return cls(
        model=small_model().to(dtype),
        args=arguments(folder, **kwargs),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[: 2 * PROMPTS - 1]),
        processing_class=tokenizer,
        reward_funcs=[reward],
        **extra,
    )


def recorded_window(trainer: trl.GRPOTrainer) -> list[dict]:
    """One generation of the trainer, split as it would train on it."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    torch.manual_seed(5)
    rows = [trainer.train_dataset[i] for i in range(PROMPTS) for _ in range(G)]
    trainer._prepare_inputs(rows)
    return trainer._buffered_inputs


def move(model: torch.nn.Module, by: float = 0.03) -> None:
    """Away from the policy that sampled, so that ratios differ from 1 and clips bind."""
    for p in model.parameters():
        p.data += by * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=torch.float64).to(
            p
        )


def steps(trainer: trl.GRPOTrainer, batches: list[dict]) -> list[list[dict]]:
    window = trainer.args.gradient_accumulation_steps
    return [batches[i : i + window] for i in range(0, len(batches), window)]


def plain(model: torch.nn.Module, batches: list[dict], temperature: float) -> tuple[torch.Tensor, ...]:
    """ℓ and H of each completion token, [B, T], from the model's own logits, each row alone and without padding."""
    logps, entropies = [], []
    for batch in batches:
        for i in range(len(batch["completion_ids"])):
            prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
            ids = torch.cat([prompt, batch["completion_ids"][i][batch["completion_mask"][i].bool()]])
            log_pi = (model(input_ids=ids[None]).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)
            logps.append(log_pi.gather(-1, ids[len(prompt) :, None])[:, 0])
            entropies.append(-(log_pi.exp() * log_pi).sum(-1))
    return tuple(torch.nn.utils.rnn.pad_sequence(x, batch_first=True) for x in (logps, entropies))


def rows_of(batches: list[dict], name: str) -> torch.Tensor:
    """A column of all rows of the batches, [B] or [B, T]."""
    values = [row for batch in batches for row in batch[name]]
    return torch.stack(values) if values[0].dim() == 0 else torch.nn.utils.rnn.pad_sequence(values, batch_first=True)


def texts(trainer: trl.GRPOTrainer, batches: list[dict]) -> list[list[dict]]:
    kept = [i[m.bool()] for b in batches for i, m in zip(b["completion_ids"], b["completion_mask"], strict=True)]
    return [[{"content": t}] for t in trainer.processing_class.batch_decode(kept, skip_special_tokens=True)]


def truth(trainer: PolicyTrainer, batches: list[dict], old: torch.Tensor | None) -> torch.Tensor:
    """`policy_loss` of an optimizer step from plain logits; `old` is ℓ of the policy that sampled, None the model."""
    logp, entropy = plain(trainer.model, batches, trainer.temperature)
    reference = trainer.fixed.models[trainer.policy.reference] if trainer.policy.reference != "old" else trainer.model
    with torch.no_grad():
        ref = plain(reference, batches, trainer.temperature)[0]
    T = logp.shape[1]
    return policy_loss(
        trainer.policy,
        logp,
        old_logp=logp.detach() if old is None else old,
        mask=rows_of(batches, "completion_mask")[:, :T],
        rewards=torch.tensor(trainer.reward_funcs[0](completions=texts(trainer, batches)), dtype=torch.float64),
        groups=rows_of(batches, "groups"),
        ref_logp=ref,
        entropy=entropy,
        expert=rows_of(batches, "expert")[:, :T] if "expert" in batches[0] else None,
    )


def gradient(loss: torch.Tensor, model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def prompt_of(trainer: trl.GRPOTrainer, row: int) -> list[int]:
    return rendering.prompt_ids(trainer.processing_class, trainer.train_dataset[row]["prompt"])


def two_steps(folder: Path, name: str, micro: int, accumulation: int) -> dict[str, torch.Tensor]:
    """The weights after two SGD steps, each on 3 groups of 4 given completions, over however many processes there are
    (with two of them the middle group is torn)."""
    generator = torch.Generator().manual_seed(9)
    given = [
        [
            torch.randint(4, 60, (int(n),), generator=generator).tolist()
            for n in torch.randint(1, LONGEST, (3 * G,), generator=generator)
        ]
        for _ in range(2)
    ]
    trainer = make(
        folder,
        policy(name, **HYPER.get(name, {})),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=accumulation,
        optim="sgd",
        learning_rate=0.5,
        lr_scheduler_type="constant",
    )

    def sampled(prompt_ids: list, *_):
        first = trainer.accelerator.process_index * len(prompt_ids)
        return given[trainer.state.global_step][first : first + len(prompt_ids)], None

    trainer._generate_single_turn = sampled
    trainer.train()
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
