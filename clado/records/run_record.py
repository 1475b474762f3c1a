"""The record of a run: everything that it reports, as one JSON file."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clado.errors import StoreError
from clado.records.interval import Interval
from clado.records.results import (
    IMAGENET_VALIDATION_IMAGES,
    Accuracy,
    Comparison,
    MeasuredProposal,
    Result,
    SearchSummary,
    Stability,
)
from clado.records.serving import Serving
from clado.records.tabular import Tabular
from clado.records.text import write_text
from clado.space import Assignment


@dataclass(frozen=True, repr=False)
class RunRecord(Tabular):
    """Everything that a run reports."""

    network: str
    """Name of the network."""
    layer_names: tuple[str, ...]
    """Name of each searched layer."""
    layer_weights: tuple[int, ...]
    """Number of weights of each searched layer."""
    fingerprint: str
    """Identity of the run: a hash of everything that changes the meaning of a measured number."""
    criterion: str
    """Name of the criterion."""
    baseline: float
    """Loss of the float network on the sensitivity set."""
    float_accuracy: Accuracy
    """Accuracy of the float network on the validation set."""
    results: tuple[Result, ...]
    """One result for each budget and method."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time of each phase."""
    forwards: dict[str, int] = field(default_factory=dict)
    """Forward images of each tile kind, of measurements to choose, and of accuracies.

    Measurements to choose are `proposals`, `local_search`, `other_corrections`, and
    `batchnorm_reestimation` for these three. `validation` counts accuracies. Preparing is not counted.
    """
    notes: tuple[str, ...] = ()
    """Sentences that a reader of the results should know."""
    corrections: str = "none"
    """Names of the corrections."""
    unsearched: tuple[tuple[str, int, str], ...] = ()
    """(name, bytes, reason) of every parameter that stays in float."""
    provenance: dict[str, str] = field(default_factory=dict)
    """Versions, device, hash of the weights."""
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`num_images` and `sha256` of each set."""
    costs: dict[str, dict[str, int]] = field(default_factory=dict)
    """`forwards` and `backwards`: images that each estimator alone would take."""
    imagenet: bool = False
    """Whether the validation images are of ImageNet."""
    measured_proposals: tuple[MeasuredProposal, ...] = ()
    """Every proposal that was measured to choose."""
    comparisons: tuple[Comparison, ...] = ()
    """Answers to one budget compared on validation images: the chosen one with float and every other, interactions with none."""
    searches: tuple[SearchSummary, ...] = ()
    """Result of each local search."""
    stability: tuple[Stability, ...] = ()
    """How far the images decide, for each budget."""
    serving: Serving | None = None
    """Measurements of the chosen networks in the runtime of the settings. None without a runtime."""
    recorded: str = ""
    """Time of the record, in ISO 8601 and UTC."""

    @property
    def top1_name(self) -> str:
        """`top1`, or `top1_subset` for a part of ImageNet's validation images.

        Accuracy on a subset is not comparable.
        """
        is_subset = self.imagenet and self.float_accuracy.num_images < IMAGENET_VALIDATION_IMAGES
        return "top1_subset" if is_subset else "top1"

    @property
    def top1_title(self) -> str:
        """`top1_name` as a title."""
        return "top-1" if self.top1_name == "top1" else self.top1_name

    @property
    def metric_name(self) -> str | None:
        """Name of the user-defined metric. None without one."""
        return self.float_accuracy.metric_name

    @property
    def budgets(self) -> tuple[str, ...]:
        """Names of the budgets, in the order asked for."""
        return tuple(dict.fromkeys(result.budget for result in self.results))

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the methods, in the order reported."""
        return tuple(dict.fromkeys(result.method for result in self.results))

    def find(self, budget: str, method: str) -> Result | None:
        """The result of a budget and a method. None if there is none."""
        return next((r for r in self.results if r.budget == budget and r.method == method), None)

    def assignment_document(self, result: Result) -> dict[str, Any]:
        """A result's assignment as the JSON object of `SearchSpace.to_json`."""
        widths = result.assignment.activation_bits
        return {
            "format": "clado-assignment/1",
            "bits": dict(zip(self.layer_names, result.assignment.bits, strict=True)),
            **({"activation_bits": dict(zip(self.layer_names, widths, strict=True))} if widths else {}),
            **({"corrected": result.assignment.corrected} if result.assignment.corrected != "all" else {}),
            "average_bits": result.average_bits,
            "size_bytes": result.size_bytes,
        }

    @property
    def float_bytes(self) -> int:
        """Bytes of the searched weights in 32-bit floats."""
        return 4 * sum(self.layer_weights)

    def comparison(self, budget: str, method: str, other: str) -> Comparison | None:
        """The comparison of two answers to a budget on the validation images. None if they are the same, or were not compared."""
        key = (budget, method, other)
        return next((row for row in self.comparisons if (row.budget, row.method, row.other) == key), None)

    def summary(self) -> str:
        """Network, budgets and methods, in one line."""
        accuracy, names = self.float_accuracy, ", ".join(self.budgets)
        top1 = "" if accuracy.top1 is None else f", float top-1 {100 * accuracy.top1:.2f} %"
        if accuracy.metric is not None:
            top1 += f", float {accuracy.metric_name} {accuracy.metric:.4g}"
        return f"{self.network}: {len(self.layer_names)} layers, budgets {names}{top1}, {accuracy.num_images:,} validation images"

    def rows(self) -> list[dict[str, Any]]:
        """Each budget and method: bits, bytes, loss on the decision set, accuracy on the validation images."""
        return [
            {
                "budget": row.budget,
                "method": row.method,
                "average_bits": row.average_bits,
                "size_bytes": row.size_bytes,
                "loss_predicted": row.loss_predicted,
                "loss_deployed": row.loss_deployed,
                "validation_loss": None if row.validation is None else row.validation.loss,
                "top1": None if row.validation is None else row.validation.top1,
                "top5": None if row.validation is None else row.validation.top5,
                **({self.metric_name: None if row.validation is None else row.validation.metric} if self.metric_name else {}),
            }
            for row in self.results
        ]

    def save(self, path: str | Path) -> None:
        """Writes the record as JSON, whole or not at all."""
        write_text(Path(path), json.dumps(_plain(asdict(self)), indent=1, allow_nan=False, default=str))

    @classmethod
    def load(cls, path: str | Path) -> "RunRecord":
        """Reads a record that `save` wrote.

        Raises:
            StoreError: The file is missing, or it is not a record.
        """
        try:
            document: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(
                **{
                    **_measured(document, "baseline"),
                    "layer_names": tuple(document["layer_names"]),
                    "layer_weights": tuple(document["layer_weights"]),
                    "notes": tuple(document["notes"]),
                    "unsearched": tuple((name, size, reason) for name, size, reason in document["unsearched"]),
                    "float_accuracy": _accuracy(document["float_accuracy"]),
                    "results": tuple(_result(row) for row in document["results"]),
                    "measured_proposals": tuple(_measured_proposal(row) for row in document["measured_proposals"]),
                    "comparisons": tuple(_comparison(row) for row in document["comparisons"]),
                    "stability": tuple(_stability(row) for row in document["stability"]),
                    "searches": tuple(_search(row) for row in document["searches"]),
                    "serving": Serving.of_document(document.get("serving")),
                }
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{path} is not the record of a finished run ({error}); run `clado run` on its configuration first"
            ) from error


def _plain(value: Any) -> Any:
    """The same data with None in place of NaN and infinities, which JSON does not have."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_plain(inner) for inner in value]
    return value


def _measured(row: dict[str, Any], *losses: str) -> dict[str, Any]:
    """The row with infinity for measured losses that are null. They were not finite."""
    return {**row, **{key: math.inf for key in losses if row[key] is None}}


def _accuracy(row: dict[str, Any]) -> Accuracy:
    return Accuracy(**_measured(row, "loss"))


def _search(row: dict[str, Any]) -> SearchSummary:
    return SearchSummary(**_measured({**row, "gain": row["gain"] or 0.0}, "start_loss", "best_loss"))


def _assignment(document: dict[str, Any]) -> Assignment:
    return Assignment(tuple(document["bits"]), tuple(document["activation_bits"]), document["corrected"])


def _comparison(row: dict[str, Any]) -> Comparison:
    intervals = {key: None if row[key] is None else Interval(**row[key]) for key in ("kl", "agreement", "top1")}
    return Comparison(**{**row, **intervals})


def _stability(row: dict[str, Any]) -> Stability:
    return Stability(**{**row, **{key: tuple(row[key]) for key in ("shares", "multiples", "undecided")}})


def _measured_proposal(row: dict[str, Any]) -> MeasuredProposal:
    return MeasuredProposal(**{**row, "assignment": _assignment(row["assignment"])})


def _result(row: dict[str, Any]) -> Result:
    accuracy, plain = row["validation"], row["validation_plain"]
    return Result(
        **{
            **_measured(row, "loss_deployed"),
            "assignment": _assignment(row["assignment"]),
            "validation": _accuracy(accuracy) if accuracy else None,
            "validation_plain": _accuracy(plain) if plain else None,
        }
    )
