"""Math-Verify, and stages of the user's own, as they run in a worker process that may be killed at any time."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

from heatbath.errors import RunError

MAX_RESPONSE = 20_000  # characters of the end of a response in which Math-Verify looks for an answer itself

# The name of the built-in last stage.
MATH_VERIFY = "heatbath.verify.algebra:math_verify"
NO_STAGE = "no stage"  # what decided where none did


def decide(stages: list[str], gold: str, answer: str) -> list[str]:
    """[status, stage] of the first stage that decides; `wrong` when none does.

    A stage is a function of (gold, answer), both strings, that returns True, False, or None where it cannot tell; the
    last word `"bad_gold"` is for a gold answer that nobody can read.
    """
    for stage in stages:
        found = _stage(stage)(gold, answer)
        if found == "bad_gold":
            return ["bad_gold", stage.rpartition(":")[2]]
        if hasattr(found, "dtype"):  # a comparison of numpy
            found = bool(found)
        if found is not None and not isinstance(found, bool):
            raise TypeError(f"the stage {stage} returned {found!r}, not True, False or None")
        if found is not None:
            return ["right" if found else "wrong", stage.rpartition(":")[2]]
    return ["wrong", NO_STAGE]


def require_stage(path: str) -> None:
    """Raises RunError where `path` names no function of (gold, answer)."""
    from heatbath.verify.worker import load

    try:
        inspect.signature(load(path)).bind("gold", "answer")
    except Exception as error:  # noqa: BLE001 - the edge to the user's own module, which may raise anything
        remedy = 'write "package.module:function" or "file.py:function"; it takes (gold, answer)'
        raise RunError(f"no stage {path}: {error}", "stages", remedy) from None


@functools.cache
def _stage(path: str) -> Callable[[str, str], Any]:
    from heatbath.verify.worker import load

    return load(path)


def math_verify(gold: str, answer: str) -> bool | str:
    """Math-Verify's verdict on an answer that was found already. Its own timeouts are signals and stay off."""
    expected, found = _parsed(f"\\boxed{{{gold}}}"), _parsed(f"\\boxed{{{answer}}}")
    if not expected:
        return "bad_gold"
    return bool(found) and _verified(expected, found)


def whole_response(gold: str, response: str) -> list[str]:
    """[status, rule] by Math-Verify on a whole response, in which it finds the answer itself (the paper's setting)."""
    expected, found = _parsed(f"\\boxed{{${gold}$}}"), _parsed(response[-MAX_RESPONSE:])
    if not expected:
        return ["bad_gold", "math_verify"]
    if not found:
        return ["no_answer", "math_verify"]
    return ["right" if _verified(expected, found) else "wrong", "math_verify"]


def _parsed(text: str) -> list[Any]:
    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at every call that its timeouts are off
    return list(parse(text, parsing_timeout=None))


def _verified(gold: list[Any], found: list[Any]) -> bool:
    from math_verify import verify

    return bool(
        verify(
            gold=gold,
            target=found,
            float_rounding=6,
            numeric_precision=15,
            strict=True,
            allow_set_relation_comp=False,
            timeout_seconds=None,
        )
    )
