"""A run is a folder: recipe.toml, env.json, metrics.jsonl, surprise.json, readiness.json, samples.jsonl.gz,
results.json, checkpoints/, report.html.

Every stage goes on from it: a finished one is kept, an unfinished one continues from its last complete checkpoint.
"""

from __future__ import annotations

import importlib.metadata
import itertools
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

from filelock import FileLock, Timeout

from heatbath import ranks, samples
from heatbath import recipe as recipes
from heatbath.errors import BusyError, RecipeError, RunError
from heatbath.interruption import handlers_kept
from heatbath.models import TrustedName
from heatbath.recipe import Recipe

# A recipe has [preference] or [rl], never both.
CHECKPOINTS = {"pretrain": "base", "sft": "init", "preference": "final", "rl": "final"}
STAGES = (*CHECKPOINTS, "eval")
COMPLETE = "complete"  # the mark of a checkpoint whose every file is on the disk
REPLAY = "replay.jsonl"  # answers of the base that a warm start learns (stages/replay.py)
SAMPLES = ("samples.jsonl.gz", "samples.jsonl")  # the latter in runs of earlier versions
OWN_TEST = "test"  # the task that the run's own test problems are
RESULTS = ("results.json", "report.html", "report.md", "report.json")
VERSIONED = ("heatbath", "torch", "transformers", "trl", "datasets", "accelerate", "peft", "math-verify", "numpy")


class Run:
    """The folder of one run, and the only place that knows its file names. Of several processes the first writes."""

    def __init__(self, folder: Path, recipe: Recipe):
        self.folder, self.recipe = folder, recipe

    @classmethod
    def create(cls, folder: Path, recipe: Recipe) -> Run:
        """A new run. Raises RecipeError when the folder already holds something (see opening.py for going on)."""
        if folder.exists() and not holds_nothing(folder):
            raise RecipeError("the output folder exists and is not empty", str(folder), "choose another --out")
        return cls(folder, recipe).write()

    @classmethod
    def read(cls, folder: Path) -> Run:
        """An existing run, with the recipe it was made by; code that the recipe names is not imported for it."""
        if not is_run(folder):
            raise RecipeError("not a run: it holds no env.json", str(folder), "give the folder that --out named")
        return cls(folder, recipes.load(folder / "recipe.toml", inert=True))

    def write(self) -> Run:
        """Writes recipe.toml and env.json; returns the run."""
        if not ranks.first():
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "base.json").unlink(missing_ok=True)
        # First what marks the folder as ours: a recipe.toml alone is somebody's own.
        self.write_json("env.json", environment(self.recipe.precision))
        self.write_recipe()
        return self

    @ranks.by_first
    def note_resumed(self) -> None:
        """Adds to env.json when, by which command and with which versions the run was gone on with."""
        env = self.read_json("env.json")
        now = environment(self.recipe.precision)
        env["resumed"] = [*env.get("resumed", []), {k: now[k] for k in ("started", "command", "versions", "device")}]
        self.write_json("env.json", env)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else may work on the folder meanwhile. Raises BusyError when somebody does."""
        if not ranks.first():
            yield
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.folder / ".lock", timeout=0):
                yield
        except Timeout:
            raise BusyError(
                "another process is working on this run", str(self.folder), "wait for it, or choose another --out"
            ) from None

    @ranks.by_first
    def write_recipe(self) -> None:
        write_atomically(self.folder / "recipe.toml", recipes.as_toml(self.recipe))

    @property
    def policies(self) -> list[str]:
        """The policies of this run in order: base, and init / final where the recipe has that stage."""
        trained = ("sft", "preference", "rl")
        return ["base", *(CHECKPOINTS[s] for s in trained if getattr(self.recipe, s) is not None)]

    def stage_of(self, policy: str) -> str:
        """The stage that makes a policy in this run."""
        makers = [stage for stage, made in CHECKPOINTS.items() if made == policy]
        return next((stage for stage in makers if getattr(self.recipe, stage) is not None), makers[-1])

    def checkpoint(self, policy: str) -> Path:
        return self.folder / "checkpoints" / policy

    def model_of(self, policy: str) -> str:
        """What `models.load_model` takes for that policy. Raises RunError when its stage has not run."""
        if policy == "base" and self.recipe.model is not None:
            return self.recipe.model
        folder = self.checkpoint(policy)
        if not folder.is_dir():
            stage = self.stage_of(policy)
            command = stage if stage in ("sft", "rl") else "run"
            raise RunError(f"the run has no '{policy}' policy yet", str(folder), f"heatbath {command} makes it")
        return self.named(folder)

    def named(self, folder: Path) -> str:
        """A folder of this run's weights as `models` takes it: with the recipe's permission to run a model's code."""
        return TrustedName(folder) if self.recipe.trust_remote_code else str(folder)

    def template_of(self, policy: str) -> str | None:
        """The chat template to load a policy's tokenizer with: the recipe's for the base; a policy that this run
        trained brings the one it was taught in."""
        return self.recipe.template if self.model_of(policy) == self.recipe.model else None

    def working(self, stage: str) -> Path:
        """Where a training stage keeps what it needs to be resumed."""
        return self.folder / "checkpoints" / f".{stage}"

    def last_checkpoint(self, stage: str, say: Callable[[str], None] | None = None) -> Path | None:
        """The newest checkpoint of an unfinished stage whose every file is there as it was written, or None. Where
        somebody hears it (`say`), what a kill left half is removed, and what has been damaged since, after a word."""
        whole: list[tuple[int, Path]] = []
        for path in self.working(stage).glob("checkpoint-*"):
            damage = _damage(path)
            if damage is None:
                whole.append((int(path.name.rpartition("-")[2]), path))
            elif say is not None and ranks.first():
                if damage:
                    say(f"{stage}: {path.name} is damaged ({damage}) and removed")
                shutil.rmtree(path, ignore_errors=True)
        return max(whole)[1] if whole else None

    @ranks.by_first
    def complete(self, checkpoint: Path, stage: str) -> None:
        """Marks a checkpoint as whole once every file is on the disk, with their sizes and the number of rows that the
        stage had logged by then."""
        to_disk(checkpoint)
        files = [p for p in checkpoint.rglob("*") if p.is_file() and p != checkpoint / COMPLETE]
        sizes = {str(p.relative_to(checkpoint)): p.stat().st_size for p in files}
        mark = {"rows": len(self.metrics(stage)), "processes": ranks.count(), "files": sizes}
        write_atomically(checkpoint / COMPLETE, json.dumps(mark))

    def require_same_processes(self, checkpoint: Path) -> None:
        """Raises RunError where a checkpoint is gone on with by another number of processes: each has random states of
        its own, and the run would not be the same."""
        before = _mark(checkpoint).get("processes", ranks.count())
        if before != ranks.count():
            raise RunError(
                f"the stage was begun by {before} processes, and now there are {ranks.count()}",
                str(checkpoint),
                f"go on with --gpus {before} (or that many in all), or --fresh",
            )

    def finished(self, stage: str) -> bool:
        """Whether a stage has left its policy, or the evaluation its results."""
        if stage == "eval":
            return (self.folder / "results.json").is_file()
        policy = CHECKPOINTS[stage]
        if getattr(self.recipe, stage) is None and self.stage_of(policy) != stage:
            return False  # the policy is that of the other stage
        return self.checkpoint(policy).is_dir()

    def begun(self, stage: str) -> bool:
        """Whether a stage has left anything: a log row, a checkpoint, a sample, or its end."""
        if stage == "eval":
            return any((self.folder / name).exists() for name in SAMPLES) or self.finished(stage)
        measured = {"sft": ("surprise.json", REPLAY), "rl": ("readiness.json",)}.get(stage, ())
        profiled = any((self.folder / name).exists() for name in measured)
        return profiled or self.finished(stage) or self.working(stage).exists() or bool(self.metrics(stage))

    @ranks.by_first
    def forget(self, stage: str) -> None:
        """Removes everything that a stage has left, with the samples of the policy it made and all results."""
        for name in RESULTS:
            (self.folder / name).unlink(missing_ok=True)
        if stage == "eval":
            for name in (*SAMPLES, "sampling.json", "judgments.jsonl"):
                (self.folder / name).unlink(missing_ok=True)
            shutil.rmtree(self.folder / "judgments", ignore_errors=True)
            return
        (self.folder / "shift.json").unlink(missing_ok=True)
        policy = self.checkpoint(CHECKPOINTS[stage])
        # Before the policy: samples that a kill left without it would be taken for those of the one trained next.
        self._forget_samples(policy.name)
        doomed = policy.with_name(f".{policy.name}.removed")
        shutil.rmtree(doomed, ignore_errors=True)
        if policy.exists():  # away in one step: a kill leaves neither half a policy nor one without its log
            policy.rename(doomed)
        self._keep_rows("metrics.jsonl", lambda row: row["stage"] != stage)
        if stage == "sft":
            for name in (REPLAY, "surprise.json"):
                (self.folder / name).unlink(missing_ok=True)
        elif stage == "rl":
            (self.folder / "readiness.json").unlink(missing_ok=True)
            shutil.rmtree(self.folder / "verl", ignore_errors=True)  # made anew at every start
        shutil.rmtree(self.working(stage), ignore_errors=True)
        shutil.rmtree(doomed, ignore_errors=True)

    @ranks.by_first
    def _forget_samples(self, policy: str) -> None:
        """Removes the samples of a policy, and the ratings of its answers."""
        if others := [row for row in self.samples() if row["policy"] != policy]:
            self.replace_samples(others)
        else:
            for name in SAMPLES:
                (self.folder / name).unlink(missing_ok=True)
        self._keep_rows("judgments.jsonl", lambda row: row["policy"] != policy)

    @ranks.by_first
    def forget_everything(self) -> None:
        """Removes everything that the run has written, and nothing else that lies in its folder."""
        for stage in reversed(STAGES):
            self.forget(stage)
        for name in ("base.json", "data.json", "changes.jsonl", "metrics.jsonl", "recipe.toml", "env.json"):
            (self.folder / name).unlink(missing_ok=True)

    @contextmanager
    def new_checkpoint(self, policy: str) -> Iterator[Path]:
        """A folder to save into; it takes its name only once complete. Raises RunError when the policy exists.

        Of what an earlier attempt had logged, only the rows up to its last complete checkpoint stay.
        """
        final, stage = self.checkpoint(policy), self.stage_of(policy)
        if final.exists():
            raise RunError(
                f"the '{policy}' policy of this run is already trained",
                str(final),
                "--fresh trains it again, or choose another --out",
            )
        unfinished = final.with_name(f".{policy}.unfinished")
        with handlers_kept():  # training leaves one that puts an interruption off until the policy has its name
            self._begin(unfinished, stage)
            ranks.wait()
            yield unfinished
            ranks.wait()
            self._end(unfinished, final, stage)
            ranks.wait()

    @ranks.by_first
    def _begin(self, unfinished: Path, stage: str) -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        last = self.last_checkpoint(stage)
        kept = itertools.count(0 if last is None else -_mark(last)["rows"])
        self._keep_rows("metrics.jsonl", lambda row: row["stage"] != stage or next(kept) < 0)

    @ranks.by_first
    def _end(self, unfinished: Path, final: Path, stage: str) -> None:
        to_disk(unfinished)
        unfinished.rename(final)
        shutil.rmtree(self.working(stage), ignore_errors=True)

    @ranks.by_first
    def forget_base(self) -> None:
        """The base may be another model from now on."""
        (self.folder / "base.json").unlink(missing_ok=True)

    def require_same_base(self, fingerprint: str) -> None:
        """Raises RunError when the base is not the model this run began with: a folder's content may have changed, and
        a policy must not be compared with, or trained towards, another base than its own."""
        known = self.read_json("base.json")
        if known is None:
            self.write_json("base.json", {"model": self.recipe.model, "fingerprint": fingerprint})
        elif known["fingerprint"] != fingerprint:
            raise RunError(
                "the base model is not the one this run began with: its weights have changed",
                self.recipe.model or str(self.checkpoint("base")),
                "put the former model back, or start anew with another --out",
            )

    @ranks.by_first
    def log(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Appends a row to metrics.jsonl; NaN (the mean reward where nothing was graded) is left out."""
        finite = {k: v for k, v in values.items() if math.isfinite(v)}
        append_jsonl(self.folder / "metrics.jsonl", [{"stage": stage, "step": step, "time": time.time(), **finite}])

    @ranks.by_first
    def add_metrics(self, rows: list[dict[str, Any]]) -> None:
        """Appends rows that another run has logged."""
        append_jsonl(self.folder / "metrics.jsonl", rows)

    def metrics(self, stage: str) -> list[dict[str, Any]]:
        return [row for row in read_jsonl(self.folder / "metrics.jsonl") if row["stage"] == stage]

    def samples(self, policy: str | None = None, task: str | None = None) -> list[dict[str, Any]]:
        """The samples of a policy and a task ("test": the run's own problems), or all there are, in the order in which
        they were drawn."""
        kept, former = (self.folder / name for name in SAMPLES)
        rows = [{"task": OWN_TEST} | row for row in [*read_jsonl(former), *samples.read(kept)]]
        return [row for row in rows if policy in (None, row["policy"]) and task in (None, row["task"])]

    @ranks.by_first
    def add_samples(self, rows: list[dict[str, Any]]) -> None:
        """Adds a batch; a kill leaves all of it or nothing."""
        samples.add(self.folder / SAMPLES[0], rows)

    @ranks.by_first
    def replace_samples(self, rows: list[dict[str, Any]]) -> None:
        samples.replace(self.folder / SAMPLES[0], rows)
        (self.folder / SAMPLES[1]).unlink(missing_ok=True)

    @ranks.by_first
    def _keep_rows(self, name: str, wanted: Callable[[dict[str, Any]], bool]) -> None:
        rows = read_jsonl(self.folder / name)
        kept = [row for row in rows if wanted(row)]
        if len(kept) < len(rows):
            write_atomically(self.folder / name, samples.lines(kept))

    @ranks.by_first
    def write_json(self, name: str, value: Any) -> None:
        write_atomically(self.folder / name, json.dumps(value, indent=1) + "\n")

    def read_json(self, name: str) -> Any:
        """The value stored under that file name, or None."""
        path = self.folder / name
        return json.loads(path.read_text()) if path.is_file() else None


def is_run(folder: Path) -> bool:
    """Whether the folder is a run's: a recipe.toml alone may be a user's own."""
    return (folder / "recipe.toml").is_file() and (folder / "env.json").is_file()


def holds_nothing(folder: Path) -> bool:
    """Whether the folder is empty, or holds only what a run writes before its first number."""
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
    if "recipe.toml" in names and "env.json" not in names:
        return False
    begun = any(folder.glob("checkpoints/[!.]*")) or any(folder.glob("checkpoints/.*/checkpoint-*"))
    return names <= {"recipe.toml", "env.json", "base.json", "data.json", "checkpoints"} and not begun


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
    """The whole text or what was there before, whatever happens meanwhile."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")  # another process may write the same file
    unfinished.unlink(missing_ok=True)
    try:
        with unfinished.open("x", encoding="utf-8") as stream:  # never through a link that somebody laid there
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def to_disk(folder: Path) -> None:
    """Returns once the disk has every file of the folder: a power cut must not leave a mark or a name without them."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _mark(checkpoint: Path) -> dict[str, Any]:
    """What is known of a complete checkpoint; earlier versions noted the logged rows alone."""
    found: Any = json.loads((checkpoint / COMPLETE).read_text())
    return found if isinstance(found, dict) else {"rows": int(found), "files": {}}


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint that was once complete, "" where it never was, None where it is whole."""
    if not (checkpoint / COMPLETE).is_file():
        return ""
    try:
        files = _mark(checkpoint)["files"]
    except ValueError:
        return COMPLETE
    there = {name: path.stat().st_size for name in files if (path := checkpoint / name).is_file()}
    return next((name for name, size in files.items() if there.get(name) != size), None)


def append_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Appends rows in one write; a last line that a kill had cut off goes first."""
    data = samples.lines(rows).encode()
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
