"""What every file of results begins with: the command, the commit, the machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from typing import Any


def commit() -> str:
    """The short name of the commit that the working folder is at."""
    line = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(line, capture_output=True, text=True, check=False).stdout.strip()


def made_with(command: str, *packages: str) -> dict[str, Any]:
    """The record's head; `packages` are those whose versions the numbers hang on."""
    versions = {name: version(name) for name in packages}
    return {
        "command": command,
        "commit": commit(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        **versions,
    }
