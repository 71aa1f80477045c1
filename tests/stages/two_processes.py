"""One rank of `test_two_processes_take_the_step_of_one`; rank 0 writes the gradient it sees."""

import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from test_sft import one_step  # noqa: E402 - the path above comes first

if __name__ == "__main__":
    out, reduction = Path(sys.argv[1]), sys.argv[2]
    gradient, _ = one_step(out.with_suffix(""), micro=2, accumulation=2, ranks=2, reduction=reduction)
    if int(torch.distributed.get_rank()) == 0:
        torch.save({name.removeprefix("module."): g for name, g in gradient.items()}, out)
    torch.distributed.destroy_process_group()
