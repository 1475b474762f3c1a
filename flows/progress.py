"""Progress with total and remaining time: a bar in a terminal, or a line every few seconds in a log file."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Lock, Thread
from typing import Protocol

from flows.pace import Pace

LINE_SECONDS = 5.0  # seconds between two lines of a log file
BAR_SECONDS = 0.5  # seconds between two updates of a bar


class Progress(Protocol):
    """Counts the work done."""

    def __call__(self, amount: float) -> None:
        """Adds the work of a task that has ended."""


Show = Callable[[float, float, float | None], None]  # called with (share of the work done, seconds, remaining seconds or None)


@contextmanager
def progress(title: str, total: float, in_flight: float | None = None) -> Iterator[Progress]:
    """Yields a function that adds to the work done.

    Args:
        title: Name of the work.
        total: All work, in a unit that takes about the same time everywhere, such as multiply-accumulates.
        in_flight: Most work that is computed at a time. Give it if tasks differ much.
    """
    with _bar(title) if sys.stderr.isatty() else _lines(title) as (show, seconds):
        pace, begin, lock, ended = Pace(total, in_flight), time.monotonic(), Lock(), Event()

        def look() -> None:
            now = time.monotonic() - begin
            with lock:
                share = pace.expected(now) / total if total else 1.0  # a tile without a pair costs nothing
                show(1.0 if pace.done >= total else min(share, 0.999), now, pace.eta(now))

        def watch() -> None:
            while not ended.wait(seconds):
                look()

        def advance(amount: float) -> None:
            with lock:
                pace.add(time.monotonic() - begin, amount)

        watcher = Thread(target=watch, name="clado-progress", daemon=True)
        watcher.start()
        try:
            yield advance
        finally:
            ended.set()
            watcher.join()
        look()


@contextmanager
def _lines(title: str) -> Iterator[tuple[Show, float]]:
    def show(share: float, seconds: float, eta: float | None) -> None:
        print(f"{title}: {100 * share:5.1f} %, {seconds:.0f} s, ETA {_text(eta)}", file=sys.stderr, flush=True)

    yield show, LINE_SECONDS


@contextmanager
def _bar(title: str) -> Iterator[tuple[Show, float]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<12}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("ETA {task.fields[eta]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=1.0, eta=_text(None))
        yield lambda share, seconds, eta: bar.update(task, completed=share, eta=_text(eta)), BAR_SECONDS


def _text(eta: float | None) -> str:
    return "unknown" if eta is None else f"{eta:.0f} s"
