"""Evaluate: accuracy of the float network and of each distinct assignment on images that no choice has seen."""

from collections.abc import Iterator, Sequence

from clado.evaluation import Counts
from clado.records.results import CHOSEN, Result
from clado.run.evaluation import BatchCounts, BatchItem
from clado.run.opened_run import OpenedRun
from clado.space import Assignment
from flows import worker
from flows.clusters import Workers
from flows.progress import progress


def evaluate(run: OpenedRun, workers: Workers, results: Sequence[Result]) -> dict[Assignment, Counts]:
    """Counts on the validation set. Counts of an earlier run are read.

    They cover the float network, every distinct assignment of the results as deployed, and the chosen bits without
    corrections.
    """
    assignments = [run.space.nothing, *(row.assignment for row in results)]
    if run.config.corrections:
        assignments += [row.assignment.with_corrections("none") for row in results if row.method == CHOSEN]

    def count_batches(items: list[BatchItem]) -> Iterator[BatchCounts]:
        networks = [len(group) for _, group in items]
        with progress("evaluating", sum(networks), run.config.cluster.workers * max(networks, default=0)) as advance:
            for number, counts in workers.map(worker.evaluate_batch, run.config, items):
                yield number, counts
                advance(len(counts))

    return run.evaluation.validation_counts(assignments, count_batches)
