"""A finished run, read back from its folder: new budgets from stored measurements."""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from clado.choosing import pareto, solvers
from clado.choosing.constraints import Constraint
from clado.choosing.program import Program
from clado.choosing.proposals import (
    Budget,
    Matrices,
    Optima,
    Proposal,
    each_budget,
    merge_limits,
    program_of,
    propose,
    propose_uncorrected,
)
from clado.choosing.solution import Solution
from clado.choosing.solvers import Solve
from clado.errors import ConfigurationError, DataError
from clado.evaluation import Counts
from clado.interaction import estimators
from clado.interaction.estimators import Measured
from clado.interaction.matrix import InteractionMatrix
from clado.measuring.plan import Plan
from clado.records.results import CHOSEN, FLOAT, UNIFORM, Accuracy, Receipt, Result
from clado.records.run_record import RunRecord
from clado.records.text import file_name, markdown_table, percent, write_text
from clado.reporting.summary import layers_text
from clado.reporting.tables import loss_text
from clado.run.limits import latency_table, limit_of, limits_of
from clado.run.opened_run import OpenedRun
from clado.run.plugin_checks import check_constraint
from clado.settings.loading import load_run_config, parse_limit
from clado.settings.schema import RunConfig
from clado.space import Assignment
from clado.storage.measurement_store import MeasurementStore
from clado.tracking import delivery, metrics
from flows.guard import uninterrupted
from flows.phases.choose import chosen_of, mean_losses, with_best_corrections, with_final_corrections, with_other_corrections


@dataclass(frozen=True)
class StoredRun:
    """The settings and the measurements of a run's folder."""

    folder: Path
    """The folder of the run."""
    config: RunConfig
    """Its settings, as the folder keeps them."""
    measured: Measured
    """The measurements of its store."""

    @classmethod
    def open(cls, folder: Path) -> "StoredRun":
        """Reads a run's folder; StoreError if it holds no complete measurement."""
        config = load_run_config(folder)
        store = MeasurementStore.open(config.store or folder / "store.zarr")
        space = store.space.tied(config.layers.ties).blocked(config.layers.blocks)
        blocks = tuple((start, stop) for start, stop in store.coverage["blocks"])
        kinds, drawn = estimators.kinds_of(config.estimators, bool(config.corrections)), config.gradients
        plan = Plan(space, blocks, kinds, store.rows_per_tile, drawn.vectors, drawn.seed)
        return cls(folder, config, Measured(space, config.criterion, store.counts, store.gather(plan)))

    @property
    def limits(self) -> list[Constraint]:
        """Limits that every answer must meet in addition to its budget."""
        return limits_of(self.config, self.measured.space)

    @cached_property
    def matrices(self) -> Matrices:
        """The matrices of the configuration's estimators, and of those that are tried in addition."""
        return Matrices.of(self.measured, self.config.estimators)

    def prepare(self, program: Program) -> Solve:
        """The configuration's solver for a program. A signal ends the command."""
        settings = self.config.solver
        return uninterrupted(solvers.prepare(program, settings.name, time_limit=settings.time_limit))

    def propose(self, budgets: Sequence[Budget], optima: Optima = each_budget) -> list[Proposal]:
        """Uniform bits and the optimum of every matrix for budgets, with and without corrections."""
        proposals = propose(self.matrices.every, budgets, self.prepare, self.limits, optima=optima)
        reported = (UNIFORM, *self.matrices.named)
        proposals = [replace(proposal, reported=proposal.method in reported) for proposal in proposals]
        return proposals + self.uncorrected(budgets)

    def uncorrected(self, budgets: Sequence[Budget]) -> list[Proposal]:
        """Proposals without corrections. They cost solver time only."""
        return propose_uncorrected(self.matrices.uncorrected, budgets, self.prepare, self.limits)

    def solve(self, budget: Budget, limits: Sequence[str] = ()) -> Iterator[tuple[str, InteractionMatrix, Solution]]:
        """(estimator, its matrix, its optimum) for a budget and more limits, each KIND=BOUND or KIND=BOUND:CSV."""
        settings = self.config.solver
        for name, matrix in self.matrices.named.items():
            program = program_of(matrix, self.limits_of(budget, limits))
            yield name, matrix, solvers.solve(program, settings.name, time_limit=settings.time_limit)

    def rivals(self, matrix: InteractionMatrix, budget: Budget, limits: Sequence[str] = ()) -> dict[str, Solution]:
        """The answers of layerwise and greedy under the same limits, scored on the same matrix."""
        program = program_of(matrix, self.limits_of(budget, limits))
        return {
            "layerwise": solvers.solve(program.layerwise(), self.config.solver.name, time_limit=self.config.solver.time_limit),
            "greedy": solvers.solve(program, "greedy"),
        }

    def limits_of(self, budget: Budget, limits: Sequence[str]) -> list[Constraint]:
        """A budget, the run's own limits, and those of a command line."""
        space = self.measured.space
        more = [limit_of(parse_limit(limit), self.config, space) for limit in limits]
        return merge_limits(budget.limit(space), [*self.limits, *more])

    def smallest_predicted(self, increase: float) -> Iterator[tuple[str, InteractionMatrix, Solution]]:
        """(estimator, its matrix, its smallest assignment in bytes whose predicted increase stays under a bound)."""
        settings, space = self.config.solver, self.measured.space
        matrices = {name: matrix for name, matrix in self.matrices.named.items() if not matrix.ranking_only}
        if not matrices:
            raise ConfigurationError(
                f"{', '.join(self.config.estimators)} rank assignments and predict no loss; expected a bound on a measured "
                "quantity: --max-loss-increase, --max-top1-drop or --max-metric-drop"
            )
        for name, matrix in matrices.items():
            widest = Budget("size", space.size_bytes(space.widest)).limit(space)
            program = program_of(
                matrix, merge_limits(widest, self.limits), "raw"
            )  # clipping would change the function that is bounded
            solve = solvers.prepare(program, settings.name, time_limit=settings.time_limit)
            yield name, matrix, pareto.smallest_bound(program, "size", increase, solve)

    def document(self, matrix: InteractionMatrix, solution: Solution, budget: Budget, limits: Sequence[str]) -> str:
        """A solution as JSON: the assignment, its limits, and how far it is proven."""
        document = self.measured.space.to_json(solution.assignment)
        document |= {
            "estimator": matrix.estimator,
            **({} if (predicted := matrix.loss_of(solution.objective)) is None else {"loss_predicted": predicted}),
            "status": str(solution.status),
            "budget": budget.name,
            "limits": list(limits),
        }
        return json.dumps(document, indent=1)


def limit_as_budget(text: str) -> Budget:
    """A limit of a command line, KIND=BOUND or KIND=BOUND:CSV, if it is the only one."""
    limit = parse_limit(text)
    check_constraint(limit)
    return Budget(limit.name, limit.bound, None if limit.path is None else str(limit.path))


def score_text(stored: StoredRun, assignment: Assignment) -> str:
    """What each of the run's matrices predicts for an assignment."""
    space = stored.measured.space
    rows = [[name, predicted_text(m, m.predicted_increase(assignment))] for name, m in stored.matrices.named.items()]
    size = f"{space.size_bytes(assignment):,} bytes, {space.average_bits(assignment):.3f} bits a weight"
    return f"{markdown_table(['estimator', 'predicted loss'], rows)}\n{size}\n{layers_text(space.names, assignment)}"


def predicted_text(matrix: InteractionMatrix, objective: float) -> str:
    """The loss that an objective predicts, or the objective itself if the matrix only ranks assignments."""
    loss = matrix.loss_of(objective)
    return f"none (score {objective:.4g}: ranks assignments, is not a loss)" if loss is None else loss_text(loss)


def solution_text(name: str, matrix: InteractionMatrix, solution: Solution) -> str:
    """One solution for the terminal: its predicted loss, how far it is proven, and what it leaves unused."""
    space = matrix.space
    size = f"{space.average_bits(solution.assignment):.3f} bits, {space.size_bytes(solution.assignment):,} bytes"
    lines = [
        f"{name}: {solution.status}, predicted loss {predicted_text(matrix, solution.objective)}, "
        f"gap {100 * solution.gap:.4f} %, {solution.nodes} nodes, {solution.seconds:.2f} s; {size}",
        layers_text(space.names, solution.assignment),
        f"  {solution.advice}",
        "  unused: "
        + ", ".join(f"{slack:g} of {solution.values[limit] + slack:g} ({limit})" for limit, slack in solution.slack.items()),
    ]
    if solution.better_than_widest is not None:
        lines.append(
            "  Without a budget, the matrix prefers another assignment to the widest bits. More sensitivity images would help"
        )
    return "\n".join(lines)


def recorded(stored: StoredRun, run: OpenedRun) -> list[Proposal]:
    """The proposals of the run for its budgets, with variants and searches. Empty if the run ended before."""
    if not (stored.folder / "record.json").is_file():
        return []
    budgets = {budget.name: budget for budget in run.budgets}
    record = RunRecord.load(stored.folder / "record.json")
    if record.layer_names != run.space.names:  # the record is older than a change of the layers
        return []
    rows = [row for row in record.results if row.method != CHOSEN and row.budget in budgets]
    proposals = [Proposal(budgets[row.budget], row.method, row.assignment, row.loss_predicted) for row in rows]
    known = {(p.budget.name, p.method, p.assignment) for p in proposals}
    proposals += [  # also proposals that equal one of another method: `choose` depends on the method
        Proposal(budgets[c.budget], c.origin, c.assignment, None if c.predicted_by else c.loss_predicted, reported=False)
        for c in record.measured_proposals
        if c.budget in budgets and (c.budget, c.origin, c.assignment) not in known
    ]
    # the record may be older than a change of the constraints: a budget with an answer that no longer fits is
    # solved again
    fit = {budget: merge_limits(budget.limit(run.space), stored.limits) for budget in run.budgets}
    unfit = {
        p.budget
        for p in proposals
        if p.method != UNIFORM and not all(limit.holds(run.space, p.assignment) for limit in fit[p.budget])
    }
    return [p for p in proposals if p.budget not in unfit]


def losses_of(run: OpenedRun, assignments: Sequence[Assignment]) -> dict[Assignment, Counts]:
    """Counts of each distinct assignment on the decision set: read if they are known, else measured here."""
    return run.evaluation.losses(assignments, lambda absent: ((a, run.evaluation.loss(a)) for a in absent))


def proposals_of(stored: StoredRun, run: OpenedRun, budgets: Sequence[Budget]) -> list[Proposal]:
    """Uniform and every estimator's proposal: recorded ones for the run's budgets, solved ones for new budgets."""
    proposals = recorded(stored, run)
    known = {proposal.budget for proposal in proposals}
    for budget in dict.fromkeys(budgets):
        if budget not in known:
            proposals += with_final_corrections(run, stored.propose([budget]), partial(losses_of, run))
    return proposals


def chosen_among(run: OpenedRun, proposals: Sequence[Proposal]) -> list[Result]:
    """One result for each reported proposal, and for the chosen ones."""
    measure = partial(losses_of, run)
    counts = measure([proposal.assignment for proposal in proposals])
    proposals = with_best_corrections(proposals, mean_losses(counts))
    return chosen_of(run, with_other_corrections(run, proposals, counts, measure), counts)


def answers(stored: StoredRun, run: OpenedRun, budgets: Sequence[Budget]) -> list[Result]:
    """`chosen_among` the proposals of some budgets.

    An assignment that the run itself chose stays chosen, as long as its measurement is the same. So exports agree with the
    record.
    """
    rows = chosen_among(run, proposals_of(stored, run, budgets))
    before: dict[str, Result] = {}
    if solved := {proposal.budget.name for proposal in recorded(stored, run)}:
        cache = run.evaluation.cache("decision")
        for row in RunRecord.load(stored.folder / "record.json").results:
            if row.method != CHOSEN or row.budget not in solved:
                continue
            counts = cache.get(run.evaluation.representative(row.assignment))
            if counts is not None and math.isclose(counts.accuracy().loss, row.loss_deployed):
                before[row.budget] = row
    return [before.get(row.budget, row) if row.method == CHOSEN else row for row in rows]


def latency_budget(stored: StoredRun, seconds: float) -> Budget:
    """A budget in seconds of one image, by the table of the run.

    Raises:
        ConfigurationError: The settings of the run name no runtime, so there is no table.
    """
    runtime = stored.config.runtime
    if runtime is None:
        raise ConfigurationError(f"--latency needs a table of layer times, but the settings of {stored.folder} name no runtime")
    return Budget("latency", seconds, str(latency_table(stored.config, runtime.name)))


def chosen_for(stored: StoredRun, run: OpenedRun, budget: Budget) -> Assignment:
    """The chosen assignment of a budget."""
    rows = answers(stored, run, [budget])
    return next(row.assignment for row in rows if row.method == CHOSEN and row.budget == budget.name)


def counts_of(run: OpenedRun, assignment: Assignment) -> Counts:
    """Counts on the validation set: read if they are known, else counted here."""
    return run.evaluation.validation_counts([assignment], lambda items: map(run.evaluation.count_batch, items))[assignment]


def accuracy_of(run: OpenedRun, assignment: Assignment) -> Accuracy:
    """Accuracy on the validation set."""
    return counts_of(run, assignment).accuracy()


def evaluated(stored: StoredRun, run: OpenedRun, budget: Budget | None, images: int | None = None) -> list[Result]:
    """Each method's answer to one budget, or to every budget of the run, with its accuracy on the validation set.

    With `images`, only the first images are used, and the counts are not kept.
    """
    of_budgets = [budget] if budget else list(run.budgets)
    names = {one.name for one in of_budgets}
    rows = [row for row in answers(stored, run, of_budgets) if row.budget in names]
    if images is None:
        return [replace(row, validation=accuracy_of(run, row.assignment)) for row in rows]
    there = len(run.slices.validation)
    if images > there:
        raise ConfigurationError(f"--images is {images}, and the run has {there} validation images; expected at most these")
    different = list(dict.fromkeys(row.assignment for row in rows))
    counts = dict(zip(different, run.evaluation.accuracies(different, 0, images), strict=True))
    return [replace(row, validation=counts[row.assignment].accuracy()) for row in rows]


def evaluation_text(rows: Sequence[Result]) -> str:
    """Methods and their accuracy, for the terminal."""
    table, metric = [], next((row.validation.metric_name for row in rows if row.validation is not None), None)
    for row in rows:
        if (accuracy := row.validation) is not None:
            cells = [row.budget, row.method, f"{row.size_bytes:,}", f"{row.average_bits:.3f}", loss_text(row.loss_deployed)]
            low, high = accuracy.top1_interval or (None, None)
            interval = "–" if low is None else f"{percent(low)} to {percent(high)}"
            value = [] if accuracy.metric is None else [f"{accuracy.metric:.4g}"]
            table.append([*cells, percent(accuracy.top1), interval, percent(accuracy.top5), *value, loss_text(accuracy.loss)])
    title = [] if metric is None else [metric]
    header = [
        "budget",
        "method",
        "bytes",
        "bits",
        "measured loss",
        "top-1 %",
        "95 %",
        "top-5 %",
        *title,
        "validation loss",
    ]
    return markdown_table(header, table)


def track_evaluation(stored: StoredRun, rows: Sequence[Result], budget: Budget | None) -> Receipt | None:
    """Writes RUN/evaluated/BUDGET/table.md, and mirrors it to MLflow below the run. Does nothing for a run without a record."""
    if not (stored.folder / "record.json").is_file():
        return None
    name = budget.name if budget else "all budgets"
    folder, settings = stored.folder / "evaluated" / file_name(name), stored.config.tracking
    write_text(folder / "table.md", evaluation_text(rows) + "\n")
    return delivery.track_nested(
        stored.folder,
        f"{name} evaluated",
        record_folder=folder,
        experiment=settings.experiment,
        uri=settings.uri,
        params={"budget": name, "method": "evaluated"},
        series=metrics.curves(RunRecord.load(stored.folder / "record.json"), rows),
        artifacts=[folder / "table.md"],
    )


def per_class_csv(run: OpenedRun, rows: Sequence[Result]) -> str:
    """CSV of budget,method,class,name,images,top1_hits,top1 for every class of the validation set. The float network is first."""
    names: Sequence[str] = getattr(run.slices.validation, "classes", None) or ()
    float_row = ("", FLOAT, run.space.nothing)
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")  # names of classes may contain commas
    table.writerow(["budget", "method", "class", "name", "images", "top1_hits", "top1"])
    for budget, method, assignment in [float_row, *((row.budget, row.method, row.assignment) for row in rows)]:
        counts = counts_of(run, assignment)
        if counts.top1 is None:
            raise DataError("the validation images have no class labels; expected some for an accuracy per class")
        for label, num_images, hits in counts.classes:
            name = names[label] if label < len(names) else ""
            table.writerow([budget, method, label, name, num_images, hits, f"{hits / num_images:.6f}"])
    return text.getvalue()
