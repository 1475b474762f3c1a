"""Cross entropy with the labels: −log p_y. Needs labels. Of dense outputs (N, C, ...) it is the mean over positions."""

from dataclasses import replace

import torch
from torch import Tensor

from clado.criteria import Criterion, Loss, PackedCriterion
from clado.criteria._classes import IGNORED, class_numbers, classes_last, softmax_root, weights


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log p_y of each sample: logits (..., N, C), labels (N,) -> float64 (..., N)."""
    log_p = logits.double().log_softmax(-1)
    return -log_p.gather(-1, labels.expand(log_p.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def over_classes(ignore_index: int = IGNORED) -> Criterion:
    """The criterion over the class axis of dense outputs (N, C, ...), with class numbers (N, ...) as targets.

    A sample's loss is the mean over its positions, and 0 if all of them are ignored.

    Args:
        ignore_index: Positions with this target do not count.
    """

    def loss(outputs: Tensor, float_outputs: Tensor, targets: Tensor) -> Tensor:
        logits, numbers = classes_last(outputs, "cross_entropy"), class_numbers(targets, outputs, ignore_index)
        share = weights(targets, outputs, ignore_index)
        losses = -logits.log_softmax(-1).gather(-1, numbers.unsqueeze(-1)).squeeze(-1)
        return torch.where(share > 0, losses * share, 0.0).sum(1)

    def curvature(float_outputs: Tensor, targets: Tensor) -> Loss:
        return softmax_root(float_outputs, targets, ignore_index)

    return Criterion(loss, curvature, needs_targets=True)


def _bind(float_logits: Tensor, labels: Tensor | None) -> Loss:
    return lambda logits: cross_entropy(logits, _given(labels))


def _target(float_logits: Tensor, labels: Tensor | None) -> Tensor:
    return torch.nn.functional.one_hot(_given(labels), float_logits.shape[-1]).double()


def _residual(float_logits: Tensor, labels: Tensor | None) -> Tensor:
    """The gradient in the logits: p − onehot(y)."""
    return float_logits.double().softmax(-1) - _target(float_logits, labels)


def _given(labels: Tensor | None) -> Tensor:
    assert labels is not None  # `PackedCriterion` refuses images without labels
    return labels


criterion = replace(
    over_classes(),
    on_logits=PackedCriterion(
        bind=_bind,
        residual=_residual,
        target=_target,
        classes=lambda float_logits, labels: _given(labels),
        needs_float_outputs=False,
    ),
)
