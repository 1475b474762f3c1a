"""Tile kinds: what a tile measures, its shape and its cost. Uses integers and NumPy, no torch.

A tile kind is two files of the same name. `kinds/NAME.py` holds `kind`, an object of a subclass of `TileKind`.
`measurements/NAME.py` holds `measure(bench, tile)`. To add a kind, add both files. No other file lists the kinds.
"""

from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from clado.errors import ConfigurationError
from clado.plugins import available, load, nearest
from clado.space import SearchSpace

if TYPE_CHECKING:
    from clado.measuring.plan import Plan, Tile, Workload


class TileKind:
    """One kind of tile. By default it measures the float network, then every option alone, by forward passes."""

    name: ClassVar[str]
    """Name of the kind's two files and of its group in the store."""

    title: ClassVar[str] = ""
    """What it measures, in words for `clado plan`; by default nothing but its name is shown."""

    order: ClassVar[int]
    """Kinds with a smaller number come first in the plan and in the store."""

    dimensions: ClassVar[tuple[str, ...]] = ("probe",)
    """Names of the dimensions of `shape`, for readers of the store."""

    has_row_tiles: ClassVar[bool] = False
    """Whether a sample block is cut into tiles of a few rows. Such tiles come after all others."""

    is_uncorrected: ClassVar[bool] = False
    """Whether its layers are rounded to nearest, without the corrections of the run."""

    contained_in: ClassVar[str | None] = None
    """Another kind that contains the same numbers. If it is measured, this kind need not be."""

    needs: ClassVar[str | None] = None
    """What the criterion must offer: "curvature", or "classes" of logits. None: only the loss."""

    def shape(self, space: SearchSpace) -> tuple[int, ...]:
        """Shape of the sums of one sample block. K is the number of options."""
        return (1 + space.num_options,)

    def num_blocks(self, sample_blocks: int) -> int:
        """How many sample blocks are measured: the first ones, by default all."""
        return sample_blocks

    def terms(self, plan: "Plan") -> dict[str, Any]:
        """What the sums depend on in addition to the store's identity, as plain data. The store keeps it with the sums."""
        return {}

    def evaluations(self, plan: "Plan", tile: "Tile") -> int:
        """Number of probes that a tile measures. A forward pass of the float network counts as one."""
        return 1 + len(plan.space.quantized_options)

    def backwards(self, plan: "Plan") -> int:
        """Backward passes that a tile takes."""
        return 0

    def macs(self, plan: "Plan", tile: "Tile", workload: "Workload") -> int:
        """Multiply-accumulates of one image that suffix execution of a tile needs, its stored prefixes included."""
        return int(workload.macs + suffixes(plan.space, workload)[list(plan.space.quantized_options)].sum())


def suffixes(space: SearchSpace, workload: "Workload") -> "np.ndarray[Any, np.dtype[Any]]":
    """(K,) multiply-accumulates after the cut of each option's layer, as Python integers of any size."""
    return np.array([workload.suffix_macs[option.layer] for option in space.options], dtype=object)


@cache
def tile_kinds() -> dict[str, TileKind]:
    """Every tile kind by name, in their order."""
    kinds: list[TileKind] = [load("kinds", name) for name in available("kinds")]
    return {kind.name: kind for kind in sorted(kinds, key=lambda kind: kind.order)}


def tile_kind(name: str) -> TileKind:
    """A tile kind by name.

    Raises:
        ConfigurationError: No kind has this name.
    """
    kinds = tile_kinds()
    if name not in kinds:
        raise ConfigurationError(f"unknown tile kind {name!r}; expected one of {', '.join(kinds)}{nearest(name, tuple(kinds))}")
    return kinds[name]
