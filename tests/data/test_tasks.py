"""Tasks: every shipped definition reads its real rows, a user's own is ten lines, and what is wrong is told."""

import gzip
import json
import re
import string
import tomllib
from collections import Counter
from pathlib import Path

import pytest

from conftest import small_tokenizer
from heatbath.data import rendering, tasks
from heatbath.data.rows import Row
from heatbath.data.tasks import Task, find, listed, shipped, shown
from heatbath.errors import DataError, RecipeError
from heatbath.recipe import as_toml, parse
from heatbath.verify.graders import as_gold

ROOT = Path(__file__).parents[2]
LOCAL = {  # task → rows and subjects, from the READMEs of the data sets and their papers
    "gsm8k": (1319, 0),
    "math500": (500, 7),
    "aime24": (30, 0),
    "aime25": (30, 0),
    "olympiadbench": (675, 4),
    "humaneval_plus": (164, 0),
    "mbpp_plus": (378, 0),
    "mmlu_pro": (12032, 14),
    "mmlu_redux": (5330, 57),
    "mmlu_redux_v1": (3000, 30),
    "arc_challenge": (1172, 0),
    "mt_bench": (80, 8),
}


def lines(path: Path) -> list[dict]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def write(path: Path, *rows: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def defined(folder: Path, text: str, name: str = "own.toml") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def own(folder: Path, more: str = "", rows: list[dict] | None = None) -> Task:
    """A task of questions `q` and answers `a`."""
    write(folder / "rows.jsonl", *(rows or [{"q": "1 + 1?", "a": "2"}, {"q": "2 + 2?", "a": "4"}]))
    head = 'name = "own"\nkind = "math"\nfile = "rows.jsonl"\nfields = { question = "q", answer = "a" }\n'
    return find(defined(folder, head + more))


@pytest.mark.parametrize("name", LOCAL)
def test_every_local_benchmark_is_whole(shared_data: Path, name: str) -> None:
    task, (count, subjects) = find(name), LOCAL[name]
    rows = task.rows(shared_data)
    assert len(rows) == count == task.problems
    kinds = {row.kind for row in rows}
    assert len(kinds - {""}) == subjects and ("" in kinds) == (subjects == 0)
    assert rows[:8] == task.rows(shared_data, 8) and all(row.answer and row.solution is None for row in rows)
    if task.kind != "judge":
        before, _, after = task.prompt.partition("{question}")
        asked = [text for text, _ in task.questions(shared_data)]
        assert len(asked) == count
        for row, text in zip(rows, asked, strict=True):
            assert row.question.startswith(before + text) and row.question.endswith(after)
            assert len(before) + len(text) + len(after) <= len(row.question)
            assert "\n```" in row.question if task.kind == "code" else "\\boxed{}" in row.question


def test_the_shipped_definitions_say_all_that_a_user_should_know() -> None:
    named = {task["name"] for task in listed()}
    assert named == set(shipped()) == {*LOCAL, "gpqa_diamond", "arithmetic"}
    for task in listed():
        assert all(task[key] for key in ("version", "kind", "problems", "licence", "rows", "title", "link"))
        assert re.search(rf"^{task['name']} .*{re.escape(task['rows'])}$", shown(), re.M)


def test_questions_of_arc_are_those_that_are_published(shared_data: Path, tmp_path: Path) -> None:
    """The local rows hold the options in the text, the hub's in a field of their own: the problems are the same."""
    local = find("arc_challenge").rows(shared_data)
    labels = Counter(json.loads(str(row.answer))["options"].__len__() for row in local)
    assert labels == {4: 1165, 3: 4, 5: 3}
    numbered = [row for row in local if "1" in json.loads(str(row.answer))["options"]]
    assert len(numbered) == 22
    published = []
    for record in lines(shared_data / "arc_challenge" / "test.jsonl"):
        stem, _, options = record["prompt"].rstrip("\n").rpartition("\n\n")
        pairs = [line.split(") ", 1) for line in options.split("\n")]
        choices = {"text": [text for _, text in pairs], "label": [label for label, _ in pairs]}
        published.append({"id": record["id"], "question": stem, "choices": choices, "answerKey": record["answer"]})
    write(tmp_path / "hub" / "test.jsonl", *published)
    hub = find("arc_challenge").hub.model_copy(update={"id": str(tmp_path / "hub"), "config": None})
    rows = find("arc_challenge").model_copy(update={"hub": hub}).rows(None)
    assert rows == local and [row.id for row in rows] == [row.id for row in local]


def test_mmlu_redux_from_the_hubs_configurations(shared_data: Path, tmp_path: Path) -> None:
    """57 configurations, an integer answer and other columns: the same problems as the local file's, subject by
    subject."""
    subjects = ["anatomy", "virology", "world_religions"]
    records = [r for r in lines(shared_data / "mmlu_redux" / "test.jsonl") if r["subject"] in subjects]
    for name in subjects:
        part = [
            {
                "question": r["question"],
                "choices": r["choices"],
                "answer": int(r["answer"]),
                "error_type": r["error_type_norm"],
            }
            for r in records
            if r["subject"] == name
        ]
        write(tmp_path / "hub" / f"{name}.jsonl", *part)
    front = "".join(f"- config_name: {n}\n  data_files:\n  - {{split: test, path: {n}.jsonl}}\n" for n in subjects)
    (tmp_path / "hub" / "README.md").write_text(f"---\nconfigs:\n{front}---\n")
    task = find("mmlu_redux")
    hub = task.hub.model_copy(update={"id": str(tmp_path / "hub"), "problems": 999})
    with pytest.raises(DataError, match="has 999 problems, but here are"):
        task.model_copy(update={"hub": hub}).rows(None)
    kept = [row for row in task.rows(shared_data) if row.kind in subjects]
    hub = hub.model_copy(update={"problems": len(kept)})
    rows = task.model_copy(update={"hub": hub}).rows(None)
    assert rows == kept and [row.kind for row in rows] == [row.kind for row in kept]


def test_an_index_is_never_taken_for_an_options_text(shared_data: Path) -> None:
    """MMLU-Redux has options such as "2": the gold is the letter of the option that the index names."""
    known = {(r["question"], tuple(r["choices"])): r for r in lines(shared_data / "mmlu_redux" / "test.jsonl")}
    doubtful = 0
    for row, (question, _) in zip(
        *(f(shared_data) for f in (find("mmlu_redux").rows, find("mmlu_redux").questions)), strict=True
    ):
        gold = json.loads(str(row.answer))
        record = known[question, tuple(gold["options"])]
        assert string.ascii_uppercase.index(gold["gold"]) == int(record["answer"])
        doubtful += record["answer"] in record["choices"]
    assert doubtful > 20


def test_the_published_answer_counts_also_where_a_faultless_row_names_another(shared_data: Path) -> None:
    """280 rows without fault have an index as corrected answer; in two it is not the answer, which scorers go by."""
    rows = [r for r in lines(shared_data / "mmlu_redux" / "test.jsonl") if r["error_type_norm"] == "ok"]
    named = [
        (r, row)
        for r, row in zip(rows, find("mmlu_redux").rows(shared_data), strict=True)
        if r["correct_answer"] in tuple("0123")
    ]
    other = [(r, row) for r, row in named if r["correct_answer"] != r["answer"]]
    assert len(named) == 280 and [r["subject"] for r, _ in other] == ["astronomy", "global_facts"]
    assert [json.loads(str(row.answer))["gold"] for _, row in other] == ["D", "C"]


def test_the_letter_counts_where_letter_and_index_differ(shared_data: Path) -> None:
    rows = zip(lines(shared_data / "mmlu_pro" / "test.jsonl.gz"), find("mmlu_pro").rows(shared_data), strict=True)
    differing = [(r, row) for r, row in rows if string.ascii_uppercase.index(r["answer"]) != r["answer_index"]]
    assert [r["question_id"] for r, _ in differing] == [3983]
    ((record, row),) = differing
    assert json.loads(str(row.answer)) == {"gold": record["answer"], "options": record["options"]}


def gpqa_shaped(path: Path, count: int = 198) -> Path:
    """A file of the shape of GPQA's, with questions of our own."""
    fields = [
        "Record ID",
        "Question",
        "Correct Answer",
        *(f"Incorrect Answer {k}" for k in (1, 2, 3)),
        "High-level domain",
    ]
    rows = [
        [
            f"rec{i}",
            f'Which is {i} + 1, "exactly"?\nIn words, if need be.',
            f"{i + 1}\n",
            str(i),
            f"{i}.5",
            f"-{i + 1}",
            ("Physics", "Biology")[i % 2],
        ]
        for i in range(count)
    ]
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in [fields, *rows]]
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(quoted) + "\n", encoding="utf-8")
    return path


def test_gpqa_on_a_file_of_its_shape(tmp_path: Path) -> None:
    path = gpqa_shaped(tmp_path / "gpqa_diamond" / "gpqa_diamond.csv")
    task = find("gpqa_diamond")
    rows = task.rows(tmp_path)
    golds = [json.loads(str(row.answer)) for row in rows]
    assert len(rows) == 198 and {row.kind for row in rows} == {"Physics", "Biology"}
    for i, gold in enumerate(golds):
        assert gold["options"][string.ascii_uppercase.index(gold["gold"])] == str(i + 1)
        assert sorted(gold["options"]) == sorted([str(i + 1), str(i), f"{i}.5", f"-{i + 1}"])
    places = Counter(gold["gold"] for gold in golds)
    assert set(places) == set("ABCD") and max(places.values()) < 80, "the right option stands anywhere"
    lines_ = path.read_text().splitlines(keepends=True)
    (tmp_path / "other" / "gpqa_diamond").mkdir(parents=True)
    records = re.split(r"(?m)^(?=\"rec)", path.read_text())
    (tmp_path / "other" / "gpqa_diamond" / "gpqa_diamond.csv").write_text("".join([records[0], *records[:0:-1]]))
    assert len(lines_) > 198 and {r.id for r in task.rows(tmp_path / "other")} == {r.id for r in rows}
    with task.grader() as grader:
        found = grader.grade([f"\\boxed{{{g['gold']}}}" for g in golds], golds)
    assert {verdict.status for verdict in found} == {"right"}


TEN = re.findall(r"^```toml\n(name = .*?)^```", (ROOT / "docs" / "tasks.md").read_text(), re.S | re.M)[0]


def test_a_task_of_ones_own_is_ten_lines(tmp_path: Path) -> None:
    """The definition of docs/tasks.md, with three rows beside it."""
    assert len(TEN.strip().splitlines()) == 10
    rows = [("France", "Paris"), ("Peru", "Lima"), ("Kenya", "Nairobi")]
    write(tmp_path / "capitals.jsonl", *({"country": c, "capital": a} for c, a in rows))
    task = find(defined(tmp_path, TEN, "capitals.toml"))
    made = task.rows(None)
    assert [row.answer for row in made] == [a for _, a in rows] and "France" in made[0].question
    with task.grader() as grader:
        found = grader.grade(
            ["\\boxed{Paris}", "\\boxed{Cusco}", "It is \\boxed{\\text{Nairobi}}."], [r.answer for r in made]
        )
    assert [verdict.status for verdict in found] == ["right", "wrong", "right"]
    write(tmp_path / "data" / "capitals.jsonl", {"country": "Chile", "capital": "Santiago"})
    with pytest.raises(DataError, match="has 3 problems, but here are 1"):
        task.rows(tmp_path / "data")  # the data folder comes first


HEAD = 'name = "a"\nkind = "math"\n'
CHOICE = 'name = "own"\nkind = "choice"\nfile = "rows.jsonl"\n'
ASKED = 'fields = { question = "q", answer = "a" }\n'
INDEXED = 'fields = { question = "q", options = "b", answer = "a" }\nindexed = true'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('kind = "math"\nfile = "x"\n', "name: required"),
        ('name = "a"\nfile = "x"\n', "kind: required"),
        ('name = "a"\nkind = "maths"\nfile = "x"\n', "'math', 'choice'"),
        ('name = "a"\nkind = "math"\nflie = "x"\nfile = "x"\n', "flie: unknown key, did you mean 'file'?"),
        (HEAD + 'file = "x"\nfields = { anser = "y" }\n', "fields.anser: unknown key, did you mean 'answer'?"),
        (HEAD + 'hub = { id = "x", spilt = "y" }\n', "hub.spilt: unknown key, did you mean 'split'?"),
        ('name = "a"\nkind = "math"\nhub = { id = "x", fields = { kid = "y" } }\n', "did you mean 'kind'?"),
        ('name = "a"\nkind = "math"\nfile = "x"\nsampling = { tempreature = 1 }\n', "did you mean 'temperature'?"),
        ('name = "a"\nkind = "math"\n', "rows of which table? name a file, or a hub dataset"),
        ('name = "a"\nkind = "math"\nfile = "x"\nprompt = "no question"\n', "must hold {question} once"),
        ('name = "a"\nkind = "math"\nfile = "x"\nprompt = "{question} {question}"\n', "must hold {question} once"),
        ('name = "a"\nkind = "choice"\nfile = "x"\n', "a choice needs options"),
        (CHOICE + 'fields = { options = "o" }\n[hub]\nid = "x"\nfields = {}\n', "a choice needs options"),
        ('name = "a"\nkind = "code"\nfile = "x"\n', "programs are graded by tests"),
        ('name = "a"\nkind = "judge"\nhub = { id = "x" }\n', "reads a file of questions"),
        ('name = "a"\nkind = "math"\nsource = "reasoning_gym"\n', "needs a family"),
        ('name = "a"\nversion = 0\nkind = "math"\nfile = "x"\nproblems = 0\n', "2 mistakes"),
        ('name = "a"\nkind = "lm_eval"\nfile = "x"\n', "not written as TOML"),
        ('name = "gsm8k"\nkind = "math"\nfile = "x"\n', "the name 'gsm8k' is taken"),
        ('name = "test"\nkind = "math"\nfile = "x"\n', "the name 'test' is taken"),
        ("name = ", "not valid TOML"),
    ],
)  # fmt: skip
def test_wrong_definitions_are_told(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        find(defined(tmp_path, text))
    assert said in str(caught.value) and "own.toml" in caught.value.where


def test_unknown_names_are_told_with_near_ones(tmp_path: Path) -> None:
    for name, said in (
        ("gsm8", "did you mean 'gsm8k'"),
        ("mmlu_rdux", "mmlu_redux"),
        ("zzz", "shipped tasks: aime24"),
        ("reasoning_gym:chain_sums", "did you mean chain_sum"),
        (str(tmp_path / "absent.toml"), "relative to the working folder"),
    ):
        with pytest.raises(RecipeError) as caught:
            find(name)
        assert said in str(caught.value)


def test_rows_that_are_nowhere_name_what_would_help(tmp_path: Path) -> None:
    for name, said in (
        ("gsm8k", ["gsm8k/test.jsonl", "openai/gsm8k, main, test", "set eval.data_dir"]),
        ("humaneval_plus", ["humanevalplus_release", "set eval.data_dir"]),
        ("mt_bench", ["fastchat/llm_judge/data"]),
        ("gpqa_diamond", ["accept its terms"]),
    ):
        for folder in (None, tmp_path):
            with pytest.raises(DataError) as caught:
                find(name).rows(folder)
            assert caught.value.where == f"task {name}"
            for text in said if folder is None else [*said[:1], f" under {tmp_path}"]:
                assert text in caught.value.remedy, caught.value.remedy


def test_a_benchmark_of_another_length_is_refused_and_a_part_is_asked_for_by_name(
    shared_data: Path, tmp_path: Path
) -> None:
    rows = lines(shared_data / "gsm8k" / "test.jsonl")
    write(tmp_path / "gsm8k" / "test.jsonl", *rows[:-1])
    for problems in (None, 8):
        with pytest.raises(DataError, match="has 1,319 problems, but here are 1,318"):
            find("gsm8k").rows(tmp_path, problems)
    assert len(find("gsm8k").rows(shared_data, 8)) == 8


def test_rows_are_filtered_by_value_and_by_one_of_several(tmp_path: Path) -> None:
    rows = [{"q": f"q{i}", "a": str(i), "part": "xyz"[i % 3], "kept": i % 2 == 0} for i in range(12)]
    for where, wanted in (
        ('where = { part = "x" }', [0, 3, 6, 9]),
        ('where = { part = ["x", "z"] }', [0, 2, 3, 5, 6, 8, 9, 11]),
        ('where = { part = "x", kept = true }', [0, 6]),
    ):
        assert [row.answer for row in own(tmp_path, where, rows).rows()] == list(map(str, wanted))
    with pytest.raises(DataError, match="no 'prat' in the row"):
        own(tmp_path, 'where = { prat = "x" }', rows).rows()
    with pytest.raises(DataError, match="keeps none of its 12 rows \\(where part = 'X', kept = False\\)"):
        own(tmp_path, 'where = { part = "X", kept = false }', rows).rows()


def test_numbers_are_found_in_a_csv_of_texts(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("q,a,level\n1 + 1?,2,5\n1 + 2?,3,4\n")
    text = 'name = "own"\nkind = "math"\nfile = "rows.csv"\nfields = { question = "q", answer = "a" }\n'
    (row,) = find(defined(tmp_path, text + "where = { level = 5 }\n")).rows()
    assert row.answer == "2"
    with pytest.raises(DataError, match="keeps none of its 2 rows") as caught:
        find(defined(tmp_path, text + "where = { level = 6 }\n")).rows()
    assert caught.value.where.endswith("rows.csv")


def test_several_parts_of_an_answer_are_one_answer(tmp_path: Path) -> None:
    rows = own(tmp_path, "", [{"q": "roots?", "a": ["1", "$-2$"]}, {"q": "root?", "a": [3]}]).rows()
    assert [row.answer for row in rows] == ["1, $-2$", "3"]


@pytest.mark.parametrize(
    ("more", "record", "said"),
    [
        ("options_inside = true", {"q": "Which?\nA) x", "a": "A"}, "no options at the end"),
        ("options_inside = true", {"q": "Which?\nA) x\nC) y", "a": "A"}, "no options at the end"),
        ("options_inside = true", {"q": "A) x\nB) y", "a": "A"}, "no options at the end"),
        ("options_inside = true", {"q": "Which?\n2) x\n3) y", "a": "2"}, "no options at the end"),
        ('distractors = ["b", "c"]', {"q": "Which?", "a": "x", "b": "y"}, "'c' holds no option"),
        (INDEXED, {"q": "Which?", "b": ["x", "y"], "a": "A"}, "no index"),
        (INDEXED, {"q": "Which?", "b": ["x"], "a": True}, "no index"),
        (INDEXED, {"q": "Which?", "b": ["x"], "a": -1}, "no index"),
    ],
)  # fmt: skip
def test_choices_that_cannot_be_read_name_the_row(tmp_path: Path, more: str, record: dict, said: str) -> None:
    write(tmp_path / "rows.jsonl", record)
    fields = "" if "fields" in more else ASKED
    task = find(defined(tmp_path, f"{CHOICE}{fields}{more}\n"))
    with pytest.raises(DataError, match=said) as caught:
        task.rows()
    assert "row 1" in caught.value.where


def test_options_inside_a_question_may_be_many_and_the_question_may_hold_such_lines(tmp_path: Path) -> None:
    text = "Of these\nA) once\nwhich fits?\n1) x) y\n2) \n3) z"
    write(tmp_path / "rows.jsonl", {"q": text, "a": "3"})
    (row,) = find(defined(tmp_path, f"{CHOICE}{ASKED}options_inside = true\n")).rows()
    assert json.loads(str(row.answer)) == {"gold": "3", "options": {"1": "x) y", "2": "", "3": "z"}}
    assert row.question.startswith("Of these\nA) once\nwhich fits?\n1. x) y")


def test_procedural_tasks_are_fixed_exams_that_nothing_was_trained_on() -> None:
    from heatbath.data import sources
    from heatbath.data_sections import ArithmeticData

    task = find("arithmetic")
    rows = task.rows()
    assert len(rows) == 100 and task.rows(None, 7) == rows[:7] and len(task.rows(None, 500)) == 100
    assert {(row.kind, row.solution) for row in rows} == {("", None)}, "how heatbath would solve it is no subject"
    sizes = {"demos": 400, "prompts": 400, "test": 0, "validation": 0}
    trained = sources.load(ArithmeticData(source="arithmetic", **sizes), 3)
    assert not {row.problem for row in rows} & {row.problem for row in trained.demos + trained.prompts}
    assert all(eval_sum(row.question) == int(str(row.answer)) for row in rows)
    family = find("reasoning_gym:chain_sum")
    assert family.rows(None, 5) == family.rows()[:5] and len(family.rows()) == 100
    for row in family.rows(None, 20):
        assert sum(
            int(part)
            for part in row.question.rpartition(": ")[2].strip(" =").replace("- ", "-").replace("+ ", "").split()
        ) == int(str(row.answer))


def eval_sum(question: str) -> int:
    a, b = re.fullmatch(r"What is (\d+) \+ (\d+)\?", question).groups()
    return int(a) + int(b)


def test_a_procedural_task_of_ones_own(tmp_path: Path) -> None:
    head = 'name = "own"\nkind = "math"\n'
    text = (
        head
        + 'source = "reasoning_gym"\nfamily = "chain_sum"\noptions = { max_terms = 2, min_terms = 2 }\nproblems = 9\n'
    )
    rows = find(defined(tmp_path, text)).rows()
    assert len(rows) == 9 and all(len(re.findall(r"\d+", row.question)) == 2 for row in rows)
    differences = find(
        defined(tmp_path, head + 'source = "arithmetic"\noptions = { operations = ["-"], digits = 3 }\n')
    ).rows()
    assert len(differences) == 100 and all(" - " in row.question for row in differences)
    with pytest.raises(RecipeError, match="arithmetic refuses its options: digts"):
        find(defined(tmp_path, head + 'source = "arithmetic"\noptions = { digts = 3 }\n')).rows()
    with pytest.raises(RecipeError, match="refuses its options"):
        find(defined(tmp_path, head + 'source = "reasoning_gym"\nfamily = "chain_sum"\noptions = { x = 3 }\n')).rows()


def test_a_task_is_asked_through_the_chat_template_with_its_system_message(tmp_path: Path) -> None:
    tokenizer = small_tokenizer()
    task = own(tmp_path, 'prompt = "Q: {question} Box it."\nsystem = "Be brief."\n')
    (row, _) = task.rows()
    assert row.question == "Q: 1 + 1? Box it."
    asked = rendering.prompt_ids(tokenizer, rendering.messages(Row(row.question), "Be brief."))
    assert tasks.prompt_ids(task, tokenizer, row) == asked


def test_training_rows_that_stand_in_a_task_are_removed(shared_data: Path, tmp_path: Path) -> None:
    """By name, by path and by prefix; the words of a task's own prompt do not count."""
    from heatbath.data import sources

    exam = lines(shared_data / "gsm8k" / "test.jsonl")
    wrapped = find("aime24").prompt.replace("{question}", "A question of mine, of few words?")
    turn = lines(shared_data / "mt_bench" / "question.jsonl")[0]["turns"][0]
    capital = find("arithmetic").rows()[0].question
    rows = [exam[17]["question"], f"Hm: {exam[18]['question']}", turn, capital, wrapped, "Where do seven swans swim?"]
    write(tmp_path / "d.jsonl", *({"question": q, "solution": "s", "answer": "1"} for q in rows))
    write(tmp_path / "rows.jsonl", {"q": "Where do seven swans swim?", "a": "here"})
    path = defined(
        tmp_path, 'name = "own"\nkind = "math"\nfile = "rows.jsonl"\nfields = { question = "q", answer = "a" }\n'
    )
    base = {"source": "files", "folder": str(tmp_path), "demos_from": "d.jsonl"}

    def left(*names: str, **evaluation: object) -> list[str]:
        table = {"model": "m", "data": {**base, "decontaminate": list(names)}, "eval": evaluation}
        made = parse(table)
        assert parse(tomllib.loads(as_toml(made))) == made
        return [row.question for row in sources.load(made.data, 0).demos]

    folder = {"data_dir": str(shared_data)}
    assert left("gsm8k", **folder) == rows[2:]
    assert left("aime24", "olympiadbench", **folder) == rows
    assert left("mt_bench", **folder) == [*rows[:2], *rows[3:]]
    assert left("arithmetic") == [*rows[:3], *rows[4:]]
    assert left(str(path)) == rows[:-1]
    assert left("gsm8k", "arithmetic", str(path), **folder) == [turn, wrapped]
    with pytest.raises(DataError, match="gsm8k"):
        left("gsm8k", data_dir=str(tmp_path))
    path.write_text(path.read_text().replace('"q"', '"query"'))
    with pytest.raises(DataError, match=r"no 'query' in the row \(it has q, a\)"):
        left(str(path))


def test_golds_survive_the_way_through_a_table_of_texts(shared_data: Path) -> None:
    """What a sample keeps of a gold is text; its grader reads it back."""
    for name in ("arc_challenge", "mmlu_redux", "humaneval_plus"):
        for row in find(name).rows(shared_data, 20):
            assert isinstance(row.answer, str) and isinstance(as_gold(find(name).kind, row.answer), dict)
