"""One attempt to send a content to MLflow.

A note is in the run's folder while anything is missing.
"""

import json
import logging
import shlex
import time
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from clado.errors import StoreError
from clado.records.results import Receipt
from clado.records.text import write_text
from clado.settings.redaction import redact
from clado.tracking import models
from clado.tracking.content import RecordContent
from clado.tracking.notes import DELIVERED, FORMAT, one_line, read_note
from clado.tracking.sending import TAG, Progress, Sender
from clado.tracking.single_runs import FailureContent, NestedContent
from clado.tracking.stores import connect, experiment_id

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

Content = RecordContent | FailureContent | NestedContent


@dataclass
class Attempt:
    """One attempt to send a content to a tracker."""

    folder: Path
    """The run's folder."""
    record_folder: Path
    """Folder of the note."""
    experiment: str
    """Name of the experiment."""
    uri: str
    """URI of the tracker."""
    content: Content
    """What is sent."""
    experiment_id: str | None = field(default=None, init=False)
    """MLflow's id of the experiment, once it is known."""
    delivery: str = field(init=False)
    """Name of the delivery."""
    earlier: list[dict[str, str]] = field(default_factory=list, init=False)
    """`experiment` and `delivery` of earlier attempts. What they left in MLflow is replaced."""
    progress: Progress = field(init=False)
    """The progress of the attempt."""

    def __post_init__(self) -> None:
        self.delivery = self.content.delivery if isinstance(self.content, NestedContent) else uuid.uuid4().hex
        self.progress = Progress(self.content.items())

    @property
    def notes(self) -> list[Path]:
        """The note of this attempt, followed by the notes that it replaces."""
        return [self.record_folder / name for name in self.content.notes]

    def supersede(self) -> None:
        """Reads the earlier attempts from the notes.

        A content with a fixed name also replaces itself.
        """
        if isinstance(self.content, NestedContent):
            self.earlier = [{"experiment": self.experiment, "delivery": self.delivery}]
        for note in self.notes:
            try:
                attempts = read_note(note)["attempts"] if note.exists() else []
            except StoreError as fault:  # it will be overwritten
                log.debug("%s", fault)
            else:
                self.earlier += [attempt for attempt in attempts if attempt not in self.earlier]

    def write_note(self, problem: str | None) -> Path | None:
        """Writes the note: what has not arrived, and all that a later attempt needs.

        Returns:
            The note. None if the disk takes no file.
        """
        document = {
            "format": FORMAT,
            "when": datetime.now(UTC).isoformat(timespec="seconds"),
            "uri": redact(self.uri),
            "experiment": self.experiment,
            "problem": problem,
            "parent_run_id": self.progress.parent_id,
            "undelivered": self.progress.pending,
            "attempts": [*self.earlier, {"experiment": self.experiment, "delivery": self.delivery}],
            **self.content.note_entries(),
            "what_to_do": f"clado sync {shlex.quote(str(self.folder))}",
        }
        try:
            write_text(self.notes[0], json.dumps(document, indent=1, ensure_ascii=False))
        except OSError as error:
            log.debug("no note of what is undelivered: %s", error)
            return None
        return self.notes[0]


def _remove(client: "MlflowClient", experiment: str, delivery: str) -> None:
    """Ends and deletes the runs and models of a delivery that did not arrive whole."""
    entity = client.get_experiment_by_name(experiment)
    while entity is not None:
        runs = client.search_runs([entity.experiment_id], f"tags.{TAG} = '{delivery}'", max_results=1000)
        for run in runs:
            if run.info.status == "RUNNING":
                client.set_terminated(run.info.run_id, "FAILED")
            client.delete_run(run.info.run_id)
        if not runs:
            models.remove(client, entity.experiment_id, TAG, delivery)
            return


def send(attempt: Attempt) -> Receipt:
    """Sends an attempt. A note is on disk for as long as anything is missing."""
    start = time.monotonic()
    attempt.supersede()
    note, *others = attempt.notes
    if attempt.write_note("sending was interrupted") is not None:  # the note's reason if this process is killed
        for other in others:
            other.unlink(missing_ok=True)  # this note has its attempts
    problem = spool = None
    try:
        client = connect(attempt.uri)
        for earlier in attempt.earlier:
            _remove(client, earlier["experiment"], earlier["delivery"])
        attempt.experiment_id = experiment_id(client, attempt.uri, attempt.experiment)
        attempt.content.send(Sender(client, attempt.experiment_id, attempt.delivery, attempt.progress))
        if attempt.progress.pending:
            problem = f"not found: {', '.join(attempt.progress.pending)}"
    except Exception as fault:  # a tracker, its driver or its server may raise anything; the run must continue
        problem = one_line(fault)
    if problem is not None:
        spool = attempt.write_note(problem)
    elif isinstance(attempt.content, FailureContent):
        note.unlink(missing_ok=True)
    elif attempt.write_note(None) is not None:
        note.replace(note.with_name(DELIVERED))
    return Receipt(
        uri=redact(attempt.uri),
        experiment=attempt.experiment,
        experiment_id=attempt.experiment_id,
        parent_run_id=attempt.progress.parent_id,
        num_children=attempt.progress.num_children,
        delivered=problem is None,
        seconds=time.monotonic() - start,
        problem=problem,
        spool=spool,
    )
