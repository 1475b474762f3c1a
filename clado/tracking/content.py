"""The content of a record for MLflow: a parent run, and a nested run for each budget and method."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from clado.records.results import CHOSEN, Result
from clado.records.run_record import RunRecord
from clado.records.text import REPORT, percent, size_text, write_text
from clado.settings.redaction import redact
from clado.tracking import models
from clado.tracking.metrics import child_metrics, curves, own_metric, parent_metrics
from clado.tracking.models import LoggedModel
from clado.tracking.notes import RECORD, UNDELIVERED, UNDELIVERED_FAILURE, file_of
from clado.tracking.sending import NOTHING, TAG, Sender, key, redacted, settings_params, trim

VALIDATION = "validation_set"


@dataclass(frozen=True)
class RecordContent:
    """A finished record and its files."""

    notes: ClassVar = (UNDELIVERED, UNDELIVERED_FAILURE)
    """File names of the note, and of the other notes that this content replaces.

    A finished run replaces an earlier failure.
    """

    folder: Path
    """The run's folder. It holds all files."""
    record: RunRecord
    """The record."""
    config: Mapping[str, Any]
    """The run's settings as plain data."""
    tags: Mapping[str, str]
    """Tags of the parent run."""
    matrices: Mapping[str, Path]
    """File of each interaction matrix, by name."""
    plots: Sequence[Path]
    """Files of pictures."""
    exports: Mapping[str, Path]
    """Folder of each budget's exported network."""
    models: Mapping[str, Path]
    """Folder of each budget's `export_model`."""
    description: str
    """Markdown for the page of the parent run."""

    @classmethod
    def from_note(cls, note: Mapping[str, Any], note_path: Path, folder: Path, config: Mapping[str, Any]) -> "RecordContent":
        """The content that a note describes. The record is in the folder of the note."""
        return cls(
            folder=folder,
            record=RunRecord.load(note_path.with_name(RECORD)),
            config=config,
            tags=note["tags"],
            matrices={name: file_of(note_path, folder, path) for name, path in note["matrices"].items()},
            plots=[file_of(note_path, folder, path) for path in note["plots"]],
            exports={budget: file_of(note_path, folder, path) for budget, path in note["exports"].items()},
            models={budget: file_of(note_path, folder, path) for budget, path in note["models"].items()},
            description=note["description"],
        )

    def note_entries(self) -> dict[str, Any]:
        """Entries of the note. `from_note` reads them."""

        def relative(paths: Mapping[str, Path]) -> dict[str, str]:
            return {name: os.path.relpath(path, self.folder) for name, path in paths.items()}

        return {
            "tags": redacted(self.tags),
            "matrices": relative(self.matrices),
            "plots": [os.path.relpath(path, self.folder) for path in self.plots],
            "exports": relative(self.exports),
            "models": relative(self.models),
            "description": redact(self.description),
        }

    def items(self) -> list[str]:
        """Names of everything that has to arrive."""
        return [
            "parent run",
            *self._artifacts(),
            *(_child_item(result) for result in self.record.results),
            *(f"export of {budget}" for budget in self.exports),
            *(f"model of {budget}" for budget in self.models),
        ]

    def send(self, sender: Sender) -> None:
        """Writes a parent run and one nested run for each result.

        After all have arrived, it registers the models.
        """
        logged = []
        name = f"{self.record.network}, sweep" if "sweep" in self.tags else self.record.network
        with sender.run(name, self._parent_tags(), span=self._span()) as parent_id:
            if self.record.data:
                sender.client.log_inputs(parent_id, models.inputs(self.record, self.config.get("data", NOTHING)))
            sender.log_series(parent_id, curves(self.record, self.record.results))
            sender.log(parent_id, parent_metrics(self.record), settings_params(self.config, self.record.network))
            self._send_artifacts(sender, parent_id)
            sender.progress.pending.remove("parent run")
            for result in self.record.results:
                logged += self._send_child(sender, parent_id, result)
        for model in logged:
            row = self.record.find(model.budget, CHOSEN)
            text = "" if row is None else model_text(self.record, row)
            models.register(sender.client, model, self.record.recorded, self._model_tags(sender), text)
            sender.progress.pending.remove(f"model of {model.budget}")

    def _span(self) -> tuple[int, int] | None:
        """When the run began and ended, in ms since 1970. None if its phases were not timed."""
        if not self.record.seconds or not self.record.recorded:
            return None
        end = datetime.fromisoformat(self.record.recorded).timestamp()
        return int(1000 * (end - sum(self.record.seconds.values()))), int(1000 * end)

    def _parent_tags(self) -> dict[str, str]:
        return {
            "mlflow.source.name": "clado run",
            "mlflow.note.content": self.description,
            **self.tags,
            "fingerprint": self.record.fingerprint,
            "criterion": self.record.criterion,
            "notes": "; ".join(self.record.notes),
        }

    def _model_tags(self, sender: Sender) -> dict[str, str]:
        return trim({TAG: sender.delivery, "fingerprint": self.record.fingerprint, "network": self.record.network})

    def _artifacts(self) -> dict[str, Path]:
        """File of each matrix and picture, by its name among the artifacts."""
        matrices = {f"matrices/{key(name).replace('/', '_')}{path.suffix}": path for name, path in self.matrices.items()}
        return {**matrices, **{f"plots/{path.name}": path for path in self.plots}}

    def _send_artifacts(self, sender: Sender, run_id: str) -> None:
        """Uploads record, settings, report, matrices and plots at once.

        Files that do not exist stay pending.
        """
        with tempfile.TemporaryDirectory(prefix="clado-mlflow-") as name:
            tree = Path(name)
            write_text(tree / "record.json", json.dumps(redacted(asdict(self.record)), indent=1, default=str))
            write_text(tree / "config.json", json.dumps(redacted(self.config), indent=1, default=str))
            files = {target: path for target, path in self._artifacts().items() if path.is_file()}
            report = {REPORT: self.folder / REPORT} if (self.folder / REPORT).is_file() else {}
            for target, path in (files | report).items():
                (tree / target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, tree / target)
            sender.client.log_artifacts(run_id, str(tree))
        sender.progress.pending[:] = [item for item in sender.progress.pending if item not in files]

    def _send_child(self, sender: Sender, parent_id: str, result: Result) -> list[LoggedModel]:
        """Writes the nested run of a result, and returns its model if it has one."""
        tags = {
            "mlflow.parentRunId": parent_id,
            "fingerprint": self.record.fingerprint,
            "solver_status": result.status or "",
            "winner": result.winner or "",
        }
        params = {"budget": result.budget, "method": result.method, "corrected": result.assignment.corrected}
        with sender.run(f"{result.budget} {result.method}", tags) as run_id:
            if VALIDATION in self.record.data:
                data = self.config.get("data", NOTHING)
                sender.client.log_inputs(run_id, models.inputs(self.record, data, [VALIDATION]))
            logged = self._send_model(sender, [run_id, parent_id], result)
            sender.log(run_id, child_metrics(self.record, result), params, subjects(self.record, logged))
            sender.client.log_dict(run_id, self.record.assignment_document(result), "assignment.json")
            export = self.exports.get(result.budget)
            if result.method == CHOSEN and export is not None and export.is_dir():
                sender.client.log_artifacts(run_id, str(export), "export")
                sender.progress.pending.remove(f"export of {result.budget}")
        sender.progress.pending.remove(_child_item(result))
        sender.progress.num_children += 1
        return logged

    def _send_model(self, sender: Sender, run_ids: Sequence[str], result: Result) -> list[LoggedModel]:
        """Logs the model of a chosen result, if there is one."""
        folder = self.models.get(result.budget)
        if result.method != CHOSEN or folder is None or not folder.is_dir():
            return []
        tags = self._model_tags(sender)
        return [models.log_model(sender.client, sender.experiment_id, run_ids, result.budget, folder, tags)]


def model_text(record: RunRecord, row: Result) -> str:
    """The description of a registered model: bits, size and accuracy, with those of the float network."""
    text = f"{row.average_bits:.3f} bits a weight, {size_text(record.float_bytes)} → {size_text(row.size_bytes)}"
    if row.validation is None or row.validation.top1 is None:
        return text
    before = percent(record.float_accuracy.top1)
    return f"{text}, {record.top1_title} {before} → {percent(row.validation.top1)} % on {row.validation.num_images:,} images"


def _child_item(result: Result) -> str:
    return f"run of {result.budget} {result.method}"


def subjects(record: RunRecord, logged: Sequence[LoggedModel]) -> dict[str, dict[str, str | None]]:
    """The model and the dataset that each metric of a nested run belongs to.

    Args:
        record: The record. It names the validation set.
        logged: The model of the run, or nothing.
    """
    digest = models.digest_of(record, VALIDATION)
    dataset = {"dataset_name": VALIDATION, "dataset_digest": digest} if digest else {}
    model: dict[str, str | None] = {"model_id": logged[0].model_id} if logged else {}
    accuracy = (record.top1_name, "top5", "validation_loss", *own_metric(record.float_accuracy))
    choice = ("size_bytes", "average_bits", "loss_deployed", "brier_deployed", "agreement_deployed")
    return {name: {**model, **dataset} for name in accuracy} | dict.fromkeys(choice, model)
