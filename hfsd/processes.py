"""Data-parallel work over the processes of `accelerate launch` or `torchrun`, with equal results on each of them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")
PATIENCE = timedelta(days=7)


def count() -> int:
    """Processes that work together; 1 where no launcher says otherwise."""
    return _stated(("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"), 1)


def rank() -> int:
    """This process's number, from 0. Process 0 writes and prints."""
    return _stated(("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"), 0)


def local_rank() -> int:
    """This process's number on its machine, which is the number of its accelerator."""
    return _stated(("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"), 0)


def connect() -> None:
    """Joins the processes; what one of them does alone, such as rewriting, may take hours."""
    import torch
    from accelerate import PartialState

    PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)


def spread(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`map(work, items)` with the items of each round spread over the processes.

    Every process sees every result, in the order of the items, so that sums come out equal to the last bit on any
    number of processes. Results are gathered as plain Python data: keep them small.
    """
    if count() == 1:
        yield from map(work, items)
        return
    from accelerate.utils import gather_object

    connect()
    left = iter(items)
    while round_ := list(islice(left, count())):
        mine = [work(item) for item in round_[rank() : rank() + 1]]
        yield from gather_object(mine)


def peak_bytes() -> int:
    """Peak resident memory of this process so far (an accelerator's peak where there is one)."""
    import resource

    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")  # Linux counts in ru_maxrss what the process that started this one held then
    own = re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(encoding="utf-8"), re.M) if status.is_file() else None
    if own is not None:
        return 1024 * int(own[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def same(make: Callable[[], T]) -> T:
    """What process 0 makes, on every process. Others wait for it, as long as it takes."""
    if count() == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    connect()
    held: list[Any] = [make() if rank() == 0 else None]
    return broadcast_object_list(held)[0]


def wait() -> None:
    """Returns when every process has come here."""
    if count() > 1:
        same(lambda: None)


def leave() -> None:
    """Ends the work together: a process whose peer is gone while it still talks to it may be aborted."""
    if count() == 1 or "accelerate" not in sys.modules:
        return
    from accelerate import PartialState

    if PartialState._shared_state:
        PartialState().wait_for_everyone()
        PartialState().destroy_process_group()


def _stated(names: tuple[str, ...], otherwise: int) -> int:
    """By torchrun or one of the MPI launchers that accelerate knows."""
    return next((int(os.environ[name]) for name in names if name in os.environ), otherwise)
