"""Offline preference as rows of losses: DPO on pairs, UNA on scores, labels and pairs.

The implicit reward of a completion is r = β·Σ_t (log π(y_t) − log π_ref(y_t)), a sum over its tokens, EOS included; the
term β·log Z(x) of the prompt is left out, as both papers do. R rows, each loss is [R]; nothing is reduced here. β is
DPO's, a price on leaving the reference, and not GIFT's threshold of surprise.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

Comparison = Literal["mse", "bce"]


def implicit_reward(logp: Tensor, ref_logp: Tensor, beta: Tensor | float) -> Tensor:
    """β·(Σ log π − Σ log π_ref) of completions whose log-probabilities are summed already (arXiv 2305.18290, eq. 5)."""
    return beta * (logp - ref_logp)


def dpo(chosen: Tensor, rejected: Tensor) -> Tensor:
    """−log σ(r_chosen − r_rejected), [R] (arXiv 2305.18290, eq. 7)."""
    return -F.logsigmoid(chosen - rejected)


def una_scored(reward: Tensor, target: Tensor, comparison: Comparison = "mse") -> Tensor:
    """The implicit score σ(r) against an explicit one in [0, 1], [R] (arXiv 2408.15339, section 3). A label is a target
    of 1 or 0.

    "mse": (σ(r) − s)², which the paper's eqs. 11 to 13 write with a stray minus. "bce": −s·log σ(r) − (1−s)·log σ(−r);
    the authors use it for labels alone, where one of the two terms is 0. Departures from their code: it takes log(1 −
    σ(r)), which is −∞ from r ≈ 17 on in float32, and sums over a batch of one.
    """
    if comparison == "mse":
        return (reward.sigmoid() - target).square()
    return -target * F.logsigmoid(reward) - (1 - target) * F.logsigmoid(-reward)


def una(reward: Tensor, target: Tensor, paired: Tensor, rejected: Tensor, comparison: Comparison = "mse") -> Tensor:
    """UNA of rows of any kind, [R]: DPO where `paired`, else the comparison with the target (arXiv 2408.15339).

    `reward` [R] is that of the only completion, or of the chosen one; `rejected` holds one number for each paired row,
    in their order; the target of such a row is not read.
    """
    loss = reward.new_zeros(reward.shape)
    loss[paired] = dpo(reward[paired], rejected)
    loss[~paired] = una_scored(reward[~paired], target[~paired], comparison)
    return loss
