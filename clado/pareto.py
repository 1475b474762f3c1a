"""Budget sweeps: the best assignment at each of many bounds of one constraint, and which of them are worth having. NumPy only.

Nothing here knows a solver: a `solve(program, starts)` callable is given. `clado.solvers.prepare(program)` makes one that
computes once what all bounds share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from clado.errors import ConfigurationError, InfeasibleError
from clado.program import Program, Solution, Solve


@dataclass(frozen=True)
class ParetoPoint:
    """The answer at one bound. `dominated`: another point costs no more and predicts no larger loss, and is better in one of
    the two.
    """

    bound: float
    value: float
    solution: Solution
    dominated: bool = False


@dataclass(frozen=True)
class ParetoFront:
    """Points in ascending order of their bounds; `constraint` and `unit` say what the bounds and values count."""

    constraint: str
    unit: str
    points: tuple[ParetoPoint, ...]

    @property
    def efficient(self) -> tuple[ParetoPoint, ...]:
        """The points that no other dominates."""
        return tuple(point for point in self.points if not point.dominated)


def even_bounds(program: Program, constraint: str, count: int) -> list[float]:
    """`count` bounds, evenly from the smallest reachable value to the largest; whole numbers where the costs are."""
    if count < 2:
        raise ConfigurationError(f"a sweep of {count} budgets; expected at least 2")
    index = _index(program, constraint)
    bounds = np.linspace(*program.reachable(index), count)
    return [float(b) for b in (np.floor(bounds) if program.constraints[index].is_integral else bounds)]


def within_reach(program: Program, constraint: str, bounds: Sequence[float]) -> list[float]:
    """The bounds that some assignment meets, the other constraints aside."""
    index = _index(program, constraint)
    smallest = program.reachable(index)[0]
    return [bound for bound in bounds if smallest <= program.constraints[index].with_bound(bound).limit]


def sweep(program: Program, constraint: str, bounds: Sequence[float], solve: Solve) -> ParetoFront:
    """Solves the program at each bound of one constraint, the others as they are.

    From the largest bound down: an answer that fits the next bound is proven there as well, and starts the search where it does
    not. A bound that is out of reach raises InfeasibleError before anything is solved. Where limits or forbidden pairs together
    leave nothing at a bound, it and those below it have no point; InfeasibleError where none has.
    """
    index = _index(program, constraint)
    if not bounds:
        raise ConfigurationError("a sweep without budgets; give at least one")
    programs = [program.with_bounds({constraint: bound}) for bound in sorted(set(bounds), reverse=True)]
    points: list[ParetoPoint] = []
    for bounded in programs:
        bound, limit = bounded.constraints[index].bound, bounded.constraints[index].limit
        before = points[-1].solution if points else None
        if before is not None and before.values[constraint] <= limit:
            slack = {**before.slack, constraint: bound - before.values[constraint]}
            solution = replace(before, slack=slack, seconds=0.0, nodes=0)
        else:
            try:
                solution = solve(bounded, () if before is None else (before.assignment,))
            except InfeasibleError:
                if not points:
                    raise
                break
        points.append(ParetoPoint(bound, solution.values[constraint], solution))
    points.reverse()
    return ParetoFront(constraint, program.constraints[index].unit, mark_dominated(points))


def mark_dominated(points: Sequence[ParetoPoint]) -> tuple[ParetoPoint, ...]:
    """The points with `dominated` set, judged by value and predicted loss increase on the raw matrix. Equal points do not
    dominate each other.
    """

    def dominates(a: ParetoPoint, b: ParetoPoint) -> bool:
        no_worse = a.value <= b.value and a.solution.objective <= b.solution.objective
        return no_worse and (a.value < b.value or a.solution.objective < b.solution.objective)

    return tuple(replace(point, dominated=any(dominates(other, point) for other in points)) for point in points)


def smallest_bound(program: Program, constraint: str, largest_increase: float, solve: Solve, resolution: float = 1.0) -> Solution:
    """The other direction: the smallest value of one constraint whose minimised function stays at or under `largest_increase`.

    Bisection, since the optimum does not rise with the bound; exact to `resolution` (in the constraint's unit) as far as the
    solver's answers are proven. Raises InfeasibleError when even the program's own bound predicts a larger increase.
    """
    index = _index(program, constraint)
    low, most = program.reachable(index)
    high = min(most, program.constraints[index].bound)
    best = solve(program.with_bounds({constraint: high}))
    if best.minimised > largest_increase:
        within = f"whatever the {constraint}" if high == most else f"within a {constraint} of {high:g}"
        raise InfeasibleError(
            f"the predicted increase is at least {best.bound:.6g} (found: {best.minimised:.6g}) {within}; "
            f"asked for was at most {largest_increase:.6g}"
        )
    below = low - resolution  # nothing is that small
    while best.values[constraint] - below > resolution:
        middle = max(low, (below + best.values[constraint]) / 2)
        if program.constraints[index].is_integral:
            middle = float(np.floor(middle))
        try:
            tried = solve(program.with_bounds({constraint: middle}), (best.assignment,))
        except InfeasibleError:
            below = middle
            continue
        if tried.minimised <= largest_increase:
            best = tried
        else:
            below = middle
    return best


def _index(program: Program, constraint: str) -> int:
    names = [c.name for c in program.constraints]
    if constraint not in names:
        raise ConfigurationError(f"the program has no constraint {constraint!r}; it has {', '.join(names) or 'none'}")
    return names.index(constraint)
