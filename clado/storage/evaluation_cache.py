"""Evaluations on disk, one small file each.

An assignment is evaluated once, even if several methods or budgets share it.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from clado.evaluation import Counts
from clado.records.text import write_text
from clado.space import Assignment

Batch = tuple[int, int]
"""An evaluation batch: the first image, and the image after the last."""


class EvaluationCache:
    """Counts by assignment on one data slice: a folder of JSON files, each written whole.

    `identity` names the slice and the network. The counts of evaluation batches are kept, a file each,
    until the whole slice is evaluated. An evaluation that was killed continues with the other batches.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        self.identity = identity

    def _file(self, assignment: Assignment) -> Path:
        return self.folder / f"{self.identity[:12]}-{assignment.key}.json"

    def _batch_file(self, batch: Batch) -> Path:
        return self.folder / "parts" / f"{self.identity[:12]}-{batch[0]}-{batch[1]}.json"

    def get(self, assignment: Assignment) -> Counts | None:
        """The counts of an assignment; None if it is not evaluated yet, or its file cannot be read."""
        try:
            document = json.loads(self._file(assignment).read_text(encoding="utf-8"))
            key = document["bits"], document["activation_bits"], document["identity"]
            expected = list(assignment.bits), list(assignment.activation_bits), self.identity
            return Counts(**document["counts"]) if key == expected else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, assignment: Assignment, counts: Counts) -> None:
        """Keeps the counts of an assignment."""
        document = {
            "identity": self.identity,
            "bits": assignment.bits,
            "activation_bits": assignment.activation_bits,
            "counts": asdict(counts),
        }
        write_text(self._file(assignment), json.dumps(document))

    def get_batch(self, batch: Batch) -> dict[str, Counts]:
        """The counts of an evaluation batch, by `Assignment.key`; empty if its file is absent or cannot be read."""
        return _read_batch(self._batch_file(batch), self.identity)

    def put_batch(self, batch: Batch, counts: Mapping[str, Counts]) -> None:
        """Keeps the counts of an evaluation batch, by `Assignment.key`. They replace earlier ones."""
        document = {"identity": self.identity, "counts": {key: asdict(one) for key, one in counts.items()}}
        write_text(self._batch_file(batch), json.dumps(document))

    def forget_batches(self, assignments: Iterable[Assignment]) -> None:
        """Removes the counts of evaluation batches of assignments whose whole slice is evaluated."""
        keys = {assignment.key for assignment in assignments}
        for file in self.folder.glob(f"parts/{self.identity[:12]}-*.json"):
            others = {key: counts for key, counts in _read_batch(file, self.identity).items() if key not in keys}
            if others:
                start, stop = file.stem.rsplit("-", 2)[1:]
                self.put_batch((int(start), int(stop)), others)
            else:
                file.unlink(missing_ok=True)

    def read_or_measure(
        self,
        assignments: Iterable[Assignment],
        measure: Callable[[Sequence[Assignment]], Iterable[tuple[Assignment, Counts]]],
        done: Callable[[Assignment], None] = lambda assignment: None,
    ) -> dict[Assignment, Counts]:
        """Counts of each distinct assignment: read if they are known, else measured and kept.

        Args:
            assignments: What to count.
            measure: Counts missing assignments, in any order. Each result is kept immediately.
            done: Called with each assignment as soon as its counts are known.

        Returns:
            Counts by assignment, in the order of the assignments.
        """
        counts = {assignment: self.get(assignment) for assignment in dict.fromkeys(assignments)}
        absent = [assignment for assignment, known in counts.items() if known is None]
        for assignment in counts.keys() - set(absent):
            done(assignment)
        for assignment, measured in measure(absent):
            self.put(assignment, measured)
            counts[assignment] = measured
            done(assignment)
        return {assignment: known for assignment, known in counts.items() if known is not None}


def _read_batch(file: Path, identity: str) -> dict[str, Counts]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        return {key: Counts(**counts) for key, counts in document["counts"].items()} if document["identity"] == identity else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
