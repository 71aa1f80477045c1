"""How long `import heatbath`, `heatbath --help` and `heatbath recipes` take, each in a fresh process.

    python benchmarks/startup.py [--repeat 15] [--out benchmarks/results/startup-NAME.json]

The interpreter's own start is measured beside them, in turn, and given apart.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from made_with import made_with

COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "import heatbath": [sys.executable, "-c", "import heatbath"],
    "heatbath --help": [sys.executable, "-m", "heatbath", "--help"],
    "heatbath recipes": [sys.executable, "-m", "heatbath", "recipes"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(arguments.repeat):
        for name, command in COMMANDS.items():
            started = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - started)
    found = {name: {"median": statistics.median(s), "worst": max(s)} for name, s in seconds.items()}
    bare = found["python -c pass"]["median"]
    for name, s in found.items():
        print(
            f"{name:18} {s['median']:.3f} s  (worst {s['worst']:.3f}; {s['median'] - bare:.3f} beyond the interpreter)"
        )
    if arguments.out:
        record = {
            **made_with(f"python benchmarks/startup.py --repeat {arguments.repeat}"),
            "seconds": found,
        }
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
