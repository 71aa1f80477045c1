"""Multiple choice: what asserts an answer and what does not, on made phrases, three benchmarks' rows, and junk."""

import json
import random
import time
from typing import Any

import pytest

from heatbath.verify.choice import ChoiceGrader

CITIES = ["London", "Paris", "Rome", "Berlin"]
NUMBERED = {"1": "slower", "2": "faster", "3": "same"}
VALUES = {"1": "3", "2": "4", "3": "5"}  # the label of one is the text of another
LETTERS = "ABCDEFGHIJ"
ARC = {"text": CITIES, "label": ["A", "B", "C", "D"]}


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
        "The answer is B; A is wrong.",
        "The answer is B. Actually, A and C fail.",
        "The answer is (B) (A is wrong)",
        "The answer is B. It contains no A.",
        "答案是B。",
        "答案：Ｂ",
        "【答案】B",
        "故选：B",
        "所以选B。",
    ],
    "corrected": [
        "The answer is A. Wait, actually B.",
        "The answer is A. Wait, no. B.",
        r"\boxed{A}. Hmm, scratch that: it's (B).",
        "The answer is A. Sorry, I meant B!",
        "The answer is A (or rather, B).",
        "The answer is A.\n\nActually, B is the answer.",
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


NOTHING = ["", "A common mistake", "The answer is A common thing", "The answer is a matter of taste"]
NOTHING += ["The answer is a", "I think", "options A and B are wrong", "Option A is incorrect"]
NOTHING += ["Neither A nor B is correct", "It is not true that option A is correct"]
NOTHING += ["If option A is correct, then B fails.", "the answer is not A", "The answer isn't A."]
NOTHING += ["The answer is neither A nor B", "The answer is anything but (A)", "The answer is not 17 (A)"]
NOTHING += ["The answer is A. Hmm, the answer is not A.", "The answer is (A). That is wrong.", r"\boxed{A} is wrong"]
NOTHING += ["Answer A is wrong", "The answer is A or B", "The answer is (A) or (B)", "The answer is either A or B"]
NOTHING += ["The answer is A... or maybe B.", "The answer is A (or B).", "The answer is A and B"]
NOTHING += ["The answer is A, B", "The answer is A/B", r"\boxed{A, B}", r"\boxed{A \text{ or } B}"]
NOTHING += [r"\boxed{A}, \boxed{B}", r"\boxed{A} or \boxed{B}", r"\boxed{A} \boxed{B}", "$\\boxed{A}$\n$\\boxed{B}$"]
NOTHING += [r"\boxed{C} \boxed{B} \boxed{A}", r"\boxed{(A)(B)}", "Answer: (A)(B)", "Answer: (A) (B)", "Answer: A; B"]
NOTHING += ["Answer: A)B)C)", "The answer is A, A or B", "It is false that the answer is A"]
NOTHING += ["It is untrue that the answer is (A).", "The answer is A. Wait, no."]
NOTHING += ["The answer is A. Wait, actually C or D.", r"The answer is (A) but \boxed{}", r"\boxed{A^2}"]
NOTHING += [r"\boxed{AB}", "We choose A or B", "Is the answer A?", "The answer is A?", "A is the correct answer? No."]
NOTHING += ["If the answer is A, then x", "The answer is A only if x > 0", "The answer would be A if x > 0"]
NOTHING += ["I don't think the answer is A", "One might think the answer is A"]
NOTHING += ["It would be wrong to say the answer is A.", "The wrong answer is A", "The least likely answer is A"]
NOTHING += ["The student's answer is A", "My initial answer was A", "The answer is A's claim"]
NOTHING += ["The answer is A-level", "The answer is A = 5", "(A) is tempting but wrong.", "vitamin A is the best"]
NOTHING += [
    "This does not match option A.",
    "Don't choose A.",
    "Thus A is wrong.",
    "答案不是A",
    "不选A",
    "答案是A或B",
    "选项A错误",
]
NOTHING += ["<think>The answer is A</think>\nI do not know"]


@pytest.mark.parametrize("text", NOTHING)
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
        ("The answer is London. Wait, actually Paris.", CITIES, "B"),
        (r"\boxed{A. London} \boxed{B. Paris}", CITIES, None),
        ("Answer: (A) (B) and C", ["(B) and C", "x", "y"], "A"),
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
        ("0", CITIES, "A"),
        ("2", CITIES, "C"),
        ("3", CITIES, "D"),
        ("2", NUMBERED, "2"),
        ("0", {"0": "x", "1": "y"}, "0"),
        (1, {"0": "x", "1": "y"}, "1"),
        ("9", ["2", "9"], "B"),
        ("1", ["0", "1", "2"], "B"),
        ("1", ["1", "2", "1"], "B"),  # no one option's text
        ("2", ["2", "1"], "A"),
        ("C", ARC, "C"),
        (2, ARC, "C"),
        ("rome", ARC, "C"),
        ("2", {"text": ["slower", "faster"], "label": ["1", "2"]}, "2"),
        ("2", {"text": ["slower", "faster"], "label": [1, 2]}, "2"),
        ("faster", NUMBERED, "2"),
    ],
)
def test_golds(gold: Any, options: Any, label: str) -> None:
    verdict = grade(f"The answer is ({label}).", gold, options)
    assert (verdict.status, verdict.answer) == ("right", label)
    assert grade(f"The answer is ({label}).", json.dumps({"gold": gold, "options": options})).status == "right"


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
        ("1", ["1", "2", "3"]),  # the text of one, the index of another
        ("4", CITIES),
        ("-1", CITIES),
        ("(2)", CITIES),
        ("{C}", None),
        ('{"gold": "C"', None),
        ('{"gold": "C"} x', None),
        ("{" * 5000, None),
        ('{"a":' * 50_000, None),
        ("{C}", CITIES),
        (["A"], CITIES),
        ({"A": "B"}, None),
        ([], None),
        (3, None),
        ("A", [None, "x"]),
        ("A", {"A": ["x"], "B": "y"}),
        ("A", [10**5000, "x"]),
        ("A", [float("nan"), "x"]),
        ("A", {"text": ["x", "y"], "label": ["A"]}),
        ("A", {"text": ["x", "y"], "label": ["A", "A"]}),
        ("A", {"text": "xy", "label": "AB"}),
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


@pytest.mark.parametrize("completion", [None, 3, ["A"], b"A", float("nan")])
def test_a_completion_that_is_no_text_is_no_answer(completion: Any) -> None:
    verdict = grade(completion, "A")
    assert (verdict.status, verdict.answer, verdict.score) == ("no_answer", None, 0.0)


def test_a_grader_like_the_others() -> None:
    with ChoiceGrader(workers=4, deadline=1.0) as grader:
        assert [v.status for v in grader.grade(["A", "A"], ["A", "B"])] == ["right", "wrong"]
        assert grader.grade([], []) == []
        with pytest.raises(ValueError, match="zip"):
            grader.grade(["A"], [])


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
    hard += ["\\boxed{A}, " * 2000, "\\boxed{A} " * 2000, "**A" * 7000, "or A " * 4000, "A, " * 6000, "(A)(B)" * 3000]
    hard += ["ﷺ" * 20_000, "x" * 10_000_000, "answer is " * 1_000_000, "wait, " * 4000, "no. actually " * 1500]
    hard += ["answer " + (a + b) * 10_000 for a in "`*_$ \n\t(A#<>选.,'" for b in ("", " ", "A", ".", "*")]
    for text in hard:
        for gold in ("A", {"gold": "A", "options": options}):
            started = time.perf_counter()
            ChoiceGrader().grade([text], [gold])
            assert time.perf_counter() - started < 3, text[:30]  # a hang guard, not a speed claim; usually < 0.1
