"""Results as plain data. Plots, tables and the tracker read them."""

import math
from dataclasses import dataclass
from pathlib import Path

from clado.records.interval import Z95, Interval
from clado.space import Assignment

CHOSEN, UNIFORM, FLOAT, LOCAL_SEARCH = "chosen", "uniform", "float", "local_search"
IMAGENET_VALIDATION_IMAGES = 50_000


@dataclass(frozen=True)
class Accuracy:
    """Accuracy and mean loss of one assignment on one data slice."""

    num_images: int
    """Number of images."""
    loss: float
    """Mean cross entropy. Without labels, mean KL divergence from the float network. Without classes, the mean criterion."""
    top1: float | None = None
    """Fraction of images whose top class is right. None without labels."""
    top5: float | None = None
    """Fraction of images whose right class is among the top five. None without labels."""
    kl: float | None = None
    """Mean KL divergence from the float network, in nats. None if it was not counted."""
    agreement: float | None = None
    """Fraction of images whose top class is the float network's. None if it was not counted."""
    metric: float | None = None
    """Mean of a user-defined metric over the images. None without one."""
    metric_name: str | None = None
    """Name of the metric."""

    @property
    def top1_interval(self) -> tuple[float, float] | None:
        """Wilson's 95 % confidence interval of top-1. None without labels."""
        return None if self.top1 is None else wilson(self.top1, self.num_images)


def wilson(fraction: float, count: int) -> tuple[float, float]:
    """95 % confidence interval of a fraction (Wilson 1927).

    (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n)

    It lies within 0..1. Its length is positive, even if p is 0 or 1.

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
    """Mean criterion of the deployed network on the decision set, to which no proposal is fitted."""
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

    It is counted for what is chosen. None elsewhere, and if the run has no corrections.
    """
    winner: str | None = None
    """For `chosen`: the method that proposed the assignment."""
    gain: float | None = None
    """For `chosen`: the least measured loss of the other methods, minus the one of `winner`.

    If it is negative, the other one was not significantly better (`choice.choose`).
    """


@dataclass(frozen=True)
class Comparison:
    """Two answers to one budget on the same validation images, which no choice has seen. Differences are `method` − `other`."""

    budget: str
    """Name of the budget."""
    method: str
    """The one method."""
    other: str
    """The other method."""
    kl: Interval
    """Difference in KL divergence from the float network, in nats."""
    agreement: Interval
    """Difference in the fraction of images whose top class is the float network's."""
    top1: Interval | None = None
    """Difference in top-1, a fraction. None without labels."""


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
    """Estimator of `loss_predicted`, if `origin` itself predicts no loss.

    For a local search it is the surrogate.
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
    """How far the images determine an estimator's answer to a budget.

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
