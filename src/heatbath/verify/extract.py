"""The final answer of a completion, by named rules tried in order. Linear in the length of the text.

A self-correction counts: of every rule it is the last place that speaks. Boxes (or formulas) that are only joined by
commas, "and" or "or" are one answer of several values.
"""

from __future__ import annotations

import re
from typing import Literal

from heatbath.verify.answers.expressions import Words
from heatbath.verify.answers.notation import plain_text
from heatbath.verify.answers.reading import read
from heatbath.verify.answers.symbols import FUNCTIONS, PERCENT, RefusedError, UnreadableError
from heatbath.verify.answers.units import BASE, SCALES

MAX_RAW = 200_000  # characters of the end of a completion that are read; the answer stands at its end
MAX_CHARACTERS = 20_000  # of them after runs of spaces count as one
Policy = Literal["any", "marked", "boxed", "latex"]
POLICIES: dict[str, tuple[str, ...]] = {
    "any": ("boxed", "hashes", "stated", "final_line"),
    "marked": ("boxed", "hashes", "stated"),
    "boxed": ("boxed",),
    "latex": ("boxed", "stated", "formula"),
}
BOX = re.compile(r"(?<!\\)\\{1,4}(?:boxed|fbox)\b ?")
ANCHOR = re.compile(
    r"(?:(?P<final>final )?\banswers?|答案)(?:\s*+(?:\bis\b|\bare\b|[:=*为是])){1,6}+\s*+", re.IGNORECASE
)
LAST_ANCHORS = 5  # an anchor without an answer behind it is passed over, but not for ever
UNIT = "|".join(sorted(map(re.escape, BASE), key=len, reverse=True))
# A number that stands alone: no letter, digit, power or brace touches it (5x, 1e5 and 2^{10} hold none), but a
# unit may; a minus after a digit or a bracket is a subtraction. Possessive, so that a long run of digits is read once.
NUMBER = re.compile(
    r"(?<![0-9A-Za-z_.^{\\/])(?:(?<![0-9)\]}] )(?<![)\]}])-)?(?:(?:\\?\$|[€£¥]) ?-?)?"
    r"(?:[0-9]++(?:,[0-9]{3}(?![0-9]))*+(?:\.[0-9]++|,[0-9]++(?!,[0-9]))?+|\.[0-9]++)(?: [0-9]++(?=/))?+(?:/[0-9]++)?+"
    rf"(?P<unit>(?:{UNIT})(?![A-Za-z])(?:\^\{{?[23]\}}?)?|\\?[%$]|[€£¥])?"
    rf"(?P<scale> (?:{'|'.join(SCALES)})\b)?(?![0-9A-Za-z_^{{/\\‰])"
)
WORDS_AFTER = re.compile(r"(?:[ %]+[A-Za-z%²³]++)*+(?:[ ,;:!]|\.(?!\.))*+")
EXPLAINED = re.compile(
    r"[ *]*(?:\((?:see|since|because|as|from|by|rounded|the)\b|,? (?:as|since|because|which|where|when)\b)"
)
TAKEN_BACK_AFTER = re.compile(
    r"[\s$}.,;:()*-]{0,8}(?:is |was |that's |that is )?(?:wrong|incorrect|no\b|not\b|wait)", re.IGNORECASE
)
FILLER = re.compile(
    r"(?:therefore|thus|simply|just|clearly|indeed|exactly|equal to|then|given by)[ ,:]+", re.IGNORECASE
)
# A number is not the answer of a sentence in which one of these stands right before or behind it, or which is denied.
BEFORE = re.compile(
    r"(?:[+*/^×÷(]|[0-9] ?:|[0-9)] ?-|(?:^|\s)- |\\?sqrt|\b(?:root|log|(?:percent|%) of|at least|at most|more than"
    r"|less than|fewer than|greater than|over|under|[0-9.]+ (?:and|or)|negative|minus|not|never|cannot be|step|case"
    r"|equation|question|problem|part|figure|table|option|line|page)|n't)\s*(?:the |equal to |be )*$",
    re.IGNORECASE,
)
BEHIND = re.compile(
    r"\.\.|\)?\s*(?:[+*/^×÷?]|-\s*[0-9(])|\s*(?:is|was|are)?\s*(?:not|wrong|incorrect)\b|[^.;]{0,80}, [a-z]+ [A-Za-z]"
)
DENIED = re.compile(
    r"\b(?:wrong|incorrect|false|if|suppose|whether|mistaken)\b"
    r"|(?:\bnot|n't|\bnever) (?:think|believe|sure|true|correct|right|the answer|say)",
    re.IGNORECASE,
)
OPENING = re.compile(
    r"[\s*_#>$]*(?:(?:so|thus|therefore|hence|then|and)[, ]+)?(?:the |my |our )?[\s*_]*", re.IGNORECASE
)
JOINT = re.compile(r"(?:\\q?quad|\\[,;: ]|\\text\{|\\[()\[\]]|[\s$.{},;&+]|\band\b|\bor\b)*+")
JOINED_WORDS = re.compile(
    r"[\s$]*(?:\\text\{)?[\s\w()$\\]{0,30}(?:\band\b|\bor\b|[,;&])[\s$}]*(?:\\quad)?(?:[\\()]*\s*[A-Za-z]\w{0,3}\s*=)?[\s$]*"
)
FORMULA = re.compile(
    r"\$\$((?:[^$\\]|\\.){1,1000}+)\$\$|(?<!\\)\$((?:[^$\\\n]|\\[^\n]){1,1000}+)\$"
    r"|\\\[((?:[^\\]|\\[^\]]){1,1000}+)\\\]|\\\(((?:[^\\\n]|\\[^)\n]){1,1000}+)\\\)",
    re.DOTALL,
)
PERCENT_BEHIND = re.compile(r"[$)\]}\\ ]{0,4}(?:\\?%|percent|pct)")
NO_ANSWER = re.compile(r"(?:not|neither|unknown|unclear|wrong|correct|right|yet)\b", re.IGNORECASE)
GROUPED = re.compile(r"-?[0-9]{1,3}(?: [0-9]{3})+")
WORDS_OF_FORMULAS = FUNCTIONS | set(BASE) | set(PERCENT) | {"and", "or", "pi", "infinity"}
MAX_PHRASE = 2_000
TAKEN_BACK = re.compile(
    r"\b(?:not?|wrong|wait|incorrect|actually|mistake|instead|sorry|rather|should)\b", re.IGNORECASE
)
TAIL = re.compile(r"(?:<\|[a-z_]{1,20}\|>\s*+[a-z]{0,10}+|\s|I hope it is correct\.?)++\Z", re.IGNORECASE)
THOUGHT = "</think>"
BOLD = re.compile(
    r"(?<![\w)*])\*\*(\S(?:[^*\n]{0,200}?\S)?)\*\*(?![\w(*])|(?<![\w)*])\*(\S(?:[^*\n]{0,200}?\S)?)\*(?![\w(*])"
)
SPACES = re.compile(r"[^\S\n]+")


def extract(text: str, policy: Policy = "any") -> tuple[str | None, str]:
    """The answer and the rule that found it; `(None, "none")` when no rule did, `(None, "unclosed")` when the last box
    was never closed. What a model thinks before `</think>` is not its answer.

    Rules: `boxed`, the last `\\boxed{…}` or `\\fbox{…}`; `hashes`, what follows the last `####`; `stated`, what follows
    the last "answer is"; `final_line`, the last formula or number of the last line that has one. A "final answer is"
    behind the last box is heard before it. Policies name the rules that are used.
    """
    text = clean(text)
    for rule in POLICIES[policy]:
        found = RULES[rule](text)
        if found == UNCLOSED:
            return None, UNCLOSED
        if found is not None:
            return found, rule
    return None, "none"


def clean(text: str) -> str:
    """The end of a completion as the rules read it."""
    text = SPACES.sub(" ", text[-MAX_RAW:].rpartition(THOUGHT)[2])[-MAX_CHARACTERS:]
    text = plain_text(text)[-MAX_CHARACTERS:]  # one sign may become many
    text = BOLD.sub(r"\1\2", text) if "*" in text else text
    return text[: match.start()] if (match := TAIL.search(text, max(0, len(text) - 200))) else text


UNCLOSED = "unclosed"


def _boxed(text: str) -> str | None:
    if "box" not in text:
        return None
    boxes = all_boxed(text)
    if boxes is None:
        return UNCLOSED
    if not boxes:
        return None
    for anchor in reversed(list(ANCHOR.finditer(text, boxes[-1][1]))[-LAST_ANCHORS:]):
        opening = text[max(0, anchor.start() - 60) : anchor.start()]
        alone = OPENING.fullmatch(re.split(r"[.!?\n}]", opening)[-1])
        if anchor["final"] and alone and (found := _said(text, anchor.end())) and _is_value(found):
            return found
    if TAKEN_BACK_AFTER.match(text, boxes[-1][1] + 1):
        return ""  # \\boxed{5} is wrong
    found = _contents(text, boxes)
    return (last_boxed(found) or found) if "box" in found else found  # a box in a box


def last_boxed(text: str) -> str | None:
    """The content of the last complete box, braces balanced, or None."""
    boxes = all_boxed(text)
    return text[boxes[-1][0] : boxes[-1][1]].strip() if boxes else None


def all_boxed(text: str) -> list[tuple[int, int]] | None:
    """Where the contents of the outermost boxes begin and end; None when the last box does not close."""
    starts = {match.end(): True for match in BOX.finditer(text)}
    if not starts:
        return []
    found: list[tuple[int, int]] = []
    opened: list[tuple[int, bool]] = []
    unclosed = -1
    for position, character in enumerate(text):
        if position in starts and character != "{":  # \boxed 5
            end = position + 1
            while end < len(text) and text[end].isalnum():
                end += 1
            found.append((position, end))
        elif character == "{" and not text.endswith("\\", 0, position):
            opened.append((position, position in starts))
        elif character == "}" and opened and not text.endswith("\\", 0, position):
            start, box = opened.pop()
            if box:
                while found and found[-1][0] > start:  # a box in a box
                    found.pop()
                found.append((start + 1, position))
    unclosed = max((start for start, box in opened if box), default=-1)
    return None if unclosed > (found[-1][0] if found else -1) else found


def _joined(text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The last span with those before it that are joined to it: `\\boxed{1} and \\boxed{2}`."""
    kept = [spans[-1]]
    for before in reversed(spans[:-1]):
        between = text[before[1] + 1 : kept[0][0]]
        between = BOX.sub("", between.removesuffix("{"))
        if len(between) > 60 or ". " in between or "\n\n" in between or TAKEN_BACK.search(between):
            break
        if not (JOINT.fullmatch(between) or JOINED_WORDS.fullmatch(between)):
            break
        kept.insert(0, before)
    return kept


def _hashes(text: str) -> str | None:
    if "####" not in text:
        return None
    return text.rpartition("####")[2].strip().split("\n")[0].strip() or None


def _stated(text: str) -> str | None:
    low = text.casefold()
    if "answer" not in low and "答案" not in low:
        return None
    for anchor in reversed(list(ANCHOR.finditer(text))[-LAST_ANCHORS:]):
        clause = re.split(r"[.!?\n]", text[max(0, anchor.start() - 80) : anchor.start()])[-1]
        if not DENIED.search(clause) and (found := _said(text, anchor.end())):
            return found
    return None


def _said(text: str, start: int) -> str | None:
    """The answer in what follows "answer is": its formulas, a number followed by nothing but words, else all of it."""
    phrase = FILLER.sub("", text[start : start + MAX_PHRASE].partition("\n")[0].strip(" \t*\"'`"), count=1)
    if not phrase or NO_ANSWER.match(phrase) or re.match(r"[^.!]{0,200}\?(?:\s|$)", phrase):
        return None
    if (number := NUMBER.match(phrase)) and EXPLAINED.match(phrase, number.end()):
        return _bare(number)
    if not phrase.startswith(("$", "\\(", "\\[")) and " is " in phrase:  # The largest $n$ is 34.
        phrase = phrase.rpartition(" is ")[2].lstrip()
    if spans := _formulas(phrase):
        if spans[0][0] > 2:
            return _contents(phrase, spans)
        leading = _leading(phrase, spans)
        rest = phrase[leading[-1][1] :].lstrip("$)]\\ *")
        hedged = re.match(r"[/+*=<>;-]|or\b|and\b|, \$", rest) or TAKEN_BACK.search(rest[:60])
        return phrase if hedged else _contents(phrase, leading)
    phrase = re.sub(r"(?<!\.)\.$", "", phrase.split(". ")[0].rpartition("=")[2].strip(" \t*\"'`"))
    number = NUMBER.match(phrase)
    if number and WORDS_AFTER.fullmatch(phrase, number.end()):
        return _bare(number)
    if len(re.findall(r"[A-Za-z]{3,}", phrase)) > 2 and len(NUMBER.findall(phrase)) == 1:
        return _number_of(phrase)  # Jane started 3 hours ago.
    return phrase or None


def _number_of(sentence: str) -> str | None:
    """The last number of a sentence, where it stands alone and the sentence asserts it."""
    number = list(NUMBER.finditer(sentence))[-1]
    before, asserted = sentence[: number.start()], re.split(r"[.!?] ", sentence[: number.start()])[-1]
    if BEFORE.search(before[-40:]) or BEHIND.match(sentence, number.end()) or DENIED.search(asserted):
        return None
    return _bare(number)


def _leading(text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The first span and those joined to it: what is explained afterwards is not the answer."""
    end = 1
    while end < len(spans) and len(_joined(text, spans[: end + 1])) == end + 1:
        end += 1
    return spans[:end]


def _bare(number: re.Match[str]) -> str:
    """A number without the sign of a currency, with its unit and scale word apart."""
    unit, scale = number["unit"] or "", number["scale"] or ""
    digits = number.group().removesuffix(scale).removesuffix(unit)
    digits = re.sub(r"\\?\$|[€£¥]", "", digits).strip()
    return " ".join(part.strip() for part in (digits, scale, unit if unit not in ("$", "\\$") else "") if part.strip())


def _formulas(text: str) -> list[tuple[int, int]]:
    """Where the formulas `$…$`, `$$…$$`, `\\(…\\)` and `\\[…\\]` begin and end."""
    return [match.span(match.lastindex or 0) for match in FORMULA.finditer(text)]


def _contents(text: str, spans: list[tuple[int, int]]) -> str:
    """The last of several boxes or formulas with those joined to it, and a percent sign behind it."""
    joined = _joined(text, spans)
    unit = PERCENT_BEHIND.match(text, joined[-1][1])
    return ", ".join(text[a:b].strip() for a, b in joined) + ("%" if unit else "")


def _formula(text: str) -> str | None:
    if spans := _formulas(text):
        return _contents(text, spans)
    return text.strip() if "\n" not in text.strip() and _expression(text) else None


def _final_line(text: str) -> str | None:
    """The last formula or number of the last line that has one. A number that another clause follows ("12, so I give
    up") was said in passing, an operand (77 - 8) is no result."""
    spans = _formulas(text) if "$" in text or "\\" in text else []
    for start, line in _lines_from_the_end(text):
        numbers = list(NUMBER.finditer(line))
        here = [span for span in spans if start <= span[1] <= start + len(line)]
        if here and (not numbers or here[-1][1] > start + numbers[-1].start()):
            return _contents(text, [span for span in spans if span[1] <= here[-1][1]])
        if _expression(line):
            return line.strip()
        if numbers:
            return _number_of(line)
    return None


def _lines_from_the_end(text: str) -> list[tuple[int, str]]:
    found, start = [], 0
    for line in text.split("\n"):
        if line.strip():
            found.append((start, line))
        start += len(line) + 1
    return found[::-1]


def _expression(line: str) -> bool:
    """Whether a line is nothing but one expression that is not plain arithmetic (77 - 8 has no answer yet)."""
    line = line.strip()
    if len(line) > 200 or ":" in line or (re.fullmatch(r"[0-9+*/=(). \-]*", line) and not GROUPED.fullmatch(line)):
        return False
    runs = re.findall(r"(?<![A-Za-z\\])[A-Za-z]{2,}", re.sub(r"(?<=[0-9)])or(?=[A-Z(])", " ", line))
    if any(run.casefold() not in WORDS_OF_FORMULAS for run in runs):
        return False
    return _is_value(line)


def _is_value(text: str) -> bool:
    try:
        return not isinstance(read(text), Words)
    except (UnreadableError, RefusedError):
        return False


RULES = {"boxed": _boxed, "hashes": _hashes, "stated": _stated, "formula": _formula, "final_line": _final_line}
