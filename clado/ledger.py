"""Evaluations that are done, one small file each: an assignment is evaluated once, whichever methods or budgets share it."""

import json
from dataclasses import asdict
from pathlib import Path

from clado.evaluation import Counts
from clado.records import write_text
from clado.space import Assignment


class Ledger:
    """Counts by assignment on one data slice: a folder of JSON files, each written whole. `identity` names slice and network."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        self.identity = identity

    def _file(self, assignment: Assignment) -> Path:
        return self.folder / f"{self.identity[:12]}-{assignment.key}.json"

    def get(self, assignment: Assignment) -> Counts | None:
        """The counts of an assignment, None where it is not evaluated yet or its file cannot be read."""
        try:
            document = json.loads(self._file(assignment).read_text(encoding="utf-8"))
            if document["bits"] != list(assignment.bits) or document["identity"] != self.identity:
                return None
            return Counts(**document["counts"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def put(self, assignment: Assignment, counts: Counts) -> None:
        """Keeps the counts of an assignment."""
        document = {"identity": self.identity, "bits": assignment.bits, "counts": asdict(counts)}
        write_text(self._file(assignment), json.dumps(document))
