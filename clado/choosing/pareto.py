"""Budget sweeps: the best assignment at each of many bounds of one constraint. NumPy only.

Nothing here knows a solver: a `solve(program, starts)` callable is given. `clado.choosing.solvers.prepare(program)` makes
one that computes once what all bounds share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from clado.choosing.program import Program, Solution, Solve
from clado.errors import ConfigurationError, InfeasibleError


@dataclass(frozen=True)
class ParetoPoint:
    """The answer at one bound; `value` is what it takes of the bound."""

    bound: float
    value: float
    solution: Solution


def within_reach(program: Program, constraint: str, bounds: Sequence[float]) -> list[float]:
    """The bounds that some assignment meets, the other constraints aside."""
    index = _index(program, constraint)
    smallest = program.reachable(index)[0]
    return [bound for bound in bounds if smallest <= program.constraints[index].with_bound(bound).limit]


def sweep(program: Program, constraint: str, bounds: Sequence[float], solve: Solve) -> list[ParetoPoint]:
    """Solves the program at each bound of one constraint, the others as they are. Points in ascending order of their bounds.

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
    return points[::-1]


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
