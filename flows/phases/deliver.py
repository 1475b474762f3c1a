"""Deliver: sends the record, its plots and its networks to MLflow, or a failure."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clado.records.results import Receipt
from clado.records.run_record import RunRecord
from clado.reporting import tables
from clado.run.opened_run import OpenedRun
from clado.tracking import delivery, notes
from flows.commands.export import budget_folder, model_folder


def deliver(run: OpenedRun, record: RunRecord, flow_run_id: str = "") -> Receipt:
    """Mirrors the record to MLflow. If the tracker does not answer, it logs a warning.

    Args:
        run: The run.
        record: Its record, which is written to its folder.
        flow_run_id: The id of the Prefect flow run, if there is one.
    """
    config, budgets = run.config, record.budgets
    exports = {budget: budget_folder(run, budget) for budget in budgets}
    models = {budget: model_folder(run, budget) for budget in budgets if config.tracking.models}
    return delivery.track(
        record,
        run.folder,
        config.model_dump(mode="json"),
        experiment=config.tracking.experiment,
        uri=config.tracking.uri,
        tags=_tags(run, flow_run_id),
        matrices={name: run.folder / "matrices" / f"{name}.npz" for name in config.estimators},
        plots=sorted((run.folder / "plots").glob("*.png")),
        exports=_written(exports),
        models=_written(models),
        description=tables.markdown(record),
    )


@contextmanager
def failure_recorded(run: OpenedRun, flow_run_id: str = "") -> Iterator[None]:
    """Around a run: writes an error with its traceback to MLflow and to the run's failure.txt, then raises it again."""
    config = run.config
    try:
        yield
    except Exception as error:
        delivery.track_failure(
            error,
            run.folder,
            config.model_dump(mode="json"),
            network=run.loaded.description,
            experiment=config.tracking.experiment,
            uri=config.tracking.uri,
            tags=_tags(run, flow_run_id),
        )
        raise
    (run.folder / notes.FAILURE).unlink(missing_ok=True)


def _tags(run: OpenedRun, flow_run_id: str) -> dict[str, str]:
    """Versions and device, and where the run is in Prefect."""
    from flows.phases.record import provenance_of  # imports matplotlib

    return {**provenance_of(run), "prefect_flow_run_id": flow_run_id}


def _written(folders: dict[str, Path]) -> dict[str, Path]:
    """The folders that were written. They can be fewer, because a torch module cannot hold every network."""
    return {budget: folder for budget, folder in folders.items() if folder.is_dir()}
