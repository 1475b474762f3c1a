"""Dense outputs (N, C, ...): classes are on axis 1, and each index of the later axes is a position."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clado.errors import ConfigurationError, DataError

IGNORED = -100
"""Target of positions that do not count, as in torch."""


def classes_last(outputs: Any, name: str) -> Tensor:
    """Outputs (N, C, ...) as (N, positions, C).

    Raises:
        ConfigurationError: The outputs are not a single tensor with a class axis.
    """
    if not isinstance(outputs, Tensor) or outputs.ndim < 2:
        form = f"a tensor {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise ConfigurationError(
            f"{name} needs one tensor (N, C, ...) with classes on axis 1, and the network returns {form}; expected mse_to_float, "
            "or a callable (outputs, float_outputs, targets) -> loss of each sample that takes its part of the outputs"
        )
    return outputs.flatten(2).transpose(1, 2) if outputs.ndim > 2 else outputs.unsqueeze(1)


def weights(targets: Any, outputs: Tensor, ignore_index: int) -> Tensor:
    """The share (N, positions) of each position in its sample's mean: 0 where the target is ignored, else equal parts of 1.

    Targets that are not class numbers (N, ...) ignore nothing.
    """
    shape = (len(outputs), *outputs.shape[2:])
    counted = torch.ones(shape, dtype=torch.float64, device=outputs.device)
    if isinstance(targets, Tensor) and targets.shape == shape:
        counted = (targets != ignore_index).double()
    counted = counted.reshape(len(outputs), -1)
    return counted / counted.sum(1, keepdim=True).clamp_min(1.0)


def class_numbers(targets: Any, outputs: Tensor, ignore_index: int) -> Tensor:
    """Targets (N, ...) as (N, positions), with class 0 where they are ignored.

    Raises:
        DataError: They are not class numbers for the outputs.
    """
    shape, num_classes = (len(outputs), *outputs.shape[2:]), outputs.shape[1]
    if not isinstance(targets, Tensor) or targets.shape != shape or targets.is_floating_point():
        actual = f"{tuple(targets.shape)} of {targets.dtype}" if isinstance(targets, Tensor) else type(targets).__name__
        raise DataError(f"cross_entropy got targets {actual}; expected class numbers {shape} of torch.int64")
    numbers = torch.where(targets == ignore_index, 0, targets).long()
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high >= num_classes:
        raise DataError(
            f"cross_entropy got targets from {low} to {high}; expected 0 to {num_classes - 1}, or {ignore_index} for what "
            "is ignored: clado.criteria.cross_entropy.over_classes(ignore_index=...)"
        )
    return numbers.reshape(len(outputs), -1)


def softmax_root(float_outputs: Tensor, targets: Any, ignore_index: int) -> Callable[[Tensor], Tensor]:
    """Root of Σ_i w_i (diag(q_i) − q_i q_iᵀ) over positions i: √(w q) (u − qᵀu), with the softmax q of the float outputs."""
    q = classes_last(float_outputs, "softmax").double().softmax(-1)
    scale = (q * weights(targets, float_outputs, ignore_index).unsqueeze(-1)).sqrt()

    def root(change: Tensor) -> Tensor:
        u = classes_last(change, "softmax")
        return scale * (u - (q * u).sum(-1, keepdim=True))

    return root
