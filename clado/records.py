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

CHOSEN, UNIFORM, FLOAT, LOCAL_SEARCH = "chosen", "uniform", "float", "local_search"
IMAGENET_VALIDATION_IMAGES = 50_000
Z95 = 1.959963984540054  # quantile of the normal distribution that leaves 2.5 % above it


@dataclass(frozen=True)
class Accuracy:
    """Counts and mean loss of one assignment on one data slice; top-1 and top-5 are fractions."""

    num_images: int
    loss: float
    top1: float | None = None
    top5: float | None = None

    @property
    def top1_interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % confidence interval of top-1; None without labels."""
        return None if self.top1 is None else wilson(self.top1, self.num_images)


def wilson(fraction: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a share that was counted on `count` independent images (Wilson 1927).

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n): within 0..1, and of positive length even where p is 0 or 1.
    """
    square = Z95**2 / count
    centre = (fraction + square / 2) / (1 + square)
    reach = Z95 * math.sqrt(fraction * (1 - fraction) / count + square / (4 * count)) / (1 + square)
    return max(0.0, centre - reach), min(1.0, centre + reach)


@dataclass(frozen=True)
class Result:
    """One method's answer to one budget.

    `loss_predicted`: baseline + ½ αᵀĜα of the method's own matrix; `loss_probe_model`: mean criterion measured on the sensitivity
    set with the network that probes measure; `loss_deployed`: with the one that would ship, final corrections applied (the same
    where there are none); `validation`: accuracy on images that no choice has seen, `validation_plain` that of the same bits
    rounded to nearest without corrections (None where there are none). `winner` names the method whose assignment `chosen`
    took, and `gain` how much lower its measured loss is than the least of the other methods'; where that is negative,
    Brier score and agreement decided (`proposals.choose`). `brier_deployed` and `agreement_deployed` are those two, measured with
    `loss_deployed`: the mean score (None: not finite), and the share of images whose top class is the float network's, or with
    cross entropy the label. Both are None where `choose` was given no scores.
    """

    budget: str
    method: str
    assignment: Assignment
    size_bytes: int
    average_bits: float
    loss_deployed: float
    brier_deployed: float | None = None
    agreement_deployed: float | None = None
    loss_predicted: float | None = None
    loss_probe_model: float | None = None
    status: str | None = None
    objective: float | None = None
    bound: float | None = None
    gap: float | None = None
    seconds: float | None = None
    validation: Accuracy | None = None
    validation_plain: Accuracy | None = None
    winner: str | None = None
    gain: float | None = None


@dataclass(frozen=True)
class MeasuredProposal:
    """One assignment that was measured for a budget: who proposed it (a method, a variant of one, or the local search), what was
    predicted and what was measured (None: NaN or infinite). `predicted_by` is the estimator
    that predicts where the one that proposed predicts no loss; empty: the latter does (of a local search the surrogate)."""

    budget: str
    origin: str
    assignment: Assignment
    size_bytes: int
    loss_deployed: float | None
    loss_predicted: float | None = None
    brier_deployed: float | None = None
    agreement_deployed: float | None = None
    predicted_by: str = ""


@dataclass(frozen=True)
class SearchSummary:
    """What the local search of one budget did: `start` proposed what it started from; `gain` is how far it lowered the measured
    loss, with `evaluations` losses measured; `surrogate` is the estimator that ranked the moves."""

    budget: str
    surrogate: str
    start: str
    start_loss: float
    best_loss: float
    gain: float
    evaluations: int


@dataclass(frozen=True)
class Stability:
    """How far the images decide what `estimator` answers to a budget, whether that was chosen or not (`stability.py`).

    `shares[i]` is the share of resamples that keep the bits of layer i; `undecided[m]` counts the layers that stay undecided with
    `multiples[m]` times `num_images` images.
    """

    budget: str
    estimator: str
    num_images: int
    num_resamples: int
    shares: tuple[float, ...]
    multiples: tuple[int, ...]
    undecided: tuple[int, ...]

    @property
    def settled_by(self) -> int | None:
        """Images that would leave no layer undecided; None where even the largest multiple would."""
        return next((m * self.num_images for m, left in zip(self.multiples, self.undecided, strict=True) if not left), None)


@dataclass(frozen=True)
class RunRecord:
    """Everything a run reports: network, settings, one Result per budget and method, and how long each phase took in seconds.

    `unsearched` holds (name, bytes, why) of every parameter that keeps its float; `provenance` versions, device, hash of the
    weights; `data` maps a set to its `num_images` and `sha256`; `recorded` is when, in UTC.

    `forwards` are forward images by kind of tile, and of what is measured to choose: `proposals`, `local_search`, and
    `batchnorm_reestimation` for both; not of preparing, nor of what is only reported (losses as probed, accuracy). `costs` are
    forward and backward images that each estimator takes on its own.
    `measured_proposals` holds all that was measured on the way to the chosen ones.
    """

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
    corrections: str = "none"
    unsearched: tuple[tuple[str, int, str], ...] = ()
    provenance: dict[str, str] = field(default_factory=dict)
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    costs: dict[str, dict[str, int]] = field(default_factory=dict)
    imagenet: bool = False
    measured_proposals: tuple[MeasuredProposal, ...] = ()
    searches: tuple[SearchSummary, ...] = ()
    stability: tuple[Stability, ...] = ()
    recorded: str = ""

    @property
    def top1_name(self) -> str:
        """`top1`, or `top1_subset` where it was counted on a part of ImageNet's validation images: no figure to compare."""
        few = self.imagenet and self.float_accuracy.num_images < IMAGENET_VALIDATION_IMAGES
        return "top1_subset" if few else "top1"

    @property
    def top1_title(self) -> str:
        """The same for people."""
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
        """The result of one cell of the table."""
        return next((r for r in self.results if r.budget == budget and r.method == method), None)

    def assignment_document(self, result: Result) -> dict[str, Any]:
        """The result's assignment as the JSON object that `SearchSpace.to_json` writes and `SearchSpace.from_json` reads."""
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
        """The record that `save` wrote."""
        try:
            document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return cls(
                **{
                    **_measured(document, "baseline"),
                    "layer_names": tuple(document["layer_names"]),
                    "layer_weights": tuple(document["layer_weights"]),
                    "notes": tuple(document["notes"]),
                    "unsearched": tuple((name, size, why) for name, size, why in document["unsearched"]),
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
    """What became of a record or of a failure: where it is, or why it is not there. All texts are redacted and fit to print."""

    uri: str
    experiment: str
    experiment_id: str | None
    parent_run_id: str | None
    num_children: int
    delivered: bool
    seconds: float
    problem: str | None = None
    spool: Path | None = None


def _plain(value: Any) -> Any:
    """The same with null for numbers that JSON has not: NaN and infinities."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_plain(inner) for inner in value]
    return value


def _measured(row: dict[str, Any], *losses: str) -> dict[str, Any]:
    """The row with infinity for measured losses that were not finite."""
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


def short_names(names: Sequence[str]) -> list[str]:
    """Layer names without the ending `.weight`, where that leaves them distinct."""
    short = [name.removesuffix(".weight") for name in names]
    return short if len(set(short)) == len(names) else list(names)
