"""A short fault campaign on every kind of run; `python tests/faults/campaign.py --faults 200` is the long one."""

import os
from pathlib import Path

import campaign
import pytest

pytestmark = pytest.mark.thorough

FAULTS = 4  # of each recipe at least: 20 in all


@pytest.mark.parametrize("name", campaign.RECIPES)
def test_whatever_befalls_a_run_it_ends_as_if_nothing_had(name: str, tiny_base: str, tmp_path: Path) -> None:
    """Faults of random kinds at random moments: equal weights, log, samples and results, and named errors between."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
        whole = campaign.undisturbed(name, tmp_path / "whole", tiny_base)
        met: list[dict] = []
        for seed in range(100, 120):
            met += campaign.endure(name, tmp_path / str(seed), tiny_base, seed, whole, most=FAULTS)
            if len(met) >= FAULTS:
                break
    assert len(met) >= FAULTS
