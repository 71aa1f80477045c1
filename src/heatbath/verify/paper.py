"""The acceptance rules of the first GIFT paper's rewards, without evaluating text as Python.

Its first stage are the rules published with OpenMathInstruct: an answer is right when its text is the gold's but for
case, units and brackets, when its number is within 1e-4 of the gold's, of 100 times or of a hundredth of it, when every
element of a tuple is, or when the difference of both is zero (arXiv 2601.09233; facts: NeMo-Skills). They accept 500
for 5: `strict` is what heatbath trains with.
"""

from __future__ import annotations

import re
from fractions import Fraction

from heatbath.verify.answers.equality import same
from heatbath.verify.answers.expressions import Group, Matrix, Node, Quantity
from heatbath.verify.answers.names import free_names, named_value
from heatbath.verify.answers.notation import latex, letters
from heatbath.verify.answers.reading import read
from heatbath.verify.answers.symbols import UnreadableError
from heatbath.verify.answers.values import Evaluation, Value, mp, precise, real

TOLERANCE = Fraction(1, 10_000)  # relative
MAX_ANSWER = 1_000  # characters of an answer that are read
SCALES = (Fraction(1), Fraction(100), Fraction(1, 100))


def accepts(gold: str, answer: str) -> bool | None:
    """Whether the rules accept `answer`; None where they cannot read one of both. Raises RefusedError."""
    gold, answer = latex(gold), latex(answer[:MAX_ANSWER])
    if _bare(gold) == _bare(answer):
        return bool(_bare(gold))
    try:
        return _accepts(read(gold), read(answer))
    except UnreadableError:
        return None


def _accepts(gold: Node, answer: Node) -> bool | None:
    gold, answer = (_without_unit(named_value(node)[1]) for node in (gold, answer))
    numbers = [_number(node) for node in (gold, answer)]
    if numbers[0] is not None and numbers[1] is not None:
        return any(_close(numbers[0] * scale, numbers[1]) for scale in SCALES)
    if isinstance(gold, Group | Matrix) and isinstance(answer, Group | Matrix):
        first, second = _cells(gold), _cells(answer)
        if len(first) == len(second) and all(_accepts(g, a) for g, a in zip(first, second, strict=True)):
            return True
    return same(gold, answer)


def _bare(text: str) -> str:
    text = re.sub(r"\\(?:text|mathrm|textbf|mbox)\b ?|\\%|\\\$|\^ ?\{?\\circ ?\}?", "", text)
    return re.sub(r"[\s()\[\]{}$%\\]", "", letters(text))


def _without_unit(node: Node) -> Node:
    return node.value if isinstance(node, Quantity) else node


def _cells(node: Group | Matrix) -> list[Node]:
    return [cell for row in node.rows for cell in row] if isinstance(node, Matrix) else list(node.items)


def _number(node: Node) -> Value | None:
    """The real value of an expression without variables."""
    if free_names(node):
        return None
    try:
        value = real(Evaluation()(node))
    except UnreadableError:
        return None
    return value if isinstance(value, Fraction) or precise.isfinite(value) else None


def _close(a: Value, b: Value) -> bool:
    return bool(abs(mp(a) - mp(b)) <= mp(TOLERANCE) * max(abs(mp(a)), abs(mp(b))))
