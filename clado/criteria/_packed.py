"""Criteria in the form that measuring uses: functions of packed outputs (..., N, M), for one batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from clado.errors import ConfigurationError, DataError
from clado.network.outputs import Outputs
from clado.network.tensors import outside_inference


@dataclass(frozen=True)
class PackedCriterion:
    """A criterion on the packed outputs of one network. Float outputs are (N, M)."""

    bind: Callable[[Tensor, Any], Callable[[Tensor], Tensor]]
    """(float outputs, targets) -> the loss as a function of outputs only: (..., N, M) -> float64 (..., N)."""
    residual: Callable[[Tensor, Any], Tensor | None]
    """(float outputs, targets) -> gradient of the loss at the float outputs, float64 (N, M). None if it is zero."""
    root: Callable[[Tensor, Any], Callable[[Tensor], Tensor]] | None = None
    """(float outputs, targets) -> a linear map (R, N, M) -> (R, N, V) whose squares sum to the loss's second order.

    None: that of a softmax if there are classes; otherwise the criterion has none.
    """
    target: Callable[[Tensor, Any], Tensor] | None = None
    """(float logits, labels) -> the class probabilities that the Brier score uses, float64 (N, C). None without classes."""
    classes: Callable[[Tensor, Any], Tensor] | None = None
    """(float logits, labels) -> the right class of each sample (N,). None without classes."""
    needs_float_outputs: bool = True
    """Whether `bind` reads the float outputs. If not, fine-tuning does not need the float network."""
    needs_targets: bool = False
    """Whether it reads targets. If not, gradients are those of classes drawn from the float softmax."""
    name: str = ""
    """The criterion's name, for messages."""

    @property
    def offers(self) -> frozenset[str]:
        """What it offers to tile kinds (`TileKind.needs`): "curvature", "classes"."""
        has_classes = self.target is not None
        return frozenset({"curvature"} if self.root or has_classes else ()) | frozenset({"classes"} if has_classes else ())

    def of(self, float_outputs: Tensor, targets: Any) -> Callable[[Tensor], Tensor]:
        """The loss as a function of outputs only. Raises DataError without the targets that it needs."""
        self._check(targets)
        return self.bind(float_outputs, targets)

    def slope(self, float_outputs: Tensor, targets: Any) -> Tensor | None:
        """`residual`. Raises DataError without the targets that it needs."""
        self._check(targets)
        return self.residual(float_outputs, targets)

    def refuse_unfit(self, float_outputs: Tensor, targets: Any) -> None:
        """Tries a user-defined loss on a few samples.

        Raises:
            ConfigurationError: The loss or its curvature fails, or gives something else than expected.
            DataError: The targets that it needs are missing.
        """
        if "classes" not in self.offers:
            self.of(float_outputs, targets)(float_outputs)
            if self.root is not None:
                self.root(float_outputs, targets)(torch.zeros_like(float_outputs).unsqueeze(0))

    def brier(self, logits: Tensor, float_logits: Tensor, labels: Tensor | None) -> Tensor:
        """Squared distance between the softmax and what the criterion compares it with: the float network's, or the labels'.

        Σ_c (q_c − p_c)² of each sample, float64 (..., N), between 0 and 2 (Brier, "Verification of forecasts expressed in terms
        of probability", 1950). It is least where the criterion is least. It is bounded, so a few confident errors do not decide.
        For a criterion with classes.
        """
        self._check(labels)
        assert self.target is not None  # callers check `offers` first
        return (logits.double().softmax(-1) - self.target(float_logits, labels)).square().sum(-1)

    def hits(self, logits: Tensor, float_logits: Tensor, labels: Tensor | None) -> Tensor:
        """Whether the class of the largest logit is the right one: bool (..., N).

        Logits that are not finite are never right. For a criterion with classes.
        """
        self._check(labels)
        assert self.classes is not None
        return (logits.argmax(-1) == self.classes(float_logits, labels)) & logits.isfinite().all(-1)

    def _check(self, targets: Any) -> None:
        if self.needs_targets and targets is None:
            raise DataError(f"{self.name} needs labels and the images have none; use the criterion kl_to_float, which needs none")


def on_packed(
    name: str,
    loss: Callable[[Any, Any, Any], Tensor],
    curvature: Callable[[Any, Any], Callable[[Any], Any]] | None,
    needs_targets: bool,
    outputs: Outputs,
) -> PackedCriterion:
    """Functions of outputs in the network's own form, as functions of packed ones.

    Rows (R, N, M) are taken one by one. Outputs are float64, so that differences of a user-defined loss keep their digits.
    """
    subject = f"criterion {name}"

    def losses(flat: Tensor, float_outputs: Any, targets: Any) -> Tensor:
        """(N, M) -> (N,)."""
        return outputs.numbers(subject, loss, flat.double(), float_outputs, targets)

    def bind(float_outputs: Tensor, targets: Any) -> Callable[[Tensor], Tensor]:
        floats = outputs.unpacked(float_outputs.double())

        def of_rows(flat: Tensor) -> Tensor:
            rows = flat.reshape(-1, *flat.shape[-2:])
            return torch.stack([losses(row, floats, targets) for row in rows]).reshape(flat.shape[:-1])

        return of_rows

    @torch.inference_mode(False)
    @torch.enable_grad()
    def residual(float_outputs: Tensor, targets: Any) -> Tensor | None:
        at = outside_inference(float_outputs).double().requires_grad_()
        floats, targets = outputs.unpacked(at.detach()), outside_inference(targets)
        total = losses(at, floats, targets).sum()
        if not total.requires_grad:  # the loss has no gradient, such as a rank or a count
            return None
        gradient: Tensor = torch.autograd.grad(total, at, allow_unused=True, materialize_grads=True)[0]
        return gradient

    def root(float_outputs: Tensor, targets: Any) -> Callable[[Tensor], Tensor]:
        assert curvature is not None
        of_change = outputs.called(f"the curvature of {subject}", curvature, outputs.unpacked(float_outputs.double()), targets)

        def of_row(row: Tensor) -> Tensor:
            value = outputs.called(f"the curvature of {subject}", of_change, outputs.unpacked(row))
            leaves = tree_leaves(value)
            if not all(isinstance(leaf, Tensor) and leaf.shape[:1] == row.shape[:1] for leaf in leaves):
                raise ConfigurationError(
                    f"the curvature of {subject} does not give tensors with {len(row)} images first; expected "
                    "tensors (N, ...) whose squares sum to the second order of the loss"
                )
            return torch.cat([leaf.reshape(len(row), -1) for leaf in leaves], 1)

        def of_rows(flat: Tensor) -> Tensor:
            return torch.stack([of_row(row) for row in flat])

        return of_rows

    return PackedCriterion(bind, residual, root if curvature else None, needs_targets=needs_targets, name=name)
