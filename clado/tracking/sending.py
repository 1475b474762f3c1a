"""Writes MLflow runs within the limits of every MLflow server: parameters, metrics, tags."""

import logging
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from clado.settings.redaction import redact
from clado.tracking.notes import one_line

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

TAG = "clado_delivery"
"""Tag of every MLflow run, model and registered version: the name of its delivery."""
MAX_PARAM, MAX_TAG, MAX_BATCH, MAX_METRICS = 500, 5000, 90, 900
"""Characters of a parameter and of a tag, parameters and metrics of a batch.

Every MLflow 2 and 3 server takes as many.
"""
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass
class Progress:
    """The progress of an attempt. It is correct at every moment, even if the attempt is interrupted."""

    pending: list[str]
    """Names of the items that have not arrived."""
    parent_id: str | None = None
    """MLflow's id of the first run of the attempt."""
    num_children: int = 0
    """Number of nested runs that have arrived."""


@dataclass(frozen=True)
class Sender:
    """Writes the MLflow runs of one attempt."""

    client: "MlflowClient"
    """Client of the store."""
    experiment_id: str
    """MLflow's id of the experiment."""
    delivery: str
    """Name of the delivery, 32 hexadecimal digits."""
    progress: Progress
    """How far the attempt has come."""

    @contextmanager
    def run(
        self, name: str, tags: Mapping[str, str], status: str = "FINISHED", span: tuple[int, int] | None = None
    ) -> Iterator[str]:
        """An MLflow run around a block. The block gets its id.

        Args:
            name: Name of the run.
            tags: Tags of the run. They are redacted.
            status: Status of the run after the block. If the block raises, the status is FAILED.
            span: When it began and ended, in ms since 1970. By default these are the times of sending.
        """
        tags, (begin, end) = trim({**tags, TAG: self.delivery}), span or (None, None)
        run_id = str(self.client.create_run(self.experiment_id, begin, tags=tags, run_name=name).info.run_id)
        self.progress.parent_id = self.progress.parent_id or run_id
        try:
            yield run_id
        except BaseException:
            try:
                self.client.set_terminated(run_id, "FAILED")
            except Exception as fault:  # the first fault is reported; the next attempt ends the run
                log.debug("run %s stays open: %s", run_id, one_line(fault))
            raise
        self.client.set_terminated(run_id, status, end)

    def log(
        self,
        run_id: str,
        metrics: Mapping[str, float | None],
        params: Mapping[str, str],
        subjects: Mapping[str, Mapping[str, str | None]] = NOTHING,
    ) -> None:
        """Writes metrics and parameters of a run in batches.

        MLflow stores an infinity as 1.8e308. So a metric that is not finite (a gap without a bound)
        becomes a tag.

        Args:
            run_id: MLflow's id of the run.
            metrics: Value of each metric. None is left out.
            params: Value of each parameter.
            subjects: The model and the dataset that a metric belongs to, as arguments of MLflow's
                `Metric`.
        """
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        values = {name: float(value) for name, value in metrics.items() if value is not None}
        finite = [Metric(name, value, now, 0, **subjects.get(name, {})) for name, value in values.items() if math.isfinite(value)]
        tags = [RunTag(name, str(value)) for name, value in values.items() if not math.isfinite(value)]
        settings = [Param(key(name), value[:MAX_PARAM]) for name, value in params.items()]
        self.client.log_batch(run_id, metrics=finite, params=settings[:MAX_BATCH], tags=tags)
        for first in range(MAX_BATCH, len(settings), MAX_BATCH):
            self.client.log_batch(run_id, params=settings[first : first + MAX_BATCH])

    def log_series(self, run_id: str, series: Mapping[str, Sequence[tuple[int, float]]]) -> None:
        """Writes metrics as (step, value). Points of one step differ in their time."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [
            Metric(key(name), value, now + k, step) for name, values in series.items() for k, (step, value) in enumerate(values)
        ]
        for first in range(0, len(points), MAX_METRICS):
            self.client.log_batch(run_id, metrics=points[first : first + MAX_METRICS])


def settings_params(config: Mapping[str, Any], network: str) -> dict[str, str]:
    """Parameters of a run: its settings under dotted names, and its network. They are redacted."""
    return {**{name: redact(str(value)) for name, value in _flat(config) if value is not None}, "network": network}


def _flat(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf."""
    for name, value in document.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def key(name: str) -> str:
    """A name that MLflow allows as a key: letters, digits and _ - . / : and blanks."""
    return re.sub(r"[^\w\-./: ]", "_", name, flags=re.ASCII)


def trim(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags that MLflow allows: redacted, not too long, none empty."""
    return {key(name): redact(str(value))[:MAX_TAG] for name, value in tags.items() if value not in (None, "")}


def redacted(document: Any) -> Any:
    """The same plain data with every string redacted."""
    if isinstance(document, Mapping):
        return {name: redacted(value) for name, value in document.items()}
    if isinstance(document, list | tuple):
        return [redacted(value) for value in document]
    return redact(document) if isinstance(document, str) else document
