"""heatbath warm-starts reinforcement learning of language models, runs the RL, and measures whether it helped.

Names are loaded when first used: `import heatbath` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heatbath.errors import HeatbathError
    from heatbath.ideas.engine import dense_loss, linear_loss
    from heatbath.ideas.objectives import Objective, TokenStats, objective
    from heatbath.ideas.passk import mean_with_interval, paired_difference, pass_at_k
    from heatbath.ideas.policy import policy
    from heatbath.reference import FrozenBase
    from heatbath.stages.rl import PolicyTrainer
    from heatbath.stages.sft import ObjectiveTrainer
    from heatbath.verify.math import MathGrader
    from heatbath.verify.verdict import Verdict

_HOMES = {
    "HeatbathError": "errors",
    "dense_loss": "ideas.engine",
    "linear_loss": "ideas.engine",
    "Objective": "ideas.objectives",
    "TokenStats": "ideas.objectives",
    "objective": "ideas.objectives",
    "mean_with_interval": "ideas.passk",
    "paired_difference": "ideas.passk",
    "pass_at_k": "ideas.passk",
    "policy": "ideas.policy",
    "FrozenBase": "reference",
    "PolicyTrainer": "stages.rl",
    "ObjectiveTrainer": "stages.sft",
    "MathGrader": "verify.math",
    "Verdict": "verify.verdict",
}
__all__ = [
    "FrozenBase",
    "HeatbathError",
    "MathGrader",
    "Objective",
    "ObjectiveTrainer",
    "PolicyTrainer",
    "TokenStats",
    "Verdict",
    "dense_loss",
    "linear_loss",
    "mean_with_interval",
    "objective",
    "paired_difference",
    "pass_at_k",
    "policy",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'heatbath' has no attribute '{name}'")
    return getattr(importlib.import_module(f"heatbath.{_HOMES[name]}"), name)
