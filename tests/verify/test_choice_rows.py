"""Multiple choice on the real rows of MMLU-Pro, MMLU-Redux and ARC."""

import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from test_choice import LETTERS, grade

from heatbath.data.tables import load
from heatbath.data_sections import Fields, FilesData
from heatbath.verify.choice import ChoiceGrader
from heatbath.verify.choice_rules import plain, worded

BY_LABEL = [
    "The answer is ({l}).",
    "The answer is {l}.",
    "Answer: {l}",
    "Answer: {l}. {t}",
    "So\n**Answer:** ({l}) {t}",
    "thinking... \\boxed{{{l}}}",
    "\\boxed{{\\text{{({l})}}}}",
    "Reasoning.\n{l}",
    "Reasoning.\n({l}) {t}",
    "{l}. {t}",
    "Therefore, option {l} is correct.",
    "I would choose ({l}).",
    "答案是{l}。",
    "A common mistake is to pick another. The correct answer is ({l}) because I think so.",
    "The best answer is {l}, not ({w}).",
    "One might think the answer is ({w}), but the answer is ({l}).",
    "The answer is ({w}). Wait, that is wrong. The answer is ({l}).",
    "<think>the answer is ({w})</think>\nFinal answer: {l}",
    "Option ({w}) is wrong.\n\n#### {l}",
    "The correct option is {l}: {t}",
]
BY_TEXT = ["The answer is {t}.", "The answer is {t}", "Reasoning here.\n{t}", "\\boxed{{{t}}}", "Answer: **{t}**"]
BY_NOTHING = [
    "I do not know.",
    "The answer is not ({l}).",
    "The answer is ({l}) or ({w}).",
    "Options ({l}) and ({w}) are wrong.",
    "If the answer is ({l}), then",
]
Question = tuple[list[str], str, int, dict[str, Any]]


def read(path: Path) -> list[dict[str, Any]]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def mmlu_pro(data: Path) -> list[Question]:
    rows = read(data / "mmlu_pro" / "test.jsonl.gz")
    return [
        (r["options"], LETTERS, LETTERS.index(r["answer"]), {"gold": r["answer"], "options": r["options"]})
        for r in rows
    ]


def mmlu_redux(data: Path) -> list[Question]:
    rows = read(data / "mmlu_redux" / "test.jsonl")
    return [
        (r["choices"], LETTERS, int(r["answer"]), {"gold": int(r["answer"]), "options": r["choices"]}) for r in rows
    ]


def arc_challenge(data: Path) -> list[Question]:
    found = []
    for row in read(data / "arc_challenge" / "test.jsonl"):
        options = dict(re.findall(r"^([A-E1-5])\) (.*)$", row["prompt"], re.M))
        labels = "".join(options)
        gold = {"gold": row["answer"], "options": options}
        found.append((list(options.values()), labels, labels.index(row["answer"]), gold))
    return found


def phrases(question: Question, draw: random.Random) -> list[tuple[str, str]]:
    """Responses to a question, with the status that each must get."""
    options, labels, right, _ = question
    wrong = draw.choice([i for i in range(len(options)) if i != right])
    words = [worded(plain(option)).casefold() for option in options]
    found = []
    for told, other, status in ((right, wrong, "right"), (wrong, right, "wrong")):
        values = {"l": labels[told], "w": labels[other], "t": options[told].strip()}
        found += [(form.format(**values), status) for form in BY_LABEL]
        unclear = words.count(words[told]) > 1 or re.fullmatch(r"\(?(?:[a-j]|[0-9]{1,2})\)?|", words[told])
        unbalanced = options[told].count("{") != options[told].count("}")
        if not unclear:
            forms = [form for form in BY_TEXT if not (unbalanced and "boxed" in form)]
            found += [(form.format(**values), status) for form in forms]
    found += [(form.format(l=labels[right], w=labels[wrong]), "no_answer") for form in BY_NOTHING]
    return found


def check(questions: list[Question]) -> int:
    draw, grader, graded = random.Random(0), ChoiceGrader(), 0
    for question in questions:
        told = phrases(question, draw)
        verdicts = grader.grade([text for text, _ in told], [question[3]] * len(told))
        for (text, status), verdict in zip(told, verdicts, strict=True):
            assert verdict.status == status, (text, question, verdict)
        graded += len(told)
    return graded


@pytest.mark.parametrize(("benchmark", "step"), [(mmlu_pro, 40), (mmlu_redux, 20), (arc_challenge, 5)])
def test_a_spread_of_real_rows(shared_data: Path, benchmark: Any, step: int) -> None:
    assert check(benchmark(shared_data)[::step]) > 9_000


@pytest.mark.slow
@pytest.mark.parametrize(("benchmark", "rows"), [(mmlu_pro, 12_032), (mmlu_redux, 5_700), (arc_challenge, 1_172)])
def test_every_real_row(shared_data: Path, benchmark: Any, rows: int) -> None:
    questions = benchmark(shared_data)
    assert len(questions) == rows
    check(questions)


def test_real_rows_as_their_tables_hold_them(shared_data: Path, tmp_path: Path) -> None:
    """Through `data.tables`: the letter shown before the true option, and no other, is right."""
    redux = read(shared_data / "mmlu_redux" / "test.jsonl")[::3]
    pro = read(shared_data / "mmlu_pro" / "sample2000.jsonl")[::3]
    tables = {
        "redux": ("question", "choices", "answer", redux),
        "redux_int": ("question", "choices", "answer", [row | {"answer": int(row["answer"])} for row in redux]),
        "pro": ("question", "options", "answer", pro),
        "pro_index": ("question", "options", "answer_index", pro),
        "arc": ("prompt", "choices", "answer", published_arc(shared_data)),
    }
    undecided = dict.fromkeys(tables, 0)
    for name, (question, options, answer, rows) in tables.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        fields = Fields(question=question, options=options, answer=answer)
        sizes = {"demos": 0, "validation": 0, "prompts": 0, "test": len(rows)}
        data = FilesData(source="files", folder=tmp_path, test_from=f"{name}.jsonl", fields=fields, **sizes)
        for row, made in zip(rows, load(data, 0).test, strict=True):
            given, value = row[options], row[answer]
            texts, labels = (given["text"], given["label"]) if name == "arc" else (given, LETTERS[: len(given)])
            true = labels.index(value) if name in ("pro", "arc") else int(value)
            shown = "\n".join(f"{label}. {text}" for label, text in zip(labels, texts, strict=True))
            assert made.question.endswith("\n" + shown)
            told = [f"The answer is ({labels[(true + shift) % len(labels)]})." for shift in range(len(labels))]
            for gold in (made.answer, {"gold": value, "options": given}):  # as `heatbath grade` has it
                verdicts = [v.status for v in ChoiceGrader().grade(told, [gold] * len(told))]
                if "bad_gold" in verdicts:
                    assert value in {worded(plain(text)) for i, text in enumerate(texts) if i != true}
                    undecided[name] += 1
                else:
                    assert verdicts == ["right"] + ["wrong"] * (len(told) - 1), (row, made.answer)
    assert 0 < undecided.pop("redux") < 50 and not any(undecided.values())  # "2": the text of one, the index of another


def published_arc(data: Path) -> list[dict[str, Any]]:
    """ARC with its options in the form in which it is published."""
    found = []
    for row in read(data / "arc_challenge" / "test.jsonl"):
        options = dict(re.findall(r"^([A-E1-5])\) (.*)$", row["prompt"], re.M))
        found.append(row | {"choices": {"text": list(options.values()), "label": list(options)}})
    return found


def test_a_row_whose_letter_is_not_its_index(shared_data: Path) -> None:
    (row,) = [r for r in read(shared_data / "mmlu_pro" / "test.jsonl.gz") if r["question_id"] == 3983]
    assert row["options"][row["answer_index"]] == "P—Cl"
    assert grade("The answer is N—H.", row["answer"], row["options"]).status == "right"
    assert grade("The answer is P—Cl.", row["answer"], row["options"]).status == "wrong"


def test_numbered_rows_of_arc(shared_data: Path) -> None:
    numbered = [q for q in arc_challenge(shared_data) if q[1][0] == "1"]
    assert len(numbered) == 22
    check(numbered)
    for options, _, right, gold in numbered:
        given = [grade(f"The answer is ({LETTERS[i]}).", gold["gold"], gold["options"]) for i in range(len(options))]
        assert [v.status == "right" for v in given] == [i == right for i in range(len(options))]


def test_adversarial_cases(shared_data: Path) -> None:
    cases = [c for c in read(shared_data / "adversarial_math" / "cases.jsonl") if c["category"] == "mcq"]
    verdicts = ChoiceGrader().grade([c["response"] for c in cases], [c["gold"] for c in cases])
    assert len(cases) >= 5 and [v.status == "right" for v in verdicts] == [c["expected"] for c in cases]
