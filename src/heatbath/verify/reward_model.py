"""A reward model: a sequence-classification checkpoint with one output, as a plain function and as a TRL reward.

A row's score does not depend on what it is batched with, nothing is cut in silence, and a checkpoint without a
trained head is refused: transformers would give it a random one.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from heatbath import models
from heatbath.errors import DataError, RecipeError, RunError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Conversation = Sequence[Mapping[str, Any]] | str
REMEDY = "give a checkpoint saved by an AutoModelForSequenceClassification with num_labels = 1"


class RewardModel:
    """Scores of completions by a checkpoint, through its own tokenizer and chat template; also a TRL reward function.

    `max_tokens` of prompt and completion together (default: what the model can take); longer rows are an error, or
    with truncate=True lose their first tokens and are counted in `truncated`. `sqrt_length` divides a score by the
    square root of the completion's tokens (Group-relative Implicit Fine-Tuning, arXiv 2510.23868): the policy's tokens
    where it names them, else the reward model's. `precision` is fp32, bf16 or auto (bf16 where it is native).
    """

    def __init__(
        self,
        name: str,
        *,
        batch: int = 8,
        sqrt_length: bool = False,
        max_tokens: int | None = None,
        truncate: bool = False,
        device: str | None = None,
        precision: str = "auto",
    ):
        import torch

        self.name, self.batch, self.sqrt_length, self.truncate = name, max(1, batch), sqrt_length, truncate
        self.__name__ = "reward_model"  # the name under which TRL logs it
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = _tokenizer(name)
        self.model = _model(name, models.autocast_dtype(precision) or torch.float32).to(self.device)
        self.max_tokens = max_tokens or _longest(self.model, self.tokenizer)
        self.truncated, self.scored = 0, 0  # rows, since the start
        self._lock = threading.Lock()

    def scores(
        self,
        prompts: Sequence[Conversation],
        completions: Sequence[Conversation],
        *,
        lengths: Sequence[int] | None = None,
    ) -> list[float]:
        """The score of each completion, in order.

        A prompt is a list of chat messages (a text is one user message), a completion a list of messages or the
        assistant's text; `lengths` are its tokens for `sqrt_length`. Raises DataError naming the row that is too long
        or that the chat template refuses, RunError where a score is not finite.
        """
        rows = [self._ids(p, c, i) for i, (p, c) in enumerate(zip(prompts, completions, strict=True))]
        long = [i for i, ids in enumerate(rows) if self.max_tokens is not None and len(ids) > self.max_tokens]
        if long and not self.truncate:
            raise DataError(
                f"{len(long)} of {len(rows)} rows are longer than the reward model's {self.max_tokens:,} tokens",
                f"row {long[0]} with {len(rows[long[0]]):,} tokens",
                "raise max_tokens, lower the completion length, or cut them with truncate = true (counted)",
            )
        self.truncated, self.scored = self.truncated + len(long), self.scored + len(rows)
        values = self._forward([ids[-self.max_tokens :] if self.max_tokens else ids for ids in rows])
        if self.sqrt_length:
            tokens = lengths if lengths is not None else [self._length(c) for c in completions]
            values = [v / math.sqrt(max(1, n)) for v, n in zip(values, tokens, strict=True)]
        for i, value in enumerate(values):
            if not math.isfinite(value):
                raise RunError(f"the reward model's score is {value}", f"row {i}, {self.name}", "use precision = fp32")
        return values

    def __call__(
        self,
        prompts: Sequence[Conversation],
        completions: Sequence[Conversation],
        completion_ids: Sequence[Sequence[int]] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,
    ) -> list[float]:
        """A TRL reward function: columns it does not need are ignored; the share of truncated rows is logged."""
        before = self.truncated
        lengths = [len(ids) for ids in completion_ids] if completion_ids is not None else None
        values = self.scores(prompts, completions, lengths=lengths)
        if log_metric is not None:
            log_metric("reward_model/truncated_share", (self.truncated - before) / max(1, len(values)))
        return values

    def _ids(self, prompt: Conversation, completion: Conversation, row: int) -> list[int]:
        from jinja2 import TemplateError

        conversation = [*_messages(prompt, "user"), *_messages(completion, "assistant")]
        try:
            encoded = self.tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=True)
        except TemplateError as error:
            raise DataError(
                f"the reward model's chat template refuses the conversation: {error}",
                f"row {row}, roles {', '.join(str(m.get('role')) for m in conversation)}",
                "leave out the system message, or use a reward model whose template takes one",
            ) from error
        if not encoded["input_ids"]:
            raise DataError("the reward model's chat template renders nothing", f"row {row}", "mend the template")
        return list(encoded["input_ids"])

    def _length(self, completion: Conversation) -> int:
        text = "".join(str(m["content"]) for m in _messages(completion, "assistant"))
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _forward(self, rows: list[list[int]]) -> list[float]:
        """Scores of tokenised rows: longest first, so that little is padding and a lack of memory shows at once."""
        values = [math.nan] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        for start in range(0, len(order), self.batch):
            part = order[start : start + self.batch]
            for i, value in zip(part, self._batch([rows[i] for i in part]), strict=True):
                values[i] = value
        return values

    def _batch(self, rows: list[list[int]]) -> list[float]:
        """Scores of one batch, padded on the right.

        A causal head reads the last token that is not config.pad_token_id. Where the config names none, a row alone is
        read at its very last token and several are refused; here each is read there, because they are padded with an
        id that ends none of them. Where the config names one, that one pads and the head does as it was trained (a
        closing EOS that is also the pad is passed over, alone and in a batch).
        """
        import torch

        config = self.model.config.get_text_config()
        own = config.pad_token_id
        last = {row[-1] for row in rows}
        pad = own if own is not None else next(token for token in range(len(rows) + 1) if token not in last)
        T = max(len(row) for row in rows)
        ids = torch.tensor([row + [pad] * (T - len(row)) for row in rows], device=self.device)  # [B, T]
        mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows], device=self.device)
        with self._lock, torch.no_grad():
            config.pad_token_id = pad
            try:
                logits = self.model(input_ids=ids, attention_mask=mask).logits  # [B, 1]
            finally:
                config.pad_token_id = own
        return [float(value) for value in logits[:, 0].float().tolist()]


def _messages(part: Conversation, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": part}] if isinstance(part, str) else [dict(message) for message in part]


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = _loaded(name, AutoTokenizer.from_pretrained)
    if not tokenizer.chat_template:
        raise RecipeError(
            f"the reward model '{name}' has no chat template, so how it was shown conversations is not known",
            "reward model",
            "set tokenizer.chat_template to the one it was trained with and save the tokenizer beside it",
        )
    return tokenizer


def _model(name: str, dtype: torch.dtype) -> PreTrainedModel:
    """The checkpoint in eval mode. Raises RecipeError where it has not exactly one trained output."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = _loaded(name, AutoConfig.from_pretrained)
    kind = ", ".join(config.architectures or ["unknown"])
    if config.num_labels != 1:
        raise RecipeError(
            f"'{name}' is no reward model: {kind} with {config.num_labels} outputs", "reward model", REMEDY
        )
    load = AutoModelForSequenceClassification.from_pretrained
    models.require_safetensors(models.resolve(name), "model")
    model, info = _loaded(name, load, dtype=dtype, output_loading_info=True, use_safetensors=True)
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise RecipeError(
            f"'{name}' is no reward model: {kind} without {missing}, which would be random", "reward model", REMEDY
        )
    loaded: PreTrainedModel = model.eval().requires_grad_(False)
    return loaded


def _loaded(name: str, load: Callable[..., Any], **kwargs: Any) -> Any:
    from transformers.utils import logging

    logging.disable_progress_bar()  # a bar for every file read, in the middle of ours
    try:
        return load(models.resolve(name), trust_remote_code=False, **kwargs)
    except (OSError, ValueError, SafetensorError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"cannot load the reward model '{name}': {first}", "reward model", REMEDY) from error


def _longest(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens that the model takes; None where neither config nor tokenizer says."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None), tokenizer.model_max_length]
    known = [int(limit) for limit in limits if limit is not None and 0 < limit < 10**9]
    return min(known, default=None)
