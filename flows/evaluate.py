"""Evaluate: accuracy of the float network and of each distinct assignment on images that no choice has seen."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from clado.evaluation import Counts, shards
from clado.space import Assignment
from flows import worker
from flows.progress import progress
from flows.run import Run
from flows.session import EVALUATION_SHARD


@task(name="evaluate", cache_policy=NO_CACHE, persist_result=False)
def evaluate(run: Run) -> None:
    """Counts every distinct assignment on the validation set once; what an earlier run counted is read."""
    session = run.session
    ledger = session.ledger("validation")
    distinct = list(dict.fromkeys([session.space.nothing, *(proposal.assignment for proposal in run.proposals)]))
    known = {assignment: counts for assignment in distinct if (counts := ledger.get(assignment)) is not None}
    todo = [assignment for assignment in distinct if assignment not in known]
    parts = range(len(shards(len(session.slices.validation), EVALUATION_SHARD)))
    items = [(assignment, shard) for assignment in todo for shard in parts]
    found: dict[Assignment, dict[int, Counts]] = {assignment: {} for assignment in todo}
    with progress("evaluating", len(items)) as advance:
        for assignment, shard, counts in run.workers.map(worker.evaluate_shard, session.config, items):
            found[assignment][shard] = counts
            if len(found[assignment]) == len(parts):
                # shards are added in order, so that the sum does not depend on which worker was first
                total = sum((found[assignment][part] for part in parts), Counts())
                ledger.put(assignment, total)
                known[assignment] = total
            advance(1)
    run.accuracies = known
