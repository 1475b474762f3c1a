"""A run in progress: its session, its workers, and what the phases hand to one another."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from clado.candidates import Proposal
from clado.errors import StoreError
from clado.evaluation import Counts
from clado.interaction import InteractionMatrix
from clado.space import Assignment
from flows.clusters import Workers
from flows.session import Session


@dataclass(frozen=True)
class Measuring:
    """What the measure phase reports: tiles computed now, tiles in the plan, and evaluations by tile kind."""

    computed: int
    tiles: int
    evaluations: dict[str, int]


class Run:
    """Passed from phase to phase. A plain class, so that Prefect does not look inside."""

    def __init__(self, session: Session, workers: Workers, clock: "Clock") -> None:
        self.session = session
        self.workers = workers
        self.matrices: dict[str, InteractionMatrix] = {}
        self.proposals: list[Proposal] = []
        self.losses: dict[Assignment, Counts] = {}
        self.accuracies: dict[Assignment, Counts] = {}
        self.measuring = Measuring(0, 0, {})
        self.clock = clock
        self.notes: list[str] = []


@dataclass
class Clock:
    """Seconds of each phase; the sum is the wall time."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time spent inside to a phase."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a run's folder for this process; a second run on it is refused. The lock dies with the process, however it ends."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(
                f"another run is writing to {folder}; wait for it, or name another folder (folder: runs/…)"
            ) from None
        yield
