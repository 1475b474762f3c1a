"""The smallest network whose *measured* loss increase or top-1 drop stays below a bound. NumPy only.

A larger network can have a larger measured loss. Bisection alone could therefore miss the answer. All first proposals are
measured. The gap below the smallest one that meets the bound is then filled with new proposals, several times. Both neighbours
of the answer (the next smaller and the next larger one) are reported with their measurements.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from clado.choosing.local_search import ordered
from clado.errors import InfeasibleError
from clado.records.interval import Interval
from clado.space import Assignment, SearchSpace


@dataclass(frozen=True)
class MeasuredAssignment:
    """A proposal with its measured loss increase or top-1 drop."""

    assignment: Assignment
    """The proposed assignment."""
    size_bytes: int
    """Its size in bytes."""
    measured: Interval
    """Its measured loss increase or top-1 drop."""


@dataclass(frozen=True)
class Smallest:
    """The smallest measured proposal whose interval lies below the bound."""

    answer: MeasuredAssignment
    """The smallest assignment that keeps the bound."""
    smaller: MeasuredAssignment | None
    """The next smaller measured assignment, if there is one."""
    larger: MeasuredAssignment | None
    """The next larger measured assignment, if there is one."""
    measured: tuple[MeasuredAssignment, ...]
    """All measured assignments in ascending order of size."""
    bound: float
    """The bound on the upper end of the interval."""


def smallest(
    space: SearchSpace,
    front: Sequence[Assignment],
    measure: Callable[[Assignment], Interval],
    propose: Callable[[int, int], Sequence[Assignment]],
    bound: float,
    rounds: int = 4,
) -> Smallest:
    """The smallest assignment whose measured cost is at or below `bound` with its upper 95 % limit.

    Args:
        space: The space of the assignments.
        front: The first proposals.
        measure: Measures the loss increase or the top-1 drop of an assignment.
        propose: Called with (low, high); proposes assignments of more than `low` and less than `high` bytes.
        bound: Largest allowed upper end of the interval.
        rounds: Most calls of `propose`.

    Raises:
        InfeasibleError: No proposal meets the bound. The message names the closest one.
    """
    measured: dict[Assignment, MeasuredAssignment] = {}

    def add(assignments: Sequence[Assignment]) -> list[MeasuredAssignment]:
        """Measures what is new, and returns all measured proposals from small to large."""
        for assignment in dict.fromkeys(assignments):
            if assignment not in measured:
                measured[assignment] = MeasuredAssignment(assignment, space.size_bytes(assignment), measure(assignment))
        return sorted(measured.values(), key=lambda proposal: (proposal.size_bytes, ordered(proposal.measured.high)))

    proposals = add(front)
    for _ in range(rounds):
        number = _first_under(proposals, bound)
        if number is None or number == 0:
            break
        low, high = proposals[number - 1].size_bytes, proposals[number].size_bytes
        new = [a for a in propose(low, high) if a not in measured] if high - low > 1 else []
        if not new:
            break
        proposals = add(new)
    number = _first_under(proposals, bound)
    if number is None:
        raise InfeasibleError(_none_under(proposals, bound))
    smaller = proposals[number - 1] if number else None
    larger = proposals[number + 1] if number + 1 < len(proposals) else None
    return Smallest(proposals[number], smaller, larger, tuple(proposals), bound)


def _first_under(proposals: Sequence[MeasuredAssignment], bound: float) -> int | None:
    return next((number for number, proposal in enumerate(proposals) if proposal.measured.high <= bound), None)


def _none_under(proposals: Sequence[MeasuredAssignment], bound: float) -> str:
    """The message if no proposal meets the bound."""
    best = min(proposals, key=lambda proposal: ordered(proposal.measured.high))
    return (
        f"no assignment is measured to stay below {bound:g} with 95 % confidence; the closest costs {best.measured.mean:.4g} "
        f"({best.measured.low:.4g} to {best.measured.high:.4g} on {best.measured.num_images} images) at {best.size_bytes:,} "
        "bytes: allow more, measure on more images (selection_images), or offer wider bits"
    )
