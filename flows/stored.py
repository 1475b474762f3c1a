"""A finished run, read back from its folder: new budgets from stored shards, without measuring."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clado import estimators, solvers
from clado.candidates import Budget, Proposal, choose, program_of, widest_uniform
from clado.config import RunConfig, load_config
from clado.errors import StoreError
from clado.estimators import Measured
from clado.interaction import InteractionMatrix
from clado.probes import Plan
from clado.program import Solution
from clado.records import CHOSEN, UNIFORM, Accuracy, markdown_table, percent
from clado.shards import Store
from clado.space import Assignment, Layer, SearchSpace
from flows.session import Session


@dataclass(frozen=True)
class StoredRun:
    """The configuration and the measurements of a run's folder."""

    folder: Path
    config: RunConfig
    measured: Measured

    @classmethod
    def open(cls, folder: Path) -> "StoredRun":
        """Reads a run's folder; StoreError where it holds no complete measurement."""
        if not (folder / "config.yaml").is_file():
            raise StoreError(
                f"{folder} is not the folder of a run: it has no config.yaml; expected such as `clado run` makes under runs/"
            )
        config = load_config(folder / "config.yaml", [f"folder={json.dumps(str(folder))}"])
        store = Store.open(folder / "store.zarr")
        coverage = store.coverage
        layers = [Layer(**{**row, "shape": tuple(row["shape"])}) for row in coverage["layers"]]
        space = SearchSpace(tuple(layers), tuple(tuple(bits) for bits in coverage["bits"]))
        blocks = tuple((start, stop) for start, stop in coverage["blocks"])
        plan = Plan(space, blocks, estimators.kinds_of(config.estimators), store.rows_per_tile)
        return cls(folder, config, Measured(space, config.criterion, store.counts, store.gather(plan)))

    def matrices(self) -> dict[str, InteractionMatrix]:
        """One matrix for each estimator of the configuration."""
        return {name: estimators.estimate(name, self.measured) for name in self.config.estimators}

    def solve(self, budget: Budget) -> Iterator[tuple[str, InteractionMatrix, Solution]]:
        """(estimator, its matrix, its optimum) for a budget."""
        settings = self.config.solver
        for name, matrix in self.matrices().items():
            program = program_of(matrix, [budget.constraint(self.measured.space)])
            yield name, matrix, solvers.solve(program, settings.name, time_limit=settings.time_limit)

    def document(self, matrix: InteractionMatrix, solution: Solution) -> str:
        """A solution as JSON: the assignment, and how far it is proven."""
        document = self.measured.space.to_json(solution.assignment)
        document |= {
            "estimator": matrix.estimator,
            "loss_predicted": matrix.baseline + solution.objective,
            "status": str(solution.status),
        }
        return json.dumps(document, indent=1)


def solution_text(name: str, matrix: InteractionMatrix, solution: Solution) -> str:
    """One solution for the terminal."""
    space = matrix.space
    return (
        f"{name}: {solution.status}, predicted loss {matrix.baseline + solution.objective:.4f}, gap {100 * solution.gap:.4f} %, "
        f"{solution.seconds:.2f} s; {space.average_bits(solution.assignment):.3f} bits, "
        f"{space.size_bytes(solution.assignment):,} bytes\n"
        f"  {solution.assignment}"
    )


def candidates_of(stored: StoredRun, session: Session, budget: Budget) -> list[Proposal]:
    """Uniform and every estimator's proposal for one budget."""
    space = stored.measured.space
    proposals = [Proposal(budget, UNIFORM, widest_uniform(space, budget.constraint(space)))]
    for name, matrix, solution in stored.solve(budget):
        proposals.append(Proposal(budget, name, solution.assignment, matrix.baseline + solution.objective, solution))
    return proposals


def measured_losses(session: Session, proposals: list[Proposal]) -> dict[Assignment, float]:
    """Loss of each distinct proposal on the sensitivity set: read where it is known, else measured here."""
    ledger = session.ledger("sensitivity")
    found: dict[Assignment, float] = {}
    for assignment in dict.fromkeys(proposal.assignment for proposal in proposals):
        counts = ledger.get(assignment)
        if counts is None:
            counts = session.loss(assignment)
            ledger.put(assignment, counts)
        found[assignment] = counts.accuracy().loss
    return found


def chosen_for(stored: StoredRun, session: Session, budget: Budget) -> Assignment:
    """The proposal of least measured loss for a budget."""
    proposals = candidates_of(stored, session, budget)
    rows = choose(session.space, proposals, measured_losses(session, proposals))
    return next(row.assignment for row in rows if row.method == CHOSEN)


def accuracy_of(session: Session, assignment: Assignment) -> Accuracy:
    """Accuracy on the validation set: read where it is known, else counted here."""
    ledger = session.ledger("validation")
    counts = ledger.get(assignment)
    if counts is None:
        counts = session.accuracy(assignment, 0, len(session.slices.validation))
        ledger.put(assignment, counts)
    return counts.accuracy()


def evaluation_text(stored: StoredRun, session: Session, budget: Budget | None) -> str:
    """Methods and their accuracy, for one budget or for every budget of the run."""
    rows = []
    for wanted in [budget] if budget else session.budgets:
        proposals = candidates_of(stored, session, wanted)
        for row in choose(session.space, proposals, measured_losses(session, proposals)):
            accuracy = accuracy_of(session, row.assignment)
            cells = [wanted.name, row.method, f"{row.size_bytes:,}", f"{row.average_bits:.3f}", f"{row.loss_shipped:.4f}"]
            rows.append([*cells, percent(accuracy.top1), percent(accuracy.top5), f"{accuracy.loss:.4f}"])
    header = ["budget", "method", "bytes", "bits", "measured loss", "top-1 %", "top-5 %", "validation loss"]
    return markdown_table(header, rows)
