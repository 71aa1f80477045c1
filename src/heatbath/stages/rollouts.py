"""Completions between sampling and training: groups that are refilled, begun from demonstrations, and split.

B completions of this process, P and T the widths of prompts and completions, G completions of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from heatbath.errors import RunError
from heatbath.ideas.guided import Guided

if TYPE_CHECKING:
    from heatbath.stages.policy_trainer import PolicyTrainer

MOST_GENERATIONS = 10  # of dynamic sampling, as in DAPO's scripts


class Spare:
    """Further prompts for dynamic sampling: rows of the training set in shuffled order, again and again. `drawn` counts
    those taken so far, which is all that a resumed stage must know."""

    def __init__(self, rows: int, seed: int):
        self.rows, self.seed, self.drawn = rows, seed, 0

    def take(self, count: int) -> list[int]:
        out = []
        for i in range(self.drawn, self.drawn + count):
            epoch, place = divmod(i, self.rows)
            if place == 0 or not out:
                # not `seed` itself, which is TRL's order: a group would give way to one of the same prompts
                order = torch.randperm(
                    self.rows, generator=torch.Generator().manual_seed(self.seed + 7919 * (epoch + 1))
                )
            out.append(int(order[place]))
        self.drawn += count
        return out


def refilled(
    trainer: PolicyTrainer, first: dict[str, Any], inputs: list[dict[str, Any]], spare: Spare
) -> tuple[dict[str, Any], int]:
    """A generation whose groups all carry a signal, and how many were sampled for it: groups with equal rewards give
    way to those of further prompts (DAPO, arXiv 2503.14476). After `MOST_GENERATIONS` the rest stay as they are."""
    size, ranks = trainer.num_generations, trainer.accelerator.num_processes
    wanted, parts, rounds = len(inputs), [(first, first["informative"])], 1
    while rounds < MOST_GENERATIONS:
        have = torch.tensor(float(sum(int(keep.sum()) for _, keep in parts)), device=first["rewards"].device)
        if float(trainer.accelerator.gather(have).min()) >= wanted:
            break
        taken = spare.take(ranks * wanted // size)[trainer.accelerator.process_index * wanted // size :][
            : wanted // size
        ]
        more = trainer._one_generation([trainer.train_dataset[i] for i in taken for _ in range(size)])
        more["groups"] = more["groups"] + rounds * ranks * wanted
        parts.append((more, more["informative"]))
        rounds += 1
    whole = joined([part for part, _ in parts])
    keep = torch.cat([keep for _, keep in parts])
    order = torch.cat([keep.nonzero()[:, 0], (~keep).nonzero()[:, 0]])[:wanted]  # groups stay together
    return {k: v[order] if isinstance(v, Tensor) and v.dim() else v for k, v in whole.items()}, rounds


def joined(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Outputs of several generations as one: prompts padded on the left, completions on the right."""
    if len(parts) == 1:
        return parts[0]
    P = max(part["prompt_ids"].shape[1] for part in parts)
    T = max(part["completion_ids"].shape[1] for part in parts)

    def padded(part: dict[str, Any], name: str) -> Tensor:
        value: Tensor = part[name]
        if name.startswith("prompt_"):
            return torch.nn.functional.pad(value, (P - value.shape[1], 0))
        if value.dim() == 2 and value.shape[1] == part["completion_ids"].shape[1]:
            return torch.nn.functional.pad(value, (0, T - value.shape[1]))
        return value

    rows = [k for k, v in parts[0].items() if isinstance(v, Tensor) and v.dim()]
    return {k: torch.cat([padded(part, k) for part in parts]) if k in rows else v for k, v in parts[0].items()}


def whole_groups(groups: Tensor, steps: int) -> list[Tensor]:
    """Row numbers of each optimizer step, whole groups in random order; where a step cannot hold whole groups (they
    are spread over ranks), single rows in random order."""
    per_step = len(groups) // steps
    _, sizes = torch.unique_consecutive(groups, return_counts=True)
    size = int(sizes[0])
    if bool((sizes == size).all()) and per_step % size == 0:
        order = torch.randperm(len(sizes)).to(groups.device)
        rows = (order[:, None] * size + torch.arange(size, device=groups.device)).flatten()
    else:
        rows = torch.randperm(len(groups)).to(groups.device)
    return list(rows.split(per_step))


def trimmed(output: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Some rows of a generation, without the columns that are padding for all of them."""
    T = output["completion_ids"].shape[1]
    prompt, completion = output["prompt_mask"][rows], output["completion_mask"][rows]
    first = int((prompt.sum(0) > 0).int().argmax())
    last = max(int(completion.sum(0).nonzero().max()) + 1 if completion.any() else 1, 1)
    out: dict[str, Any] = {}
    for name, value in output.items():
        if not isinstance(value, Tensor) or not value.dim():
            out[name] = value
        elif name in ("prompt_ids", "prompt_mask"):
            out[name] = value[rows][:, first:]
        elif value.dim() == 2 and value.shape[1] == T:
            out[name] = value[rows][:, :last]
        else:
            out[name] = value[rows]
    return out


def guided(
    trainer: PolicyTrainer,
    policy: Guided,
    prompts: list[list[int]],
    asked: list[dict[str, Any]],
    sample: Callable[..., Any],
) -> tuple[list[list[int]], list[list[float | None]] | None, list[int]]:
    """Completions of groups that begin with some of their demonstration, in the policy's rounds: token ids, the
    sampler's log-probabilities where it gives them (None at copied tokens), and how many tokens each copied."""
    G, longest, step = trainer.num_generations, trainer.max_completion_length, trainer.state.global_step
    demos = [demonstration(row) for row in asked]
    # a draw of its own, so that policies without it see the same random numbers as without demonstrations
    seed = hash((trainer.args.seed, step, trainer.accelerator.process_index)) % 2**63
    draws = torch.rand(len(prompts) // G, generator=torch.Generator().manual_seed(seed)).tolist()
    ids: list[list[int]] = [[] for _ in prompts]
    logps: list[list[float | None]] = [[] for _ in prompts]
    copied = [0] * len(prompts)
    rewards: list[list[float]] = [[] for _ in draws]
    first = 0
    for number, count in enumerate(rounds := policy.rounds_of(G)):
        rows = [g * G + i for g in range(len(draws)) for i in range(first, first + count)]
        first += count
        for i in rows:
            share = policy.share(number, rewards[i // G], step, draws[i // G])
            ids[i] = demos[i][: round(share * len(demos[i]))][:longest]
            copied[i] = len(ids[i])
            logps[i] = [None] * copied[i]
        # Several ranks must ask alike: what is complete already is sampled with the others there, and dropped.
        together = trainer.accelerator.num_processes > 1
        asked_now = [i for i in rows if together or copied[i] < min(len(demos[i]), longest)]
        if asked_now:
            found, theirs = sample([prompts[i] + ids[i] for i in asked_now], None, {}, 1)
            for k, i in enumerate(asked_now):
                if copied[i] < min(len(demos[i]), longest):
                    ids[i] = (ids[i] + list(found[k]))[:longest]
                    logps[i] = (logps[i] + list(theirs[k]))[:longest] if theirs is not None else []
        if policy.reads_rewards and number + 1 < len(rounds):
            for i, reward in zip(rows, _graded(trainer, asked, ids, rows), strict=True):
                rewards[i // G].append(reward)
    return ids, logps if trainer.use_vllm else None, copied


def demonstration(row: dict[str, Any]) -> list[int]:
    """The token ids of a row's solution, EOS included. Raises RunError where there is none."""
    if not row.get("demo"):
        raise RunError("a prompt without a demonstration", "the column 'demo'", "give every prompt its solution")
    return list(row["demo"])


def _graded(trainer: PolicyTrainer, asked: list[dict[str, Any]], ids: list[list[int]], rows: list[int]) -> list[float]:
    """Rewards of a round, 0 where there is none; nothing of it is logged, since whole groups are graded again."""
    texts = trainer.processing_class.batch_decode([ids[i] for i in rows], skip_special_tokens=True)
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    pending = {name: list(values) for name, values in trainer._pending_metrics.items()}
    shares = list(trainer._metrics["train"]["informative_share"])
    inputs = [asked[i] for i in rows]
    trainer._calculate_rewards(inputs, [x["prompt"] for x in inputs], completions, [ids[i] for i in rows])
    trainer._pending_metrics.clear()
    trainer._pending_metrics.update(pending)
    trainer._metrics["train"]["informative_share"] = shares
    first = trainer.accelerator.process_index * len(rows)
    mine: list[float] = trainer._rewards[first : first + len(rows)].nan_to_num(nan=0.0).tolist()
    return mine
