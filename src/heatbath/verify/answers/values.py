"""The value of an expression: an exact fraction where it has one, else a number of 160 digits.

Every operation is bounded before it is made: a power, factorial or binomial of more than `MAX_BITS` bits raises
`RefusedError`. Variables get values; two expressions that agree at several unrelated points are taken as equal.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import mpmath

from heatbath.verify.answers.expressions import Apply, Name, Node, Number, Quantity
from heatbath.verify.answers.symbols import RefusedError, UnreadableError

MAX_BITS = 200_000  # of one exact number
BUDGET = 2_000_000  # bits of all numbers of one expression
MAX_FACTORIAL = 5_000
DIGITS = 160
MOST_EXACT = 10**40  # denominator of a fraction that may equal a number known to DIGITS digits

Value = Fraction | Any  # Any: an mpmath number, which has no types

precise = mpmath.MPContext()
precise.dps = DIGITS


class Evaluation:
    """Evaluates expressions at one point: the values of the variables, and the sign that ± stands for."""

    def __init__(self, point: int = 0, sign: int = 1, renamed: Mapping[str, str] | None = None):
        self.point, self.sign, self.renamed, self.bits = point, sign, renamed or {}, 0

    def __call__(self, node: Node) -> Value:
        """Raises UnreadableError for what has no value, RefusedError for what is too large."""
        match node:
            case Number(value, percent):
                return self._kept(value / 100 if percent else value)
            case Name(name):
                return self._named(name)
            case Apply(head, args):
                return self._kept(self._applied(head, args))
            case Quantity(value, unit) if unit.is_degree:
                return self(value)
            case Quantity(value, unit) if unit.is_percent:
                return self(value) / 100
        raise UnreadableError("not a number")

    def _kept(self, value: Value) -> Value:
        if isinstance(value, Fraction):
            bits = value.numerator.bit_length() + value.denominator.bit_length()
            self.bits += bits
            if bits > MAX_BITS or self.bits > BUDGET:
                raise RefusedError("a number of more digits than any answer needs")
        elif precise.isfinite(value) and value != 0 and abs(precise.mag(value)) > MAX_BITS:
            raise RefusedError("a number of more digits than any answer needs")
        return value

    def _named(self, name: str) -> Value:
        match name:
            case "pi":
                return +precise.pi
            case "e":
                return +precise.e
            case "i":
                return precise.mpc(0, 1)
            case "infty":
                return +precise.inf
            case "emptyset":
                raise UnreadableError("a set")
        if name.startswith("mathbb"):
            raise UnreadableError("a set")
        return _at(self.renamed.get(name, name), self.point)

    def _applied(self, head: str, args: tuple[Node, ...]) -> Value:
        if head in ("pm", "mp"):
            sign = self.sign if head == "pm" else -self.sign
            first = self(args[0])
            return sign * first if len(args) == 1 else first + sign * self(args[1])
        if head in TRIGONOMETRIC:
            return self._function(head, [self._angle(args[0])])
        if head.startswith("call ") or head in GEOMETRIC:
            return self._unknown(head, [self(arg) for arg in args])
        values = [self(arg) for arg in args]
        if head in ARITHMETIC:
            return self._arithmetic(head, values)
        return self._function(head, values)

    def _arithmetic(self, head: str, values: list[Value]) -> Value:
        a, b = values[0], values[-1]
        if head == "neg":
            return -a
        if not all(isinstance(value, Fraction) or precise.isfinite(value) for value in values):
            raise UnreadableError("arithmetic with infinity")
        match head:
            case "add" | "mixed":
                return _sum(a, b)
            case "sub":
                return _sum(a, -b)
            case "mul":
                return a * b if type(a) is type(b) else mp(a) * mp(b)
            case "div" | "ratio":
                if b == 0 or len(values) > 2:
                    raise UnreadableError("a division by zero")
                return a / b if type(a) is type(b) else mp(a) / mp(b)
            case "pow":
                return _power(a, b)
            case "root":
                return _root(a, b)
            case "abs":
                return abs(a)
            case "factorial":
                return Fraction(math.factorial(int(a))) if _natural(a) else _gamma(a)
            case "binom":
                if _natural(a) and _natural(b):
                    return Fraction(math.comb(int(a), int(b)))
                return _gamma(a) / (_gamma(b) * _gamma(_sum(a, -b)))
            case "floor" | "ceil":
                return _rounded(a, up=head == "ceil")
        raise UnreadableError(head)

    def _angle(self, node: Node) -> Value:
        if isinstance(node, Quantity) and node.unit.is_degree:
            return mp(self(node.value)) * precise.pi / 180
        return self(node)

    def _function(self, head: str, values: list[Value]) -> Value:
        x = mp(values[0])
        if not precise.isfinite(x):
            raise UnreadableError("a function of infinity")
        if abs(x) > (MAX_BITS if head in ("sinh", "cosh", "tanh") else 1e40) or 0 < abs(x) < 1e-40:
            raise RefusedError(f"{head} of a number that no answer needs")
        if head == "exp":
            return _power(+precise.e, x)
        if head in ("log", "ln", "lg"):
            if x == 0:
                raise UnreadableError("the logarithm of zero")
            base = mp(values[1]) if len(values) > 1 else precise.mpf(10) if head == "lg" else None
            if base is not None and base in (0, 1):
                raise UnreadableError("a logarithm to that base")
            return precise.log(x) if base is None else precise.log(x) / precise.log(base)
        name = {"arcsin": "asin", "arccos": "acos", "arctan": "atan"}.get(head, head)
        if name not in FUNCTIONS:
            raise UnreadableError(f"the function {head}")
        try:
            found = getattr(precise, name)(x)
            return Fraction(0) if abs(found) < precise.mpf(10) ** (20 - DIGITS) else found  # sin π
        except (ValueError, ZeroDivisionError) as error:
            raise UnreadableError(f"{head} has no value there") from error

    def _unknown(self, head: str, values: list[Value]) -> Value:
        """A function nobody knows: some value, the same for the same function and arguments."""
        shown = ",".join(
            f"{v.numerator:x}/{v.denominator:x}" if isinstance(v, Fraction) else precise.nstr(v, 25) for v in values
        )
        return _at(f"{head}({shown})", self.point)


TRIGONOMETRIC = frozenset({"sin", "cos", "tan", "cot", "sec", "csc"})
GEOMETRIC = frozenset({"overline", "bar", "hat", "vec", "angle", "triangle", "widehat", "overrightarrow"})
FUNCTIONS = TRIGONOMETRIC | {"sinh", "cosh", "tanh", "asin", "acos", "atan"}
ARITHMETIC = frozenset(
    {"neg", "add", "mixed", "sub", "mul", "div", "ratio", "pow", "root", "abs", "factorial", "binom", "floor", "ceil"}
)


def _at(name: str, point: int) -> Fraction:
    """A value for a variable at a point: positive at 0 and 1, negative at 2; at the others the bits of the name's first
    letter decide, so that any two letters differ in sign somewhere."""
    digest = hashlib.blake2b(f"{name}\0{point}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    value = Fraction(int.from_bytes(digest[:3]) + 2**20, 2**22 + 2 * int.from_bytes(digest[3:5]) + 1)
    negative = point == 2 or (point > 2 and ord(name[0]) >> (point - 3) & 1)
    return -value if negative else value


def mp(value: Value) -> Any:
    if isinstance(value, Fraction):
        return precise.mpf(value.numerator) / value.denominator
    return value


def _sum(a: Value, b: Value) -> Value:
    total = a + b if type(a) is type(b) else mp(a) + mp(b)
    if isinstance(total, Fraction):
        return total
    x, y = abs(mp(a)), abs(mp(b))
    if 0 < min(x, y) < max(x, y) * precise.mpf(10) ** (40 - DIGITS):
        raise RefusedError("a sum of numbers too different in size for any answer")
    # What cancels to less than the last digits is zero: √2·√2 − 2.
    return Fraction(0) if abs(total) <= x * precise.mpf(10) ** (8 - DIGITS) else total


def _natural(value: Value) -> bool:
    """Whether a value is a natural number, and one small enough for a factorial."""
    if not isinstance(value, Fraction) or value.denominator != 1:
        return False
    if value < 0:
        raise UnreadableError("a factorial of a negative number")
    if value > MAX_FACTORIAL:
        raise RefusedError(f"a factorial or binomial of more than {MAX_FACTORIAL}")
    return True


def _gamma(value: Value) -> Any:
    """The factorial between the natural numbers: n!/(n − 1)! is n at any point."""
    if abs(x := mp(value)) > MAX_FACTORIAL:
        raise RefusedError(f"a factorial or binomial of more than {MAX_FACTORIAL}")
    try:
        return precise.gamma(x + 1)
    except ValueError as error:
        raise UnreadableError("a factorial of a negative number") from error


def _rounded(value: Value, up: bool) -> Fraction:
    if not isinstance(value, Fraction) and abs(value) > 1e100:
        raise RefusedError("the whole part of a number of more than 100 digits")
    exact = value if isinstance(value, Fraction) else Fraction(precise.nstr(real(value), DIGITS - 10))
    return Fraction(math.ceil(exact) if up else math.floor(exact))


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(exponent, Fraction) and exponent.denominator == 1 and isinstance(base, Fraction):
        if base == 0 and exponent < 0:
            raise UnreadableError("a division by zero")
        bits = max(base.numerator.bit_length(), base.denominator.bit_length())
        if base not in (0, 1, -1) and bits * abs(exponent) > MAX_BITS:
            raise RefusedError("a power of more digits than any answer needs")
        return base ** int(exponent) if base not in (0, 1, -1) else _of_unit(base, int(exponent))
    x, y = mp(base), mp(exponent)
    if x == 0:
        if precise.re(y) <= 0:
            raise UnreadableError("a power of zero")
        return Fraction(0)
    if not (precise.isfinite(x) and precise.isfinite(y)):
        raise UnreadableError("a power of infinity")
    if isinstance(exponent, Fraction) and exponent.denominator % 2 and precise.im(x) == 0 and precise.re(x) < 0:
        power = precise.power(-precise.re(x), y)  # the real root of an odd degree: (-8)^{1/3} is -2
        return -power if exponent.numerator % 2 else power
    if abs(y) > 1e9 or abs(y * precise.log(abs(x))) > MAX_BITS:
        raise RefusedError("a power of more digits than any answer needs")
    return precise.power(x, y)


def _of_unit(base: Fraction, exponent: int) -> Fraction:
    if base == 0:
        return Fraction(int(exponent == 0))
    return base if base == 1 or exponent % 2 else Fraction(1)


def _root(value: Value, degree: Value) -> Value:
    """The principal root, but for odd roots of negative numbers the real one."""
    if not isinstance(degree, Fraction) or degree.denominator != 1 or not 1 <= degree <= 1000:
        raise UnreadableError("a root of that degree")
    n = int(degree)
    if isinstance(value, Fraction) and (value >= 0 or n % 2):
        over, under = _exact_root(abs(value.numerator), n), _exact_root(value.denominator, n)
        if over is not None and under is not None:
            return Fraction(over if value >= 0 else -over, under)
        return precise.root(mp(abs(value)), n) * (1 if value >= 0 else -1)
    x = mp(value)
    if x == 0:
        return Fraction(0)
    if n % 2 and precise.im(x) == 0 and precise.re(x) < 0:
        return -precise.root(-precise.re(x), n)
    return precise.sqrt(x) if n == 2 else precise.power(x, precise.mpf(1) / n)


def _exact_root(value: int, n: int) -> int | None:
    if n == 2:
        root = math.isqrt(value)
    elif value.bit_length() > 900:
        return None
    else:
        root = round(value ** (1 / n))
    return root if root**n == value else None


def same_number(a: Value, b: Value) -> bool:
    """Equal: exactly where both are exact, else to all but the last digits."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    if any(isinstance(value, Fraction) and value.denominator > MOST_EXACT for value in (a, b)):
        return False  # 150 digits of π are not π
    x, y = mp(a), mp(b)
    if not (precise.isfinite(x) and precise.isfinite(y)):
        return bool(x == y)
    return bool(abs(x - y) <= max(abs(x), abs(y)) * precise.mpf(10) ** (12 - DIGITS))


def real(value: Value) -> Value:
    """The value as a real number; raises UnreadableError where it has an imaginary part."""
    if isinstance(value, Fraction):
        return value
    if precise.im(value) != 0:
        raise UnreadableError("not a real number")
    return precise.re(value)


def close(a: Value, b: Value, decimals: int) -> bool:
    """Equal after rounding to so many decimals."""
    x, y = mp(a), mp(b)
    if not (precise.isfinite(x) and precise.isfinite(y)):
        return bool(x == y)
    return bool(abs(x - y) <= precise.mpf(10) ** -decimals / 2)
