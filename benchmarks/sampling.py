"""Sampling on a CPU: transformers' own `generate` in batches of 64, and what the local engine does to it, step by step.

    python benchmarks/sampling.py                        # the tiny base: a minute
    python benchmarks/sampling.py --model smollm2-135m --prompts 4 --rounds 2 --variants generate once automatic

Every prompt gets 8 completions at temperature 1; for a real model three prompts in four are longer by a few words.
Rounds go through the variants in turn; `tokens per second` is the median over rounds in CPU-seconds (which other
processes disturb less), `ratio` the median over rounds of a variant's to that of the first in the same round.
Tokens count up to EOS.

generate      batches of 64; a row that has ended is computed until the last has
drawn         the same with a random stream for each row
once          and a prompt's 8 completions share the pass over it
dropped       and rows are dropped from the batch as they end
automatic     and as many rows as fit and pay: the engine as it is
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import transformers
from transformers import GenerationConfig

from heatbath.data import arithmetic, rendering
from heatbath.engines import local
from heatbath.engines.local import LocalSampler
from heatbath.engines.sampling import Sampling, until_eos
from heatbath.models import load_tokenizer

GROUP, FIXED = 8, 64
Variant = Callable[[LocalSampler, list[list[int]], Sampling], list[list[int]]]


@torch.inference_mode()
def generate(sampler: LocalSampler, prompts: list[list[int]], settings: Sampling) -> list[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    found, model, pad = [], sampler.model, sampler.pad_id
    model.generation_config = GenerationConfig(eos_token_id=sampler.eos_ids, pad_token_id=pad)
    for start in range(0, len(order), FIXED):
        rows = [prompts[i] for i in order[start : start + FIXED]]
        width = len(rows[0])
        out = model.generate(
            input_ids=torch.tensor([[pad] * (width - len(row)) + row for row in rows]),
            attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
            do_sample=True,
            temperature=settings.temperature,
            top_k=0,
            max_new_tokens=settings.max_new_tokens,
        )
        found += [until_eos(row, sampler.eos_ids) for row in out[:, width:].tolist()]
    return found


def engine(batch: int | None, *, dropped: bool = True, once: bool = True) -> Variant:
    def run(sampler: LocalSampler, prompts: list[list[int]], settings: Sampling) -> list[list[int]]:
        sampler.batch = batch
        share = LocalSampler._shared if once else lambda *_: None
        with (
            mock.patch.object(LocalSampler, "_shared", share),
            mock.patch.object(local, "DROPPED", 1 / 8 if dropped else 1.0),
        ):
            return [c.ids for group in sampler.sample(prompts, settings, 0) for c in group]

    return run


VARIANTS: dict[str, Variant] = {
    "generate": generate,
    "drawn": engine(FIXED, dropped=False, once=False),
    "once": engine(FIXED, dropped=False),
    "dropped": engine(FIXED),
    "automatic": engine(None),
}


def asked(name: str, tokenizer: Any, count: int) -> list[list[int]]:
    sums = arithmetic.problems(2, ("+",), count, 0, held_out=False)
    rows = arithmetic.rows(sums, ("tens",), paths=1, label_noise=0.0, seed=0)
    texts = [f"{'Take your time. ' * (0 if name == 'tiny' else i % 4)}{row.question}" for i, row in enumerate(rows)]
    prompts = [rendering.prompt_ids(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    return [prompt for prompt in prompts for _ in range(GROUP)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=128, help="most of a completion")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--commit", default="", help="written into the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(options.model)
    sampler = LocalSampler(options.model, tokenizer, precision=options.precision)
    prompts, settings = asked(options.model, tokenizer, options.prompts), Sampling(1.0, 1.0, options.tokens)
    rates: dict[str, list[float]] = {name: [] for name in options.variants}
    lengths: list[int] = []
    for number in range(options.rounds):
        for name in options.variants if number % 2 else options.variants[::-1]:
            started = time.process_time()
            found = VARIANTS[name](sampler, prompts, settings)
            spent = time.process_time() - started
            rates[name].append(sum(map(len, found)) / spent)
            lengths = lengths or sorted(map(len, found))
            print(f"round {number} {name}: {rates[name][-1]:.0f} tokens per second", file=sys.stderr)
    facts = {
        "command": " ".join(["python", "benchmarks/sampling.py", *sys.argv[1:]]),
        "commit": options.commit,
        "device": platform.machine(),
        "threads": 1,
        "dtype": str(sampler.model.dtype),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "completions": len(prompts),
        "length": {"shortest": lengths[0], "median": lengths[len(lengths) // 2], "longest": lengths[-1]},
        "automatic batch": local.fitting(
            sampler.model, max(map(len, prompts)), options.tokens, local._cache_of(sampler.model)[0]
        ),
        "tokens per second": {name: round(statistics.median(found)) for name, found in rates.items()},
        "ratio": {
            name: round(statistics.median(a / b for a, b in zip(found, rates[options.variants[0]], strict=True)), 2)
            for name, found in rates.items()
        },
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
