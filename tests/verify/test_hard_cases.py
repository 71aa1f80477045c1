"""Hard pairs of answers, each once a false accept or a false reject of some grader."""

import pytest

from heatbath.verify.cascade import compare, gold_answer
from heatbath.verify.extract import extract

# gold, and answers that are not the same
DIFFERENT = [
    ("61", ["14 + 47 = x", "x = 14 + 47", "14 + 47 = x = y"]),
    ("|x|", ["x"]),
    (r"\sqrt{x^2}", ["x"]),
    (r"\sqrt[4]{x^4}", ["x"]),
    (r"\frac{|x|}{x}", ["1"]),
    ("|x|=1", ["x=1"]),
    ("|x|=2", ["2"]),
    ("x=2", ["|x|=2"]),
    ("f(2)=3", ["f(3)=3"]),
    ("f(x)=x^2", ["f(t)=x^2"]),
    ("x=1,y=2", ["2,1"]),
    ("m=2,n=3", ["3,2"]),
    ("(x,y)=(1,2)", ["(y,x)=(1,2)", "y=1,x=2"]),
    ("f(x)=x, g(x)=x+1", ["x+1, x"]),
    ("x=2,3", ["x=2,y=3"]),
    ("(15,-29)", ["[15,-29)"]),
    ("(1,2,3)", ["[1,2,3)"]),
    ("(2,1]", ["(5,3]"]),
    ("(1,1]", ["(2,2)"]),
    ("1,2", ["1.2"]),
    ("3,4", ["3.4"]),
    ("2500,7500", ["2500.7500"]),
    (
        "5",
        [
            r"5\text{ million}",
            "5 thousand",
            "2 dozen",
            r"5\text{ hundredths}",
            r"5 \text{ and a half}",
            r"5\text{ squared}",
            r"5\text{ factorial}",
        ],
    ),
    (r"5\text{ million}", [r"5\text{ billion}"]),
    (r"10\text{ m/s}", [r"10\text{ km/h}", r"10\text{ s/m}", r"10\text{ m/s^2}"]),
    ("10 km/h", ["10 mph"]),
    (r"5\text{ g/cm^3}", [r"5\text{ kg/m^3}"]),
    ("5 Hz", ["5 kHz"]),
    ("5 Pa", ["5 kPa"]),
    ("5 MB", ["5 GB"]),
    ("5 acres", ["5 hectares"]),
    ("5 gallons", ["5 quarts"]),
    (r"3:00\text{ p.m.}", [r"3:00\text{ a.m.}"]),
    ("3 PM", ["3 AM"]),
    (r"5\text{ North}", [r"5\text{ South}"]),
    (r"45\text{ units}^2", [r"45\text{ units}^3"]),
    (r"10\text{ cm²}", [r"10\text{ cm³}", r"10\text{ cm}"]),
    (r"5\text{ dollars}", [r"5\text{ euros}"]),
    ("£10", [r"\$10"]),
    ("5", [r"5\text{ is wrong}", r"5\text{ (incorrect)}", r"5 \text{ not}", r"5 \text{ less than }x"]),
    (r"81\text{ teachers}", [r"81\text{not teachers}"]),
    (r"5\text{ if }n\text{ even}, 6\text{ otherwise}", [r"6\text{ if }n\text{ even}, 5\text{ otherwise}"]),
    ("-50", ["-54+4"]),
    (r"\frac13", [r"\frac23-\frac13"]),
    ("85.5", ["47+38.5"]),
    ("1.005", ["1+0.005"]),
    (r"\$85", ["47+38"]),
    (r"85\text{ cm}", ["47+38"]),
    (r"85^\circ", ["47+38"]),
    ("x=85", ["47+38"]),
    ("85", ["x=47+38", r"47+38\text{ cm}", r"\$47+\$38"]),
    ("(85,1)", ["(47+38,1)"]),
    ("85,1", ["47+38, 1"]),
    ("5", ["6=5", "2+2=5", r"5\approx 6"]),
    ("85", ["84=85"]),
    (r"\frac{25}{2}", [r"1\frac{25}{2}"]),
    (r"3\frac38", [r"3\frac98"]),
    (r"1\frac14", [r"1\frac54"]),
    ("a^{nb}", ["a^nb"]),
    ("e^{xy}", ["e^xy"]),
    ("x_{ab}", ["x_ab"]),
    ("a", ["A"]),
    ("e", ["E"]),
    ("i", ["I"]),
    ("A", ["A. or B", "A) or B)", "A: wrong"]),
    ("16,3,1,1", ["16,3,1"]),
    (r"\sqrt2", [r"\sqrt2+10^{-49}", r"\sqrt2+10^{-300}"]),
    ("1", ["1+e^{-150}", r"\cos(10^{-30})", r"\cos(10^{-100})", "1+e^{-500}"]),
    ("n!!", ["(n!)!"]),
    (r"\{\{1\},2\}", [r"\{1,\{2\}\}"]),
    (r"\angle ABC", [r"\angle ACB"]),
    (r"\infty", [r"x\infty"]),
    ("5", [r"x\in 5"]),
    (
        "5",
        [
            r"\notin 5",
            r"\not 5",
            r"\neg 5",
            r"\ll 5",
            r"\phantom{5}",
            r"\max 5",
            r"\forall 5",
            "5_{a}",
            r"\gcd(5,10)",
            "5'",
            r"5\ldots",
        ],
    ),
    (r"3\text{ ft }4\text{ in}", [r"3\text{ ft }5\text{ in}"]),
    (r"30^\circ", ["30'"]),
    ("12", [r"1\text{ }2"]),
    (r"\gcd(a,b)", ["1"]),
    ("f(x)=ax+b, where a is an integer", ["f(x)=ax-b, where a is an integer"]),
    (
        "5",
        [
            r"\lfloor\sinh(10^{8})\rfloor",
            r"\lfloor|\sin(10^{30}i)|\rfloor",
            r"\sinh(\sinh(10^{10}))",
            r"\cosh(\cosh(\cosh(50)))",
            r"\lfloor\infty\rfloor",
        ],
    ),
    ("(0,5)", [r"[0,\cosh(10^{9}))"]),
    ("x<5", [r"x<\sinh(10^{12})", r"x<\lfloor\infty\rfloor"]),
    (r"\pi", ["3.14159265358979323846264338327950288419716939937510582097494459230781640628620899"]),
]
# gold, and answers that are
SAME = [
    (r"\frac{\pi}{6}", [r"\sin^{-1} \frac12", r"\arcsin 0.5"]),
    (r"\sin \frac{x}{2}", [r"\sin x/2"]),
    ("f(x)=x^2", ["f(t)=t^2"]),
    ("x=1,y=2", ["1,2", "y=2,x=1", "(x,y)=(1,2)"]),
    ("(x,y)=(1,2)", ["(y,x)=(2,1)", "y=2,x=1", "(1,2)"]),
    ("1500000", [r"1.5\text{ million}", "1.5 million"]),
    ("85", ["47+38=85"]),
    ("1/3", [r"1/3\approx 0.33"]),
    ("a^nb^n", ["(ab)^n"]),
    ("e^{x}y", ["e^xy"]),
    ("f(x)=2x", [r"f\left(x\right)=2x", r"f\big(x\big)=2x"]),
    ("-50", [r"-50\%"]),
    ("1/3", [r"0.\overline{3}", r"0.\overline{3}"]),
    (r"0.\overline{3}", [r"\frac13"]),
    ("1/6", [r"0.1\overline{6}"]),
    (r"\frac{1777}{1492}", ["1 285/1492"]),
    ("abc+1", ["1+abc"]),
    (r"\cos x", ["cosx"]),
    ("#### 5", ["5"]),
    ("The answer is 5", ["5"]),
    ("Answer: 5", ["5"]),
    (r"10\text{ cm}^2", [r"10\text{ cm²}", r"10\text{ sq cm}", "10"]),
    (r"10\text{ m/s}", [r"10\text{ m s^{-1}}", r"10\text{ m}/\text{s}"]),
    ("10 mph", [r"10\text{ miles per hour}"]),
    (r"\text{10 cm}", [r"10\text{ cm}"]),
    ("5", [r"\text{5 apples}"]),
    (r"\text{1:03 PM}", ["1:03 PM"]),
    (r"(3,\infty)", [r"\{x\mid x>3\}"]),
    (r"\emptyset", [r"\text{no solution}"]),
    (r"\mathbb R", [r"\text{all real numbers}"]),
    ("(-8)^{1/3}", ["-2"]),
    ("5", [r"\color{red}{5}", r"\textcolor{red}{5}", r"\bm{5}", r"\large{5}"]),
    ("A", [r"\textbf{(A)}\ 5", r"\text{Option A}"]),
    (r"\text{an ellipse}", ["ellipse"]),
]
# gold, and completions that do not say it
NOT_SAID = [
    ("12", ["There are 3 cases. Case 1 gives 10, case 2 gives 12, so I give up", "It was 12, but I am not sure"]),
    ("5", ["The answer is 5, or 6", "The answer is 5; 6", "The answer is 5 (or 6)", "The answer is $5$ / $6$"]),
    ("5", ["The answer is 5, so 6", "The answer is 5, maybe 6 or 7", "The answer is 5, wait no, it is 6"]),
    ("5", ["The answer is 5; no, 6", "The answer is 5 (no, 6)", "The answer is 5, not really", r"\boxed{5} is wrong"]),
    ("5", [r"\boxed{5}, no wait, 6", "The answer is $5$, no, $6$"]),
    ("0.3", ["The answer is 0.3...", r"\boxed{0.3...}", r"\boxed{0.3\ldots}", "so 0.3..."]),
    ("A", [r"\boxed{A. B}", "The answer is A common mistake", r"\boxed{A ball}"]),
    ("5", ["The answer is .5", "answer = .5"]),
    ("25", ["The answer is .25"]),
    ("5", ["The answer is 5 million"]),
    ("2", ["3+2", "3*2", "1:2", "(2)/3", "sqrt 2", r"\sqrt 2", "1-2"]),
    ("8", ["77 - 8"]),
    ("4", ["12 / 4"]),
    ("80", ["25 percent of 80"]),
    (
        "5",
        [
            "The answer is not 5",
            "The answer isn't 5",
            "The answer cannot be 5",
            "I do not think the answer is 5",
            "Is the answer 5?",
            "The wrong answer is 5",
            "I don't think the answer is 5",
        ],
    ),
    ("7", ["7 is not the answer"]),
    (
        "2",
        [
            "at least 2",
            "more than 2",
            "between 1 and 2",
            "negative 2",
            "– 2",
            "2‰",
            "2 dozen",
            "Step 2",
            "See equation 2",
        ],
    ),
    ("5", [r"\boxed{6}. A common wrong final answer is 5.", r"\boxed{6} (final answer is boxed above, 5 steps)"]),
]
# gold, and completions that do
SAID = [
    ("5", [r"\boxed{\boxed{5}}", r"$$\fbox{\boxed{5}}$$"]),
    ("18", ["The total is **$18**.", "She makes **$18** per day.", "The total is *18*.", "Total: **$18.00**"]),
    ("18", ["She makes **18** dollars.", "**Answer: $18**", "**Final answer:** 18"]),
    ("0.5", ["The answer is .5"]),
    ("2.5", ["2 1/2", "it takes 2 1/2 hours"]),
    (
        "5",
        [
            "The answer is therefore 5",
            "The answer is simply 5",
            "The answer is equal to 5",
            "The answer is 5 (see step 3)",
            "The answer is 5, as 6 is too big",
        ],
    ),
    ("1,2", ["The answers are 1 and 2"]),
]


def verdict(gold: str, answer: str | None) -> str | None:
    expected = gold_answer(gold)
    assert expected is not None
    return compare(expected, answer)[0] if answer else "no_answer"


def pairs(table: list[tuple[str, list[str]]]) -> list[tuple[str, str]]:
    return [(gold, answer) for gold, answers in table for answer in answers]


@pytest.mark.parametrize(("gold", "answer"), pairs(DIFFERENT))
def test_never_right(gold: str, answer: str) -> None:
    assert verdict(gold, answer) in ("wrong", "refused", "bad_gold")


@pytest.mark.parametrize("bomb", ["1e999999999", "10^{10^{10}}", "(10^9)!", "2^{9999999}", "x+" * 300 + "1"])
def test_bombs_are_refused(bomb: str) -> None:
    assert verdict("4", bomb) == "refused"


@pytest.mark.parametrize(("gold", "answer"), pairs(SAME))
def test_right(gold: str, answer: str) -> None:
    assert verdict(gold, answer) == "right"


@pytest.mark.parametrize(("gold", "completion"), pairs(NOT_SAID))
def test_not_said(gold: str, completion: str) -> None:
    assert verdict(gold, extract(completion)[0]) in ("wrong", "refused", "no_answer")


@pytest.mark.parametrize(("gold", "completion"), pairs(SAID))
def test_said(gold: str, completion: str) -> None:
    assert verdict(gold, extract(completion)[0]) == "right"
