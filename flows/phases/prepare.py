"""Prepare: every layer at every candidate, rounded and corrected once, one Dask task a layer, kept as files."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from clado.records import write_text
from flows import worker
from flows.phases.run import Run
from flows.progress import progress


@task(name="prepare", cache_policy=NO_CACHE, persist_result=False)
def prepare(run: Run) -> None:
    """Makes what is absent: the equalized float network first, then layers, as they ship and plain."""
    session = run.session
    session.equalize()
    todo = session.unprepared()
    with progress("preparing", len(todo)) as advance:
        for _ in run.workers.map(worker.prepare_layer, session.config, todo):
            advance(1)
    notes = session.prepared.notes
    if notes:
        write_text(session.folder / "corrections.md", "".join(f"- {note}\n" for note in notes))
        run.notes.append(f"what corrections did and skipped, and why: {len(notes)} lines in {session.folder / 'corrections.md'}")
