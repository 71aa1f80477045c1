"""The processes of one run: how many there are, which of them writes, and how they agree.

Every process of a run goes through the same stages. What belongs to the run as a whole (its folder, what a person is
told) is done by the first of them; the others wait for it, so that all of them go on from the same state.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from heatbath.errors import RecipeError, RunError

LAUNCHED = "HEATBATH_PROCESSES"  # how many processes the launcher was asked for
PATIENCE = timedelta(hours=6)  # of a process that waits for another one's sampling, grading or loading

T = TypeVar("T")
P = ParamSpec("P")


def count() -> int:
    """The number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank() -> int:
    """This process's number among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def join() -> None:
    """Lets the processes that a launcher has started find each other, each on its own device. Raises RunError where
    there are not as many as were asked for: a launcher that starts fewer in silence would train another batch."""
    asked = os.environ.get(LAUNCHED)
    if asked is not None and int(asked) != count():
        raise RunError(
            f"{asked} processes were asked for and {count()} started",
            "the launcher",
            "start them with torchrun or accelerate (docs/scale.md), one per GPU",
        )
    if count() == 1:
        return
    import torch

    backend = "gloo"
    if torch.cuda.is_available():
        device = int(os.environ.get("LOCAL_RANK", "0"))
        if device >= torch.cuda.device_count():
            raise RunError(
                f"process {device} of this machine has no GPU: {torch.cuda.device_count()} are visible",
                "the launcher",
                "start at most one process for each GPU",
            )
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend, timeout=PATIENCE)


@contextmanager
def joined() -> Iterator[None]:
    """`join`, and its end: a thread of gloo's may hold objects of the interpreter when that ends, and the process is
    then aborted with its work done. Not after an error or an interruption on GPUs: NCCL's end may wait for
    processes that are gone."""
    join()
    orderly = False
    try:
        yield
        orderly = True
    finally:
        if count() > 1:
            import torch

            if torch.distributed.is_initialized() and (orderly or not torch.cuda.is_available()):
                torch.distributed.destroy_process_group()


def lost(error: RuntimeError) -> bool:
    """Whether an error says no more than that another process of this run is gone (gloo's words)."""
    return count() > 1 and any(words in str(error) for words in ("closed by peer", "reset by peer"))


def take_one_device(say: Callable[[str], None]) -> None:
    """Of a process alone: hides all GPUs but the first. transformers would lay a batch over all of them, which TRL
    refuses."""
    import torch

    if count() == 1 and (visible := torch.cuda.device_count()) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        say(f"{visible} GPUs are visible and one is used; --gpus {visible} takes all of them")


def wait() -> None:
    """Returns once every process of the run is here."""
    if count() > 1:
        gathered(None)  # objects go through the CPU: no device is kept busy by those that wait


def agreed(make: Callable[[], T]) -> T:
    """What the first process makes, in all of them. A failure of the first ends all of them."""
    if count() == 1:
        return make()
    import torch

    made: list[Any] = [make() if first() else None]
    torch.distributed.broadcast_object_list(made, src=0)
    value: T = made[0]
    return value


def gathered(value: T) -> list[T]:
    """The value of every process, in all of them, in their order."""
    if count() == 1:
        return [value]
    import torch

    found: list[Any] = [None] * count()
    torch.distributed.all_gather_object(found, value)
    return found


def micro_batches(rows: int, micro: int, processes: int, where: str) -> tuple[int, int]:
    """How an optimizer step of so many rows is taken: the rows of a micro-batch (at most `micro`) of each process, and
    how many of them. Raises RecipeError where the rows cannot be divided so."""
    if rows % processes:
        raise RecipeError(
            f"{rows} rows of a step cannot be shared by {processes} processes",
            where,
            f"a multiple of {processes}, or another number of processes",
        )
    own = rows // processes
    micro = min(micro, own)
    if own % micro:
        raise RecipeError(
            f"of the {rows} rows of a step each of {processes} processes has {own}, which is no multiple of {micro}",
            where.rpartition(".")[0] + ".micro_batch",
            f"a divisor of {own}",
        )
    return micro, own // micro


def share(things: Sequence[T]) -> list[T]:
    """What this process does of a list of things."""
    return list(things[rank() :: count()])


def together(parts: Iterable[T]) -> Iterator[list[T]]:
    """The next part of every process that still has one, in all of them, until no process has any."""
    own = iter(parts)
    while True:
        mine = next(own, None)
        found = [part for part in gathered(mine) if part is not None]
        if not found:
            return
        yield found


def by_first(method: Callable[P, None]) -> Callable[P, None]:
    """A function that changes files, which only the first process does."""

    @wraps(method)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        if first():
            method(*args, **kwargs)

    return guarded
