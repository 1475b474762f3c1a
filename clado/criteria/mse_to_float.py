"""Mean squared difference from the float network's outputs, over all values of a sample. For outputs of any form."""

from collections.abc import Callable
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from clado.criteria import Criterion


def flattened(outputs: Any) -> Tensor:
    """All values of outputs of any form, float64 (N, M)."""
    return torch.cat([leaf.double().reshape(len(leaf), -1) for leaf in tree_leaves(outputs)], 1)


def mse_to_float(outputs: Any, float_outputs: Any, targets: Any) -> Tensor:
    """Mean of (z − f)² over the values of each sample, float64 (N,)."""
    return (flattened(outputs) - flattened(float_outputs)).square().mean(1)


def curvature(float_outputs: Any, targets: Any) -> Callable[[Any], Tensor]:
    """The Hessian is 2 / M times the identity."""

    def root(change: Any) -> Tensor:
        u = flattened(change)
        return u * sqrt(2 / u.shape[1])

    return root


criterion = Criterion(mse_to_float, curvature)
