"""The base's own answers to the demonstrated problems, drawn once before the warm start: the rows of [sft.replay]."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from heatbath import ranks
from heatbath.data import rendering
from heatbath.data.rendering import IGNORE, Rendered
from heatbath.data.rows import Row
from heatbath.engines.sampling import Sampling, open_sampler, seed_of
from heatbath.ideas.replay import WEIGHT
from heatbath.progress import Progress
from heatbath.recipe import Recipe
from heatbath.run import Run
from heatbath.stages.rewards import grader_of
from heatbath.verify.graders import as_gold, require_few_failures

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT = "replay.json"


def problems(demos: list[Row]) -> list[Row]:
    """One row of each demonstrated problem."""
    return list({row.id: row for row in demos}.values())


def count(recipe: Recipe, demos: list[Row]) -> int:
    """Rows that a recipe's warm start learns from."""
    settings = recipe.sft and recipe.sft.replay
    if not settings:
        return len(demos)
    return settings.samples * len(problems(demos)) + (0 if settings.alone else len(demos))


def planned(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, demos: list[Row]) -> dict[str, Any]:
    """How many answers will be drawn, and how long they may be with their prompts."""
    assert recipe.sft is not None and recipe.sft.replay is not None
    settings, longest = recipe.sft.replay, recipe.sft.max_length
    lengths = [len(_prompt(tokenizer, recipe, row)) + settings.max_new_tokens for row in problems(demos)]
    return {
        "answers": settings.samples * len(lengths),
        "longest": min(longest, max(lengths, default=0)),
        "most_tokens": settings.samples * sum(min(longest, length) for length in lengths),
        "alone": settings.alone,
    }


def with_replay(
    run: Run,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    demos: list[Rendered],
    columns: tuple[str, ...],
    progress: Progress,
) -> list[Rendered]:
    """The demonstrations with column `replay` 0, and the base's answers with their weights in it. What else the
    objective reads (`columns`) is 0 on the answers."""
    assert recipe.sft is not None and recipe.sft.replay is not None
    settings, longest = recipe.sft.replay, recipe.sft.max_length
    asked = {row.id: row for row in problems(rows)}
    drawn = _answers(run, recipe, tokenizer, list(asked.values()), progress)
    weights = _weights([one["score"] for one in drawn], settings.beta, settings.weight / settings.samples)
    answers = []
    for one, weight in zip(drawn, weights, strict=True):
        prompt = _prompt(tokenizer, recipe, asked[one["problem"]])
        ids = (prompt + one["ids"])[:longest]
        labels = ([IGNORE] * len(prompt) + one["ids"])[:longest]
        own = {WEIGHT: [0.0 if label == IGNORE else weight for label in labels]}
        zeros = {name: [0.0] * len(ids) for name in columns}
        answers.append(Rendered(ids, labels, truncated=len(ids) < len(prompt) + len(one["ids"]), columns=zeros | own))
    return ([] if settings.alone else unreplayed(demos)) + answers


def unreplayed(demos: list[Rendered]) -> list[Rendered]:
    """The demonstrations with the column that tells them from the base's answers."""
    return [dataclasses.replace(row, columns={**row.columns, WEIGHT: [0.0] * len(row.input_ids)}) for row in demos]


def _weights(scores: list[float | None], beta: float, each: float) -> list[float]:
    """e^{β·score}/mean of them, times `each`."""
    if not beta:
        return [each] * len(scores)
    lifted = np.exp(beta * (np.array(scores, dtype=float) - 1.0))  # of at most 1 each
    return [float(w) for w in each * lifted / lifted.mean()]


def _answers(
    run: Run, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: list[Row], progress: Progress
) -> list[dict[str, Any]]:
    """Problem, ids and (where they are weighed) score of each answer, from replay.json where it was drawn before."""
    known: list[dict[str, Any]] | None = ranks.agreed(lambda: run.read_json(KEPT))
    if known is not None:
        return known
    assert recipe.sft is not None and recipe.sft.replay is not None
    settings = recipe.sft.replay
    wanted = [(row, number) for row in rows for number in range(settings.samples)]
    parts = ranks.gathered(_drawn(run, recipe, tokenizer, ranks.share(wanted), progress))
    drawn = {(one["problem"], one["seed"]): one for part in parts for one in part}
    found = [drawn[row.id, _seed(recipe, row, number)] for row, number in wanted]
    if settings.beta:
        _grade(recipe, tokenizer, {row.id: row for row in rows}, found)
    if ranks.first():
        run.write_json(KEPT, found)
    right = [one["score"] for one in found if one["score"] is not None]
    cut = sum(not one["finished"] for one in found)
    said = f"replay: {len(found):,} answers of the base to {len(rows):,} problems, {cut:,} cut"
    if right:
        p = math.fsum(right) / len(right)
        share = p / (p + math.exp(-settings.beta) * (1 - p)) if p else 0.0
        said += f"; {p:.1%} right, which have {share:.1%} of the weight"
    progress.say(said)
    return found


def _drawn(
    run: Run, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, wanted: list[tuple[Row, int]], progress: Progress
) -> list[dict[str, Any]]:
    assert recipe.sft is not None and recipe.sft.replay is not None
    engine = "vllm" if recipe.eval.engine == "vllm" else "transformers"
    sampling = Sampling(1.0, 1.0, recipe.sft.replay.max_new_tokens)
    prompts = [_prompt(tokenizer, recipe, row) for row, _ in wanted]
    seeds = [_seed(recipe, row, number) for row, number in wanted]
    out: list[dict[str, Any]] = []
    model = run.model_of("base")
    with (
        open_sampler(engine, model, tokenizer, precision=recipe.precision, batch=recipe.eval.batch) as sampler,
        progress.bar("replay", len(wanted)),
    ):
        for batch in sampler.sample(prompts, sampling, seeds):
            for one in batch:
                row = wanted[one.prompt][0]
                facts = {"problem": row.id, "seed": seeds[one.prompt], "ids": one.ids, "finished": one.finished}
                out.append({**facts, "score": None})
            progress.update(len(out), "")
    return out


def _grade(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, rows: dict[str, Row], found: list[dict[str, Any]]
) -> None:
    """Writes each answer's score into it; in every process alike."""

    def scores() -> list[float]:
        texts = [tokenizer.decode(one["ids"], skip_special_tokens=True) for one in found]
        golds = [as_gold(recipe.reward.kind, str(rows[one["problem"]].answer)) for one in found]
        with grader_of(recipe.reward) as grader:
            verdicts = grader.grade(texts, golds)
        require_few_failures(verdicts, texts, golds, recipe.reward.failed_share, "sft.replay")
        return [verdict.score for verdict in verdicts]

    for one, score in zip(found, ranks.agreed(scores), strict=True):
        one["score"] = score


def _seed(recipe: Recipe, row: Row, number: int) -> int:
    return seed_of(recipe.seed, "replay", row.id, number)


def _prompt(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, row: Row) -> list[int]:
    return rendering.prompt_ids(tokenizer, rendering.messages(row, recipe.data.system))
