"""A tokenizer of single characters, for models small enough to be pretrained on a laptop."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END, PAD, UNKNOWN = "<|end|>", "<|pad|>", "<|unknown|>"
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
# The question on a line of its own, the solution on the next, then the end token.
TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{{ eos_token if message.role == 'assistant' else '\\n' }}{% endfor %}"
)


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character and the line feed; any other character is `<|unknown|>`. V = 99."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = [PAD, END, UNKNOWN]
    backend = Tokenizer(models.WordLevel({t: i for i, t in enumerate(special + CHARACTERS)}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=PAD, unk_token=UNKNOWN, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer
