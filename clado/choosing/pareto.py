"""Budget sweeps: the best assignment at each of many bounds of one constraint. NumPy only.

Every function takes a solver as a callable `solve(program, starts)`. `clado.choosing.solvers.prepare(program)` makes one. It
computes only once what all bounds share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from clado.choosing.program import Program, Solve
from clado.choosing.solution import Solution
from clado.errors import CladoError, ConfigurationError, InfeasibleError
from clado.records.documents import read_document, space_document, space_of, unreadable, write_document
from clado.records.tabular import Tabular

FORMAT = "clado-front/1"
_FILE = "a file that `Front.save` wrote"


@dataclass(frozen=True)
class ParetoPoint:
    """The answer at one bound."""

    bound: float
    """The bound of the constraint, in its unit."""
    value: float
    """The value of the constraint, which is at most the bound."""
    solution: Solution
    """The solver's answer."""


@dataclass(frozen=True, repr=False)
class Front(Tabular):
    """The answers at several budgets of one kind, in ascending order of the budgets."""

    budget: str
    """The keyword of the budgets, such as average_bits."""
    bounds: tuple[float, ...]
    """The budgets that were asked for."""
    solutions: tuple[Solution, ...]
    """The answer to each budget."""

    def __len__(self) -> int:
        return len(self.bounds)

    def summary(self) -> str:
        """Budgets and sizes, in one line."""
        if not self.bounds:
            return "no budget"
        sizes = f"{self.solutions[0].size_bytes:,} to {self.solutions[-1].size_bytes:,} bytes"
        return f"{len(self)} budgets, {self.budget} {self.bounds[0]:g} to {self.bounds[-1]:g}, {sizes}"

    def rows(self) -> list[dict[str, Any]]:
        """Each budget: bits, bytes, predicted increase, status and gap of its answer."""
        return [
            {
                self.budget if self.budget not in ("average_bits", "size_bytes") else f"budget_{self.budget}": bound,
                "average_bits": solution.average_bits,
                "size_bytes": solution.size_bytes,
                "predicted_increase": solution.objective,
                "status": str(solution.status),
                "gap": solution.gap,
            }
            for bound, solution in zip(self.bounds, self.solutions, strict=True)
        ]

    def save(self, path: str | Path) -> None:
        """Writes the front as JSON, for `load`."""
        rows = [{"bound": b, "solution": s.document()} for b, s in zip(self.bounds, self.solutions, strict=True)]
        space = space_document(self.solutions[0].space) if self.solutions else None
        write_document(path, {"format": FORMAT, "budget": self.budget, "space": space, "points": rows})

    @classmethod
    def load(cls, path: str | Path) -> "Front":
        """The front that `save` wrote.

        Raises:
            StoreError: The file is missing, or holds something else.
        """
        document = read_document(path, FORMAT, _FILE)
        try:
            space = space_of(document["space"])
            bounds = tuple(row["bound"] for row in document["points"])
            solutions = tuple(Solution.of_document(row["solution"], space) for row in document["points"])
            return cls(document["budget"], bounds, solutions)
        except (KeyError, TypeError, ValueError, CladoError) as error:
            raise unreadable(path, error, _FILE) from None


def within_reach(program: Program, constraint: str, bounds: Sequence[float]) -> list[float]:
    """The bounds that some assignment meets, without the other constraints."""
    index = _index(program, constraint)
    smallest = program.reachable(index)[0]
    return [bound for bound in bounds if smallest <= program.constraints[index].with_bound(bound).limit]


def sweep(program: Program, constraint: str, bounds: Sequence[float], solve: Solve) -> list[ParetoPoint]:
    """Solves the program at each bound of one constraint. The other constraints keep their bounds.

    The largest bound is solved first. An answer that meets the next smaller bound is proven there as well. An answer that does
    not meet it starts the search there. If limits and forbidden pairs together leave no assignment at a bound, this bound and
    smaller ones have no point.

    Returns:
        Points in ascending order of their bounds.

    Raises:
        InfeasibleError: A bound is out of reach, before anything is solved; or no bound has a point.
        ConfigurationError: There are no bounds, or the program does not have the constraint.
    """
    index = _index(program, constraint)
    if not bounds:
        raise ConfigurationError("there are no budgets; give at least one")
    programs = [program.with_bounds({constraint: bound}) for bound in sorted(set(bounds), reverse=True)]
    points: list[ParetoPoint] = []
    for bounded in programs:
        bound, limit = bounded.constraints[index].bound, bounded.constraints[index].limit
        previous = points[-1].solution if points else None
        if previous is not None and previous.values[constraint] <= limit:
            slack = {**previous.slack, constraint: bound - previous.values[constraint]}
            solution = replace(previous, slack=slack, seconds=0.0, nodes=0)
        else:
            try:
                solution = solve(bounded, () if previous is None else (previous.assignment,))
            except InfeasibleError:
                if not points:
                    raise
                break
        points.append(ParetoPoint(bound, solution.values[constraint], solution))
    return points[::-1]


def smallest_bound(program: Program, constraint: str, largest_increase: float, solve: Solve, resolution: float = 1.0) -> Solution:
    """The smallest value of one constraint at which the minimised function stays at or below `largest_increase`.

    Bisection works because the optimum does not rise with the bound. The result is exact to `resolution` (in the constraint's
    unit) if the solver's answers are proven.

    Raises:
        InfeasibleError: The program predicts a larger increase at its own bound.
    """
    index = _index(program, constraint)
    low, most = program.reachable(index)
    high = min(most, program.constraints[index].bound)
    best = solve(program.with_bounds({constraint: high}))
    if best.minimised > largest_increase:
        condition = f"whatever the {constraint}" if high == most else f"within a {constraint} of {high:g}"
        raise InfeasibleError(
            f"the predicted increase is at least {best.bound:.6g} (found: {best.minimised:.6g}) {condition}; "
            f"asked for was at most {largest_increase:.6g}"
        )
    too_small = low - resolution  # no assignment has exactly this value
    while best.values[constraint] - too_small > resolution:
        middle = max(low, (too_small + best.values[constraint]) / 2)
        if program.constraints[index].is_integral:
            middle = float(np.floor(middle))
        try:
            solution = solve(program.with_bounds({constraint: middle}), (best.assignment,))
        except InfeasibleError:
            too_small = middle
            continue
        if solution.minimised <= largest_increase:
            best = solution
        else:
            too_small = middle
    return best


def _index(program: Program, constraint: str) -> int:
    names = [c.name for c in program.constraints]
    if constraint not in names:
        raise ConfigurationError(f"the program has no constraint {constraint!r}; it has {', '.join(names) or 'none'}")
    return names.index(constraint)
