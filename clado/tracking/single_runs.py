"""Contents that become one MLflow run: a failure, and a nested run such as a fine-tuning."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from clado.errors import ServerError
from clado.records.run_record import RunRecord
from clado.settings.identity import fingerprint
from clado.tracking.notes import FAILURE, RECORD, UNDELIVERED, UNDELIVERED_FAILURE, file_of
from clado.tracking.sending import Sender, redacted, settings_params


@dataclass(frozen=True)
class FailureContent:
    """A run that ended with an error. It becomes one FAILED MLflow run with the traceback."""

    notes: ClassVar = (UNDELIVERED_FAILURE,)
    """File name of the note."""

    config: Mapping[str, Any]
    """The run's settings as plain data."""
    tags: Mapping[str, str]
    """Tags of the MLflow run."""
    network: str
    """Name of the network."""
    traceback: str
    """The traceback, redacted."""

    @classmethod
    def from_note(cls, note: Mapping[str, Any], note_path: Path, config: Mapping[str, Any]) -> "FailureContent":
        """The content that a note describes. The traceback is in the folder of the note."""
        return cls(config, note["tags"], note["network"], note_path.with_name(FAILURE).read_text(encoding="utf-8"))

    def note_entries(self) -> dict[str, Any]:
        """Entries of the note. `from_note` reads them."""
        return {"tags": redacted(self.tags), "failure": FAILURE, "network": self.network}

    def items(self) -> list[str]:
        """The name of the one run."""
        return ["failed run"]

    def send(self, sender: Sender) -> None:
        """Writes the run."""
        tags = {"mlflow.source.name": "clado run", **self.tags}
        with sender.run(self.network, tags, status="FAILED") as run_id:
            sender.log(run_id, {}, settings_params(self.config, self.network))
            sender.client.log_text(run_id, self.traceback, FAILURE)
        sender.progress.pending.clear()


@dataclass(frozen=True)
class NestedContent:
    """One run nested under the latest parent run of a run's folder."""

    notes: ClassVar = (UNDELIVERED,)
    """File name of the note."""

    folder: Path
    """The run's folder. It holds all files."""
    name: str
    """Name of the nested run."""
    params: Mapping[str, str]
    """Value of each parameter."""
    metrics: Mapping[str, float | None]
    """Value of each metric."""
    series: Mapping[str, Sequence[tuple[int, float]]]
    """(step, value) of each metric over steps."""
    artifacts: Sequence[Path]
    """Files."""

    @classmethod
    def from_note(cls, note: Mapping[str, Any], note_path: Path, folder: Path) -> "NestedContent":
        """The content that a note describes."""
        artifacts = [file_of(note_path, folder, path) for path in note["artifacts"]]
        return cls(folder, note["nested"], note["params"], note["metrics"], note["series"], artifacts)

    def note_entries(self) -> dict[str, Any]:
        """Entries of the note. `from_note` reads them."""
        return {
            "nested": self.name,
            "params": redacted(self.params),
            "metrics": dict(self.metrics),
            "series": dict(self.series),
            "artifacts": [os.path.relpath(path, self.folder) for path in self.artifacts],
        }

    @property
    def delivery(self) -> str:
        """Name of the delivery.

        The same content has the same name, so that it replaces what was sent before.
        """
        return fingerprint([self.folder.name, json.dumps(self.note_entries())])[:32]

    def items(self) -> list[str]:
        """The name of the one run."""
        return [self.name]

    def send(self, sender: Sender) -> None:
        """Writes the run. Without a parent run in MLflow, it stands alone.

        Raises:
            ServerError: The run of the folder is not delivered yet.
        """
        if (self.folder / UNDELIVERED).exists():
            raise ServerError("the run that it belongs to is not delivered yet")
        identity = RunRecord.load(self.folder / RECORD).fingerprint
        query = f"tags.fingerprint = '{identity}' and tags.mlflow.source.name = 'clado run' and attributes.status = 'FINISHED'"
        runs = sender.client.search_runs([sender.experiment_id], query)  # also the runs of `clado sweep`
        parents = [run.info.run_id for run in runs if "sweep" not in run.data.tags]
        tags = {"fingerprint": identity, "mlflow.parentRunId": parents[0] if parents else ""}
        with sender.run(self.name, tags) as run_id:
            sender.log(run_id, self.metrics, redacted(self.params))
            sender.log_series(run_id, self.series)
            for path in self.artifacts:
                sender.client.log_artifact(run_id, str(path))
        sender.progress.pending.clear()
