"""The answer of a solver: an assignment, its value, and how far it is proven optimal. NumPy only."""

from dataclasses import dataclass, fields
from enum import StrEnum
from math import inf
from pathlib import Path
from typing import Any

from clado.errors import CladoError
from clado.interaction.matrix import Convexity
from clado.records.documents import read_document, space_document, space_of, unreadable, write_document
from clado.records.tabular import Tabular
from clado.space import Assignment, SearchSpace

FORMAT = "clado-solution/1"
_FILE = "a file that `Solution.save` wrote"


class Status(StrEnum):
    """How a solve ended. `advice` says what that means and what to try."""

    OPTIMAL = "optimal"
    LIMIT = "limit"
    INTERRUPTED = "interrupted"
    HEURISTIC = "heuristic"
    INFEASIBLE = "infeasible"
    DOUBTFUL = "doubtful"

    @property
    def advice(self) -> str:
        """What happened and what to try, in a sentence."""
        return _ADVICE[self]


_ADVICE = {
    Status.OPTIMAL: "Proven: no other assignment within the constraints has a lower objective (relative tolerance 1e-6).",
    Status.LIMIT: "A limit was reached: this is the best assignment found, and the gap bounds what is left; raise the limit, "
    "offer fewer bit-widths, or use convexity='clip_psd' or more sensitivity images, which make the program easier.",
    Status.INTERRUPTED: "Interrupted: this is the best assignment found until then, and the gap bounds what is left; run it "
    "again to prove it.",
    Status.HEURISTIC: "Found by a heuristic, which proves nothing; solve with 'scip' to get a bound.",
    Status.INFEASIBLE: "No assignment meets the constraints; raise a budget, offer narrower bit-widths, or unpin layers.",
    Status.DOUBTFUL: "The solver's numbers and the recomputed ones disagree by more than the tolerance; the assignment is "
    "feasible, but its bound is not to be trusted: rescale the matrix or compare with solver='exhaustive' on a smaller space.",
}


@dataclass(frozen=True, repr=False)
class Solution(Tabular):
    """An assignment, its value, and how far that is proven."""

    assignment: Assignment
    """One bit-width per layer."""
    status: Status
    """How the solve ended."""
    objective: float
    """The predicted loss increase ½ αᵀ Ĝ α on the *raw* matrix."""
    minimised: float
    """The value of the minimised function. It differs from `objective` with clipping or in `Program.layerwise`."""
    bound: float
    """A lower bound on the minimised function; −∞ for a heuristic."""
    gap: float
    """`(minimised − bound) / |minimised|`; ∞ for a heuristic."""
    seconds: float
    """How long the solve took."""
    nodes: int
    """Nodes of the search tree."""
    values: dict[str, float]
    """The value of each constraint by name, in its unit."""
    slack: dict[str, float]
    """The unused budget of each constraint by name, in its unit."""
    solver: str
    """The solver's name."""
    estimator: str
    """The name of the estimator that made the matrix."""
    convexity: Convexity
    """Which matrix was minimised: as measured, or clipped."""
    space: SearchSpace
    """The space of the assignment."""
    better_than_widest: Assignment | None = None
    """An assignment that the raw matrix prefers to the widest bits everywhere. It is a sign of sampling noise."""
    message: str = ""
    """The solver's message about this solve."""

    @property
    def advice(self) -> str:
        """What happened and what to try, followed by the solver's message."""
        return f"{self.status.advice} {self.message}".strip()

    @property
    def average_bits(self) -> float:
        """Bits per searched weight."""
        return self.space.average_bits(self.assignment)

    @property
    def size_bytes(self) -> int:
        """Bytes of the searched weights, each tensor packed."""
        return self.space.size_bytes(self.assignment)

    def summary(self) -> str:
        """Status, bits, bytes and predicted increase, in one line."""
        gap = "" if self.gap == 0 or self.status == Status.OPTIMAL else f", gap {100 * self.gap:.3g} %"
        return (
            f"{self.status}: {self.average_bits:.4g} bits a weight, {self.size_bytes:,} bytes, "
            f"predicted increase {self.objective:.4g}{gap}"
        )

    def rows(self) -> list[dict[str, Any]]:
        """Each layer: its bits, weights and bytes."""
        return assignment_rows(self.space, self.assignment)

    def save(self, path: str | Path) -> None:
        """Writes the solution and its space as JSON, for `load`."""
        write_document(path, {"format": FORMAT, **self.document(), "space": space_document(self.space)})

    @classmethod
    def load(cls, path: str | Path) -> "Solution":
        """The solution that `save` wrote.

        Raises:
            StoreError: The file is missing, or holds something else.
        """
        document = read_document(path, FORMAT, _FILE)
        try:
            return cls.of_document(document, space_of(document["space"]))
        except (KeyError, TypeError, ValueError, CladoError) as error:
            raise unreadable(path, error, _FILE) from None

    def document(self) -> dict[str, Any]:
        """All fields but the space as plain data. Assignments are those of `SearchSpace.to_json`."""
        plain = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "space"}
        other = self.better_than_widest
        return {
            **plain,
            "status": str(self.status),
            "assignment": self.space.to_json(self.assignment),
            "better_than_widest": None if other is None else self.space.to_json(other),
        }

    @classmethod
    def of_document(cls, document: dict[str, Any], space: SearchSpace) -> "Solution":
        """The solution of `document`. Raises KeyError, TypeError, ValueError or CladoError for anything else."""
        other = document["better_than_widest"]
        values = {field.name: document[field.name] for field in fields(cls) if field.name != "space"}
        values |= {
            "space": space,
            "status": Status(document["status"]),
            "assignment": space.from_json(document["assignment"]),
            "better_than_widest": None if other is None else space.from_json(other),
            # JSON has no infinities
            "bound": -inf if document["bound"] is None else document["bound"],
            "gap": inf if document["gap"] is None else document["gap"],
            "slack": {name: inf if value is None else value for name, value in document["slack"].items()},
        }
        return cls(**values)


def assignment_rows(space: SearchSpace, assignment: Assignment) -> list[dict[str, Any]]:
    """Each layer of an assignment: its bits (None in float), weights and bytes."""
    pairs = space.completed(assignment).pairs
    return [
        {
            "layer": layer.name,
            "bits": bits,
            **({"activation_bits": width} if space.has_activations else {}),
            "weights": layer.num_weights,
            "bytes": layer.weight_bytes(bits),
        }
        for layer, (bits, width) in zip(space.layers, pairs, strict=True)
    ]
