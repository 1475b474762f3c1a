"""Criteria: the loss of each sample that must not grow. Float64, so that differences of nearly equal losses keep their digits.

A criterion is a callable `(outputs, float_outputs, targets) -> loss of each sample (N,)`. Outputs have the network's own form: a
tensor, or tensors in tuples, lists and dictionaries, with the images first. Targets are what the data have in addition to the
images, or None. `Criterion(callable, curvature=...)` gives more facts about a criterion.

To add a criterion, add a file to this folder with an object `criterion = Criterion(...)`, and subclass `CriterionContract`
(tests/contracts/criterion.py) for it. The file's name is the criterion's name; it is imported when first used. In the settings
`package.module:name` names a callable or a `Criterion` that lives elsewhere.

Measuring handles outputs as one tensor (..., N, M): see `clado.network.outputs`. N counts samples.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from clado.criteria._packed import PackedCriterion, on_packed
from clado.errors import ConfigurationError
from clado.network.outputs import LOGITS, Outputs
from clado.plugins import imported, load

__all__ = ["Criterion", "Loss", "PackedCriterion", "bind", "brier", "criterion_of", "hits", "name_of", "packed", "residual"]

Loss = Callable[[Tensor], Tensor]
"""Outputs (..., N, M) -> the loss of each sample, float64 (..., N)."""


@dataclass(frozen=True)
class Criterion:
    """A loss, and what the rest of the code must know about it."""

    loss: Callable[[Any, Any, Any], Tensor]
    """(outputs, float outputs, targets) -> loss of each sample (N,)."""
    curvature: Callable[[Any, Any], Callable[[Any], Any]] | None = None
    """(float outputs, targets) -> root, a linear map. None: `gauss_newton` cannot measure the criterion.

    `root(change)` takes a change of the outputs, in their form, to tensors with the images first. Their squares sum, for each
    sample, to uᵀ H u: H is the Hessian of the loss in the outputs at the float outputs, or a positive semidefinite part of it.
    """
    needs_targets: bool = False
    """Whether it reads targets."""
    on_logits: PackedCriterion | None = None
    """A faster form for networks that return logits (N, C), with more functions of a criterion of classes."""


def criterion_of(criterion: Any) -> Criterion:
    """The criterion of a name, of `package.module:name`, or of a callable.

    Raises:
        ConfigurationError: There is no such criterion, or it is something else.
    """
    resolved = criterion
    if isinstance(criterion, str):
        resolved = imported(criterion, "criterion") if ":" in criterion else load("criteria", criterion)
    if isinstance(resolved, Criterion):
        return resolved
    if isinstance(resolved, type) or not callable(resolved):
        shown = f"the class {resolved.__name__}" if isinstance(resolved, type) else f"an object of type {type(resolved).__name__}"
        raise ConfigurationError(
            f"criterion {name_of(criterion)} is {shown}; expected a name, a callable (outputs, float_outputs, targets) -> loss "
            "of each sample, or a clado.criteria.Criterion"
        )
    return Criterion(resolved)


def name_of(criterion: Any) -> str:
    """The name of a criterion in messages and matrices: its own, or that of its function."""
    if isinstance(criterion, str):
        return criterion
    function = criterion.loss if isinstance(criterion, Criterion) else criterion
    return str(getattr(function, "__name__", None) or repr(function))


def packed(criterion: Any, outputs: Outputs = LOGITS) -> PackedCriterion:
    """A criterion, as `criterion_of` takes it, on the packed outputs of a network.

    Raises:
        ConfigurationError: There is no such criterion.
    """
    resolved, name = criterion_of(criterion), name_of(criterion)
    if resolved.on_logits is not None and outputs.are_logits:
        return replace(resolved.on_logits, name=name, needs_targets=resolved.needs_targets)
    return on_packed(name, resolved.loss, resolved.curvature, resolved.needs_targets, outputs)


def bind(criterion: Any, float_logits: Tensor, labels: Tensor | None) -> Loss:
    """The criterion as a function of logits only, for one batch with known float logits and labels."""
    return packed(criterion).of(float_logits, labels)


def brier(criterion: Any, logits: Tensor, float_logits: Tensor, labels: Tensor | None) -> Tensor:
    """`PackedCriterion.brier` of logits."""
    return packed(criterion).brier(logits, float_logits, labels)


def hits(criterion: Any, logits: Tensor, float_logits: Tensor, labels: Tensor | None) -> Tensor:
    """`PackedCriterion.hits` of logits."""
    return packed(criterion).hits(logits, float_logits, labels)


def residual(criterion: Any, float_logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Gradient of the criterion at the float logits, float64 (N, C); None if it is zero."""
    return packed(criterion).slope(float_logits, labels)
