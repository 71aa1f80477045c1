r"""What the fuzzing of the verdicts draws from: hard texts, broken completions, and numbers with their value.

Every generator is a plain function of a `random.Random`, so that `benchmarks/fuzz_verdicts.py` draws the same texts
without hypothesis; `drawn` makes a hypothesis strategy of one (a failing example is its seed).
"""

from __future__ import annotations

import math
import random
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import get_args

from heatbath.verify.cascade import Found, compare, gold_answer
from heatbath.verify.extract import POLICIES, UNCLOSED, extract

SECONDS = 1.0  # of this process, for each part of a verdict on a text of at most 20,000 characters
KNOWN = {*get_args(Found), None}
RULES = {name for names in POLICIES.values() for name in names} | {"none", UNCLOSED}


def words(text: str) -> list[str]:
    """The pieces of a text between spaces."""
    return text.split()


def listed(text: str) -> list[str]:
    """The pieces of a text between " ; " and on its lines."""
    return text.strip("\n").replace("\n", " ; ").split(" ; ")


MATHS = (
    *words(r"""
0 1 2 3 4 5 6 7 8 9 10 12 100 1000 2024 0.5 3.14 .5 1e5 1,000 007 10^9 1e9999 2.5e99999999 + - * / ^ _ = < > ( ) [ ] {
} | ! , ; : . % $ & ' " ~ # @ ? x y n e i a AB f(x) f( g(2) cm m degrees or and pi inf sin ln \frac \frac{1}{2}
\dfrac12 \frac{ \sqrt \sqrt[3] \sqrt{2} \binom{5}{2} \binom \pi \infty \emptyset \mathbb{R} \mathbb \theta \alpha_1
\pm \mp \cdot \times \cup \cap \setminus \in \le \ge \ne \approx \equiv \circ ^\circ ^{-1} \sin \cos^2 \tan \log_{2}
\ln \exp \sinh \arctan \lfloor \rfloor \lceil \left( \right) \left[ \right. \{ \} \| \% \$ \, \! \\ \ \quad \text{
\text{and} \mathrm{e} \overline{3} \overline{AB} \bar \angle \dot \begin{pmatrix}1&2\\3&4\end{pmatrix} \begin{
\end{pmatrix} \begin{array}{cc} _{2} _2 ^{2^{ !!
"""),
    r"\text{ cm}",
)
SIGNS = (
    *"½⅓²³⁻⁰₂√∛π∞≤≥≠±∪∩∈∅°×÷−–·⁄，。、：（）",
    *"［］｛｝０１２５∑∫θλΩ①Ⅳ٣৩五",
    *(
        "\x00",
        "\x07",
        "\x0b",
        "\x1c",
        "\x1f",
        "\x7f",
        "\x85",
        "\u200b",
        "\u2028",
        "\u2029",
        "\u202e",
        "\u00ad",
        "\ufeff",
    ),
    *("\ud800", "\udfff", "\U0001f600", "\u0301", "\ufdfa", "\u1680", "\u3000", "e\u0301", "ß", "İ", "ﬁ"),
)
WORDS = (
    *r"""
the answer is ; The answer is: ; Final answer is ; answer ;
 答案是 ; 答案： ; so ; wait, no ; therefore ; #### ; </think>
<think> ; <|im_end|> ; I hope it is correct. ; \boxed{ ; \boxed ; \boxed{5} ; \fbox{7} ; \\boxed{3}
\boxed{\boxed{1}} ; \boxed 4 ; } ; { ; $ ; $$ ; \( ; \) ; \[ ; \] ; ** ; ` ; A) ; (B) ; C. ; yes ; No ; none ; x = 5
(1, 2) ; [0, 1) ; 50% ; $5 ; 5 cm ; __import__('os') ; lambda: 0 ; eval( ; 1/0 ; 0/0 ; None ; nan ; True
""".strip()
    .replace("\n", " ; ")
    .split(" ; "),
    *("####\n", "\n", "\n\n", " ", "  ", "\t", "\r\n", "<|eot_id|>\n\n"),
)
COMPLETIONS = (
    "Let x be the number of apples. Then 3x + 2 = 17, so x = 5.\n\nThe answer is $\\boxed{5}$.",
    "We have 48/2 = 24 clips in May.\n48 + 24 = 72 clips altogether.\n#### 72",
    "First, \\boxed{12}. Wait, that is wrong: 3 + 4 = 7. So the answer is \\boxed{\\frac{7}{12}}.<|im_end|>",
    "<think>Is it 3? Or 4? \\boxed{3}</think>\nThe solutions are $x = \\boxed{-1}$ and $x = \\boxed{4}$.",
    "By symmetry the area is \\[ A = \\frac{\\pi r^2}{4} = \\boxed{\\frac{9\\pi}{4}\\text{ cm}^2}. \\]",
    "The domain is $\\boxed{(-\\infty, -2) \\cup [3, \\infty)}$, since both factors are positive there.",
    "Therefore, the final answer is: (x, y) = (3, -2). I hope it is correct.",
    "So the inverse is $$\\boxed{\\begin{pmatrix} 1 & -2 \\\\ 0 & 1/2 \\end{pmatrix}}$$",
    "Total: $1,250.50 + $49.50 = $1,300.00, which is 65% of $2,000.\nThe answer is $1,300.",
    "所以答案是 \\(2\\sqrt{3}\\)。",
    "The correct choice is (C): it has the largest slope.\n**Answer: C**",
    "f(x) = e^{2x} \\sin(3x), hence f'(0) = \\boxed{3} \\times 10^{0}, about 3.00 m/s",
)
GOLDS = (
    *r"""
5 ; -12 ; 72 ; 0.5 ; 3.14 ; \frac{7}{12} ; -\frac{1}{3} ; 1,300 ; 65\% ; 1/7 ; 2\sqrt{3} ; \frac{9\pi}{4} ; (3,-2)
\{1,2,3\} ; 1, 4 ; (-\infty,-2)\cup[3,\infty) ; x^2+2x+1 ; y = 3x - 2 ; x > 4 ; C ; yes ; \text{even} ; 3+4i ; \infty
1011_2 ; 12 cm ; 3:4 ; 90^\circ ; 10^{12} ; 2^{100} ; $ ; \boxed{} ; \boxed{8 ; f(x) ; \emptyset ; \pm 3 ; 5 or 7
""".strip()
    .replace("\n", " ; ")
    .split(" ; "),
    *("", " ", "\ud800", "0" * 300, "[" * 50),
)


def _joined(r: random.Random, pieces: list[str]) -> str:
    return r.choice(["", "", " "]).join(pieces)


def expression(r: random.Random) -> str:
    """Mathematical tokens in any order."""
    return _joined(r, r.choices(MATHS, k=r.choice([1, 2, 3, 5, 8, 13, 21, 60])))


def shaped(r: random.Random, depth: int = 3) -> str:
    """Mathematics that can be read, mostly, though it may mean nothing."""
    if depth == 0 or r.random() < 0.2:
        return r.choice(
            MATHS[:60]
            if r.random() < 0.1
            else [str(r.randrange(30)), "x", "y", r"\pi", "e", "i", r"\infty", "0", "1.5"]
        )
    a, b = (shaped(r, depth - 1) for _ in range(2))
    forms = (
        *(
            f"{a}+{b}",
            f"{a}-{b}",
            f"{a}\\cdot {b}",
            f"\\frac{{{a}}}{{{b}}}",
            f"({a})^{{{b}}}",
            f"({a})({b})",
            f"-{a}",
            f"({a})!",
        ),
        *(
            f"\\sqrt{{{a}}}",
            f"\\sqrt[{b}]{{{a}}}",
            f"\\binom{{{a}}}{{{b}}}",
            f"|{a}|",
            f"\\lfloor {a} \\rfloor",
            f"\\lceil {a}\\rceil",
        ),
        *(
            f"\\{r.choice(['sin', 'cos', 'tan', 'cot', 'ln', 'exp', 'sinh', 'tanh', 'arcsin', 'arctan', 'sec'])}({a})",
            f"\\log_{{{a}}}{{{b}}}",
        ),
        *(
            f"({a},{b})",
            f"[{a},{b})",
            f"\\{{{a},{b}\\}}",
            f"{a}, {b}",
            f"{a} = {b}",
            f"{a} < {b}",
            f"{a} \\le x < {b}",
            f"{a}\\pm {b}",
        ),
        *(
            f"f({a})",
            f"{a}:{b}",
            f"{a}\\%",
            f"{a} \\cup {b}",
            f"{a} \\setminus {b}",
            f"{a} \\text{{ cm}}",
            f"{a}^\\circ",
            f"x_{{{a}}}",
        ),
        *(
            f"\\begin{{pmatrix}}{a}&{b}\\end{{pmatrix}}",
            f"0.1\\overline{{{a}}}",
            f"{a} \\text{{ or }} {b}",
            f"{a}!!",
            f"{a} \\ne {b}",
        ),
    )
    return r.choice(forms)


def hard_text(r: random.Random) -> str:
    """Tokens of every kind, sometimes with one of them many times over."""
    kinds = r.choice([MATHS, SIGNS, WORDS, MATHS + SIGNS + WORDS])
    pieces = r.choices(kinds, k=r.choice([1, 3, 10, 30, 100]))
    if r.random() < 0.3:
        token = r.choice(MATHS + SIGNS + WORDS) + (r.choice(SIGNS + WORDS) if r.random() < 0.5 else "")
        pieces.insert(r.randrange(len(pieces) + 1), token * (r.choice([30, 300, 3_000, 20_000]) // len(token) + 1))
    return _joined(r, pieces)[:20_000]


def mutated(r: random.Random) -> str:
    """A completion with some of it cut, doubled, moved or replaced."""
    text = r.choice(COMPLETIONS)
    for _ in range(r.choice([0, 1, 2, 4, 8])):
        a, b = sorted(r.randrange(len(text) + 1) for _ in range(2))
        match r.randrange(5):
            case 0:
                text = text[:a] + text[b:]
            case 1:
                text = text[:b] + text[a:]
            case 2:
                text = text[:a] + r.choice(MATHS + SIGNS + WORDS) + text[a:]
            case 3:
                text = text[:a] + shaped(r, 2) + text[b:]
            case 4:
                text = text[b:] + text[a:b] + text[:a]
    return text[:20_000]


def long_run(r: random.Random) -> str:
    """One short piece of mathematics up to the longest answer that is read."""
    usual = words(r"x+ 1- 2* 5/ AB ! \$ f( ( { | - \sqrt \sin x= x< 1, 2^ x_ ' x! (x % |x e^ 3: x:")
    piece = r.choice(usual) if r.random() < 0.5 else r.choice(MATHS) + r.choice(["", "", " ", *MATHS[:40]])
    return (r.choice(["", *MATHS]) + piece * r.randrange(1, 999))[: r.randrange(1, 990)] + r.choice(["", *MATHS])


def completion(r: random.Random) -> str:
    match r.randrange(7):
        case 0:
            return hard_text(r)
        case 6:
            return f"So \\boxed{{{long_run(r)}}}."
        case 1 | 2:
            return mutated(r)
        case 3:
            return f"So \\boxed{{{expression(r)}}}."
        case _:
            return f"So \\boxed{{{shaped(r, r.choice([1, 2, 3, 4]))}}}."


def case(r: random.Random) -> tuple[str, str]:
    """A completion and a gold answer."""
    if r.random() < 0.1:  # an answer that may well be right
        text = shaped(r, 2)
        return f"So \\boxed{{{text}}}", r.choice([text, text.replace("x", "y"), f"({text})", text + ".0"])
    gold = r.choice(GOLDS) if r.random() < 0.7 else shaped(r, 2) if r.random() < 0.8 else hard_text(r)[:2_000]
    return completion(r), gold


# -- plain numbers, with their value


def value(r: random.Random) -> Fraction:
    match r.randrange(5):
        case 0:
            found = Fraction(r.randrange(0, 30))
        case 1:
            found = Fraction(r.randrange(10 ** r.randrange(1, 16)))
        case 2:
            found = Fraction(r.randrange(10 ** r.randrange(1, 7)), 10 ** r.randrange(1, 6))
        case _:
            found = Fraction(r.randrange(60), r.randrange(1, 40))
    return -found if r.random() < 0.3 else found


def other_value(r: random.Random, known: Fraction) -> Fraction:
    """A number that is not `known` but close to it, or what a careless reading makes of it."""
    step = Fraction(1, r.choice([1, 1, 2, 10, 1000, 10**9, known.denominator]))
    found = r.choice(
        [
            known + step,
            known - step,
            -known,
            known * 10,
            known / 10,
            known * 100,
            known / 100,
            1 / known if known else step,
        ]
    )
    return found if found != known else known + 1


def written(r: random.Random, number: Fraction) -> str:
    """`number` in one of the notations of a plain number that can hold it exactly."""
    forms = [_quotient, _quotient]
    decimals = next((k for k in range(25) if number * 10**k == int(number * 10**k)), None)
    if decimals is not None:
        forms += [_decimal] * 3 + [_scientific]
    if abs(number) > 1 and number.denominator > 1:
        forms += [_mixed] * 2
    sign = r.choice(["-", "-", "−", "- "]) if number < 0 else r.choice(["", "", "", "+"])
    text = r.choice(forms)(r, abs(number), decimals)
    around = ["{}", "{}", "{}", "${}$", " {} ", "{}.", "{{{}}}", "\\({}\\)"]
    if not any(separator in text for separator in (",", " ", "\\")):  # (1,234) is a pair
        around.append("({})")
    return r.choice(around).format(sign + text)


WIDE = {ord(c): chr(ord(c) + 0xFEE0) for c in "0123456789."}  # full-width forms


def _decimal(r: random.Random, number: Fraction, decimals: int | None) -> str:
    places = (decimals or 0) + (r.randrange(1, 4) if r.random() < 0.2 else 0)
    digits = str(int(number * 10**places)).rjust(places + 1, "0")
    whole, part = (digits[:-places], digits[-places:]) if places else (digits, "")
    if len(whole) > 3 and r.random() < 0.5:
        separator = r.choice([",", "{,}", "\\,", " ", ",\\!"])
        head = len(whole) % 3 or 3
        whole = separator.join([whole[:head], *(whole[i : i + 3] for i in range(head, len(whole), 3))])
    if part and whole == "0" and r.random() < 0.3:
        whole = ""
    text = whole + ("." + part if part else "")
    return text.translate(WIDE) if r.random() < 0.1 else text


def _scientific(r: random.Random, number: Fraction, decimals: int | None) -> str:
    shift = r.randrange(-4, 9)
    mantissa = number / Fraction(10) ** shift
    places = next(k for k in range(40) if mantissa * 10**k == int(mantissa * 10**k))
    text = (
        _decimal(random.Random(0), mantissa, places)
        .replace(",", "")
        .replace(" ", "")
        .replace("\\", "")
        .replace("{}", "")
    )
    raised = str(shift).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    text = text.replace("!", "")
    return r.choice(
        [
            f"{text}\\times 10^{{{shift}}}",
            f"{text} \\cdot 10^{{{shift}}}",
            f"{text}×10{raised}",
            f"{text}e{shift}",
            f"{text}E{shift:+d}",
        ]
    )


def _quotient(r: random.Random, number: Fraction, decimals: int | None) -> str:
    factor = r.choice([1, 1, 2, 3, 10])
    over, under = number.numerator * factor, number.denominator * factor
    short = len(str(over)) == len(str(under)) == 1
    forms = ["\\frac{{{}}}{{{}}}", "\\dfrac{{{}}}{{{}}}", "{}/{}", "{}⁄{}", "\\tfrac {{{}}} {{{}}}", "({})/({})"] + [
        "\\frac{}{}"
    ] * short
    return r.choice(forms).format(over, under)


def _mixed(r: random.Random, number: Fraction, decimals: int | None) -> str:
    whole, rest = divmod(number, 1)
    forms = ["{}\\frac{{{}}}{{{}}}", "{} \\frac{{{}}}{{{}}}", "{}\\tfrac{{{}}}{{{}}}"]
    form = r.choice(forms + ["{} {}/{}"] * (not 100 <= rest.numerator < 1000))  # 1 234/567 may be 1234/567
    return form.format(whole, rest.numerator, rest.denominator)


def drawn(generator: Callable[[random.Random], object]):  # type: ignore[no-untyped-def]
    """The hypothesis strategy of a generator: of a seed."""
    from hypothesis import strategies

    return strategies.integers(0, 2**64 - 1).map(lambda seed: generator(random.Random(seed)))


# -- arithmetic with its value, in brackets only where it needs them

SUM, PRODUCT, POWER, ATOM = range(4)  # how tightly a text binds


def leaf(r: random.Random) -> tuple[str, Fraction, int]:
    a, b, n = r.randrange(1, 30), r.randrange(1, 13), r.randrange(0, 25)
    c, digit, under = r.randrange(1, b + 1), r.randrange(10), r.randrange(1, 10)
    repeating = a + Fraction(digit, 10) + Fraction(b, 990)
    return r.choice(
        [
            (str(n), Fraction(n), ATOM),
            (f"{n}.{a:02}", Fraction(n * 100 + a, 100), ATOM),
            (f".{a:02}", Fraction(a, 100), ATOM),
            (f"\\{r.choice(['frac', 'dfrac', 'tfrac', 'cfrac'])}{{{n}}}{{{a}}}", Fraction(n, a), ATOM),
            (f"\\frac{digit}{under}", Fraction(digit, under), ATOM),
            (f"{n}/{a}", Fraction(n, a), PRODUCT),
            r.choice([("½", Fraction(1, 2), ATOM), ("⅔", Fraction(2, 3), ATOM)]),
            (f"{a},{n:03},000", Fraction(a * 10**6 + n * 1000), SUM),
            (f"{a}{{,}}{n:03}", Fraction(a * 1000 + n), ATOM),
            (f"{a}\\frac{{{c}}}{{{b + 1}}}", a + Fraction(c, b + 1), SUM),
            (f"{a} {c}/{b + 1}", a + Fraction(c, b + 1), SUM),
            (f"{a}³", Fraction(a**3), POWER),
            (f"{a}e{b}", Fraction(a * 10**b), ATOM),
            (f"√{a * a}", Fraction(a), ATOM),
            (f"\\sqrt{{{a * a}}}", Fraction(a), ATOM),
            (f"\\sqrt[3]{{{a**3}}}", Fraction(a), ATOM),
            (f"{b % 6}!", Fraction([1, 1, 2, 6, 24, 120][b % 6]), POWER),
            (f"{a}.{digit}\\overline{{{b:02}}}", repeating, SUM),
        ]
    )


def bracketed(r: random.Random, text: str) -> str:
    return r.choice(
        ["({})", "\\left({}\\right)", "\\left( {} \\right)", "\\bigl({}\\bigr)", "{{({})}}", "（{}）"]
    ).format(text)


def tree(r: random.Random, depth: int) -> tuple[str, Fraction, int]:
    """A text, its value and how tightly it binds; ZeroDivisionError where it divides by zero."""
    if depth == 0:
        return leaf(r)

    def part(least: int) -> tuple[str, Fraction]:
        text, value, binds = tree(r, r.randrange(depth))
        # Thousands separators stand outside brackets only: (1,000) is a pair.
        text = re.sub(r"(?<=\d),(?=\d{3})", "{,}", text)
        return (text if binds >= least and r.random() < 0.7 else bracketed(r, text)), value

    match r.randrange(9):
        case 0 | 1:
            (a, x), (b, y) = part(SUM), part(PRODUCT)
            sign = r.choice(["+", " + ", "-", " - ", " − "])
            return a + sign + b, x + y if "+" in sign else x - y, SUM
        case 2:
            (a, x), (b, y) = part(PRODUCT), part(POWER)
            return a + r.choice([r"\cdot ", r"\times ", "*", " · ", "×"]) + b, x * y, PRODUCT
        case 3:
            (a, x), (b, y) = part(PRODUCT), part(POWER)
            return a + r.choice(["/", " / ", r"\div ", "÷"]) + b, x / y, PRODUCT
        case 4:
            (a, x), (b, y) = part(SUM), part(SUM)
            return f"\\{r.choice(['frac', 'dfrac'])}{{{a}}}{{{b}}}", x / y, ATOM
        case 5:
            (a, x), (b, y) = tree(r, depth - 1)[:2], tree(r, depth - 1)[:2]
            a, b = (re.sub(r"(?<=\d),(?=\d{3})", "{,}", text) for text in (a, b))
            return f"({a})({b})", x * y, PRODUCT
        case 6:
            (a, x), n = part(ATOM), r.randrange(-2, 4)
            return f"{a}^{{{n}}}" if n < 0 or r.random() < 0.5 else f"{a}^{n}", x**n, POWER
        case 7:
            a, x = part(PRODUCT)
            return "-" + a, -x, SUM
        case _:
            a, x = part(SUM)
            if r.random() < 0.5:
                return r.choice(["|{}|", "\\left|{}\\right|"]).format(a), abs(x), ATOM
            return r.choice(
                [(f"\\lfloor {a} \\rfloor", Fraction(math.floor(x)), ATOM), (f"⌈{a}⌉", Fraction(math.ceil(x)), ATOM)]
            )


def trees(count: int, seed: int) -> list[tuple[str, Fraction]]:
    r, found = random.Random(seed), []
    while len(found) < count:
        try:
            text, value, _ = tree(r, r.randrange(5))
        except ZeroDivisionError:
            continue
        if (
            len(text) < 400
            and "||" not in text.replace(" ", "")
            and max(value.numerator.bit_length(), value.denominator.bit_length()) < 3_000
        ):
            found.append((text, value))
    return found


# -- what is checked of every text


class HungError(Exception):
    pass


@contextmanager
def guard(seconds: float = SECONDS) -> Iterator[None]:
    """Raises HungError after so many seconds of this process's own time: a busy machine does not count."""

    def stop(*_: object) -> None:
        raise HungError(f"more than {seconds} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def verdict(completion: str, gold: str) -> str | None:
    """The verdict of the rules alone (None: Math-Verify is asked), every part of it under guard and checked."""
    with guard():
        answer, rule = extract(completion)
    assert rule in RULES and (answer is None) == (rule in ("none", UNCLOSED)), rule
    with guard():
        expected = gold_answer(gold)
    if expected is None:
        return "bad_gold"
    if not answer:
        return "no_answer"
    with guard():
        status, why = compare(expected, answer)
    assert status in KNOWN and isinstance(why, str), status
    return status
