"""All stages of a recipe in order: sft → rl → eval → report; and the plan that `--dry-run` prints."""

from __future__ import annotations

from typing import Any

from heatbath.progress import Progress
from heatbath.recipe import Recipe
from heatbath.run import Run


def run_all(run: Run, recipe: Recipe, progress: Progress) -> dict[str, Any]:
    """Runs every stage the recipe has; returns the evaluation's results. Call `check` before making the run."""
    from heatbath.report.page import write_report
    from heatbath.stages.evaluate import run_evaluation

    evaluated = ", ".join(run.policies)
    progress.say(f"stages: {' → '.join(stages_of(recipe))} (of {evaluated}) → report")
    if recipe.sft is not None:
        from heatbath.stages.sft import run_sft

        run_sft(run, recipe, progress)
    if recipe.rl is not None:
        from heatbath.stages.rl import run_rl

        run_rl(run, recipe, progress)
    results = run_evaluation(run, recipe, progress)
    write_report(run)
    return results


def stages_of(recipe: Recipe) -> tuple[str, ...]:
    """The stages that a run of the recipe goes through."""
    return tuple(stage for stage in ("sft", "rl", "eval") if getattr(recipe, stage) is not None)


def check(recipe: Recipe, stages: tuple[str, ...]) -> None:
    """Reads data and tokenizer and renders the first row, so that what is wrong with them is said before anything is
    trained or written. Raises RecipeError or DataError."""
    from heatbath import models
    from heatbath.data import rendering, sources

    splits = sources.load(recipe.data, recipe.seed)
    sources.require(splits, recipe, stages)
    tokenizer = models.load_tokenizer(recipe.model)
    for row in [*splits.demos[:1], *splits.prompts[:1], *splits.test[:1]]:
        rendering.prompt_ids(tokenizer, rendering.messages(row, recipe.data.system))


def plan(recipe: Recipe) -> dict[str, Any]:
    """What a run would do (rows, tokens, steps), after reading its data and rendering its demonstrations."""
    from heatbath import models
    from heatbath.data import sources
    from heatbath.stages import rl, sft

    splits = sources.load(recipe.data, recipe.seed)
    sources.require(splits, recipe, stages_of(recipe))
    tokenizer = models.load_tokenizer(recipe.model)
    out: dict[str, Any] = {"model": recipe.model, "rows": {k: len(v) for k, v in vars(splits).items()}}
    if recipe.sft is not None:
        demos = sft.render_all(tokenizer, splits.demos, recipe, "demos")
        out["sft"] = {
            "objective": recipe.sft.objective.model_dump(),
            "tokens": sum(len(r.input_ids) for r in demos),
            "supervised_tokens": sum(r.supervised for r in demos),
            "longest": max(len(r.input_ids) for r in demos),
            "truncated": sum(r.truncated for r in demos),
            "ends_with_eos": sum(r.labels[-1] == tokenizer.eos_token_id for r in demos),
            "steps": sft.total_steps(recipe.sft, len(demos)),
        }
    if recipe.rl is not None:
        steps = rl.total_steps(recipe.rl, len(splits.prompts))
        out["rl"] = {
            "policy": recipe.rl.policy,
            "steps": steps,
            "completions": steps * recipe.rl.update_prompts * recipe.rl.group_size,
            "most_completion_tokens": recipe.rl.max_new_tokens,
        }
    policies = 1 + (recipe.sft is not None) + (recipe.rl is not None)
    out["eval"] = {
        "policies": policies,
        "problems": len(splits.test),
        "samples": policies * len(splits.test) * recipe.eval.samples,
    }
    return out
