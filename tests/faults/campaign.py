"""Runs of every stage that are killed, interrupted, starved and damaged at random, and must end as if nothing had been.

    python tests/faults/campaign.py --faults 200 [--seed 0] [--out benchmarks/results/faults-NAME.jsonl]

A case is a run that meets faults one after another, each at a random moment, and goes on with --resume after each. At
its end weights, log, samples and results must equal those of a run that nobody disturbed, bit for bit. Between, every
process must end with the exit code that its fault asks for and a named error, never with a traceback; and after an
interruption the newest checkpoint holds the last step that was logged.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1])]

import psutil  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from forked import Forked  # noqa: E402 - the path above comes first
from heatbath import samples  # noqa: E402

DATA = """
model = "BASE"
[data]
source = "arithmetic"
demos = 48
validation = 8
prompts = 24
test = 6
"""
SFT = """
[sft]
objective = {objective}
reference = "{reference}"
lr = 5e-4
epochs = 3
batch = 8
micro_batch = 8
save_every = {save}
"""
RL = """
[rl]
policy = {policy}
lr = 1e-4
prompts = 8
update_prompts = 4
group_size = 4
micro_batch = 16
epochs = 2
max_new_tokens = 26
kl_every = 2
readiness = 4
save_every = {save}
[reward]
profile = "paper"
"""
EVAL = """
[eval]
samples = 2
k = [1]
max_new_tokens = 26
batch = 6
"""
PREFERENCE = """
[preference]
method = "dpo"
data = "sums"
lr = 3e-5
max_steps = 12
batch = 8
micro_batch = 8
save_every = 3
"""
PRETRAIN = """
[data]
source = "arithmetic"
demos = 600
validation = 0
prompts = 0
test = 6
[pretrain]
width = 32
layers = 2
epochs = 2
batch = 32
save_every = 8
"""
GIFT = '{ name = "gift", beta = 8.0 }'
RECIPES = {
    "gift, surprise cache": DATA
    + SFT.format(objective=GIFT, reference="surprise", save=4)
    + RL.format(policy='"paper"', save=2)
    + EVAL,
    "psft and relift, no checkpoints": DATA
    + SFT.format(objective='{ name = "psft", refresh = 5 }', reference="model", save=0)
    + RL.format(policy='{ name = "relift", sft_batch = 4 }', save=0)
    + EVAL,
    "hidden cache and implicit": DATA
    + SFT.format(objective=GIFT, reference="hidden", save=3)
    + RL.format(policy='"implicit"', save=4)
    + EVAL,
    "preference": DATA.replace("demos = 48", "demos = 0") + PREFERENCE + EVAL,
    "pretrain": PRETRAIN + EVAL,
}
TIMED = ("time", "tokens_per_second", "step_seconds")
DRAWN = ("policy", "problem", "seed", "ids", "status")
PATIENCE = 300  # seconds; only a guard against a process that never ends


class FaultError(AssertionError):
    """A run did not survive as it should."""


@dataclass
class Case:
    """A run under faults: its recipe, folder, the cache of its own, and what it has met."""

    name: str
    folder: Path
    cache: Path
    draw: random.Random
    seconds: float  # of the undisturbed run
    said: list[dict[str, Any]] = field(default_factory=list)
    mounted: bool = False
    heard: str = ""  # what the last process said

    @property
    def out(self) -> Path:
        return self.disk / "out"

    @property
    def disk(self) -> Path:
        """What the run's folder lies on, and what may fill it."""
        return self.folder / "disk"

    def start(self) -> Forked:
        arguments = ["run", "r.toml", "--out", "disk/out", "--resume"]
        return Forked(*arguments, cwd=self.folder, environment={"HEATBATH_CACHE": str(self.cache)})

    def while_it_runs(self, process: Forked) -> bool:
        """Waits for a random moment; whether the process still runs then."""
        ends = time.monotonic() + self.draw.uniform(0.0, 0.6 * self.seconds)
        while time.monotonic() < ends and process.poll() is None:
            time.sleep(0.005)
        return process.poll() is None

    def ended(self, process: Forked, *codes: int) -> int:
        """The exit code, which must be one of these; the process must have said no traceback, and named its error."""
        code = process.wait(PATIENCE)
        if code is None:
            process.kill()
            raise FaultError(f"did not end\n{process.said()}")
        said = process.said()
        if code not in codes or "Traceback" in said or (code in (1, 2) and "error:" not in said):
            raise FaultError(f"ended with {code}, expected {codes}\n{said}")
        self.heard = said
        return code


# Faults: each is met by one process of the run, and returns what became of it; None where it came too late.


def killed(case: Case) -> str | None:
    process = case.start()
    if not case.while_it_runs(process):
        return late(case, process)
    process.kill()
    case.ended(process, -signal.SIGKILL, 0)
    return "killed"


def interrupted(case: Case, number: signal.Signals = signal.SIGTERM, *, twice: bool = False) -> str | None:
    before = checkpoints(case)
    process, started = case.start(), time.time()
    if not case.while_it_runs(process):
        return late(case, process)
    process.kill(number)
    if twice:
        time.sleep(case.draw.uniform(0, 0.2))
        with contextlib.suppress(ProcessLookupError):
            process.kill(number)
    code = case.ended(process, 130, -number, 0)  # −number: before heatbath could listen
    if code == 130 and not twice:
        nothing_lost(case, started, before)
    return f"ended with {code}"


def terminated(case: Case) -> str | None:
    return interrupted(case)


def typed(case: Case) -> str | None:
    return interrupted(case, signal.SIGINT)


def impatient(case: Case) -> str | None:
    return interrupted(case, twice=True)


def checkpoints(case: Case) -> dict[str, int]:
    """The newest whole checkpoint of each stage that is in progress."""
    working = [p for p in (case.out / "checkpoints").glob(".*") if not p.name.endswith((".unfinished", ".removed"))]
    return {
        stage.name[1:]: max(
            (int(p.name.rpartition("-")[2]) for p in stage.glob("checkpoint-*") if (p / "complete").is_file()),
            default=0,
        )
        for stage in working
    }


def nothing_lost(case: Case, since: float, before: dict[str, int]) -> None:
    """After an interruption the newest checkpoint of the stage in progress is none before the one that was there, and
    holds the last step logged `since` then: the rows of a process that was ended at once earlier lie there until the
    stage begins again."""
    for stage, kept in checkpoints(case).items():
        steps = [row["step"] for row in rows(case.out) if row["stage"] == stage and row["time"] >= since]
        if kept < max([*steps, before.get(stage, 0)]):
            raise FaultError(f"{stage}: {steps} were logged after {before}, and the newest checkpoint is {kept}")


def full_disk(case: Case) -> str | None:
    process = case.start()
    if not case.while_it_runs(process):
        return late(case, process)
    filler = case.disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as stream:
        left = case.draw.choice((0, 0, 5_000, 200_000))
        stream.truncate(0)
        os.posix_fallocate(stream.fileno(), 0, max(1, shutil.disk_usage(case.disk).free - left))
    code = case.ended(process, 1, 0)
    filler.unlink(missing_ok=True)
    return f"ended with {code}"


def truncated_checkpoint(case: Case) -> str | None:
    """A kill, and a file of the newest checkpoint that the disk has lost the end of: the next process says so where the
    checkpoint had been complete, and goes on from the one before."""
    process = case.start()
    if not case.while_it_runs(process):
        return late(case, process)
    process.kill()
    case.ended(process, -signal.SIGKILL, 0)
    found = sorted(case.out.glob("checkpoints/.*/checkpoint-*"), key=lambda p: p.stat().st_mtime)
    if not found:
        return "killed, with no checkpoint to damage"
    complete = (found[-1] / "complete").is_file()
    file = case.draw.choice(sorted(p for p in found[-1].rglob("*") if p.is_file() and p.stat().st_size))
    os.truncate(file, case.draw.randrange(file.stat().st_size))
    case.ended(case.start(), 0)
    if complete and "damaged" not in case.heard and f"{found[-1].parent.name[1:]}: finished before" not in case.heard:
        raise FaultError(f"{file} was truncated, and nobody said so\n{case.heard}")
    return f"truncated {file.name}, ended with 0"


def truncated_policy(case: Case) -> str | None:
    """A finished policy that is damaged: the next stage names it; put back, the run goes on."""
    process = case.start()
    if not case.while_it_runs(process):
        return late(case, process)
    process.kill()
    case.ended(process, -signal.SIGKILL, 0)
    found = sorted(case.out.glob("checkpoints/[!.]*/model.safetensors"))
    if not found:
        return "killed, with no policy to damage"
    file = case.draw.choice(found)
    whole = file.read_bytes()
    os.truncate(file, case.draw.randrange(len(whole)))
    code = case.ended(case.start(), 0, 1, 2)  # 0 where nobody needs it any more
    file.write_bytes(whole)
    return f"truncated {file.parent.name}, the next process ended with {code}"


def lost_shard(case: Case) -> str | None:
    """A file of the reference cache goes while the run works, or before it goes on."""
    process = case.start()
    if not case.while_it_runs(process):
        return late(case, process)
    alive = case.draw.random() < 0.5
    if not alive:
        process.kill()
        case.ended(process, -signal.SIGKILL, 0)
    shards = sorted(case.cache.glob("reference/*/shard-*"))
    if shards:
        shutil.rmtree(case.draw.choice(shards), ignore_errors=True)
    if alive:
        code = case.ended(process, 0, 1)
        return f"{'deleted a shard' if shards else 'no shard yet'} under it, ended with {code}"
    return "killed, then deleted a shard" if shards else "killed, no shard yet"


def lost_grader(case: Case) -> str | None:
    """Workers that grade are killed, one after another; the run goes on, or says so where they were too many."""
    process = case.start()
    hit = 0
    ends = time.monotonic() + 0.6 * case.seconds
    while process.poll() is None and time.monotonic() < ends:
        if case.while_it_runs(process):
            workers = graders(process)
            for worker in case.draw.sample(workers, min(1, len(workers))):
                with contextlib.suppress(psutil.Error):
                    worker.kill()
                    hit += 1
    code = case.ended(process, 0, 1)
    if code and "killed by SIGKILL" not in case.heard:
        raise FaultError(f"{hit} graders were killed, and it ended for another reason\n{case.heard}")
    return f"{hit} graders killed, ended with {code}" if hit else None


def graders(process: Forked) -> list[psutil.Process]:
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if any("heatbath.verify.worker" in part or part.endswith("worker.py") for part in child.cmdline()):
                    found.append(child)
    return found


def late(case: Case, process: Forked) -> None:
    case.ended(process, 0)


FAULTS: dict[str, Callable[[Case], str | None]] = {
    "kill -9": killed,
    "SIGTERM": terminated,
    "SIGINT": typed,
    "SIGTERM twice": impatient,
    "full disk": full_disk,
    "truncated checkpoint": truncated_checkpoint,
    "truncated policy": truncated_policy,
    "deleted cache shard": lost_shard,
    "grader crash": lost_grader,
}


# The runs, and what their end is held against.


def rows(out: Path) -> list[dict[str, Any]]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def left(out: Path) -> dict[str, Any]:
    """What a finished run has left, without what a clock decides."""
    policies = [p for p in (out / "checkpoints").iterdir() if not p.name.startswith(".")]
    return {
        "weights": {p.name: load_file(p / "model.safetensors") for p in policies},
        "log": [{k: v for k, v in row.items() if k not in TIMED} for row in rows(out)],
        "samples": sorted(
            (s["policy"], s["problem"], s["seed"], s["ids"], s["status"])
            for s in samples.read(out / "samples.jsonl.gz")
        ),
        "results": json.loads((out / "results.json").read_text()),
        "leftovers": sorted(p.name for p in (out / "checkpoints").iterdir() if p.name.startswith(".")),
    }


def require_same(found: dict[str, Any], whole: dict[str, Any]) -> None:
    for name in ("log", "samples", "results", "leftovers"):
        if found[name] != whole[name]:
            raise FaultError(f"another {name} than the undisturbed run's:\n{found[name]}\n{whole[name]}"[:4000])
    if found["weights"].keys() != whole["weights"].keys():
        raise FaultError(f"policies {[*found['weights']]}, not {[*whole['weights']]}")
    for policy, weights in whole["weights"].items():
        for name, w in weights.items():
            if not (found["weights"][policy][name] == w).all():
                raise FaultError(f"{policy}: {name} differs from the undisturbed run's")


def undisturbed(name: str, folder: Path, base: str) -> tuple[dict[str, Any], float]:
    """What the recipe leaves when nobody disturbs it, and in how many seconds."""
    case = Case(name, folder, folder / "cache", random.Random(0), 0.0)
    prepare(case, base)
    started = time.monotonic()
    case.ended(case.start(), 0)
    return left(case.out), time.monotonic() - started


def prepare(case: Case, base: str) -> None:
    case.folder.mkdir(parents=True)
    (case.folder / "r.toml").write_text(RECIPES[case.name].replace("BASE", base))


@contextlib.contextmanager
def small_disk(case: Case) -> Iterator[None]:
    """The run's folder on a disk of its own that a filler can fill, where this process may mount one."""
    case.disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "none", str(case.disk)], capture_output=True)
    case.mounted = mounted.returncode == 0
    try:
        yield
    finally:
        if case.mounted:
            subprocess.run(["umount", "-l", str(case.disk)], check=True)


def endure(name: str, folder: Path, base: str, seed: int, whole: tuple[dict[str, Any], float], most: int) -> list[dict]:
    """The faults that a run has met, until it came to its end; at most so many. Raises FaultError."""
    case = Case(name, folder, folder / "cache", random.Random(seed), whole[1])
    prepare(case, base)
    with small_disk(case):
        kinds = [k for k in FAULTS if case.mounted or k != "full disk"]
        while len(case.said) < most:
            kind = case.draw.choice(kinds)
            try:
                outcome = FAULTS[kind](case)
                if outcome is not None:
                    case.said.append({"recipe": name, "seed": seed, "fault": kind, "outcome": outcome})
                if (case.out / "report.html").is_file():
                    break
            except FaultError as error:
                raise FaultError(f"{name}, seed {seed}, after {case.said}: {kind}: {error}") from None
        for _ in range(3):
            if case.ended(case.start(), 0, 1, 2) == 0:
                break
        try:
            require_same(left(case.out), whole[0])
        except FaultError as error:
            raise FaultError(f"{name}, seed {seed}, after {case.said}: {error}") from None
    shutil.rmtree(folder, ignore_errors=True)
    return case.said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background job ignores it, and so do its children
    from heatbath import models

    base, met, failed, number = models.resolve("tiny"), [], [], asked.seed
    with tempfile.TemporaryDirectory(prefix="heatbath-faults-") as folder:
        place = Path(folder)
        whole = {name: undisturbed(name, place / f"whole-{i}", base) for i, name in enumerate(RECIPES)}
        for name, (_, seconds) in whole.items():
            print(f"{name}: {seconds:.0f} s undisturbed", flush=True)
        while len(met) < asked.faults:
            name = [*RECIPES][number % len(RECIPES)]
            try:
                met += endure(name, place / str(number), base, number, whole[name], most=8)
            except FaultError as error:
                failed.append(str(error).replace(str(models.cache_folder()), "CACHE").replace(folder, "FOLDER"))
                print(f"FAILED: {error}", flush=True)
            number += 1
            print(f"{len(met)} faults, {number - asked.seed} runs, {len(failed)} failed", flush=True)
    print("\n".join(f"{kind:24} {count}" for kind, count in Counter(m["fault"] for m in met).most_common()))
    if asked.out:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        head = {
            "command": f"python tests/faults/campaign.py --faults {asked.faults} --seed {asked.seed}",
            "commit": commit.stdout.strip(),
            "python": platform.python_version(),
            "cores": os.cpu_count(),
            "faults": len(met),
            "runs": number - asked.seed,
            "failed": failed,
            "by kind": Counter(m["fault"] for m in met),
        }
        asked.out.write_text("\n".join(json.dumps(row) for row in (head, *met)) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
