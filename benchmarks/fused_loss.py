"""Time and peak memory of the loss and its gradients, head included: heatbath's engine beside what others do.

    python benchmarks/fused_loss.py                              # CPU: gift and sft, every baseline, 2,048 tokens
    python benchmarks/fused_loss.py --objectives all --rounds 2  # every objective through the engine
    python benchmarks/fused_loss.py --memory                     # one process each, peak memory at two sizes
    python benchmarks/fused_loss.py --preset qwen2.5-7b --tokens 16384 --dtype bf16   # on a GPU

Every variant computes the loss, dh and dW from hidden states and head. Rounds alternate between the variants; a ratio
is the median over rounds of one variant's time to the bare products' of the same round, `cpu_ratio` the same in
CPU-seconds, which other processes disturb less. `gemms` are the products a variant cannot do without, chunk by chunk in
the same loop: logits (and the base's), dh, dW.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.nn.functional as F

from heatbath.ideas.engine import dense_loss, linear_loss
from heatbath.ideas.objectives import OBJECTIVES, objective
from heatbath.ideas.passes import chunk_size
from heatbath.ideas.statistics import REFERENCE_STATS

PRESETS = {"qwen2.5-0.5b": (896, 151_936), "qwen2.5-7b": (3_584, 152_064), "smollm2-135m": (576, 49_152)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HYPER: dict[str, dict[str, Any]] = {"gift": {"beta": 10.0}, "power": {"a": 1.0}, "sed": {"threshold": 0.8}}
SEGMENT = 256  # tokens of a sequence


class Problem:
    """Random hidden states and heads whose labels are about as likely as a text's."""

    def __init__(self, options: argparse.Namespace):
        self.device = torch.device(options.device)
        d, V, N = options.width, options.vocab, options.tokens
        dtype = DTYPES[options.dtype]
        g = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (scale * torch.randn(*shape, generator=g)).to(self.device, dtype)

        self.hidden, self.ref_hidden = normal(N, d), normal(N, d)
        self.head = normal(V, d, scale=3 / d**0.5)
        self.ref_head = normal(V, d, scale=3 / d**0.5)
        self.labels = torch.randint(V, (N,), generator=g).to(self.device)
        self.hidden += 3 * self.head[self.labels] / self.head[self.labels].norm(dim=-1, keepdim=True)
        self.segments = (torch.arange(N) // SEGMENT).to(self.device)
        self.columns = {
            name: -torch.rand(N, generator=g).to(self.device) for name in ("old_logp", "generator_logp", "advantage")
        }
        self.hidden.requires_grad_()
        self.head.requires_grad_()
        self.chunk = options.chunk or chunk_size(self.head)

    def engine(self, name: str, **options: Any) -> torch.Tensor:
        made = objective(name, **HYPER.get(name, {}))
        base = {"ref_hidden": self.ref_hidden, "ref_head": self.ref_head} if needs_base(name) else {}
        return linear_loss(
            made, self.hidden, self.head, self.labels, columns=self.columns, segments=self.segments, **base, **options
        )

    def dense(self, name: str) -> torch.Tensor:
        made = objective(name, **HYPER.get(name, {}))
        with torch.no_grad():
            ref = self.ref_hidden @ self.ref_head.T if needs_base(name) else None
        logits = self.hidden @ self.head.T
        return dense_loss(made, logits, self.labels, ref_logits=ref, columns=self.columns, segments=self.segments).sum()

    def authors_order(self) -> torch.Tensor:
        """The order of operations of zzy1127/GIFT, from its description in docs/gift.md; every tensor [N, V]."""
        beta = float(HYPER["gift"]["beta"])
        with torch.no_grad():
            p = (self.ref_hidden @ self.ref_head.T).float().softmax(-1)
            lifted = torch.log(p + 1e-10)
            lifted.scatter_add_(-1, self.labels[:, None], torch.full_like(lifted[:, :1], beta))
            target = lifted.softmax(-1)
        logp = (self.hidden @ self.head.T).float().log_softmax(-1)
        return -(target * logp).sum(-1).sum()

    def gemms(self, count: int, sequence_passes: int = 0) -> None:
        """The bare products of a loss that needs `count` of them (3 without the base, 4 with it)."""
        h, W, r, U = self.hidden.detach(), self.head.detach(), self.ref_hidden, self.ref_head
        dw = torch.zeros_like(W, dtype=torch.float32)
        dh = torch.empty_like(h)
        z = torch.empty(self.chunk, len(W), dtype=h.dtype, device=h.device)
        base = torch.empty_like(z)
        for start in range(0, len(h), self.chunk):
            part = h[start : start + self.chunk]
            out = z[: len(part)]
            for _ in range(sequence_passes):
                torch.mm(part, W.T, out=out)
            torch.mm(part, W.T, out=out)
            if count == 4:
                torch.mm(r[start : start + self.chunk], U.T, out=base[: len(part)])
            torch.mm(out, W, out=dh[start : start + self.chunk])
            if dw.dtype == out.dtype:
                dw.addmm_(out.T, part)
            elif out.device.type == "cuda":
                torch.addmm(dw, out.T, part, out_dtype=torch.float32, out=dw)
            else:
                dw.add_(out.T @ part)


def needs_base(name: str) -> bool:
    made = objective(name, **HYPER.get(name, {}))
    return bool(REFERENCE_STATS & {*made.needs, *getattr(made, "sequence_needs", ())})


def products(name: str) -> tuple[int, int]:
    """Products of the head that an objective needs: in the main pass, and before it for sequence weights."""
    made = objective(name, **HYPER.get(name, {}))
    return 4 if REFERENCE_STATS & set(made.needs) else 3, len(getattr(made, "sequence_needs", ()))


def variants(problem: Problem, names: list[str]) -> dict[str, Callable[[], None]]:
    """Name → one forward and backward."""

    def both(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            problem.hidden.grad = problem.head.grad = None
            loss().backward()

        return call

    h, W, y = problem.hidden, problem.head, problem.labels
    found: dict[str, Callable[[], None]] = {}
    for name in names:
        found[name] = both(lambda name=name: problem.engine(name, chunk=problem.chunk))
    found["dense gift"] = both(lambda: problem.dense("gift"))
    found["authors' order"] = both(problem.authors_order)
    found["F.cross_entropy"] = both(lambda: F.cross_entropy((h @ W.T).float(), y, reduction="sum"))
    found["F.linear_cross_entropy"] = both(lambda: F.linear_cross_entropy(h, W, y, reduction="sum"))
    if problem.device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

        cross = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["Liger fused CE"] = both(lambda: cross(W, h, y))
        distil = LigerFusedLinearJSD(jsd_beta=0.0)
        found["Liger fused JSD"] = both(lambda: distil(h, W, problem.ref_hidden, problem.ref_head))
    needed = {products(name) for name in names} | {(3, 0), (4, 0)}
    for count, before in sorted(needed):
        label = f"gemms {count + before}" if not before else f"gemms {count}+{before}"
        found[label] = lambda count=count, before=before: problem.gemms(count, before)
    return found


def bare(name: str, names: list[str]) -> str:
    """The bare products that a variant is measured against."""
    if name in names:
        count, before = products(name)
        return f"gemms {count + before}" if not before else f"gemms {count}+{before}"
    return "gemms 4" if name in ("dense gift", "authors' order", "Liger fused JSD") else "gemms 3"


def timed(call: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Seconds, and CPU-seconds of all threads."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started, busy = time.perf_counter(), time.process_time()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - busy


def in_pairs(calls: dict[str, Callable[[], None]], names: list[str]) -> list[str]:
    """The variants in an order in which each stands beside the products it is measured against."""
    order: list[str] = []
    for products_ in [name for name in calls if name.startswith("gemms")]:
        order += [n for n in calls if not n.startswith("gemms") and bare(n, names) == products_] + [products_]
    return order


def time_all(options: argparse.Namespace, names: list[str]) -> list[dict[str, Any]]:
    problem = Problem(options)
    calls = {k: v for k, v in variants(problem, names).items() if not options.only or k in options.only}
    order = in_pairs(calls, names)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    busy: dict[str, list[float]] = {name: [] for name in order}
    memory: dict[str, float] = {}
    for number in range(options.rounds + 1):  # the first warms up
        for name in order:
            call = calls[name]
            if problem.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            taken, used = timed(call, problem.device)
            if problem.device.type == "cuda":
                memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
            if number or options.rounds == 0:
                seconds[name].append(taken)
                busy[name].append(used)
            print(f"round {number} {name}: {taken:.2f} s", file=sys.stderr)
    rows = []
    for name, times in seconds.items():
        beside = bare(name, names)
        ratios = [a / b for a, b in zip(times, seconds.get(beside, []), strict=False)]
        cpu = [a / b for a, b in zip(busy[name], busy.get(beside, []), strict=False)]
        rows.append(
            {
                "variant": name,
                "seconds": round(statistics.median(times), 4),
                "against": beside,
                "ratio": round(statistics.median(ratios), 3) if ratios else None,
                "ratios": [round(x, 3) for x in ratios],
                "cpu_ratio": round(statistics.median(cpu), 3) if cpu and problem.device.type == "cpu" else None,
                **({"extra_gib": round(memory[name], 2)} if name in memory else {}),
            }
        )
    return rows


def peak(options: argparse.Namespace, names: list[str]) -> float:
    """GiB that one variant takes beyond inputs and dW, in this process, which does nothing else."""
    problem = Problem(options)
    call = variants(problem, names)[options.only[0]]
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before - problem.head.numel() * problem.head.element_size() / 2**30


def resident(which: str) -> float:
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith(which)) / 2**20


def measure_memory(options: argparse.Namespace, names: list[str]) -> list[dict[str, Any]]:
    rows = []
    wanted = options.only or [*names, "dense gift", "F.cross_entropy", "F.linear_cross_entropy"]
    for name in wanted:
        for tokens in (options.tokens, *([4 * options.tokens] if name in names else [])):
            command = [sys.executable, __file__, *sys.argv[1:], "--peak", "--tokens", str(tokens), "--only", name]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append({"variant": name, "tokens": tokens, "extra_gib": round(float(found), 3)})
            print(rows[-1], file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="qwen2.5-0.5b")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, help="d; default the preset's")
    parser.add_argument("--vocab", type=int, help="V; default the preset's")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--objectives", default="gift,sft", help="names with commas, or all")
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", help="only this variant; may be repeated")
    parser.add_argument("--memory", action="store_true", help="peak memory, one process per variant (CPU)")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--commit", default="", help="written into the result")
    options = parser.parse_args()
    options.width = options.width or PRESETS[options.preset][0]
    options.vocab = options.vocab or PRESETS[options.preset][1]
    names = list(OBJECTIVES) if options.objectives == "all" else options.objectives.split(",")
    if options.peak:
        print(peak(options, names))
        return
    rows = measure_memory(options, names) if options.memory else time_all(options, names)
    on = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    facts = {
        "command": " ".join(["python", "benchmarks/fused_loss.py", *sys.argv[1:]]),
        "commit": options.commit,
        "device": on,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "shape": {"N": options.tokens, "d": options.width, "V": options.vocab, "dtype": options.dtype},
        "rows": rows,
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
