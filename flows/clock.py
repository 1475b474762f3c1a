"""Seconds of each phase of a run."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class Clock:
    """Seconds of each phase. Their sum is the wall time."""

    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by phase."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside the context to a phase."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin
