"""Solvers of the program: `scip` proves optimality, `exhaustive` tries every assignment, `greedy` is a heuristic.

To add a solver, add a file to this folder with an object `solver = Solver(...)`, and subclass `SolverContract`
(tests/contracts/solver.py) for it. The file's name is the solver's name; it is imported when first used.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from clado.choosing.program import Choices, Program
from clado.choosing.program import Solve as Solve
from clado.choosing.solution import Solution, Status
from clado.choosing.solvers._start import better_than_widest
from clado.errors import InfeasibleError, SolverError, SolverInterrupted
from clado.plugins import load
from clado.space import Assignment

TOLERANCE = 1e-6
"""Relative tolerance of "optimal": nothing is better by more than this share of `|objective|`."""


@dataclass(frozen=True)
class Task:
    """How far to search, and from where."""

    deadline: float = np.inf
    """When to stop, on the clock of `time.perf_counter`."""
    node_limit: int | None = None
    """Nodes of the tree at most."""
    gap_limit: float = 0.0
    """The relative gap at which to stop."""
    starts: tuple[Choices, ...] = ()
    """Choices to start from. Those that break constraints are repaired or dropped."""
    shared: "Shared | None" = None
    """What solves of the same function with other bounds may share."""

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline, never negative."""
        return max(0.0, self.deadline - time.perf_counter())


@dataclass
class Shared:
    """Results that a solver computes once for a function. They hold for all bounds."""

    program: Program
    """The program that it is computed for."""
    kept: dict[str, object] = field(default_factory=dict)
    """The results, by name."""


@dataclass(frozen=True)
class Outcome:
    """The answer of a solver."""

    status: Status
    """How it ended."""
    choices: Choices | None
    """One choice for each group. None if there is none."""
    bound: float
    """A lower bound on the minimised function."""
    nodes: int = 0
    """Nodes of the tree that were solved."""
    message: str = ""
    """A message of the solver."""


@dataclass(frozen=True)
class Solver:
    """Everything that the rest of the code must know about a solver."""

    search: Callable[[Program, Task], Outcome]
    """Searches for an answer within the limits of the task."""


def solver_of(name: str) -> Solver:
    """The solver of a name, or of `package.module:name`."""
    solver: Solver = load("solvers", name)
    return solver


def prepare(
    program: Program,
    solver: str = "scip",
    *,
    time_limit: float | None = 120.0,
    node_limit: int | None = None,
    gap_limit: float = 0.0,
) -> Solve:
    """A solver for this program and for any `program.with_bounds(...)`: what depends on the function alone is computed once."""
    search, shared = solver_of(solver).search, Shared(program)

    def prepared(program: Program, starts: Sequence[Assignment] = ()) -> Solution:
        begin = time.perf_counter()
        same = program.quadratic is shared.program.quadratic
        task = Task(
            np.inf if time_limit is None else begin + time_limit,
            node_limit,
            gap_limit,
            tuple(program.choices(start) for start in starts),
            shared if same else None,
        )
        return _solved(program, solver, search, task, begin)

    return prepared


def solve(
    program: Program,
    solver: str = "scip",
    *,
    time_limit: float | None = 120.0,
    node_limit: int | None = None,
    gap_limit: float = 0.0,
    starts: Sequence[Assignment] = (),
) -> Solution:
    """The best assignment of the program.

    `time_limit` is in seconds and includes everything. `gap_limit` is relative (0.01 stops within 1 %). `starts` are assignments
    to start from. After the time limit or Ctrl-C, the best assignment found is returned, with its bound and gap. If the time
    limit is not reached, the same program gives the same answer at any load of the machine. Raises InfeasibleError if nothing
    meets the constraints, and SolverError if nothing was found in time (SolverInterrupted: before Ctrl-C).
    """
    return prepare(program, solver, time_limit=time_limit, node_limit=node_limit, gap_limit=gap_limit)(program, starts)


def _solved(program: Program, solver: str, search: Callable[[Program, Task], Outcome], task: Task, begin: float) -> Solution:
    outcome = search(program, task)
    if outcome.status is Status.INFEASIBLE:
        raise InfeasibleError(_why_infeasible(program, search))
    if outcome.choices is None:
        kind = SolverInterrupted if outcome.status is Status.INTERRUPTED else SolverError
        raise kind(
            f"{solver} found no assignment within the constraints ({outcome.status}). {outcome.message or outcome.status.advice}"
        )
    better = better_than_widest(program)
    return program.solution(
        outcome.choices,
        outcome.status,
        outcome.bound,
        solver=solver,
        seconds=time.perf_counter() - begin,
        nodes=outcome.nodes,
        better_than_widest=None if better is None else program.assignment(better),
        message=outcome.message,
    )


def _why_infeasible(program: Program, search: Callable[[Program, Task], Outcome]) -> str:
    """The program's explanation, with the least value that each constraint can have while the others hold."""
    lines = [program.why_infeasible()]
    for index, constraint in enumerate(program.constraints):
        outcome = search(program.minimising(index), Task())
        if outcome.choices is not None and outcome.status is Status.OPTIMAL:
            least = float(program.costs[index, outcome.choices].sum())
            needed = f"{constraint.typed(least)} {constraint.typed_unit or constraint.unit}"
            lines.append(f"with the other constraints as they are, {constraint.name} needs at least {needed}")
    return ". ".join(lines)
