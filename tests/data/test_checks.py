"""The checks before step 1 on rows that trip them and on rows beside them that do not (see also test_mistakes.py)."""

import pytest

from conftest import small_model, small_tokenizer
from heatbath.data import checks
from heatbath.data.rendering import IGNORE, Rendered
from heatbath.data.rows import Row
from heatbath.errors import DataError, RunError
from heatbath.recipe import parse
from heatbath.reference import FrozenBase, require_same_vocabulary
from heatbath.verify.math import MathGrader

EOS = 1


def recipe(**sft: object):
    return parse({"model": "m", "data": {"source": "arithmetic"}, "sft": sft})


def test_a_row_that_does_not_teach_the_end_is_refused() -> None:
    good = Rendered([5, 6, EOS], [IGNORE, 6, EOS], truncated=False)
    checks.require_end_supervised(good, EOS, "row 3")
    masked = Rendered([5, 6, EOS], [IGNORE, 6, IGNORE], truncated=False)
    with pytest.raises(DataError, match="EOS is not supervised: the row ends in nothing") as caught:
        checks.require_end_supervised(masked, EOS, "data.demos, row 3")
    assert caught.value.where == "data.demos, row 3" and "leave it in the labels" in caught.value.remedy
    other = Rendered([5, 6], [IGNORE, 6], truncated=False)
    with pytest.raises(DataError, match="ends in token 6, not in EOS"):
        checks.require_end_supervised(other, EOS, "row 3")
    checks.require_end_supervised(Rendered([5, 6], [IGNORE, 6], truncated=True), EOS, "row 3")


def test_one_percent_may_be_cut_and_more_only_with_leave() -> None:
    rows = [Row(f"q{i}", "1") for i in range(200)]
    long = [Row(f"long{i}", "1" * 50) for i in range(3)]
    made = recipe(max_length=40)
    assert sum(r.truncated for r in checks.rendered(small_tokenizer(), rows[:198] + long[:2], made, "demos")) == 2
    with pytest.raises(DataError, match=r"3 of 200 rows \(1.5%\)") as caught:
        checks.rendered(small_tokenizer(), rows[:197] + long, made, "demos")
    assert "long0" in caught.value.where and "sft.truncate = true" in caught.value.remedy
    leave = recipe(max_length=40, truncate=True)
    assert sum(r.truncated for r in checks.rendered(small_tokenizer(), rows[:197] + long, leave, "demos")) == 3


def test_two_bos_in_a_prompt_are_refused_and_one_is_not() -> None:
    tokenizer = small_tokenizer()
    tokenizer.bos_token = "<|system|>"
    asked = recipe()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    checks.require_askable(tokenizer, [Row("q")], asked, "test")
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(DataError, match="begins with BOS"):
        checks.require_askable(tokenizer, [Row("q", origin="row 7")], asked, "test")


def test_a_padded_vocabulary_is_fine_and_a_short_one_is_not() -> None:
    tokenizer, config = small_tokenizer(), small_model().config
    config.vocab_size = len(tokenizer) + 400
    checks.require_vocabulary(tokenizer, config)
    config.vocab_size = len(tokenizer) - 1
    with pytest.raises(RunError, match="different vocabularies"):
        checks.require_vocabulary(tokenizer, config)


def test_a_reference_of_another_vocabulary_is_not_the_base_of_the_policy() -> None:
    policy, other = small_model(0), small_model(1)
    require_same_vocabulary(policy, FrozenBase(other))
    other.resize_token_embeddings(64)
    with pytest.raises(RunError, match="not the base of the policy: 64 against 101"):
        require_same_vocabulary(policy, FrozenBase(other))


def test_golds_of_every_kind_are_read_and_an_unreadable_one_is_named() -> None:
    golds = ["42", "-3/4", "1,234.5", "\\frac{1}{2}", "x^2 + 1", "(3, 4)", "\\sqrt{2}"]
    rows = [Row(f"q{i}", answer=gold) for i, gold in enumerate(golds)]
    with MathGrader(workers=1) as grader:
        checks.require_gold(grader, rows, "test")
        for bad in ("", "nan", "None", "n/a", "???", "\\frac{1", "x" * 1001):
            with pytest.raises(DataError, match="1 of 8 gold answers cannot be graded") as caught:
                checks.require_gold(grader, [*rows, Row("why?", answer=bad, origin="t.jsonl, row 8")], "test")
            assert "t.jsonl, row 8" in caught.value.where


def test_solutions_that_the_grader_does_not_read_are_named_and_noise_is_borne() -> None:
    def rows(right: int, wrong: int) -> list[Row]:
        made = [Row(f"q{i}", f"{i} + 1 = {i + 1}", str(i + 1)) for i in range(right)]
        return made + [Row(f"w{i}", f"so it is {i}", str(i + 1)) for i in range(wrong)]

    words = [
        Row(f"who is {name}?", name, name, origin=f"t.jsonl, row {i}") for i, name in enumerate(("mother", "aunt"))
    ]
    stated = [Row(row.question, f"The answer is {row.answer}.", row.answer) for row in words]
    silent = [Row("no answer", "so on"), Row("no solution", None, "3")]
    with MathGrader(workers=1) as grader:
        checks.require_gold(grader, words, "prompts")  # a statement would be read
        checks.require_right_solutions(grader, [], "demos")
        checks.require_right_solutions(grader, silent, "demos")
        checks.require_right_solutions(grader, [*rows(10, 10), *silent], "demos")
        checks.require_right_solutions(grader, stated, "demos")
        with pytest.raises(DataError, match="11 of 21 solutions are not right by their own gold answers") as caught:
            checks.require_right_solutions(grader, [*rows(10, 11), *silent], "demos")
        assert "data.demos, question 'w" in caught.value.where
        with pytest.raises(DataError, match=r"2 of 2 solutions .* nothing is read in the one that ends in") as caught:
            checks.require_right_solutions(grader, words, "demos")
        assert "t.jsonl, row" in caught.value.where and "boxed{42}" in caught.value.remedy
        with pytest.raises(DataError, match=r"\d+ of 200 sampled solutions"):
            checks.require_right_solutions(grader, rows(100, 900), "demos")
        checks.require_right_solutions(grader, rows(700, 300), "demos")
