"""Messages to token ids and supervised mask, through the model's own chat template, in this one place.

Training, RL and evaluation all call `prompt_ids`, so a model is never asked in another form than it was taught in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import jinja2

from heatbath.data.rows import Row
from heatbath.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE = -100
# What a template raises by raise_exception, and what its expressions may.
TEMPLATE_ERRORS = (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Rendered:
    """One demonstration: ids, and labels equal to them where supervised (solution and EOS), -100 elsewhere.

    `columns` are numbers of the row that an objective reads, one per token (0 where it is not supervised).
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool
    columns: dict[str, list[float]] = field(default_factory=dict)

    @property
    def supervised(self) -> int:
        return sum(label != IGNORE for label in self.labels)


def messages(row: Row, system: str | None = None) -> list[dict[str, str]]:
    """The conversation up to and including the question. Raises DataError when row and recipe both have a system
    message: one would overwrite the other."""
    history = [{"role": role, "content": content} for role, content in row.history]
    if system and any(turn["role"] == "system" for turn in history):
        raise DataError("the row has a system message of its own", row.origin, "leave out data.system, or the row's")
    head = [{"role": "system", "content": system}] if system else []
    return [*head, *history, {"role": "user", "content": row.question}]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, str]]) -> list[int]:
    """Ids of a conversation that the assistant is about to answer."""
    return _ids(tokenizer, conversation, add_generation_prompt=True)


def render(
    tokenizer: PreTrainedTokenizerBase, row: Row, *, system: str | None = None, max_length: int | None = None
) -> Rendered:
    """Ids and labels of a demonstration, cut on the right at `max_length` tokens.

    The supervised part is what the template adds after the prompt, up to the first EOS, which is always included: where
    the template closes the turn without EOS, EOS takes the place of that closing (arXiv 2601.09233's code does so);
    nothing is masked by token id, so a pad token equal to EOS (SmolLM2) cannot hide it. Raises DataError when the
    template renders the prompt differently once the answer follows, because the boundary would then be a guess.
    """
    if row.solution is None:
        raise DataError("a demonstration without a solution", place(row), "give it a solution")
    conversation = messages(row, system)
    prompt = prompt_ids(tokenizer, conversation)
    full = _ids(tokenizer, [*conversation, {"role": "assistant", "content": row.solution}])
    if full[: len(prompt)] != prompt:
        raise DataError(
            "the chat template renders the prompt differently when an answer follows it",
            place(row),
            "use a template whose generation prompt is a prefix of the whole conversation",
        )
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("the tokenizer has no EOS token", "model", "set tokenizer.eos_token and save it with the model")
    completion = full[len(prompt) :]
    if eos in completion:
        completion = completion[: completion.index(eos) + 1]
    else:  # a template made for another end token (Qwen's base): the solution ends in the tokenizer's own
        completion = [*_without_closing(tokenizer, completion), eos]
    ids = prompt + completion
    labels = [IGNORE] * len(prompt) + completion
    cut = max_length is not None and len(ids) > max_length
    columns = {
        name: ([0.0] * len(prompt) + _per_token(name, value, len(completion), row))[:max_length]
        for name, value in row.columns.items()
    }
    return Rendered(ids[:max_length], labels[:max_length], truncated=cut, columns=columns)


def _per_token(name: str, value: float | list[float], tokens: int, row: Row) -> list[float]:
    """A column's numbers at the supervised tokens. Raises DataError where there are not as many as tokens."""
    if isinstance(value, int | float):
        return [float(value)] * tokens
    if len(value) != tokens:
        raise DataError(
            f"the column '{name}' holds {len(value)} numbers for {tokens} supervised tokens (the solution's and EOS)",
            place(row),
            "give one number for the row, or one per supervised token of this very tokenizer and template",
        )
    return [float(x) for x in value]


def _without_closing(tokenizer: PreTrainedTokenizerBase, completion: list[int]) -> list[int]:
    """The completion without the special tokens and white space with which a template closes a turn."""
    end = len(completion)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    while end and (completion[end - 1] in special or not tokenizer.decode(completion[end - 1 : end]).strip()):
        end -= 1
    return completion[:end]


def place(row: Row) -> str:
    """Where a row is, in words a user can find it by."""
    return f"{row.origin}: {row.question[:80]!r}" if row.origin else f"question {row.question[:80]!r}"


def _ids(tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, str]], **kwargs: Any) -> list[int]:
    if not tokenizer.chat_template:
        raise DataError(
            "the model's tokenizer has no chat template",
            "model",
            "use a model that ships one, or set tokenizer.chat_template and save the tokenizer with the model",
        )
    try:
        encoded = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True, **kwargs)
    except TEMPLATE_ERRORS as error:
        said = (
            f"the chat template refuses a conversation of {', '.join(turn['role'] for turn in conversation)}: {error}"
        )
        remedy = "bring the turns into the order that the template wants, or give another `template`"
        raise DataError(said, f"template; the question is {conversation[-1]['content'][:80]!r}", remedy) from None
    return list(encoded["input_ids"])
