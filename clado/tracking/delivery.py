"""Delivers records, failures and nested runs to MLflow.

The run's folder holds the results, and MLflow is a mirror of it. Before anything is sent, a note is
written next to the record (`mlflow-undelivered.json`). So a tracker that is down or slow, or a
killed process, costs a warning and never a result. When all has arrived, the note becomes
`mlflow-delivered.json`.

`deliver` sends everything that the present tracker does not have. Every MLflow run has the name of
its delivery as a tag. With this tag, the next attempt finds the runs of an earlier attempt, ends
them and deletes them. So nothing is in MLflow twice.
"""

import logging
import shlex
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clado.errors import ServerError, StoreError
from clado.records.results import Receipt
from clado.records.run_record import RunRecord
from clado.records.text import write_text
from clado.settings.redaction import redact
from clado.tracking.attempts import Attempt, Content, send
from clado.tracking.content import RecordContent
from clado.tracking.notes import DELIVERED, FAILURE, UNDELIVERED, UNDELIVERED_FAILURE, note_paths, one_line, read_note
from clado.tracking.sending import NOTHING
from clado.tracking.single_runs import FailureContent, NestedContent
from clado.tracking.stores import connect, destination

log = logging.getLogger(__name__)


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
    """Writes a finished record to MLflow. The same record again becomes a second parent run.

    A fault of the tracker is logged as a warning and written to the note. It raises nothing.

    Args:
        record: The record.
        folder: The run's folder.
        config: The run's settings as plain data. They become parameters with dotted names.
        experiment: Name of the experiment.
        uri: URI of the tracker. See `stores.destination`.
        tags: Provenance, such as versions and the device.
        matrices: File of each interaction matrix, by name.
        plots: Files of pictures.
        exports: Folder of the exported network of each budget's chosen assignment.
        models: Folder of `export_model` for each budget. It is logged and registered.
        description: Markdown for the run's page.
        record_folder: Folder of the record's file, if that is not `folder`.

    Returns:
        Where the record is in MLflow, or why it is not there.
    """
    content = RecordContent(folder, record, config, tags, matrices, plots, exports, models, description)
    return _warned(Attempt(folder, record_folder or folder, experiment, destination(uri), content))


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
    """Writes a run that ended with an error as a FAILED MLflow run with its traceback.

    The redacted traceback is also kept as `failure.txt` in the run's folder. Nothing is raised,
    because the caller has to raise the error itself.

    Args:
        error: The error.
        folder: The run's folder.
        config: The run's settings as plain data.
        network: Name of the network.
        experiment: Name of the experiment.
        uri: URI of the tracker. See `stores.destination`.
        tags: Provenance.

    Returns:
        Where the failure is in MLflow, or why it is not there.
    """
    text = redact("".join(traceback.format_exception(error)))
    try:
        write_text(folder / FAILURE, text)
    except OSError as fault:  # the disk itself may have failed
        log.debug("no %s: %s", FAILURE, fault)
    content = FailureContent(config, {**tags, "error": one_line(error)}, network, text)
    return _warned(Attempt(folder, folder, experiment, destination(uri), content))


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
    """Writes one run, such as a fine-tuning, nested under the latest parent run of a run's folder.

    The same content again replaces the first one. A fault of the tracker is a warning, as in
    `track`.

    Args:
        folder: The run's folder.
        name: Name of the nested run.
        record_folder: Folder within `folder` that belongs to this nested run alone. It gets the
            note.
        experiment: Name of the experiment.
        uri: URI of the tracker. See `stores.destination`.
        params: Value of each parameter.
        metrics: Value of each metric.
        series: (step, value) of each metric over steps.
        artifacts: Files in `record_folder`.

    Returns:
        Where the nested run is in MLflow, or why it is not there.
    """
    content = NestedContent(folder, name, params, metrics, series, artifacts)
    return _warned(Attempt(folder, record_folder, experiment, destination(uri), content))


def deliver(folder: Path, config: Mapping[str, Any], uri: str | None = None) -> list[Receipt]:
    """Sends what the notes in a run's folder name. What the tracker already has is not sent again.

    Args:
        folder: The run's folder. Nothing else is read.
        config: The run's settings as plain data.
        uri: URI of the tracker. See `stores.destination`.

    Returns:
        One receipt for each note.

    Raises:
        StoreError: A note or its record cannot be read. Nothing is sent then.
        ServerError: The tracker does not answer.
    """
    target = destination(uri)
    for note in note_paths(folder, [DELIVERED]):
        undelivered = note.with_name(UNDELIVERED)
        if not undelivered.exists() and not _arrived(note, target):
            note.replace(undelivered)
    notes = note_paths(folder, [UNDELIVERED, UNDELIVERED_FAILURE])
    return [send(attempt) for attempt in [_attempt_of(note, folder, config, target) for note in notes]]


def _arrived(note: Path, uri: str) -> bool:
    """Whether a tracker has what a note says was delivered to it.

    A run that a user deleted in MLflow counts as arrived.
    """
    document = read_note(note)
    if document.get("uri") != redact(uri):
        return False
    try:
        connect(uri).get_run(str(document.get("parent_run_id")))
    except Exception as error:
        if getattr(error, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise ServerError(f"MLflow at {redact(uri)} does not answer ({one_line(error)})") from None
    return True


def _attempt_of(path: Path, folder: Path, config: Mapping[str, Any], uri: str) -> Attempt:
    """The attempt that a note describes."""
    note = read_note(path)
    content: Content
    try:
        if "failure" in note:
            content = FailureContent.from_note(note, path, config)
        elif "nested" in note:
            content = NestedContent.from_note(note, path, folder)
        else:
            content = RecordContent.from_note(note, path, folder, config)
        return Attempt(folder, path.parent, note["experiment"], uri, content)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} cannot be read ({one_line(error)}); run `clado run` on the run's configuration") from None


def _warned(attempt: Attempt) -> Receipt:
    """Sends an attempt, and warns if something did not arrive."""
    receipt = send(attempt)
    if not receipt.delivered:
        log.warning(
            "MLflow at %s did not take the whole record (%s). The results are safe in %s; what is missing is listed in %s. "
            "When the tracker is well: clado sync %s",
            receipt.uri, receipt.problem, attempt.folder, receipt.spool or "no file, because it could not be written either",
            shlex.quote(str(attempt.folder)),
        )  # fmt: skip
    return receipt
