"""The pipeline: prepare → measure → allocate → search → evaluate → record. A Prefect flow, with Dask tasks inside."""

from contextlib import ExitStack
from typing import Any

from prefect import flow

from clado.records import Receipt, write_text
from clado.run.opened_run import OpenedRun
from clado.settings.loading import parse_config
from clado.settings.schema import RunConfig
from flows import clusters
from flows.guard import insistent, locked
from flows.phases.choose import allocate, measure_proposals, search
from flows.phases.evaluate import evaluate
from flows.phases.measure import gather, measure
from flows.phases.prepare import prepare
from flows.phases.record import failure_recorded, record, track
from flows.phases.run import Clock, Run


@flow(name="clado-pipeline", validate_parameters=False, persist_result=False)
def pipeline(config: RunConfig | dict[str, Any], clock: dict[str, float] | None = None) -> Receipt:
    """Runs a configuration (or plain data, as `RunConfig` takes it) to the end; resumes whatever its folder already holds.

    Prefect keeps the parameters of a flow run: those of a `RunConfig` without credentials. `clock` is a caller's table of seconds
    by phase, to which the flow adds its own.
    """
    settings = config if isinstance(config, RunConfig) else parse_config(config)
    session = OpenedRun.open(settings).checked()
    settings = session.config
    phases = Clock({} if clock is None else clock)
    with locked(session.folder):
        session.open_store()  # refused where it holds other numbers, before anything is written
        write_text(session.folder / "config.yaml", settings.to_yaml())
        with failure_recorded(session), ExitStack() as cluster, insistent():
            with phases.phase("start-up"):
                workers = cluster.enter_context(clusters.start(settings))
                workers.open_session(settings, session.contents)
            run = Run(session, workers, phases)
            with phases.phase("preparing"):
                prepare(run)
            with phases.phase("measuring"):
                measure(run)
            with phases.phase("solving"):
                gather(run)
                allocate(run)
            with phases.phase("evaluation"):
                measure_proposals(run)
            with phases.phase("searching"):
                search(run)
            with phases.phase("evaluation"):
                evaluate(run)
            with phases.phase("recording"):
                record(run)
                receipt = track(run)
            with phases.phase("shutdown"):
                cluster.close()
    return receipt
