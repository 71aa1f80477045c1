"""What the page's browser reads: the run's samples, all of them or as many as fit, and nothing that could end a tag."""

import json
from pathlib import Path
from typing import Any

import pytest

from heatbath.report import browser
from heatbath.report.browser import EXCERPT, Voice, as_json, cut, embedded, examples, told, voices
from heatbath.report.page import write_report
from heatbath.report.runs_page import write_comparison
from heatbath.run import append_jsonl
from heatbath.stages.judged import digest
from written_runs import HOSTILE, sample, written


def unpacked(data: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Every sample that the page holds: voice, task, question, gold, verdict, cut, tokens, text, answer, rule."""
    out = []
    for i in range(0, len(data["samples"]), 8):
        voice, problem, status, was_cut, tokens, text, answer, rule = data["samples"][i : i + 8]
        task, question, gold = data["problems"][problem]
        texts = data["texts"]
        out.append((
            data["voices"][voice][0], data["tasks"][task], texts[question], texts[gold], data["statuses"][status],
            bool(was_cut), tokens, texts[text], None if answer < 0 else texts[answer], data["rules"][rule],
        ))  # fmt: skip
    return out


def drawn(policy: str = "base", problems: int = 6, draws: int = 4, task: str = "test") -> list[dict[str, Any]]:
    return [sample(policy, q, i == q % 3, task=task) for q in range(problems) for i in range(draws)]


def test_what_is_embedded_is_what_was_sampled() -> None:
    rows = {"base": drawn("base") + drawn("base", 2, 3, "other"), "final": drawn("final", 5, 3)}
    rows["final"][0]["gold"] = None
    rows["final"][1]["rule"] = None
    data = json.loads(as_json(embedded(voices([("", "", rows)]))))
    wanted = [
        (policy, r["task"], r["question"], str(r["gold"] or ""), r["status"], not r["finished"], r["tokens"],
         r["completion"], r["answer"], r["rule"] or "")
        for policy, own in rows.items() for r in own
    ]  # fmt: skip
    wanted[len(rows["base"])] = (
        *wanted[len(rows["base"])][:3],
        "1",
        *wanted[len(rows["base"])][4:],
    )  # base's came first
    assert unpacked(data) == wanted and data["kept"] == data["of"] == len(wanted) and data["limit"] is None
    assert told(data) == f"All {len(wanted)} samples are in this page."
    assert len(data["texts"]) == len(set(data["texts"]))
    for number, (task, question, _) in enumerate(data["problems"]):
        for voice, (policy, own) in enumerate(rows.items()):
            these = [r for r in own if (r["task"], r["question"]) == (data["tasks"][task], data["texts"][question])]
            assert data["tallies"][number][voice] == [sum(r["status"] == "right" for r in these), len(these)], policy


def test_two_turns_of_a_problem_are_two_questions() -> None:
    rows = [sample("base", 1, False) | {"turn": t, "question": f"turn {t}", "status": "answered"} for t in (1, 2)]
    data = embedded([Voice("base", "policy-base", rows)])
    assert [data["texts"][q] for _, q, _ in data["problems"]] == ["turn 1", "turn 2"]


def test_nothing_can_end_the_script_element() -> None:
    text = as_json({"x": HOSTILE, "<k>": "<!-- & \u2029 -->"})
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == {"x": HOSTILE, "<k>": "<!-- & \u2029 -->"}


def test_half_a_character_does_not_stop_the_page(tmp_path: Path) -> None:
    run = written(tmp_path / "run", {"base": 1})
    rows = [row | {"completion": "\ud83d \x00 \x1b[31m"} for row in run.samples()]
    (run.folder / "samples.jsonl.gz").unlink()
    (run.folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))  # escaped
    assert "\\u001b[31m" in write_report(run)["html"].read_text()


def test_too_much_is_cut_to_the_first_of_every_problem() -> None:
    rows = [sample("base", q, False, f"{q} {i} " + "x" * 300) for q in range(20) for i in range(10)]
    data = embedded([Voice("base", "", rows), Voice("final", "", rows[:5])], budget=20_000)
    kept = [row for row in unpacked(data) if row[0] == "base"]
    assert len(as_json(data)) <= 20_000 + 200 and 20 < len(kept) < 200
    assert data["limit"] == len(kept) and data["of"] == 205 and data["kept"] == len(kept) + 5
    number = {}  # how many of each problem: the rounds are whole but for the last
    for row in kept:
        number[row[2]] = number.get(row[2], 0) + 1
    assert len(number) == 20 and max(number.values()) - min(number.values()) <= 1
    order = [row[7] for row in kept]
    assert order == [r["completion"] for r in rows if r["completion"] in set(order)]  # in their own order
    assert all(tally[0] == [0, 10] for tally in data["tallies"])  # of all samples
    assert f"first {len(kept)}" in told(data) and "Of 205 samples" in told(data)
    assert embedded([Voice("base", "", rows)], budget=10)["kept"] == 1  # never nothing


def test_a_problem_without_a_kept_sample_costs_nothing() -> None:
    """Thousands of questions alone would take more than a page may."""
    rows = [
        sample(policy, q, False) | {"question": f"{q} " + "y" * 600} for policy in ("base", "final") for q in range(500)
    ]
    data = embedded(
        voices([("", "", {p: [r for r in rows if r["policy"] == p] for p in ("base", "final")})]), budget=90_000
    )
    assert len(as_json(data)) <= 90_000 and 100 < data["kept"] < 1_000
    shown = {question for _, _, question, *_ in unpacked(data)}
    assert len(shown) == len(data["problems"]) == len(data["tallies"]) == data["kept"] / 2
    assert f"They are of {len(shown)} of 500 problems." in told(data)


def test_an_answer_for_a_judge_has_no_share_right_and_only_the_rating_of_itself(tmp_path: Path) -> None:
    run = written(tmp_path / "run", {"base": 1}, problems=1, draws=1, k=(1,))
    turns = [sample("base", 81, False, said, "mt_bench") | {"status": "answered"} for said in ("No.", "Yes.")]
    run.add_samples([row | {"turn": turn} for turn, row in enumerate(turns, 1)])
    common = {"task": "mt_bench", "policy": "base", "problem": "p081", "judge": "j"}
    judgments = [
        {"turn": 1, "rating": 7.0, "of": digest(["No."])},
        {"turn": 2, "rating": 3.0, "of": digest(["No.", "a former answer"])},
    ]
    append_jsonl(run.folder / "judgments.jsonl", [common | row for row in judgments])
    found = browser.rated(run, run.samples())
    assert [row["status"] for row in found] == ["right", "rated 7", "not rated"]
    assert embedded([Voice("base", "", found)])["tallies"] == [[[1, 1]], [[0, 0]], [[0, 0]]]


def test_a_long_text_shows_its_beginning_and_its_end() -> None:
    text = "".join(chr(97 + i % 26) for i in range(EXCERPT + 500))
    short = cut(text)
    head, tail = short.split("\n[… 500 characters left out …]\n")
    assert text.startswith(head) and text.endswith(tail) and len(head) + len(tail) == EXCERPT
    assert cut(text[:EXCERPT]) == text[:EXCERPT]


def test_a_base_that_all_runs_drew_alike_is_one_voice() -> None:
    base, other = drawn("base"), drawn("base", 5)
    runs = [("a", "run-1", {"base": base, "final": drawn("final")}), ("b", "run-2", {"base": base, "final": []})]
    assert [(v.label, v.css) for v in voices(runs)] == [("base", "policy-base"), ("a final", "run-1")]
    three = [*runs, ("c", "run-3", {"base": other})]
    assert [v.label for v in voices(three)] == ["a, b base", "c base", "a final"]
    assert [v.label for v in voices(three[:1])] == ["base", "final"]


def test_examples_are_the_first_and_not_chosen() -> None:
    rows = drawn("base", 9)[::-1]  # another order in the file
    found = examples([Voice("base", "x", rows), Voice("final", "y", drawn("final", 2))])
    assert [e["question"] for e in found] == [f"What is {q} + 1? <i>{q}</i>" for q in range(browser.EXAMPLES)]
    first = next(r for r in rows if r["problem"] == "p000")
    assert found[0]["samples"][0]["completion"] == first["completion"]
    assert [len(e["samples"]) for e in found] == [2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize(("length", "policies"), [(1_000, 1), (9_000, 3)])
@pytest.mark.thorough
def test_four_runs_of_500_samples_stay_below_three_megabytes(length: int, policies: int, tmp_path: Path) -> None:
    """500 samples of each policy, no two alike: those of one policy are all there."""

    def said(policy: str, problem: int, draw: int) -> str:
        rest = "".join(chr(97 + (problem * draw + i * i) % 26) for i in range(length))
        return f"{policy} {problem} {draw} {rest}"

    shares = dict(list({"final": 3, "init": 2, "base": 1}.items())[:policies])
    runs = [
        written(
            tmp_path / f"r{i}",
            shares,
            problems=125,
            draws=4,
            completion=lambda p, q, j, i=i: f"run {i} {said(p, q, j)}",
            k=(1, 4),
            seed=i,
        )
        for i in range(4)
    ]
    page = write_comparison([run.folder for run in runs])["html"]
    assert page.stat().st_size < 3_000_000
    text = page.read_text()
    assert ("All 2,000 samples are in this page." in text) == (policies == 1)
    assert ("Of 6,000 samples" in text) == (policies == 3)
    assert ("characters left out" in text) == (length > EXCERPT)
