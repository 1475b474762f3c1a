"""Cross entropy with the labels: −log p_y. Needs labels."""

import torch
from torch import Tensor

from clado.criteria import Criterion, Loss


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log p_y of each sample: logits (..., N, C), labels (N,) -> float64 (..., N)."""
    log_p = logits.double().log_softmax(-1)
    return -log_p.gather(-1, labels.expand(log_p.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def _bind(float_logits: Tensor, labels: Tensor | None) -> Loss:
    return lambda logits: cross_entropy(logits, _given(labels))


def _target(float_logits: Tensor, labels: Tensor | None) -> Tensor:
    return torch.nn.functional.one_hot(_given(labels), float_logits.shape[-1]).double()


def _residual(float_logits: Tensor, labels: Tensor | None) -> Tensor:
    """The gradient in the logits: p − onehot(y)."""
    return float_logits.double().softmax(-1) - _target(float_logits, labels)


def _given(labels: Tensor | None) -> Tensor:
    assert labels is not None  # `clado.criteria` refuses images without labels
    return labels


criterion = Criterion(
    bind=_bind,
    residual=_residual,
    target=_target,
    classes=lambda float_logits, labels: _given(labels),
    needs_labels=True,
    needs_float_logits=False,
)
