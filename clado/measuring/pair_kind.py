"""Common parts of the kinds of pairs. Rows are the first options of the pairs, columns the second ones."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from clado.measuring.kinds import TileKind, suffixes
from clado.measuring.plan import Plan, Tile, Workload
from clado.space import SearchSpace


class PairKind(TileKind, ABC):
    """Losses of two options at a time, of different layers of one group: K × K values a sample block.

    The row's layer is the earlier one. Entries of other pairs are NaN. Pairs with a layer in float are not measured,
    because they have no interaction.
    """

    dimensions = ("option", "later_option")
    has_row_tiles = True

    @abstractmethod
    def layer_groups(self, space: SearchSpace) -> Sequence[tuple[int, ...]]:
        """Groups of layers (ascending indices) within which layers are combined."""

    @abstractmethod
    def last_row(self, tile: Tile, mask: NDArray[np.bool_]) -> int | None:
        """The last option that the float run of a tile must reach, to compute its cost. None if there is none."""

    def shape(self, space: SearchSpace) -> tuple[int, ...]:
        """(K, K)."""
        return space.num_options, space.num_options

    def later_layers(self, space: SearchSpace, layer: int) -> list[int]:
        """Layers after `layer` in its group."""
        group = next(group for group in self.layer_groups(space) if layer in group)
        return [later for later in group if later > layer]

    def mask(self, space: SearchSpace, rows: range | None = None) -> NDArray[np.bool_]:
        """(rows, K): True for each pair that is measured. Default: all rows."""
        rows = range(space.num_options) if rows is None else rows
        mask = np.zeros((len(rows), space.num_options), dtype=bool)
        for place, row in enumerate(rows):
            if space.options[row].bits is None:
                continue
            for layer in self.later_layers(space, space.options[row].layer):
                mask[place, space.offsets[layer] : space.offsets[layer + 1]] = True
        mask[:, list(space.float_options)] = False
        return mask

    def evaluations(self, plan: Plan, tile: Tile) -> int:
        """Pairs of the tile's rows."""
        return int(self.mask(plan.space, tile.rows).sum())

    def macs(self, plan: Plan, tile: Tile, workload: Workload) -> int:
        """Suffixes of all pairs, the prefixes of their rows, and the float run as far as the last row's layer."""
        space = plan.space
        behind, mask = suffixes(space, workload), self.mask(space, tile.rows)
        per_image = 0
        for row, pairs in zip(tile.rows, mask, strict=True):
            if pairs.any():
                columns = np.flatnonzero(pairs)
                per_image += behind[row] - behind[columns[-1]]  # the stored prefix, carried to the last cut
                per_image += behind[columns].sum()
        last = self.last_row(tile, mask)
        if last is not None:
            per_image += workload.macs - (*workload.suffix_macs, 0)[space.options[last].layer + 1]
        return int(per_image)
