"""What a step of a 7B and of a 70B model costs on 8 to 512 GPUs, by counting: the tables of docs/scale.md.

    python benchmarks/scale_model.py [--out benchmarks/results/scale-model.json]

Nothing is measured here. Operations: 2 per parameter and token forward, 4 backward, 2 more where activations are
recomputed, 2 more for the base's own pass. Bytes on the wire of each GPU and micro-batch under FSDP2: the weights in
16 bits gathered forward and backward, the gradients reduced and scattered in 16 bits; the base's weights gathered once
more where it is sharded beside the policy. Memory: docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from heatbath.ideas.passes import chunk_tokens
from heatbath.stages.cost import BACKWARD, FORWARD, PEAK, TRAINING

GIB = 2**30
NODE = 8  # GPUs that NVLink joins
NVLINK, NETWORK = 450e9, 50e9  # bytes a second and GPU, one way: H200's NVLink, 400 Gb/s of network for each GPU


@dataclass(frozen=True)
class Shape:
    name: str
    parameters: float
    layers: int
    d: int
    ff: int
    kv: int
    V: int


SHAPES = (
    Shape("7B (Qwen2.5)", 7.62e9, 28, 3584, 18944, 512, 152_064),
    Shape("70B (Llama 3.1)", 70.6e9, 80, 8192, 28672, 1024, 128_256),
)
ROWS, LENGTH, MICRO = 128, 8192, 1  # the paper's batch and longest sequence, one sequence at a time


@dataclass(frozen=True)
class Step:
    """An optimizer step of GIFT on every one of `gpus`."""

    model: str
    gpus: int
    reference: str
    memory: float  # GiB
    computing: float  # seconds
    communicating: float  # seconds, if nothing of it hides behind computing
    gigabytes: float  # on the wire of each GPU


def step(shape: Shape, gpus: int, reference: str) -> Step:
    """`reference`: "sharded" beside the policy, or "cache" on disk."""
    sharded = reference == "sharded"
    per_token = 2 * FORWARD + BACKWARD + (FORWARD if sharded else 0)
    rows = max(ROWS, gpus * MICRO)  # beyond the paper's batch every GPU has one sequence
    computing = per_token * shape.parameters * rows * LENGTH / (gpus * PEAK * TRAINING)
    micro_batches = rows // (gpus * MICRO)
    gathered = 2 * shape.parameters * (gpus - 1) / gpus
    wire = micro_batches * (2 * gathered + gathered + (gathered if sharded else 0))
    speed = NVLINK if gpus <= NODE else NETWORK
    return Step(shape.name, gpus, reference, memory(shape, gpus, sharded) / GIB, computing, wire / speed, wire / 1e9)


def memory(shape: Shape, gpus: int, sharded_base: bool) -> float:
    """Bytes on each GPU: 16 per parameter shared out (and 4 of a sharded base), two layers and the head gathered in 16
    bits, the activations that checkpointing keeps and those of one layer, and a chunk of logits of policy and base."""
    held = (16 + (4 if sharded_base else 0)) * shape.parameters / gpus
    layer = (shape.parameters - 2 * shape.V * shape.d) / shape.layers
    gathered = 2 * (2 * layer + 2 * shape.V * shape.d)
    tokens = MICRO * LENGTH
    whole = tokens * (4 * 7 * shape.d + 2 * (6 * shape.d + 3 * shape.kv + 4 * shape.ff))
    kept = tokens * shape.layers * 2 * shape.d
    head_gradient = 4 * shape.V * shape.d
    logits = 2 * 6 * min(tokens, chunk_tokens(shape.V, "cuda")) * shape.V
    return held + gathered + whole + kept + head_gradient + logits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    steps = [
        step(shape, gpus, reference)
        for shape in SHAPES
        for reference in ("sharded", "cache")
        for gpus in (8, 16, 32, 64, 128, 256, 512)
    ]
    print("| model | base | GPUs | memory, GiB | computing, s | communicating, s | on the wire, GB |")
    print("|---|---|---|---|---|---|---|")
    for s in steps:
        print(
            f"| {s.model} | {s.reference} | {s.gpus} | {s.memory:.0f} | {s.computing:.1f} | {s.communicating:.1f} | "
            f"{s.gigabytes:.0f} |"
        )
    if asked.out:
        record = {"command": "python benchmarks/scale_model.py", "steps": [asdict(s) for s in steps]}
        asked.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
