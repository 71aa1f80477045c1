"""The base's own answers to the demonstrated problems, drawn once before the warm start: the rows of [sft.replay]."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from heatbath import models, ranks
from heatbath.data import rendering
from heatbath.data.checks import MOST_TRUNCATED
from heatbath.data.rendering import IGNORE, Rendered
from heatbath.data.rows import Row
from heatbath.engines.local import LocalSampler
from heatbath.engines.sampling import Sampling, seed_of
from heatbath.errors import RunError
from heatbath.ideas.replay import DEMONSTRATION, WEIGHT, holds_the_base
from heatbath.ideas.statistics import Objective
from heatbath.progress import Progress
from heatbath.recipe import Recipe
from heatbath.replay_section import Replay
from heatbath.run import REPLAY, Run, append_jsonl, read_jsonl
from heatbath.stages.rewards import grader_of
from heatbath.verify.graders import as_gold, require_few_failures

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def problems(demos: list[Row]) -> list[Row]:
    """One row of each demonstrated problem."""
    return list({row.id: row for row in demos}.values())


def count(recipe: Recipe, demos: list[Row]) -> int:
    """Rows that a recipe's warm start learns from, at most."""
    settings = recipe.sft and recipe.sft.replay
    if not settings:
        return len(demos)
    return settings.samples * len(problems(demos)) + (0 if settings.alone else len(demos))


def planned(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, demos: list[Row]) -> dict[str, Any]:
    """How many answers will be drawn, and how long they may be with their prompts."""
    settings = _settings(recipe)
    longest = _longest(recipe)
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    demos: list[Rendered],
    goal: Objective,
    progress: Progress,
) -> list[Rendered]:
    """The demonstrations, marked as such in the column `replay`, and answers of `model`, the base, with their weights
    in it. Other columns of the demonstrations are 0 on the answers. Raises RunError where a verifier finds none right.
    """
    settings, longest = _settings(recipe), _longest(recipe)
    shown: dict[str, list[list[int]]] = defaultdict(list)
    for row, demo in zip(rows, demos, strict=True):
        shown[row.id].append([i for i, label in zip(demo.input_ids, demo.labels, strict=True) if label != IGNORE])
    asked = {row.id: row for row in problems(rows)}
    drawn = _answers(run, recipe, model, tokenizer, list(asked.values()), progress)
    weights = _weights(drawn, settings, {problem: len(own) for problem, own in shown.items()})
    names = dict.fromkeys(name for demo in demos for name in demo.columns)
    answers, cut = [], 0
    for one, weight in zip(drawn, weights, strict=True):
        prompt, known = _prompt(tokenizer, recipe, asked[one["problem"]]), shown[one["problem"]]
        start = len(prompt) + (_left(one["ids"], known) if holds_the_base(goal) and not settings.alone else 0)
        ids = (prompt + one["ids"])[:longest]
        labels = [IGNORE if i < start else token for i, token in enumerate(ids)]
        cut += (whole := len(prompt) + len(one["ids"])) > longest or not one["finished"]
        if start < len(ids):
            own = {name: [0.0] * len(ids) for name in names} | {WEIGHT: [weight] * len(ids)}
            answers.append(Rendered(ids, labels, truncated=whole > longest, columns=own))
    if cut > MOST_TRUNCATED * len(drawn):
        progress.say(f"warning: {cut:,} of {len(drawn):,} answers of the base are cut, and learned without EOS")
    return ([] if settings.alone else demonstrated(demos)) + answers


def demonstrated(demos: list[Rendered]) -> list[Rendered]:
    """The demonstrations with the column that tells them from the base's answers."""
    return [
        dataclasses.replace(row, columns={**row.columns, WEIGHT: [DEMONSTRATION] * len(row.input_ids)}) for row in demos
    ]


def _left(answer: Sequence[int], demonstrations: Sequence[Sequence[int]]) -> int:
    """The first token of an answer whose beginning is no demonstration's."""
    shared = 0
    for demo in demonstrations:
        pairs = zip(answer, demo, strict=False)
        shared = max(shared, next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(answer), len(demo))))
    return shared + 1


def _weights(drawn: list[dict[str, Any]], settings: Replay, demonstrations: dict[str, int]) -> list[float]:
    """e^{lift·score} over its mean among the problem's answers, times `weight` × its demonstrations / its answers."""
    scores: dict[str, list[float]] = defaultdict(list)
    for one in drawn:
        scores[one["problem"]].append(one["score"] if settings.lift else 0.0)
    if settings.lift and not any(map(any, scores.values())):
        raise RunError(
            f"none of {len(drawn):,} answers of the base is right: there is nothing to lift",
            "sft.replay.lift",
            "more samples, easier problems, or lift = 0",
        )
    whole = {p: math.fsum(math.exp(settings.lift * (s - max(own))) for s in own) for p, own in scores.items()}
    lifted = [
        math.exp(settings.lift * ((one["score"] if settings.lift else 0.0) - max(scores[one["problem"]])))
        / whole[one["problem"]]
        for one in drawn
    ]
    return [settings.weight * demonstrations[one["problem"]] * w for one, w in zip(drawn, lifted, strict=True)]


def _answers(
    run: Run,
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Problem, seed, ids and (where they are weighed) score of each answer; those of replay.jsonl are not drawn again,
    and what is drawn is kept batch by batch."""
    settings, file = _settings(recipe), run.folder / REPLAY
    wanted = {(row.id, _seed(recipe, row, number)): row for row in rows for number in range(settings.samples)}
    known = {(one["problem"], one["seed"]): one for one in ranks.agreed(lambda: read_jsonl(file))}
    lacking = [key for key in wanted if key not in known]
    with _sampled_from(model, recipe), progress.bar("replay", len(lacking)):
        for parts in ranks.together(_drawn(recipe, model, tokenizer, wanted, ranks.share(lacking))):
            fresh = [one for part in parts for one in part]
            known |= {(one["problem"], one["seed"]): one for one in fresh}
            if ranks.first():
                append_jsonl(file, fresh)
            progress.update(sum(key in known for key in lacking), "")
    found = [known[key] for key in wanted]
    usable = [one for one in found if one["score"] is not None or not settings.lift]
    said = f"replay: {len(found):,} answers of the base to {len(rows):,} problems"
    if settings.lift:
        said += f", {sum(one['score'] for one in usable) / max(len(usable), 1):.1%} right"
        said += f"; {len(found) - len(usable):,} that could not be graded are left out" * (len(usable) < len(found))
    progress.say(said)
    return usable


def _drawn(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wanted: dict[tuple[str, int], Row],
    own: list[tuple[str, int]],
) -> Iterator[list[dict[str, Any]]]:
    """Batches of answers to this process's share, with their scores where the recipe weighs them."""
    if not own:
        return
    settings = _settings(recipe)
    prompts = [_prompt(tokenizer, recipe, wanted[key]) for key in own]
    sampling = Sampling(1.0, 1.0, settings.max_new_tokens)
    with grader_of(recipe.reward) if settings.lift else nullcontext() as grader:
        for batch in LocalSampler(model, tokenizer).sample(prompts, sampling, [seed for _, seed in own]):
            keys = [own[one.prompt] for one in batch]
            scores: list[float | None] = [None] * len(batch)
            if grader is not None:
                texts = [tokenizer.decode(one.ids, skip_special_tokens=True) for one in batch]
                golds = [as_gold(recipe.reward.kind, str(wanted[key].answer)) for key in keys]
                verdicts = grader.grade(texts, golds)
                require_few_failures(verdicts, texts, golds, recipe.reward.failed_share, "sft.replay")
                scores = [verdict.score for verdict in verdicts]
            yield [
                {"problem": problem, "seed": seed, "ids": one.ids, "finished": one.finished, "score": score}
                for (problem, seed), one, score in zip(keys, batch, scores, strict=True)
            ]


@contextmanager
def _sampled_from(model: PreTrainedModel, recipe: Recipe) -> Iterator[None]:
    """The model as it is sampled: without dropout, products in the recipe's precision."""
    trained, dtype = model.training, models.autocast_dtype(recipe.precision)
    model.eval()
    try:
        with torch.autocast(model.device.type, dtype, enabled=dtype is not None):
            yield
    except RunError as error:
        if error.where != "eval.max_new_tokens":
            raise
        raise RunError(error.what, "sft.replay.max_new_tokens", error.remedy) from None
    finally:
        model.train(trained)


def _settings(recipe: Recipe) -> Replay:
    assert recipe.sft is not None and recipe.sft.replay is not None
    return recipe.sft.replay


def _longest(recipe: Recipe) -> int:
    assert recipe.sft is not None
    return recipe.sft.max_length


def _seed(recipe: Recipe, row: Row, number: int) -> int:
    return seed_of(recipe.seed, "replay", row.id, number)


def _prompt(tokenizer: PreTrainedTokenizerBase, recipe: Recipe, row: Row) -> list[int]:
    return rendering.prompt_ids(tokenizer, rendering.messages(row, recipe.data.system))
