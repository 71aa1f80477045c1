"""What benchmarks/study.py and chains.py compute from a comparison, and the tables of benchmarks/domains.py."""

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
import sympy
from scipy import stats

from heatbath.data.arithmetic import FORMS, OPERATIONS, Sum, problems, solve
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
    samples = [{"problem": str(p), "status": "right", "completion": "a"} for p in range(3)]
    assert study.differing(Path("run"), [0])["final"] == [None], "no problem has two right answers"
    samples += [{"problem": "0", "status": "no_answer", "completion": "lambda x"}]
    assert study.holding(Path("run"), [0, 1], "bda x") == {"final": {"holding": [0.25] * 2, "no answer": [0.25] * 2}}


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

    test = paths["settings"]["paths=1 sft"]["tasks"]["test"]
    after, before = (test[policy]["8"]["seeds"] for policy in ("final", "base"))
    low, high = stats.ttest_rel(after, before).confidence_interval()
    wanted = f"final pass@8 {np.mean(after) - np.mean(before):.3f} [{low:.3f}, {high:.3f}]".replace("-", "−")
    line = next(x for x in study.tables(paths).splitlines() if x.startswith("against the base: paths=1 sft:"))
    assert line.endswith(wanted)


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
        assert domains.facts(question, worked) == dict.fromkeys(named, True)
        first, _, rest = worked.partition(" =")
        assert domains.facts(question, f"{first}9 ={rest}") == dict(zip(named, (False, True), strict=True))
        assert domains.facts(question, first) == dict.fromkeys(named, False)
    with MathGrader() as grader:
        assert {verdict.status for verdict in grader.grade(texts, golds)} == {"right"}


@pytest.mark.parametrize("family", ["knights", "legs"])
def test_what_the_base_lacks_is_in_no_problem_of_it_and_no_problem_in_two_tables(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("reasoning_gym")
    domains = module("domains", monkeypatch)
    monkeypatch.setattr(domains, "SIZES", {"base": 300, "train": 300, "test": 100})
    tables = domains.tables(family)
    assert {name: len(rows) for name, rows in tables.items()} == domains.SIZES
    problems = [row["question"] for rows in tables.values() for row in rows]
    assert len(set(problems)) == len(problems)
    for name, rows in tables.items():
        for row in rows:
            assert domains.is_new({"question": row["question"], "gold": row["answer"]}) == (row["kind"] == "new")
        assert {row["kind"] for row in rows} == ({"known"} if name == "base" else {"known", "new"})


def result(text: str) -> int:
    """Of "3 x 4" or "12 + 6"."""
    return sum(int(np.prod([int(n) for n in term.split("x")])) for term in text.split("+"))


def test_a_sum_is_right_throughout_where_each_of_its_equations_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against sympy, on every form's solution of real problems with one digit changed or none."""
    chains, rng = module("chains", monkeypatch), random.Random(0)
    seen = {True: 0, False: 0}
    for problem in problems(2, OPERATIONS, 100, 0, held_out=False):
        for form in FORMS:
            text = solve(problem, form)
            assert chains.solve(problem, chains.form_of(problem, f" {text}\n")) == text
            where = rng.choice([place for place, letter in enumerate(text) if letter.isdigit()])
            changed = text[:where] + rng.choice("0123456789") + text[where + 1 :]
            sides = changed.split("=")
            values = {sympy.sympify(re.sub(r"\b0+(?=\d)", "", side)) for side in sides}
            equal = values == {problem.answer}
            wanted = equal and sides[0] == text.split("=")[0]
            assert chains.holds(problem, changed) == wanted, changed
            seen[wanted] += 1
        assert not chains.holds(problem, f"{problem.answer}") and not chains.holds(problem, text + " + 0")
        assert chains.form_of(problem, text + "0") is None
    assert min(seen.values()) > 30
    assert not chains.holds(Sum(23, 45, "+"), "24 + 44 = 60 + 8 = 68")
    assert chains.form_of(Sum(40, 20, "-"), "40 - 20 = 20 + 0 = 20") == "columns", "the base's own before the new one"


def test_ways_to_an_answer_are_counted_among_those_right_throughout(monkeypatch: pytest.MonkeyPatch) -> None:
    chains = module("chains", monkeypatch)
    right, other, slip = "23 + 45 = 63 + 5 = 68", "23 + 45 = 60 + 8 = 68", "23 + 45 = 60 + 9 = 68"
    new, wrong = "23 + 45 = 73 - 5 = 68", "23 + 45 = 73 - 5 = 69"
    swapped = "23 + 45 = 73 + 5 = 68"
    zero = chains.read(
        [{"problem": "c", "question": "What is 23 + 40?", "completion": "23 + 40 = 63 + 0 = 63", "status": "right"}]
    )
    assert (zero["swapped"], zero["throughout"]) == (0, 1), "nothing is false there"
    texts = {"a": [right, right, other, slip, new, wrong], "b": [swapped, wrong, wrong, wrong, wrong, right]}
    samples = [
        {
            "problem": name,
            "question": "What is 23 + 45?",
            "completion": text,
            "status": "wrong" if text is wrong else "right",
        }
        for name, own in texts.items()
        for text in own
    ]
    found = chains.read(samples)
    assert [found[name] for name in ("right", "throughout", "known", "new")] == [7 / 12, 5 / 12, 4 / 12, 1 / 12]
    assert [found["shape"], found["swapped"]] == [6 / 12, 1 / 12]
    assert [found[name] for name in ("any", "ways", "differ")] == [1.0, 2.0, 5 / 6]


def test_settings_are_paired_by_seed_and_unlike_seeds_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    chains = module("chains", monkeypatch)
    one, other = (
        {"seeds": [0, 1, 2], "final": dict.fromkeys(chains.COLUMNS, values)}
        for values in ([0.1, 0.2, 0.4], [0.3, 0.3, 0.7])
    )
    interval = stats.ttest_1samp([0.2, 0.1, 0.3], 0).confidence_interval()
    wanted = f"right 0.200 [{interval.low:.3f}, {interval.high:.3f}];".replace("-", "−")
    assert wanted in chains.paired(one, other) and "| x | final | 0.233 [" in chains.table({"x": one})
    with pytest.raises(SystemExit, match="other seeds"):
        chains.paired(one, other | {"seeds": [0, 1, 3]})
