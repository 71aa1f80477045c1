"""Errors a user can act on: what happened, where (their own key, row or file), and what to do about it."""


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
        return "\n".join(lines)


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
