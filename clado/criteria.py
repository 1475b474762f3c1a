"""Per-sample losses of logits. Log-softmax in float64, so that differences of nearly equal losses keep their digits."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from clado.errors import ConfigurationError, DataError

CriterionName = Literal["kl_to_float", "cross_entropy"]
Criterion = Callable[[Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """−log p_y of each sample: logits (..., N, C), labels (N,) -> float64 (..., N)."""
    log_p = logits.double().log_softmax(-1)
    return -log_p.gather(-1, labels.expand(log_p.shape[:-1]).unsqueeze(-1)).squeeze(-1)


def kl_to_float(logits: Tensor, float_logits: Tensor) -> Tensor:
    """KL(softmax of the float network ‖ softmax of this one) of each sample: (..., N, C), (N, C) -> float64 (..., N).

    Label-free, zero for the float network, and its gradient there is zero too (method: ZeroQ, arXiv 2001.00281, equation 3).
    """
    log_p = float_logits.double().log_softmax(-1)
    return _kl(logits, log_p, log_p.exp())


def _kl(logits: Tensor, log_p: Tensor, p: Tensor) -> Tensor:
    gap = log_p - logits.double().log_softmax(-1)
    return gap.mul_(p).sum(-1)


def bind(name: str, float_logits: Tensor, labels: Tensor | None) -> Criterion:
    """The criterion as a function of logits alone, for one batch whose float logits and labels are known."""
    if name == "kl_to_float":
        log_p = float_logits.double().log_softmax(-1)
        p = log_p.exp()
        return lambda logits: _kl(logits, log_p, p)
    if name == "cross_entropy":
        if labels is None:
            raise DataError(
                "cross_entropy needs labels and the images have none; use the criterion kl_to_float, which needs none"
            )
        known = labels
        return lambda logits: cross_entropy(logits, known)
    raise ConfigurationError(f"unknown criterion {name!r}; expected kl_to_float or cross_entropy")


def residual(name: str, float_logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Gradient of the criterion at the float logits, float64 (N, C): p − onehot(y), None where it is zero (KL)."""
    if name == "kl_to_float":
        return None
    if labels is None:
        raise DataError("cross_entropy needs labels and the images have none; use the criterion kl_to_float, which needs none")
    p = float_logits.double().softmax(-1)
    return p - torch.nn.functional.one_hot(labels, p.shape[-1]).double()
