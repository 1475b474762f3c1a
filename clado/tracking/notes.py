"""Notes in a run's folder: they list what has been delivered to MLflow, and what has not.

A note has everything that a later attempt needs, so that `clado sync` needs only the folder.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clado.errors import StoreError
from clado.records.results import Receipt
from clado.settings.redaction import redact

UNDELIVERED, DELIVERED = "mlflow-undelivered.json", "mlflow-delivered.json"
UNDELIVERED_FAILURE = "mlflow-undelivered-failure.json"
"""Note of a failure. It has its own name, so that it never replaces the note of a finished run."""
RECORD, FAILURE = "record.json", "failure.txt"
"""Files next to a note: the record of a run, and the traceback of a failure."""
FORMAT = "clado-undelivered/2"


def note_paths(folder: Path, names: Sequence[str]) -> list[Path]:
    """Notes of a run's folder. The order is record, sweeps, evaluations and fine-tunings."""
    return [note for depth in ("", "*/", "*/*/") for name in names for note in sorted(folder.glob(f"{depth}{name}"))]


def read_note(path: Path) -> dict[str, Any]:
    """Reads a note.

    Raises:
        StoreError: The file is not a note of this format.
    """
    try:
        note = json.loads(path.read_text(encoding="utf-8"))
        if note["format"] != FORMAT:
            raise ValueError(f"its format is {note['format']!r}")
        if not all(re.fullmatch("[0-9a-f]{32}", attempt["delivery"]) and attempt["experiment"] for attempt in note["attempts"]):
            raise ValueError("it names an attempt of a wrong form")
        return dict(note)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{path} is not a note of clado ({one_line(error)}); expected {FORMAT}. Delete it and run `clado run` on the run's "
            "configuration: nothing is measured twice"
        ) from None


def last_receipt(folder: Path) -> Receipt | None:
    """Where a run's record is in MLflow, from its notes. None if nothing was ever sent, or if a note cannot be read."""
    for name in (UNDELIVERED, DELIVERED):
        if (folder / name).is_file():
            try:
                note = read_note(folder / name)
            except StoreError:
                return None
            return Receipt(
                uri=redact(note["uri"]),
                experiment=note["experiment"],
                experiment_id=None,
                parent_run_id=note["parent_run_id"],
                num_children=0,
                delivered=name == DELIVERED,
                seconds=0.0,
                problem=note["problem"],
            )
    return None


def file_of(note_path: Path, folder: Path, name: str) -> Path:
    """The file of a run's folder that a note names by its relative path.

    Raises:
        StoreError: The file is outside of the folder.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise StoreError(f"{note_path} names {name}, which is not in {folder}; only a run's own files are delivered")
    return path


def one_line(error: BaseException) -> str:
    """Class and message of an error on one line of at most 300 characters, without credentials."""
    text = " ".join(redact(f"{type(error).__name__}: {error}").split())
    return text if len(text) <= 300 else text[:299] + "…"
