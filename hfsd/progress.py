"""One live line per stage: done, rate and time left. A terminal gets a rich bar; a log gets a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hfsd import processes

LOG_EVERY = 15.0  # seconds between lines where stderr is no terminal

Advance = Callable[..., None]


@contextmanager
def track(stage: str, total: int, unit: str) -> Iterator[Advance]:
    """Yields `advance(n=1, note="", total=None, earlier=False)`, in `unit`s such as rows.

    A later `total` replaces the first. `earlier`: an earlier process did these, so they tell nothing of the rate; all
    such come first.
    """
    shown = _lines if processes.rank() or not sys.stderr.isatty() else _bar
    with shown(stage, total, unit) as advance:
        yield advance


@contextmanager
def _bar(stage: str, total: int, unit: str) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}"),
    )
    start, before = time.perf_counter(), 0
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(stage, total=total, note="", rate="")

        def advance(n: int = 1, note: str = "", total: int | None = None, earlier: bool = False) -> None:
            nonlocal start, before
            if earlier:
                before += n
                progress.reset(task, total=total, completed=before, note=note, rate="")
                start = time.perf_counter()
                return
            progress.update(task, advance=n, note=note, total=total)
            done = progress.tasks[task].completed - before
            progress.update(task, rate=f"{done / max(time.perf_counter() - start, 1e-9):.2g}/s")

        yield advance


@contextmanager
def _lines(stage: str, total: int, unit: str) -> Iterator[Advance]:
    start = last = time.perf_counter()
    done, goal, before = 0, total, 0

    def advance(n: int = 1, note: str = "", total: int | None = None, earlier: bool = False) -> None:
        nonlocal done, last, goal, before, start
        done, goal = done + n, goal if total is None else total
        now = time.perf_counter()
        if earlier:
            before, start = before + n, now
        if processes.rank() or (now - last < LOG_EVERY and done < goal):
            return  # of several processes, the first one speaks
        last, rate = now, (done - before) / max(now - start, 1e-9)
        if done < goal:
            left = f"{(goal - done) / rate:.0f} s left" if rate else "? s left"
        else:
            left = f"{now - start:.0f} s"
        print(f"{stage:<10} {done}/{goal} {unit}  {rate:.3g}/s  {left}  {note}".rstrip(), file=sys.stderr, flush=True)

    yield advance


def quiet() -> None:
    """Silences the libraries' own bars and notices, so that the one line per stage stays readable."""
    import warnings

    import datasets
    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\.")
    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
