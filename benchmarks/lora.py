"""LoRA from the base to an exported model, and what the reference costs in memory: adapters off need no second model.

    python benchmarks/lora.py [--model smollm2-135m] [--rounds 2] [--out benchmarks/results/lora-NAME.json]

Warm start and RL with adapters, each with a reference (GIFT; GRPO with a KL to the start) and without (SFT; GRPO
without KL), in processes of their own: peak resident memory of each, and the ratios. Then the run with references is
exported merged and as an adapter, which compares the logits of what it wrote with the run's own policy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from made_with import made_with

GIB = 2**30
RECIPE = """
model = "{model}"
[data]
source = "arithmetic"
demos = 64
validation = 0
prompts = 8
test = 4
[lora]
rank = 16
[sft]
objective = {objective}
lr = 2e-4
max_steps = 4
batch = 16
micro_batch = 8
save_every = 0
[rl]
policy = {{ name = "grpo", kl = {kl} }}
lr = 1e-5
max_steps = 2
prompts = 4
update_prompts = 4
group_size = 4
micro_batch = 8
max_new_tokens = 24
readiness = 0
kl_every = 1000
save_every = 0
[eval]
samples = 1
k = [1]
max_new_tokens = 24
"""
WITH = {"objective": '{ name = "gift", beta = 8.0 }', "kl": 0.05}
WITHOUT = {"objective": '{ name = "sft" }', "kl": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    peaks: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for number in range(asked.rounds):
            for kind, settings in (("with", WITH), ("without", WITHOUT)):
                (place / f"{kind}.toml").write_text(RECIPE.format(model=asked.model, **settings))
                for stage in ("sft", "rl"):
                    peak = run(place, stage, f"{kind}.toml", "--out", f"{kind}-{number}")
                    peaks.setdefault(f"{stage} {kind} a reference", []).append(peak / GIB)
        exported = {}
        for name, options in (("merged", []), ("adapter", ["--adapter"])):
            run(place, "export", "with-0", "--out", name, *options)
            exported[name] = sorted(p.name for p in (place / name).iterdir())
    ratios = {
        stage: statistics.median(peaks[f"{stage} with a reference"])
        / statistics.median(peaks[f"{stage} without a reference"])
        for stage in ("sft", "rl")
    }
    for name, found in peaks.items():
        print(f"{name:24} {', '.join(f'{peak:.2f}' for peak in found)} GiB")
    print(", ".join(f"{stage}: {ratio:.3f}" for stage, ratio in ratios.items()))
    if asked.out:
        record = {
            **made_with(f"python benchmarks/lora.py --model {asked.model} --rounds {asked.rounds}"),
            "peak GiB": peaks,
            "ratio": ratios,
            "exported": exported,
        }
        asked.out.write_text(json.dumps(record, indent=1) + "\n")


def run(folder: Path, *arguments: str) -> int:
    """Peak resident memory, in bytes, of a command that must succeed."""
    with (folder / "said.txt").open("w") as said:
        started = subprocess.Popen([sys.executable, "-m", "heatbath", *arguments], cwd=folder, stdout=said, stderr=said)
        _, status, usage = os.wait4(started.pid, 0)
        started.returncode = os.waitstatus_to_exitcode(status)
    if started.returncode:
        sys.exit(f"heatbath {' '.join(arguments)} ended with {started.returncode}\n{(folder / 'said.txt').read_text()}")
    return usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
