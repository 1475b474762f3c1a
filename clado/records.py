"""What a run found, as data: one row for each budget and method. Plots, tables and the tracker read it; nothing here measures."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clado.errors import StoreError
from clado.space import Assignment

CHOSEN, UNIFORM, FLOAT = "chosen", "uniform", "float"


@dataclass(frozen=True)
class Accuracy:
    """Counts and mean loss of one assignment on one data slice; top-1 and top-5 are fractions."""

    num_images: int
    loss: float
    top1: float | None = None
    top5: float | None = None


@dataclass(frozen=True)
class Result:
    """One method's answer to one budget.

    `loss_predicted`: baseline + ½ αᵀĜα of the method's own matrix; `loss_shipped`: mean criterion measured on the sensitivity
    set with the network that would ship; `validation`: accuracy on images that no choice has seen. `winner` names the method
    whose assignment `chosen` took, and `gain` how much lower its measured loss is than the best of the others.
    """

    budget: str
    method: str
    assignment: Assignment
    size_bytes: int
    average_bits: float
    loss_shipped: float
    loss_predicted: float | None = None
    status: str | None = None
    objective: float | None = None
    bound: float | None = None
    gap: float | None = None
    seconds: float | None = None
    validation: Accuracy | None = None
    winner: str | None = None
    gain: float | None = None


@dataclass(frozen=True)
class RunRecord:
    """Everything a run reports: network, settings, one Result per budget and method, and how long each phase took in seconds."""

    network: str
    layer_names: tuple[str, ...]
    layer_weights: tuple[int, ...]
    fingerprint: str
    criterion: str
    baseline: float
    float_accuracy: Accuracy
    results: tuple[Result, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    forwards: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def budgets(self) -> tuple[str, ...]:
        """Names of the budgets, in the order asked for."""
        return tuple(dict.fromkeys(result.budget for result in self.results))

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods, in the order reported."""
        return tuple(dict.fromkeys(result.method for result in self.results))

    def find(self, budget: str, method: str) -> Result | None:
        """The result of one cell of the table."""
        return next((r for r in self.results if r.budget == budget and r.method == method), None)

    def assignment_document(self, result: Result) -> dict[str, Any]:
        """The result's assignment as the JSON object that `SearchSpace.to_json` writes and `SearchSpace.from_json` reads."""
        return {
            "format": "clado-assignment/1",
            "bits": dict(zip(self.layer_names, result.assignment.bits, strict=True)),
            "average_bits": result.average_bits,
            "size_bytes": result.size_bytes,
        }

    @property
    def float_bytes(self) -> int:
        """Bytes of the searched weights in 32-bit floats."""
        return 4 * sum(self.layer_weights)

    def save(self, path: Path) -> None:
        """Writes the record as JSON, whole or not at all."""
        write_text(path, json.dumps(asdict(self), indent=1, allow_nan=False, default=str))

    @classmethod
    def load(cls, path: Path) -> "RunRecord":
        """The record that `save` wrote."""
        try:
            document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                **{
                    **document,
                    "layer_names": tuple(document["layer_names"]),
                    "layer_weights": tuple(document["layer_weights"]),
                    "notes": tuple(document["notes"]),
                    "float_accuracy": Accuracy(**document["float_accuracy"]),
                    "results": tuple(_result(row) for row in document["results"]),
                }
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{path} is not the record of a finished run ({error}); run `clado run` on its configuration first"
            ) from error


def _result(row: dict[str, Any]) -> Result:
    accuracy = row["validation"]
    return Result(
        **{
            **row,
            "assignment": Assignment(tuple(row["assignment"]["bits"])),
            "validation": Accuracy(**accuracy) if accuracy else None,
        }
    )


def write_text(path: Path, text: str) -> None:
    """Writes a file through a temporary sibling and a rename, so that a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are padded to one width, so that it reads well as plain text too."""
    table = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[k]) for row in table) for k in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def percent(fraction: float | None) -> str:
    """A fraction in percent with two decimals; a dash where there is none."""
    return "–" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.2f}"


def size_text(num_bytes: float) -> str:
    """Bytes for people, three digits: kB = 10^3 bytes, MB = 10^6."""
    number, unit = (num_bytes / 1e6, "MB") if num_bytes >= 999_500 else (num_bytes / 1e3, "kB")
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
