"""Losses of every option with every option of a later layer of the same block of layers. Most entries are NaN."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from clado.measuring.pair_kind import PairKind
from clado.measuring.plan import Plan, Tile
from clado.space import SearchSpace


class BlockPairs(PairKind):
    """Pairs of options of different layers of one block (`SearchSpace.blocks`)."""

    name = "block_pairs"
    title = "pairs of options within a block"
    order = 50
    contained_in = "pairs"

    def layer_groups(self, space: SearchSpace) -> tuple[tuple[int, ...], ...]:
        """Each block is a group."""
        return space.blocks

    def last_row(self, tile: Tile, mask: NDArray[np.bool_]) -> int | None:
        """The last row that has a pair."""
        rows = np.flatnonzero(mask.any(axis=1))
        return tile.rows[int(rows[-1])] if len(rows) else None

    def terms(self, plan: Plan) -> dict[str, Any]:
        """The blocks, which the settings may give."""
        return {"layer_blocks": [list(block) for block in plan.space.blocks]}


kind = BlockPairs()
