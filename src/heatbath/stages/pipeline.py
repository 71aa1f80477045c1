"""All stages of a recipe in order: pretrain → sft → preference or rl → eval → report; and what is checked before."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from heatbath import ranks
from heatbath.errors import RecipeError, RunError
from heatbath.launch import evaluates_alone
from heatbath.progress import Progress
from heatbath.recipe import Recipe
from heatbath.run import STAGES, Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from heatbath.data.rows import Splits

DISK_FULL = ("No space left on device", "inline_container.cc")  # as safetensors says it, and as torch.save does


def run_all(run: Run, recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Runs every stage the recipe has and that is not finished yet; returns the evaluation's results. Call `check`
    before making the run."""
    from heatbath.report.page import write_report

    evaluated = ", ".join(run.policies)
    progress.say(f"stages: {' → '.join(stages_of(recipe))} (of {evaluated}) → report")
    for stage in stages_of(recipe):
        if stage != "eval":
            if ranks.agreed(lambda stage=stage: run.finished(stage)):
                progress.say(f"{stage}: finished before, kept")
            else:
                run_stage(stage, run, recipe, progress)
    if ranks.count() > 1 and evaluates_alone(recipe):
        progress.say(f"evaluation with vLLM is done by one process: heatbath run {run.folder} --resume")
        return {}
    results = run_stage("eval", run, recipe, progress)
    assert results is not None
    if ranks.first():
        write_report(run)
    return results


def run_stage(stage: str, run: Run, recipe: Recipe, progress: Progress) -> dict[str, Any] | None:
    """One stage by its name; returns results where it is the evaluation. Raises RunError where the disk has no room for
    what the stage will write."""
    from heatbath.stages.memory import require_room

    if ranks.first():
        require_room(run, recipe, stage)
    try:
        results = _run_stage(stage, run, recipe, progress)
    except (SafetensorError, RuntimeError) as error:
        if not any(said in str(error) for said in DISK_FULL):
            raise
        free = shutil.disk_usage(run.folder).free >> 20
        where = f"{run.folder} ({free} MiB free)"
        raise RunError(
            "the disk is full", where, "make room; --resume goes on from the last complete checkpoint"
        ) from None
    if any(ranks.gathered(progress.interrupted)):  # so late that the stage came to its end
        raise KeyboardInterrupt
    return results


def _run_stage(stage: str, run: Run, recipe: Recipe, progress: Progress) -> dict[str, Any] | None:
    if stage == "pretrain":
        from heatbath.stages.pretrain import run_pretrain

        return run_pretrain(run, recipe, progress)
    if stage == "sft":
        from heatbath.stages.sft import run_sft

        return run_sft(run, recipe, progress)
    if stage == "preference":
        from heatbath.stages.preference import run_preference

        return run_preference(run, recipe, progress)
    if stage == "rl":
        from heatbath.stages.rl import run_rl

        return run_rl(run, recipe, progress)
    from heatbath.stages.evaluate import run_evaluation

    return run_evaluation(run, recipe, progress)


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """The stages that a run of the recipe goes through."""
    return tuple(stage for stage in STAGES if getattr(recipe, stage) is not None)


def check(recipe: Recipe, stages: tuple[str, ...]) -> tuple[Splits, PreTrainedTokenizerBase]:
    """Reads data and tokenizer and runs every check, so that what is wrong with them is said before anything is trained
    or written. Returns what it read. Raises RecipeError, DataError or RunError."""
    from heatbath import models
    from heatbath.data import checks, sources
    from heatbath.stages.rewards import grader_of, require_rewards, require_sandbox

    splits = sources.of(recipe)
    sources.require(splits, recipe, stages)
    tokenizer = tokenizer_of(recipe)
    if "pretrain" in stages and recipe.sft is None:
        checks.rendered(tokenizer, splits.demos, recipe, "demos")
    if "sft" in stages and recipe.sft is not None:
        from heatbath.ideas.objectives import objective
        from heatbath.stages.measuring import require_columns

        goal = objective(recipe.sft.objective.name, **recipe.sft.objective.hyper)
        for split in ("demos", "validation"):
            require_columns(goal, checks.rendered(tokenizer, getattr(splits, split), recipe, split), split)
    if "preference" in stages:
        from heatbath.data import preferences

        preferences.rendered(tokenizer, preferences.load(recipe, splits.test)[0], recipe)
    if "rl" in stages and recipe.rl is not None:
        from heatbath.stages.rl import policy_of

        if policy_of(recipe.rl).needs_demonstrations:
            checks.demonstrations(tokenizer, splits.prompts, recipe)
    asked = [s for stage, s in (("rl", "prompts"), ("eval", "test")) if stage in stages]
    if "sft" in stages and recipe.sft is not None and recipe.sft.replay is not None and recipe.sft.replay.lift:
        asked.append("demos")  # a verifier weighs the base's answers to these
    if asked:
        require_rewards(recipe)
    with grader_of(recipe.reward) as grader:
        for split in asked:
            rows = getattr(splits, split)
            checks.require_askable(tokenizer, rows, recipe, split)
            checks.require_gold(grader, rows, split, recipe.reward.kind)
        for split in _taught(recipe, stages, splits) if asked else ():
            checks.require_right_solutions(grader, getattr(splits, split), split, recipe.reward.kind)
    if "eval" in stages and recipe.eval.tasks:
        from heatbath.stages import judged
        from heatbath.stages.exams import exams

        examined = exams(recipe, splits)
        judged.require_judge(recipe, examined)
        if any(exam.kind == "code" for exam in examined):
            require_sandbox(recipe.reward.isolation)
    _check_settings(recipe, stages)
    config = None
    if recipe.model is not None and recipe.model != models.TINY:
        config = models.load_config(recipe.model)
        if stages != ("eval",) or recipe.eval.engine != "api":  # a server has weights of its own
            models.require_safetensors(models.resolve(recipe.model), "model")
        checks.require_vocabulary(tokenizer, config)
    notes = _beyond_context(recipe, stages, splits, tokenizer, config)
    return replace(splits, notes=(*splits.notes, *notes)), tokenizer


def _taught(recipe: Recipe, stages: tuple[str, ...], splits: Splits) -> list[str]:
    """The splits whose solutions are learned from, and then graded in what the policy answers. Of noise that the recipe
    asks for any share is meant."""
    from heatbath.stages.rl import policy_of

    found = []
    if recipe.sft is not None and ("rl" in stages or ("sft" in stages and splits.test)):
        found.append("demos")
    if "rl" in stages and recipe.rl is not None and policy_of(recipe.rl).needs_demonstrations:
        found.append("prompts")
    return [] if getattr(recipe.data, "label_noise", 0) else found


def _beyond_context(
    recipe: Recipe, stages: tuple[str, ...], splits: Splits, tokenizer: PreTrainedTokenizerBase, config: Any
) -> list[str]:
    """What the model's context cuts off; of many prompts the one of most characters stands for the longest."""
    from heatbath.data import checks, rendering
    from heatbath.stages import vllm_server
    from heatbath.stages.exams import exams

    notes = []
    if "rl" in stages and recipe.rl is not None:
        longest = max(splits.prompts, key=lambda row: len(row.asked))
        asked = rendering.prompt_ids(tokenizer, rendering.messages(longest, recipe.data.system))
        notes += checks.beyond_context(config, "rl", len(asked), recipe.rl.max_new_tokens)
        notes += vllm_server.require(recipe, len(asked))
    if "eval" in stages and recipe.eval.engine != "api":  # a server has a context of its own
        for exam in (exam for exam in exams(recipe, splits) if exam.rows):
            asked = exam.prompt_ids(tokenizer, max(exam.rows, key=lambda row: len(row.asked)))
            found = checks.beyond_context(config, "eval", len(asked), exam.sampling.max_new_tokens)
            notes += [f"{exam.name}: {note}" for note in found]
    return notes


def _check_settings(recipe: Recipe, stages: tuple[str, ...]) -> None:
    """Builds what the trainers will be built from, so that TRL and PEFT say now what they would refuse later."""
    from heatbath.stages import memory, preference, rl, sft

    folder = Path("runs") / "unwritten"
    try:
        if "sft" in stages:
            sft.training_arguments(recipe, folder, validating=False)
        if "preference" in stages:
            preference.training_arguments(recipe, folder)
        if "rl" in stages:
            rl.training_arguments(recipe, folder)
    except (ValueError, TypeError, ImportError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        where = ", ".join(f"[{stage}.trainer]" for stage in ("sft", "preference", "rl") if stage in stages)
        raise RecipeError(f"TRL refuses the settings: {first}", where, "change them") from None
    if recipe.lora is not None:
        memory.require_lora_targets(recipe)


def tokenizer_of(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The tokenizer of the recipe's base, which a [pretrain] table only makes later."""
    from heatbath import models

    if recipe.model is None:
        from heatbath.stages.pretrain import base_tokenizer

        return base_tokenizer(recipe)
    return models.load_tokenizer(recipe.model, recipe.template)
