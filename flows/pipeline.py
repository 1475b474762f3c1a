"""The pipeline: measure → allocate → evaluate → record. A Prefect flow; tiles and evaluations are Dask tasks inside it."""

from contextlib import ExitStack
from typing import Any

from prefect import flow

from clado.config import parse_config
from clado.records import write_text
from clado.tracking import Receipt
from flows import clusters
from flows.allocate import allocate, measure_candidates
from flows.evaluate import evaluate
from flows.measure import gather, measure
from flows.record import record, track
from flows.run import Clock, Run, locked
from flows.session import Session


@flow(name="clado-pipeline", validate_parameters=False, persist_result=False)
def pipeline(config: dict[str, Any], clock: dict[str, float] | None = None) -> Receipt:
    """Runs a configuration (plain data, as `RunConfig` takes it) to the end; resumes whatever its folder already holds.

    `clock` is a caller's table of seconds by phase, to which the flow adds its own.
    """
    settings = parse_config(config)
    session = Session.open(settings)
    phases = Clock({} if clock is None else clock)
    with locked(session.folder), ExitStack() as cluster:
        session.open_store()  # refused where it holds other numbers, before anything is written
        write_text(session.folder / "config.yaml", settings.to_yaml())
        with phases.phase("start-up"):
            workers = cluster.enter_context(clusters.start(settings))
            workers.open_session(settings)
        run = Run(session, workers, phases)
        with phases.phase("measuring"):
            measure(run)
        with phases.phase("solving"):
            gather(run)
            allocate(run)
        with phases.phase("evaluation"):
            measure_candidates(run)
            evaluate(run)
        with phases.phase("recording"):
            record(run)
            receipt = track(run)
        with phases.phase("shutdown"):
            cluster.close()
    return receipt
