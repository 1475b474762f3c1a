"""One minus the cosine of the angle to the float network's outputs. It ignores a common factor. For outputs of any form."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from clado.criteria import Criterion
from clado.criteria.mse_to_float import flattened


def cosine_to_float(outputs: Any, float_outputs: Any, targets: Any) -> Tensor:
    """1 − cos of each sample, float64 (N,). It is computed as half the squared distance of the unit vectors, to keep digits."""
    gap: Tensor = normalize(flattened(outputs)) - normalize(flattened(float_outputs))
    return gap.square().sum(1) / 2


def curvature(float_outputs: Any, targets: Any) -> Callable[[Any], Tensor]:
    """The Hessian at the float outputs f is (I − f fᵀ / ‖f‖²) / ‖f‖²."""
    floats = flattened(float_outputs)
    unit: Tensor = normalize(floats)
    length: Tensor = torch.linalg.vector_norm(floats, dim=1, keepdim=True)

    def root(change: Any) -> Tensor:
        u = flattened(change)
        return (u - (unit * u).sum(1, keepdim=True) * unit) / length

    return root


criterion = Criterion(cosine_to_float, curvature)
