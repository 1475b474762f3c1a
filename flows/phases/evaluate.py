"""Evaluate: accuracy of the float network and of each distinct assignment on images that no choice has seen."""

from collections.abc import Sequence
from typing import TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE

from clado.evaluation import Counts, evaluation_batches
from clado.run.opened_run import EVALUATION_BATCH
from clado.space import Assignment
from flows import worker
from flows.phases.run import Run
from flows.progress import progress

T = TypeVar("T")


def batched(things: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive groups of at most `size`."""
    return [things[start : start + size] for start in range(0, len(things), size)]


@task(name="evaluate", cache_policy=NO_CACHE, persist_result=False)
def evaluate(run: Run) -> None:
    """Counts every distinct assignment of the results on the validation set once, as it ships and without corrections; what an
    earlier run counted is read."""
    session = run.session
    rows = run.results()
    wanted = [session.space.nothing, *(row.assignment for row in rows)]
    if session.config.corrections:  # which leave the float network's function as it is
        wanted += [row.assignment.with_corrections("none") for row in rows]
    distinct, evaluation_cache = list(dict.fromkeys(wanted)), session.evaluation_cache("validation")
    known = {assignment: counts for assignment in distinct if (counts := evaluation_cache.get(assignment)) is not None}
    parts = evaluation_batches(len(session.slices.validation), EVALUATION_BATCH)
    found: dict[Assignment, dict[int, Counts]] = {assignment: {} for assignment in distinct if assignment not in known}
    for assignment, done in found.items():
        done |= {k: counts for k, part in enumerate(parts) if (counts := evaluation_cache.get(assignment, part)) is not None}
    # shard by shard: what is decoded for one assignment is decoded for its neighbours
    items = [
        (k, tuple(group))
        for k in range(len(parts))
        for group in batched([key for key, done in found.items() if k not in done], session.assignments_at_once)
    ]
    with progress("evaluating", sum(len(group) for _, group in items)) as advance:
        for k, counted in run.workers.map(worker.evaluate_batch, session.config, items):
            for assignment, counts in counted:
                found[assignment][k] = counts
                if len(parts) > 1:
                    evaluation_cache.put(assignment, counts, parts[k])
                advance(1)
    for assignment, done in found.items():
        # shards are added in order, so that the sum does not depend on which worker was first
        known[assignment] = sum((done[k] for k in range(len(parts))), Counts())
        evaluation_cache.put(assignment, known[assignment])
    run.accuracies = known
