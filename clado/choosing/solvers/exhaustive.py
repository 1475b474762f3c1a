"""Tries every assignment: the reference for all other solvers. For small programs only."""

import time

import numpy as np

from clado.choosing.program import Program
from clado.choosing.solution import Status
from clado.choosing.solvers import Outcome, Solver, Task
from clado.errors import SolverError

MOST = 20_000_000
CHUNK = 50_000


def search(program: Program, task: Task) -> Outcome:
    """Evaluates every assignment. Refuses more than 20 million of them."""
    num_choices = np.diff(program.starts)
    free_groups = np.flatnonzero(num_choices > 1)  # NumPy's indices have at most 64 axes, and there may be more groups
    total = int(np.prod(num_choices.astype(object)))
    if total > MOST:
        raise SolverError(
            f"exhaustive search would try {total:.3g} assignments, more than the limit of {MOST:,}; use solver 'scip'"
        )
    best, best_value, nodes = None, np.inf, 0
    for start in range(0, total, CHUNK):
        if nodes and (time.perf_counter() > task.deadline or (task.node_limit is not None and nodes >= task.node_limit)):
            return Outcome(Status.LIMIT, best, -np.inf, nodes)
        index = np.arange(start, min(start + CHUNK, total))
        choices = np.tile(program.starts[:-1], (len(index), 1))
        if len(free_groups):
            choices[:, free_groups] += np.stack(np.unravel_index(index, tuple(num_choices[free_groups])), axis=1)
        nodes += len(choices)
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
        return Outcome(Status.INFEASIBLE, None, np.inf, nodes)
    return Outcome(Status.OPTIMAL, best, program.minimised(best), nodes)


solver = Solver(search)
