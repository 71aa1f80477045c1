"""`heatbath grade`: the same rows with verdicts, in order, whatever the file holds and however often it is killed."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from heatbath import cli
from heatbath.errors import RunError
from heatbath.progress import Progress
from heatbath.stages import grade as stage
from heatbath.stages.grade import FIELDS, Grading, run_grade

CHOICES = [
    {"id": i, "gold": "B", "options": ["x", "y"], "response": f"{i}: the answer is {'AB'[i % 2]}."} for i in range(8)
]


def write(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def without_seconds(path: Path) -> list[dict[str, Any]]:
    return [row | {"seconds": None} for row in read(path)]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `heatbath grade` with these arguments: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["heatbath", "grade", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def test_the_same_rows_with_their_verdicts(call, tmp_path: Path) -> None:
    rows = [
        {"gold": "85", "response": "so 85", "expected": True, "more": {"é": [1.5, None]}},
        {"gold": 85, "response": "so 84", "expected": 1},
        {"gold": "85", "response": "nothing", "expected": 0},
        {"gold": " ", "response": "so 85", "expected": True},
        {"gold": "1/2", "response": r"\boxed{\frac{1}{2}}", "expected": 0},
    ]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "deep" / "out.jsonl"
    code, printed, _ = call(source, "--kind", "math", "--out", out, "--json", "--workers", 1, "--deadline", 30)
    graded = read(out)
    assert code == 2  # a gold answer is missing
    assert [row["status"] for row in graded] == ["right", "wrong", "no_answer", "bad_gold", "right"]
    assert [row["score"] for row in graded] == [1.0, 0.0, 0.0, None, 1.0]
    for row, old in zip(graded, rows, strict=True):
        assert list(row)[-5:] == list(FIELDS)
        assert {k: v for k, v in row.items() if k not in FIELDS} == {k: v for k, v in old.items() if k not in FIELDS}
    found = json.loads(printed)
    assert found["rows"] == 5 and found["mean_score"] == 0.5 and not found["ok"]
    assert found["verdicts"] == {"right": 2, "wrong": 1, "no_answer": 1, "bad_gold": 1}
    assert found["failures"]["bad_gold"]["count"] == 1 and found["failures"]["bad_gold"]["first"]["row"] == 4
    agreement = found["agreement"]
    assert (agreement["rows"], agreement["agree"]) == (4, 2)
    assert agreement["first"]["false_accepts"]["row"] == 5 and agreement["first"]["false_rejects"]["row"] == 2


def test_a_column_of_ones_own_is_not_lost(call, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"gold": "4", "response": "so 4", "answer": "mine", "score": 7}])
    for name in ("out.jsonl", "again.jsonl"):  # a former verdict is replaced
        assert call(source, "--out", tmp_path / name)[0] == 0
        source = tmp_path / name
        (graded,) = read(source)
        assert (graded["answer_given"], graded["score_given"]) == ("mine", 7)
        assert (graded["answer"], graded["score"], graded["status"]) == ("4", 1.0, "right")


def test_choices_and_what_a_person_sees(call, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", CHOICES), tmp_path / "out.jsonl"
    code, printed, _ = call(source, "--kind", "choice", "--out", out)
    assert code == 0 and "8 rows: mean score 0.5000" in printed and "right      4" in printed and str(out) in printed
    assert [row["answer"] for row in read(out)] == list("ABABABAB")
    code, printed, _ = call(source, "--kind", "choice", "--out", out)
    assert code == 0 and "8 rows (8 of them graded before): mean score 0.5000" in printed


def test_programs(call, tmp_path: Path, needs) -> None:
    needs("bwrap")
    tests = {"test_list": ["assert double(2) == 4", "assert double(-1) == -2"]}
    right, wrong = ("```python\ndef double(x):\n    return " + body + "\n```" for body in ("2 * x", "x * x"))
    rows = [{"tests": t, "response": r} for t in (tests, tests["test_list"]) for r in (right, wrong)]
    source = write(tmp_path / "in.jsonl", [*rows, {"tests": 3, "response": right}, {"gold": "4", "response": right}])
    code, printed, _ = call(source, "--kind", "code", "--out", tmp_path / "out.jsonl")
    assert code == 2 and "row 5: 'tests' is a number" in printed and "row 6: no field 'tests'" in printed
    assert [row["status"] for row in read(tmp_path / "out.jsonl")] == ["right", "wrong", "right", "wrong"] + [
        "refused"
    ] * 2


BAD: list[tuple[bytes, str]] = [
    (b"\xff\xfe\x00\x01 binary", "not UTF-8: byte 0xff at 0"),
    (b'{"gold": "A", "response": "\xe9"}', "not UTF-8: byte 0xe9 at 27"),
    (b'{"gold": "A", "response": ', "not JSON"),
    (b"\x00\x00\x00", "not JSON"),
    (b'{"gold": ' + b"1" * 5000 + b', "response": "A"}', "not JSON"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"response": "A", "gold": ' + b"[" * 900 + b"]" * 900 + b"}", ""),
    (b'"A"', "a text, not an object"),
    (b"null", "null, not an object"),
    (b"{}", "no field 'response' (it has none)"),
    (b'{"gold": "A", "answer": "A"}', "no field 'response' (it has gold, answer)"),
    (b'{"response": "A"}', "no field 'gold' (it has response)"),
    (b'{"gold": "A", "response": ["A"]}', "'response' is a list, not a text"),
    (b'{"gold": "A", "response": null}', "'response' is null, not a text"),
    (b'{"gold": null, "response": "A"}', "'gold' is null, not a text or a number"),
    (b'{"gold": NaN, "response": "A"}', "'gold' is nan, not a finite number"),
    (b'{"gold": ["A"], "response": "A"}', "'gold' is a list, not a text or a number"),
    (b'{"gold": true, "response": "A"}', "'gold' is true or false, not a text or a number"),
    (b'{"gold": "A", "response": "' + b"x" * 10_000_000 + b'"}', "the line is longer than 8 MiB"),
    (b"x" * 30_000_000, "the line is longer than 8 MiB"),
]


def test_bad_rows_are_listed_and_the_rest_is_graded(call, tmp_path: Path) -> None:
    good = {"gold": "B", "response": "The answer is B"}
    rows: list[Any] = [good]
    for line, _ in BAD:
        rows += [line, b"", good]
    rows += [{"gold": "B", "response": "\ud800 The answer is B"}, {"gold": "B", "response": "x" * 4_000_000 + " So B."}]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes()[:-1])  # a mark at the beginning, no newline at the end
    code, printed, _ = call(source, "--kind", "choice", "--out", out, "--json")
    found, graded = json.loads(printed), read(out)
    assert code == 2 and found["unreadable"] == len(BAD) and found["verdicts"] == {"right": len(BAD) + 3}
    assert len(graded) == 2 * len(BAD) + 3 and found["mean_score"] == 1.0
    for i, (_, reason) in enumerate(BAD):
        row, listed = graded[2 * i + 1], found["unreadable_rows"][i]
        assert row["status"] == "refused" and row["score"] is None and reason in listed["reason"]
        assert row["rule"] == f"unreadable: {listed['reason']}" and listed["row"] == 3 * i + 2
        assert row.get("row", listed["row"]) == listed["row"] and len(listed["reason"]) < 200
    code, printed, _ = call(source, "--kind", "choice", "--out", out)
    assert code == 2 and "graded before" in printed and "row 2: not UTF-8" in printed
    assert read(out) == graded


def test_more_bad_rows_than_a_summary_shows(call, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [b"junk"] * 50)
    code, printed, _ = call(source, "--kind", "choice", "--out", tmp_path / "out.jsonl")
    assert code == 2 and "50 rows could not be read" in printed and "row 20:" in printed and "row 21:" not in printed
    assert "no row has a score" in printed and len(read(tmp_path / "out.jsonl")) == 50
    assert call(write(tmp_path / "none.jsonl", []), "--kind", "choice", "--out", tmp_path / "n.jsonl")[0] == 0


def test_stdin_and_stdout(call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = write(tmp_path / "in.jsonl", CHOICES).read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    code, printed, err = call("-", "--kind", "choice")
    assert code == 0 and [json.loads(line)["answer"] for line in printed.splitlines()] == list("ABABABAB")
    assert "8 rows: mean score 0.5000" in err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert call("-", "--kind", "choice", "--out", tmp_path / "out.jsonl")[0] == 0
    assert len(read(tmp_path / "out.jsonl")) == 8


def test_going_on_after_a_line_cut_anywhere(call, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", CHOICES), tmp_path / "out.jsonl"
    call(source, "--kind", "choice", "--out", out)
    whole, expected = out.read_bytes(), without_seconds(out)
    third = len(b"".join(whole.splitlines(keepends=True)[:3]))
    for cut in (0, 1, third - 1, third, third + 1, third + 40, len(whole) - 1, len(whole)):
        out.write_bytes(whole[:cut])
        code, printed, _ = call(source, "--kind", "choice", "--out", out, "--json")
        assert code == 0 and without_seconds(out) == expected, cut
        found = json.loads(printed)
        assert found["rows"] == 8 and found["resumed"] == whole[:cut].count(b"\n")
    with source.open("ab") as stream:  # the input has grown since
        stream.write(json.dumps(CHOICES[0]).encode() + b"\n")
    assert json.loads(call(source, "--kind", "choice", "--out", out, "--json")[1])["resumed"] == 8
    assert len(read(out)) == 9


def test_a_killed_process_is_gone_on_with(tmp_path: Path) -> None:
    rows = [CHOICES[i % 8] | {"id": i, "response": "the answer is " * 300 + "AB"[i % 2]} for i in range(3000)]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "heatbath", "grade", str(source), "--kind", "choice", "--out", str(out)]
    killed = 0
    for _ in range(2):
        before = out.stat().st_size if out.exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and (not out.exists() or out.stat().st_size <= before + 100_000):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed == 2 and 0 < out.read_bytes().count(b"\n") < 3000
    with out.open("ab") as stream:  # and in the middle of a line
        stream.write(b'{"id": 17, "gold"')
    found = run_grade(Grading(str(source), str(out), "choice"), Progress(quiet=True))
    assert 0 < found["resumed"] < 3000 and found["rows"] == 3000 and found["verdicts"] == {"right": 1500, "wrong": 1500}
    graded = read(out)
    assert [row["id"] for row in graded] == list(range(3000))
    assert all(row["answer"] == "AB"[row["id"] % 2] for row in graded)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.jsonl"], "no such file"),
        (["."], "it is a folder"),
        (["in.jsonl", "--kind", "essay"], "no grader 'essay'"),
        (["in.jsonl", "--profile", "lax"], "no profile 'lax'"),
        (["in.jsonl", "--kind", "choice", "--profile", "paper"], "only math has a profile 'paper'"),
        (["in.jsonl", "--kind", "code", "--profile", "paper"], "only math has a profile 'paper'"),
        (["in.jsonl", "--deadline", "nan"], "the deadline must be"),
        (["in.jsonl", "--deadline", "0"], "the deadline must be"),
        (["in.jsonl", "--out", "./in.jsonl"], "the output is the input"),
        (["in.jsonl", "--out", "."], "the output is a folder"),
        (["in.jsonl", "--kind", "choice", "--out", "other.jsonl"], "line 1 of the output is not a graded row"),
        (["in.jsonl", "--kind", "choice", "--out", "longer.jsonl"], "line 9 of the output is not a graded row"),
        (["in.jsonl", "--kind", "choice", "--out", "binary.jsonl"], "line 1 of the output is not a graded row"),
        (["in.jsonl", "--kind", "math", "--out", "graded.jsonl"], "was graded as"),
    ],
)
def test_what_is_wrong_exits_2_and_overwrites_nothing(
    call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path / "in.jsonl", CHOICES)
    assert call(source, "--kind", "choice", "--out", "graded.jsonl")[0] == 0
    (tmp_path / "other.jsonl").write_bytes(source.read_bytes())
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\n")
    (tmp_path / "longer.jsonl").write_bytes((tmp_path / "graded.jsonl").read_bytes() + b"{}\n")
    before = {p: p.read_bytes() for p in tmp_path.glob("*.jsonl")}
    code, printed, err = call(*arguments)
    assert code == 2 and message in err and "where:" in err and "remedy:" in err and "Traceback" not in err
    assert printed == "" and {p: p.read_bytes() for p in tmp_path.glob("*.jsonl")} == before


@pytest.mark.parametrize("error", [ValueError("0 < deadline <= 60 s is needed"), RunError("no such thing", "deadline")])
def test_a_grader_that_cannot_be_built_exits_2(
    call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    def refusing(*_: object, **__: object) -> None:
        raise error

    source, out = write(tmp_path / "in.jsonl", CHOICES), tmp_path / "out.jsonl"
    assert call(source, "--kind", "choice", "--out", out)[0] == 0
    before = out.read_bytes()
    monkeypatch.setattr(stage, "grader", refusing)
    code, printed, err = call(source, "--kind", "choice", "--out", out, "--fresh")
    assert code == 2 and str(error).split("\n")[0] in err and "Traceback" not in err and printed == ""
    assert out.read_bytes() == before


def test_a_deadline_that_programs_cannot_have(call, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"tests": ["assert True"], "response": "x"}])
    code, printed, err = call(source, "--kind", "code", "--deadline", "100000")
    assert code == 2 and "deadline" in err and "Traceback" not in err and printed == ""


@pytest.mark.parametrize("gold", ["null", "NaN", "Infinity", "-Infinity", "true", "[]", '["4"]', "{}"])
def test_a_math_gold_that_is_no_text_and_no_number(call, tmp_path: Path, gold: str) -> None:
    said = [f'{{"gold": {gold}, "response": "so {said}"}}'.encode() for said in ("None", "nan", "inf", "True", "[]")]
    source, out = write(tmp_path / "in.jsonl", said), tmp_path / "out.jsonl"
    code, printed, _ = call(source, "--out", out, "--json", "--workers", 1)
    assert code == 2 and json.loads(printed)["unreadable"] == 5 and {row["score"] for row in read(out)} == {None}


def test_options_in_the_form_of_arc(call, tmp_path: Path) -> None:
    arc = {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}
    rows = [
        {"gold": "2", "options": options, "response": f"So ({said})"}
        for options in (arc, ["x", "y", "z"])
        for said in "2C"
    ]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert call(source, "--kind", "choice", "--out", out)[0] == 0
    assert [row["status"] for row in read(out)] == ["right", "wrong", "no_answer", "right"]


@pytest.mark.parametrize(("folder", "options", "undecided"), [("mmlu_redux", "choices", 7), ("mmlu_pro", "options", 0)])
def test_real_choices(shared_data: Path, tmp_path: Path, folder: str, options: str, undecided: int) -> None:
    name = {"mmlu_redux": "test.jsonl", "mmlu_pro": "sample2000.jsonl"}[folder]
    found = []
    for row in list(map(json.loads, (shared_data / folder / name).open(encoding="utf-8")))[::13]:
        right = int(row["answer"]) if folder == "mmlu_redux" else "ABCDEFGHIJ".index(row["answer"])
        for shift in (0, 1, len(row[options]) - 1):
            letter = "ABCDEFGHIJ"[(right + shift) % len(row[options])]
            response = {"response": f"The answer is ({letter}).", "expected": shift == 0}
            found.append({"gold": row["answer"], "options": row[options], **response})
    source, out = write(tmp_path / "in.jsonl", found), tmp_path / "out.jsonl"
    graded = run_grade(Grading(str(source), str(out), "choice"), Progress(quiet=True))
    assert graded["verdicts"].get("bad_gold", 0) == 3 * undecided  # "2" is the text of one option, the index of another
    assert graded["agreement"]["agree"] == graded["agreement"]["rows"] == len(found) - 3 * undecided


def test_fresh_starts_over(call, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", CHOICES), tmp_path / "out.jsonl"
    call(source, "--kind", "math", "--out", out, "--workers", 1)
    code, printed, _ = call(source, "--kind", "choice", "--out", out, "--fresh", "--json")
    assert code == 0 and json.loads(printed)["resumed"] == 0 and [r["answer"] for r in read(out)] == list("ABABABAB")
    assert call(source, "--kind", "choice", "--out", out)[0] == 0  # known as what it was graded last


def test_two_at_a_time_are_refused(call, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", CHOICES)
    with FileLock(tmp_path / ".out.jsonl.lock"):
        code, _, err = call(source, "--kind", "choice", "--out", tmp_path / "out.jsonl")
    assert code == 1 and "another process writes to the output" in err and not (tmp_path / "out.jsonl").exists()


def test_interrupting_exits_130(call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    source, out = write(tmp_path / "in.jsonl", CHOICES), tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(stage, "_graded", interrupted)
        code, _, err = call(source, "--kind", "choice", "--out", out)
    assert code == 130 and "the same command goes on" in err and "Traceback" not in err
    assert call(source, "--kind", "choice", "--out", out)[0] == 0 and len(read(out)) == 8


MEASURED = """
import resource, sys
from heatbath.progress import Progress
from heatbath.stages.grade import Grading, run_grade
found = run_grade(Grading(sys.argv[1], sys.argv[1] + ".out", "choice"), Progress(quiet=True))
print(found["rows"], found["resumed"], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux only")
def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    peaks = []
    for count in (1_000, 11_000):
        source = tmp_path / f"{count}.jsonl"
        with source.open("w") as stream:
            stream.writelines(
                json.dumps(CHOICES[i % 8] | {"id": "x" * 2000, "expected": 1}) + "\n" for i in range(count)
            )
        for resumed in (0, count):  # graded, then only read again
            done = subprocess.run(
                [sys.executable, "-c", MEASURED, str(source)], capture_output=True, text=True, check=True
            )
            rows, before, peak = map(int, done.stdout.split())
            assert (rows, before) == (count, resumed)
            peaks.append(peak)
    assert peaks[2] < peaks[0] + 10_000 and peaks[3] < peaks[1] + 10_000  # KiB; the rows alone would be 25,000 more
