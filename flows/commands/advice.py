"""What a command recommends without measuring, and the next command."""

from collections import Counter
from collections.abc import Collection

from clado.choosing import solvers
from clado.choosing.proposals import Budget, program_of
from clado.choosing.solution import Solution
from clado.errors import InfeasibleError
from clado.records.results import CHOSEN
from clado.records.run_record import RunRecord
from clado.space import Assignment
from flows.commands.stored import StoredRun, predicted_text

FIRST = "layerwise"
"""The default estimator. Another one's answer replaces its answer only if it is measured to be better (`choosing/choice.py`)."""


def favourite(stored: StoredRun, names: Collection[str]) -> tuple[str, str]:
    """(the estimator whose answers the run chose most often, why it is recommended); `FIRST` if it chose none of them."""
    file = stored.folder / "record.json"
    rows = [row for row in RunRecord.load(file).results if row.method == CHOSEN] if file.is_file() else []
    words = [(row.winner or "").replace(",", " ").split() for row in rows]
    counts = Counter(first for first, *_ in filter(None, words) if first in names)
    if counts:
        name, count = counts.most_common(1)[0]
        return name, f"chosen at {count} of {len(rows)} budgets of this run"
    name = FIRST if FIRST in names else next(iter(names))
    return name, "which another replaces only where it is measured to be better"


def after_solving(stored: StoredRun, answers: dict[str, Solution]) -> str:
    """Says which of the answers to one question to take, and which command measures them."""
    name, why = favourite(stored, answers)
    return (
        f"Recommended: the answer of {name}, {why}. Predictions of different estimators do not compare; what is measured does.\n"
        f"Next: clado evaluate {stored.folder} --size-bytes {answers[name].size_bytes} measures such answers and chooses one."
    )


def after_scoring(stored: StoredRun, assignment: Assignment) -> str:
    """Says whether an estimator predicts a lower loss for another assignment of at most the same size."""
    space, matrices = stored.measured.space, stored.matrices.named
    name, _ = favourite(stored, matrices)
    matrix, budget = matrices[name], Budget("size", space.size_bytes(assignment))
    following = (
        f"\nNext: clado evaluate {stored.folder} --size-bytes {int(budget.bound)} measures the run's answers of this size."
    )
    try:
        program = program_of(matrix, stored.limits_of(budget, ()))
        solution = solvers.solve(program, stored.config.solver.name, time_limit=stored.config.solver.time_limit)
    except InfeasibleError:  # no assignment of this size is within the other limits of the run
        return f"Recommended: the run's own answers; none is as small within the run's limits.{following}"
    better = solution.objective < matrix.predicted_increase(assignment) - 1e-9 * abs(solution.objective)
    if not better:
        return f"Recommended: this assignment; {name} predicts no less for any other of its size.{following}"
    return (
        f"Recommended: the answer of {name} at this size, predicted loss {predicted_text(matrix, solution.objective)} "
        f"with {space.average_bits(solution.assignment):.3f} bits a weight.{following}"
    )
