"""Where the answer of a completion stands: every rule, what each policy may use, and texts made to take long."""

from __future__ import annotations

import pytest
from strategies import guard

from heatbath.verify.extract import POLICIES, UNCLOSED, clean, extract, last_boxed

CASES = [
    # The last box counts, whatever was said before.
    ("\\boxed{5}", "5", "boxed"),
    ("so \\boxed{5}. Wait, I made a mistake: \\boxed{7}", "7", "boxed"),
    ("\\boxed{5}\n\nHmm, let me check again.\n\n\\boxed{7}", "7", "boxed"),
    ("\\boxed{5}, no, \\boxed{7}", "7", "boxed"),
    ("\\boxed{5} or rather \\boxed{7}", "7", "boxed"),
    ("\\boxed{5} should be \\boxed{7}", "7", "boxed"),
    ("\\boxed{5} is wrong and \\boxed{7} is right", "7", "boxed"),
    ("\\boxed{5}, actually, and \\boxed{7}", "7", "boxed"),
    ("\\boxed{5}. And \\boxed{7}", "7", "boxed"),
    ("\\boxed{1}\n\nand \\boxed{2}", "2", "boxed"),
    # Boxes that are only joined are one answer.
    ("\\boxed{1} and \\boxed{2}", "1, 2", "boxed"),
    ("$x = \\boxed{1}$ or $x = \\boxed{2}$", "1, 2", "boxed"),
    ("\\boxed{1}, \\boxed{2}, and \\boxed{3}.", "1, 2, 3", "boxed"),
    ("First \\boxed{9}. Then: \\boxed{1} and \\boxed{2}", "1, 2", "boxed"),
    ("\\[\\boxed{1}\\text{ and }\\boxed{2}\\]", "1, 2", "boxed"),
    # Braces, spellings and boxes in boxes.
    ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", "boxed"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}", "boxed"),
    ("\\boxed{x \\in \\left\\{ 1 \\right\\}}", "x \\in \\left\\{ 1 \\right\\}", "boxed"),
    ("\\fbox{8}", "8", "boxed"),
    ("\\boxed{4} then \\fbox{8}", "8", "boxed"),
    ("\\boxed {5}", "5", "boxed"),
    ("\\boxed 5", "5", "boxed"),
    ("\\boxed 57.", "57", "boxed"),
    ("\\\\boxed{5}", "5", "boxed"),
    ("\\boxed{\\boxed{3}}", "3", "boxed"),
    ("\\boxed{ 5 }", "5", "boxed"),
    ("\\boxed{}", "", "boxed"),
    ("the box is \\boxed{12}\\%", "12%", "boxed"),
    ("$\\boxed{12}$ percent of them", "12%", "boxed"),
    ("{\\boxed{5}", "5", "boxed"),
    ("\\boxed{½}", "\\frac{1}{2}", "boxed"),
    # A box that is never closed is no answer, unless a closed one follows.
    ("\\boxed{5", None, UNCLOSED),
    ("\\boxed{3} and then \\boxed{5", None, UNCLOSED),
    ("\\boxed{\\frac{1}{2}", None, UNCLOSED),
    ("\\boxed{5 and \\boxed{7}", "7", "boxed"),
    # "Final answer" behind the last box.
    ("\\boxed{5} is a step. The final answer is 7.", "7", "boxed"),
    ("\\boxed{5}. The answer is in the box.", "5", "boxed"),
    ("The final answer is 7. \\boxed{5}", "5", "boxed"),
    # ####
    ("48 + 24 = 72\n#### 72", "72", "hashes"),
    ("#### 1\n#### 2", "2", "hashes"),
    ("#### 1,024 \nbecause", "1,024", "hashes"),
    ("#### -3", "-3", "hashes"),
    ("The answer is 5\n#### 6", "6", "hashes"),
    # "The answer is"
    ("The answer is 5.", "5", "stated"),
    ("The answer is: $x + 1$.", "x + 1", "stated"),
    ("The answer is 5. No: the answer is 7.", "7", "stated"),
    ("The answer is 3 apples.", "3", "stated"),
    ("The answer is 25%.", "25 %", "stated"),
    ("The answer is -5.", "-5", "stated"),
    ("The answer is 3/4.", "3/4", "stated"),
    ("The answer is 5x + 2", "5x + 2", "stated"),
    ("The answer is 2^{10}", "2^{10}", "stated"),
    ("**The answer is 85**", "85", "stated"),
    ("Answer: 85", "85", "stated"),
    ("ANSWER IS 85", "85", "stated"),
    ("The final answer is $\\frac{1}{2}$. I hope it is correct.", "\\frac{1}{2}", "stated"),
    ("The answer is $x=1$ and $x=2$.", "x=1, x=2", "stated"),
    ("The answer is $5$, because $5 > 3$.", "5", "stated"),
    ("The answer is 12 + 5 = 17.", "17", "stated"),
    ("The answer is yes", "yes", "stated"),
    ("答案是 12。", "12", "stated"),
    ("答案：12", "12", "stated"),
    ("所以答案为 $\\frac{1}{2}$", "\\frac{1}{2}", "stated"),
    ("The answer is: The largest $n$ is 34.", "34", "stated"),
    ("The answer is: the largest n is 34.", "34", "stated"),
    # The last line with a formula or a number.
    ("so x is 5", "5", "final_line"),
    ("3 and 4\nso it is 7\nas required", "7", "final_line"),
    ("therefore $x^2 + 1$", "x^2 + 1", "final_line"),
    ("thus $a$ and $b = 2$.", "a, b = 2", "final_line"),
    ("1 + 2 = 3", "3", "final_line"),
    ("it costs $1,250.50", "1,250.50", "final_line"),
    ("it is −5", "-5", "final_line"),
    ("3-7", None, "none"),
    ("so .5", ".5", "final_line"),
    ("x + 1", "x + 1", "final_line"),
    ("\\frac{3}{4}", "\\frac{3}{4}", "final_line"),
    # What was said in passing, or touches something, is no answer.
    ("I tried 12, so i give up", None, "none"),
    ("it is 2^10", None, "none"),
    ("about 1e5", None, "none"),
    ("no idea", None, "none"),
    ("", None, "none"),
    (" \n\t", None, "none"),
    ("The answer is not known", None, "none"),
    ("The answer is", None, "none"),
    # What was thought is no answer, and what templates leave behind is not part of one.
    ("<think>\\boxed{3}</think> So \\boxed{5}", "5", "boxed"),
    ("<think>the answer is 3</think>", None, "none"),
    ("\\boxed{3}</think>It is 5", "5", "final_line"),
    ("a</think>4</think>\n#### 5", "5", "hashes"),
    ("The answer is 5<|im_end|>", "5", "stated"),
    ("The answer is 5<|eot_id|>\n<|im_end|>\n", "5", "stated"),
    ("The answer is 5. I hope it is correct.", "5", "stated"),
]


@pytest.mark.parametrize(("text", "answer", "rule"), CASES, ids=lambda t: ascii(t)[:50])
def test_rules(text: str, answer: str | None, rule: str) -> None:
    assert extract(text) == (answer, rule)


SPEAKING = {
    "boxed": "\\boxed{1}",
    "hashes": "#### 2",
    "stated": "The answer is 3.",
    "formula": "so we get \\(4\\)",
    "final_line": "so we get 5",
}


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_policy_uses_its_rules_only_and_in_order(policy: str) -> None:
    own = {"any": "boxed hashes stated final_line", "marked": "boxed hashes stated", "boxed": "boxed"}
    assert POLICIES[policy] == tuple(own.get(policy, "boxed stated formula").split())
    for rule in POLICIES[policy]:
        # Of what follows the first rule has nothing, so that the one asked for has to speak.
        first = POLICIES[policy].index(rule)
        others = [text for name, text in SPEAKING.items() if name not in POLICIES[policy][: first + 1]]
        if rule in ("hashes", "stated", "boxed"):
            assert extract("\n".join([*others, SPEAKING[rule]]), policy)[1] == rule
        else:
            assert extract(SPEAKING[rule], policy)[1] == rule
    for name, text in SPEAKING.items():
        found, rule = extract(text, policy)
        assert rule == name if name in POLICIES[policy] else rule != name
        if not {name, "final_line", "formula"} & {*POLICIES[policy]}:
            assert (found, rule) == (None, "none")


def test_an_unclosed_box_is_no_answer_under_any_policy() -> None:
    for policy in POLICIES:
        assert extract("The answer is 5, \\boxed{5", policy) == (None, UNCLOSED)


def test_the_end_of_a_long_completion_is_read() -> None:
    assert extract("\\boxed{1} " + "word " * 60_000 + "\\boxed{2}") == ("2", "boxed")
    assert extract("\\boxed{1}" + " word" * 60_000) == (None, "none")
    assert extract(" " * 150_000 + "\\boxed{2}" + " " * 40_000) == ("2", "boxed")
    assert len(clean("word " * 60_000)) <= 20_000


def test_the_last_complete_box() -> None:
    assert last_boxed("\\boxed{1} \\boxed{\\frac{2}{3}}") == "\\frac{2}{3}"
    assert last_boxed("\\boxed{1") is None and last_boxed("none") is None and last_boxed("\\boxed{}") == ""


HOSTILE = {
    "open boxes": "\\boxed{" * 20_000,
    "nested boxes": "\\boxed{" * 5_000 + "}" * 5_000,
    "open braces": "{" * 100_000,
    "joined boxes": "\\boxed{1} and " * 10_000 + "\\boxed{2}",
    "separators between two boxes": "\\boxed{1}" + "\u2028" * 40 + "x\\boxed{2}",
    "control characters between two boxes": "\\boxed{1}" + "\x1c" * 40 + "x\\boxed{2}",
    "lines and marks between two boxes": "\\boxed{1}" + ".\n" * 25 + "x\\boxed{2}",
    "commas between two boxes": "\\boxed{1}" + ", " * 25 + "x\\boxed{2}",
    "template marks": "5" + "<|a|>\n\n" * 25 + "5",
    "template marks and words": "5" + "<|a|>\n a\n" * 20 + "!",
    "hope": "I hope it is correct. " * 2_000 + "5",
    "hashes": "####" * 50_000,
    "anchors": "answer is " * 30_000,
    "anchors without an answer": "answer is:\n" * 30_000,
    "colons": "answer" + ":" * 100_000,
    "anchor and lines": "answer is" + "\n" * 100_000,
    "chinese anchors": "答案是" * 30_000,
    "groups": "1," * 100_000,
    "thousands": "1,000" + ",000" * 40_000,
    "digits": "1" * 200_000,
    "digits and a power": "1" * 100_000 + "^",
    "points": "1." * 100_000,
    "spaced digits": "1 " * 100_000,
    "slashes": "1/" * 100_000,
    "dollars": "$" * 100_000,
    "dollars and words": "$ a " * 50_000,
    "formulas, then lines": "$x$ " * 2_500 + "?\n" * 4_000,
    "open formulas": "\\[ " * 50_000,
    "open formulas of one line": "\\( " * 50_000,
    "expressions": "x + \n" * 40_000,
    "brackets by line": "(((((\n" * 30_000,
    "spaces": " " * 200_000 + "5",
    "wide spaces": "\u3000" * 200_000 + "5",
    "lines": "\n" * 200_000 + "5",
    "words": "a, b c " * 30_000,
    "a number and words": "5" + " a" * 90_000,
    "units": "5 " + "cm " * 60_000,
    "raised": "²" * 200_000,
    "ligatures": "\ufdfa" * 200_000,
    "accents": "e" + "\u0301" * 100_000,
    "thoughts": "</think>" * 20_000,
    "backslashes": "\\" * 200_000,
    "escaped spaces": "1\\ " * 60_000,
    "left and right": "\\left" * 40_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_texts_are_read_in_linear_time(name: str) -> None:
    for policy in POLICIES:
        with guard(3):  # a hang guard: nearly all take a hundredth of it
            extract(HOSTILE[name], policy)
