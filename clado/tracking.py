"""The only module that imports mlflow. A finished run becomes a parent run with one nested child for each budget and method.

The run's folder is the truth and MLflow a mirror of it. A tracker that is down, slow or wrong costs a warning and a note
beside the record (`mlflow-undelivered.json`), never a result. MLflow is imported inside functions: it takes seconds.
"""

import json
import logging
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from clado.records import CHOSEN, Result, RunRecord, write_text

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

DATABASE, ARTIFACTS, UNDELIVERED = "mlflow.db", "mlflow-artifacts", "mlflow-undelivered.json"
MAX_PARAM, MAX_TAG, MAX_BATCH = 500, 5000, 90  # below the limits of every MLflow 2 and 3 server
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Receipt:
    """What became of a record: where it is, or why it is not there. All texts are redacted and fit to print."""

    uri: str
    experiment: str
    experiment_id: str | None
    parent_run_id: str | None
    num_children: int
    delivered: bool
    seconds: float
    problem: str | None = None
    spool: Path | None = None

    @property
    def how_to_open(self) -> str:
        """The address of the run's page, or the command that serves it."""
        if self.uri.startswith(("http://", "https://")):
            page = f"/#/experiments/{self.experiment_id}/runs/{self.parent_run_id}" if self.parent_run_id else ""
            return self.uri.rstrip("/") + page
        beside = Path(sys.executable).with_name("mlflow")
        command = shlex.quote(str(beside)) if shutil.which("mlflow") is None and beside.exists() else "mlflow"
        return f"MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=true {command} ui --backend-store-uri {shlex.quote(self.uri)}"


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


_USER = re.compile(r"(?<=://)(?:[^/\s:@]*:\S*|[^/\s:@]+)@")
_SECRET = re.compile(r"([?&][^=&\s]*(?:pass|pwd|token|secret|key|sig|credential|auth)[^=&\s]*=)[^&\s]+", re.IGNORECASE)


def redact(text: str) -> str:
    """The text with the user, the password and the secret query values of any URI in it replaced by ***."""
    return _SECRET.sub(r"\1***", _USER.sub("***@", text))


def default_uri(folder: Path) -> str:
    """SQLite in the run's folder."""
    return f"sqlite:///{(folder.resolve() / DATABASE).as_posix()}"


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
    description: str = "",
) -> Receipt:
    """Writes a finished record to MLflow and says where it is; twice is allowed and makes a second parent run.

    `config` is plain data, flattened into parameters; `tags` are provenance (versions, device); `matrices` maps a name to a
    saved file; `exports` maps a budget to the folder that belongs to its chosen assignment; `description` is Markdown for the
    run's page. A fault of the tracker is logged as a warning and noted in `folder`; nothing is raised for it.
    """
    start = time.monotonic()
    uri = uri or default_uri(folder)
    delivery = _Delivery(record, folder, config, experiment, uri, tags, matrices, plots, exports, description)
    error: Exception | None = None
    try:
        delivery.send()
    except Exception as fault:  # whatever a tracker, its driver or its server may raise: the science goes on
        error = fault
    problem = spool = None
    if error is not None or delivery.pending:
        problem = _one_line(error) if error is not None else f"not found: {', '.join(delivery.pending)}"
        spool = _note(delivery, problem)
        log.warning(
            "MLflow at %s did not take the whole record (%s). The results are safe in %s; what is missing is listed in %s. "
            "When the tracker is well, run the same command again: nothing is measured twice.",
            redact(delivery.uri), problem, folder, spool or "no file, for that could not be written either",
        )  # fmt: skip
    else:
        (folder / UNDELIVERED).unlink(missing_ok=True)
    return Receipt(
        uri=redact(delivery.uri),
        experiment=experiment,
        experiment_id=delivery.experiment_id,
        parent_run_id=delivery.parent_id,
        num_children=delivery.num_children,
        delivered=problem is None,
        seconds=time.monotonic() - start,
        problem=problem,
        spool=spool,
    )


@dataclass
class _Delivery:
    """One attempt. `pending` names what has not arrived, so that whatever stops the attempt, the note is right."""

    record: RunRecord
    folder: Path
    config: Mapping[str, Any]
    experiment: str
    uri: str
    tags: Mapping[str, str]
    matrices: Mapping[str, Path]
    plots: Sequence[Path]
    exports: Mapping[str, Path]
    description: str
    experiment_id: str | None = None
    parent_id: str | None = None
    num_children: int = 0
    pending: list[str] = field(default_factory=list)
    left_open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.pending = ["parent run"]
        self.pending += [_artifact_name("matrices", name, path) for name, path in self.matrices.items()]
        self.pending += [f"plots/{path.name}" for path in self.plots]
        self.pending += [_child_name(result) for result in self.record.results]
        self.pending += [f"export of {budget}" for budget in self.exports]

    def send(self) -> None:
        set_environment()
        from mlflow import MlflowClient

        client = MlflowClient(self.uri)
        self._close_earlier(client)
        self.experiment_id = self._experiment(client)
        with self._run(client, self.record.network, self._parent_tags()) as parent_id:
            self.parent_id = parent_id
            self._log(client, parent_id, metrics=self._parent_metrics(), params=self._params())
            self._parent_artifacts(client, parent_id)
            self.pending.remove("parent run")
            for result in self.record.results:
                self._child(client, parent_id, result)

    def _close_earlier(self, client: "MlflowClient") -> None:
        """Ends the runs that an earlier attempt could not close, for its server had gone."""
        path = self.folder / UNDELIVERED
        note = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for run_id in note.get("runs_left_open", []) if note.get("uri") == redact(self.uri) else []:
            try:
                client.set_terminated(run_id, "FAILED")
            except Exception as fault:  # deleted since, or the server is another one or away again
                log.debug("run %s could not be closed: %s", run_id, _one_line(fault))

    def _experiment(self, client: "MlflowClient") -> str:
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                return client.create_experiment(self.experiment, self._artifact_location())
            except Exception:
                found = client.get_experiment_by_name(self.experiment)  # another run may have made it in the meantime
                if found is None:
                    raise
        return str(found.experiment_id)

    def _artifact_location(self) -> str | None:
        """Beside an SQLite file, for MLflow's own default is the working directory; a server knows its own place."""
        if not self.uri.startswith("sqlite:///"):
            return None
        location = Path(self.uri.removeprefix("sqlite:///")).resolve().parent / ARTIFACTS
        location.mkdir(parents=True, exist_ok=True)
        return location.as_uri()

    @contextmanager
    def _run(self, client: "MlflowClient", name: str, tags: Mapping[str, str]) -> Iterator[str]:
        """An MLflow run that ends as FINISHED, or as FAILED where the block raises; noted as left open where even that fails."""
        run_id = str(client.create_run(self.experiment_id or "0", tags=_trim(tags), run_name=name).info.run_id)
        self.left_open.append(run_id)
        try:
            yield run_id
        except BaseException:
            try:
                client.set_terminated(run_id, "FAILED")
                self.left_open.remove(run_id)
            except Exception as fault:  # the first fault is the one to report
                log.debug("run %s stays open: %s", run_id, _one_line(fault))
            raise
        client.set_terminated(run_id, "FINISHED")
        self.left_open.remove(run_id)

    def _parent_tags(self) -> dict[str, str]:
        return {
            "mlflow.source.name": "clado run",
            "mlflow.note.content": self.description,
            **self.tags,
            "fingerprint": self.record.fingerprint,
            "criterion": self.record.criterion,
            "notes": "; ".join(self.record.notes),
        }

    def _params(self) -> dict[str, str]:
        settings = {name: value for name, value in _flat(self.config) if value is not None}
        return {**{name: redact(str(value)) for name, value in settings.items()}, "network": self.record.network}

    def _parent_metrics(self) -> dict[str, float | None]:
        accuracy = self.record.float_accuracy
        return {
            "baseline": self.record.baseline,
            "float_top1": accuracy.top1,
            "float_top5": accuracy.top5,
            "float_validation_loss": accuracy.loss,
            "float_bytes": self.record.float_bytes,
            "validation_images": accuracy.num_images,
            "num_layers": len(self.record.layer_names),
            "num_weights": sum(self.record.layer_weights),
            **{f"seconds/{_key(name)}": value for name, value in self.record.seconds.items()},
            **{f"forwards/{_key(name)}": value for name, value in self.record.forwards.items()},
        }

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
            "loss_shipped": result.loss_shipped,
            "top1": accuracy.top1 if accuracy else None,
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
            self._log(client, run_id, metrics, {"budget": result.budget, "method": result.method})
            client.log_dict(run_id, self.record.assignment_document(result), "assignment.json")
            export = self.exports.get(result.budget)
            if result.method == CHOSEN and export is not None and export.is_dir():
                client.log_artifacts(run_id, str(export), "export")
                self.pending.remove(f"export of {result.budget}")
        self.pending.remove(_child_name(result))
        self.num_children += 1

    @staticmethod
    def _log(client: "MlflowClient", run_id: str, metrics: Mapping[str, float | None], params: Mapping[str, str]) -> None:
        """In batches. MLflow stores an infinity as 1.8e308, so what is not finite (a gap without a bound) becomes a tag."""
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        known = {name: float(value) for name, value in metrics.items() if value is not None}
        numbers = [Metric(name, value, now, 0) for name, value in known.items() if math.isfinite(value)]
        others = [RunTag(name, str(value)) for name, value in known.items() if not math.isfinite(value)]
        settings = [Param(_key(name), value[:MAX_PARAM]) for name, value in params.items()]
        client.log_batch(run_id, metrics=numbers, params=settings[:MAX_BATCH], tags=others)
        for first in range(MAX_BATCH, len(settings), MAX_BATCH):
            client.log_batch(run_id, params=settings[first : first + MAX_BATCH])


def _note(delivery: _Delivery, problem: str) -> Path | None:
    """Writes what was not delivered beside the record; None where even that is impossible."""
    document = {
        "format": "clado-undelivered/1",
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "uri": redact(delivery.uri),
        "experiment": delivery.experiment,
        "problem": problem,
        "parent_run_id": delivery.parent_id,
        "runs_left_open": delivery.left_open,
        "undelivered": delivery.pending,
        "what_to_do": "run the same `clado run` again when the tracker is well; nothing is measured twice",
    }
    path = delivery.folder / UNDELIVERED
    try:
        write_text(path, json.dumps(document, indent=1, ensure_ascii=False))
    except OSError as error:
        log.debug("no note of what is undelivered: %s", error)
        return None
    return path


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
