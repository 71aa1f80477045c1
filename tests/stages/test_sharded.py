"""FSDP2 over two processes of a CPU mesh: the engine and the policies find the gradient of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sharded
import torch

pytestmark = pytest.mark.thorough


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", sharded.__file__]
    done = subprocess.run(
        [*line, str(folder), *sharded.GIFT, *sharded.RL],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("mode", [*sharded.GIFT, *sharded.RL])
def test_sharded_weights_have_the_gradient_of_whole_ones(of_two: Path, mode: str) -> None:
    """The head within the model or a unit of its own; gathered again in backward, recomputed, or kept; the base whole,
    sharded like the policy, or the policy with its adapters off; surrogates with ratios off 1, some of them clipped."""
    whole, found = sharded.gradient(mode, 1), torch.load(of_two / f"{mode}.pt")
    assert whole.keys() == found.keys() and whole
    for name, g in whole.items():
        assert g.norm() > 0, name
        assert (found[name] - g).norm() < 1e-10 * g.norm(), name
