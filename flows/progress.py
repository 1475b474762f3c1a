"""Progress with total and ETA: a bar in a terminal, a line every few seconds in a log file."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

EVERY_SECONDS = 5.0


class Progress(Protocol):
    """Counts the work done."""

    def __call__(self, amount: float) -> None:
        """Adds to the work done."""


@contextmanager
def progress(title: str, total: float) -> Iterator[Progress]:
    """Yields a function that adds to the work done. `total` is in any unit, such as multiply-accumulates."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
        )
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total)
            yield lambda amount: bar.advance(task, amount)
        return
    begin = last_line = time.monotonic()
    work = 0.0

    def advance(amount: float) -> None:
        nonlocal work, last_line
        work += amount
        now = time.monotonic()
        if now - last_line >= EVERY_SECONDS or work >= total:
            last_line = now
            eta = (now - begin) * max(0.0, total - work) / work if work else 0.0
            share = work / total if total else 1.0  # a tile without a pair costs nothing
            line = f"{title}: {100 * share:5.1f} %, {now - begin:.0f} s, ETA {eta:.0f} s"
            print(line, file=sys.stderr, flush=True)

    yield advance
