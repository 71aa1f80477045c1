"""Shipped recipes that pass on any machine: the model, rows and tasks that it may lack are exchanged for what is made
here. `text_of` is what mutated inputs are mutations of.
"""

from __future__ import annotations

import itertools
import re
from functools import cache
from pathlib import Path

import mutated_tables

RECIPES = Path(__file__).parents[1] / "recipes"
NAMES = tuple(sorted(path.stem for path in RECIPES.glob("*.toml")))
SMALL_TASKS = 'tasks = ["arithmetic", { name = "reasoning_gym:chain_sum", samples = 4, k = [1] }]\nproblems = 4'
# What stands in for a model or for rows that are not at hand, by recipe: pattern → text, in the recipe's own lines.
_TINY = (r'(?m)^model = "[^"]*"', 'model = "tiny"')
_PAPER = (
    _TINY,
    (r"(?m)^template = .*$", ""),
    (r'source = "deepmath"', 'source = "deepmath"\npool = "deepmath.jsonl"'),
    (r"(?m)^(demos|prompts) = 10_000", r"\1 = 8"),
    (r"(?m)^validation = 1_000", "validation = 2"),
    (r"(?m)^(prompts|update_prompts) = (128|64)$", r"\1 = 4"),
    (r"(?ms)^tasks = \[.*?^\]", SMALL_TASKS),
)
GROUNDED: dict[str, tuple[tuple[str, str], ...]] = {
    "demo": (_TINY,),
    "base-knights": (("demos = 6400", "demos = 8"), ("test = 200", "test = 4")),
    "base-legs": (("demos = 12000", "demos = 8"), ("test = 200", "test = 4")),
    "study-adaptive": (("demos = 512", "demos = 8"), ("prompts = 1024", "prompts = 32")),
    "study-code": (_TINY,),
    "study-adaptive-base": (_TINY,),
    "study-adaptive-legs": (_TINY,),
    "study-domains": (
        _TINY,
        ("demos = 512", "demos = 8"),
        ("validation = 100", "validation = 2"),
        ("prompts = 1024", "prompts = 16"),
        ("test = 200", "test = 4"),
    ),
    "benchmarks": (_TINY, (r"(?ms)^tasks = \[.*?^\]\nproblems = 8", SMALL_TASKS)),
    "gsm8k-smollm2": (
        _TINY,
        ("demos = 4000", "demos = 8"),
        ("validation = 200", "validation = 2"),
        ("3000", "16"),
        ("test = 200", "test = 4"),
    ),
    "mbpp-smollm2": (
        _TINY,
        ("demos = 180", "demos = 4"),
        ("prompts = 128", "prompts = 4"),
        ("validation = 20", "validation = 2"),
        ("test = 50", "test = 2"),
        (r"(?m)^(prompts|update_prompts) = 16", r"\1 = 4"),
        ("micro_batch = 16", "micro_batch = 8"),
    ),
    "paper-qwen2.5-7b": _PAPER,
    "paper-llama-3.1-8b": _PAPER,
    "paper-implicit": (
        _TINY,
        (r'source = "hub"\nname = "openai/gsm8k"\nconfig = "main"', 'source = "files"\nfolder = "gsm8k"'),
        (r'_from = "(train|test)"', r'_from = "\1.jsonl"'),
        ("test = 1319", "test = 4"),
        (r"(?m)^prompts = 128\nupdate_prompts = 64", "prompts = 16\nupdate_prompts = 16"),
        (r'(?m)^model = "Qwen/Qwen2.5-32B-Instruct"$', 'model = "tiny"'),
    ),
}


@cache
def text_of(name: str) -> str:
    """A shipped recipe as the campaign mutates it."""
    text = (RECIPES / f"{name}.toml").read_text(encoding="utf-8")
    for pattern, instead in GROUNDED.get(name, ()):
        text = re.sub(pattern, instead, text)
    return text


@cache
def beside() -> dict[str, bytes]:
    """The files that the grounded recipes read."""
    sums = [
        (f"Ann has {a} pens and buys {b}. How many?", a + b) for a, b in itertools.product(range(2, 9), range(3, 9))
    ]
    gsm = [{"question": q, "answer": f"She has {s}.\n#### {s}"} for q, s in sums]
    deep = [
        {"question": q, "final_answer": str(s), **{f"r1_solution_{k}": f"It is \\boxed{{{s}}}." for k in (1, 2, 3)}}
        for q, s in sums
    ]
    code = [
        {
            "prompt": f"Write f that adds {n}.",
            "canonical_solution": f"def f(x):\n    return x + {n}",
            "test_list": [f"assert f(1) == {1 + n}"],
        }
        for n in range(12)
    ]
    asked = [{"question": q, "solution": f"#### {s}", "answer": str(s), "kind": "known"} for q, s in sums]
    domains = {"base": asked[:10], "train": asked[10:36], "test": asked[36:]}
    shares = dict.fromkeys(("solved", "allowed_expert", "allowed_keep", "value_expert", "value_keep"), 0.5)
    graded = {"demos": asked[:40], "prompts": asked[8:40], "validation": asked[40:41], "test": asked[41:]}
    return {
        **{
            f"domains/{name}/{table}.jsonl": mutated_tables.as_jsonl(rows)
            for name, (table, rows) in itertools.product(("legs", "knights"), domains.items())
        },
        **{
            f"runs/{folder}/{table}.jsonl": mutated_tables.as_jsonl([row | shares for row in rows])
            for folder, (table, rows) in itertools.product(
                ("solved", "solved-base-1", "solved-legs", "graded-data"), graded.items()
            )
        },
        "gsm8k/train.jsonl": mutated_tables.as_jsonl(gsm[:30]),
        "gsm8k/test.jsonl": mutated_tables.as_jsonl(gsm[30:]),
        "deepmath.jsonl": mutated_tables.as_jsonl(deep),
        "mbppplus/MbppPlus.jsonl.gz": mutated_tables.as_gzip(mutated_tables.as_jsonl(code)),
    }
