"""What asserts the answer to a multiple-choice question, and what does not.

Assertions are tried in tiers, and the last mention of a tier decides. First `\\boxed{C}` and statements ("the answer is
(C)", "Answer: C", `#### C`, `<answer>C</answer>`, 答案是C), by label or by an option's full text. Then a final line
that is nothing but a label or one option's text, prose ("option C is correct", "choose (C)", `**C**`), and a first line
that is only a label. What stands before a `</think>` asserts nothing.

A hedge ("A or B", "(A)(B)"), a label that the options do not have and a text that fits two options are no answer, and
no earlier mention takes their place. Negations, questions and hypotheses ("not A", "A?", "if the answer is A") assert
nothing, and a label that is denied after it was asserted is asserted no more; "Wait, actually C." takes its place.
Where the options are numbered, the letters A, B, … are their places; numbers never stand for letters, since they may be
values or count from 0.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from heatbath.verify.choice import Choices

MAX_CHARACTERS = 20_000  # of the end of a completion; the answer stands at its end
MAX_MENTIONS = 200  # of a tier; the last ones
INVISIBLE = [*range(9), 11, 12, *range(14, 32), 127, 0xAD, 0x34F, 0x180E, 0xFEFF, *range(0xFE00, 0xFE10)]
INVISIBLE += [*range(0x200B, 0x2010), *range(0x202A, 0x202F), *range(0x2060, 0x2070)]
CHARACTERS = dict.fromkeys(INVISIBLE) | {13: "\n", 0x2028: "\n", 0x2029: "\n", 0x2011: "-", 0x2212: "-"}
CHARACTERS |= {ord(c): f"^{plain}" for c, plain in zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-", strict=True)}
WRAPPED = re.compile(
    r"\\(?:text(?:bf|rm|it|sf|tt)?|math(?:rm|bf|it|sf|tt)|[mh]box|boldsymbol|bm|emph|underline|operatorname)"
    r"\s{0,3}\{([^{}]{0,2000})\}|\{\\(?:bf|rm|it)\s+([^{}]{0,2000})\}"
)
SPACING = re.compile(r"\\(?:[,;:! ()\[\]]|q?quad(?![a-z])|\\)")
ENDING = ' .;,。*_`"”’'  # of a text, without which it is compared
SPECIAL = re.compile(r"<\|[^|<>]{1,40}\|>|</?s>|</answer>")


def plain(text: str) -> str:
    """The text without invisible characters, in NFKC (full-width Ａ is A), its LaTeX wrappers taken off."""
    text = text.translate(CHARACTERS)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    if "\\" in text:
        for _ in range(3):
            text = WRAPPED.sub(lambda m: m.group(1) if m.group(1) is not None else m.group(2), text)
        text = SPACING.sub(lambda m: "$" if m[0][1] in "()[]" else " ", text.replace("\\%", "%"))
    return text


def worded(text: str) -> str:
    """The form in which an option's text and what a completion states are compared."""
    words = " ".join(text.replace("\\$", "").replace("$", "").split()).lstrip("*_`\"'“”‘’: ").rstrip(ENDING)
    words = words[:-1].rstrip(ENDING) if words.endswith((".'", ",'")) else words
    return re.sub(r"^(?:the|an?) +(?=\S)", "", words, flags=re.IGNORECASE)


def _any(words: str) -> str:
    """Alternatives written `one | two words`."""
    return "(?:" + "|".join(w.strip().replace(" ", r"\s+") for w in words.split(" | ")) + ")"


def _pattern(text: str) -> re.Pattern[str]:
    """A pattern over several lines, blanks in it standing for nothing."""
    return re.compile(text, re.IGNORECASE | re.MULTILINE | re.VERBOSE | re.ASCII)


LABEL = r"(?:[A-Za-z]|[0-9]{1,2})"
AROUND = r"[\s*_`$\"'“”‘’]*+"
CLOSING = r"[\s)*_`$\"'“”’\]】>}]*+"
NOUN = rf"(?:{_any('option | choice | letter | answer | alternative | number')}(?![a-z])|选项)\s*+[:\#]?"
FILLER = _any(
    "I think | I believe | I guess | I would say | in my opinion | probably | likely | most likely | clearly | surely"
    " | definitely | obviously | certainly | of course | therefore | thus | hence | then | simply | actually | indeed"
    r" | still | that | just | given by | found in | represented by | : | -(?=\s) | – | — | >"
)
HEAD = _pattern(rf"""{AROUND} (?:{FILLER} (?![A-Za-z]),? {AROUND}){{0,4}}+
    (?:(?:the\s|our\s)?(?:correct\s|right\s)? (?P<noun>{NOUN}) {AROUND})?+""")
MARKED = _pattern(rf"(?:\((?:{NOUN})?\s*({LABEL})\s*\)|[\[<{{【]\s*({LABEL})\s*[\]>}}】]|({LABEL})\))(?![^\W_])")
BARE = _pattern(rf"(?<![A-Za-z0-9.\\^-])({LABEL})(?![A-Za-z0-9])")
# What ends a bare label: the end of its clause, a bracket, a sign of a list.
ENDED = _pattern(r"""\s*$ | [.:;!,?。！，；、]++(?:[\s*_`$\"'”)\]}<]|[^\x00-\x7f]|$) | [)\]}>因由是选项吧呢所为对正]
    | ['’](?!\w) | \s*< | \s*[/&、或和与及] | \s*[,+]\s*\(?[A-Z0-9]\b | \s+(?:[*_]*\(|[—–]|-\s+(?![A-Z]\b))""")
# Words that may follow it. After an A or an I most go on with the sentence of the article or the pronoun instead.
AFTER_I = _any("because | since | due | which | where | according | or | is | if | unless")
AFTER_A = rf"(?:{AFTER_I}|{_any('by | for | in | with | and | but | again | instead')}(?!-)|as(?!\s?-))"
AFTER = rf"{AFTER_A}|{_any('based | so | given | from | not | rather | here | at | on | when | only | too | also')}"
FOLLOWING = {token: _pattern(rf"\s+(?:{words})\b") for token, words in (("I", AFTER_I), ("A", AFTER_A), ("", AFTER))}
OTHER = _pattern(rf"""{CLOSING} (?: [,;.]{{0,4}}\s*\(?(?:or|and/or)\b
    | ,?\s*{_any("and | nor | versus | vs.? | to | through")}\b | [,;/&+、] | ,?\s*(?:或者?|和|与|及) ) \s*
    (?:(?:{_any("possibly | maybe | perhaps | even | also | else | either | both")}|{NOUN})\s*)*+
    {AROUND}\(?({LABEL})\)?(?![A-Za-z0-9'’])""")
ADJOINED = _pattern(rf"{CLOSING}(?:\(\s*({LABEL})\s*\)|(?<=[)\]]|\s)({LABEL})\))")
CLAUSE = _pattern(r"""  # of the second label, so that the first one stands ("B, and C fails")
    \)?\s*,?\s+(?: (?!(?:as|plus|less|this|thus|minus|perhaps|always)\b)[a-z]+s | [a-z]+n['’]t
    | can|cannot|could|will|would|may )\b""")
WRONG = _any("wrong | incorrect | false | impossible | out | ruled | eliminated | a mistake | a common mistake")
DENIED = _pattern(rf"""{CLOSING}(?: (?:is|was|can|could|would|are)(?:\s+(?:also|clearly|certainly|definitely))?
        (?:\s*not\b|n['’]t|\s+{WRONG}\b) | 是?[错不]
    | (?:[.,;!…—–-]+\s*)? (?: (?:(?:wait|hmm+|oops|sorry|actually)[,.…]*\s)*no[,.!]
        | no,?\s+wait | scratch\sthat | (?:but\s|actually,?\s|wait,?\s)*(?:that|this|it|which)
        (?:['’]s|\s+is|\s+was)\s+(?:{WRONG}|not\s(?:right|correct|true|the\sanswer)) ) )""")
UNSURE = _pattern(rf"{CLOSING}[.]*(?:\?|,?\s*(?:if(?!\sand\sonly)|unless)\b)")
NOT = _pattern(r"(?:(?:certainly|definitely|clearly|obviously|probably)\s)?(?:not|neither|never)\b\s*")
BUT = _pattern(r"\bbut\s+(?:rather\s+|instead\s+)?(?:it\s+is\s+|it['’]s\s+)?")
AFTER_TEXT = _pattern(rf"""[*_`\"'“”’\])}}]*+ (?: \s*$ | [.!;。]++[*_`\"'”’)]*+(?:\s|$) | [:,]?\s+[—–-]\s | :\s | <
    | ,?\s+{_any("because | since | due | which | where | according | as | so | given | based | not | instead")}\b
    | ,?\s*\(?(?:option\s|choice\s)?\(?(?P<label>[A-Za-z]|[0-9]{{1,2}})\) )""")
TRAILING = _pattern(rf"\s\(\s*(?:{NOUN}\s*)?({LABEL})\s*\)[\s.*_$`]*+$")
REFUSING = _pattern(r"\b(?:not|neither|all|any\w*|every\w*|except|but|instead|unlike|than|wrong|or)\b|n['’]t\b")
BE = rf"""(?: (?:{_any("therefore | thus | hence | then | clearly | definitely")}\s+)? (?:is|was|are|remains|
    {_any("would | should | must | will | has to | can only | could only | seems to | appears to | turns out to")}
    \s+(?:(?:therefore|thus|then|hence)\s+)?be)(?![A-Za-z'’]) | [=:] )"""
BEST = _any("correct | right | best | final | appropriate | accurate | suitable | most likely")
STATED = _pattern(rf"""<answer> | 【答案】 | \#{{4}} | ^[ \t\#*_]*+(?:the\s)?(?:final\s|correct\s)?answer[ \t*_]*+\n
    | (?<![A-Za-z]) (?: (?:answers?|ans)(?:\s+(?:choice|option|letter))?
        | {BEST}\s+{_any("option | choice | one | letter | alternative | response")} )
      (?:\s+(?:to|for|of|here|in)\b[^\n.:;?!]{{0,80}}?)? [\s*_`\"')\]]*{BE}
    | (?:答案|(?:正确|最佳)的?选项)\s*(?:应该|应当|应|就|显然|只能|必须)?\s*(?:选择|选|是|为|:)(?:选择|选|是|为|:|\s)*
    | (?:故|应该|应|所以|因此|综上所述|综上|于是|只能|我),?\s*选择?\s*:?""")
CHOSEN = _pattern(rf"""(?<![A-Za-z]) (?:
        {_any("choose | chose | select | pick | go with | going with | opt for | answer with | mark | guess")}
    | (?:I|we)(?:['’]d|\s+would|\s+will|['’]ll)?\s+(?:say|think|believe|answer)(?:\s+it(?:\s+is|['’]s))?
    | (?:it|that)['’]s | (?:it|this|that)\s+(?:is|(?:must|should|has\s+to)\s+be) | namely | therefore | thus | hence
    | {_any("leaves | leaves us with | corresponds to | matches | which is | in conclusion")} | so | i\.e\.,? )
      (?![A-Za-z])\s*[:,]? | \\(?:Rightarrow|implies)(?![a-z]) | ⇒ | =>
    | (?<![不别未])选[择项]? | (?<=[^\s*])[ \t]*\*\*""")
CORRECT = _pattern(rf"""(?<![A-Za-z0-9'’.\\(-]) (?P<noun>{NOUN}\s*)? [*_`$\"']{{0,4}}+
    (?P<label>\({LABEL}\)|{LABEL}\)|[A-Z]|[0-9]{{1,2}}) [*_`$\"'.]{{0,4}}\s{{1,4}}+
    {_any("is | seems | appears to be | must be | would be | has to be")}\s+
    (?:{_any("therefore | thus | clearly | definitely | indeed | the | our | my | most | only | single")}\s+)*
    (?:correct|right|best|answer|appropriate|accurate|suitable)
    (?=[\s*_]*(?: [.,;!:)] | $ | {_any("answer | option | choice | one | because | since | as | for | here")}\b))
    (?!(?:\s+\w+)?\s*\?)""")
ONLY = _pattern(rf"[\s*_`$\"']*{_any('that | only | just | I think | clearly | conclude that')}?[\s*_`$\"']*")
JOINT = _pattern(r"(?:[\s$,;&/*]|\b(?:or|and)\b)*+\\f?boxed\s*")
PROSE = _pattern(r".{200}|(?:is|was|can|could|would|does|seems)\b")  # not an option's text
LINE_HEAD = rf"(?:[\s>*_`\#$]|[+-]\s)*+(?:{NOUN}\s*)?{AROUND}"
OPTION_LINE = _pattern(rf"{LINE_HEAD}(?:\(\s*({LABEL})\s*\)|({LABEL})[).:](?=\W|$))[*_`$]*\s*((?s:.*))")
ALONE = _pattern(rf"{LINE_HEAD}(?:[(\[]\s*({LABEL})\s*[)\]]|({LABEL})[).:]?)[\s*_`$\"'.”!。]*+")
BREAK = _pattern(r"[.;:!?,\n。，；：！？]|\b(?:so|therefore|thus|hence|but|because|since|then|and|however)\b")
# In the clause before a mention these make it a condition, a denial, or what somebody else says.
UNASSERTED = _pattern(r"""\b(?:if|suppose|supposing|assum\w*|whether|unless|why|not|never|cannot|neither|nor|none|error
        |(?:wrong|false|untrue|incorrect)\s(?:to|that)|doubt\w*
        |mistak\w*|trap|tempt\w*|avoid|imagine)\b | n['’]t\b | 不|别|如果|假设|若
    | \b(?:one|you|some|someone|people|students?|others|many|they|he|she)\b.*\b(?:might|may|could|would|thinks?|says?
        |said|claims?|believes?|guess|guessed|argues?|answered|chose|choose|picked)\b
    | \b(?:might|may|could)\s(?:think|say|guess|choose|pick|believe|conclude)\b
    | \b(?:wrong|incorrect|false|tempting|possible|plausible|worst|least|initial|first|second|previous|original|earlier
        |former|old|his|her|their|your|\w+['’]s)\s*(?:guess\s|best\s|(?:most\s)?(?:likely|common|final)\s)?$""")


# A second thought ("Wait, actually C."), and the label after it, where the sentence does not go on.
CORRECTING = _pattern(rf"""(?<![A-Za-z'’]) (?: {_any("wait | oops | sorry | apologies | correction | actually")}
    | instead | hmm+ | {_any("scratch that | I mean | I meant | rather | make that | make it")} | no(?=[ ]*[,.:;!…—–-])
    | on\s(?:second|further)\s(?:thought|reflection) )
    (?:[ \t,.:;!…*—–-]++ (?: {_any("actually | wait | no | sorry | rather | instead | I mean | I choose | I think")}
    | it['’]s | that['’]s | (?:it|that|this)\s(?:is|was|(?:should|must|has\sto)\sbe) | (?:make|change)\s(?:it|that)
    | to))*+
    [ \t,.:;!…*—–-]++ (?:(?:the\s)?(?:correct\s|right\s)?{NOUN}\s*(?:is\s)?)?+ [*_`$\"']*+""")
SETTLED = _pattern(rf"""(\({LABEL}\)|(?-i:[A-Z])|[0-9]{{1,2}}) (?= [)*_`$\"'”’]*+ (?: \s*$ | [.!]++(?-i:\s+[A-Z(*]|\s*$)
    | \s+(?:or|instead)\b | / | ,?\s+(?:not|because|since)\b | \s+is\s(?:the\s)?(?:answer|correct|right)\b ))""")


# --- what stands after a cue ---------------------------------------------------------------------------------------
class Reading(NamedTuple):
    """`kind`: label, text, hedge, foreign (a label that the options do not have) or denied."""

    kind: str
    label: str | None


HEDGE = Reading("hedge", None)


def _read(phrase: str, choices: Choices, firm: bool = False, weak: bool = False, again: bool = True) -> Reading | None:
    """What a phrase that begins where an answer is expected asserts, or None.

    `firm`: the place allows nothing but an answer (a box, a line after "Answer:"), so that `a` is a label there.
    `weak`: prose, where only a label that stands out is one.
    """
    phrase = phrase.lstrip()
    line = phrase.partition("\n")[0]
    head = HEAD.match(line)
    start, named = (head.end(), bool(head["noun"])) if head else (0, False)
    token, end, marked = _label(line, start, firm=firm, weak=weak, named=named)
    label = choices.find(token) if token else None
    if not weak:
        found = _text(phrase, choices) or (_text(phrase[start:], choices) if start else None)
        if found is not None and (label is None or found[1] > len(token) + 2 * marked):
            return found[0]
    if not token and again and (negated := NOT.match(line, start)):
        if but := BUT.search(line, negated.end(), negated.end() + 80):
            return _read(line[but.end() :], choices, weak=weak, again=False)  # not A but B
        denied = _read(line[negated.end() :], choices, weak=weak, again=False)
        return Reading("denied", denied.label) if denied and denied.kind in ("label", "text") else None
    if label is None:
        if weak or not (token.isalpha() and (marked or token.isupper())):
            return None if weak else _trailing(line, choices)
        return None if UNSURE.match(line, end) else Reading("foreign", token.upper())
    if choices.labels[0].isdigit() and not (marked or named) and choices.named(worded(token)) not in ([], [label]):
        return HEDGE  # the number of one option, the text of another
    return _judged(line, end, label, choices)


def _label(line: str, start: int, *, firm: bool, weak: bool, named: bool) -> tuple[str, int, bool]:
    """The label at `start`, where it ends and whether brackets mark it; ("", start, False) where none stands there."""
    if marked := MARKED.match(line, start):
        return next(g for g in marked.groups() if g), marked.end(), True
    bare = BARE.match(line, start)
    if bare is None or (weak and not named and not bare[1].isupper()):
        return "", start, False
    token, rest = bare[1], line[bare.end() :].lstrip('*_`$"”}]>')
    if token.islower():  # at the very end of the line, and `a` or `i` only where no sentence can begin
        stands = (not rest.strip(" .") and (token not in "ai" or firm)) or (firm and rest[:1] in ")]:")
    else:
        titled = token.isalpha() and token not in "AI" and not weak and re.match(r"\s+[A-Z][a-z]", rest)
        stands = bool(titled or ENDED.match(rest) or FOLLOWING.get(token, FOLLOWING[""]).match(rest))
    return (token, bare.end(), False) if stands else ("", start, False)


def _judged(line: str, end: int, label: str, choices: Choices) -> Reading | None:
    """The label that ends at `end`, in the light of what follows."""
    if DENIED.match(line, end):
        return Reading("denied", label)
    own = _text(re.sub(r"^[).:*_,\]}]*\s*(?:[–—]\s+)?", "", line[end:]), choices)
    if (own is None or own[0].label != label) and (beside := ADJOINED.match(line, end)):  # (A)(B), not A with its text
        token = beside[1] or beside[2]
        numeral = token in "Ii" and not choices.texts
        if not numeral and choices.find(token) not in (None, label) and not CLAUSE.match(line, beside.end()):
            return HEDGE
    last = end
    while (other := OTHER.match(line, last)) and choices.find(other[1]) == label:
        last = other.end()  # A, A or B
    if other and choices.find(other[1]) not in (None, label):
        token, after = other[1], line[other.end() :]
        article = token in "AaIi" and re.match(r"\s+(?!are\b|both\b|is\b)[A-Za-z]", after)
        small = token.islower() and ")" not in other[0]
        either = re.search(r"\bor\b|/", other[0], re.I)
        if not (article or small) and (either or not CLAUSE.match(after)):
            return HEDGE
    if UNSURE.match(line, end):
        return None
    if own is not None and choices.text(own[0].label) not in ("", choices.text(label)):
        return HEDGE  # (B) with the text of C
    return Reading("label", label)


def _text(phrase: str, choices: Choices) -> tuple[Reading, int] | None:
    """The option whose full text begins the phrase, the longest where several do, and its length."""
    if not choices.texts:
        return None
    written = worded(phrase.partition("\n")[0]), worded(phrase)
    folded = written[0].casefold(), written[1].casefold()
    best: list[tuple[str, bool]] = []
    length = 0
    for label, exact, fold in choices.texts:
        of = 0 if folded[0].startswith(fold) else 1
        after = AFTER_TEXT.match(folded[of], len(fold)) if folded[of].startswith(fold) else None
        if after is None or len(fold) < length:
            continue
        if after["label"] and choices.find(after["label"]) not in (None, label):
            return HEDGE, len(fold)  # Paris (C), and Paris is B
        best = [*(best if len(fold) == length else []), (label, written[of].startswith(exact))]
        length = len(fold)
    if len(best) > 1:
        best = [(label, exact) for label, exact in best if exact] or best
    return (HEDGE if len(best) > 1 else Reading("text", best[0][0]), length) if best else None


def _trailing(line: str, choices: Choices) -> Reading | None:
    """For `17 (C)`: a phrase that is no option's text, with one label in brackets at its end."""
    sentence = re.split(r"[.;!?](?:\s|$)", line[:400], maxsplit=1)[0]
    match = TRAILING.search(sentence)
    label = choices.find(match[1]) if match and not REFUSING.search(sentence, 0, match.start()) else None
    return Reading("label", label) if label else None


# --- where answers are asserted ------------------------------------------------------------------------------------
def extract_choice(text: str, choices: Choices) -> tuple[str | None, str]:
    """The label that a completion asserts and the rule that found it; (None, rule) where it asserts none, and a label
    that is none of the choices' with a rule that ends in `no_such_label`."""
    if len(text) > MAX_CHARACTERS:
        text = text[-MAX_CHARACTERS:]
        text = text.partition(" ")[2] if " " in text[:100] else text  # the first word may be half a word
    reasoning, _, answer = text.rpartition("</think>")
    text = plain(SPECIAL.sub(" ", answer if answer.strip() or not reasoning else reasoning))
    text = text[-MAX_CHARACTERS:]
    for tier in (_strong, _weak):
        denied: set[str | None] = set()
        for rule, reading in tier(text, choices):
            if reading is None or (reading.kind != "hedge" and reading.label in denied):
                continue
            if reading.kind == "denied":
                denied.add(reading.label)
            else:
                suffix = {"label": "", "foreign": "+no_such_label"}.get(reading.kind, f"+{reading.kind}")
                return reading.label, rule + suffix
    return None, "none"


def _asserted(text: str, at: int) -> bool:
    """Whether the clause up to here asserts: "if", "not", "one might think that" and the like do not."""
    return UNASSERTED.search(BREAK.split(text[max(0, at - 120) : at])[-1]) is None


def _strong(text: str, choices: Choices) -> Iterator[tuple[str, Reading | None]]:
    """Boxes and statements, the last first."""
    boxes = sorted(_boxes(text)) if "box" in text else []
    found = [(start, end, f"box {i}") for i, (start, end) in enumerate(boxes)]
    found += [(m.start(), m.end(), "") for m in STATED.finditer(text)]
    found += [(m.start(), m.end(), "corrected") for m in CORRECTING.finditer(text)]
    for start, end, how in sorted(found)[: -MAX_MENTIONS - 1 : -1]:
        if not _asserted(text, start):
            continue
        if how.startswith("box "):
            yield "boxed", _boxed(text, boxes, int(how[4:]), choices)
            continue
        phrase = text[end : end + choices.reach]
        if how == "corrected":
            yield "corrected", _corrected(phrase.partition("\n")[0], choices)
            continue
        firm = text[start:end].rstrip().endswith((":", ">", "#")) or text[end - 1] == "\n"
        if "\n" not in phrase[: len(phrase) - len(phrase.lstrip())] or not _listing(_lines(phrase[:4000])[:2]):
            yield "stated", _read(phrase, choices, firm=firm)


def _corrected(line: str, choices: Choices) -> Reading | None:
    """What a second thought asserts: a label, or one option's text."""
    if match := SETTLED.match(line):
        token = match[1].strip("()")
        if label := choices.find(token):
            return _judged(line, match.end(), label, choices)
        return Reading("foreign", token.upper()) if token.isalpha() else None
    found = _text(line, choices)
    return found[0] if found else None


def _boxed(text: str, boxes: list[tuple[int, int]], at: int, choices: Choices) -> Reading | None:
    """What a box asserts; a hedge where it is joined to a box with another answer: `\\boxed{A} or \\boxed{B}`."""
    start, end = boxes[at]
    content = text[start + 1 : end]
    reading = _read(content, choices, firm=True)
    if reading is None:
        return None if any(map(str.isalnum, content)) else HEDGE  # empty: there is no answer
    if reading.kind == "label" and DENIED.match(text, end):
        return Reading("denied", reading.label)
    for before in range(at - 1, max(at - 27, -1), -1):
        if JOINT.fullmatch(text, boxes[before][1] + 1, boxes[before + 1][0]) is None:
            break
        other = _read(text[boxes[before][0] + 1 : boxes[before][1]], choices, firm=True)
        if other is not None and other.label != reading.label:
            return HEDGE
    return reading


def _boxes(text: str) -> list[tuple[int, int]]:
    """Where the braces of each complete `\\boxed{…}` or `\\fbox{…}` stand."""
    opened: list[int] = []
    spans: list[tuple[int, int]] = []
    for brace in re.finditer(r"[{}]", text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif opened:
            start = opened.pop()
            if text[max(0, start - 9) : start].rstrip().endswith(("\\boxed", "\\fbox")):
                spans.append((start, brace.start()))
    return spans


def _weak(text: str, choices: Choices) -> Iterator[tuple[str, Reading | None]]:
    """The final line, what asserts in prose, the last first, and a first line that is a label before an explanation."""
    lines = _lines(text)
    yield "final_line", _final_line(lines, choices)
    found = [(m.start(), m.end(), "") for m in CHOSEN.finditer(text)]
    found += [(m.start(), m.end(), m["label"].strip("()")) for m in CORRECT.finditer(text) if _is_label(text, m)]
    for start, end, token in sorted(found)[: -MAX_MENTIONS - 1 : -1]:
        if token and (label := choices.find(token)) and _asserted(text, start):
            yield "is_correct", Reading("label", label)
        elif not token and _asserted(text, start):
            yield "chosen", _read(text[end : end + 200], choices, weak=True)
    first = _line(lines[0], choices) if lines and not _listing(lines[:2]) else None
    yield "first_line", first if first and first.kind == "label" else None


def _is_label(text: str, match: re.Match[str]) -> bool:
    """Whether the X of "X is correct" is a label: named as one, in brackets, or a capital that begins its clause."""
    before = BREAK.split(text[max(0, match.start() - 40) : match.start()])[-1]
    return bool(
        match["noun"] or not (token := match["label"]).isalnum() or (token.isupper() and ONLY.fullmatch(before))
    )


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip(" \t*_`#$>")]


def _listing(lines: list[str]) -> bool:
    """Whether these are two option lines of different labels: the options themselves, not an answer."""
    found = [(m[1] or m[2]).upper() for line in lines if (m := OPTION_LINE.fullmatch(line))]
    return len(found) == 2 and found[0] != found[1]


def _final_line(lines: list[str], choices: Choices) -> Reading | None:
    """The last line, where it is nothing but a label, a label with its text, or one option's text."""
    if not lines or _listing(lines[-2:]):
        return None
    reading = _line(lines[-1], choices)
    if reading is None and choices.texts:
        several = ("\n".join(lines[-n:])[-choices.reach :] for n in range(2, min(len(lines), 9) + 1))
        reading = next((r for text in several if (r := _line(text, choices, whole=True))), None)
    elif reading is not None and reading.kind == "text" and _whole(lines[-2] if len(lines) > 1 else "", choices):
        return None  # the options again, one on each line
    return reading


def _line(line: str, choices: Choices, *, whole: bool = False) -> Reading | None:
    """What a line asserts that is one option's text, or a label with its text (or only its beginning) or without."""
    text, match = _whole(line, choices), ALONE.fullmatch(line)
    label = choices.find(match[1] or match[2]) if match else None
    if label is None and (match := OPTION_LINE.fullmatch(line)):
        rest, label = worded(match[3]).casefold(), choices.find(match[1] or match[2])
        own = choices.text(label)
        if not (rest == own if whole else rest.startswith(own) if own else not choices.texts and not PROSE.match(rest)):
            label = None
    plainer = text is None or len(worded(line)) <= 3
    return Reading("label", label) if label and plainer else text


def _whole(line: str, choices: Choices) -> Reading | None:
    """The option whose text is the whole line."""
    forms = (line, line.strip(" \t*_`#>")) if len(line) <= choices.reach else ()
    found = next((named for form in forms if (named := choices.named(worded(form)))), [])
    return (Reading("text", found[0]) if len(found) == 1 else HEDGE) if found else None
