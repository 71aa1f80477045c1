"""Preference files: what is read, what is refused, and pairs made of samples."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import small_tokenizer
from heatbath.data import preferences
from heatbath.data.preferences import pairs_from_samples
from heatbath.data.rendering import render
from heatbath.data.rows import Row
from heatbath.errors import DataError
from heatbath.recipe import Recipe, parse

PAIR = {"question": "What is 1 + 1?", "chosen": "1 + 1 = 2", "rejected": "it is 3"}
SCORE = {"prompt": "What is 2 + 2?", "response": "4", "score": 0.75}
LABEL = {"prompt": "What is 3 + 3?", "completion": "7", "label": False}


def recipe(path: Path, method: str = "una", data: dict | None = None, **preference: object) -> Recipe:
    table = {"source": "arithmetic", **(data or {})}
    return parse({"model": "m", "data": table, "preference": {"data": str(path), "method": method, **preference}})


def written(folder: Path, *rows: dict) -> Path:
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_forms_are_told_by_their_fields(tmp_path: Path) -> None:
    rows, notes = preferences.load(recipe(written(tmp_path, PAIR, SCORE, LABEL)), [])
    assert [(r.kind, r.row.question, r.completions, r.target) for r in rows] == [
        ("pair", "What is 1 + 1?", ("1 + 1 = 2", "it is 3"), None),
        ("score", "What is 2 + 2?", ("4",), 0.75),
        ("label", "What is 3 + 3?", ("7",), 0.0),
    ]
    assert notes == ("p.jsonl: 1 label, 1 pair, 1 score",)
    assert rows[2].row.origin.endswith("p.jsonl, row 3 (preference.data)")


def test_tables_with_empty_columns_and_text_for_numbers(tmp_path: Path) -> None:
    """A mixed Parquet file holds every column in every row, a CSV file holds text alone."""
    pq.write_table(
        pa.Table.from_pylist([PAIR | SCORE | {"score": None, "response": None}, SCORE]), tmp_path / "p.parquet"
    )
    rows, _ = preferences.load(recipe(tmp_path / "p.parquet"), [])
    assert [(r.kind, r.target) for r in rows] == [("pair", None), ("score", 0.75)]
    (tmp_path / "p.csv").write_text("question,response,label\nq,a,True\nq,b,0\n")
    rows, _ = preferences.load(recipe(tmp_path / "p.csv"), [])
    assert [(r.kind, r.target) for r in rows] == [("label", 1.0), ("label", 0.0)]


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"chosen": "a", "rejected": "b"}, "no question or prompt in the row (it has chosen, rejected)"),
        (PAIR | {"rejected": " "}, "no 'rejected' in the row"),
        (PAIR | {"score": 0.5}, "the row is a pair, and has 'score' too"),
        ({"question": "q", "answer": "a"}, "no preference in the row: it has question, answer"),
        (SCORE | {"label": True}, "no preference in the row: it has both a score and a label"),
        (SCORE | {"score": 7}, "the score 7 is not a number from 0 to 1"),
        (SCORE | {"score": True}, "the score True is not a number"),
        (LABEL | {"label": "good"}, "the label 'good' is neither true nor false"),
        (PAIR | {"chosen": ["a"]}, "'chosen' is a list, not text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows_without_a_form_are_named(tmp_path: Path, row: dict, what: str) -> None:
    with pytest.raises(DataError) as caught:
        preferences.load(recipe(written(tmp_path, PAIR, row)), [])
    assert what in caught.value.what and "p.jsonl, row 2" in caught.value.where and caught.value.remedy


def test_an_empty_file_and_a_dpo_file_of_scores_are_named(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text("\n")
    with pytest.raises(DataError, match="the file holds no rows"):
        preferences.load(recipe(tmp_path / "e.jsonl"), [])
    with pytest.raises(DataError, match="DPO learns from pairs, and the row is a score") as caught:
        preferences.load(recipe(written(tmp_path, PAIR, SCORE), "dpo"), [])
    assert "row 2" in caught.value.where and 'preference.method = "una"' in caught.value.remedy


def test_a_test_problem_is_refused_and_a_near_copy_removed(tmp_path: Path) -> None:
    path, test = written(tmp_path, PAIR, SCORE), [Row("what is  2 + 2?", answer="4", origin="exam row 9")]
    with pytest.raises(DataError, match="1 preference row") as caught:
        preferences.load(recipe(path), test)
    assert "row 2" in caught.value.where and "exam row 9" in caught.value.where
    (tmp_path / "exam.jsonl").write_text(json.dumps({"question": "What is 2 + 2?"}) + "\n")
    decontaminated = recipe(path, data={"decontaminate": [str(tmp_path / "exam.jsonl")]})
    rows, notes = preferences.load(decontaminated, test)
    assert [row.kind for row in rows] == ["pair"] and "1 of 2 rows" in notes[1]


def test_token_ids_are_those_of_a_demonstration(tmp_path: Path) -> None:
    tokenizer, made = small_tokenizer(), recipe(written(tmp_path, PAIR, LABEL), data={"system": "Be brief."})
    rows = preferences.rendered(tokenizer, preferences.load(made, [])[0], made)
    for row, texts in zip(rows, (("1 + 1 = 2", "it is 3"), ("7",)), strict=True):
        question = PAIR["question"] if len(texts) == 2 else LABEL["prompt"]
        for text, ids in zip(texts, row.completion_ids, strict=True):
            assert row.prompt_ids + ids == render(tokenizer, Row(question, text), system="Be brief.").input_ids
            assert ids[-1] == tokenizer.eos_token_id and tokenizer.decode(ids[:-1]) == text
    assert rows[0].longest == len(rows[0].prompt_ids) + len("1 + 1 = 2") + 1


@pytest.mark.parametrize(
    ("row", "settings", "what"),
    [
        (PAIR | {"rejected": PAIR["chosen"]}, {}, "chosen and rejected are the same"),
        (PAIR | {"chosen": "so<|end|>2"}, {}, "'chosen' contains the end token <|end|>"),
        (PAIR | {"chosen": "2 × 1"}, {}, "1 of 1 rows hold characters that the tokenizer does not know"),
        (PAIR, {"max_length": 10, "truncate": True}, "no supervised token: the prompt alone fills max_length = 10"),
        (PAIR, {"max_length": 20}, "1 of 1 rows (100.0%) are longer than preference.max_length = 20"),
        (
            PAIR | {"chosen": "it is 2", "rejected": "it is 3"},
            {"max_length": 20, "truncate": True},
            "chosen and rejected are the same in the first 20 tokens",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_fail_in_silence_is_named(tmp_path: Path, row: dict, settings: dict, what: str) -> None:
    made = recipe(written(tmp_path, row), **settings)
    with pytest.raises(DataError) as caught:
        preferences.rendered(small_tokenizer(), preferences.load(made, [])[0], made)
    assert what in caught.value.what and "row 1" in caught.value.where and "sft" not in caught.value.remedy


def test_cut_rows_are_counted_with_leave(tmp_path: Path) -> None:
    made = recipe(written(tmp_path, PAIR, SCORE), max_length=25, truncate=True)
    rows = preferences.rendered(small_tokenizer(), preferences.load(made, [])[0], made)
    assert [row.truncated for row in rows] == [True, False] and rows[0].longest == 25


def sample(problem: str, completion: str, status: str, finished: bool = True) -> dict:
    return {
        "problem": problem,
        "question": f"q {problem}",
        "completion": completion,
        "status": status,
        "finished": finished,
    }


def test_pairs_of_samples_are_right_against_wrong_of_one_problem() -> None:
    samples = [
        *(sample("a", f"right {i % 3}", "right") for i in range(6)),
        *(sample("a", f"wrong {i}", "wrong") for i in range(4)),
        sample("a", "none", "no_answer"),
        sample("a", "cut", "wrong", finished=False),
        sample("a", "hung", "timeout"),
        sample("a", " ", "wrong"),
        sample("always", "x", "right"),
        sample("never", "y", "wrong"),
    ]
    pairs = pairs_from_samples(samples, per_problem=10)
    assert len(pairs) == 3 and all(pair["question"] == "q a" for pair in pairs)
    assert {pair["chosen"] for pair in pairs} == {"right 0", "right 1", "right 2"}
    assert len({pair["rejected"] for pair in pairs}) == 3
    assert {pair["rejected"] for pair in pairs} <= {"wrong 0", "wrong 1", "wrong 2", "wrong 3", "none"}
    assert pairs_from_samples(samples) == pairs[:1] == pairs_from_samples(samples[::-1])
    drawn = {pairs_from_samples(samples, seed=seed)[0]["rejected"] for seed in range(30)}
    assert len(drawn) == 5


def test_the_shipped_sums_are_right_and_wrong() -> None:
    pairs, _ = _shipped("sums")
    for row in pairs:
        _, _, a, _, b = row.row.question.rstrip("?").split()
        right, wrong = (text.split()[-1] for text in row.completions)
        assert int(right) == int(a) + int(b) != int(wrong)
    labelled, _ = _shipped("sums-labelled")
    assert [(row.completions[0], row.target) for row in labelled] == [
        (text, target) for row in pairs for text, target in zip(row.completions, (1.0, 0.0), strict=True)
    ]


def _shipped(name: str):
    return preferences.load(
        parse({"model": "m", "data": {"source": "arithmetic"}, "preference": {"data": name, "method": "una"}}), []
    )
