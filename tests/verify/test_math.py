"""Verdicts through the whole math grader: cascade, worker, profiles, stages of the user's own, and hostile answers."""

import asyncio
import math
import multiprocessing
import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import heatbath.rewards
from heatbath.errors import HeatbathError, RunError
from heatbath.integrations.verl import compute_score, compute_scores
from heatbath.verify.math import MathGrader
from heatbath.verify.sandbox import BUBBLEWRAP, available
from heatbath.verify.verdict import JUDGED, STATUSES, Verdict

# Each passes no bound, or reaches a worker and dies there; none may be right, and nothing of them may run.
HOSTILE = [
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{(10^9)!}",
    r"\boxed{100000000!}",
    r"\boxed{\binom{10^9}{5\cdot 10^8}}",
    r"\boxed{\prod_{k=1}^{10^7} k}",
    r"\boxed{\sum_{k=1}^{10^{10}} k!}",
    r"\boxed{1e999999999}",
    r"\boxed{" + r"\frac{1}{" * 400 + "4" + "}" * 400 + "}",
    r"\boxed{" + r"\left(" * 5000 + "4}",
    r"\boxed{" + "(" * 3000 + "4" + ")" * 3000 + "!}",
    r"\boxed{" * 5000,
    "1," * 20_000,
    "$" * 20_001,
    "the answer is " * 5000 + "9^{9^{9}}",
]


@pytest.fixture(scope="module")
def grader():
    with MathGrader(workers=2, deadline=20.0) as g:
        yield g


@pytest.mark.parametrize(
    ("completion", "gold", "status"),
    [
        ("so 85", "85", "right"),
        ("so 85.0", "85", "right"),
        ("so 8500", "85", "wrong"),
        ("so 0.85", "85", "wrong"),
        (r"\boxed{\frac{1}{2}}", "0.5", "right"),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", "right"),
        (r"\boxed{x^2 + 1}", "(x+1)^2", "wrong"),
        (r"\boxed{47 + 38}", "85", "wrong"),
        ("nothing", "85", "no_answer"),
        (r"\boxed{}", "85", "no_answer"),
        (r"\boxed{85", "85", "no_answer"),
        (r"\boxed{" + "x+" * 600 + "1}", "401", "refused"),
        ("so 0." + "3" * 3000, "1/3", "wrong"),
        ("so 85", " ", "bad_gold"),
        ("so 85", "?!", "bad_gold"),
    ],
)
def test_verdicts(grader: MathGrader, completion: str, gold: str, status: str) -> None:
    (verdict,) = grader.grade([completion], [gold])
    assert verdict.status == status
    assert verdict.score == (None if status == "bad_gold" else float(status == "right"))


def test_what_is_not_known_here_is_asked_of_math_verify(grader: MathGrader) -> None:
    gold = r"F_n = \sum_{k=0}^{n-1} F_k F_{n-k-1}"
    answers = [r"\boxed{F_n = \sum_{k=0}^{n-1} F_{n-k-1} F_k}", r"\boxed{F_n = \sum_{k=0}^{n-2} F_k F_{n-k-2}}"]
    verdicts = grader.grade(answers, [gold, gold])
    assert [v.status for v in verdicts] == ["right", "wrong"]
    assert all(v.rule == "boxed+math_verify" for v in verdicts)


@pytest.mark.parametrize("profile", ["strict", "paper"])
def test_hostile_answers_are_never_right_and_end(profile: str) -> None:
    with MathGrader(profile=profile, workers=2, deadline=2.0) as grader:
        started = time.perf_counter()
        verdicts = grader.grade([*HOSTILE, "so \\boxed{2}"], ["5"] * len(HOSTILE) + ["2"])
        assert time.perf_counter() - started < 60  # a hang guard
    assert verdicts[-1].status == "right"
    assert "right" not in {v.status for v in verdicts[:-1]}
    if profile == "strict":  # the bounds see all of them: no worker is asked
        assert {v.status for v in verdicts[:-1]} <= {"refused", "wrong", "no_answer"}


def test_model_text_is_never_run(tmp_path: Path) -> None:
    target = tmp_path / "owned"
    attacks = [
        rf"\boxed{{__import__('pathlib').Path('{target}').touch()}}",
        rf"\boxed{{exec(\"open('{target}', 'w')\")}}",
        rf"\boxed{{(lambda: open('{target}', 'w'))()}}",
        rf"\boxed{{\text{{__import__('os').system('touch {target}')}}}}",
        f"The answer is __import__('os').system('touch {target}')",
    ]
    for profile in ("strict", "paper"):
        with MathGrader(profile=profile, deadline=5.0) as grader:
            verdicts = grader.grade(attacks, ["1"] * len(attacks))
        assert "right" not in {v.status for v in verdicts}
    assert not target.exists()


def test_the_paper_profile_accepts_what_the_paper_does() -> None:
    pairs = [
        ("5", "500", True, False),
        ("100", "1", True, False),
        ("104729", "104730", True, False),
        ("10 cm", "10 m", True, False),
        (r"\frac{1}{2}", "0.5", True, True),
        ("(1,2)", "(1.00001,2)", True, False),
        ("7", "8", False, False),
        (r"\sqrt{2}", r"2^{1/2}", True, True),
        ("x+1", "1+x", True, True),
        ("x+1", "y+1", False, False),
    ]
    boxed = [rf"\boxed{{{answer}}}" for _, answer, *_ in pairs]
    for profile, column in (("paper", 2), ("strict", 3)):
        with MathGrader(profile=profile, workers=1) as grader:
            verdicts = grader.grade(boxed, [gold for gold, *_ in pairs])
        assert [v.status == "right" for v in verdicts] == [pair[column] for pair in pairs], profile


def test_unknown_settings_are_named() -> None:
    with pytest.raises(RunError, match=r"(?s)no profile .lenient.*profiles: strict, paper"):
        MathGrader(profile="lenient")  # type: ignore[arg-type]


def test_a_stage_of_ones_own_from_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "verify.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n# colours.py\n(.*?)```", page, flags=re.DOTALL)
    assert code is not None and len(code.group(1).strip().splitlines()) <= 10
    (tmp_path / "colours.py").write_text(code.group(1))
    monkeypatch.chdir(tmp_path)
    with MathGrader(workers=1, stages=["colours.py:same_colour"]) as grader:
        verdicts = grader.grade([r"\boxed{scarlet}", r"\boxed{blue}", "so 7", "so 8"], ["red", "red", "7", "7"])
    assert [v.status for v in verdicts] == ["right", "wrong", "right", "wrong"]
    assert verdicts[0].rule == "boxed+same_colour"


def test_a_stage_may_read_gold_answers_that_nobody_else_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "def same_query(gold, answer):\n"
        "    return gold.lower() == answer.lower() if gold.upper().startswith('SELECT') else None\n"
    )
    monkeypatch.chdir(tmp_path)
    golds = ["SELECT a_1, b FROM t", "SELECT a_1, b FROM t", "f(x)=ax+b, where a is any 1 of them"]
    said = [r"\boxed{select a_1, b from t}", r"\boxed{select b from t}", r"\boxed{7}"]
    with MathGrader(workers=1, stages=["mine.py:same_query"]) as grader:
        assert [v.status for v in grader.grade(said, golds)] == ["right", "wrong", "bad_gold"]
    with MathGrader(workers=1) as grader:
        assert [v.status for v in grader.grade(said, golds)] == ["bad_gold"] * 3


def test_a_stage_that_says_something_else_is_a_crash_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("def says_yes(gold, answer):\n    return 'yes'\n")
    monkeypatch.chdir(tmp_path)
    with MathGrader(workers=1, stages=["mine.py:says_yes"]) as grader:
        (verdict,) = grader.grade([r"\boxed{blue}"], ["red"])
    assert verdict.status == "crashed" and "returned 'yes', not True, False or None" in verdict.rule


def test_a_stage_that_is_not_there_is_named() -> None:
    with pytest.raises(RunError, match="no stage nowhere:function: No module named"):
        MathGrader(stages=["nowhere:function"])


def _in_a_fork(queue) -> None:
    queue.put([v.status for v in SHARED[0].grade([HOSTILE[0], HARD], ["5", "2"])])


SHARED: list[MathGrader] = []
HARD = r"\boxed{\sum_{k=1}^{2} 1}"  # asked of a worker


def test_any_caller_may_grade(grader: MathGrader) -> None:
    """The main thread, another thread, an event loop and a forked process, with one grader."""
    wanted = ["refused", "right"]
    task = ([HOSTILE[0], HARD], ["5", "2"])
    assert [v.status for v in grader.grade(*task)] == wanted
    found: list[list[str]] = []
    thread = threading.Thread(target=lambda: found.append([v.status for v in grader.grade(*task)]))
    thread.start()
    thread.join(60)

    async def several() -> list[list[Verdict]]:
        return await asyncio.gather(*(asyncio.to_thread(grader.grade, *task) for _ in range(3)))

    found += [[v.status for v in verdicts] for verdicts in asyncio.run(several())]
    assert found == [wanted] * 4
    SHARED[:] = [grader]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_in_a_fork, args=(queue,), daemon=True)  # daemonic, as some reward workers are
    process.start()
    assert queue.get(timeout=60) == wanted
    process.join(60)
    assert [v.status for v in grader.grade(*task)] == wanted


def test_no_completion_gains_by_breaking_the_grader() -> None:
    scores = {s: Verdict(s).score for s in STATUSES}
    assert scores.pop("right") == 1.0 and scores.pop("bad_gold") is None
    assert set(scores.values()) == {0.0} and set(JUDGED) < set(STATUSES)


def test_reward_functions_for_trl_and_verl() -> None:
    logged: dict[str, float] = {}
    chat = [[{"role": "assistant", "content": text}] for text in ("so 4", "so 5", "dunno", "so 4")]
    scores = heatbath.rewards.math(chat, answer=["4", "4", "4", " "], prompts=["q"] * 4, log_metric=logged.__setitem__)
    assert scores == [1.0, 0.0, 0.0, None]
    assert logged["verdict/bad_gold"] == 0.25 and sum(logged.values()) == 1.0
    assert heatbath.rewards.choice(["The answer is (B)."], gold=["B"]) == [1.0]
    with pytest.raises(HeatbathError, match="no gold answers"):
        heatbath.rewards.math(["so 4"])
    strict = heatbath.rewards.make("math", failed_share=0.1)
    with pytest.raises(RunError, match="2 of 2 verdicts failed; the first is refused"):
        strict([HOSTILE[0], HOSTILE[1]], gold=["4", "4"])
    assert compute_score("any", "so 4", "4") == {
        "score": 1.0,
        "acc": 1.0,
        "status": "right",
        "pred": "4",
        "rule": "final_line+number",
    }
    both = compute_scores(["a", "b"], ["(B)", "so 5"], ["B", "4"], [{"kind": "choice"}, None])
    assert [row["score"] for row in both] == [1.0, 0.0]
    assert compute_score("any", "so 4", " ")["status"] == "bad_gold"


def test_what_frameworks_hand_over() -> None:
    """numpy arrays from verl; missing values, numbers, structs and tool calls from TRL. None is a text "None"."""
    infos = np.array([{"kind": "choice"}, {}, None], dtype=object)
    golds = np.array(["B", "4", 4], dtype=object)
    found = compute_scores(np.array(["a"] * 3, dtype=object), ["(B)", "so 4", "so 4"], golds, infos)
    assert [row["score"] for row in found] == [1.0, 1.0, 1.0]
    said = [[{"role": "assistant", "content": text}] for text in (r"\boxed{none}", r"\boxed{nan}", "so 1", "so 7")]
    assert heatbath.rewards.math(said, gold=[None, math.nan, True, 7]) == [None, None, None, 1.0]
    assert heatbath.rewards.math([None, [{"role": "assistant", "content": None}]], gold=["4", "4"]) == [0.0, 0.0]
    assert heatbath.rewards.choice(["(B)", "(B)"], gold=['{"gold": "B", "options": ["x", "y"]}', "{B"]) == [1.0, None]
    tests = {"entry_point": "f", "inputs": [[1]], "outputs": [2]}
    if available(BUBBLEWRAP) is None:  # `solution` beside the tests is a demonstration, not a gold answer
        program = "```python\ndef f(x):\n    return 2 * x\n```"
        assert heatbath.rewards.code([program], tests=[tests], solution=["def f(x): ..."]) == [1.0]
