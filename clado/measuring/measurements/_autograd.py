"""Common parts of measurements by gradients.

Random numbers depend only on the seed and the sample block, not on the worker or its device. Errors are those of the deployed
weights, in the network without folded batch norms.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from clado.measuring.plan import Tile
from clado.measuring.workbench import Workbench


def random_numbers(bench: Workbench, tile: Tile) -> np.random.Generator:
    """The random numbers of a tile. Every worker draws the same ones."""
    return np.random.default_rng([bench.seed, tile.sample_block])


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors, for gradients with respect to them."""
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]
