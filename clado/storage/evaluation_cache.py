"""Evaluations that are done, one small file each: an assignment is evaluated once, whichever methods or budgets share it."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from clado.evaluation import Counts
from clado.records import write_text
from clado.space import Assignment

Part = tuple[int, int]


class EvaluationCache:
    """Counts by assignment on one data slice: a folder of JSON files, each written whole. `identity` names slice and network.

    A part (start, stop) of the slice is kept beside the whole until that is put: an evaluation that is killed goes on from there.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        self.identity = identity

    def _file(self, assignment: Assignment, part: Part | None = None) -> Path:
        name = f"{self.identity[:12]}-{assignment.key}"
        return self.folder / (f"{name}.json" if part is None else f"parts/{name}-{part[0]}-{part[1]}.json")

    def get(self, assignment: Assignment, part: Part | None = None) -> Counts | None:
        """The counts of an assignment, None where it is not evaluated yet or its file cannot be read."""
        try:
            document = json.loads(self._file(assignment, part).read_text(encoding="utf-8"))
            stored = document["bits"], document["activation_bits"], document["identity"], document["part"]
            wanted = list(assignment.bits), list(assignment.activation_bits), self.identity, None if part is None else list(part)
            return Counts(**document["counts"]) if stored == wanted else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, assignment: Assignment, counts: Counts, part: Part | None = None) -> None:
        """Keeps the counts of an assignment; those of the whole slice take the place of its parts'."""
        document = {
            "identity": self.identity,
            "bits": assignment.bits,
            "activation_bits": assignment.activation_bits,
            "part": part,
            "counts": asdict(counts),
        }
        write_text(self._file(assignment, part), json.dumps(document))
        if part is None:
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
