"""Progress with total and ETA: a bar in a terminal, a line every few seconds in a log file."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

EVERY_SECONDS = 5.0


class Progress(Protocol):
    """Told how much work is done."""

    def __call__(self, amount: float) -> None:
        """Adds to the work done."""


@contextmanager
def progress(what: str, total: float) -> Iterator[Progress]:
    """A function that adds to the work done; `total` is in any unit, such as multiply-accumulates."""
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
            task = bar.add_task(what, total=total)
            yield lambda amount: bar.advance(task, amount)
        return
    begin = shown = time.monotonic()
    done = 0.0

    def advance(amount: float) -> None:
        nonlocal done, shown
        done += amount
        now = time.monotonic()
        if now - shown >= EVERY_SECONDS or done >= total:
            shown = now
            left = (now - begin) * max(0.0, total - done) / done if done else 0.0
            share = done / total if total else 1.0  # blocks without a pair cost nothing
            line = f"{what}: {100 * share:5.1f} %, {now - begin:.0f} s, ETA {left:.0f} s"
            print(line, file=sys.stderr, flush=True)

    yield advance
