"""Choose: matrices give proposals, these are measured, local searches start from the best, and each budget gets one answer."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from pathlib import Path

from clado.choosing import choice, proposals, solvers
from clado.choosing.choice import Score
from clado.choosing.constraints import Constraint
from clado.choosing.kept_solutions import kept
from clado.choosing.local_search import Searched, local_search, ordered
from clado.choosing.local_search import search as search_around
from clado.choosing.program import Program
from clado.choosing.proposals import Budget, Matrices, Proposal, merge_limits, program_of
from clado.choosing.solution import Solution
from clado.choosing.solvers import Solve
from clado.choosing.stability import stability
from clado.errors import CladoError, InfeasibleError
from clado.evaluation import Counts
from clado.interaction import estimators
from clado.interaction.estimators import Measured
from clado.interaction.matrix import InteractionMatrix
from clado.records.results import CHOSEN, LOCAL_SEARCH, Result, Stability
from clado.records.text import write_text
from clado.run.opened_run import OpenedRun
from clado.space import Assignment, SearchSpace
from flows import worker
from flows.clock import Clock
from flows.clusters import Workers
from flows.guard import uninterrupted
from flows.progress import progress

VARIANT_SECONDS = 10.0  # seconds for one budget: a variant is not reported, so it gets less time than a reported answer


@dataclass(frozen=True)
class Choice:
    """What was proposed, measured and chosen."""

    matrices: Matrices
    """The matrices that proposed."""
    proposals: tuple[Proposal, ...]
    """All proposals, including those of local searches and those with fewer corrections."""
    losses: Mapping[Assignment, Counts]
    """Counts of every proposal on the decision set, as deployed."""
    other_corrections: frozenset[Assignment]
    """The counts that were measured because the same bits were chosen with other corrections."""
    surrogate: str
    """The estimator that ranked the moves of the local searches."""
    searched: Mapping[Budget, Searched]
    """The result of each budget's local search."""
    stability: tuple[Stability, ...]
    """How far the images decide the surrogate's answers."""
    results: tuple[Result, ...]
    """One row for each budget and method, and for the chosen ones. Accuracies are added later."""
    notes: tuple[str, ...]
    """Notes for the reader of the record."""


def choose(run: OpenedRun, workers: Workers, measured: Measured, clock: Clock) -> Choice:
    """Proposes with every estimator, measures every proposal, searches around the best, and chooses."""
    with clock.phase("solving"):
        matrices = estimate(run, measured)
        proposed, notes = propose(run, matrices)
    with clock.phase("evaluation"):
        measure = partial(losses_of, run, workers, "proposals")
        proposed = with_final_corrections(run, proposed, measure)
        losses = measure([proposal.assignment for proposal in proposed])
        proposed = with_best_corrections(proposed, mean_losses(losses))
    with clock.phase("searching"):
        surrogate = choice.surrogate(matrices.every, mean_losses(losses))
        matrix = matrices.every[surrogate]
        stable = _stability(run, measured, surrogate, matrix, proposed)
        searched = search(run, workers, matrix, losses)
        proposed += [
            Proposal(budget, LOCAL_SEARCH, assignment, predicted_loss(matrix, assignment), reported=False)
            for budget, of_budget in searched.items()
            for assignment in of_budget.tried
        ]
        before = set(losses)
        proposed = with_other_corrections(
            run, proposed, losses, lambda absent: losses_of(run, workers, "other corrections", absent)
        )
        results = chosen_of(run, proposed, losses)
        notes += [
            f"{row.budget}: no proposal has a finite loss; {row.assignment} is listed, but does not work"
            for row in results
            if row.method == CHOSEN and not isfinite(row.loss_deployed)
        ]
    others = frozenset(losses.keys() - before)
    return Choice(matrices, tuple(proposed), losses, others, surrogate, searched, stable, tuple(results), tuple(notes))


def estimate(run: OpenedRun, measured: Measured) -> Matrices:
    """Makes the matrix of every estimator. Keeps those of the named estimators as .npz files."""
    matrices = Matrices.of(measured, run.config.estimators)
    for name, matrix in matrices.named.items():
        matrix.save(run.folder / "matrices" / f"{name}.npz")
    return matrices


def propose(run: OpenedRun, matrices: Matrices) -> tuple[list[Proposal], list[str]]:
    """(every proposal for every budget, notes).

    What is proven optimal is kept, and the next run reads it. Ctrl-C or SIGTERM during a solve ends the run. The best assignment
    so far is kept, and the next run starts that solve from it.
    """
    settings, budgets, limits = run.config.solver, run.budgets, run.limits
    kept_folder = run.folder / "solved"
    incumbent = run.folder / "solutions" / "incumbent.json"
    incumbents = _read_incumbent(incumbent, run.space)
    notes: list[str] = []

    def keep(best: Solution) -> None:
        write_text(incumbent, json.dumps(run.space.to_json(best.assignment), indent=1))

    def prepare(program: Program) -> Solve:
        solve = solvers.prepare(program, settings.name, time_limit=settings.time_limit)

        def started(program: Program, starts: Sequence[Assignment] = ()) -> Solution:
            return solve(program, [*filter(program.offers, incumbents), *starts])

        return kept(uninterrupted(started, keep), kept_folder, settings.name)

    def prepare_variant(program: Program) -> Solve:
        solve = solvers.prepare(program, settings.name, time_limit=min(settings.time_limit, VARIANT_SECONDS))
        return kept(uninterrupted(solve), kept_folder, settings.name)

    def without_answer(budget: Budget, method: str, error: InfeasibleError) -> None:
        notes.append(f"{budget.name}: {method} has no answer without the options of infinite loss ({error})")

    with progress("solving", len(matrices.named) * len(budgets)) as advance:
        proposed = proposals.propose(matrices.named, budgets, prepare, limits, lambda budget, method: advance(1), without_answer)
    proposed += proposals.propose_variants(matrices.named, budgets, prepare_variant, limits, matrices.extra)
    proposed += proposals.propose_uncorrected(matrices.uncorrected, budgets, prepare_variant, limits)
    incumbent.unlink(missing_ok=True)
    for name, matrix in matrices.named.items():
        if matrix.convexity == "clip_psd":
            share = matrix.negative_share()
            notes.append(
                f"{name}: {100 * share:.1f} % of the eigenvalues (by magnitude) were negative and clipped before solving"
            )
    return proposed, notes


def _read_incumbent(path: Path, space: SearchSpace) -> list[Assignment]:
    """The solution that an interrupted run left. None without one, or if it belongs to other settings."""
    try:
        return [space.from_json(json.loads(path.read_text(encoding="utf-8")))]
    except (OSError, ValueError, AttributeError, CladoError):
        return []


def losses_of(run: OpenedRun, workers: Workers, what: str, assignments: Sequence[Assignment]) -> dict[Assignment, Counts]:
    """Counts of each distinct assignment on the decision set: read if they are known, else measured by the workers."""
    distinct = {run.evaluation.representative(assignment) for assignment in assignments}
    images = {representative: run.evaluation.loss_images(representative) for representative in distinct}
    with progress(what, sum(images.values()), run.config.cluster.workers * max(images.values(), default=0)) as advance:
        return _read_or_measure(run, workers, assignments, lambda representative: advance(images[representative]))


def _read_or_measure(
    run: OpenedRun, workers: Workers, assignments: Sequence[Assignment], done: Callable[[Assignment], None]
) -> dict[Assignment, Counts]:
    return run.evaluation.losses(assignments, lambda absent: workers.map(worker.measure_loss, run.config, absent), done)


def mean_losses(counts: Mapping[Assignment, Counts]) -> dict[Assignment, float]:
    """The mean loss of each assignment."""
    return {assignment: of_assignment.accuracy().loss for assignment, of_assignment in counts.items()}


def search(
    run: OpenedRun, workers: Workers, surrogate: InteractionMatrix, losses: dict[Assignment, Counts]
) -> dict[Budget, Searched]:
    """Runs a local search from the best proposal of every budget, all budgets at once. Adds measured losses to `losses`."""
    settings, known = run.config.search, mean_losses(losses)
    fit = {budget: merge_limits(budget.limit(run.space), run.limits) for budget in run.budgets}
    searches = {
        budget: search_around(program, known, settings.evaluations, settings.batch)
        for budget, limits in fit.items()
        if settings.evaluations and (program := _searchable(surrogate, limits, known)) is not None
    }
    with progress("searching", len(searches) * settings.evaluations or 1) as advance:

        def measure_losses(assignments: Sequence[Assignment]) -> dict[Assignment, float]:
            counts = _read_or_measure(run, workers, assignments, lambda assignment: advance(1))
            losses.update(counts)
            return mean_losses(counts)

        return local_search(searches, measure_losses)


def _searchable(matrix: InteractionMatrix, limits: Sequence[Constraint], losses: Iterable[Assignment]) -> Program | None:
    """The program that ranks moves. None if no measured assignment is left to start from."""
    try:
        program = program_of(matrix, limits)
    except InfeasibleError:
        return None
    return program if any(program.offers(a) and program.is_feasible(program.choices(a)) for a in losses) else None


def _stability(
    run: OpenedRun, measured: Measured, name: str, surrogate: InteractionMatrix, proposed: Iterable[Proposal]
) -> tuple[Stability, ...]:
    """How far the images decide the surrogate's answer to each budget. It need not be the chosen one."""
    answers = {proposal.budget.name: proposal.assignment for proposal in proposed if proposal.method == name}
    fit = {budget.name: merge_limits(budget.limit(run.space), run.limits) for budget in run.budgets}

    def estimated(resample: Measured) -> InteractionMatrix:
        matrix = estimators.estimate(name, resample)
        matrix = matrix.clip_psd() if matrix.convexity == "clip_psd" else matrix  # once for all budgets
        # resamples may not choose what the run may not choose, even if no block with an infinite loss is drawn
        return replace(matrix, quarantined=surrogate.quarantined, forbidden=surrogate.forbidden)

    return stability(
        measured,
        estimated,
        lambda matrix, budget: program_of(matrix, fit[budget], "raw"),
        answers,
        seed=run.config.data.seed,
    )


def predicted_loss(matrix: InteractionMatrix, assignment: Assignment) -> float | None:
    """A matrix's prediction of an assignment's loss, if it predicts one. It covers corrected layers only."""
    if assignment.corrected not in ("all", "static"):
        return None
    increase = matrix.predicted_increase(assignment)
    return matrix.loss_of(increase) if isfinite(increase) else None


def chosen_of(
    run: OpenedRun,
    proposed: Sequence[Proposal],
    counts: Mapping[Assignment, Counts],
    accepted: Collection[Assignment] = (),
) -> list[Result]:
    """One row for each reported proposal and for the chosen ones, from measurements on the decision set."""
    scores = {assignment: Score(of_one.each_brier, of_one.each_hit) for assignment, of_one in counts.items()}
    return choice.choose(run.space, proposed, mean_losses(counts), run.limits, scores, accepted)


def with_final_corrections(
    run: OpenedRun,
    proposed: Sequence[Proposal],
    measure: Callable[[Sequence[Assignment]], Mapping[Assignment, Counts]],
) -> list[Proposal]:
    """The proposals of each budget. They are deployed with final corrections if these help one of its solutions.

    Re-estimation takes as many images as measuring a loss, for each proposal. So it is tried on one of them: that of a safe
    method, else the first.

    Args:
        run: The run.
        proposed: Proposals with all corrections, and without any.
        measure: Counts on the decision set.

    Returns:
        The proposals, and the tried solutions deployed the other way. These compete too.
    """
    first: dict[Budget, Proposal] = {}
    for proposal in sorted(proposed, key=lambda proposal: proposal.method not in choice.safe_methods()):
        if proposal.solution is not None and proposal.assignment.corrected == "all":
            first.setdefault(proposal.budget, proposal)
    ways = {
        budget: {level: run.evaluation.representative(proposal.assignment.with_corrections(level)) for level in ("all", "static")}
        for budget, proposal in first.items()
    }
    losses = mean_losses(measure([assignment for levels in ways.values() for assignment in levels.values()]))
    levels = {budget: min(of_budget, key=lambda level: ordered(losses[of_budget[level]])) for budget, of_budget in ways.items()}

    def deployed(proposal: Proposal) -> Proposal:
        if proposal.assignment.corrected != "all" or proposal.budget not in levels:
            return proposal
        assignment = proposal.assignment.with_corrections(levels[proposal.budget])
        return replace(proposal, assignment=run.evaluation.representative(assignment))

    others = [
        replace(proposal, assignment=assignment, reported=False)
        for budget, proposal in first.items()
        for assignment in ways[budget].values()
    ]
    proposals = [deployed(proposal) for proposal in proposed]
    known = {(proposal.budget, proposal.assignment) for proposal in proposals}
    return proposals + [other for other in others if (other.budget, other.assignment) not in known]


def with_best_corrections(proposed: Sequence[Proposal], losses: Mapping[Assignment, float]) -> list[Proposal]:
    """The proposals, with final corrections or without them by the measured losses of the same bits.

    So equal answers to two budgets are the same network, also if the final corrections help at one of these budgets only. A
    proposal that is replaced still competes.
    """

    def best(assignment: Assignment) -> Assignment:
        if assignment.corrected not in ("all", "static"):
            return assignment
        ways = (assignment, assignment.with_corrections("all"), assignment.with_corrections("static"))
        return min((way for way in ways if way in losses), key=lambda way: ordered(losses[way]))

    proposals = [replace(p, assignment=best(p.assignment)) if p.reported else p for p in proposed]
    known = {(p.budget, p.assignment) for p in proposals}
    return proposals + [replace(p, reported=False) for p in proposed if (p.budget, p.assignment) not in known]


def with_other_corrections(
    run: OpenedRun,
    measured: Sequence[Proposal],
    counts: dict[Assignment, Counts],
    measure: Callable[[Sequence[Assignment]], Mapping[Assignment, Counts]],
    accepted: Collection[Assignment] = (),
) -> list[Proposal]:
    """Adds the chosen bits with other corrections to the proposals, until the choice does not change.

    Args:
        run: The run.
        measured: All measured proposals.
        counts: The counts of each. New ones are added.
        measure: Counts on the decision set.
        accepted: The assignments that an earlier choice chose, and their reconstructions.
    """
    proposed = list(measured)
    while True:
        chosen = {row.assignment for row in chosen_of(run, proposed, counts, accepted) if row.method == CHOSEN}
        others = {a: [b for b in run.evaluation.other_corrections(a) if b not in counts] for a in chosen}
        if not any(others.values()):
            return proposed
        counts |= measure(list(dict.fromkeys(b for variants in others.values() for b in variants)))
        proposed += [
            replace(proposal, assignment=other, loss_predicted=None, solution=None, reported=False)
            for proposal in proposed
            for other in others.get(proposal.assignment, ())
        ]
