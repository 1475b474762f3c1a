"""The flow of a deployment (prefect.yaml): a run from a file and overrides, which are plain text on Prefect's pages."""

import json
from datetime import UTC, datetime
from pathlib import Path

from prefect import State, flow
from prefect.runtime import flow_run
from prefect.states import Completed

from clado.errors import ConfigurationError, FolderBusy
from clado.settings.loading import load_config
from clado.settings.redaction import redact
from flows.environment import set_defaults
from flows.pipeline import name_of, pipeline


def flow_run_name() -> str:
    """How Prefect calls a flow run: as those of `pipeline`."""
    given = flow_run.parameters
    return name_of(lambda: load_config(Path(given["config"]), given.get("overrides") or []))


@flow(name="clado-scheduled", flow_run_name=flow_run_name, persist_result=False)
def scheduled(config: str, overrides: list[str] | None = None, folder: str | None = None) -> State:
    """Runs a configuration file to the end, and returns a message with its folder.

    It ends as `Skipped` if another run is writing to the same folder.

    Args:
        config: The path of the configuration file.
        overrides: Settings of the form `section.key=value`.
        folder: The run's folder. Fields of strftime are replaced by the scheduled start in UTC. With runs/nightly/%Y-%m-%d each
            scheduled run measures again, and a run that is started again continues.
    """
    for override in overrides or []:
        if redact(override) != override:
            raise ConfigurationError(
                f"{redact(override)} has credentials, which Prefect shows; expected MLFLOW_TRACKING_URI on the worker"
            )
    folder_override = [] if folder is None else [f"folder={json.dumps(_start().strftime(folder), ensure_ascii=False)}"]
    settings = load_config(Path(config), [*(overrides or []), *folder_override])
    set_defaults(settings.run_folder.parent)
    try:
        receipt = pipeline.fn(settings)
    except FolderBusy as error:
        return Completed(name="Skipped", message=str(error))
    return Completed(message=f"results in {settings.run_folder}; MLflow run {receipt.parent_run_id or 'not delivered'}")


def _start() -> datetime:
    return flow_run.scheduled_start_time or datetime.now(UTC)
