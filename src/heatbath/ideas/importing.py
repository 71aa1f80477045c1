"""Modules of the user's own, by package or by file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def module_of(home: str) -> ModuleType:
    """The module that `package.module` or `path/to/file.py` names. Raises what importing it raises."""
    if not home.endswith(".py"):
        return importlib.import_module(home)
    path = Path(home).expanduser().resolve()
    spec = importlib.util.spec_from_file_location(f"heatbath_own_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up there
    spec.loader.exec_module(module)
    return module
