"""Criteria: the loss of each sample that must not grow. Float64, so that differences of nearly equal losses keep their digits.

To add a criterion, add a file to this folder with an object `criterion = Criterion(...)`, and subclass `CriterionContract`
(tests/contracts/criterion.py) for it. The file's name is the criterion's name; it is imported when first used.

Logits are (..., N, C), float logits are those of the float network, (N, C), and labels are (N,). N counts samples, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from clado.errors import DataError
from clado.plugins import load

Loss = Callable[[Tensor], Tensor]
"""Logits (..., N, C) -> the loss of each sample, float64 (..., N)."""


@dataclass(frozen=True)
class Criterion:
    """What the rest of the code must know about a criterion."""

    bind: Callable[[Tensor, Tensor | None], Loss]
    """(float logits, labels) -> the loss as a function of logits alone."""
    residual: Callable[[Tensor, Tensor | None], Tensor | None]
    """(float logits, labels) -> gradient of the loss at the float logits, float64 (N, C). None where it is zero."""
    target: Callable[[Tensor, Tensor | None], Tensor]
    """(float logits, labels) -> class probabilities that the Brier score compares with, float64 (N, C)."""
    classes: Callable[[Tensor, Tensor | None], Tensor]
    """(float logits, labels) -> the class (N,) that a sample is to have."""
    needs_labels: bool = False
    """Whether it reads labels. Without labels, gradients are those of classes that are drawn from the float softmax."""
    needs_float_logits: bool = True
    """Whether `bind` reads the float logits. Fine-tuning does without the float network where it does not."""


def criterion_of(name: str) -> Criterion:
    """The criterion of a name, or of `package.module:name`."""
    criterion: Criterion = load("criteria", name)
    return criterion


def bind(name: str, float_logits: Tensor, labels: Tensor | None) -> Loss:
    """The criterion as a function of logits alone, for one batch whose float logits and labels are known."""
    return _with_labels(name, labels).bind(float_logits, labels)


def brier(name: str, logits: Tensor, float_logits: Tensor, labels: Tensor | None) -> Tensor:
    """Squared distance between the softmax and what the criterion compares it with: the float network's, or that of the labels.

    Σ_c (q_c − p_c)² of each sample, float64 (..., N), between 0 and 2 (Brier, "Verification of forecasts expressed in terms of
    probability", 1950). Least where the criterion is least, and bounded where that is not: a few confident errors do not decide.
    """
    target = _with_labels(name, labels).target(float_logits, labels)
    return (logits.double().softmax(-1) - target).square().sum(-1)


def hits(name: str, logits: Tensor, float_logits: Tensor, labels: Tensor | None) -> Tensor:
    """Whether the class of the largest logit is the one that the criterion expects: bool (..., N).

    Logits that are not finite hit nothing.
    """
    classes = _with_labels(name, labels).classes(float_logits, labels)
    return (logits.argmax(-1) == classes) & logits.isfinite().all(-1)


def residual(name: str, float_logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Gradient of the criterion at the float logits, float64 (N, C); None where it is zero."""
    return _with_labels(name, labels).residual(float_logits, labels)


def _with_labels(name: str, labels: Tensor | None) -> Criterion:
    """The criterion of a name, refused where it needs labels and there are none."""
    criterion = criterion_of(name)
    if criterion.needs_labels and labels is None:
        raise DataError(f"{name} needs labels and the images have none; use the criterion kl_to_float, which needs none")
    return criterion
