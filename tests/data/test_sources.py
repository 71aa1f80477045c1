"""Rows from files: what is read, and every way a file can be wrong."""

import json
from pathlib import Path

import pytest

from heatbath.data import sources
from heatbath.data.sources import read_jsonl
from heatbath.errors import DataError
from heatbath.recipe import ArithmeticData, Fields, JsonlData

NAMES = {"question": "question", "solution": "solution", "answer": "answer"}


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return path


def test_arithmetic_splits_are_disjoint_and_independent_of_the_other_sizes() -> None:
    small = sources.load(ArithmeticData(source="arithmetic", demos=20, validation=5, prompts=10, test=15), seed=0)
    large = sources.load(ArithmeticData(source="arithmetic", demos=40, validation=5, prompts=90, test=15), seed=0)
    ids = [row.id for split in vars(small).values() for row in split]
    assert len(ids) == len(set(ids)) == 50
    assert [r.id for r in small.test] == [r.id for r in large.test]
    assert [r.id for r in small.demos] == [r.id for r in large.demos][:20]


def test_fields_are_mapped(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", {"q": "1 + 1?", "s": "1 + 1 = 2", "a": 2}, "", {"q": "2?", "s": "2"})
    data = JsonlData(source="jsonl", demos=path, fields=Fields(question="q", solution="s", answer="a"))
    rows = sources.load(data, 0).demos
    assert [(r.question, r.solution, r.answer) for r in rows] == [("1 + 1?", "1 + 1 = 2", "2"), ("2?", "2", None)]


def test_gsm8k_is_read_as_it_is(shared_data: Path) -> None:
    rows = read_jsonl(shared_data / "gsm8k" / "test.jsonl", {"question": "question", "solution": "answer"}, (), "x")
    assert len(rows) == 1319 and rows[0].solution.endswith("#### 18")


@pytest.mark.parametrize(
    ("rows", "message", "where"),
    [
        (["{"], "not JSON", "row 1"),
        ([{"question": "q", "answer": "1"}, "[1]"], "not a JSON object", "row 2"),
        ([{"question": "q"}], "no 'answer'", "row 1"),
        ([{"answer": "1"}], "no 'question'", "row 1"),
        ([{"question": "  ", "answer": "1"}], "no 'question'", "row 1"),
        ([{"question": "q", "answer": ["1"]}], "is a list", "row 1"),
        ([], "holds no rows", "d.jsonl"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, rows: list, message: str, where: str) -> None:
    with pytest.raises(DataError) as caught:
        read_jsonl(write(tmp_path / "d.jsonl", *rows), NAMES, ("answer",), "data.test")
    assert message in caught.value.what and where in caught.value.where and "data.test" in caught.value.where
    assert caught.value.remedy


def test_missing_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_jsonl(tmp_path / "absent.jsonl", NAMES, (), "data.demos")
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot read"):
        read_jsonl(tmp_path / "b.jsonl", NAMES, (), "data.demos")


@pytest.mark.parametrize("held_out", ["test", "validation"])
@pytest.mark.parametrize("trained_on", ["demos", "prompts"])
def test_a_held_out_problem_that_is_trained_on_is_refused(tmp_path: Path, held_out: str, trained_on: str) -> None:
    row = {"question": "1 + 1?", "solution": "2", "answer": "2"}
    other = {**row, "question": "2 + 2?"}
    files = {held_out: write(tmp_path / "h.jsonl", row), trained_on: write(tmp_path / "t.jsonl", other, row)}
    with pytest.raises(DataError, match=f"also stand in data.{trained_on}"):
        sources.load(JsonlData(source="jsonl", **files), 0)


def test_demonstrations_and_prompts_may_share_and_a_benchmark_may_repeat_a_question(tmp_path: Path) -> None:
    row = {"question": "1 + 1?", "solution": "2", "answer": "2"}
    path = write(tmp_path / "d.jsonl", row)
    sources.load(JsonlData(source="jsonl", demos=path, prompts=path), 0)
    repeated = write(tmp_path / "t.jsonl", {"question": "q", "answer": "1"}, {"question": "q", "answer": "2"})
    test = sources.load(JsonlData(source="jsonl", test=repeated), 0).test
    assert test[0].id != test[1].id


def test_only_a_newline_ends_a_row_and_a_byte_order_mark_is_none(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    rows = [{"question": "a\u2028b\x85c", "answer": "1"}, {"question": "d", "answer": "2"}]
    path.write_text("\ufeff" + "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    assert [r.question for r in read_jsonl(path, NAMES, ("answer",), "x")] == ["a\u2028b\x85c", "d"]


def test_every_question_of_a_real_benchmark_is_read(shared_data: Path) -> None:
    rows = read_jsonl(shared_data / "mmlu_redux" / "test.jsonl", {"question": "question"}, (), "data.test")
    assert len(rows) == 5700
