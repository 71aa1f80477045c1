"""MT-Bench judging, against a real HTTP server and the original files."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from judge_server import (
    answers,
    endpoint,
    failed,
    questions,
    rates,
    said,
    script_server,  # noqa: F401 - the fixture `serving`
    stars,
)

from heatbath.errors import DataError
from heatbath.verify import judge as mt
from heatbath.verify.endpoint import Endpoint, RefusalError, Reply
from heatbath.verify.judge import Question, judge_messages, mt_bench, rating


@pytest.mark.parametrize(
    ("text", "finish", "value", "problem"),
    [
        ("Fine. Rating: [[8]]", "stop", 8.0, ""),
        ("[[7.5]]", "stop", 7.5, ""),
        ("a [3] then [[9]] and [[2]]", "stop", 9.0, ""),
        ("Rating: [6]", "stop", 6.0, ""),
        ("Rating: [[10]]", "length", 10.0, ""),
        ("the loop reads a[1] and", "length", None, "cut"),
        ("Rating: 8", "stop", None, "no rating"),
        ("[[rating]]", "stop", None, "no rating"),
        ("[[11]]", "stop", None, "outside"),
        ("[[0]]", "stop", None, "outside"),
        ("[[-3]]", "stop", None, "no rating"),
        ("", "stop", None, "no rating"),
    ],
)
def test_ratings_are_read_as_fastchat_does_or_counted(text: str, finish: str, value: float, problem: str) -> None:
    got, why = rating(Reply(text, finish))
    assert got == value and problem in why and bool(why) == (value is None)


def test_all_turns_are_judged_and_means_are_over_questions(serving, tmp_path: Path) -> None:
    server = serving(rates)
    asked = questions(16)
    given = answers(asked)
    result = mt_bench(endpoint(server, cache=tmp_path), asked, given)
    expected = {
        (q.id, turn): stars({"messages": judge_messages(mt.OWN, q, given[q.id], turn)})
        for q in asked
        for turn in (1, 2)
    }
    assert {(j.question, j.turn): j.rating for j in result.judgments} == expected
    assert result.mean().mean == pytest.approx(np.mean(list(expected.values())))  # FastChat's mean over ratings
    assert result.mean().questions == 16 and result.mean().low < result.mean().mean < result.mean().high
    assert result.mean(turn=2).mean == pytest.approx(np.mean([v for (_, t), v in expected.items() if t == 2]))
    math = [v for (i, _), v in expected.items() if asked[i].category == "math"]
    assert result.mean("math").mean == pytest.approx(np.mean(math)) and result.mean("math").questions == 2
    assert result.missing == 0 and result.categories == list(mt.CATEGORIES)
    report = json.loads(json.dumps(result.report()))
    assert report["rated"] == 32 and report["prompts"] == "heatbath-1"
    assert set(report["means"]) == {"all", "turn 1", "turn 2", *mt.CATEGORIES}
    assert "32 of 32 turns rated by judge, prompts = heatbath-1" in str(result)
    assert {r["temperature"] for r in server.requests} == {0.0}


def test_failures_are_asked_again_counted_and_never_a_score(serving) -> None:
    """Question 1 never gets a rating, question 2 at the second time, question 3 is filtered."""

    def script(request: dict, number: int) -> tuple[int, dict, str]:
        asked = request["messages"][-1]["content"]
        again = sum(r == request for r in server.requests) > 1
        if "one 1 " in asked or ("one 2 " in asked and not again):
            return said("I would rather not say.")
        return failed(400, "filtered") if "one 3 " in asked else said("[[5]]")

    server = serving(script)
    asked = questions(6)
    given = answers(asked)
    del given[4]
    given[5] = given[5][:1]
    result = mt_bench(endpoint(server, concurrency=1), asked, given)
    assert [(j.question, j.turn, j.rating) for j in result.failed] == [
        (1, 1, None),
        (1, 2, None),
        (3, 1, None),
        (3, 2, None),
    ]
    assert result.unanswered == ((4, 1), (4, 2), (5, 2)) and result.missing == 7
    assert result.scores() == {0: 5.0, 2: 5.0, 5: 5.0}
    assert mt.unanswered(asked, given) == [(4, 1), (4, 2), (5, 2)]
    text = str(result)
    assert "5 of 12 turns rated" in text and "not answered: 3 turns, first question 4" in text
    assert "4 judgments, first question 1, turn 1: no rating in '…I would rather not say.'" in text
    assert len(json.loads(json.dumps(result.report()))["failed"]) == 4
    single = mt_bench(endpoint(server, concurrency=1), asked[1:2], given, attempts=1)
    assert single.mean() is None and single.missing == 2
    alone = mt_bench(endpoint(server), asked[:1], given).report()["means"]["all"]
    assert (alone["mean"], alone["low"], alone["questions"]) == (5.0, None, 1)


def test_a_server_that_refuses_everything_is_an_error(serving) -> None:
    server = serving(lambda request, number: failed(400, "unknown parameter max_tokens"))
    with pytest.raises(RefusalError, match="unknown parameter"):
        mt_bench(endpoint(server), questions(), answers(questions()))


def test_two_policies_are_compared_question_by_question(serving) -> None:
    server = serving(lambda request, number: said("[[8]]" if "good" in request["messages"][-1]["content"] else "[[6]]"))
    asked = questions(8)
    before, after = (mt_bench(endpoint(server), asked, answers(asked, tag)) for tag in ("bad", "good"))
    difference = mt.paired(before, after)
    assert (difference.mean, difference.questions) == (2.0, 8)
    assert mt.paired(before, after, category="nothing") is None
    other = mt_bench(Endpoint(server.url, "another judge"), asked, answers(asked))
    with pytest.raises(ValueError, match="do not compare"):
        mt.paired(before, other)


def test_the_second_turn_is_asked_with_the_first_in_its_history() -> None:
    asked = [*questions(2), Question("short", "stem", ("only one?",))]
    seen = []

    def generate(conversations: list) -> list[str]:
        seen.extend(conversations)
        return [f"answer to {c[-1]['content']}" for c in conversations]

    given = mt.ask_policy(asked, generate)
    assert given[1] == ("answer to ask 1?", "answer to and 1?") and given["short"] == ("answer to only one?",)
    assert [m["content"] for m in seen[-1]] == ["ask 1?", "answer to ask 1?", "and 1?"]
    assert [m["role"] for m in seen[-1]] == ["user", "assistant", "user"]


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": 1, "category": "math", "turns": ["a"]}, "no reference answer"),
        ({"question_id": 1, "turns": ["a"]}, "category"),
        ({"category": "stem", "turns": ["a"]}, "question_id"),
        ({"question_id": 1, "category": "stem", "turns": "a"}, "no list of texts"),
        ({"question_id": 1, "category": "stem", "turns": ["a", "b", "c"]}, "one or two"),
    ],
)
def test_questions_in_another_form_are_named(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        mt.read_questions(write(tmp_path / "q.jsonl", row))


def test_answers_are_read_in_both_forms_and_only_once(tmp_path: Path) -> None:
    theirs = {"question_id": 81, "choices": [{"index": 0, "turns": ["a", "b"]}]}
    assert mt.read_answers(write(tmp_path / "a.jsonl", theirs, {"question_id": 82, "turns": ["c"]})) == {
        81: ("a", "b"),
        82: ("c",),
    }
    with pytest.raises(DataError, match="answered twice"):
        mt.read_answers(write(tmp_path / "b.jsonl", theirs, theirs))


def prompt_rows(**changed: str) -> list[dict]:
    rows = [
        {"name": name, "system_prompt": t.system, "prompt_template": t.user} for name, t in mt.OWN.templates.items()
    ]
    return [row | ({"prompt_template": changed[row["name"]]} if row["name"] in changed else {}) for row in rows]


def test_prompt_files_are_checked_and_named_by_content(tmp_path: Path) -> None:
    read = mt.read_prompts(write(tmp_path / "mine.jsonl", *prompt_rows()))
    assert re.fullmatch(r"mine\.jsonl@[0-9a-f]{12}", read.name) and dict(read.templates) == mt.OWN.templates
    for field in ("{answer_1}", "{question.__class__}", "{}", "{answer"):
        rows = prompt_rows(**{"single-v1": f"{{question}} {field}"})
        with pytest.raises(DataError, match=r"unknown fields|format string"):
            mt.read_prompts(write(tmp_path / "bad.jsonl", *rows))
    with pytest.raises(DataError, match="no prompt called single-math-v1"):
        mt.read_prompts(write(tmp_path / "few.jsonl", *[r for r in prompt_rows() if r["name"] != "single-math-v1"]))


@pytest.fixture
def original(shared_data: Path) -> Path:
    folder = shared_data / "mt_bench"
    if not folder.is_dir():
        pytest.skip(f"no MT-Bench files at {folder}")
    return folder


def test_the_original_questions_and_prompts_are_built_as_fastchat_does(original: Path) -> None:
    asked = mt.read_questions(original / "question.jsonl", original / "reference_gpt-4.jsonl")
    prompts = mt.read_prompts(original / "judge_prompts.jsonl")
    assert prompts.name == "fastchat" and len(asked) == 80
    assert [[q.category for q in asked].count(c) for c in mt.CATEGORIES] == [10] * 8
    assert {q.category for q in asked if q.reference} == {"math", "reasoning", "coding"}
    records = (original / "judge_prompts.jsonl").read_text(encoding="utf-8").splitlines()
    raw = {row["name"]: row for row in map(json.loads, records)}
    names: list[str] = []
    for q in asked:
        given = ("first {answer} [[3]]", "second {question_1}")
        for turn in (1, 2):
            name = ("single-math-v1" if q.reference else "single-v1") + ("-multi-turn" if turn == 2 else "")
            names.append(name)
            values = {"{question}": q.turns[0], "{answer}": given[0]}
            values |= {"{question_1}": q.turns[0], "{question_2}": q.turns[1]}
            values |= {"{answer_1}": given[0], "{answer_2}": given[1]}
            values |= {f"{{ref_answer_{n}}}": text for n, text in enumerate(q.reference or (), 1)}
            parts = re.split(r"(\{\w+\})", raw[name]["prompt_template"])
            expected = "".join(values.get(part, part) for part in parts)
            assert judge_messages(prompts, q, given, turn) == [
                {"role": "system", "content": raw[name]["system_prompt"]},
                {"role": "user", "content": expected},
            ]
    assert [names.count(name) for name in mt.NAMES.values()] == [50, 30, 50, 30]


def test_without_references_the_original_questions_are_refused(original: Path) -> None:
    with pytest.raises(DataError, match="30 questions of coding, math, reasoning have no reference answer: 101, 102"):
        mt.read_questions(original / "question.jsonl")


JUDGING = """
import json, sys
from heatbath.verify.endpoint import Endpoint
from heatbath.verify.judge import Question, mt_bench
questions = [Question(i, "stem", (f"ask {i}?", f"and {i}?")) for i in range(60)]
answers = {i: (f"one {i}", f"two {i}") for i in range(60)}
judge = Endpoint(sys.argv[1], "judge", cache=sys.argv[2], concurrency=4)
print(json.dumps(mt_bench(judge, questions, answers).report()))
"""


def test_a_run_killed_in_the_middle_goes_on_from_its_cache(serving, tmp_path: Path) -> None:
    middle, reached = 40, threading.Event()

    def script(request: dict, number: int) -> tuple[int, dict, str]:
        time.sleep(0.005)
        if number == middle:
            reached.set()
        return rates(request, number)

    server = serving(script)
    command = [sys.executable, "-c", JUDGING, server.url, str(tmp_path)]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)
    assert reached.wait(60)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(30) == -signal.SIGKILL
    time.sleep(0.5)  # what the dead process had sent still arrives
    kept, asked = len(list(tmp_path.rglob("*.json"))), len(server.requests)
    assert middle - 4 <= kept < 120 and asked - kept <= 4  # only those in flight are lost
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert len(server.requests) - asked == 120 - kept
    report = json.loads(done.stdout)
    assert report["rated"] == 120 and report["failed"] == []
    again = subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ)
    assert again.stdout == done.stdout and len(server.requests) - asked == 120 - kept


def test_the_examples_of_the_page_run(serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    page = (Path(__file__).parents[2] / "docs" / "judge.md").read_text(encoding="utf-8")
    blocks = [b for b in re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE) if "Endpoint" in b]
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mt_bench" / "reference_answer").mkdir(parents=True)
    rows = [{"question_id": q.id, "category": q.category, "turns": list(q.turns)} for q in questions(8)]
    write(tmp_path / "mt_bench" / "question.jsonl", *rows)
    known = [{"question_id": q.id, "turns": list(q.reference)} for q in questions(8) if q.reference]
    write(tmp_path / "mt_bench" / "reference_answer" / "gpt-4.jsonl", *known)
    write(tmp_path / "judge_prompts.jsonl", *prompt_rows())
    server = serving(lambda request, number: said("[[A>B]]" if "five labels" in str(request) else "[[7]] [[A>B]]"))
    for block in blocks:
        exec(re.sub(r"https?://[^\"]*", server.url, block), {})  # noqa: S102 - the page's own code
    printed = capsys.readouterr().out
    assert "16 of 16 turns rated by gpt-4-0613, prompts = judge_prompts.jsonl@" in printed
    assert "the orders disagree on 3" in printed and "shown first wins   1.00" in printed
