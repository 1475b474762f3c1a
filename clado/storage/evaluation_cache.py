"""Evaluations on disk, one small file each.

An assignment is evaluated once, even if several methods or budgets share it.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from clado.evaluation import Counts
from clado.records.text import write_text
from clado.space import Assignment

Batch = tuple[int, int]
"""An evaluation batch: the first image, and the image after the last."""


class EvaluationCache:
    """Counts by assignment on one data slice: a folder of JSON files, each written whole.

    `identity` names the slice and the network. The counts of an evaluation batch are kept until the
    whole slice is evaluated. An evaluation that was killed continues with the other batches.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        self.identity = identity

    def _file(self, assignment: Assignment, batch: Batch | None = None) -> Path:
        name = f"{self.identity[:12]}-{assignment.key}"
        return self.folder / (f"{name}.json" if batch is None else f"parts/{name}-{batch[0]}-{batch[1]}.json")

    def get(self, assignment: Assignment, batch: Batch | None = None) -> Counts | None:
        """The counts of an assignment; None if it is not evaluated yet, or its file cannot be read."""
        try:
            document = json.loads(self._file(assignment, batch).read_text(encoding="utf-8"))
            key = document["bits"], document["activation_bits"], document["identity"], document["part"]
            expected = (
                list(assignment.bits),
                list(assignment.activation_bits),
                self.identity,
                None if batch is None else list(batch),
            )
            return Counts(**document["counts"]) if key == expected else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, assignment: Assignment, counts: Counts, batch: Batch | None = None) -> None:
        """Keeps the counts of an assignment.

        The counts of the whole slice replace those of its evaluation batches.
        """
        document = {
            "identity": self.identity,
            "bits": assignment.bits,
            "activation_bits": assignment.activation_bits,
            "part": batch,
            "counts": asdict(counts),
        }
        write_text(self._file(assignment, batch), json.dumps(document))
        if batch is None:
            for file in self.folder.glob(f"parts/{self._file(assignment).stem}-*.json"):
                file.unlink(missing_ok=True)

    def read_or_measure(
        self,
        assignments: Iterable[Assignment],
        measure: Callable[[Sequence[Assignment]], Iterable[tuple[Assignment, Counts]]],
        advance: Callable[[float], None] = lambda amount: None,
    ) -> dict[Assignment, Counts]:
        """Counts of each distinct assignment: read where they are known, else measured and kept.

        Args:
            assignments: What to count.
            measure: Counts what is absent, in any order; what it gives is kept at once.
            advance: Called with 1 for each assignment.

        Returns:
            Counts by assignment, in the order of the assignments.
        """
        counts = {assignment: self.get(assignment) for assignment in dict.fromkeys(assignments)}
        absent = [assignment for assignment, known in counts.items() if known is None]
        for _ in range(len(counts) - len(absent)):
            advance(1)
        for assignment, measured in measure(absent):
            self.put(assignment, measured)
            counts[assignment] = measured
            advance(1)
        return {assignment: known for assignment, known in counts.items() if known is not None}
