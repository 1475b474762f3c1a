"""KL divergence from the float network's softmax to this network's. Needs no labels.

Of dense outputs (N, C, ...) it is the mean over positions.
"""

import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clado.criteria import Criterion, Loss, PackedCriterion
from clado.criteria._classes import IGNORED, classes_last, softmax_root, weights

CACHED = 2**19  # elements at a time on a CPU, so that its cache holds them between steps
# if NumPy's eᶜ − 1 is vectorized, it takes a third of torch's time; otherwise it is slower
NUMPY_IS_FASTER = sys.platform == "linux" and torch.backends.cpu.get_cpu_capability() == "AVX512"


def kl_to_float(logits: Tensor, float_logits: Tensor) -> Tensor:
    """KL(softmax of the float network ‖ softmax of this one) of each sample: (..., N, C), (N, C) -> float64 (..., N).

    It needs no labels. It is zero for the float network, and so is its gradient there (ZeroQ, arXiv 2001.00281, equation 3).
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


def _kl_of_differences(float_logits: Tensor) -> Loss:
    """`kl_to_float` as log(1 + Σ p (eᶜ − 1 − c)), where c = d − Σ p d and d is the difference of the logits.

    Float32 elements keep the digits of small losses here, and take half the time or less. `kl_to_float` computes samples that
    are not finite in this form (eᶜ may overflow), and logits with a gradient. This form is for a CPU. A GPU would have to wait
    for the check, and is fast enough in float64.
    """
    dtype = torch.promote_types(float_logits.dtype, torch.float32)
    reference = float_logits.to(dtype)
    p = float_logits.double().softmax(-1).to(dtype)

    def excess(logits: Tensor) -> Tensor:
        c = logits - reference
        terms = p * c
        c -= terms.sum(-1, keepdim=True)
        return _expm1(c, out=terms).sub_(c).mul_(p).sum(-1)

    def loss(logits: Tensor) -> Tensor:
        if logits.requires_grad:
            return kl_to_float(logits, float_logits)
        rows, at_once = logits.reshape(-1, *reference.shape), max(1, CACHED // reference.numel())
        parts = [excess(rows[k : k + at_once]) for k in range(0, len(rows), at_once)]
        losses = (torch.cat(parts) if len(parts) > 1 else parts[0]).double().log1p_().clamp_(min=0.0).reshape(logits.shape[:-1])
        if math.isfinite(losses.sum().item()):  # and so is each of them
            return losses
        return torch.where(losses.isfinite(), losses, kl_to_float(logits, float_logits))

    return loss


def _bind(float_logits: Tensor, labels: Tensor | None) -> Loss:
    if float_logits.device.type == "cpu":
        return _kl_of_differences(float_logits)
    return lambda logits: kl_to_float(logits, float_logits)


def over_classes(ignore_index: int = IGNORED) -> Criterion:
    """The criterion over the class axis of dense outputs (N, C, ...).

    A sample's loss is the mean over its positions, and 0 if all of them are ignored. Targets are not needed.

    Args:
        ignore_index: Positions with this target do not count, where the targets are class numbers (N, ...).
    """

    def loss(outputs: Tensor, float_outputs: Tensor, targets: Any) -> Tensor:
        logits, floats = classes_last(outputs, "kl_to_float"), classes_last(float_outputs, "kl_to_float")
        share = weights(targets, outputs, ignore_index)
        return torch.where(share > 0, kl_to_float(logits, floats) * share, 0.0).sum(1)

    def curvature(float_outputs: Tensor, targets: Any) -> Loss:
        return softmax_root(float_outputs, targets, ignore_index)

    return Criterion(loss, curvature)


criterion = replace(
    over_classes(),
    on_logits=PackedCriterion(
        bind=_bind,
        residual=lambda float_logits, labels: None,
        target=lambda float_logits, labels: float_logits.double().softmax(-1),
        classes=lambda float_logits, labels: float_logits.argmax(-1),
    ),
)
