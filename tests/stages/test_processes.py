"""Several processes leave what one leaves: curves, weights, samples; and what does not fit them is said before."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import whole_stages
from heatbath import launch, ranks
from heatbath.errors import RecipeError, RunError
from heatbath.launch import Launch
from heatbath.recipe import load, shipped
from heatbath.run import Run
from mistakes import call


@pytest.fixture(scope="module")
def both(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one process leaves in `one`, and two of torchrun's in `two`."""
    folder = tmp_path_factory.mktemp("processes")
    kept: list = []
    whole_stages.run_all(folder / "one", str(small_base), kept)
    (folder / "completions.json").write_text(json.dumps(kept))
    script = Path(whole_stages.__file__)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*line, str(folder / "two"), str(small_base), str(folder / "completions.json")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def curve(folder: Path, stage: str, name: str) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if row["stage"] == stage and name in row]


def moved(one: Path, two: Path) -> float:
    """The largest difference of two policies' weights, in units of the largest weight."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).abs().max() / ours[n].abs().max()) for n in ours)


@pytest.mark.parametrize("name", whole_stages.STARTS)
def test_two_processes_give_the_curve_of_one(both: Path, name: str) -> None:
    """Loss, NLL, validation and gradient norm of 20 steps to 5 digits, under every place the base's view comes from."""
    for measure, count in (("objective", 20), ("nll", 20), ("val/nll", 11), ("grad_norm", 20)):
        one, two = (curve(both / n / name, "sft", measure) for n in ("one", "two"))
        assert len(one) == count
        assert two == pytest.approx(one, rel=1e-5), measure
    assert one[-1] != pytest.approx(one[0], rel=0.1), "nothing was learned"
    assert moved(*(both / n / name / "checkpoints" / "init" for n in ("one", "two"))) < 1e-4


def test_two_processes_give_the_curve_of_one_in_rl(both: Path) -> None:
    """GRPO on the same completions, 20 steps of 4 groups shared by the ranks."""
    for measure in ("reward", "entropy", "kl_init", "grad_norm"):
        one, two = (curve(both / n / "rl", "rl", measure) for n in ("one", "two"))
        assert len(one) == whole_stages.STEPS
        assert two == pytest.approx(one, rel=1e-5, abs=1e-9), measure
    assert any(curve(both / "one" / "rl", "rl", "grad_norm")), "no group taught anything"
    assert moved(*(both / n / "rl" / "checkpoints" / "final" for n in ("one", "two"))) < 1e-4


def test_two_processes_share_an_evaluation(both: Path) -> None:
    """The same samples, each once, whoever drew them; and the same scores."""
    runs = [Run.read(both / name / "sft") for name in ("one", "two")]
    one, two = ({(s["policy"], s["problem"], s["seed"]): s["ids"] for s in run.samples()} for run in runs)
    assert len(one) == 2 * 6 * 2 and [len(run.samples()) for run in runs] == [24, 24]
    assert one == two
    results = [json.loads((run.folder / "results.json").read_text()) for run in runs]
    assert results[0]["policies"] == results[1]["policies"]
