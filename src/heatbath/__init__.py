"""heatbath warm-starts reinforcement learning of language models, runs the RL, and measures whether it helped.

Names are loaded when first used: `import heatbath` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heatbath import rewards
    from heatbath.cache import CachedBase, ReferenceCache
    from heatbath.errors import HeatbathError
    from heatbath.ideas.engine import dense_loss, linear_loss, linear_stats
    from heatbath.ideas.intervals import mean_with_interval, paired_difference
    from heatbath.ideas.objectives import objective
    from heatbath.ideas.passk import pass_at_k
    from heatbath.ideas.policy import policy, policy_loss
    from heatbath.ideas.statistics import Objective, TokenStats
    from heatbath.reference import AdaptersOff, FrozenBase
    from heatbath.stages.objective_trainer import ObjectiveMixin, ObjectiveTrainer
    from heatbath.stages.policy_trainer import PolicyTrainer
    from heatbath.stages.training import RowCollator
    from heatbath.verify.math import MathGrader
    from heatbath.verify.verdict import Verdict

_HOMES = {
    "CachedBase": "cache",
    "ReferenceCache": "cache",
    "HeatbathError": "errors",
    "dense_loss": "ideas.engine",
    "linear_loss": "ideas.engine",
    "linear_stats": "ideas.engine",
    "objective": "ideas.objectives",
    "mean_with_interval": "ideas.intervals",
    "paired_difference": "ideas.intervals",
    "pass_at_k": "ideas.passk",
    "policy": "ideas.policy",
    "policy_loss": "ideas.policy",
    "Objective": "ideas.statistics",
    "TokenStats": "ideas.statistics",
    "AdaptersOff": "reference",
    "FrozenBase": "reference",
    "ObjectiveMixin": "stages.objective_trainer",
    "ObjectiveTrainer": "stages.objective_trainer",
    "PolicyTrainer": "stages.policy_trainer",
    "RowCollator": "stages.training",
    "MathGrader": "verify.math",
    "Verdict": "verify.verdict",
}
__all__ = [
    "AdaptersOff",
    "CachedBase",
    "FrozenBase",
    "HeatbathError",
    "MathGrader",
    "Objective",
    "ObjectiveMixin",
    "ObjectiveTrainer",
    "PolicyTrainer",
    "ReferenceCache",
    "RowCollator",
    "TokenStats",
    "Verdict",
    "dense_loss",
    "linear_loss",
    "linear_stats",
    "mean_with_interval",
    "objective",
    "paired_difference",
    "pass_at_k",
    "policy",
    "policy_loss",
    "rewards",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name == "rewards":
        return importlib.import_module("heatbath.rewards")
    if name not in _HOMES:
        raise AttributeError(f"module 'heatbath' has no attribute '{name}'")
    return getattr(importlib.import_module(f"heatbath.{_HOMES[name]}"), name)
