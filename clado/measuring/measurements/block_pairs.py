"""Losses of two options of one block of layers."""

from clado.measuring.kinds.block_pairs import kind
from clado.measuring.measurements import pairs
from clado.measuring.plan import Tile
from clado.measuring.workbench import Array, Workbench


def measure(bench: Workbench, tile: Tile) -> Array:
    """(rows, K) sums of losses of the tile's rows with every later option of their block; NaN elsewhere."""
    return pairs.measure(bench, tile, kind)
