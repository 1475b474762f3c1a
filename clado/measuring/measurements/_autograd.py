"""What measurements by gradients share.

Random numbers come from the seed and the sample block alone, so that they do not depend on the worker, nor on its device. Errors
are those of the weights as they are deployed, in the network as it is (batch norms not folded).
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from clado.measuring.plan import Tile
from clado.measuring.workbench import Workbench


def random_numbers(bench: Workbench, tile: Tile) -> np.random.Generator:
    """Random numbers of a tile: every worker draws the same."""
    return np.random.default_rng([bench.seed, tile.sample_block])


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the tensors that gradients are taken in."""
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]
