"""Rows from every source: what is read, how splits are drawn, and every way a table can be wrong."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from heatbath.data import sources
from heatbath.data.contamination import without_shared_ngrams
from heatbath.data.rows import Row, split_by_content
from heatbath.data.tables import read_file
from heatbath.errors import DataError, RecipeError
from heatbath.recipe import parse

SPLITS = ("demos", "validation", "prompts", "test")


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return path


def data(**table: object):
    return parse({"model": "m", "data": table}).data


def load(seed: int = 0, **table: object):
    return sources.load(data(**table), seed)


def files(folder: Path, **tables: list) -> dict:
    """A [data] table with one file for each split given."""
    named = {
        f"{split}_from": write(folder / f"{split}.jsonl", *rows).name if rows else None
        for split, rows in tables.items()
    }
    return {"source": "files", "folder": str(folder), **named}


def made(count: int, **extra: object) -> list[dict]:
    return [{"question": f"q{i}", "solution": f"s{i}", "answer": str(i), **extra} for i in range(count)]


def test_arithmetic_splits_are_disjoint_and_the_exam_is_the_same_for_every_seed() -> None:
    small = load(source="arithmetic", demos=20, validation=5, prompts=10, test=15)
    large = load(source="arithmetic", demos=40, validation=5, prompts=90, test=15)
    other = load(seed=1, source="arithmetic", demos=40, validation=5, prompts=90, test=15)
    ids = [row.id for rows in small.named().values() for row in rows]
    assert len(ids) == len(set(ids)) == 50
    assert [r.id for r in small.test] == [r.id for r in large.test] == [r.id for r in other.test]
    assert [r.id for r in small.demos] == [r.id for r in large.demos][:20]
    trained = {r.problem for s in (large, other) for r in s.demos + s.prompts}
    assert not trained & {r.problem for r in large.test + large.validation}
    assert [r.id for r in other.demos] != [r.id for r in large.demos]


def test_several_solutions_of_a_problem_are_rows_of_their_own() -> None:
    found = load(source="arithmetic", demos=5, paths=3, prompts=5, test=5, validation=5)
    assert [len(rows) for rows in found.named().values()] == [15, 5, 5, 5]
    assert len({r.problem for r in found.demos}) == 5 and len({r.solution for r in found.demos}) == 15


def test_fields_are_mapped(tmp_path: Path) -> None:
    table = files(tmp_path, demos=[{"q": "1 + 1?", "s": "1 + 1 = 2", "a": 2}, "", {"q": "2?", "s": "2"}])
    rows = load(**table, fields={"question": "q", "solution": "s", "answer": "a"}).demos
    assert [(r.question, r.solution, r.answer) for r in rows] == [("1 + 1?", "1 + 1 = 2", "2"), ("2?", "2", None)]


def test_several_solutions_from_several_fields_and_from_a_list(tmp_path: Path) -> None:
    row = {"question": "q", "a": ["s1", "s2"], "b": "s3", "answer": "1"}
    table = files(tmp_path, demos=[row], test=[{**row, "question": "t"}])
    fields = {"solution": ["a", "b"]}
    assert [r.solution for r in load(**table, paths=3, fields=fields).demos] == ["s1", "s2", "s3"]
    assert [r.solution for r in load(**table, paths=2, fields=fields).demos] == ["s1", "s2"]
    assert len(load(**table, paths=3, fields=fields).test) == 1


def test_chat_messages_are_context_question_and_solution(tmp_path: Path) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "1 + 1?"), ("assistant", "2")]
    row = {"chat": [{"role": r, "content": c} for r, c in turns]}
    found = load(**files(tmp_path, demos=[row]), fields={"messages": "chat"}).demos[0]
    assert (found.question, found.solution) == ("1 + 1?", "2")
    assert found.history == tuple(turns[:3])
    asked_alone = Row("1 + 1?", "2")
    assert found.problem != asked_alone.problem and found.id != asked_alone.id


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"role": "assistant", "content": "2"}], "no user turn"),
        ([{"role": "user", "content": "q"}], "no assistant turn"),
        ([{"role": "user", "content": ""}, {"role": "assistant", "content": "2"}], "message 1"),
        ([{"role": "human", "content": "q"}, {"role": "assistant", "content": "2"}], "message 1"),
        ("text", "is a str, not a list"),
        ([], "'chat' is empty"),
    ],
)
def test_malformed_chats_are_named(tmp_path: Path, turns: object, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load(**files(tmp_path, demos=[{"chat": turns}]), fields={"messages": "chat"})
    assert "row 1" in caught.value.where


def test_parquet_csv_json_and_jsonl_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [{"question": 'a "quoted", b\nsecond line', "solution": "s", "answer": "1"}, *made(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "d.parquet")
    (tmp_path / "d.json").write_text(json.dumps(rows))
    write(tmp_path / "d.jsonl", *rows)
    lines = ["question,solution,answer", '"a ""quoted"", b\nsecond line",s,1', *(f"q{i},s{i},{i}" for i in range(3))]
    (tmp_path / "d.csv").write_text("\n".join(lines))
    read = [
        load(source="files", folder=str(tmp_path), demos_from=f"d.{kind}").demos
        for kind in ("jsonl", "json", "parquet", "csv")
    ]
    assert len(read[0]) == 4 and all(found == read[0] for found in read)


def test_a_dataset_that_the_hub_library_loads(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    pq.write_table(pa.Table.from_pylist(made(10)), tmp_path / "set" / "train-00000.parquet")
    pq.write_table(pa.Table.from_pylist(made(12)[10:]), tmp_path / "set" / "test-00000.parquet")
    table = {"source": "hub", "name": str(tmp_path / "set"), "demos_from": "train[:6]", "test_from": "test"}
    found = load(**table)
    assert [r.question for r in found.demos] == [f"q{i}" for i in range(6)]
    assert [r.answer for r in found.test] == ["10", "11"]
    with pytest.raises(DataError, match="cannot load the split 'dev'"):
        load(**{**table, "test_from": "dev"})


def test_reasoning_gym_families_are_deterministic_disjoint_and_named() -> None:
    table = {"source": "reasoning_gym", "family": "chain_sum", "demos": 20, "prompts": 20, "test": 20, "validation": 5}
    one, same, other = load(**table), load(**table), load(seed=1, **table)
    assert one == same and one.demos != other.demos
    assert one.test == other.test, "the exam is the same for every seed"
    problems = [row.problem for rows in one.named().values() for row in rows]
    assert len(set(problems)) == 65
    assert not {r.problem for r in other.demos + other.prompts} & {r.problem for r in one.test + one.validation}
    assert all(row.solution == row.answer for row in one.demos)
    with pytest.raises(RecipeError, match="no family 'chain_sums'") as caught:
        load(**{**table, "family": "chain_sums"})
    assert "chain_sum" in caught.value.remedy
    with pytest.raises(RecipeError, match="refuses its options"):
        load(**table, options={"nonsense": 1})


def test_a_family_too_small_for_its_sizes_is_told() -> None:
    small = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    with pytest.raises(DataError, match="different problems in"):
        load(source="reasoning_gym", family="chain_sum", prompts=5000, options=small)


def test_a_pool_is_split_by_content(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", *made(100))
    table = {"source": "files", "folder": str(tmp_path), "pool": "p.jsonl"}
    sizes = {"demos": 40, "validation": 10, "prompts": 30, "test": 20}
    one, more, other = load(**table, **sizes), load(**table, **{**sizes, "demos": 10}), load(seed=1, **table, **sizes)
    names = [{r.problem for r in getattr(one, split)} for split in SPLITS]
    assert [len(n) for n in names] == [40, 10, 30, 20] and len(set.union(*names)) == 100
    assert one.test == more.test == other.test and one.validation == other.validation
    assert more.demos == one.demos[:10] and one.demos != other.demos
    write(tmp_path / "p.jsonl", *reversed(made(100)))  # the order of the file does not matter
    assert load(**table, **sizes).named() == one.named()
    with pytest.raises(DataError, match="101 problems wanted, but the pool holds 100"):
        load(**table, **{**sizes, "demos": 41})


def test_the_solutions_of_a_problem_stay_in_one_split() -> None:
    rows = [Row(f"q{i}", f"s{i}.{k}", "1") for i in range(20) for k in range(3)]
    found = split_by_content(rows, {"demos": 8, "validation": 4, "prompts": 4, "test": 4}, seed=0)
    assert [len(getattr(found, split)) for split in SPLITS] == [24, 12, 4, 4]
    where = {}
    for split in SPLITS:
        for row in getattr(found, split):
            assert where.setdefault(row.problem, split) == split


def test_duplicates_in_a_pool_count_once(tmp_path: Path) -> None:
    rows = [*made(10), *made(10), {"question": " Q3 ", "solution": "s3", "answer": "3"}]
    write(tmp_path / "p.jsonl", *rows)
    found = load(source="files", folder=str(tmp_path), pool="p.jsonl", demos=6, prompts=4)
    assert len(found.demos) == 6 and len(found.prompts) == 4
    assert any("10 different problems" in note for note in found.notes)


def test_the_answer_is_what_follows_the_marker(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "some #### work\n#### 72"}]
    table = files(tmp_path, test=rows)
    assert load(**table, fields={"answer_after": "####"}).test[0].answer == "72"
    with pytest.raises(DataError, match="no '####' with an answer"):
        load(**files(tmp_path, test=[{"question": "q", "answer": "72"}]), fields={"answer_after": "####"})


def test_gsm8k_is_read_as_it_is(shared_data: Path) -> None:
    found = load(
        source="files",
        folder=str(shared_data / "gsm8k"),
        pool="train.jsonl",
        demos=4000,
        validation=200,
        prompts=3000,
        test_from="test.jsonl",
        fields={"solution": "answer", "answer_after": "####"},
    )
    assert [len(rows) for rows in found.named().values()] == [4000, 200, 3000, 1319]
    assert found.test[0].answer == "18" and found.demos[0].solution.rpartition("#### ")[2] == found.demos[0].answer


def deepmath(folder: Path, count: int) -> Path:
    """A file of DeepMath-103K's shape."""
    rows = [
        {
            "question": f"Find the number {i}.",
            "final_answer": str(i),
            "difficulty": 5.0,
            "topic": "Algebra",
            **{f"r1_solution_{k}": f"solution {k} of {i}: \\boxed{{{i}}}" for k in (1, 2, 3)},
        }
        for i in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "deepmath.parquet")
    return folder / "deepmath.parquet"


def test_deepmath_in_three_disjoint_subsets(tmp_path: Path) -> None:
    defaults = data(source="deepmath")
    assert (defaults.demos, defaults.prompts, defaults.validation) == (10_000, 10_000, 1_000)
    table = {"source": "deepmath", "pool": str(deepmath(tmp_path, 60))}
    sizes = {"demos": 20, "prompts": 20, "validation": 10}
    one, two = load(**table, **sizes), load(**table, **sizes, r1_solution=2)
    names = [{r.problem for r in getattr(one, split)} for split in ("demos", "prompts", "validation")]
    assert [len(n) for n in names] == [20, 20, 10] and len(set.union(*names)) == 50
    assert all(r.solution.startswith("solution 1 of") and r.solution.endswith(f"{{{r.answer}}}") for r in one.demos)
    assert [r.question for r in one.demos] == [r.question for r in two.demos]
    assert all(r.solution.startswith("solution 2 of") for r in two.demos)
    assert load(seed=1, **table, **sizes).demos != one.demos
    assert "\\boxed{}" in data(**table).system and data(**table, system=None).system is None


COPIED = "A farmer has seventeen sheep and all but nine of them run away into the hills at night"


def test_decontamination_removes_rows_that_share_words_and_says_which(tmp_path: Path) -> None:
    exam = write(tmp_path / "exam.jsonl", {"problem": f"{COPIED}. How many are left?"}, {"problem": "What is 2 + 2?"})
    rows = [
        {"question": f"Yesterday: {COPIED.upper()}!! Count the sheep.", "solution": "9", "answer": "9"},
        {"question": "what is 2+2?!", "solution": "4", "answer": "4"},
        {"question": "What is 2 + 2 times the number of sheep?", "solution": "8", "answer": "8"},
        *made(5),
    ]
    table = files(tmp_path, demos=rows, prompts=rows[2:])
    found = load(**table, decontaminate=[str(exam)])
    assert [r.question for r in found.demos] == [r["question"] for r in rows[2:]]
    assert len(found.prompts) == 6
    assert "2 of 8 rows of demos share 13 words" in found.notes[0] and "exam.jsonl, row 1" in found.notes[0]
    assert len(found.removed) == 2 and "row 2" in found.removed[1]
    assert "0 of 6 rows of prompts" in found.notes[1]
    assert len(load(**table).demos) == 8


def test_decontamination_tells_plus_from_minus_reads_every_turn_and_scripts_without_spaces() -> None:
    problems = [
        ("What is 31 - 21?", "exam"),
        (COPIED, "exam"),
        ("小明有十七只羊除了九只以外都在夜里跑到山上去了", "exam"),
    ]
    rows = [
        Row("What is 31 + 21?"),
        Row("And now?", history=(("user", COPIED), ("assistant", "9"))),
        Row("昨天小明有十七只羊除了九只以外都在夜里跑到山上去了还剩几只"),
    ]
    kept, removed = without_shared_ngrams(rows, problems, 13)
    assert kept == rows[:1] and len(removed) == 2


def test_a_pool_is_decontaminated_before_it_is_drawn_from(tmp_path: Path) -> None:
    exam = write(tmp_path / "exam.jsonl", {"problem": "q3"}, {"problem": "q4"})
    write(tmp_path / "p.jsonl", *made(12))
    found = load(source="files", folder=str(tmp_path), pool="p.jsonl", demos=10, decontaminate=[str(exam)])
    assert len(found.demos) == 10 and not {"q3", "q4"} & {r.question for r in found.demos}


@pytest.mark.parametrize(
    ("rows", "message", "where"),
    [
        (["{"], "not JSON", "row 1"),
        ([{"question": "q", "answer": "1"}, "[1]"], "not a JSON object", "row 2"),
        ([{"question": "q"}], "no 'answer'", "row 1"),
        ([{"answer": "1"}], "no 'question'", "row 1"),
        ([{"question": "  ", "answer": "1"}], "'question' is empty", "row 1"),
        ([{"question": "q", "answer": ["1"]}], "is a list", "row 1"),
        ([""], "holds no rows", "test.jsonl"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, rows: list, message: str, where: str) -> None:
    with pytest.raises(DataError) as caught:
        load(**files(tmp_path, test=rows))
    assert message in caught.value.what and where in caught.value.where and "data.test" in caught.value.where
    assert caught.value.remedy


def test_a_csv_row_of_another_width_is_named(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("question,answer\na,1\nb,2,3\n")
    with pytest.raises(DataError, match="the row has 3 fields, the header 2") as caught:
        load(source="files", folder=str(tmp_path), test_from="d.csv")
    assert "row 2" in caught.value.where


def test_csv_as_pandas_writes_it_with_long_fields(tmp_path: Path) -> None:
    long = "x" * 200_000
    (tmp_path / "d.csv").write_text(f",question,answer\n0,a,1\n1,{long},2\n")
    found = load(source="files", folder=str(tmp_path), test_from="d.csv").test
    assert [(len(r.question), r.answer) for r in found] == [(1, "1"), (200_000, "2")]
    (tmp_path / "d.csv").write_text("question,question,answer\na,b,1\n")
    with pytest.raises(DataError, match="two columns have the same name"):
        load(source="files", folder=str(tmp_path), test_from="d.csv")


def test_a_number_that_is_missing_is_no_answer(tmp_path: Path) -> None:
    pq.write_table(pa.table({"question": ["a", "b"], "answer": [1.5, float("nan")]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match="'answer' is empty in the row") as caught:
        load(source="files", folder=str(tmp_path), test_from="t.parquet")
    assert "row 2" in caught.value.where


def test_a_folder_of_shards_is_one_table_and_test_may_have_fields_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for part in range(3):
        pq.write_table(pa.Table.from_pylist(made(30)[10 * part : 10 * part + 10]), tmp_path / "set" / f"{part}.parquet")
    write(tmp_path / "aime.jsonl", {"problem": "p", "solution": "7"})
    table = {"source": "files", "folder": str(tmp_path), "pool": "set", "demos": 20, "prompts": 10}
    found = load(**table, test_from="aime.jsonl", test_fields={"question": "problem", "answer": "solution"})
    assert len({r.problem for r in found.demos + found.prompts}) == 30
    assert (found.test[0].question, found.test[0].answer) == ("p", "7")


def test_rows_that_contradict_the_answer_of_their_problem_are_left_out_and_counted(tmp_path: Path) -> None:
    write(tmp_path / "p.jsonl", *made(10), {"question": "Q3", "solution": "other", "answer": "99"})
    found = load(source="files", folder=str(tmp_path), pool="p.jsonl", demos=10, paths=2)
    assert len(found.demos) == 10 and any("1 rows contradict" in note for note in found.notes)


def test_a_family_without_a_single_answer_is_refused() -> None:
    with pytest.raises(RecipeError, match="no single answer"):
        load(source="reasoning_gym", family="graph_color", prompts=5)


def test_the_same_question_under_another_system_message_is_the_same_problem(tmp_path: Path) -> None:
    def chat(system: str | None) -> dict:
        head = [{"role": "system", "content": system}] if system else []
        return {
            "m": [*head, {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}],
            "answer": "2",
        }

    table = files(tmp_path, demos=[chat("Be brief.")], test=[chat(None)])
    with pytest.raises(DataError, match=r"also stand in data\.demos"):
        load(**table, fields={"messages": "m"})


def test_missing_binary_and_unknown_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "b.parquet").write_bytes(b"\xff\xfe\x00")
    for name, message in (
        ("absent.jsonl", "cannot read"),
        ("b.jsonl", "not UTF-8: byte 0xff"),
        ("b.parquet", "not a Parquet file"),
        ("b.xlsx", "no reader for '.xlsx'"),
    ):
        with pytest.raises(DataError, match=message):
            load(source="files", folder=str(tmp_path), demos_from=name)


@pytest.mark.parametrize("held_out", ["test", "validation"])
@pytest.mark.parametrize("trained_on", ["demos", "prompts"])
def test_a_held_out_problem_that_is_trained_on_is_refused(tmp_path: Path, held_out: str, trained_on: str) -> None:
    row = {"question": "1 + 1?", "solution": "2", "answer": "2"}
    other = {**row, "question": "2 + 2?"}
    copied = {**row, "question": " 1  + 1? "}
    with pytest.raises(DataError, match=f"also stand in data.{trained_on}") as caught:
        load(**files(tmp_path, **{held_out: [row], trained_on: [other, copied]}))
    assert "row 1" in caught.value.where and "row 2" in caught.value.where


def test_demonstrations_and_prompts_may_share_and_a_benchmark_may_repeat_a_question(tmp_path: Path) -> None:
    row = {"question": "1 + 1?", "solution": "2", "answer": "2"}
    load(**files(tmp_path, demos=[row], prompts=[row]))
    test = load(**files(tmp_path, test=[{"question": "q", "answer": "1"}, {"question": "q", "answer": "2"}])).test
    assert test[0].id != test[1].id


def test_only_a_newline_ends_a_row_and_a_byte_order_mark_is_none(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    rows = [{"question": "a\u2028b\x85c", "answer": "1"}, {"question": "d", "answer": "2"}]
    path.write_text("\ufeff" + "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    assert [record["question"] for record, _ in read_file(path, "x")] == ["a\u2028b\x85c", "d"]


def test_every_question_of_a_real_benchmark_is_read(shared_data: Path) -> None:
    assert len(list(read_file(shared_data / "mmlu_redux" / "test.jsonl", "data.test"))) == 5700
