"""Measures tiles. There is one module for each tile kind, of the same name as its file in `kinds/`.

It has the function

measure(bench: Workbench, tile: Tile) -> Array
    float64 sums over the tile's sample block, of the kind's shape; only the tile's rows where the kind has row tiles
"""

from clado.measuring.plan import Tile
from clado.measuring.workbench import Array, Workbench
from clado.plugins import load


def measure_tile(bench: Workbench, tile: Tile) -> Array:
    """Measures one tile.

    Args:
        bench: Holds layers without corrections where the kind is uncorrected, else the layers that are deployed.
        tile: What is measured.

    Returns:
        Float64 sums over the tile's sample block, of the kind's shape. Entries that the kind does not measure are NaN.
    """
    sums: Array = load("measurements", tile.kind).measure(bench, tile)
    return sums
