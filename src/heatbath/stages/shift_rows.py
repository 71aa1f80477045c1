"""The sequences on which the shift between two models is read: held-out demonstrations, or a run's own samples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from heatbath.data import rendering, sources
from heatbath.data.rendering import IGNORE, Rendered
from heatbath.data.rows import Row
from heatbath.errors import DataError, RunError
from heatbath.recipe import SFT
from heatbath.run import OWN_TEST
from heatbath.stages.shift_settings import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from heatbath.recipe import Recipe
    from heatbath.run import Run


@dataclass(frozen=True)
class Sequences:
    """Token sequences with the tokens to be compared as labels, each with the id of its problem; how many were cut at
    `max_length`, how many samples of an earlier version had to be tokenised anew from their text, and how many
    sequences were left out because no token of theirs could be compared."""

    rows: list[Rendered]
    problems: list[str]
    source: str
    max_length: int
    retokenised: int = 0
    left_out: int = 0

    @property
    def tokens(self) -> list[int]:
        """Compared tokens of each sequence."""
        return [row.supervised for row in self.rows]

    def report(self) -> dict[str, Any]:
        """What shift.json says about them; the fingerprint is the same for the same tokens in the same order."""
        digest = hashlib.sha256()
        for row, problem in zip(self.rows, self.problems, strict=True):
            digest.update(repr((problem, row.input_ids, row.labels)).encode())
        return {
            "source": self.source,
            "sequences": len(self.rows),
            "problems": len(set(self.problems)),
            "tokens": sum(self.tokens),
            "truncated": sum(row.truncated for row in self.rows),
            "retokenised": self.retokenised,
            "left_out": self.left_out,
            "max_length": self.max_length,
            "fingerprint": digest.hexdigest()[:16],
        }


def demonstrations(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, settings: Settings, source: str) -> Sequences:
    """The demonstrations of a split as the loss sees them. Raises DataError where there are none."""
    rows = [row for row in getattr(sources.of(recipe), settings.split) if row.solution is not None]
    if not rows:
        raise DataError(
            f"there are no {settings.split} demonstrations to compare the models on",
            f"data.{settings.split} of {source}",
            "split=test where its problems have solutions, --data RECIPE with other rows, or --on samples:final",
        )
    first, longest = _first([row.id for row in rows], settings.problems), _longest(recipe, settings)
    kept = [row for row in rows if row.id in first]
    made = [rendering.render(tokenizer, row, system=recipe.data.system, max_length=longest) for row in kept]
    return _chosen(made, [row.id for row in kept], settings, f"{settings.split} of {source}", longest)


def samples(run: Run, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, settings: Settings, source: str) -> Sequences:
    """What a policy of the run answered to the run's own test problems. Raises RunError where it answered none."""
    policy = settings.policy
    drawn = run.samples(policy, OWN_TEST)
    if not drawn:
        what = f"the run holds no samples of '{policy}' on its own problems"
        raise RunError(what, source, "heatbath eval draws them")
    questions = {row.id: row for row in sources.of(recipe).test}
    first, longest = _first([row["problem"] for row in drawn], settings.problems), _longest(recipe, settings)
    made, problems, anew = [], [], 0
    for sample in (row for row in drawn if row["problem"] in first):
        question = questions.get(sample["problem"])
        if question is None:
            raise RunError(f"the data no longer has the problem {sample['problem']}", source, "use the run's own data")
        made.append(_answered(tokenizer, recipe, question, sample, longest))
        problems.append(sample["problem"])
        anew += "ids" not in sample
    return _chosen(made, problems, settings, f"samples of {policy} in {source}", longest, anew)


def _answered(
    tokenizer: PreTrainedTokenizerBase, recipe: Recipe, question: Row, sample: dict[str, Any], longest: int
) -> Rendered:
    """A sample after its prompt. Earlier versions stored its text alone: that is tokenised, and EOS put after it."""
    prompt = rendering.prompt_ids(tokenizer, rendering.messages(question, recipe.data.system))
    answer = sample.get("ids")
    if answer is None:
        answer = list(tokenizer(sample["completion"], add_special_tokens=False)["input_ids"])
        answer += [tokenizer.eos_token_id] if sample["finished"] else []
    ids, labels = [*prompt, *answer], [IGNORE] * len(prompt) + list(answer)
    return Rendered(ids[:longest], labels[:longest], truncated=len(ids) > longest)


def _chosen(
    made: Sequence[Rendered], problems: Sequence[str], settings: Settings, source: str, longest: int, anew: int = 0
) -> Sequences:
    """With the compared tokens as labels. A sequence without any (its prompt fills `max_length`) is left out and
    counted; raises DataError where none is left."""
    labelled = [Rendered(row.input_ids, _compared(row, settings.tokens), row.truncated) for row in made]
    kept = [i for i, row in enumerate(labelled) if any(label != IGNORE for label in row.labels[1:])]
    if not kept:
        raise DataError("no sequence has a token to compare", source, f"raise max_length = {longest}")
    rows, ids = [labelled[i] for i in kept], [problems[i] for i in kept]
    return Sequences(rows, ids, source, longest, anew, len(made) - len(kept))


def _compared(row: Rendered, tokens: str) -> list[int]:
    """The labels of the tokens to be compared: that of a token stands for the state before it, which predicts it."""
    if tokens == "response":
        return [IGNORE, *row.labels[1:]]
    skipped = 2 if tokens == "all-but-first" else 1
    return [IGNORE] * min(skipped, len(row.input_ids)) + row.input_ids[skipped:]


def _first(problems: Sequence[str], count: int) -> set[str]:
    return set(list(dict.fromkeys(problems))[:count])


def _longest(recipe: Recipe, settings: Settings) -> int:
    return settings.max_length or (recipe.sft or SFT()).max_length
