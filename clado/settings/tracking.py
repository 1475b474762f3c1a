"""Where MLflow records a run."""

import os
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from clado.settings.fields import Settings
from clado.settings.redaction import Uri, redact

TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"


def tracking_uri(explicit: str | None = None) -> str:
    """The given URI, else MLFLOW_TRACKING_URI, else MLflow's default. A relative path becomes absolute."""
    uri = explicit or os.environ.get(TRACKING_VARIABLE) or "sqlite:///mlflow.db"
    return re.sub("^(sqlite:///|file:)(?!/|:memory:)(.+)", lambda match: match[1] + Path(match[2]).resolve().as_posix(), uri)


def database_of(uri: str) -> Path | None:
    """The file of an SQLite tracker, None for any other."""
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]) if uri.startswith("sqlite:///") else None


def _kept_uri(uri: str) -> str:
    if "?" in str(Path.cwd()) and not (uri or os.environ.get(TRACKING_VARIABLE)):
        raise ValueError(f"{Path.cwd()} has a ?, which ends the name of MLflow's database; expected another folder, or a URI")
    return tracking_uri(uri) if uri else redact(tracking_uri())  # credentials stay in the environment


class TrackingSettings(Settings):
    """Where MLflow records the run."""

    experiment: str = "clado"
    uri: Annotated[Uri, AfterValidator(_kept_uri)] = Field(
        default="",
        validate_default=True,
        description="default: MLFLOW_TRACKING_URI of the environment, else sqlite:///mlflow.db in the working folder",
    )
    models: bool = Field(
        strict=True, default=True, description="log the chosen networks and register them; false for a server of MLflow 2"
    )
