"""A finished run in MLflow: a parent run with one nested child for each budget and method.

`tracking.models` sends datasets and models.

The run's folder is the truth and MLflow a mirror of it. A note beside the record (`mlflow-undelivered.json`) is written before
anything is sent, so that a tracker that is down, slow or wrong, or a process that is killed, costs a warning and never a result.
When all has arrived, the note becomes `mlflow-delivered.json`. `deliver` sends what is undelivered, and what was delivered but is
not at the tracker that is used now. Every MLflow run carries the name of its delivery as a tag; what an earlier attempt left
behind is found by it, ended and deleted, and so nothing is there twice. A run that failed is delivered in the same way, as
FAILED, with its traceback. MLflow is imported inside functions: it takes seconds.
"""

import json
import logging
import math
import os
import re
import shlex
import shutil
import tempfile
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from clado.errors import ServerError, StoreError
from clado.records import CHOSEN, Accuracy, Receipt, Result, RunRecord, write_text
from clado.settings.identity import fingerprint
from clado.settings.redaction import HIDDEN, redact
from clado.settings.tracking import TRACKING_VARIABLE, database_of, tracking_uri
from clado.tracking import models
from clado.tracking.models import Logged

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

ARTIFACTS = "mlruns"  # beside an SQLite file
UNDELIVERED, DELIVERED = "mlflow-undelivered.json", "mlflow-delivered.json"
UNDELIVERED_FAILURE = "mlflow-undelivered-failure.json"  # of its own, so that a failure never takes a finished run's place
RECORD, FAILURE = "record.json", "failure.txt"  # beside a note
VALIDATION = "validation_set"
FORMAT, TAG = "clado-undelivered/2", "clado_delivery"
SQL_ATTEMPTS = 5  # to connect to a database: 2.6 s of waiting in all
MAX_PARAM, MAX_TAG, MAX_BATCH, MAX_METRICS = 500, 5000, 90, 900  # below the limits of every MLflow 2 and 3 server
NOTHING: Mapping[str, Any] = MappingProxyType({})


def set_environment() -> None:
    """Turns MLflow's telemetry off and keeps its retries short, unless the environment says otherwise; call before its import."""
    for name, value in {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
        "MLFLOW_LOGGING_LEVEL": "WARNING",
        "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines for each of thirty children
    }.items():
        os.environ.setdefault(name, value)


def destination(uri: str | None) -> str:
    """Where a record goes, absolute. A URI whose credentials the settings do not keep is read from the environment."""
    if uri and HIDDEN in uri:
        if TRACKING_VARIABLE not in os.environ:
            log.warning("%s has no credentials; set %s. Until then the record goes to %s", uri, TRACKING_VARIABLE, tracking_uri())
        uri = None
    return tracking_uri(uri)


def track(
    record: RunRecord,
    folder: Path,
    config: Mapping[str, Any],
    *,
    experiment: str = "clado",
    uri: str | None = None,
    tags: Mapping[str, str] = NOTHING,
    matrices: Mapping[str, Path] = NOTHING,
    plots: Sequence[Path] = (),
    exports: Mapping[str, Path] = NOTHING,
    models: Mapping[str, Path] = NOTHING,
    description: str = "",
    record_folder: Path | None = None,
) -> Receipt:
    """Writes a finished record to MLflow and says where it is; twice is allowed and makes a second parent run.

    `config` is plain data, flattened into parameters; `tags` are provenance (versions, device); `matrices` maps a name to a
    saved file; `exports` maps a budget to the folder that belongs to its chosen assignment, `models` to the one of
    `export.model`, to be logged and registered; `description` is Markdown for the run's page. `record_folder` is the folder
    that holds the record's file, where that is not `folder`. A fault of the tracker is logged as a warning and noted beside the record;
    nothing is raised for it.
    """
    delivery = _Delivery(
        folder, config, experiment, destination(uri), tags, record_folder or folder,
        record=record, matrices=matrices, plots=plots, exports=exports, models=models, description=description,
    )  # fmt: skip
    return _warned(_attempt(delivery), folder)


def track_failure(
    error: BaseException,
    folder: Path,
    config: Mapping[str, Any],
    *,
    network: str,
    experiment: str = "clado",
    uri: str | None = None,
    tags: Mapping[str, str] = NOTHING,
) -> Receipt:
    """Writes a run that ended with an error as a FAILED MLflow run with its traceback, redacted, and keeps that as failure.txt.

    Raises nothing: the error itself is what the caller has to tell.
    """
    text = redact("".join(traceback.format_exception(error)))
    try:
        write_text(folder / FAILURE, text)
    except OSError as fault:  # the disk may be what failed
        log.debug("no %s: %s", FAILURE, fault)
    tags = {**tags, "error": _one_line(error)}
    return _warned(_attempt(_Failure(folder, config, experiment, destination(uri), tags, folder, network, text)), folder)


def deliver(folder: Path, config: Mapping[str, Any], uri: str | None = None) -> list[Receipt]:
    """Sends what the notes in a run's folder name, from that folder alone. What is delivered and still there is not sent again.

    StoreError where a note, or the record beside it, cannot be read, before anything is sent. ServerError where the tracker
    does not answer.
    """
    target = destination(uri)
    for note in _notes(folder, [DELIVERED]):
        waiting = note.with_name(UNDELIVERED)
        if not waiting.exists() and not _arrived(note, target):
            note.replace(waiting)
    attempts = [_noted(path, folder, config, target) for path in _notes(folder, [UNDELIVERED, UNDELIVERED_FAILURE])]
    return [_attempt(attempt) for attempt in attempts]


def _arrived(note: Path, uri: str) -> bool:
    """Whether a tracker has what a note says was delivered to it. A run that a user deleted there is not missing."""
    document = _read_note(note)
    if document.get("uri") != redact(uri):
        return False
    try:
        _client(uri).get_run(str(document.get("parent_run_id")))
    except Exception as error:
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise ServerError(f"MLflow at {redact(uri)} does not answer ({_one_line(error)})") from None
    return True


def _attempt(attempt: "_Attempt") -> Receipt:
    """Sends, with a note on disk for as long as anything is missing."""
    start = time.monotonic()
    attempt.supersede()
    if _note(attempt, "its sending was cut short") is not None:  # what the note says should this process be killed
        for note in attempt.superseded:
            if note != attempt.note:
                note.unlink(missing_ok=True)  # it is in this one
    error: Exception | None = None
    try:
        attempt.connect()
    except Exception as fault:  # whatever a tracker, its driver or its server may raise: the science goes on
        error = fault
    problem = spool = None
    if error is not None or attempt.pending:
        problem = _one_line(error) if error is not None else f"not found: {', '.join(attempt.pending)}"
        spool = _note(attempt, problem)
    elif isinstance(attempt, _Failure):
        attempt.note.unlink(missing_ok=True)
    elif _note(attempt, None) is not None:
        attempt.note.replace(attempt.note.with_name(DELIVERED))
    return Receipt(
        uri=redact(attempt.uri),
        experiment=attempt.experiment,
        experiment_id=attempt.experiment_id,
        parent_run_id=attempt.parent_id,
        num_children=attempt.num_children,
        delivered=problem is None,
        seconds=time.monotonic() - start,
        problem=problem,
        spool=spool,
    )


def _warned(receipt: Receipt, folder: Path) -> Receipt:
    if not receipt.delivered:
        log.warning(
            "MLflow at %s did not take the whole record (%s). The results are safe in %s; what is missing is listed in %s. "
            "When the tracker is well: clado sync %s",
            receipt.uri, receipt.problem, folder, receipt.spool or "no file, for that could not be written either",
            shlex.quote(str(folder)),
        )  # fmt: skip
    return receipt


def track_nested(
    folder: Path,
    name: str,
    *,
    record_folder: Path,
    experiment: str,
    uri: str | None,
    params: Mapping[str, str],
    metrics: Mapping[str, float | None] = NOTHING,
    series: Mapping[str, Sequence[tuple[int, float]]] = NOTHING,
    artifacts: Sequence[Path] = (),
) -> Receipt:
    """One run nested under the latest parent run of a run's folder (beside it, where MLflow has none), such as a fine-tuning.

    `series` are (step, value) of metrics; `artifacts` are files below `record_folder`, a folder within `folder` that is this
    one's alone and gets the note of what is undelivered. The same again replaces the first. A fault of the tracker is a warning, as of
    `track`.
    """
    attempt = _Nested(
        folder, NOTHING, experiment, destination(uri), NOTHING, record_folder,
        name=name, params=params, metrics=metrics, series=series, artifacts=artifacts,
    )  # fmt: skip
    return _warned(_attempt(attempt), folder)


def curves(record: RunRecord, results: Sequence[Result]) -> dict[str, list[tuple[int, float]]]:
    """Accuracy and measured loss of every method over the bytes of its answers: (bytes, value), a point a budget.

    Bytes are the step, for they are whole numbers and every kind of budget has them.
    """
    found: dict[str, list[tuple[int, float]]] = {}
    for result in sorted(results, key=lambda result: result.size_bytes):
        accuracy = result.validation
        values = {
            record.top1_name: accuracy.top1 if accuracy else None,
            "validation_loss": accuracy.loss if accuracy else None,
            "loss_deployed": result.loss_deployed,
        }
        for name, value in values.items():
            if value is not None and math.isfinite(value):
                found.setdefault(f"{name}/{result.method}", []).append((result.size_bytes, value))
    return found


@dataclass
class _Attempt:
    """One attempt to send something. `pending` names what has not arrived, so that whatever stops it, the note is right."""

    folder: Path
    config: Mapping[str, Any]
    experiment: str
    uri: str
    tags: Mapping[str, str]
    record_folder: Path  # of the note
    experiment_id: str | None = field(default=None, init=False)
    parent_id: str | None = field(default=None, init=False)
    num_children: int = field(default=0, init=False)
    pending: list[str] = field(default_factory=list, init=False)
    delivery: str = field(default_factory=lambda: uuid.uuid4().hex, init=False)
    earlier: list[dict[str, str]] = field(default_factory=list, init=False)

    @property
    def note(self) -> Path:
        """Where what is undelivered is noted."""
        return self.record_folder / UNDELIVERED

    @property
    def superseded(self) -> tuple[Path, ...]:
        """Notes whose attempts this one replaces."""
        return (self.note,)

    def supersede(self) -> None:
        """Takes over the attempts of the notes that are there: what they left behind is to be replaced."""
        self.earlier = []
        for note in self.superseded:
            try:
                self.earlier += _read_note(note)["attempts"] if note.exists() else []
            except StoreError as fault:  # it will be written over
                log.debug("%s", fault)

    def connect(self) -> None:
        """Replaces what earlier attempts left behind, and sends."""
        client = _client(self.uri)
        for attempt in self.earlier:
            self._remove(client, attempt["experiment"], attempt["delivery"])
        self.experiment_id = self._experiment(client)
        self.send(client)

    def send(self, client: "MlflowClient") -> None:
        """Sends, and takes from `pending` what has arrived."""
        raise NotImplementedError

    def contents(self) -> dict[str, Any]:
        """What a note needs beside what all have, to make the attempt again."""
        raise NotImplementedError

    def _remove(self, client: "MlflowClient", experiment: str, delivery: str) -> None:
        """Ends and deletes the runs of a delivery that did not arrive whole, wherever it broke off."""
        found = client.get_experiment_by_name(experiment)
        while found is not None:
            runs = client.search_runs([found.experiment_id], f"tags.{TAG} = '{delivery}'", max_results=1000)
            for run in runs:
                if run.info.status == "RUNNING":
                    client.set_terminated(run.info.run_id, "FAILED")
                client.delete_run(run.info.run_id)
            if not runs:
                models.remove(client, found.experiment_id, TAG, delivery)
                return

    def _experiment(self, client: "MlflowClient") -> str:
        file, found = database_of(self.uri), client.get_experiment_by_name(self.experiment)
        # beside an SQLite file, for MLflow's own default is the working folder; a server knows its own place
        place = None if file is None else (file.resolve().parent / ARTIFACTS).as_uri()
        if found and place and str(found.artifact_location).endswith(f"/{ARTIFACTS}") and place != found.artifact_location:
            # the database was moved or copied: its experiment would still write to the former place
            client.rename_experiment(found.experiment_id, f"{self.experiment} before it moved ({found.experiment_id})")
            found = None
        if found is None:
            try:
                return client.create_experiment(self.experiment, place)
            except Exception:
                found = client.get_experiment_by_name(self.experiment)  # another run may have made it in the meantime
                if found is None:
                    raise
        return str(found.experiment_id)

    @contextmanager
    def _run(self, client: "MlflowClient", name: str, tags: Mapping[str, str], ends: str = "FINISHED") -> Iterator[str]:
        """An MLflow run that ends as `ends` says, or as FAILED where the block raises."""
        tags = _trim({**tags, TAG: self.delivery})
        run_id = str(client.create_run(self.experiment_id or "0", tags=tags, run_name=name).info.run_id)
        try:
            yield run_id
        except BaseException:
            try:
                client.set_terminated(run_id, "FAILED")
            except Exception as fault:  # the first fault is the one to report; the next attempt ends the run
                log.debug("run %s stays open: %s", run_id, _one_line(fault))
            raise
        client.set_terminated(run_id, ends)

    def _params(self, network: str) -> dict[str, str]:
        settings = {name: value for name, value in _flat(self.config) if value is not None}
        return {**{name: redact(str(value)) for name, value in settings.items()}, "network": network}

    @staticmethod
    def _log(
        client: "MlflowClient",
        run_id: str,
        metrics: Mapping[str, float | None],
        params: Mapping[str, str],
        of: Mapping[str, Mapping[str, str | None]] = NOTHING,
    ) -> None:
        """In batches; `of` names the model and the dataset of a metric.

        MLflow stores an infinity as 1.8e308, so what is not finite (a gap without a bound) becomes a tag.
        """
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        known = {name: float(value) for name, value in metrics.items() if value is not None}
        numbers = [Metric(name, value, now, 0, **of.get(name, {})) for name, value in known.items() if math.isfinite(value)]
        others = [RunTag(name, str(value)) for name, value in known.items() if not math.isfinite(value)]
        settings = [Param(_key(name), value[:MAX_PARAM]) for name, value in params.items()]
        client.log_batch(run_id, metrics=numbers, params=settings[:MAX_BATCH], tags=others)
        for first in range(MAX_BATCH, len(settings), MAX_BATCH):
            client.log_batch(run_id, params=settings[first : first + MAX_BATCH])

    @staticmethod
    def _log_series(client: "MlflowClient", run_id: str, series: Mapping[str, Sequence[tuple[int, float]]]) -> None:
        """Metrics over steps; points of one step stay apart by their time."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [
            Metric(_key(name), value, now + k, step) for name, found in series.items() for k, (step, value) in enumerate(found)
        ]
        for first in range(0, len(points), MAX_METRICS):
            client.log_batch(run_id, metrics=points[first : first + MAX_METRICS])


@dataclass
class _Failure(_Attempt):
    """A run that ended with an error: one FAILED MLflow run with the traceback."""

    network: str
    text: str  # the traceback, redacted

    def __post_init__(self) -> None:
        self.pending = ["failed run"]

    @property
    def note(self) -> Path:
        """A file of its own."""
        return self.record_folder / UNDELIVERED_FAILURE

    def contents(self) -> dict[str, Any]:
        """The name of the traceback's file, and of the network."""
        return {"failure": FAILURE, "network": self.network}

    def send(self, client: "MlflowClient") -> None:
        """One run."""
        tags = {"mlflow.source.name": "clado run", **self.tags}
        with self._run(client, self.network, tags, ends="FAILED") as self.parent_id:
            self._log(client, self.parent_id, metrics={}, params=self._params(self.network))
            client.log_text(self.parent_id, self.text, FAILURE)
        self.pending.clear()


@dataclass
class _Nested(_Attempt):
    """One run under the latest parent run of the same fingerprint; `parent_id` is its own."""

    name: str
    params: Mapping[str, str]
    metrics: Mapping[str, float | None]
    series: Mapping[str, Sequence[tuple[int, float]]]
    artifacts: Sequence[Path]

    def __post_init__(self) -> None:
        self.pending = [self.name]
        self.delivery = fingerprint([self.folder.name, json.dumps(self.contents())])[:32]  # the same again replaces what is there

    def supersede(self) -> None:
        """Takes over what was sent of the same, too."""
        super().supersede()
        own = {"experiment": self.experiment, "delivery": self.delivery}
        self.earlier = [*(attempt for attempt in self.earlier if attempt != own), own]

    def contents(self) -> dict[str, Any]:
        """All of it, and places of files relative to the run's folder."""
        return {
            "nested": self.name,
            "params": {key: redact(value) for key, value in self.params.items()},
            "metrics": dict(self.metrics),
            "series": dict(self.series),
            "artifacts": [os.path.relpath(path, self.folder) for path in self.artifacts],
        }

    def send(self, client: "MlflowClient") -> None:
        """One run."""
        if (self.folder / UNDELIVERED).exists():
            raise ServerError("the run that this belongs to is not delivered yet")
        known = RunRecord.load(self.folder / RECORD).fingerprint
        query = f"tags.fingerprint = '{known}' and tags.mlflow.source.name = 'clado run' and attributes.status = 'FINISHED'"
        fronts = client.search_runs([str(self.experiment_id)], query)  # those of `clado sweep` too
        parents = [run.info.run_id for run in fronts if "sweep" not in run.data.tags]
        tags = {"fingerprint": known, "mlflow.parentRunId": parents[0] if parents else ""}
        with self._run(client, self.name, tags) as self.parent_id:
            self._log(client, self.parent_id, self.metrics, {key: redact(value) for key, value in self.params.items()})
            self._log_series(client, self.parent_id, self.series)
            for path in self.artifacts:
                client.log_artifact(self.parent_id, str(path))
        self.pending.clear()


@dataclass
class _Delivery(_Attempt):
    """A finished record."""

    record: RunRecord
    matrices: Mapping[str, Path]
    plots: Sequence[Path]
    exports: Mapping[str, Path]
    models: Mapping[str, Path]
    description: str
    logged: list[Logged] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.pending = ["parent run"]
        self.pending += [_artifact_name("matrices", name, path) for name, path in self.matrices.items()]
        self.pending += [f"plots/{path.name}" for path in self.plots]
        self.pending += [_child_name(result) for result in self.record.results]
        self.pending += [f"export of {budget}" for budget in self.exports]
        self.pending += [f"model of {budget}" for budget in self.models]

    @property
    def superseded(self) -> tuple[Path, ...]:
        """Also that of a failure before: its traceback is no more."""
        return self.note, self.record_folder / UNDELIVERED_FAILURE

    def contents(self) -> dict[str, Any]:
        """Places of files, relative to the run's folder."""

        def place(path: Path) -> str:
            return os.path.relpath(path, self.folder)

        return {
            "matrices": {name: place(path) for name, path in self.matrices.items()},
            "plots": [place(path) for path in self.plots],
            "exports": {budget: place(path) for budget, path in self.exports.items()},
            "models": {budget: place(path) for budget, path in self.models.items()},
            "description": redact(self.description),
        }

    def send(self, client: "MlflowClient") -> None:
        """A parent run and one child for each result; when both are whole, versions in the registry."""
        with self._run(client, self.record.network, self._parent_tags()) as parent_id:
            self.parent_id = parent_id
            if self.record.data:
                client.log_inputs(parent_id, models.inputs(self.record, self.config.get("data", NOTHING)))
            self._log_series(client, parent_id, curves(self.record, self.record.results))
            self._log(client, parent_id, metrics=self._parent_metrics(), params=self._params(self.record.network))
            self._parent_artifacts(client, parent_id)
            self.pending.remove("parent run")
            for result in self.record.results:
                self._child(client, parent_id, result)
        for model in self.logged:
            models.register(client, model, self.record.recorded, self._model_tags())
            self.pending.remove(f"model of {model.budget}")

    def _parent_tags(self) -> dict[str, str]:
        return {
            "mlflow.source.name": "clado run",
            "mlflow.note.content": self.description,
            **self.tags,
            "fingerprint": self.record.fingerprint,
            "criterion": self.record.criterion,
            "notes": "; ".join(self.record.notes),
        }

    def _parent_metrics(self) -> dict[str, float | None]:
        accuracy = self.record.float_accuracy
        return {
            "baseline": self.record.baseline,
            f"float_{self.record.top1_name}": accuracy.top1,
            **self._interval(accuracy, "float_"),
            "float_top5": accuracy.top5,
            "float_validation_loss": accuracy.loss,
            "float_bytes": self.record.float_bytes,
            "validation_images": accuracy.num_images,
            "num_layers": len(self.record.layer_names),
            "num_weights": sum(self.record.layer_weights),
            **{f"seconds/{_key(name)}": value for name, value in self.record.seconds.items()},
            **{f"forwards/{_key(name)}": value for name, value in self.record.forwards.items()},
            **{f"costs/{_key(name)}_{way}": value for name, cost in self.record.costs.items() for way, value in cost.items()},
        }

    def _interval(self, accuracy: Accuracy, prefix: str = "") -> dict[str, float | None]:
        """Ends of top-1's confidence interval and, of a part of ImageNet, on how many images it was counted."""
        name, (low, high) = f"{prefix}{self.record.top1_name}", accuracy.top1_interval or (None, None)
        count = {f"{name}_images": accuracy.num_images} if self.record.top1_name != "top1" else {}
        return {f"{name}_low": low, f"{name}_high": high, **count}

    def _parent_artifacts(self, client: "MlflowClient", run_id: str) -> None:
        """One upload of a small tree: record, config, matrices, plots. What is not on disk stays pending."""
        with tempfile.TemporaryDirectory(prefix="clado-mlflow-") as name:
            tree = Path(name)
            write_text(tree / "record.json", json.dumps(_redacted(asdict(self.record)), indent=1, default=str))
            write_text(tree / "config.json", json.dumps(_redacted(self.config), indent=1, default=str))
            placed = []
            files = {_artifact_name("matrices", key, path): path for key, path in self.matrices.items()}
            for target, path in {**files, **{f"plots/{path.name}": path for path in self.plots}}.items():
                if path.is_file():
                    (tree / target).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, tree / target)
                    placed.append(target)
            client.log_artifacts(run_id, str(tree))
        self.pending = [name for name in self.pending if name not in placed]

    def _child(self, client: "MlflowClient", parent_id: str, result: Result) -> None:
        tags = {
            "mlflow.parentRunId": parent_id,
            "fingerprint": self.record.fingerprint,
            **{
                name: value
                for name, value in {"solver_status": result.status, "winner": result.winner}.items()
                if value is not None
            },
        }
        accuracy = result.validation
        metrics = {
            "size_bytes": result.size_bytes,
            "average_bits": result.average_bits,
            "loss_predicted": result.loss_predicted,
            "loss_deployed": result.loss_deployed,
            "brier_deployed": result.brier_deployed,
            "agreement_deployed": result.agreement_deployed,
            self.record.top1_name: accuracy.top1 if accuracy else None,
            **(self._interval(accuracy) if accuracy else {}),
            "top5": accuracy.top5 if accuracy else None,
            "validation_loss": accuracy.loss if accuracy else None,
            "validation_images": accuracy.num_images if accuracy else None,
            "solver_objective": result.objective,
            "solver_bound": result.bound,
            "solver_gap": result.gap,
            "solver_seconds": result.seconds,
            "gain": result.gain,
        }
        with self._run(client, f"{result.budget} {result.method}", tags) as run_id:
            of = self._model(client, run_id, parent_id, result)
            corrected = result.assignment.corrected
            self._log(client, run_id, metrics, {"budget": result.budget, "method": result.method, "corrected": corrected}, of)
            client.log_dict(run_id, self.record.assignment_document(result), "assignment.json")
            export = self.exports.get(result.budget)
            if result.method == CHOSEN and export is not None and export.is_dir():
                client.log_artifacts(run_id, str(export), "export")
                self.pending.remove(f"export of {result.budget}")
        self.pending.remove(_child_name(result))
        self.num_children += 1

    def _model(self, client: "MlflowClient", run_id: str, parent_id: str, result: Result) -> dict[str, dict[str, str | None]]:
        """Logs the model of a chosen result, where there is one, and says which metrics are of it and of which images."""
        images: dict[str, str | None] = {}
        if digest := models.digest_of(self.record, VALIDATION):
            client.log_inputs(run_id, models.inputs(self.record, self.config.get("data", NOTHING), [VALIDATION]))
            images = {"dataset_name": VALIDATION, "dataset_digest": digest}
        folder, own = self.models.get(result.budget), dict[str, str | None]()
        if result.method == CHOSEN and folder is not None and folder.is_dir():
            tags = self._model_tags()
            model = models.log_model(client, str(self.experiment_id), [run_id, parent_id], result.budget, folder, tags)
            self.logged.append(model)
            own = {"model_id": model.model_id}
        found = {name: {**own, **images} for name in (self.record.top1_name, "top5", "validation_loss")}
        return found | dict.fromkeys(("size_bytes", "average_bits", "loss_deployed", "brier_deployed", "agreement_deployed"), own)

    def _model_tags(self) -> dict[str, str]:
        return _trim({TAG: self.delivery, "fingerprint": self.record.fingerprint, "network": self.record.network})


def _client(uri: str) -> "MlflowClient":
    """A client of a tracker. Only one process at a time makes a new SQLite file, for MLflow does so without a lock."""
    set_environment()
    from mlflow import MlflowClient
    from mlflow.store.db import utils

    utils.MAX_RETRY_COUNT = SQL_ATTEMPTS  # no setting of MLflow's; its own ten take 102 s where no server listens
    if (file := database_of(uri)) is None:
        return MlflowClient(uri)
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = file.with_name(f"{file.name}.lock")
    with lock.open("w") as held:
        with suppress(ImportError, OSError):  # Windows, and file systems without locks
            import fcntl

            fcntl.flock(held, fcntl.LOCK_EX)
        client = MlflowClient(uri)
    lock.unlink(missing_ok=True)  # whoever still waits for it finds all tables
    return client


def _notes(folder: Path, names: Sequence[str]) -> list[Path]:
    """Notes of a run's folder: of its record first, then of fronts, and of evaluations and fine-tunings, which go below it."""
    return [note for depth in ("", "*/", "*/*/") for name in names for note in sorted(folder.glob(f"{depth}{name}"))]


def _note(attempt: _Attempt, problem: str | None) -> Path | None:
    """Writes what was not delivered, and all that a later attempt needs, beside the record; None where that is impossible."""
    document = {
        "format": FORMAT,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "uri": redact(attempt.uri),
        "experiment": attempt.experiment,
        "problem": problem,
        "parent_run_id": attempt.parent_id,
        "undelivered": attempt.pending,
        "attempts": [*attempt.earlier, {"experiment": attempt.experiment, "delivery": attempt.delivery}],
        "tags": {name: redact(str(value)) for name, value in attempt.tags.items()},
        **attempt.contents(),
        "what_to_do": f"clado sync {shlex.quote(str(attempt.folder))}",
    }
    path = attempt.note
    try:
        write_text(path, json.dumps(document, indent=1, ensure_ascii=False))
    except OSError as error:
        log.debug("no note of what is undelivered: %s", error)
        return None
    return path


def _read_note(path: Path) -> dict[str, Any]:
    """A note that `_note` wrote; StoreError where it is not one."""
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        if note["format"] != FORMAT:
            raise ValueError(f"its format is {note['format']!r}")
        if not all(re.fullmatch("[0-9a-f]{32}", attempt["delivery"]) and attempt["experiment"] for attempt in note["attempts"]):
            raise ValueError("it names an attempt that is none")
        return dict(note)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path} is no note of ours ({_one_line(error)}); expected {FORMAT}. Delete it and run `clado run` on the run's "
            "configuration: nothing is measured twice"
        ) from None


def _noted(path: Path, folder: Path, config: Mapping[str, Any], uri: str) -> _Attempt:
    """The attempt that a note describes, made again from the files beside it."""
    note, record_folder = _read_note(path), path.parent

    def inside(place: str) -> Path:
        found = folder / place
        if not found.resolve().is_relative_to(folder.resolve()):
            raise StoreError(f"{path} names {place}, which is not in {folder}; only a run's own files are delivered")
        return found

    try:
        experiment, tags = note["experiment"], note["tags"]
        if "failure" in note:
            text = (record_folder / FAILURE).read_text(encoding="utf-8")
            return _Failure(folder, config, experiment, uri, tags, record_folder, note["network"], text)
        if "nested" in note:
            return _Nested(
                folder, config, experiment, uri, tags, record_folder,
                name=note["nested"], params=note["params"], metrics=note["metrics"], series=note["series"],
                artifacts=[inside(place) for place in note["artifacts"]],
            )  # fmt: skip
        return _Delivery(
            folder, config, experiment, uri, tags, record_folder,
            record=RunRecord.load(record_folder / RECORD),
            matrices={name: inside(place) for name, place in note["matrices"].items()},
            plots=[inside(place) for place in note["plots"]],
            exports={budget: inside(place) for budget, place in note["exports"].items()},
            models={budget: inside(place) for budget, place in note["models"].items()},
            description=note["description"],
        )  # fmt: skip
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} cannot be followed ({_one_line(error)}); run `clado run` on the run's configuration") from None


def _child_name(result: Result) -> str:
    return f"run of {result.budget} {result.method}"


def _artifact_name(folder: str, name: str, path: Path) -> str:
    return f"{folder}/{_key(name).replace('/', '_')}{path.suffix}"


def _key(name: str) -> str:
    """A name that MLflow takes as a key: letters, digits and _ - . / : and blanks."""
    return re.sub(r"[^\w\-./: ]", "_", name, flags=re.ASCII)


def _trim(tags: Mapping[str, str]) -> dict[str, str]:
    return {_key(name): redact(str(value))[:MAX_TAG] for name, value in tags.items() if value not in (None, "")}


def _flat(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf."""
    for name, value in document.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _redacted(document: Any) -> Any:
    """The same plain data with every string redacted."""
    if isinstance(document, Mapping):
        return {name: _redacted(value) for name, value in document.items()}
    if isinstance(document, list | tuple):
        return [_redacted(value) for value in document]
    return redact(document) if isinstance(document, str) else document


def _one_line(error: BaseException) -> str:
    """Kind and message of an error on one line of bearable length, redacted."""
    text = " ".join(redact(f"{type(error).__name__}: {error}").split())
    return text if len(text) <= 300 else text[:299] + "…"
