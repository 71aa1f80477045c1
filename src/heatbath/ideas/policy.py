"""The table of RL policies: each name is a row of advantage × ratio × surrogate × reduction, with its source.

`policy("dapo", clip_high=0.3)` makes one; `policy_loss` is its readable truth, which the trainer's split computation
equals. The parts are in `surrogates.py`; what regresses rewards in `implicit.py`, what learns from demonstrations
during RL in `guided.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from heatbath.ideas.guided import Luffy, Relift, Trapo, Uft
from heatbath.ideas.implicit import Gvpo, Implicit
from heatbath.ideas.objectives import suggestion, typed
from heatbath.ideas.surrogates import Counts, Policy, Rows


@dataclass(frozen=True)
class Row:
    """A line of the table: the class, what it sets, where it is from, and what it needs beside prompts and rewards."""

    made: type[Policy]
    settings: dict[str, Any]
    source: str
    says: str
    needs: str = ""


# No-clip policy gradient of LUFFY, ReLIFT and TRAPO: centred advantages, Σ / width, entropy bonus.
_UNCLIPPED = {"surrogate": "linear", "reduction": "sum_over_width", "entropy": 0.001}
POLICIES: dict[str, Row] = {
    "paper": Row(
        Policy,
        {},
        "arXiv 2601.09233, appendix E.2",
        "centred advantages, clip 0.2; token mean, no KL, no entropy, no dual clip are our reading (unstated)",
    ),
    "grpo": Row(
        Policy,
        {"advantage": "normalised", "reduction": "seq_mean_token_mean"},
        "arXiv 2402.03300",
        "advantages over the group's std, clip, mean over completions of their token means (its KL: kl = 0.04)",
    ),
    "dr_grpo": Row(
        Policy,
        {"reduction": "seq_mean_token_sum_norm"},
        "arXiv 2503.20783",
        "centred advantages; token sums over a constant length, so that neither length nor std weighs a completion",
    ),
    "dapo": Row(
        Policy,
        {"advantage": "normalised", "clip_high": 0.28, "overlong": 0.2, "dynamic_sampling": True},
        "arXiv 2503.14476",
        "clip-higher, token mean, groups of equal rewards sampled anew, overlong completions punished",
    ),
    "gspo": Row(
        Policy,
        {
            "advantage": "normalised",
            "ratio": "sequence",
            "reduction": "seq_mean_token_mean",
            "clip_low": 3e-4,
            "clip_high": 4e-4,
        },
        "arXiv 2507.18071",
        "one length-normalised ratio for a completion, clipped as a whole",
    ),
    "cispo": Row(
        Policy,
        {"advantage": "normalised", "surrogate": "cap", "clip_high": 5.0},
        "arXiv 2506.13585, clip_high as in TRL",
        "the ratio is a capped constant weight; every token keeps its gradient",
    ),
    "rloo": Row(
        Policy,
        {"advantage": "leave_one_out", "ratio": "product", "reduction": "seq_mean_token_mean"},
        "arXiv 2402.14740, clip as in TRL",
        "the mean of the others as baseline, one ratio for a completion",
    ),
    "reinforce": Row(
        Policy,
        {"advantage": "reward", "ratio": "none", "surrogate": "score", "reduction": "seq_mean_token_sum"},
        "Williams 1992",
        "−r·log π of the whole completion, no baseline, no ratio",
    ),
    "implicit": Row(
        Implicit,
        {},
        "arXiv 2510.23868",
        "Group-relative Implicit Fine-Tuning: log-ratios regressed on rewards, both normalised in the group",
        "the reference",
    ),
    "gvpo": Row(
        Gvpo,
        {},
        "arXiv 2504.19599",
        "centred log-ratios regressed on centred rewards, no standard deviation",
        "the reference",
    ),
    "luffy": Row(
        Luffy,
        _UNCLIPPED,
        "arXiv 2504.14945",
        "a demonstration among the rollouts, its tokens shaped by π/(π + γ)",
        "a solution of every prompt",
    ),
    "relift": Row(
        Relift,
        _UNCLIPPED,
        "arXiv 2506.07527",
        "RL, and SFT steps on the prompts that no rollout solved",
        "a solution of every prompt",
    ),
    "trapo": Row(
        Trapo,
        _UNCLIPPED,
        "arXiv 2512.17636",
        "longer and longer beginnings of the demonstration while the group fails, taught by TrSFT",
        "a solution of every prompt",
    ),
    "uft": Row(
        Uft,
        {"advantage": "normalised", "kl": 0.001, "entropy": 0.001},
        "arXiv 2505.16984",
        "hints that get shorter along a cosine, and a little SFT on them",
        "a solution of every prompt, the reference",
    ),
}


def policy(name: str, **hyper: Any) -> Policy:
    """The policy of that recipe name with these hyper-parameters, e.g. `policy("grpo", clip_high=0.28, kl=0.01)`.

    Parts of it (`advantage`, `ratio`, `surrogate`, `reduction`) may be replaced too. Raises ValueError on an unknown
    name or hyper-parameter, one out of range, and one without effect in this policy.
    """
    row = POLICIES.get(name)
    if row is None:
        raise ValueError(f"unknown policy '{name}'{suggestion(name, POLICIES)}; known: {', '.join(POLICIES)}")
    known, types = {f.name for f in dataclasses.fields(row.made)}, get_type_hints(row.made)
    for key in hyper:
        if key not in known:
            raise ValueError(f"policy '{name}' has no '{key}'{suggestion(key, dict.fromkeys(known))}")
    try:
        given = {key: _typed(key, value, types[key]) for key, value in hyper.items()}
        built = row.made(**row.settings | given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"policy '{name}': {error}") from None
    for key in hyper:
        if key not in built.takes:
            raise ValueError(f"policy '{name}' does not read '{key}'; it takes {', '.join(sorted(built.takes))}")
    return built


def _typed(key: str, value: Any, wanted: Any) -> Any:
    return None if value is None and type(None) in get_args(wanted) else typed(key, value, wanted)


def defaults(name: str) -> dict[str, Any]:
    """The hyper-parameters that a policy reads, with their defaults."""
    built = policy(name)
    return {f.name: getattr(built, f.name) for f in dataclasses.fields(built) if f.name in built.takes}


def policy_loss(
    policy: Policy,
    logp: Tensor,
    *,
    old_logp: Tensor,
    mask: Tensor,
    rewards: Tensor,
    groups: Tensor,
    ref_logp: Tensor | None = None,
    entropy: Tensor | None = None,
    expert: Tensor | None = None,
) -> Tensor:
    """The loss of an optimizer step, scalar, from whole groups: the truth that the trainer's split computation equals.

    `logp`, `old_logp`, `ref_logp` and `entropy` are [B, T] in nats (the latter differentiable like `logp`), `mask` and
    `expert` [B, T] of 0 and 1, `rewards` [B] (NaN: none), `groups` [B] integers, the prompt of each completion. Where
    `policy.length` is open it is T. Raises ValueError for a policy that reads what is not given, and for a group of
    one.
    """
    if int(torch.unique(groups, return_counts=True)[1].min()) < 2:
        raise ValueError("a group of one completion has nothing to be compared with: sample two or more of each prompt")
    policy, mask = policy.at_length(logp.shape[1]), mask.to(logp.dtype)
    expert = None if expert is None else expert.to(logp.dtype)
    rows = Rows(mask, old_logp=old_logp, ref_logp=ref_logp, entropy=entropy, expert=expert)
    lengths = mask.sum(1)
    shaped = policy.shaped(rewards.to(logp.dtype), lengths)
    counts = Counts.of(rows)
    if isinstance(policy, Implicit):
        loss = policy.group_loss(policy.scores(logp, rows), shaped, groups, lengths)
        return loss + policy.regularised(logp, rows, counts)[0]
    rows = dataclasses.replace(rows, advantage=policy.advantages(shaped, groups))
    return policy.loss(logp, rows, counts)[0]
