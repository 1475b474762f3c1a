"""Sweep: the answers to many budgets from a run's stored measurements, each with its measured loss."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from clado.choosing import pareto
from clado.choosing.constraints import Constraint
from clado.choosing.program import Program
from clado.choosing.proposals import Budget, Proposal, program_of
from clado.choosing.solution import Solution
from clado.choosing.solvers import Solve
from clado.errors import InfeasibleError
from clado.interaction.matrix import InteractionMatrix
from clado.records.results import CHOSEN, Receipt, Result
from clado.records.run_record import RunRecord
from clado.records.text import markdown_table, write_text
from clado.reporting import plots, tables
from clado.run.opened_run import OpenedRun
from clado.space import Assignment
from clado.tracking import delivery
from flows.commands.stored import StoredRun, chosen_among
from flows.progress import progress


def propose_front(stored: StoredRun, kind: str, count: int) -> list[Proposal]:
    """Uniform bits, and each matrix's optimum at `count` bounds from the narrowest bits everywhere to the widest."""
    space = stored.measured.space
    matrices = stored.matrices.every
    # without quarantined options, which are the same in every matrix
    narrowest = [program.assignment(program.narrowest) for program in (program_of(m, []) for m in matrices.values())]
    smallest = min(_bound(stored, kind, assignment) for assignment in narrowest)
    largest = _bound(stored, kind, space.widest)
    bounds = [smallest + (largest - smallest) * k / (count - 1) for k in range(count)]
    # rounded up, so that the narrowest bits meet the first bound
    budgets = [
        Budget(kind, math.ceil(b * 1e4) / 1e4 if kind in ("average_bits", "relative_size") else math.ceil(b)) for b in bounds
    ]
    with progress("solving", len(matrices)) as advance:

        def swept(
            matrix: InteractionMatrix, fit: Mapping[Budget, Sequence[Constraint]], prepare: Callable[[Program], Solve]
        ) -> Iterator[tuple[Budget, Solution | InfeasibleError]]:
            yield from sweep_optima(matrix, fit, prepare)
            advance(1)

        return stored.propose(budgets, swept)


def sweep_optima(
    matrix: InteractionMatrix, fit: Mapping[Budget, Sequence[Constraint]], prepare: Callable[[Program], Solve]
) -> Iterator[tuple[Budget, Solution | InfeasibleError]]:
    """A matrix's optimum at each budget that it can reach, in ascending order; a `proposals.Optima`."""
    limits = list(fit.values())
    try:
        program, swept = program_of(matrix, limits[-1]), limits[-1][0].name
        by_bound: dict[float, list[Budget]] = {}  # a limit of the run on the same cost can make bounds equal
        for budget, of_budget in fit.items():
            by_bound.setdefault(of_budget[0].bound, []).append(budget)
        points = pareto.sweep(program, swept, pareto.within_reach(program, swept, list(by_bound)), prepare(program))
    except InfeasibleError as error:
        yield from ((budget, error) for budget in fit)
    else:
        yield from ((budget, point.solution) for point in points for budget in by_bound[point.bound])


def _bound(stored: StoredRun, kind: str, assignment: Assignment) -> float:
    """What an assignment costs, in the unit of a kind of budget."""
    space = stored.measured.space
    if kind == "average_bits":
        return space.average_bits(assignment)
    if kind == "relative_size":
        full = sum(layer.weight_bytes(8) for layer in space.layers)
        return 100 * space.size_bytes(assignment) / full
    return Budget(kind, math.inf).limit(space).value(space, assignment)


def sweep(stored: StoredRun, run: OpenedRun, kind: str, count: int) -> tuple[str, Receipt]:
    """Solves and measures. Writes sweep/table.md, sweep/record.json and plots. Tracks one child for each budget and method."""
    folder = stored.folder / "sweep"
    finished = RunRecord.load(stored.folder / "record.json")  # refused before anything is solved
    proposals = propose_front(stored, kind, count)
    rows = chosen_among(run, proposals)
    cache = run.evaluation.cache("validation")
    known = {row.assignment: counts.accuracy() for row in rows if (counts := cache.get(row.assignment)) is not None}
    results = tuple(replace(row, validation=known.get(row.assignment)) for row in rows)
    notes = (f"a sweep of {count} budgets ({kind})",)
    record = replace(finished, results=results, seconds={}, notes=notes, measured_proposals=(), searches=(), stability=())
    text = front_table(record)
    write_text(folder / "table.md", text + "\n")
    record.save(folder / "record.json")
    plots.save(plots.loss_against_size(record), folder / "loss_against_size.png")
    receipt = delivery.track(
        record,
        stored.folder,
        stored.config.model_dump(mode="json"),
        experiment=stored.config.tracking.experiment,
        uri=stored.config.tracking.uri,
        tags={"sweep": kind},
        plots=[folder / "loss_against_size.png"],
        description=text,
        record_folder=folder,
    )
    return text + "\n" + tables.verdict(record), receipt


def front_table(record: RunRecord) -> str:
    """The chosen assignment of every budget. `dominated` marks those to which another is nowhere worse (`dominated_by`)."""
    chosen = [row for row in record.results if row.method == CHOSEN]
    dominated = dominated_by(chosen)
    rows = [
        [
            row.budget,
            f"{row.size_bytes:,}",
            f"{row.average_bits:.3f}",
            row.winner or "",
            "" if row.loss_predicted is None else tables.loss_text(row.loss_predicted),
            tables.loss_text(row.loss_deployed),
            "" if row.brier_deployed is None else tables.loss_text(row.brier_deployed),
            "" if row.validation is None or row.validation.top1 is None else f"{100 * row.validation.top1:.2f}",
            row.status or "",
            "dominated" if worse else "",
        ]
        for row, worse in zip(chosen, dominated, strict=True)
    ]
    header = ["budget", "bytes", "bits", "proposed by", "predicted loss", "measured loss", "Brier score", "top-1 %", "solver", ""]
    return markdown_table(header, rows)


def dominated_by(rows: Sequence[Result]) -> list[bool]:
    """For each result, whether another one is nowhere worse and somewhere better: bytes, loss, Brier score, disagreement."""

    def point(row: Result) -> tuple[float, ...]:
        brier = math.inf if row.brier_deployed is None else row.brier_deployed
        return row.size_bytes, row.loss_deployed, brier, -(row.agreement_deployed or 0.0)

    points = [point(row) for row in rows]
    return [
        any(other != point and all(a <= b for a, b in zip(other, point, strict=True)) for other in points) for point in points
    ]
