"""Allocate: matrices become proposals, proposals are measured, the best are searched around."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from clado.choosing import proposals, solvers
from clado.choosing.constraints import Constraint
from clado.choosing.local_search import Searched, local_search
from clado.choosing.local_search import search as search_around
from clado.choosing.program import Program, Solution
from clado.choosing.proposals import Budget, Proposal, merge_limits, program_of
from clado.choosing.solvers import Solve
from clado.choosing.stability import stability
from clado.errors import CladoError, InfeasibleError
from clado.evaluation import Counts
from clado.interaction import estimators
from clado.interaction.matrix import InteractionMatrix
from clado.records import CHOSEN, LOCAL_SEARCH, MeasuredProposal, SearchSummary, Stability, write_text
from clado.space import Assignment, SearchSpace
from clado.storage.evaluation_cache import EvaluationCache
from flows import worker
from flows.guard import uninterrupted
from flows.phases.run import Run, with_fewer_corrections
from flows.progress import progress

VARIANT_SECONDS = 10.0  # a variant only competes: it gets less time for one budget than an answer of its own


@task(name="allocate", cache_policy=NO_CACHE, persist_result=False)
def allocate(run: Run) -> None:
    """Solves the program of every matrix for every budget.

    Ctrl-C or SIGTERM while one is solved ends the run; the best assignment found until then is kept, and the next run starts
    that search from it.
    """
    settings, budgets, limits = run.session.config.solver, run.session.budgets, run.session.limits
    incumbent = run.session.folder / "solutions" / "incumbent.json"
    incumbents = _read_incumbent(incumbent, run.session.space)

    def keep(best: Solution) -> None:
        write_text(incumbent, json.dumps(run.session.space.to_json(best.assignment), indent=1))

    def prepare(program: Program) -> Solve:
        solve = solvers.prepare(program, settings.name, time_limit=settings.time_limit)

        def started(program: Program, starts: Sequence[Assignment] = ()) -> Solution:
            return solve(program, [*filter(program.offers, incumbents), *starts])

        return uninterrupted(started, keep)

    def prepare_variant(program: Program) -> Solve:
        return uninterrupted(solvers.prepare(program, settings.name, time_limit=min(settings.time_limit, VARIANT_SECONDS)))

    def without_answer(budget: Budget, method: str, error: InfeasibleError) -> None:
        run.notes.append(f"{budget.name}: {method} has no answer without what has no finite loss ({error})")

    with progress("solving", len(run.matrices) * len(budgets)) as advance:
        run.proposals = proposals.propose(
            run.matrices, budgets, prepare, limits, lambda budget, method: advance(1), without_answer
        )
    run.proposals += proposals.propose_variants(run.matrices, budgets, prepare_variant, limits, run.extra_matrices)
    run.proposals += proposals.propose_uncorrected(run.uncorrected, budgets, prepare_variant, limits)
    incumbent.unlink(missing_ok=True)
    for name, matrix in run.matrices.items():
        if matrix.convexity == "clip_psd":
            share = matrix.negative_share()
            run.notes.append(f"{name}: {100 * share:.1f} % of the eigenvalues' weight was negative and clipped before solving")


def _read_incumbent(path: Path, space: SearchSpace) -> list[Assignment]:
    """What an interrupted run left; nothing where there is none, or it is of other settings."""
    try:
        return [space.from_json(json.loads(path.read_text(encoding="utf-8")))]
    except (OSError, ValueError, AttributeError, CladoError):
        return []


@task(name="measure_proposals", cache_policy=NO_CACHE, persist_result=False)
def measure_proposals(run: Run) -> None:
    """Measures the true loss of each distinct proposal on the sensitivity set, once, as it ships."""
    distinct = list(dict.fromkeys(proposal.assignment for proposal in run.proposals))
    with progress("proposals", len(distinct)) as advance:
        run.losses = _measured(run, run.session.evaluation_cache("sensitivity"), worker.measure_loss, distinct, advance)


@task(name="search", cache_policy=NO_CACHE, persist_result=False)
def search(run: Run) -> None:
    """Searches around the best candidate of every budget, all budgets side by side; what is found competes as a proposal."""
    session, settings = run.session, run.session.config.search
    losses = {assignment: counts.accuracy().loss for assignment, counts in run.losses.items()}
    run.surrogate = proposals.surrogate({**run.matrices, **run.extra_matrices}, losses)
    run.stability = _stability(run)
    matrix = _surrogate(run)
    fit = {budget: merge_limits(budget.limit(session.space), session.limits) for budget in session.budgets}
    searches = {
        budget: search_around(program, losses, settings.evaluations, settings.batch)
        for budget, limits in fit.items()
        if settings.evaluations and (program := _searchable(matrix, limits, losses)) is not None
    }
    with progress("searching", len(searches) * settings.evaluations or 1) as advance:

        def measure_losses(assignments: Iterable[Assignment]) -> dict[Assignment, float]:
            found = _measured(run, session.evaluation_cache("sensitivity"), worker.measure_loss, assignments, advance)
            run.losses |= found
            return {assignment: counts.accuracy().loss for assignment, counts in found.items()}

        run.searched = local_search(searches, measure_losses)
    run.proposals += [
        Proposal(budget, LOCAL_SEARCH, assignment, _predicted(matrix, assignment), reported=False)
        for budget, searched in run.searched.items()
        for assignment in searched.tried
    ]

    def measure_fewer(lacking: Sequence[Assignment]) -> dict[Assignment, Counts]:
        with progress("fewer corrections", len(lacking)) as advance:
            return _measured(run, session.evaluation_cache("sensitivity"), worker.measure_loss, lacking, advance)

    run.proposals = with_fewer_corrections(session, run.proposals, run.losses, measure_fewer)
    run.notes += [
        f"{row.budget}: no candidate has a finite loss; {row.assignment} stands there and does not work"
        for row in run.results()
        if row.method == CHOSEN and not isfinite(row.loss_deployed)
    ]
    run.probe_losses = run.losses
    if session.has_probe_model:  # of what is reported
        reported = list(dict.fromkeys(row.assignment for row in run.results()))
        with progress("as probed", len(reported)) as advance:
            evaluation_cache = session.evaluation_cache("sensitivity", "probe_model")
            run.probe_losses = _measured(run, evaluation_cache, worker.measure_probe_loss, reported, advance)


def _searchable(matrix: InteractionMatrix, limits: Sequence[Constraint], losses: Iterable[Assignment]) -> Program | None:
    """The program whose moves are ranked; None where what has no finite loss leaves nothing measured to start from."""
    try:
        program = program_of(matrix, limits)
    except InfeasibleError:
        return None
    return program if any(program.offers(a) and program.is_feasible(program.choices(a)) for a in losses) else None


def _stability(run: Run) -> tuple[Stability, ...]:
    """How far the images decide the surrogate's own answer to each budget, which need not be the chosen one."""
    if run.measured is None:
        return ()
    name, session = run.surrogate, run.session
    fit = {budget.name: merge_limits(budget.limit(session.space), session.limits) for budget in session.budgets}
    answers = {p.budget.name: p.assignment for p in run.proposals if p.method == name}
    full = _surrogate(run)

    def estimate(resample: estimators.Measured) -> InteractionMatrix:
        matrix = estimators.estimate(name, resample)
        matrix = matrix.clip_psd() if matrix.convexity == "clip_psd" else matrix  # once for all budgets
        # a block whose loss is not finite may not be drawn: what the run may not choose, no resample may
        return replace(matrix, quarantined=full.quarantined, forbidden=full.forbidden)

    return stability(
        run.measured,
        estimate,
        lambda matrix, budget: program_of(matrix, fit[budget], "raw"),
        answers,
        seed=run.session.config.data.seed,
    )


def summaries(run: Run) -> tuple[SearchSummary, ...]:
    """What each budget's search started from and gained."""
    return tuple(
        SearchSummary(
            budget.name,
            run.surrogate,
            _proposer(run.proposals, budget, searched),
            searched.start_loss,
            searched.best_loss,
            searched.gain,
            len(searched.tried),
        )
        for budget, searched in run.searched.items()
    )


def measured_proposals(run: Run) -> tuple[MeasuredProposal, ...]:
    """All that was measured for each budget: proposals, variants, and what the search tried, in its order."""
    space, predictor = run.session.space, _predictor(run)

    def candidate(budget: Budget, origin: str, assignment: Assignment, predicted: float | None) -> MeasuredProposal:
        counts = run.losses[assignment]
        loss, brier, by = counts.accuracy().loss, counts.mean_brier, ""
        if predicted is None and predictor is not None and (predicted := _predicted(predictor, assignment)) is not None:
            by = predictor.estimator
        return MeasuredProposal(
            budget.name,
            origin,
            assignment,
            space.size_bytes(assignment),
            loss if isfinite(loss) else None,
            predicted,
            brier if isfinite(brier) else None,
            float(counts.each_hit.mean()),
            by,
        )

    return tuple(
        candidate(budget, p.method, p.assignment, p.loss_predicted)
        for budget in dict.fromkeys(proposal.budget for proposal in run.proposals)
        for p in run.proposals
        if p.budget == budget
    )


def _proposer(proposals: Iterable[Proposal], budget: Budget, searched: Searched) -> str:
    """Who proposed what a search started from: for its own budget, or for another."""
    makers = [p for p in proposals if p.assignment == searched.start and p.method != LOCAL_SEARCH]
    own = next((p.method for p in makers if p.budget == budget), None)
    return own or f"{makers[0].method} for {makers[0].budget.name}"


def _surrogate(run: Run) -> InteractionMatrix:
    """The matrix that ranks moves."""
    return {**run.matrices, **run.extra_matrices}[run.surrogate]


def _predictor(run: Run) -> InteractionMatrix | None:
    """The matrix that predicts losses where the one that proposed has none: the first by `Estimator.prediction_order`."""
    known = {**run.matrices, **run.extra_matrices}
    names = sorted(known, key=lambda name: estimators.estimator_of(name).prediction_order)
    return next((known[name] for name in names if not known[name].ranking_only), None)


def _predicted(matrix: InteractionMatrix, assignment: Assignment) -> float | None:
    """A matrix's prediction of an assignment's loss, where it predicts one. It knows of corrected layers alone."""
    if assignment.corrected == "none":
        return None
    increase = matrix.predicted_increase(assignment)
    return matrix.loss_of(increase) if isfinite(increase) else None


def _measured(
    run: Run,
    evaluation_cache: EvaluationCache,
    function: Callable[[dict[str, Any], Assignment], tuple[Assignment, Counts]],
    assignments: Iterable[Assignment],
    advance: Callable[[float], None],
) -> dict[Assignment, Counts]:
    """Counts of each assignment: read where they are known, else measured by the workers and kept."""
    known: dict[Assignment, Counts] = {}
    todo: list[Assignment] = []
    for assignment in assignments:
        counts = evaluation_cache.get(assignment)
        if counts is None:
            todo.append(assignment)
        else:
            known[assignment] = counts
            advance(1)
    for assignment, counts in run.workers.map(function, run.session.config, todo):
        evaluation_cache.put(assignment, counts)
        known[assignment] = counts
        advance(1)
    return known
