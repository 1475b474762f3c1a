"""Every assignment, one after another: the reference that other solvers are checked against. For small programs only."""

import time

import numpy as np

from clado.choosing.program import Program, Status
from clado.choosing.solvers import Outcome, Solver, Task
from clado.errors import SolverError

MOST = 20_000_000
CHUNK = 50_000


def search(program: Program, task: Task) -> Outcome:
    """Enumerates; refuses more than 20 million assignments."""
    widths = np.diff(program.starts)
    free = np.flatnonzero(widths > 1)  # NumPy's indices have 64 axes at most, and groups may be many more
    total = int(np.prod(widths.astype(object)))
    if total > MOST:
        raise SolverError(
            f"exhaustive search would try {total:.3g} assignments, at most {MOST:,} are sensible; use solver 'scip'"
        )
    best, best_value, tried = None, np.inf, 0
    for first in range(0, total, CHUNK):
        if tried and (time.perf_counter() > task.deadline or (task.node_limit is not None and tried >= task.node_limit)):
            return Outcome(Status.LIMIT, best, -np.inf, tried)
        index = np.arange(first, min(first + CHUNK, total))
        choices = np.tile(program.starts[:-1], (len(index), 1))
        if len(free):
            choices[:, free] += np.stack(np.unravel_index(index, tuple(widths[free])), axis=1)
        tried += len(choices)
        x = np.zeros((len(choices), program.num_choices))
        np.put_along_axis(x, choices, 1.0, axis=1)
        feasible = np.ones(len(choices), dtype=bool)
        for costs, limit in zip(program.costs, program.limits, strict=True):
            feasible &= costs[choices].sum(axis=1) <= limit
        for a, b in program.forbidden:
            feasible &= x[:, a] + x[:, b] < 2
        if feasible.any():
            x = x[feasible]
            values = 0.5 * np.einsum("ck,ck->c", x @ program.quadratic, x)
            k = int(values.argmin())
            if values[k] < best_value:
                best, best_value = choices[feasible][k], float(values[k])
    if best is None:
        return Outcome(Status.INFEASIBLE, None, np.inf, tried)
    return Outcome(Status.OPTIMAL, best, program.minimised(best), tried)


solver = Solver(search)
