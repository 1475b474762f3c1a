"""Losses of the float network and of every option alone."""

import numpy as np

from clado.measuring.plan import Tile
from clado.measuring.sweep import each_option
from clado.measuring.workbench import Array, Workbench, to_numpy


def measure(bench: Workbench, tile: Tile) -> Array:
    """(1 + K,) sums of losses: of the float network, then of each option. Float options have the float network's loss."""
    sums = np.zeros(1 + bench.space.num_options)
    for part in bench.passes(tile.sample_block):
        criterion = part.loss(bench.packed_criterion)
        sums[0] += to_numpy(criterion(part.float_logits)).sum()
        for options, logits in each_option(bench, part):
            sums[[1 + option for option in options]] += to_numpy(criterion(logits)).sum(1)
    sums[[1 + option for option in bench.space.float_options]] = sums[0]
    return sums
