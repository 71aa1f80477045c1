"""Errors a user can act on: what happened, where (their own key, row or file), and what to do about it."""

from __future__ import annotations

from heatbath.addresses import without_credentials

LONGEST_LINE = 1_000  # characters of a message's line; what is longer is somebody's data
LONGEST_VALUE = 100  # of a value in it


class HeatbathError(Exception):
    """A failure with a remedy. `exit_code` is what the command line returns for it."""

    exit_code = 1

    def __init__(self, what: str, where: str = "", remedy: str = ""):
        super().__init__(what)
        self.what, self.where, self.remedy = what, where, remedy

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where:  {self.where}")
        if self.remedy:
            lines.append(f"  remedy: {self.remedy}")
        return "\n".join(map(_shown, "\n".join(lines).split("\n")))


def _shown(line: str) -> str:
    """A line that a terminal can take: no control characters, which come out of files, and not too long."""
    plain = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)
    return plain if len(plain) <= LONGEST_LINE else f"{plain[:LONGEST_LINE]}… ({len(plain):,} characters)"


class RecipeError(HeatbathError):
    """The recipe, an override or the command line is wrong."""

    exit_code = 2


class DataError(HeatbathError):
    """A data file or one of its rows is wrong."""

    exit_code = 2


class RunError(HeatbathError):
    """A stage could not start or finish; what it had written is still there."""


class BusyError(RunError):
    """Another process is at work on the same run."""


def got(value: object) -> str:
    """The value that is wrong, as the end of a message; nothing of a table."""
    if isinstance(value, dict):
        return ""
    shown = without_credentials(repr(value))
    return f" (got {shown if len(shown) <= LONGEST_VALUE else shown[:LONGEST_VALUE] + '…'})"
