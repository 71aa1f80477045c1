"""Readiness: what RL would have to learn from, measured on the policy that it starts from, before the first step.

A group whose verdicts are all alike has no advantage, and a completion that is cut has no answer. Some of the RL
prompts are answered as RL will answer them, and the numbers stand in readiness.json. Afterwards `compare` holds the
prediction against what happened.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import peft
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from heatbath import models
from heatbath.data import rendering
from heatbath.data.rendering import IGNORE
from heatbath.data.rows import Row
from heatbath.engines.local import LocalSampler
from heatbath.engines.sampling import Sampling, seed_of
from heatbath.heads import logit_transform, output_head
from heatbath.ideas.engine import linear_stats
from heatbath.ideas.intervals import Estimate, difference, mean_with_interval
from heatbath.ideas.passk import informative_share, pass_at_k
from heatbath.ideas.policy import policy
from heatbath.progress import Progress
from heatbath.recipe import Recipe
from heatbath.reference import PASS_TOKENS, at_supervised
from heatbath.report.tables import interval
from heatbath.run import Run
from heatbath.sections import RL
from heatbath.stages.training import RowCollator
from heatbath.verify.graders import Grader, as_gold
from heatbath.verify.verdict import JUDGED, Verdict

FILE = "readiness.json"
LEAST_INFORMATIVE = 0.05  # share of groups; below it nineteen of twenty completions are sampled for nothing
DECIDED = 0.25  # the upper bound must lie below it: of 13 prompts none, of 32 one
MOST_TRUNCATED = 0.5
UNAPPLIED = ("top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs")


@dataclass(frozen=True)
class _Sampled:
    """A completion and its verdict; `prompt` is the number of the row among those that were asked."""

    prompt: int
    ids: list[int]
    finished: bool
    verdict: Verdict


def measure(
    run: Run,
    recipe: Recipe,
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel | peft.PeftModel,
    grader: Grader,
    progress: Progress,
) -> dict[str, Any] | None:
    """The content of readiness.json, measured and said aloud unless the run has it already; None with `rl.readiness` 0.

    `rl.readiness` of the RL prompts `rows`, spread over them, get `rl.group_size` completions each at the temperature
    and length of RL. Shares are means over prompts with their intervals: `pass`, `informative_share` of groups with two
    verdicts (all_right_share and all_wrong_share are the rest), `truncated_share` of completions without EOS within
    `rl.max_new_tokens` (`eos_rate` is the rest). `entropy` is the mean of H(π) over the sampled tokens at that
    temperature, in nats; `mean_tokens` counts EOS. Neither the random streams nor the model are touched.
    """
    settings = recipe.rl
    assert settings is not None
    known: dict[str, Any] | None = run.read_json(FILE)
    if known is not None or not settings.readiness:
        return known
    picked = spread(rows, settings.readiness, recipe.seed)
    plain = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    asked = [rendering.prompt_ids(tokenizer, rendering.messages(row, recipe.data.system)) for row in picked]
    autocast = models.autocast_dtype(recipe.precision)
    with _undisturbed(plain), torch.autocast(plain.device.type, dtype=autocast, enabled=autocast is not None):
        sampled = _sample(recipe, picked, asked, tokenizer, plain, grader, progress)
        pairs = [(asked[s.prompt], s.ids) for s in sampled]
        entropy = mean_entropy(plain, pairs, settings.temperature, tokenizer.pad_token_id)
    found = {"prompts": len(picked), "of_prompts": len(rows), **_numbers(sampled, settings), "entropy": entropy}
    found["judged"], found["notes"] = _judged(recipe)
    found["warnings"] = warnings(found, warm=recipe.sft is not None)
    run.write_json(FILE, found)
    for line in describe(found):
        progress.say(line)
    return found


def spread(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """At most `count` of the rows: one drawn from each of as many equal stretches, so that rows in some order (by
    source, by difficulty) are all met."""
    draw, count = random.Random(seed), min(count, len(rows))
    bounds = [i * len(rows) // count for i in range(count + 1)]
    return [rows[draw.randrange(bounds[i], bounds[i + 1])] for i in range(count)]


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards each of its modules and every random stream is as before."""
    training = [module for module in model.modules() if module.training]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def _sample(
    recipe: Recipe,
    rows: list[Row],
    asked: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    grader: Grader,
    progress: Progress,
) -> list[_Sampled]:
    """A group of graded completions of each row, in the order of the rows."""
    settings = recipe.rl
    assert settings is not None
    owner = [i for i in range(len(rows)) for _ in range(settings.group_size)]
    sampler = LocalSampler(model, tokenizer, batch=recipe.eval.batch)
    sampling = Sampling(settings.temperature, 1.0, settings.max_new_tokens)
    seeds = [seed_of(recipe.seed, "readiness", number) for number in range(len(owner))]  # not those of other seeds
    out: list[_Sampled] = []
    with progress.bar("readiness", len(owner)):
        for batch in sampler.sample([asked[i] for i in owner], sampling, seeds):
            texts = tokenizer.batch_decode([c.ids for c in batch], skip_special_tokens=True)
            golds = [as_gold(recipe.reward.kind, str(rows[owner[c.prompt]].answer)) for c in batch]
            verdicts = grader.grade(texts, golds)
            out += [_Sampled(owner[c.prompt], c.ids, c.finished, v) for c, v in zip(batch, verdicts, strict=True)]
            progress.update(len(out))
    return sorted(out, key=lambda s: s.prompt)


@torch.no_grad()
def mean_entropy(
    model: PreTrainedModel, pairs: Sequence[tuple[list[int], list[int]]], temperature: float, pad_id: int
) -> float:
    """Mean of H(π) in nats over the completion tokens of (prompt ids, completion ids), of logits over `temperature`."""
    rows = [{"input_ids": [*p, *c], "labels": [*[IGNORE] * len(p), *c]} for p, c in pairs]
    rows.sort(key=lambda row: -len(row["input_ids"]))
    head = output_head(model)
    transform = logit_transform(model)
    # c·tanh(s·z / c) / T is the same form with s / T and c / T
    options = {name: value / temperature for name, value in ({"scale": 1.0} | transform).items()}
    total = torch.zeros((), dtype=torch.float64)
    collate, start = RowCollator(pad_id), 0
    while start < len(rows):
        count = max(1, PASS_TOKENS // len(rows[start]["input_ids"]))
        batch = {k: v.to(model.device) for k, v in collate(rows[start : start + count]).items()}
        labels, start = batch.pop("labels"), start + count
        hidden = at_supervised(model.base_model(**batch, use_cache=False).last_hidden_state, labels)
        target = labels[:, 1:]
        found = linear_stats(hidden, head, target[target != IGNORE], need=("entropy",), **options)
        total += found.entropy.double().sum().cpu()
    return float(total) / sum(len(c) for _, c in pairs)


def _numbers(sampled: list[_Sampled], settings: RL) -> dict[str, Any]:
    """What is counted, of completions in the order of their prompts, each with a whole group."""
    G = settings.group_size
    right = np.array([s.verdict.status == "right" for s in sampled]).reshape(-1, G).sum(1)
    cut = np.array([not s.finished for s in sampled]).reshape(-1, G).mean(1)

    def share(values: Any) -> dict[str, float | None]:
        return mean_with_interval(values, bounds=(0.0, 1.0)).numbers()

    return {
        "group_size": G,
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
        "pass": {str(k): share(pass_at_k(right, G, k)) for k in (1, G)},
        "informative_share": share(informative_share(right, G, G)),
        "all_right_share": share(right == G),
        "all_wrong_share": share(right == 0),
        "truncated_share": share(cut),
        "eos_rate": share(1 - cut),
        "mean_tokens": float(np.mean([len(s.ids) for s in sampled])),
        "right_of_prompts": right.tolist(),
        "verdicts": dict(Counter(s.verdict.status for s in sampled)),
        "grader_failures": sum(s.verdict.status not in JUDGED for s in sampled),
    }


def _judged(recipe: Recipe) -> tuple[bool, list[str]]:
    """Whether a group of equal verdicts gives this RL nothing to learn from; and what to know about the numbers."""
    settings, notes = recipe.rl, []
    assert settings is not None
    if [name for name, weight in recipe.reward.weighted.items() if weight] != ["verdict"]:
        notes.append("the reward is more than the verdict; these shares are of verdicts alone")
    notes += other_signals(settings)
    judged = not notes
    if unapplied := [name for name in UNAPPLIED if name in settings.trainer]:
        notes.append(f"sampled without {', '.join(unapplied)} of rl.trainer")
    return judged, notes


def other_signals(settings: RL) -> list[str]:
    """Why a group whose completions all earn the same may teach the policy something all the same."""
    goal, notes, G = policy(settings.policy.name, **settings.policy.hyper), [], settings.group_size
    dead = goal.advantages(torch.tensor([1.0] * G + [0.0] * G), torch.tensor([0] * G + [1] * G))
    if goal.needs_demonstrations:
        notes.append(
            f"'{settings.policy.name}' also learns from demonstrations; these shares are of its own completions"
        )
    if bool(dead.any()):
        notes.append(f"'{settings.policy.name}' learns from groups of equal verdicts too")
    return notes


def warnings(found: dict[str, Any], *, warm: bool) -> list[str]:
    """What would leave RL without a signal, each with its number and a remedy. `warm`: it starts from a warm start."""
    said, G, prompts, limit = [], found["group_size"], found["prompts"], found["max_new_tokens"]
    share, wrong, right = (found[key] for key in ("informative_share", "all_wrong_share", "all_right_share"))
    if found["judged"] and share["mean"] < LEAST_INFORMATIVE and share["high"] is not None and share["high"] < DECIDED:
        remedy = "the prompts are too easy: take harder ones"
        if wrong["mean"] >= right["mean"]:
            better = "better or more demonstrations" if warm else "a warm start ([sft])"
            remedy = f"the prompts are too hard: {better}, easier prompts, or a larger rl.group_size"
            unread = found["verdicts"].get("no_answer", 0)
            if unread > prompts * G / 2 and found["truncated_share"]["mean"] <= MOST_TRUNCATED:
                form = "a larger β where it is GIFT's (`whole` in heatbath surprise), or a longer [sft]"
                remedy = (
                    f"the grader can read no answer in {unread} of {prompts * G} completions; if it is their form: "
                )
                remedy += form if warm else "a warm start ([sft]) on demonstrations that the grader reads"
        said.append(
            f"{round(share['mean'] * prompts)} of {prompts} prompts had two different verdicts among {G} (informative "
            f"groups {interval(share)}; all wrong {wrong['mean']:.3f}, all right {right['mean']:.3f}), next to no "
            f"signal for RL; {remedy}"
        )
    cut = found["truncated_share"]["mean"]
    if cut == 1.0:
        said.append(
            f"none of {prompts * G} completions ended with EOS within {limit:,} tokens; raise rl.max_new_tokens, or "
            "start from a policy that has learned to end (a warm start teaches EOS)"
        )
    elif cut > MOST_TRUNCATED:
        said.append(f"{cut:.0%} of {prompts * G} completions were cut at {limit:,} tokens; raise rl.max_new_tokens")
    if found["grader_failures"]:
        said.append(
            f"{found['grader_failures']} of {prompts * G} verdicts are failures of grading and count as not right; RL "
            "stops where more than reward.failed_share of a step's are"
        )
    return said


def describe(found: dict[str, Any]) -> list[str]:
    """The numbers as plain lines, with what is to be known about them."""
    G = found["group_size"]
    mean = {key: found[key]["mean"] for key in ("all_wrong_share", "all_right_share", "truncated_share", "eos_rate")}
    return [
        f"readiness: {found['prompts']} of {found['of_prompts']:,} prompts × {G} completions of the start, "
        f"T = {found['temperature']:g}",
        f"  pass@1 {interval(found['pass']['1'])}   pass@{G} {interval(found['pass'][str(G)])}",
        f"  informative groups {interval(found['informative_share'])}, all wrong {mean['all_wrong_share']:.3f}, "
        f"all right {mean['all_right_share']:.3f}",
        f"  ended with EOS {mean['eos_rate']:.3f}, cut at {found['max_new_tokens']:,} tokens "
        f"{mean['truncated_share']:.3f}; {found['mean_tokens']:.1f} tokens, entropy {found['entropy']:.3f} nats",
        *(f"  {note}" for note in found["notes"]),
        *(f"warning: {warning}" for warning in found["warnings"]),
    ]


def compare(run: Run) -> dict[str, Any] | None:
    """The predicted share of informative groups against what happened; None where either is not there.

    `first` is the first generation of RL, sampled from the very policy that was measured; `difference` is first −
    predicted, and `as_predicted` whether its interval holds 0 (None where a group's signal is not that of its verdicts,
    or one group decides nothing). `mean` is over the generations of the run, in which the policy has moved on.
    """
    found = run.read_json(FILE)
    shares = [row["informative_share"] for row in run.metrics("rl") if "informative_share" in row]
    if found is None or not shares or run.recipe.rl is None:
        return None
    groups = run.recipe.rl.prompts
    informative = round(shares[0] * groups)
    first = mean_with_interval([1.0] * informative + [0.0] * (groups - informative), bounds=(0.0, 1.0))
    told, out = found["informative_share"], {}
    if told["low"] is not None and groups > 1:
        gap = difference(Estimate(**told, questions=found["prompts"]), first)
        out = {"difference": gap.numbers(), "as_predicted": gap.low <= 0 <= gap.high if found["judged"] else None}
    return {
        "predicted": told,
        "first": first.numbers(),
        "groups": groups,
        "mean": sum(shares) / len(shares),
        "generations": len(shares),
        **({"difference": None, "as_predicted": None} | out),
    }
