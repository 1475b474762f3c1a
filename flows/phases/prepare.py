"""Prepare: rounds and corrects every layer at every candidate once, and keeps the results as files.

First, tasks run over blocks of calibration images. Then one task prepares each layer.
"""

from collections.abc import Sequence

from clado.records.text import write_text
from clado.run.opened_run import OpenedRun
from clado.run.preparation import PreparationTask
from flows import worker
from flows.clusters import Workers
from flows.progress import progress


def prepare(run: OpenedRun, workers: Workers) -> list[str]:
    """Makes what is absent: first the equalized float network, then layers, corrected and plain. Returns notes."""
    preparation = run.preparation
    observations, stages = preparation.observations(), preparation.stages()
    costs = [task.cost for task in observations] + [task.cost for tasks in stages for task in tasks]
    with progress("preparing", sum(costs), run.config.cluster.workers * max(costs, default=0.0)) as advance:

        def do(tasks: Sequence[PreparationTask]) -> None:
            for task in workers.map(worker.prepare, run.config, tasks):
                advance(task.cost)

        do(observations)
        preparation.equalize()
        for tasks in stages:
            do(tasks)
    run.preparation.clear()
    notes = run.preparation.corrected.notes
    if not notes:
        return []
    file = run.folder / "corrections.md"
    write_text(file, "".join(f"- {note}\n" for note in notes))
    return [f"what corrections did and skipped: {len(notes)} lines in {file}"]
