"""How much a CPU training step gains when freed memory is kept: python benchmarks/allocator.py

Each measurement is a fresh process: a few forward-backward-update steps of a Llama of SmolLM2-135M's shape (random
weights, bf16 products), the median step of it. With and without alternate, so that a drifting machine hurts both alike.
Prints one JSON line: seconds of each, and the ratio without / with, pair by pair.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time


def measure(keep: bool, rows: int, width: int, steps: int) -> float:
    """Median seconds of one step, in this process."""
    if keep:
        from heatbath.allocator import keep_freed_memory

        assert keep_freed_memory()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=49152, num_key_value_heads=3, tie_word_embeddings=True, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    ids = torch.randint(49152, (rows, width))
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--one", choices=["with", "without"], help="measure here and print the seconds")
    args = parser.parse_args()
    if args.one:
        print(measure(args.one == "with", args.rows, args.width, args.steps))
        return
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    for _ in range(args.pairs):
        for which, found in seconds.items():
            command = [sys.executable, __file__, "--one", which, "--rows", str(args.rows), "--width", str(args.width)]
            out = subprocess.run([*command, "--steps", str(args.steps)], capture_output=True, text=True, check=True)
            found.append(float(out.stdout.split()[-1]))
    ratios = [a / b for a, b in zip(seconds["without"], seconds["with"], strict=True)]
    machine = {"cores": os.cpu_count(), "platform": platform.platform()}
    print(json.dumps({"seconds": seconds, "without / with": ratios, "rows": args.rows, "width": args.width, **machine}))


if __name__ == "__main__":
    main()
