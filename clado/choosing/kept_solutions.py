"""Solutions on disk: a program that was solved to the end is not solved again."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from clado.choosing.program import Program
from clado.choosing.solution import Solution, Status
from clado.choosing.solvers import Solve
from clado.errors import StoreError
from clado.records.documents import space_document
from clado.space import Assignment


def kept(solve: Solve, folder: Path, solver: str) -> Solve:
    """Solves like `solve`, and reads the answer if the same program was solved to its optimum before.

    Args:
        solve: Solves a program.
        folder: The folder of the solutions. They are written there.
        solver: The name of the solver. Another solver may choose another of several best answers.
    """

    def solved(program: Program, starts: Sequence[Assignment] = ()) -> Solution:
        file = folder / f"{_key(program, starts, solver)}.json"
        with suppress(StoreError):  # absent, or damaged
            known = Solution.load(file)
            if program.offers(known.assignment) and program.is_feasible(program.choices(known.assignment)):
                return known
        solution = solve(program, starts)
        if solution.status is Status.OPTIMAL:
            solution.save(file)
        return solution

    return solved


def _key(program: Program, starts: Sequence[Assignment], solver: str) -> str:
    """A hash of everything that the answer depends on."""
    plain = {
        "solver": solver,
        "estimator": program.matrix.estimator,
        "convexity": program.convexity,
        "space": space_document(program.space),
        "options": program.options,
        "forbidden": program.forbidden,
        "constraints": [constraint.name for constraint in program.constraints],
        "starts": [str(start) for start in starts],
    }
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode())
    for array in (program.matrix.values, program.quadratic, program.costs, program.limits):
        digest.update(array.tobytes())
    return digest.hexdigest()[:24]
