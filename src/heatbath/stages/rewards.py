"""What the RL stage maximises: verdicts, a reward model, the user's own functions, each in TRL's form of a reward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from heatbath.errors import RecipeError
from heatbath.sections import Reward as RewardSection
from heatbath.verify.graders import Grader, Kind, as_gold, grader, require_few_failures
from heatbath.verify.verdict import STATUSES

Reward = Callable[..., list[float | None]]


def grader_of(settings: RewardSection) -> Grader:
    """The grader of a recipe's [reward] table."""
    return grader(
        settings.kind,
        profile=settings.profile,
        workers=settings.workers,
        deadline=settings.deadline,
        stages=settings.stages,
        isolation=settings.isolation,
    )


def reward_functions(settings: RewardSection, grader: Grader) -> list[Reward]:
    """The rewards of a recipe, in the order of `settings.weighted`."""
    made: list[Reward] = []
    for name in settings.weighted:
        if name == "verdict":
            made.append(verdict_reward(grader, settings.kind, settings.failed_share))
        elif name == "model":
            from heatbath.verify.reward_model import RewardModel

            assert settings.model is not None
            made.append(RewardModel(settings.model, sqrt_length=settings.sqrt_length))
        else:
            made.append(_own(name))
    return made


def verdict_reward(grader: Grader, kind: Kind = "math", failed_share: float = 0.01) -> Reward:
    """A TRL reward function: each verdict's score (None, no signal, for a gold answer nobody can read), and the share
    of each status logged. Needs a `gold` column beside `prompt`. Raises RunError when more than `failed_share` of the
    verdicts are failures."""

    def verdict(completions: list[Any], gold: Sequence[str], **more: Any) -> list[float | None]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        golds = [as_gold(kind, text) for text in gold]
        verdicts = grader.grade(texts, golds)
        require_few_failures(verdicts, texts, golds, failed_share, "[reward]")
        counts = Counter(found.status for found in verdicts)
        if (log_metric := more.get("log_metric")) is not None:
            for status in STATUSES:
                log_metric(f"verdict/{status}", counts[status] / max(len(verdicts), 1))
        return [found.score for found in verdicts]

    return verdict


def _own(path: str) -> Reward:
    from heatbath.verify.worker import load

    try:
        found: Reward = load(path)
    except (ImportError, AttributeError, OSError) as error:
        raise RecipeError(f"no function {path}: {error}", "reward.weights", "check the path and the name") from None
    return found
