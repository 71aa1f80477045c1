"""A run is a folder: recipe.toml, env.json, metrics.jsonl, surprise.json, samples.jsonl, checkpoints/, report.html."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from heatbath import recipe as recipes
from heatbath.errors import RecipeError, RunError
from heatbath.recipe import Recipe

CHECKPOINTS = {"sft": "init", "rl": "final"}
VERSIONED = ("heatbath", "torch", "transformers", "trl", "datasets", "accelerate", "peft", "math-verify", "numpy")


class Run:
    """The folder of one run, and the only place that knows its file names."""

    def __init__(self, folder: Path, recipe: Recipe):
        self.folder, self.recipe = folder, recipe

    @classmethod
    def create(cls, folder: Path, recipe: Recipe, *, dry: bool = False) -> Run:
        """A new run. Raises RecipeError when the folder already holds something that a run or anybody else made;
        a run that ended before its first number left nothing worth keeping. `dry` only checks, and writes nothing."""
        if folder.exists() and not _holds_nothing(folder):
            if (folder / "report.html").is_file():
                found, remedy = "a run with its report", f"open {folder}/report.html, or choose another --out"
            elif (folder / "recipe.toml").is_file():
                found = "an unfinished run"
                remedy = "go on with `heatbath sft|rl|eval` (an unfinished stage starts again), or choose another --out"
            else:
                found, remedy = "something else", "choose another --out"
            raise RecipeError(f"the output folder exists and holds {found}; nothing was touched", str(folder), remedy)
        return cls(folder, recipe) if dry else cls._write(folder, recipe)

    @classmethod
    def open(cls, folder: Path, recipe: Recipe, *, dry: bool = False) -> Run:
        """The run in that folder, made if absent (not if `dry`). Raises RecipeError when another recipe made it."""
        if not folder.exists() or _holds_nothing(folder):
            return cls(folder, recipe) if dry else cls._write(folder, recipe)
        before = cls.read(folder).recipe
        if before != recipe:
            raise RecipeError(
                "the folder holds a run of another recipe",
                str(folder / "recipe.toml"),
                "use the same recipe and overrides, or another --out",
            )
        return cls(folder, recipe)

    @classmethod
    def read(cls, folder: Path) -> Run:
        """An existing run, with the recipe it was made by."""
        if not (folder / "recipe.toml").is_file():
            raise RecipeError("not a run: it holds no recipe.toml", str(folder), "give the folder that --out named")
        return cls(folder, recipes.load(folder / "recipe.toml"))

    @classmethod
    def _write(cls, folder: Path, recipe: Recipe) -> Run:
        run = cls(folder, recipe)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "recipe.toml", recipes.as_toml(recipe))
        write_atomically(folder / "env.json", json.dumps(environment(recipe.precision), indent=1) + "\n")
        return run

    @property
    def policies(self) -> list[str]:
        """The policies of this run in order: base, and init / final where the recipe has that stage."""
        names = [CHECKPOINTS[s] for s in ("sft", "rl") if getattr(self.recipe, s) is not None]
        return ["base", *names]

    def checkpoint(self, policy: str) -> Path:
        return self.folder / "checkpoints" / policy

    def model_of(self, policy: str) -> str:
        """What `models.load_model` takes for that policy. Raises RunError when its stage has not run."""
        if policy == "base":
            return self.recipe.model
        folder = self.checkpoint(policy)
        if not folder.is_dir():
            stage = next(s for s, name in CHECKPOINTS.items() if name == policy)
            raise RunError(f"the run has no '{policy}' policy yet", str(folder), f"run the {stage} stage first")
        return str(folder)

    @contextmanager
    def new_checkpoint(self, policy: str) -> Iterator[Path]:
        """A folder to save into; it takes its name only once complete. Raises RunError when the policy exists.

        What an earlier attempt at the stage had logged goes, so that the log holds one attempt.
        """
        final = self.checkpoint(policy)
        if final.exists():
            raise RunError(f"the '{policy}' policy of this run is already trained", str(final), "use another --out")
        unfinished = final.with_name(f".{policy}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        stage = next(s for s, name in CHECKPOINTS.items() if name == policy)
        self._keep_rows("metrics.jsonl", lambda row: row["stage"] != stage)
        yield unfinished
        unfinished.rename(final)

    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Appends a row to metrics.jsonl; NaN (the mean reward where nothing was graded) is left out."""
        finite = {k: v for k, v in values.items() if math.isfinite(v)}
        append_jsonl(self.folder / "metrics.jsonl", [{"stage": stage, "step": step, "time": time.time(), **finite}])

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        return [row for row in read_jsonl(self.folder / "metrics.jsonl") if row["stage"] == stage]

    def samples(self, policy: str) -> list[dict[str, Any]]:
        return [row for row in read_jsonl(self.folder / "samples.jsonl") if row["policy"] == policy]

    def add_samples(self, rows: list[dict[str, Any]]) -> None:
        append_jsonl(self.folder / "samples.jsonl", rows)

    def _keep_rows(self, name: str, wanted: Callable[[dict[str, Any]], bool]) -> None:
        rows = read_jsonl(self.folder / name)
        kept = [row for row in rows if wanted(row)]
        if len(kept) < len(rows):
            write_atomically(self.folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

    def write_json(self, name: str, value: Any) -> None:
        write_atomically(self.folder / name, json.dumps(value, indent=1) + "\n")

    def read_json(self, name: str) -> Any:
        """The value stored under that file name, or None."""
        path = self.folder / name
        return json.loads(path.read_text()) if path.is_file() else None


def _holds_nothing(folder: Path) -> bool:
    """Whether the folder is empty, or holds only what a run writes before its first number."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    return names <= {"recipe.toml", "env.json", "checkpoints"} and not any(folder.glob("checkpoints/[!.]*"))


def environment(precision: str) -> dict[str, Any]:
    """Versions, hardware, precision and the command: what a reader needs to run it again."""
    import torch

    from heatbath.models import autocast_dtype

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {
        "command": shlex.join(["heatbath", *sys.argv[1:]]),
        "precision": "bf16 products over float32 weights" if autocast_dtype(precision) else "float32",
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "versions": {p: version(p) for p in VERSIONED},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "cpu"


def write_atomically(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)


def append_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Appends rows in one write; a last line that a kill had cut off goes first."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    with path.open("ab+") as stream:
        size = stream.seek(0, os.SEEK_END)
        if size:
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.seek(0)
                stream.truncate(stream.read().rfind(b"\n") + 1)
        stream.write(data)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file of ours; a last line cut off by a kill is not a row."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1] if line]
