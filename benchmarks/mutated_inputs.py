"""What heatbath says to thousands of wrong inputs: shipped recipes and data files, mutated, each through a command.

    python benchmarks/mutated_inputs.py --recipes 1200 --data 1200 --out benchmarks/results/mutated-inputs-NAME.txt
    python benchmarks/mutated_inputs.py --recipes 0 --data 200 --seed 3 --only rows --show      # a part of it

The inputs are those of tests/mutated_recipes.py and tests/mutated_data.py; tests/mutation_oracle.py says what may come
of each. Every case runs in a process of its own, forked from one that has imported everything, with a limit of time and
of memory. The same `--seed` draws the same inputs. Prints outcomes by kind of mutation, and exits with 1 when one is
not what its kind demands. Needs the tiny base (it is pretrained where the cache does not hold it).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import os
import pickle
import platform
import resource
import select
import signal
import sys
import time
import traceback
from collections import Counter, defaultdict
from pathlib import Path

from made_with import commit

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")  # as the command line sets it, before the libraries are imported

import mutation_oracle
from mutation_oracle import Case, Outcome

MEMORY = 16 << 30  # bytes of address space beyond which a case has gone wrong
GRACE_SECONDS = 10.0


def in_a_process(case: Case) -> tuple[Outcome, float]:
    """The outcome in a forked process, and its seconds; one that dies or does not end has escaped."""
    started = time.monotonic()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silent, stream)
        try:
            found = mutation_oracle.outcome(case)
        except BaseException:  # noqa: BLE001 - the process ends here, and says why
            found = Outcome(1, "", escaped=traceback.format_exc())
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(found, pipe)
        os._exit(0)
    os.close(writer)
    content = b""
    with os.fdopen(reader, "rb") as pipe:
        end = started + mutation_oracle.SECONDS + GRACE_SECONDS
        while select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
            piece = os.read(pipe.fileno(), 1 << 20)
            if not piece:
                break
            content += piece
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    seconds = time.monotonic() - started
    try:
        return pickle.loads(content), seconds  # what our own child has written
    except (EOFError, pickle.UnpicklingError):
        return Outcome(1, "", escaped=f"the process ended with status {status} and no result"), seconds


def preload() -> None:
    from heatbath.stages.compare import PRELOADED

    for name in (*PRELOADED, "heatbath.cli", "heatbath.stages.plan", "pyarrow.parquet", "datasets", "reasoning_gym"):
        importlib.import_module(name)


def run(cases: list[Case], show: bool) -> tuple[dict[str, Counter[str]], list[str]]:
    """Outcomes by kind of mutation, and every failure with its case."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    failed = []
    for number, case in enumerate(cases):
        seen, seconds = in_a_process(case)
        wrong = mutation_oracle.failures(case, seen)
        said = "taken" if seen.code == 0 else "refused" if seen.code == 2 else f"exit {seen.code}"
        counts[case.kind]["escaped" if seen.escaped else said] += 1
        counts[case.kind]["failed"] += bool(wrong)
        counts["all"]["slowest, ms"] = max(counts["all"]["slowest, ms"], round(1000 * seconds))
        if wrong:
            failed.append(f"{number}: {case.kind}: {case.note!a}\n    " + "\n    ".join(wrong))
            if show:
                print(failed[-1], "\n", seen.said[-1500:], seen.escaped[-1800:], flush=True)
    return counts, failed


def table(counts: dict[str, Counter[str]]) -> str:
    columns = ("refused", "taken", "exit 1", "escaped", "failed")
    lines = ["| mutation | cases | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    total: Counter[str] = Counter()
    for kind, found in sorted(counts.items()):
        if kind == "all":
            continue
        total += found
        lines.append(_line(kind, found, columns))
    return "\n".join([*lines, _line("all", total, columns)])


def _line(kind: str, found: Counter[str], columns: tuple[str, ...]) -> str:
    cases = sum(found[c] for c in columns if c != "failed")
    return f"| {kind} | {cases} | " + " | ".join(str(found[c]) for c in columns) + " |"


def about() -> str:
    names = ("heatbath", "torch", "transformers", "trl", "datasets", "pyarrow", "pydantic", "typer")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().split("\n") if cpu.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.processor())
    command = " ".join(["python", "benchmarks/mutated_inputs.py", *sys.argv[1:]])
    made_with = f"commit {commit()}, Python {platform.python_version()}, {versions}"
    return f"$ {command}\n{made_with}\n{model}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipes", type=int, default=1200)
    parser.add_argument("--data", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds of mutation whose name holds this")
    parser.add_argument("--show", action="store_true", help="print each failure when it comes")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import mutated_data
    import mutated_recipes

    preload()
    said, failures, started = [about()], 0, time.monotonic()
    for title, made in (
        ("recipes", mutated_recipes.cases(options.recipes, options.seed)),
        ("data files", mutated_data.cases(options.data, options.seed)),
    ):
        chosen = [case for case in made if options.only in case.kind]
        counts, failed = run(chosen, options.show)
        slowest = counts["all"]["slowest, ms"] / 1000
        said += [f"\n{len(chosen):,} mutated {title}, slowest {slowest:.1f} s\n", table(counts), *failed]
        failures += len(failed)
    said.append(f"\n{failures} failures in {time.monotonic() - started:.0f} s")
    text = "\n".join(said)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
