"""Allocate: matrices become proposals, proposals are measured."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from clado import candidates, solvers
from clado.candidates import CONVEXITY
from clado.program import Program
from clado.solvers import Solve
from flows import worker
from flows.progress import progress
from flows.run import Run


@task(name="allocate", cache_policy=NO_CACHE, persist_result=False)
def allocate(run: Run) -> None:
    """Solves the program of every matrix for every budget."""
    settings, budgets = run.session.config.solver, run.session.budgets

    def prepare(program: Program) -> Solve:
        return solvers.prepare(program, settings.name, time_limit=settings.time_limit)

    with progress("solving", len(run.matrices) * len(budgets)) as advance:
        run.proposals = candidates.propose(run.matrices, budgets, prepare, run.session.limits, lambda budget, method: advance(1))
    for name in run.matrices:
        if CONVEXITY.get(name) == "clip_psd":
            share = run.matrices[name].negative_share()
            run.notes.append(f"{name}: {100 * share:.1f} % of the eigenvalues' weight was negative and clipped before solving")


@task(name="measure_candidates", cache_policy=NO_CACHE, persist_result=False)
def measure_candidates(run: Run) -> None:
    """Measures the true loss of each distinct proposal on the sensitivity set, once."""
    ledger = run.session.ledger("sensitivity")
    distinct = list(dict.fromkeys(proposal.assignment for proposal in run.proposals))
    known = {assignment: counts for assignment in distinct if (counts := ledger.get(assignment)) is not None}
    todo = [assignment for assignment in distinct if assignment not in known]
    with progress("candidates", len(todo)) as advance:
        for assignment, counts in run.workers.map(worker.measure_loss, run.session.config, todo):
            ledger.put(assignment, counts)
            known[assignment] = counts
            advance(1)
    run.losses = known
