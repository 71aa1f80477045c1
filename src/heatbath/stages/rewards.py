"""What the RL stage maximises: verdicts, a reward model, the user's own functions, each in TRL's form of a reward."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from heatbath.errors import RecipeError, RunError
from heatbath.recipe import Recipe
from heatbath.sections import Reward as RewardSection
from heatbath.verify.algebra import require_stage
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


def require_rewards(recipe: Recipe) -> None:
    """Says before anything is trained what of the [reward] table is not there: the sandbox, the reward model, functions
    and stages of the user's own, the fields it needs. Raises RunError or RecipeError."""
    settings = recipe.reward
    if settings.kind == "code":
        require_sandbox(settings.isolation)
    _require_fields(recipe)
    for stage in settings.stages:
        try:
            require_stage(stage)
        except RunError as error:
            raise RecipeError(error.what, "reward.stages", error.remedy) from None
    for name in settings.weights:
        if ":" in name:
            own_function(name, "reward.weights")
    if settings.model is not None:
        from heatbath.models import load_config

        load_config(settings.model)


def require_sandbox(isolation: str | None) -> None:
    """Raises RecipeError for a level of isolation that does not exist, RunError for one that this machine has not."""
    from heatbath.verify.sandbox import BUBBLEWRAP, LEVELS, available

    if isolation not in (None, *LEVELS):
        levels = " or ".join(map(repr, LEVELS))
        raise RecipeError(f"no isolation {isolation!r}", "reward.isolation", f"{levels} (docs/code.md)")
    if reason := available(isolation or BUBBLEWRAP):
        raise RunError(f"programs cannot be run: {reason}", "reward.isolation", "docs/code.md has the levels")


def _require_fields(recipe: Recipe) -> None:
    """The columns of the tables must fit the kind of answer."""
    kind = recipe.reward.kind
    tables = [f for name in ("fields", "test_fields") if (f := getattr(recipe.data, name, None)) is not None]
    source = recipe.data.source
    if source == "functions" and kind != "code":
        raise RecipeError("the answers of 'functions' are the tests of programs", "reward.kind", "reward.kind = 'code'")
    if not tables and kind != "math" and source != "functions":
        remedy = "take rows from tables (source = 'files' or 'hub'), or kind = 'math'"
        raise RecipeError(f"the answers of '{source}' are mathematical", "reward.kind", remedy)
    for fields in tables:
        for name, owner in (("tests", "code"), ("options", "choice")):
            if getattr(fields, name) is not None and kind != owner:
                remedy = f"reward.kind = '{owner}', or no data.fields.{name}"
                raise RecipeError(f"data.fields.{name} is not for {kind} answers", "reward.kind", remedy)
        if kind == "code" and fields.tests is None:
            remedy = "name the column that holds the tests, or '*' for the whole row (docs/code.md)"
            raise RecipeError("programs are graded by tests", "data.fields.tests", remedy)


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
            made.append(_checked(own_function(name, "reward.weights"), name))
    return made


def verdict_reward(grader: Grader, kind: Kind = "math", failed_share: float = 0.01) -> Reward:
    """A TRL reward function: each verdict's score (None, no signal, for a gold answer nobody can read), and the share
    of each status logged. Needs a `gold` column beside `prompt`. Raises RunError when more than `failed_share` of the
    verdicts are failures."""

    def verdict(completions: list[Any], gold: Sequence[str], **more: Any) -> list[float | None]:
        texts = [_said(c) for c in completions]
        golds = [as_gold(kind, text) for text in gold]
        verdicts = grader.grade(texts, golds)
        require_few_failures(verdicts, texts, golds, failed_share, "[reward]")
        counts = Counter(found.status for found in verdicts)
        if (log_metric := more.get("log_metric")) is not None:
            for status in STATUSES:
                log_metric(f"verdict/{status}", counts[status] / max(len(verdicts), 1))
        return [found.score for found in verdicts]

    return verdict


def _said(completion: Any) -> str:
    """The text of a completion: itself, or of its last message; nothing where that is a tool call."""
    text = completion if completion is None or isinstance(completion, str) else completion[-1].get("content")
    return text if isinstance(text, str) else ""


def _checked(function: Callable[..., Any], path: str) -> Reward:
    """A reward function of the user's own whose mistakes are told as such."""
    remedy = "it takes **columns (prompts, completions, gold, …) and returns a number or None for each completion"

    @functools.wraps(function)
    def reward(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        try:
            found = [None if value is None else float(value) for value in function(completions=completions, **columns)]
            broken = next((i for i, value in enumerate(found) if value is not None and not math.isfinite(value)), None)
        except Exception as error:
            raise RunError(f"{path} raised {type(error).__name__}: {error}", "reward.weights", remedy) from error
        if len(found) != len(completions):
            raise RunError(f"{path} gave {len(found)} rewards for {len(completions)}", "reward.weights", remedy)
        if broken is not None:
            raise RunError(f"{path} gave {found[broken]} for completion {broken}", "reward.weights", remedy)
        return found

    return reward


def own_function(path: str, key: str) -> Callable[..., Any]:
    """The function of an import path; raises RecipeError naming the key where there is none."""
    from heatbath.verify.worker import load

    try:
        return load(path)
    except Exception as error:  # noqa: BLE001 - the edge to the user's own module, which may raise anything
        remedy = 'write "package.module:function", or "file.py:function" relative to the working folder'
        raise RecipeError(f"no function {path}: {error}", key, remedy) from None
