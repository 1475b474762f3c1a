"""Losses of every option with every option of a later layer."""

import numpy as np
from numpy.typing import NDArray

from clado.measuring.pair_kind import PairKind
from clado.measuring.plan import Tile
from clado.space import SearchSpace


class Pairs(PairKind):
    """All pairs of options of different layers."""

    name = "pairs"
    title = "pairs of options"
    order = 30

    def layer_groups(self, space: SearchSpace) -> tuple[tuple[int, ...], ...]:
        """All layers are one group."""
        return (tuple(range(space.num_layers)),)

    def last_row(self, tile: Tile, mask: NDArray[np.bool_]) -> int | None:
        """The tile's last row."""
        return tile.rows[-1]


kind = Pairs()
