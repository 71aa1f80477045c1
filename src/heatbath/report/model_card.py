"""The model card of an exported policy: what it is, how it was made, what was measured, what to doubt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from heatbath import recipe as recipes
from heatbath.report import captions, tables
from heatbath.run import OWN_TEST, Run
from heatbath.stages.evaluate import SAMPLING


def model_card(run: Run, policy: str, facts: Mapping[str, Any]) -> str:
    """Markdown with the hub's front matter. A base in a folder of one's own is not named: nobody else has it."""
    recipe, results, env = run.recipe, run.read_json("results.json"), facts["env"]
    known = recipe.model is not None and "/" in recipe.model and not recipe.model.startswith((".", "/", "~"))
    data = ModelCardData(
        base_model=recipe.model if known else None,
        library_name="peft" if facts["type"] == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["heatbath", *([recipe.sft.objective.name] if recipe.sft else [])],
    )
    compared = facts["compared"]
    parts = [f"---\n{data.to_yaml()}\n---", f"# {captions.title(recipe)}: {policy}"]
    parts.append(
        f"The policy `{policy}` of a heatbath run of {recipe.model or 'a new base'}, "
        f"seed {recipe.seed}. Stored as {facts['type']}; read back, log-probabilities differ by at most "
        f"{compared['largest_difference_nats']:.2g} nats from those of the run's own weights (KL "
        f"{compared['kl_nats_per_token']:.2g} nats per token)."
    )
    if results and results["policies"]:
        drawn = (run.read_json(SAMPLING) or {}).get(OWN_TEST, recipe.eval.model_dump())
        parts += ["## Scores", captions.conditions(results, drawn), tables.markdown_results(results)]
    if results and results.get("tasks"):
        parts.append(tables.markdown(tables.task_rows(results["tasks"])))
    profile = run.read_json("surprise.json")
    parts += ["## Read this with care", "\n".join(f"- {said}" for said in captions.caveats(run, results, profile))]
    parts += ["## How it was made", f"`{env['command']}`", f"```toml\n{recipes.as_toml(recipe)}```"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items() if version)
    parts.append(f"Rows {facts['data'] or 'not noted'}, weights {facts['fingerprint']} (digests); {versions}.")
    return "\n\n".join(parts) + "\n"
