"""What is measured, and in which tiles: plans in integers. It makes all decisions and runs nothing. Imports no torch.

A *probe* is a partial assignment. A *tile* is the unit of work, of storage and of retry. It belongs to one sample block (a
range of sensitivity images). Each file in `kinds/` describes one kind of tile. Tiles of pairs hold a range of rows: the first
options of the pairs.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from clado.errors import ConfigurationError
from clado.measuring.kinds import tile_kind, tile_kinds
from clado.space import SearchSpace

NUM_VECTORS = 8
"""Random vectors of Hutchinson's estimate, in each sample block."""


@dataclass(frozen=True, order=True)
class Tile:
    """One unit of work."""

    kind: str
    """Name of its tile kind."""
    sample_block: int
    """Number of its sample block."""
    number: int = 0
    """Number of this row tile in its sample block. 0 if there is one tile."""
    first: int = 0
    """First row. 0 if the kind has no row tiles."""
    stop: int = 0
    """The row after the last one. 0 if the kind has no row tiles."""

    @property
    def rows(self) -> range:
        """Rows of the tile, which are options. Empty if the kind has no row tiles."""
        return range(self.first, self.stop)

    def __str__(self) -> str:
        rows = f", rows {self.first} to {self.stop - 1}" if self.rows else ""
        return f"the tile of {self.kind}, sample block {self.sample_block}{rows}"


@dataclass(frozen=True)
class Workload:
    """Multiply-accumulates of one image."""

    macs: int
    """Of the whole network."""
    suffix_macs: tuple[int, ...]
    """Of the part after the cut of each layer."""


@dataclass(frozen=True)
class Plan:
    """The tiles of a measurement."""

    space: SearchSpace
    """Layers and their candidates."""
    sample_blocks: tuple[tuple[int, int], ...]
    """(start, stop) ranges of the sensitivity set."""
    kinds: tuple[str, ...]
    """Names of the tile kinds that are measured."""
    rows_per_tile: int
    """Most rows of a row tile."""
    num_vectors: int = NUM_VECTORS
    """Random vectors that estimate each trace."""
    seed: int = 0
    """Seed of the random numbers for gradients."""

    @property
    def num_row_tiles(self) -> int:
        """Row tiles of one sample block."""
        return -(-self.space.num_options // self.rows_per_tile)

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """All tiles, sample block by sample block. Kinds without row tiles come first, because they are cheap."""
        kinds = [kind for kind in tile_kinds().values() if kind.name in self.kinds]
        blocks = {kind.name: range(kind.num_blocks(len(self.sample_blocks))) for kind in kinds}
        tiles = [Tile(kind.name, n) for kind in kinds if not kind.has_row_tiles for n in blocks[kind.name]]
        for kind in kinds:
            if kind.has_row_tiles:
                rows = range(self.num_row_tiles)
                tiles += [self.row_tile(kind.name, n, number) for n in blocks[kind.name] for number in rows]
        return tuple(tiles)

    def row_tile(self, kind: str, sample_block: int, number: int) -> Tile:
        """The `number`-th row tile of one sample block."""
        first = number * self.rows_per_tile
        return Tile(kind, sample_block, number, first, min(first + self.rows_per_tile, self.space.num_options))

    def num_images(self, sample_block: int) -> int:
        """Images of one sample block."""
        start, stop = self.sample_blocks[sample_block]
        return stop - start

    def evaluations(self, tile: Tile) -> int:
        """Number of probes that a tile measures on its sample block. A forward pass of the float network counts as one."""
        return tile_kind(tile.kind).evaluations(self, tile)

    def forward_images(self, tiles: Iterable[Tile]) -> int:
        """Σ over tiles of probes × images: the images that whole forward passes would take."""
        return sum(self.evaluations(tile) * self.num_images(tile.sample_block) for tile in tiles)

    def backward_images(self, tiles: Iterable[Tile]) -> int:
        """Σ over tiles of backward passes × images."""
        return sum(tile_kind(tile.kind).backwards(self) * self.num_images(tile.sample_block) for tile in tiles)

    def macs(self, tile: Tile, workload: Workload) -> int:
        """Multiply-accumulates that suffix execution of a tile needs, its stored prefixes included."""
        return tile_kind(tile.kind).macs(self, tile, workload) * self.num_images(tile.sample_block)

    def stored_bytes(self) -> int:
        """Bytes of all chunks before compression."""
        kinds, count = [tile_kind(kind) for kind in self.kinds], len(self.sample_blocks)
        return 8 * sum(kind.num_blocks(count) * math.prod(kind.shape(self.space)) for kind in kinds)


def sample_blocks(num_images: int, num_blocks: int) -> tuple[tuple[int, int], ...]:
    """`num_blocks` consecutive ranges that cover the images, as even as integers allow."""
    if not 1 <= num_blocks <= num_images:
        raise ConfigurationError(
            f"{num_images} images cannot be cut into {num_blocks} sample blocks; expected at least one image a block"
        )
    ends = [k * num_images // num_blocks for k in range(num_blocks + 1)]
    return tuple(zip(ends[:-1], ends[1:], strict=True))


def grown_sample_blocks(stored: Sequence[tuple[int, int]], num_images: int, num_blocks: int) -> tuple[tuple[int, int], ...]:
    """The sample blocks of a set of images that grew. Stored blocks stay, and new images are cut into blocks of about their size.

    If the stored blocks do not begin at the first image, or cover more images than there are, `num_blocks` new blocks are cut.
    """
    stored = tuple((start, stop) for start, stop in stored)
    fresh = sample_blocks(num_images, num_blocks)
    if len(stored) < num_blocks or stored[-1][1] > num_images:
        return fresh
    first = stored[num_blocks - 1][1]
    if stored[:num_blocks] != sample_blocks(first, num_blocks):
        return fresh
    last = stored[-1][1]
    added = num_images - last
    if not added:
        return stored
    new = sample_blocks(added, min(added, max(1, round(added * num_blocks / first))))
    return stored + tuple((last + start, last + stop) for start, stop in new)
