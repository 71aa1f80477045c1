"""Mathematical text in one notation: Unicode symbols as LaTeX, spacing and styling gone. Linear in its length."""

from __future__ import annotations

import re
import unicodedata

SYMBOLS = {
    "×": r"\times ",
    "✕": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∙": r"\cdot ",
    "∗": "*",
    "÷": r"\div ",
    "⁄": "/",
    "∕": "/",
    "∶": ":",
    "√": r"\sqrt ",
    "∛": r"\sqrt[3] ",
    "∞": r"\infty ",
    "≤": r"\le ",
    "⩽": r"\le ",
    "≦": r"\le ",
    "≥": r"\ge ",
    "⩾": r"\ge ",
    "≧": r"\ge ",
    "≠": r"\ne ",
    "≈": r"\approx ",
    "≃": r"\approx ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "∖": r"\setminus ",
    "ℝ": r"\mathbb{R} ",
    "°": r"^\circ ",
    "º": r"^\circ ",
    "′": "'",
    "’": "'",
    "⟨": "(",
    "⟩": ")",
    "。": ".",
    "、": ",",
    "µ": r"\mu ",
    "⌊": r"\lfloor ",
    "⌋": r"\rfloor ",
    "⌈": r"\lceil ",
    "⌉": r"\rceil ",
    "…": r"\ldots ",
    "“": '"',
    "”": '"',
    **dict.fromkeys("−–—‐‑‒﹣－", "-"),
}
GREEK = (
    *(
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "iota",
        "kappa",
        "lambda",
        "mu",
        "nu",
        "xi",
    ),
    *("omicron", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega"),
)
SUPERSCRIPTS, SUBSCRIPTS = (
    {sign: text for text, sign in zip("0123456789+-=()n", signs, strict=False) if sign.strip()}
    for signs in ("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿ", "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₙ")
)


def _table() -> dict[int, str]:
    table = {ord(sign): latex for sign, latex in SYMBOLS.items()}
    for code in [*range(0xBC, 0xBF), *range(0x2150, 0x215F), 0x2189]:  # ½, ⅓, …
        _, *codes = unicodedata.decomposition(chr(code)).split()
        over, _, under = "".join(chr(int(c, 16)) for c in codes).partition("⁄")
        if under:
            table[code] = rf"\frac{{{over}}}{{{under}}}"
    for name in GREEK:
        for case, latex in (("SMALL", name), ("CAPITAL", name.capitalize())):
            sign = unicodedata.lookup(f"GREEK {case} LETTER {'LAMDA' if name == 'lambda' else name.upper()}")
            table[ord(sign)] = f"\\{latex} "
    return table


TABLE = _table()
RAISED = re.compile("[" + "".join(SUPERSCRIPTS) + "]+")
LOWERED = re.compile("[" + "".join(SUBSCRIPTS) + "]+")
ROOT_OF_NUMBER = re.compile(r"(√|∛) ?([0-9]+(?:\.[0-9]+)?)")
SPACE = re.compile(r"[ \t\r\f\v\u00a0\u2000-\u200a\u202f\u205f\u3000]+")


def plain_text(text: str) -> str:
    """Unicode as ASCII and LaTeX: ½ is \\frac{1}{2}, x² is x^{2}, full-width forms are narrow, invisible signs gone.

    Digits of other scripts stay what they are: only 0-9 and their styled forms are numbers here. Newlines stay.
    """
    if not text.isascii():
        text = RAISED.sub(lambda m: "^{" + "".join(SUPERSCRIPTS[c] for c in m.group()) + "}", text)
        text = LOWERED.sub(lambda m: "_{" + "".join(SUBSCRIPTS[c] for c in m.group()) + "}", text)
        text = ROOT_OF_NUMBER.sub(
            lambda m: (r"\sqrt" if m.group(1) == "√" else r"\sqrt[3]") + f"{{{m.group(2)}}}", text
        )
        text = unicodedata.normalize("NFKC", text.translate(TABLE)).translate(TABLE)
        text = "".join(c for c in text if c.isascii() or unicodedata.category(c) != "Cf")
    return SPACE.sub(" ", text)


# Commands without meaning for a value; \left and \right go with them, the bracket behind them stays.
SIZED = re.compile(
    r"\\(?:left|right|middle|[bB]igg?[lrm]?) ?(?=[()\[\]|./<>]"
    r"|\\(?:[{}|]|[lr]?(?:angle|floor|ceil|vert|Vert|brace|brack)))\.?"
)
COLOURED = re.compile(r"\\(?:text)?color ?\{[^{}]{0,30}\}")
SILENT = re.compile(
    r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|mathstrut|boldsymbol|mathbf|mathit|mathsf|bf|rm|it|centering"
    r"|hline|[tT]iny|[sS]mall|normalsize|[lL]arge|LARGE|[hH]uge)(?![A-Za-z])"
)
SPACING = re.compile(r"(?<!\\)\\(?:[,;:!> ]|qquad|quad|hspace\{[^{}]{0,20}\}|enspace|thinspace)|~")
MATH_MARKS = re.compile(r"(?<!\\)(?:\$|\\[()\[\]])")
GROUPED_DIGITS = re.compile(r"(?<=[0-9])(?: ?\{ ?, ?\}|,\\!|\\,|\\ ) ?(?=[0-9]{3}(?![0-9]))")
COMMA_AS_POINT = re.compile(r"(?<=[0-9])\{,\}(?=[0-9])")
TWICE_ESCAPED = re.compile(r"\\\\(?=[A-Za-z({\[\]})])")
REPEATING = re.compile(r"([0-9]{0,20})\.([0-9]{0,20})\\(?:overline|bar|dot) ?(?:\{ ?([0-9]{1,20}) ?\}|([0-9]))")


def _repeating(match: re.Match[str]) -> str:
    """0.1\\overline{6} as the fraction it is."""
    whole, once, several, single = match.groups()
    again = several or single
    nines, places = 10 ** len(again) - 1, 10 ** len(once)
    over = int((whole + once) or "0") * nines + int(again)
    return rf"\frac{{{over}}}{{{nines * places}}}"


SAME = {
    "dfrac": "frac",
    "tfrac": "frac",
    "cfrac": "frac",
    "dbinom": "binom",
    "tbinom": "binom",
    "leq": "le",
    "leqslant": "le",
    "lt": "<",
    "geq": "ge",
    "geqslant": "ge",
    "gt": ">",
    "neq": "ne",
    "not=": "ne",
    "varnothing": "emptyset",
    "land": "and",
    "lor": "or",
    "vee": "or",
    "wedge": "and",
    "lbrace": "{",
    "rbrace": "}",
    "lbrack": "[",
    "rbrack": "]",
    "langle": "(",
    "rangle": ")",
    "vert": "|",
    "lvert": "|",
    "rvert": "|",
    "mid": "|",
    "degree": "circ",
    "dots": "ldots",
    "cdots": "ldots",
    "colon": ":",
    "minus": "-",
    "infin": "infty",
    "textdollar": "$",
    "smallsetminus": "setminus",
    "backslash": "setminus",
}


def latex(text: str) -> str:
    """`text`, the content of an answer, without what does not change its value."""
    text = plain_text(text).replace("\n", " ")
    if "\\begin" not in text:
        text = TWICE_ESCAPED.sub(r"\\", text)
    text = COMMA_AS_POINT.sub(".", GROUPED_DIGITS.sub("", text))
    text = SILENT.sub(" ", SIZED.sub("", COLOURED.sub(" ", MATH_MARKS.sub(" ", text))))
    text = REPEATING.sub(_repeating, SPACING.sub(" ", text))
    return collapse(SPACE.sub(" ", text).strip(' `"*'))


def collapse(text: str) -> str:
    """`text` with braces and brackets that only repeat the next pair written once: {{4}} is {4}, ((4)) is (4)."""
    if "{{" not in text and "((" not in text:
        return text
    pairs: dict[int, int] = {}
    opened: list[int] = []
    for position, character in enumerate(text):
        if character in "{([":
            opened.append(position)
        elif character in "})]" and opened:
            start = opened.pop()
            if text[start] + character in ("{}", "()"):
                pairs[start] = position
    drop = {
        at
        for start, end in pairs.items()
        if text[start] == text[start + 1] and pairs.get(start + 1) == end - 1
        for at in (start, end)
    }
    return "".join(c for at, c in enumerate(text) if at not in drop) if drop else text


def letters(text: str) -> str:
    """`text` as words are compared: case, styling, punctuation at the ends and repeated spaces do not count."""
    text = re.sub(
        r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mbox|operatorname|mathbf)\*?(?![A-Za-z])", "", text
    )
    return " ".join(re.sub(r"[{}$\\]", " ", text).split()).strip(" .,;:!?\"'*()").casefold()
