"""What benchmarks/study.py computes from a comparison, and the tables that benchmarks/domains.py writes."""

import importlib.util
import itertools
import json
import random
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from heatbath.verify.math import MathGrader

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def test_how_often_two_right_answers_differ_is_a_count_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    study, rng = module("study", monkeypatch), random.Random(0)
    samples = [
        {"problem": str(p), "status": rng.choice(["right", "wrong"]), "completion": rng.choice(["a", "b", "c", " a\n"])}
        for p in range(20)
        for _ in range(rng.choice([1, 2, 6]))
    ]
    run = SimpleNamespace(policies=["final"], samples=lambda policy: samples)
    monkeypatch.setattr(study, "Run", SimpleNamespace(read=lambda folder: run))
    shares = []
    for problem in {one["problem"] for one in samples}:
        own = [s["completion"].strip() for s in samples if s["problem"] == problem and s["status"] == "right"]
        pairs = [x != y for x, y in itertools.combinations(own, 2)]
        shares += [sum(pairs) / len(pairs)] if pairs else []
    assert 0 < len(shares) < 20
    assert study.differing(Path("run"), [0])["final"] == [pytest.approx(np.mean(shares))]


def test_two_records_are_compared_seed_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    study = module("study", monkeypatch)
    paths, noise = (
        json.loads((BENCHMARKS / f"results/study-{name}-cpu2.json").read_text()) for name in ("paths", "noise")
    )
    of = [found["settings"][name]["tasks"]["test"]["final"]["1"]["seeds"] for found, name in (
        (noise, "sft label_noise=0.3"), (paths, "paths=1 sft"))]  # fmt: skip
    low, high = stats.ttest_rel(*of).confidence_interval()
    wanted = f"final pass@1 {np.mean(of[0]) - np.mean(of[1]):.3f} [{low:.3f}, {high:.3f}]".replace("-", "−")
    line = next(x for x in study.beside(noise, paths).splitlines() if x.startswith("paths=1 sft → sft label_noise=0.3"))
    assert wanted in line


def test_legs_are_counted_right_and_new_animals_kept_from_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    animals = pytest.importorskip("reasoning_gym.arithmetic.leg_counting").ANIMALS
    domains = module("domains", monkeypatch)
    assert set(domains.NEW_ANIMALS) < set(animals) and {animals[a] for a in domains.NEW_ANIMALS} == {*animals.values()}
    texts: list[str] = []
    golds: list[str] = []
    for question, worked, answer, known in itertools.islice(domains._entries("legs"), 500):
        asked = re.findall(r"(\d+) ([a-z ]+?)(?=,|\?)", question)
        named = [name if name in animals else name.removesuffix("s") for _, name in asked]
        legs = sum(int(number) * animals[name] for (number, _), name in zip(asked, named, strict=True))
        assert legs == int(answer)
        assert known == (not {*named} & domains.NEW_ANIMALS)
        for left, right in re.findall(r"([\dx +]+) = (\d+)", worked):
            assert result(left) == int(right)
        texts.append(f"{worked}#### {answer}")
        golds.append(answer)
    with MathGrader() as grader:
        assert {verdict.status for verdict in grader.grade(texts, golds)} == {"right"}


def result(text: str) -> int:
    """Of "3 x 4" or "12 + 6"."""
    return sum(int(np.prod([int(n) for n in term.split("x")])) for term in text.split("+"))
