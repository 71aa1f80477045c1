"""What is checked before step 1: the failures that would otherwise be silent. Each names a row and a remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from heatbath import models
from heatbath.data import rendering
from heatbath.data.rendering import IGNORE, Rendered
from heatbath.data.rows import Row
from heatbath.errors import DataError, RecipeError, RunError
from heatbath.verify.graders import Grader, Kind, as_gold

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from heatbath.recipe import Recipe

MOST_TRUNCATED = 0.01  # share of rows that may be cut before it is an error
MOST_UNKNOWN = 0.01
MOST_PROGRAMS = 20  # programming problems whose tests are tried before step 1
MOST_LOST = 0.5  # of gold answers that a plain statement does not bring through the grader (of MATH's it is 0.25 %)
MOST_WRONG = 0.5  # of demonstrations by their own gold answers; below it may be noise that was put there on purpose
GRADED = 200  # demonstrations that are graded before step 1
PRETRAIN_LENGTH = 1024  # tokens; the context of a model that [pretrain] makes
# Architectures whose table of positions has an end, instead of rotating by any angle.
ENDING = ("gpt2", "gpt_bigcode", "gpt_neo", "gptj", "codegen", "opt", "biogpt", "xglm")
# What exports write where an answer is missing; a text may be an answer, these are none.
PLACEHOLDERS = ("nan", "none", "null", "n/a", "na", "inf", "-inf", "tbd", "todo", "unknown")


def rendered(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], recipe: Recipe, split: str) -> list[Rendered]:
    """The demonstrations of a split as the loss sees them. Raises DataError for each of the silent failures: nothing
    supervised, EOS not supervised or in the middle of a solution, BOS twice, more than 1 % of the rows cut without
    leave, or with tokens that the tokenizer does not know."""
    longest = recipe.sft.max_length if recipe.sft is not None else PRETRAIN_LENGTH
    out = []
    for row in rows:
        require_no_end_inside(tokenizer, row)
        made = rendering.render(tokenizer, row, system=recipe.data.system, max_length=longest)
        where = f"data.{split}, {rendering.place(row)}"
        require_supervised(made, where, longest)
        require_one_bos(made.input_ids, tokenizer.bos_token_id, where)
        require_end_supervised(made, tokenizer.eos_token_id, where)
        out.append(made)
    require_known_tokens(tokenizer, [row.input_ids for row in out], rows, f"data.{split}")
    if recipe.sft is None or not recipe.sft.truncate:
        require_few_truncated(out, rows, longest, f"data.{split}")
    return out


def require_supervised(row: Rendered, where: str, max_length: int, stage: str = "sft") -> None:
    """At least one token of the row must be learned."""
    if row.supervised == 0:
        raise DataError(
            f"no supervised token: the prompt alone fills max_length = {max_length}",
            where,
            f"raise {stage}.max_length or drop the row",
        )


def require_end_supervised(row: Rendered, eos: int, where: str) -> None:
    """A row that is not cut must teach the model to stop."""
    if not row.truncated and row.labels[-1] != eos:
        last = "nothing" if row.labels[-1] == IGNORE else f"token {row.labels[-1]}"
        raise DataError(
            f"EOS is not supervised: the row ends in {last}, not in EOS (token {eos}); the policy would never stop",
            where,
            "end each solution with the tokenizer's EOS, and leave it in the labels",
        )


def require_no_end_inside(tokenizer: PreTrainedTokenizerBase, row: Row) -> None:
    """A solution that contains the end token would be learned only up to it."""
    if row.solution is not None and tokenizer.eos_token and tokenizer.eos_token in row.solution:
        raise DataError(
            f"the solution contains the end token {tokenizer.eos_token}; what follows it would not be learned",
            rendering.place(row),
            "remove the token from the text: it is added when the row is rendered",
        )


def require_one_bos(ids: Sequence[int], bos: int | None, where: str) -> None:
    """Two BOS in front is another prompt than the one the base was trained on."""
    if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        raise DataError(
            f"the row begins with BOS (token {bos}) twice",
            where,
            "remove bos_token from the chat template, or from the text of the rows",
        )


def require_few_truncated(
    made: Sequence[Rendered], rows: Sequence[Row], longest: int, where: str, stage: str = "sft"
) -> None:
    """Cut rows teach answers without an end; more than `MOST_TRUNCATED` of them needs the stage's `truncate = true`."""
    cut = [i for i, row in enumerate(made) if row.truncated]
    if len(cut) > MOST_TRUNCATED * len(made):
        raise DataError(
            f"{len(cut):,} of {len(made):,} rows ({len(cut) / len(made):.1%}) are longer than {stage}.max_length "
            f"= {longest} and would lose their end, the answer and EOS",
            f"{where}, first: {rendering.place(rows[cut[0]])}",
            f"raise {stage}.max_length, drop the long rows, or set {stage}.truncate = true",
        )


def require_known_tokens(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[Sequence[int]], rows: Sequence[Row], where: str
) -> None:
    """Text that the tokenizer cannot write becomes one and the same unknown token; up to `MOST_UNKNOWN` of rows may."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        return
    bad = [row for row, tokens in zip(rows, ids, strict=True) if unknown in tokens]
    if len(bad) > MOST_UNKNOWN * len(rows):
        raise DataError(
            f"{len(bad):,} of {len(rows):,} rows hold characters that the tokenizer does not know "
            f"({tokenizer.unk_token})",
            f"{where}, first: {rendering.place(bad[0])}",
            "replace the characters, or take a model whose tokenizer knows them",
        )


def demonstrations(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], recipe: Recipe) -> list[list[int]]:
    """The token ids of each prompt's solution, EOS included, for policies that learn from them during RL. Raises
    DataError where one is missing, or where more than 1 % are longer than a completion may be; with `rl.truncate` those
    are cut."""
    assert recipe.rl is not None
    longest, name = recipe.rl.max_new_tokens, recipe.rl.policy.name
    missing = [row for row in rows if row.solution is None]
    if missing:
        raise DataError(
            f"{len(missing):,} of {len(rows):,} prompts have no solution, which the policy '{name}' learns from",
            f"data.prompts, first: {rendering.place(missing[0])}",
            "name the column of the solutions in data.fields.solution, or take a policy that needs none",
        )
    out = []
    for row in rows:
        require_no_end_inside(tokenizer, row)
        made = rendering.render(tokenizer, row, system=recipe.data.system)
        out.append([label for label in made.labels if label != IGNORE])
    if recipe.rl.truncate:
        return [ids[:longest] for ids in out]
    long = [i for i, ids in enumerate(out) if len(ids) > longest]
    if len(long) > MOST_TRUNCATED * len(rows):
        raise DataError(
            f"{len(long):,} of {len(rows):,} solutions are longer than rl.max_new_tokens = {longest} and would be cut "
            "before their end",
            f"data.prompts, first: {rendering.place(rows[long[0]])}",
            "raise rl.max_new_tokens, drop the long rows, or set rl.truncate = true",
        )
    return out


def require_vocabulary(tokenizer: PreTrainedTokenizerBase, config: Any) -> None:
    """Every id that the tokenizer can give must have a row in the model's embedding (a padded vocabulary has more)."""
    known, given = config.get_text_config().vocab_size, len(tokenizer)
    if given > known:
        last = tokenizer.convert_ids_to_tokens(given - 1)
        raise RunError(
            f"tokenizer and model have different vocabularies: {given:,} tokens against {known:,} embeddings",
            f"model; the last token is {last!r}",
            "take both from the same folder; after adding tokens, resize the model's embeddings and save it",
        )


def beyond_context(config: Any, stage: str, longest: int, new: int) -> list[str]:
    """What to say where the longest prompt and the new tokens that a stage allows do not fit into the model's context.
    Raises RecipeError for RL of a model whose table of positions ends there."""
    context = PRETRAIN_LENGTH if config is None else models.context_of(config)
    if context is None or longest + new <= context:
        return []
    said = f"a prompt of {longest:,} tokens and {stage}.max_new_tokens = {new:,} exceed the model's context of "
    said += f"{context:,} tokens"
    if stage != "rl":
        return [f"{said}: completions end there"]
    if config is not None and config.get_text_config().model_type in ENDING:
        lower = f"rl.max_new_tokens = {context - longest} or less" if longest < context else "shorter prompts"
        raise RecipeError(said, "rl.max_new_tokens", f"{lower}, or a model with a longer context")
    return [f"{said}: beyond it the model has learned nothing"]


def require_askable(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], recipe: Recipe, split: str) -> None:
    """The same checks on what RL and evaluation ask: one BOS, known tokens."""
    ids = [rendering.prompt_ids(tokenizer, rendering.messages(row, recipe.data.system)) for row in rows]
    for row, tokens in zip(rows, ids, strict=True):
        require_one_bos(tokens, tokenizer.bos_token_id, f"data.{split}, {rendering.place(row)}")
    require_known_tokens(tokenizer, ids, rows, f"data.{split}")


def require_gold(grader: Grader, rows: Sequence[Row], split: str, kind: Kind = "math") -> None:
    """Every gold answer must be one: for math no placeholder for a missing one, not without letter or digit, and right
    when it is graded against itself; for the others one that the grader can read (of programs, the first few)."""
    if kind != "math":
        _require_readable(grader, rows, split, kind)
        return
    golds = [str(row.answer) for row in rows]
    verdicts = grader.grade([f"\\boxed{{{gold}}}" for gold in golds], golds)
    bad = [
        (row, verdict.status)
        for row, gold, verdict in zip(rows, golds, verdicts, strict=True)
        if verdict.status != "right" or gold.strip().casefold() in PLACEHOLDERS or not any(map(str.isalnum, gold))
    ]
    if bad:
        row, status = bad[0]
        why = "not an answer" if status == "right" else f"{status} against itself"
        raise DataError(
            f"{len(bad):,} of {len(rows):,} gold answers cannot be graded; the first is "
            f"{str(row.answer)[:80]!r} ({why})",
            f"data.{split}, {rendering.place(row)}",
            "write the final answer alone (42, 3/4, x^2 + 1); data.fields.answer_after cuts it out of a longer text",
        )
    stated = grader.grade([f"The answer is {gold}." for gold in golds], golds)
    lost = [(row, verdict) for row, verdict in zip(rows, stated, strict=True) if verdict.status != "right"]
    if len(lost) > MOST_LOST * len(rows):
        row, verdict = lost[0]
        raise DataError(
            f"{len(lost):,} of {len(rows):,} gold answers are not found right in a completion that states them; of "
            f"'The answer is {str(row.answer)[:60]}.' {verdict.answer!r} is read",
            f"data.{split}, {rendering.place(row)}",
            "ask for a box (data.system), or write the answer as a model would state it",
        )


def _require_readable(grader: Grader, rows: Sequence[Row], split: str, kind: Kind) -> None:
    program = "```python\npass\n```" if kind == "code" else ""
    tried = [program if number < MOST_PROGRAMS else "" for number in range(len(rows))]
    verdicts = grader.grade(tried, [as_gold(kind, row.answer) for row in rows])
    bad = [(r, v) for r, v in zip(rows, verdicts, strict=True) if v.status in ("bad_gold", "refused")]
    if bad:
        row, verdict = bad[0]
        raise DataError(
            f"{len(bad):,} of {len(verdicts):,} gold answers cannot be graded: {verdict.status}, {verdict.rule}",
            f"data.{split}, {rendering.place(row)}",
            "docs/verify.md shows what a gold answer of this kind looks like",
        )


def require_right_solutions(grader: Grader, rows: Sequence[Row], split: str, kind: Kind = "math") -> None:
    """Most solutions must be right by their own gold answers: what the grader does not read in them it would not reward
    in a completion that the policy learned from them. Rows without either, or whose gold answer is none, are passed
    over; of many a sample is graded."""
    both = sorted((row for row in rows if row.solution is not None and row.answer is not None), key=lambda row: row.id)
    tried = both[: MOST_PROGRAMS if kind == "code" else GRADED]  # in the order of their hashes: spread, and the same
    verdicts = grader.grade([row.solution or "" for row in tried], [as_gold(kind, row.answer) for row in tried])
    judged = [(row, verdict) for row, verdict in zip(tried, verdicts, strict=True) if verdict.status != "bad_gold"]
    bad = [(row, verdict) for row, verdict in judged if verdict.status != "right"]
    if len(bad) <= MOST_WRONG * len(judged):
        return
    row, verdict = bad[0]
    read = f"{verdict.answer[:60]!r}" if verdict.answer else "nothing"
    what = "the tests" if kind == "code" else repr(str(row.answer)[:60])
    sampled = " sampled" if len(tried) < len(both) else ""
    raise DataError(
        f"{len(bad):,} of {len(judged):,}{sampled} solutions are not right by their own gold answers; {read} is read "
        f"in the one that ends in {(row.solution or '')[-60:]!r} ({verdict.status}), whose gold answer is {what}",
        f"data.{split}, {rendering.place(row)}",
        "end each solution as reward.kind reads it (\\boxed{42}, The answer is 42.; docs/verify.md), or correct the "
        "answers",
    )
