"""The flow that a deployment starts (prefect.yaml): a run from a file and overrides, both plain text on Prefect's pages."""

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
from flows.pipeline import pipeline


@flow(name="clado-scheduled", persist_result=False)
def scheduled(config: str, overrides: list[str] | None = None, folder: str | None = None) -> State:
    """Runs a configuration file to the end and says where; ends as `Skipped` where another run is writing to the same folder.

    Overrides have the form `section.key=value`. `folder` may hold fields of strftime, filled in with the scheduled start in UTC:
    with runs/nightly/%Y-%m-%d each scheduled run measures anew, and one that is started again goes on.
    """
    for override in overrides or []:
        if redact(override) != override:
            raise ConfigurationError(
                f"{redact(override)} has credentials, which Prefect shows; give the worker MLFLOW_TRACKING_URI"
            )
    chosen = [] if folder is None else [f"folder={json.dumps(_started().strftime(folder), ensure_ascii=False)}"]
    settings = load_config(Path(config), [*(overrides or []), *chosen])
    set_defaults(settings.run_folder.parent)
    try:
        receipt = pipeline.fn(settings)
    except FolderBusy as error:
        return Completed(name="Skipped", message=str(error))
    return Completed(message=f"results in {settings.run_folder}; MLflow run {receipt.parent_run_id or 'not delivered'}")


def _started() -> datetime:
    return flow_run.scheduled_start_time or datetime.now(UTC)
