"""Multiple choice: what asserts an answer and what does not, on made phrases, three benchmarks' rows, and junk."""

import gzip
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest

from heatbath.verify.choice import ChoiceGrader, _worded, plain

CITIES = ["London", "Paris", "Rome", "Berlin"]
NUMBERED = {"1": "slower", "2": "faster", "3": "same"}
VALUES = {"1": "3", "2": "4", "3": "5"}  # the label of one is the text of another
LETTERS = "ABCDEFGHIJ"


def grade(text: str, gold: Any, options: Any = None) -> Any:
    return ChoiceGrader().grade([text], [gold if options is None else {"gold": gold, "options": options}])[0]


ASSERTED = {
    "boxed": [
        r"The answer is \boxed{B}.",
        r"\boxed{\text{(B)}}",
        r"\boxed{\textbf{(B) }17}",
        r"$\boxed{\mathrm{B}}$",
        r"\boxed{b}",
        r"\boxed{B. Paris}",
        r"\boxed{\text{Option B}}",
        r"\boxed{A}, no: \boxed{B}",
        r"\fbox{B}",
        r"The answer is \(\boxed{B}\)",
        "**Final Answer**\n\n\\boxed{B}",
        "\\boxed{A} is wrong. \\boxed{B}",
    ],
    "stated": [
        "the final answer is (B)",
        "The correct answer is: B",
        "The best answer is (b).",
        "Answer: B",
        "**Answer:** B",
        "**Answer: B**",
        "answer is B.",
        "ANSWER: B!!",
        "### Answer\nB",
        "#### B",
        "<answer> B </answer>",
        '{"answer": "B"}',
        "{'answer': 'B'}",
        "The answer is\n\n(B) Paris",
        "The correct option is B",
        "Answer: The correct option is B",
        "The answer must therefore be B.",
        "The answer is clearly option (B).",
        "The answer is most likely B",
        "The answer is $B$.",
        r"The answer is \(B\).",
        r"The answer is \textbf{B}.",
        "The answer is 17 (B)",
        "The answer is B, and C is wrong.",
        "The answer is B, not C",
        "The answer is (B) because (A) and (C) are wrong.",
        "The answer is B. A, C and D are wrong.",
        "The answer is not A but B.",
        "The answer is not A. The answer is B",
        "The answer is A. That is wrong. The answer is B.",
        "If x is 2, the answer is B.",
        "Both A and C are wrong, so the answer is B.",
        "One might think the answer is A, but the answer is B",
        "I think the answer is (B).",
        "A common mistake is A. The answer is (B).",
        "The answer is I think B",
        "The answer is B, I think.",
        "<think>The answer is A</think>\nThe answer is B.",
        "The answer is B<|im_end|>",
        "The answer is \u200bＢ",
        "Final answer: 𝐁",
        "答案是B。",
        "答案：Ｂ",
        "【答案】B",
        "故选：B",
        "所以选B。",
    ],
    "is_correct": ["Therefore option B is correct.", "B is the correct answer.", "Only B is correct."],
    "chosen": [
        "I would choose (B).",
        "We choose B because it fits.",
        "So it is **B**.",
        "Hence (B).",
        r"17 \Rightarrow (B)",
        "The answer isn't A. It must be B.",
        "A and C fail, which leaves (B).",
    ],
    "final_line": ["So\nB", "So\n(B)", "So\nB)", "So\n**B**", "So\nB. Paris", "B", "b)", "[B]", "B</s>", "Option B"],
    "first_line": ["B\n\nExplanation: it is the capital.", "B. Paris\n\nIt is the capital."],
}


@pytest.mark.parametrize(("rule", "text"), [(rule, text) for rule, texts in ASSERTED.items() for text in texts])
def test_what_asserts_b(rule: str, text: str) -> None:
    verdict = grade(text, "B")
    assert (verdict.status, verdict.answer, verdict.rule) == ("right", "B", rule)
    assert grade(text, "A").status == "wrong"
    assert verdict.score == 1.0 and verdict.seconds > 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A common mistake",
        "The answer is A common thing",
        "The answer is a matter of taste",
        "The answer is a",
        "I think",
        "options A and B are wrong",
        "Option A is incorrect",
        "Neither A nor B is correct",
        "It is not true that option A is correct",
        "If option A is correct, then B fails.",
        "the answer is not A",
        "The answer isn't A.",
        "The answer is neither A nor B",
        "The answer is anything but (A)",
        "The answer is not 17 (A)",
        "The answer is A. Hmm, the answer is not A.",
        "The answer is (A). That is wrong.",
        r"\boxed{A} is wrong",
        "Answer A is wrong",
        "The answer is A or B",
        "The answer is (A) or (B)",
        "The answer is either A or B",
        "The answer is A... or maybe B.",
        "The answer is A (or B).",
        "The answer is A and B",
        "The answer is A, B",
        "The answer is A/B",
        r"\boxed{A, B}",
        r"\boxed{A \text{ or } B}",
        r"\boxed{A}, \boxed{B}",
        r"\boxed{A} or \boxed{B}",
        r"The answer is (A) but \boxed{}",
        r"\boxed{A^2}",
        r"\boxed{AB}",
        "We choose A or B",
        "Is the answer A?",
        "The answer is A?",
        "A is the correct answer? No.",
        "If the answer is A, then x",
        "The answer is A only if x > 0",
        "The answer would be A if x > 0",
        "I don't think the answer is A",
        "One might think the answer is A",
        "It would be wrong to say the answer is A.",
        "The wrong answer is A",
        "The least likely answer is A",
        "The student's answer is A",
        "My initial answer was A",
        "The answer is A's claim",
        "The answer is A-level",
        "The answer is A = 5",
        "(A) is tempting but wrong.",
        "vitamin A is the best",
        "This does not match option A.",
        "Don't choose A.",
        "Thus A is wrong.",
        "答案不是A",
        "不选A",
        "答案是A或B",
        "选项A错误",
        "<think>The answer is A</think>\nI do not know",
    ],
)
def test_what_asserts_nothing(text: str) -> None:
    assert grade(text, "A").status == "no_answer"
    assert grade(text, "B").status in ("no_answer", "wrong")


@pytest.mark.parametrize(
    ("text", "options", "label"),
    [
        ("The answer is Paris.", CITIES, "B"),
        ("The answer is **Paris**, because it is the capital", CITIES, "B"),
        ("Let me think.\nParis", CITIES, "B"),
        (r"\boxed{\text{Paris}}", CITIES, "B"),
        ("The answer is Paris (B).", CITIES, "B"),
        ("The answer is Paris (A).", CITIES, None),
        ("The answer is (B) London", CITIES, None),
        ("The answer is Paris or Rome", CITIES, None),
        ("London\nParis\nRome\nBerlin", CITIES, None),
        ("A. London\nB. Paris\nC. Rome\nD. Berlin", CITIES, None),
        ("Answer:\nA. London\nB. Paris", CITIES, None),
        ("The answer is 5.", ["5", "10"], "A"),
        ("The answer is 5.5", ["5", "10"], None),
        ("The answer is 5, 7", ["5", "10"], None),
        ("The answer is 5\\%", ["5", "10"], None),
        ("The answer is 10²", ["102", "10^2"], "B"),
        ("The answer is Safe, Fear.", ["Safe", "Safe, Fear"], "B"),
        ("The answer is E. coli", ["x", "E. coli", "y", "z", "w"], "B"),
        ("The answer is C major.", ["A minor", "C major", "D minor"], "B"),
        ("The answer is AA", ["Aa", "AA"], "B"),
        ("The answer is aa", ["Aa", "AA"], None),
        ("The answer is same", ["same", "same"], None),
        ("The answer is none of the above", ["x", "None of the above"], "B"),
        ("The answer is not enough information.", ["x", "Not enough information"], "B"),
        ("The answer is C", ["C", "B", "A"], "C"),
        ("The answer is 2", NUMBERED, "2"),
        ("(3)", NUMBERED, "3"),
        ("The answer is B", NUMBERED, "2"),
        ("The answer is faster.", NUMBERED, "2"),
        ("The answer is 3", VALUES, None),
        ("The answer is (3)", VALUES, "3"),
        ("The answer is 2", CITIES, None),
    ],
)
def test_option_texts_and_numbers(text: str, options: Any, label: str | None) -> None:
    labels = list(options) if isinstance(options, dict) else LETTERS[: len(options)]
    for gold in labels:
        verdict = grade(text, gold, options if isinstance(options, dict) else dict(zip(labels, options, strict=True)))
        assert verdict.status == ("no_answer" if label is None else "right" if gold == label else "wrong")


def test_a_label_that_the_options_do_not_have_is_no_answer() -> None:
    for text, options in (("The answer is E.", CITIES), (r"\boxed{E}", CITIES), ("The answer is D", NUMBERED)):
        verdict = grade("The answer is (A). " + text, "A" if options is CITIES else "1", options)
        assert verdict.status == "no_answer" and verdict.rule.endswith("no_such_label")
    assert grade("The answer is Z", "A").status == "no_answer"


@pytest.mark.parametrize(
    ("gold", "options", "label"),
    [
        ("b", None, "B"),
        ("(B)", None, "B"),
        (1, CITIES, "B"),
        ("Paris", CITIES, "B"),
        ("paris.", {"a": "London", "b": "Paris"}, "B"),
        ("2", CITIES, "2"),
        ("2", NUMBERED, "2"),
        ("9", ["2", "9"], "B"),
        ("faster", NUMBERED, "2"),
    ],
)
def test_golds(gold: Any, options: Any, label: str) -> None:
    verdict = grade(f"The answer is ({label}).", gold, options)
    assert (verdict.status, verdict.answer) == ("right", label)


@pytest.mark.parametrize(
    ("gold", "options"),
    [
        ("", None),
        ("Paris", None),
        ("0", None),
        ("E", CITIES),
        ("Madrid", CITIES),
        (4, CITIES),
        (-1, CITIES),
        (10**100, CITIES),
        (True, CITIES),
        (None, CITIES),
        (1.0, CITIES),
        (2, NUMBERED),  # the third, or the one called 2?
        ("2", ["2", "1"]),  # the text of one, the number of the other
        ("x", ["x", "x"]),
        ("A", []),
        ("A", "abc"),
        ("A", {"A": "x", "a": "y"}),
        ("A", {"A": "x", "1": "y"}),
        ("A", {"first": "x"}),
        ("A", ["x"] * 30),
        ("x" * 6000, CITIES),
    ],
)
def test_a_gold_that_is_no_option_is_a_bad_gold(gold: Any, options: Any) -> None:
    verdict = grade("The answer is A", gold, options)
    assert verdict.status == "bad_gold" and verdict.score is None and verdict.rule


def test_a_grader_like_the_others() -> None:
    with ChoiceGrader(workers=4, deadline=1.0) as grader:
        assert [v.status for v in grader.grade(["A", "A"], ["A", "B"])] == ["right", "wrong"]
        assert grader.grade([], []) == []
        with pytest.raises(ValueError, match="zip"):
            grader.grade(["A"], [])


# --- real rows -----------------------------------------------------------------------------------------------------
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
    words = [_worded(plain(option)).casefold() for option in options]
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


# --- junk ----------------------------------------------------------------------------------------------------------
TOKENS = [*"ABCDIabE{}()*_`$.,:?!答案是选不，。Ａ1230<|/\\'’éﷺ²İıK=-—+&", "**", "####", "</think>", "<answer>"]
TOKENS += [
    "is",
    "or",
    "and",
    "not ",
    "The answer",
    "answer:",
    "Answer",
    "\\boxed{",
    "\\text{",
    "option ",
    "choose ",
    "if ",
]
TOKENS += ["correct", "Paris", "London", "wrong", "but ", "because "]
TOKENS += [" ", " ", " ", "\n", "\t", "\u200b", "\ud800", "\x00", "\u2028", "The answer is ", " is correct", "I think "]
GOLDS = [
    "A",
    "I",
    "3",
    "",
    {"gold": "B", "options": ["London", "Paris", "A", "B or C"]},
    {"gold": "2", "options": {"1": "x", "2": "Paris", "3": "2"}},
    {"gold": 0, "options": ["", "(", "\\boxed{", "\ud800"]},
    {"gold": []},
]


def test_junk_never_raises_and_never_asserts_another_label() -> None:
    draw, grader = random.Random(0), ChoiceGrader()
    silent = [t for t in TOKENS if not (len(t) == 1 and t.isascii() and t.isalnum()) and t not in ("Ａ", "K", "İ", "ı")]
    for _ in range(1500):
        text = "".join(draw.choices(TOKENS, k=draw.randint(0, 40)))
        assert len(grader.grade([text] * len(GOLDS), GOLDS)) == len(GOLDS)
        only_b = "".join(draw.choices([*silent, "B", "(B)", "B.", "b"], k=draw.randint(0, 30)))
        for verdict in grader.grade([only_b] * 3, ["A", "C", "H"]):
            assert verdict.status != "right", only_b


def test_hostile_text_takes_no_longer_than_its_length() -> None:
    options = ["x" * 4000, "answer is " * 400, "\\text{" * 600, "(A) or " * 500]
    hard = ["\\boxed{" * 3000, "{" * 20_000, "\\boxed{" * 1400 + "}" * 9000, "answer is " * 2000, "the most " * 2000]
    hard += [
        "\\boxed{A}, " * 2000,
        "**A" * 7000,
        "or A " * 4000,
        "ﷺ" * 20_000,
        "x" * 10_000_000,
        "answer is " * 1_000_000,
    ]
    hard += ["answer " + (a + b) * 10_000 for a in "`*_$ \n\t(A#<>选.,'" for b in ("", " ", "A", ".", "*")]
    for text in hard:
        for gold in ("A", {"gold": "A", "options": options}):
            started = time.perf_counter()
            ChoiceGrader().grade([text], [gold])
            assert time.perf_counter() - started < 3, text[:30]  # a hang guard, not a speed claim; usually < 0.1
