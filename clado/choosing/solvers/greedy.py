"""Starts from the widest bits. Takes the narrowing that costs least per unit of budget, until every limit holds. No proof."""

import numpy as np

from clado.choosing.program import Program
from clado.choosing.solution import Status
from clado.choosing.solvers import Outcome, Solver, Task
from clado.choosing.solvers._start import Descent, start


def search(program: Program, task: Task) -> Outcome:
    """Repairs the widest choices, then takes single moves that fit.

    If the repair fails, or takes a forbidden pair, the start search gives the choices.
    """
    descent = Descent(program)
    choices = descent.repair(program.widest)
    if choices is None or not program.is_feasible(choices):
        choices = start(program, task.starts, kicks=0)
    if choices is None:
        return Outcome(
            Status.HEURISTIC, None, -np.inf, message="Greedy search proves nothing: 'scip' decides whether an answer exists."
        )
    for _ in range(10 * program.num_groups):
        room = program.limits - program.costs[:, choices].sum(axis=1)
        fits = (program.costs - program.costs[:, choices[program.owner]] <= room[:, None]).all(axis=0)
        change = np.where(fits, descent.single(choices), np.inf)
        k = int(change.argmin())
        if change[k] >= -1e-12 * descent.scale:
            break
        choices[program.owner[k]] = k
    return Outcome(Status.HEURISTIC, choices, -np.inf, nodes=0)


solver = Solver(search)
