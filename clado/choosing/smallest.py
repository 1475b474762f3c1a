"""The other direction: the smallest network whose *measured* loss increase or top-1 drop stays under a bound. NumPy only.

What is measured need not fall with the size, so nothing is bisected blindly: candidates are measured from small to large until
one meets the bound, the gap below it is filled with new candidates, and both neighbours of the answer are reported as measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clado.choosing.local_search import ordered
from clado.errors import InfeasibleError
from clado.records import Z95
from clado.space import Assignment, SearchSpace


@dataclass(frozen=True)
class Interval:
    """A mean over paired per-image differences with its 95 % confidence interval."""

    mean: float
    low: float
    high: float
    num_images: int

    @classmethod
    def of(cls, differences: NDArray[np.float64]) -> "Interval":
        """The interval of per-image differences (n,): quantized minus float, on the same images (normal approximation)."""
        n = len(differences)
        mean = float(differences.mean())
        reach = Z95 * float(differences.std(ddof=1)) / n**0.5 if n > 1 else float("inf")
        return cls(mean, mean - reach, mean + reach, n)

    @classmethod
    def of_hits(cls, before: NDArray[np.bool_], after: NDArray[np.bool_]) -> "Interval":
        """The interval of a drop of top-1, from which images (n,) were right before and after.

        Half an image more is counted in each of the four cells, so that agreement on all of a few images proves little
        (Agresti and Min, "Simple improved confidence intervals for comparing matched proportions", 2005).
        """
        n = len(before)
        lost, won = int((before & ~after).sum()), int((after & ~before).sum())
        drop = (lost - won) / (n + 2)
        reach = Z95 * ((lost + won + 1) / (n + 2) - drop**2) ** 0.5 / (n + 2) ** 0.5
        return cls((lost - won) / n, drop - reach, drop + reach, n)


@dataclass(frozen=True)
class MeasuredProposal:
    """An assignment, its size in bytes, and what it was measured to cost."""

    assignment: Assignment
    size_bytes: int
    measured: Interval


@dataclass(frozen=True)
class Smallest:
    """The smallest candidate found whose interval lies under the bound, with its measured neighbours in size (None at an end)."""

    answer: MeasuredProposal
    smaller: MeasuredProposal | None
    larger: MeasuredProposal | None
    candidates: tuple[MeasuredProposal, ...]
    bound: float


def smallest(
    space: SearchSpace,
    front: Sequence[Assignment],
    measure: Callable[[Assignment], Interval],
    between: Callable[[int, int], Sequence[Assignment]],
    bound: float,
    rounds: int = 4,
) -> Smallest:
    """The smallest assignment whose measured cost has its upper 95 % limit at or under `bound`.

    `front` are first candidates; `between(low, high)` proposes assignments of more than `low` and less than `high` bytes, at
    most `rounds` times. Raises InfeasibleError where no candidate meets the bound, with the best that was measured.
    """
    found: dict[Assignment, MeasuredProposal] = {}

    def add(assignments: Sequence[Assignment]) -> None:
        for assignment in dict.fromkeys(assignments):
            if assignment not in found:
                found[assignment] = MeasuredProposal(assignment, space.size_bytes(assignment), measure(assignment))

    def in_order() -> list[MeasuredProposal]:
        return sorted(found.values(), key=lambda c: (c.size_bytes, ordered(c.measured.high)))

    add(front)
    for _ in range(rounds):
        order = in_order()
        first = _first_within(order, bound)
        if first is None or first == 0:
            break
        low, high = order[first - 1].size_bytes, order[first].size_bytes
        fresh = [a for a in between(low, high) if a not in found] if high - low > 1 else []
        if not fresh:
            break
        add(fresh)
    order = in_order()
    first = _first_within(order, bound)
    if first is None:
        best = min(order, key=lambda c: ordered(c.measured.high))
        raise InfeasibleError(
            f"no candidate is measured to stay under {bound:g} with 95 % confidence; the closest costs {best.measured.mean:.4g} "
            f"({best.measured.low:.4g} to {best.measured.high:.4g} on {best.measured.num_images} images) at {best.size_bytes:,} "
            "bytes: allow more, measure on more images (selection_images), or offer wider bits"
        )
    larger = order[first + 1] if first + 1 < len(order) else None
    return Smallest(order[first], order[first - 1] if first else None, larger, tuple(order), bound)


def _first_within(order: Sequence[MeasuredProposal], bound: float) -> int | None:
    return next((k for k, candidate in enumerate(order) if candidate.measured.high <= bound), None)
