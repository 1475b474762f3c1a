"""The results of a run as plain data.

Plots, tables and the tracker read them. Nothing here measures.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from clado.errors import StoreError
from clado.space import Assignment

CHOSEN, UNIFORM, FLOAT, LOCAL_SEARCH = "chosen", "uniform", "float", "local_search"
IMAGENET_VALIDATION_IMAGES = 50_000
Z95 = 1.959963984540054
"""Quantile of the normal distribution that leaves 2.5 % above it."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy and mean loss of one assignment on one data slice."""

    num_images: int
    """Number of images."""
    loss: float
    """Mean cross entropy. Without labels, mean KL divergence from the float network."""
    top1: float | None = None
    """Fraction of images whose top class is right. None without labels."""
    top5: float | None = None
    """Fraction of images whose right class is among the top five. None without labels."""

    @property
    def top1_interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % confidence interval of top-1. None without labels."""
        return None if self.top1 is None else wilson(self.top1, self.num_images)


def wilson(fraction: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a fraction (Wilson 1927).

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)

    It lies within 0..1. Its length is positive even if p is 0 or 1.

    Args:
        fraction: The fraction p.
        count: Number n of independent images that it was counted on.

    Returns:
        Lower and upper end.
    """
    square = Z95**2 / count
    centre = (fraction + square / 2) / (1 + square)
    radius = Z95 * math.sqrt(fraction * (1 - fraction) / count + square / (4 * count)) / (1 + square)
    return max(0.0, centre - radius), min(1.0, centre + radius)


@dataclass(frozen=True)
class Result:
    """One method's answer to one budget."""

    budget: str
    """Name of the budget."""
    method: str
    """Name of the method: an estimator, `uniform` or `chosen`."""
    assignment: Assignment
    """The answer."""
    size_bytes: int
    """Bytes of the searched weights."""
    average_bits: float
    """Mean bit-width of the searched weights."""
    loss_deployed: float
    """Mean criterion of the deployed network on the sensitivity set.

    Final corrections are applied.
    """
    brier_deployed: float | None = None
    """Mean Brier score, measured with `loss_deployed`.

    None if it is not finite or was not measured.
    """
    agreement_deployed: float | None = None
    """Fraction of images with the right top class.

    With cross entropy it is the label, otherwise the float network's top class.
    """
    loss_predicted: float | None = None
    """Baseline + ½ αᵀĜα of the method's own matrix."""
    loss_probe_model: float | None = None
    """As `loss_deployed`, but of the network that tiles measure: without final corrections."""
    status: str | None = None
    """Status of the solver."""
    objective: float | None = None
    """Predicted loss increase ½ αᵀĜα of the solution."""
    bound: float | None = None
    """Lower bound of what the solver minimised (`program.Solution.minimised`)."""
    gap: float | None = None
    """Relative gap between what the solver minimised and `bound`."""
    seconds: float | None = None
    """Time that the solver took."""
    validation: Accuracy | None = None
    """Accuracy on the validation set. No choice has seen its images."""
    validation_plain: Accuracy | None = None
    """Accuracy of the same bits, rounded to nearest without corrections.

    None if the run has no corrections.
    """
    winner: str | None = None
    """For `chosen`: the method that proposed the assignment."""
    gain: float | None = None
    """For `chosen`: the least measured loss of the other methods, minus the one of `winner`.

    If it is negative, Brier score and agreement decided (`choice.choose`).
    """


@dataclass(frozen=True)
class MeasuredProposal:
    """One assignment that was measured for a budget."""

    budget: str
    """Name of the budget."""
    origin: str
    """Who proposed it: a method, a variant of a method, or the local search."""
    assignment: Assignment
    """The assignment."""
    size_bytes: int
    """Bytes of the searched weights."""
    loss_deployed: float | None
    """As in `Result`. None if it is NaN or infinite."""
    loss_predicted: float | None = None
    """Predicted loss. None if it is NaN or infinite."""
    brier_deployed: float | None = None
    """As in `Result`."""
    agreement_deployed: float | None = None
    """As in `Result`."""
    predicted_by: str = ""
    """Estimator of `loss_predicted`, if `origin` predicts no loss.

    Of a local search it is the surrogate.
    """


@dataclass(frozen=True)
class SearchSummary:
    """Result of the local search for one budget."""

    budget: str
    """Name of the budget."""
    surrogate: str
    """Estimator that ranked the moves."""
    start: str
    """Method that proposed the start."""
    start_loss: float
    """Measured loss of the start."""
    best_loss: float
    """Least measured loss."""
    gain: float
    """Decrease of the measured loss."""
    evaluations: int
    """Number of losses measured."""


@dataclass(frozen=True)
class Stability:
    """How far the images decide an estimator's answer to a budget.

    It need not be the chosen one.
    """

    budget: str
    """Name of the budget."""
    estimator: str
    """Name of the estimator."""
    num_images: int
    """Number of sensitivity images."""
    num_resamples: int
    """Number of bootstrap resamples."""
    shares: tuple[float, ...]
    """For each layer, the fraction of resamples that keep its bits."""
    multiples: tuple[int, ...]
    """Multiples of `num_images`."""
    undecided: tuple[int, ...]
    """For each multiple, the number of layers that stay undecided with that many images."""

    @property
    def settled_by(self) -> int | None:
        """Number of images that would leave no layer undecided.

        None if even the largest multiple would.
        """
        return next((m * self.num_images for m, count in zip(self.multiples, self.undecided, strict=True) if not count), None)


@dataclass(frozen=True)
class RunRecord:
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
    """Forward images of each tile kind, and of what is measured to choose.

    The latter are `proposals`, `local_search`, and `batchnorm_reestimation` for both. Preparing and
    what is only reported (losses as probed, accuracy) are not counted.
    """
    notes: tuple[str, ...] = ()
    """Sentences that a reader of the results should know."""
    corrections: str = "none"
    """Names of the corrections."""
    unsearched: tuple[tuple[str, int, str], ...] = ()
    """(name, bytes, reason) of every parameter that stays float."""
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
    searches: tuple[SearchSummary, ...] = ()
    """Result of each local search."""
    stability: tuple[Stability, ...] = ()
    """How far the images decide, for each budget."""
    recorded: str = ""
    """Time of the record, in ISO 8601 and UTC."""

    @property
    def top1_name(self) -> str:
        """`top1`, or `top1_subset` for a part of ImageNet's validation images.

        A subset's figure is not comparable.
        """
        is_subset = self.imagenet and self.float_accuracy.num_images < IMAGENET_VALIDATION_IMAGES
        return "top1_subset" if is_subset else "top1"

    @property
    def top1_title(self) -> str:
        """`top1_name` as a title."""
        return "top-1" if self.top1_name == "top1" else self.top1_name

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

    def save(self, path: Path) -> None:
        """Writes the record as JSON, whole or not at all."""
        write_text(path, json.dumps(_plain(asdict(self)), indent=1, allow_nan=False, default=str))

    @classmethod
    def load(cls, path: Path) -> "RunRecord":
        """Reads a record that `save` wrote.

        Raises:
            StoreError: The file is missing, or it is not a record.
        """
        try:
            document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
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
                    "stability": tuple(_stability(row) for row in document["stability"]),
                    "searches": tuple(_search(row) for row in document["searches"]),
                }
            )
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{path} is not the record of a finished run ({error}); run `clado run` on its configuration first"
            ) from error


@dataclass(frozen=True)
class Receipt:
    """Where a record or a failure is in MLflow, or why it is not there. All texts are redacted."""

    uri: str
    """URI of the tracker."""
    experiment: str
    """Name of the experiment."""
    experiment_id: str | None
    """MLflow's id of the experiment. None if MLflow did not answer."""
    parent_run_id: str | None
    """MLflow's id of the run. None if there is none."""
    num_children: int
    """Number of nested runs that arrived."""
    delivered: bool
    """Whether everything arrived."""
    seconds: float
    """Time that sending took."""
    problem: str | None = None
    """Why something did not arrive."""
    spool: Path | None = None
    """The note of what did not arrive."""


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
    """The row with infinity for measured losses that are null, because they were not finite."""
    return {**row, **{key: math.inf for key in losses if row[key] is None}}


def _accuracy(row: dict[str, Any]) -> Accuracy:
    return Accuracy(**_measured(row, "loss"))


def _search(row: dict[str, Any]) -> SearchSummary:
    return SearchSummary(**_measured({**row, "gain": row["gain"] or 0.0}, "start_loss", "best_loss"))


def _assignment(document: dict[str, Any]) -> Assignment:
    return Assignment(tuple(document["bits"]), tuple(document["activation_bits"]), document["corrected"])


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


def write_text(path: Path, text: str) -> None:
    """Writes a file through a temporary file and a rename. So a reader never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. Its columns are padded, so that it is also readable as plain text."""
    table = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[k]) for row in table) for k in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def percent(fraction: float | None) -> str:
    """A fraction in percent with two decimals. A dash for None and NaN."""
    return "–" if fraction is None or math.isnan(fraction) else f"{100 * fraction:.2f}"


def size_text(num_bytes: float) -> str:
    """Bytes with three digits. kB = 10^3 bytes, MB = 10^6 bytes."""
    number, unit = (num_bytes / 1e6, "MB") if num_bytes >= 999_500 else (num_bytes / 1e3, "kB")
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


def short_names(names: Sequence[str]) -> list[str]:
    """Layer names without the ending `.weight`.

    If that makes two of them equal, the whole names.
    """
    stems = [name.removesuffix(".weight") for name in names]
    return stems if len(set(stems)) == len(names) else list(names)
