"""Per-sample losses of logits, float64, so that differences of nearly equal losses keep their digits."""

import math
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from clado.errors import ConfigurationError, DataError

CACHED = 2**19  # elements that are taken at a time on a CPU, whose cache then holds them from step to step
# where NumPy's eᶜ − 1 is vectorized, it takes a third of torch's time; elsewhere it is the slower one
NUMPY_IS_FASTER = sys.platform == "linux" and torch.backends.cpu.get_cpu_capability() == "AVX512"
NEEDS_LABELS = "cross_entropy needs labels and the images have none; use the criterion kl_to_float, which needs none"
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
    gap = log_p - logits.double().log_softmax(-1)
    return gap.mul_(log_p.exp()).sum(-1)


def _expm1(x: Tensor, out: Tensor) -> Tensor:
    """eˣ − 1 into `out`, float32, within two units in the last place."""
    if not NUMPY_IS_FASTER:
        return torch.expm1(x, out=out)
    with np.errstate(over="ignore", invalid="ignore"):  # as torch does
        np.expm1(x.numpy(), out=out.numpy())
    return out


def _kl_of_differences(float_logits: Tensor) -> Criterion:
    """`kl_to_float` as log(1 + Σ p (eᶜ − 1 − c)), where c = d − Σ p d and d is the difference of the logits: float32 elements
    that keep the digits of small losses, at half the time and less. Samples that are not finite this way (eᶜ may overflow), and
    logits with a gradient, go through `kl_to_float`. For a CPU: a GPU would wait for the check, and is fast enough in float64.
    """
    kind = torch.promote_types(float_logits.dtype, torch.float32)
    reference = float_logits.to(kind)
    p = float_logits.double().softmax(-1).to(kind)

    def excess(logits: Tensor) -> Tensor:
        c = logits - reference
        terms = p * c
        c -= terms.sum(-1, keepdim=True)
        return _expm1(c, out=terms).sub_(c).mul_(p).sum(-1)

    def criterion(logits: Tensor) -> Tensor:
        if logits.requires_grad:
            return kl_to_float(logits, float_logits)
        rows, at_once = logits.reshape(-1, *reference.shape), max(1, CACHED // reference.numel())
        parts = [excess(rows[k : k + at_once]) for k in range(0, len(rows), at_once)]
        found = (torch.cat(parts) if len(parts) > 1 else parts[0]).double().log1p_().clamp_(min=0.0).reshape(logits.shape[:-1])
        if math.isfinite(found.sum().item()):  # and so is each of them
            return found
        return torch.where(found.isfinite(), found, kl_to_float(logits, float_logits))

    return criterion


def bind(name: str, float_logits: Tensor, labels: Tensor | None) -> Criterion:
    """The criterion as a function of logits alone, for one batch whose float logits and labels are known."""
    if name == "kl_to_float":
        if float_logits.device.type == "cpu":
            return _kl_of_differences(float_logits)
        return lambda logits: kl_to_float(logits, float_logits)
    if name == "cross_entropy":
        if labels is None:
            raise DataError(NEEDS_LABELS)
        known = labels
        return lambda logits: cross_entropy(logits, known)
    raise ConfigurationError(f"unknown criterion {name!r}; expected kl_to_float or cross_entropy")


def brier(name: str, logits: Tensor, float_logits: Tensor, labels: Tensor | None) -> Tensor:
    """Squared distance between the softmax and what the criterion compares it with: the float network's, or that of the labels.

    Σ_c (q_c − p_c)² of each sample, float64 (..., N), between 0 and 2 (Brier, "Verification of forecasts expressed in terms of
    probability", 1950). Least where the criterion is least, and bounded where that is not: a few confident errors do not decide.
    """
    p = float_logits.double().softmax(-1)
    if name == "cross_entropy":
        if labels is None:
            raise DataError(NEEDS_LABELS)
        p = torch.nn.functional.one_hot(labels, p.shape[-1]).double()
    return (logits.double().softmax(-1) - p).square().sum(-1)


def hits(name: str, logits: Tensor, float_logits: Tensor, labels: Tensor | None) -> Tensor:
    """Whether the class of the largest logit is the float network's, or with `cross_entropy` the label: bool (..., N). Logits
    that are not finite hit nothing."""
    expected = float_logits.argmax(-1)
    if name == "cross_entropy":
        if labels is None:
            raise DataError(NEEDS_LABELS)
        expected = labels
    return (logits.argmax(-1) == expected) & logits.isfinite().all(-1)


def residual(name: str, float_logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """Gradient of the criterion at the float logits, float64 (N, C): p − onehot(y), None where it is zero (KL)."""
    if name == "kl_to_float":
        return None
    if labels is None:
        raise DataError(NEEDS_LABELS)
    p = float_logits.double().softmax(-1)
    return p - torch.nn.functional.one_hot(labels, p.shape[-1]).double()
