"""MLflow's stores: the address that records go to, SQLite files, and experiments.

MLflow is imported inside functions, because its import takes seconds.
"""

import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from clado.settings.redaction import HIDDEN
from clado.settings.tracking import TRACKING_VARIABLE, database_of, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

ARTIFACTS = "mlruns"
"""Folder of artifacts. It is in the folder of the SQLite file."""
SQL_ATTEMPTS = 5
"""Attempts to connect to a database: 2.6 s of waiting in all."""


def set_environment() -> None:
    """Turns MLflow's telemetry off and keeps its retries short. Call it before MLflow is imported.

    Variables that the environment already has are kept.
    """
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it would print two lines for each of thirty children
    }.items():
        os.environ.setdefault(name, value)


def destination(uri: str | None) -> str:
    """The absolute URI that a record goes to.

    Args:
        uri: URI of the settings. The settings of a finished run keep no credentials.

    Returns:
        The given URI. Where it is missing or has lost its credentials, the URI of the environment,
        or else MLflow's default.
    """
    if uri and HIDDEN in uri:
        if TRACKING_VARIABLE not in os.environ:
            log.warning("%s has no credentials; set %s. Until then the record goes to %s", uri, TRACKING_VARIABLE, tracking_uri())
        uri = None
    return tracking_uri(uri)


def connect(uri: str) -> "MlflowClient":
    """A client of an MLflow store.

    Only one process at a time creates an SQLite file, because MLflow creates its tables without a
    lock.
    """
    set_environment()
    from mlflow import MlflowClient
    from mlflow.store.db import utils

    utils.MAX_RETRY_COUNT = SQL_ATTEMPTS  # MLflow has no setting for it; its ten attempts take 102 s if no server listens
    if (database := database_of(uri)) is None:
        return MlflowClient(uri)
    database.parent.mkdir(parents=True, exist_ok=True)
    lock = database.with_name(f"{database.name}.lock")
    with lock.open("w") as lock_file:
        with suppress(ImportError, OSError):  # Windows, and file systems without locks
            import fcntl

            fcntl.flock(lock_file, fcntl.LOCK_EX)
        client = MlflowClient(uri)
    lock.unlink(missing_ok=True)  # a process that still waits for the lock will find all tables
    return client


def experiment_id(client: "MlflowClient", uri: str, name: str) -> str:
    """The id of an experiment. The experiment is created if it is missing.

    An experiment of a moved or copied database would still write to the former folder. It is
    renamed, and a new experiment takes its name.
    """
    database, experiment = database_of(uri), client.get_experiment_by_name(name)
    # MLflow's own default is the working folder. A server has a default of its own.
    location = None if database is None else (database.resolve().parent / ARTIFACTS).as_uri()
    former = experiment.artifact_location if experiment else None
    if experiment and location and location != former and str(former).endswith(f"/{ARTIFACTS}"):
        client.rename_experiment(experiment.experiment_id, f"{name} before it moved ({experiment.experiment_id})")
        experiment = None
    if experiment is None:
        try:
            return client.create_experiment(name, location)
        except Exception:
            experiment = client.get_experiment_by_name(name)  # another run may have created it in the meantime
            if experiment is None:
                raise
    return str(experiment.experiment_id)
