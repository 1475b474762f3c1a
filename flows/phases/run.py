"""A run in progress: its session, its workers, and what the phases hand to one another."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from clado.choosing.local_search import Searched
from clado.choosing.proposals import Budget, Proposal, Score, choose
from clado.evaluation import Counts
from clado.interaction.estimators import Measured
from clado.interaction.matrix import InteractionMatrix
from clado.records import CHOSEN, Result, Stability
from clado.run.opened_run import OpenedRun
from clado.space import Assignment
from flows.clusters import Workers


@dataclass(frozen=True)
class Measuring:
    """What the measure phase reports: tiles computed now, tiles in the plan, and evaluations by tile kind."""

    computed: int
    tiles: int
    evaluations: dict[str, int]


class Run:
    """Passed from phase to phase. A plain class, so that Prefect does not look inside."""

    def __init__(self, session: OpenedRun, workers: Workers, clock: "Clock") -> None:
        self.session = session
        self.workers = workers
        self.matrices: dict[str, InteractionMatrix] = {}
        self.extra_matrices: dict[str, InteractionMatrix] = {}
        self.uncorrected: InteractionMatrix | None = None
        self.proposals: list[Proposal] = []
        self.measured: Measured | None = None
        self.stability: tuple[Stability, ...] = ()
        self.surrogate = ""
        self.searched: dict[Budget, Searched] = {}
        self.losses: dict[Assignment, Counts] = {}
        self.probe_losses: dict[Assignment, Counts] = {}
        self.accuracies: dict[Assignment, Counts] = {}
        self.measuring = Measuring(0, 0, {})
        self.clock = clock
        self.notes: list[str] = []

    def results(self) -> list[Result]:
        """One row for each budget and method, and the chosen ones, as far as losses decide."""
        return chosen_of(self.session, self.proposals, self.losses)


def chosen_of(session: OpenedRun, proposals: Sequence[Proposal], counts: Mapping[Assignment, Counts]) -> list[Result]:
    """`choose` by what was measured on the sensitivity set."""
    losses = {assignment: found.accuracy().loss for assignment, found in counts.items()}
    scores = {assignment: Score(found.mean_brier, found.each_hit) for assignment, found in counts.items()}
    return choose(session.space, proposals, losses, session.limits, scores)


def with_fewer_corrections(
    session: OpenedRun,
    proposals: Sequence[Proposal],
    counts: dict[Assignment, Counts],
    measure: Callable[[Sequence[Assignment]], Mapping[Assignment, Counts]],
) -> list[Proposal]:
    """The proposals, and what would be chosen of them deployed with fewer corrections, until that chooses nothing new.

    Args:
        session: The run.
        proposals: All measured.
        counts: What was measured of each; filled with what is measured here.
        measure: Counts on the sensitivity set.
    """
    found = list(proposals)
    while True:
        chosen = {row.assignment for row in chosen_of(session, found, counts) if row.method == CHOSEN}
        others = {a: [b for b in session.other_corrections(a) if b not in counts] for a in chosen}
        if not any(others.values()):
            return found
        counts |= measure(list(dict.fromkeys(b for lacking in others.values() for b in lacking)))
        found += [
            replace(proposal, assignment=other, loss_predicted=None, solution=None, reported=False)
            for proposal in found
            for other in others.get(proposal.assignment, ())
        ]


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
