"""Prepare: every layer at every candidate, rounded and corrected once, one Dask task a layer, kept as files."""

from clado.records.text import write_text
from clado.run.opened_run import OpenedRun
from flows import worker
from flows.clusters import Workers
from flows.progress import progress


def prepare(run: OpenedRun, workers: Workers) -> list[str]:
    """Makes what is absent: the equalized float network first, then layers, as deployed and plain. Returns notes."""
    run.preparation.equalize()
    todo = run.preparation.unprepared()
    with progress("preparing", len(todo)) as advance:
        for _ in workers.map(worker.prepare_layer, run.config, todo):
            advance(1)
    notes = run.preparation.corrected.notes
    if not notes:
        return []
    file = run.folder / "corrections.md"
    write_text(file, "".join(f"- {note}\n" for note in notes))
    return [f"what corrections did and skipped, and why: {len(notes)} lines in {file}"]
