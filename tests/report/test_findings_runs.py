"""Real runs of the tiny base, each of which something is wrong with, and one in which nothing is.

The base solves a fifth of the sums, in several forms, and pass@8 of it is 0.7.
"""

import json
from pathlib import Path

import pytest

from heatbath import recipe as recipes
from heatbath.progress import Progress
from heatbath.report.findings import Finding, Seen, find
from heatbath.run import Run
from heatbath.stages.pipeline import run_stage, stages_of

pytestmark = pytest.mark.thorough

QUIET = Progress(quiet=True)
RL = {"prompts": 4, "update_prompts": 4, "group_size": 4, "micro_batch": 16, "max_steps": 10, "readiness": 0}
SAMPLES = {"samples": 8, "k": [1, 8], "temperature": 1.0}


def arithmetic(forms: list[str], demos: int, test: int, **counts: int) -> dict:
    split = {"validation": 8, "prompts": 80, "demos": demos, "test": test, **counts}
    return {"source": "arithmetic", "forms": forms, **split}


def seen_in(folder: Path, **tables) -> tuple[dict[str, Finding], Seen]:
    """The findings of a run of these tables, by name, and what they were read from."""
    recipe = recipes.parse({"model": "tiny", "precision": "fp32", **tables})
    run = Run.create(folder / "run", recipe)
    for stage in stages_of(recipe) if "eval" in tables else ("sft",):
        run_stage(stage, run, recipe, QUIET)
    seen = Seen.of(run)
    return {found.name: found for found in find(seen)}, seen


def test_a_run_without_faults_has_no_findings(tiny_base: str, tmp_path: Path) -> None:
    """GIFT on right sums in two of the base's own forms, then RL of which some groups have a signal."""
    found, seen = seen_in(
        tmp_path,
        data=arithmetic(["tens", "columns"], demos=64, test=24),
        sft={"objective": {"name": "gift", "beta": 8.0}, "lr": 3e-4, "epochs": 2, "batch": 16, "micro_batch": 16},
        rl={**RL, "lr": 1e-4, "max_new_tokens": 32},
        eval={**SAMPLES, "max_new_tokens": 32},
    )
    assert found == {}
    assert seen.surprise is not None and len(seen.rl) >= 10 and seen.right.keys() == {"base", "init", "final"}


def test_a_start_that_copies_a_few_demonstrations_has_lost_the_others_ways(tiny_base: str, tmp_path: Path) -> None:
    """SFT for 20 epochs on 24 sums: pass@1 falls to a half, pass@8 to a third, validation NLL doubles."""
    found, seen = seen_in(
        tmp_path,
        data=arithmetic(["tens"], demos=24, test=100, prompts=0),
        sft={"lr": 1e-3, "epochs": 20, "batch": 12, "micro_batch": 12},
        eval={**SAMPLES, "max_new_tokens": 28},
    )
    assert found.keys() == {"over-constrained", "late checkpoint"}
    assert found["over-constrained"].number < 0.9
    shares = [right.sum() / samples.sum() for _, samples, right in (seen.right["base"], seen.right["init"])]
    assert (
        f"{shares[0]:.3f} → " in found["over-constrained"].says
        and f"the start {shares[1]:.3f}" in found["over-constrained"].says
    )
    nll = [row["val/nll"] for row in seen.sft if "val/nll" in row]
    assert found["late checkpoint"].number == pytest.approx(nll[-1] - min(nll)) and nll[-1] > 1.1 * min(nll)


def test_a_start_that_left_the_base_and_an_rl_that_makes_nothing_of_it(tiny_base: str, tmp_path: Path) -> None:
    """SFT for 48 epochs on 16 sums in a form that the base does not know: validation NLL falls by half, the entropy by
    more; RL cuts every completion and so has no signal."""
    found, _ = seen_in(
        tmp_path,
        data=arithmetic(["round"], demos=16, test=80),
        sft={"lr": 2e-3, "epochs": 48, "batch": 8, "micro_batch": 8},
        rl={**RL, "lr": 1e-6, "max_new_tokens": 4},
        eval={**SAMPLES, "max_new_tokens": 24},
    )
    wanted = {"under-constrained", "nothing to learn", "truncation", "late checkpoint"}
    assert wanted <= found.keys() <= wanted | {"over-constrained"}
    assert found["under-constrained"].number == pytest.approx(0.0, abs=0.02)
    assert (
        found["nothing to learn"].number > 0.9
        and "of 40 groups were graded all alike" in found["nothing to learn"].says
    )
    assert found["truncation"].number > 0.9 and "in the last half of RL" in found["truncation"].says
    assert "rl.max_new_tokens" in found["truncation"].remedy


@pytest.mark.parametrize(("smoothing", "expected"), [(0.0, {"target underflow"}), (0.01, set())])
def test_signs_that_the_base_has_never_seen_underflow_without_smoothing(
    smoothing: float, expected: set[str], tiny_base: str, tmp_path: Path
) -> None:
    rows = [{"question": f"What is {a} + 11?", "solution": f"{a} + 11 = {a + 11} QED~"} for a in range(20, 32)]
    (tmp_path / "demos.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found, seen = seen_in(
        tmp_path,
        data={"source": "files", "demos_from": str(tmp_path / "demos.jsonl")},
        sft={
            "objective": {"name": "gift", "beta": 10.0, "smoothing": smoothing},
            "max_steps": 1,
            "batch": 12,
            "micro_batch": 12,
        },
    )
    assert found.keys() == expected and seen.surprise["max"] > 23.1
    if expected:
        assert 0.02 < found["target underflow"].number < 0.2 and "smoothing" in found["target underflow"].remedy
