"""What has to be measured, and in which tiles: plans in integers. Decides everything; runs nothing; imports no torch.

A *probe* is a partial assignment. A *tile* is the unit of work, of storage and of retry: one sample block, and for pairs a
range of rows (first options of the pairs).

    singles   loss of the float network and of every option alone                              1 + K values a block
    pairs     loss of every option of the tile's rows with every option of a later layer       rows × K values
    block_pairs   the same, of options of one block of layers only (`SearchSpace.blocks`)      rows × K values, most NaN
    gram      the same losses, and Gram matrices of the logits' changes, T of them             (2 + TK) × (1 + K) values a block
    gradients     squared first-order changes of each sample's log-likelihood (`gradients.py`) 2 × (1 + K) values a block
    plain_singles singles of layers rounded to nearest, without corrections                    1 + K values a block
    trace         Hessian traces times squared errors of every option (`gradients.py`)         1 + K values a block
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from clado.errors import ConfigurationError
from clado.space import SearchSpace

Kind = Literal["singles", "plain_singles", "pairs", "gram", "block_pairs", "gradients", "trace"]
KINDS: tuple[Kind, ...] = ("singles", "plain_singles", "pairs", "gram", "block_pairs", "gradients", "trace")
OF_PAIRS: tuple[Kind, ...] = ("pairs", "block_pairs")
OF_GRADIENTS: tuple[Kind, ...] = ("gradients", "trace")
MIN_BATCH, MAX_BATCH = 8, 512
NUM_VECTORS = 8  # of Hutchinson's estimate, in each sample block
TEMPERATURES = (1, 2, 4, 8)  # of the softmax that a Gram matrix is taken at; 1 is the float network's own


@dataclass(frozen=True, order=True)
class Tile:
    """One unit of work: rows `first .. stop − 1` are options (kinds of pairs only), `number` counts the row tiles of a block."""

    kind: Kind
    block: int
    number: int = 0
    first: int = 0
    stop: int = 0

    def __str__(self) -> str:
        rows = f", rows {self.first} to {self.stop - 1}" if self.kind == "pairs" else ""
        return f"the tile of {self.kind}, block {self.block}{rows}"


@dataclass(frozen=True)
class Workload:
    """Multiply-accumulates of one image: of the whole network, and behind the cut of each layer (`suffix_macs`)."""

    macs: int
    suffix_macs: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """The tiles of a measurement. `blocks` are (start, stop) ranges of the sensitivity set; `num_vectors` random vectors estimate
    each trace, and `seed` seeds what is drawn for gradients."""

    space: SearchSpace
    blocks: tuple[tuple[int, int], ...]
    kinds: tuple[Kind, ...]
    rows_per_tile: int
    num_vectors: int = NUM_VECTORS
    seed: int = 0

    @property
    def num_row_tiles(self) -> int:
        """Row tiles of one sample block of pairs."""
        return -(-self.space.num_options // self.rows_per_tile)

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """All tiles: the cheap kinds first, then pairs, block by block."""
        tiles: list[Tile] = []
        for kind in KINDS:
            if kind in self.kinds and kind not in OF_PAIRS:
                tiles += [Tile(kind, block) for block in range(len(self.blocks))]
        for kind in OF_PAIRS:
            if kind in self.kinds:
                numbers = range(self.num_row_tiles)
                tiles += [self.pair_tile(block, number, kind) for block in range(len(self.blocks)) for number in numbers]
        return tuple(tiles)

    def pair_tile(self, block: int, number: int, kind: Kind = "pairs") -> Tile:
        """The `number`-th row tile of one block."""
        first = number * self.rows_per_tile
        return Tile(kind, block, number, first, min(first + self.rows_per_tile, self.space.num_options))

    def shape(self, kind: Kind) -> tuple[int, ...]:
        """Shape of what is kept of a kind for one sample block."""
        k = self.space.num_options
        if kind in OF_PAIRS:
            return k, k
        return {"gram": (2 + len(TEMPERATURES) * k, 1 + k), "gradients": (2, 1 + k)}.get(kind, (1 + k,))

    def terms(self, kind: Kind) -> dict[str, Any]:
        """What the numbers of a kind depend on beside the store's identity: plain data, kept beside them."""
        if kind == "block_pairs":
            return {"layer_blocks": [list(block) for block in self.space.blocks]}
        if kind == "gram":
            return {"rows": ["losses", "first order", *(f"gram at {t:g}" for t in TEMPERATURES)]}
        if kind == "gradients":
            return {"seed": self.seed}
        return {"seed": self.seed, "num_vectors": self.num_vectors} if kind == "trace" else {}

    def evaluations(self, tile: Tile) -> int:
        """Probes that a tile measures on its sample block; a forward of the float network counts as one."""
        if tile.kind in OF_GRADIENTS:
            return 1
        return int(self._pairs(tile).sum()) if tile.kind in OF_PAIRS else 1 + self.space.num_options

    def _pairs(self, tile: Tile) -> NDArray[np.bool_]:
        """(rows, K): True for each pair that a tile measures."""
        return pair_mask(self.space, tile.kind, range(tile.first, tile.stop))

    def forward_images(self, tiles: Iterable[Tile]) -> int:
        """Σ over tiles of probes × images: what whole forwards would push through the network."""
        return sum(self.evaluations(tile) * self.block_images(tile.block) for tile in tiles)

    def backwards(self, tile: Tile) -> int:
        """Backward passes of its sample block that a tile takes."""
        return {"gradients": 1, "trace": 1 + self.num_vectors}.get(tile.kind, 0)

    def backward_images(self, tiles: Iterable[Tile]) -> int:
        """Σ over tiles of backward passes × images."""
        return sum(self.backwards(tile) * self.block_images(tile.block) for tile in tiles)

    def block_images(self, block: int) -> int:
        """Images of one block."""
        start, stop = self.blocks[block]
        return stop - start

    def macs(self, tile: Tile, workload: Workload) -> int:
        """Multiply-accumulates that suffix execution of a tile needs, its stored prefixes included."""
        if tile.kind in OF_GRADIENTS:
            # a backward pass multiplies twice as much as a forward pass, one through both of them twice as much again
            passes = 1 + (2 if tile.kind == "gradients" else 2 + 4 * self.num_vectors)
            return passes * workload.macs * self.block_images(tile.block)
        suffix = (*workload.suffix_macs, 0)
        behind = np.array([suffix[option.layer] for option in self.space.options], dtype=object)  # integers of any size
        if tile.kind not in OF_PAIRS:
            return int(workload.macs + behind.sum()) * self.block_images(tile.block)
        per_image, pairs = 0, self._pairs(tile)
        for row, wanted in enumerate(pairs, tile.first):
            if wanted.any():
                columns = np.flatnonzero(wanted)
                per_image += behind[row] - behind[columns[-1]]  # the stored prefix, carried to the last cut
                per_image += behind[columns].sum()
        reached = range(len(pairs)) if tile.kind == "pairs" else np.flatnonzero(pairs.any(axis=1))
        if len(reached):  # the float run as far as the last row's layer
            per_image += workload.macs - suffix[self.space.options[tile.first + int(reached[-1])].layer + 1]
        return int(per_image) * self.block_images(tile.block)

    def stored_bytes(self) -> int:
        """Bytes of all chunks before compression."""
        return 8 * len(self.blocks) * sum(math.prod(self.shape(kind)) for kind in self.kinds)


def later_layers(space: SearchSpace, kind: Kind, layer: int) -> Sequence[int]:
    """Layers that a kind of pairs combines a layer with: all behind it, or those of its block."""
    if kind == "pairs":
        return range(layer + 1, space.num_layers)
    block = next(block for block in space.blocks if layer in block)
    return [j for j in block if j > layer]


def pair_mask(space: SearchSpace, kind: Kind, rows: range | None = None) -> NDArray[np.bool_]:
    """(rows, K): True where row and column are options that a kind of pairs combines, the row's layer first; default all rows."""
    rows = range(space.num_options) if rows is None else rows
    mask = np.zeros((len(rows), space.num_options), dtype=bool)
    for place, row in enumerate(rows):
        for layer in later_layers(space, kind, space.options[row].layer):
            mask[place, space.offsets[layer] : space.offsets[layer + 1]] = True
    return mask


def sample_blocks(num_images: int, num_blocks: int) -> tuple[tuple[int, int], ...]:
    """`num_blocks` consecutive ranges that cover the images, as even as integers allow."""
    if not 1 <= num_blocks <= num_images:
        raise ConfigurationError(
            f"{num_images} images cannot be cut into {num_blocks} sample blocks; expected at least one image a block"
        )
    ends = [k * num_images // num_blocks for k in range(num_blocks + 1)]
    return tuple(zip(ends[:-1], ends[1:], strict=True))


def grown_blocks(stored: Sequence[tuple[int, int]], num_images: int, num_blocks: int) -> tuple[tuple[int, int], ...]:
    """The blocks of a set of images that grew: the stored ones stay, and further images are cut into blocks of about their size.

    A fresh cut into `num_blocks` where the stored blocks do not begin with one, or cover more images than there are.
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
    further = sample_blocks(added, min(added, max(1, round(added * num_blocks / first))))
    return stored + tuple((last + start, last + stop) for start, stop in further)


@dataclass(frozen=True)
class Batching:
    """How images travel: a sample block in passes of at most `images_per_pass`, and `batch_images[i]` in one run resumed at
    layer i (rows stacked). `working_bytes` is what one such run may take beside the stored prefixes."""

    images_per_pass: int
    batch_images: tuple[int, ...]
    working_bytes: int


def batching(
    alive_bytes: Sequence[int],
    peak_bytes: Sequence[int],
    images_per_block: int,
    batch_images: int | None = None,
    limit_bytes: int | None = None,
    cache_bytes: int = 32 * 10**6,
    most: int = MAX_BATCH,
) -> Batching:
    """The batching for values of `alive_bytes[i]` an image at the cut before layer i, and `peak_bytes[i]` from there on.

    A run is fastest while its values stay in the cache and its batch is large, so by default a batch is what `cache_bytes` hold
    (32 MB: measured, tests/benchmarks/MEASURE.md), within 8 and `most`, and a pass at least. A run takes a quarter of
    `limit_bytes` at most: operators' own buffers are as large as their values again, and stored prefixes need the rest.
    ConfigurationError where one image does not fit.
    """
    if batch_images is not None and batch_images < 1:
        raise ConfigurationError(f"batch_images is {batch_images}; expected at least 1")
    sizes = [max(1, alive + peak) for alive, peak in zip(alive_bytes, peak_bytes, strict=True)]
    fits = [most if limit_bytes is None else limit_bytes // (4 * size) for size in sizes]
    if min(fits) < 1:
        raise ConfigurationError(
            f"the memory limit is too small for a batch of one image: needed {4 * max(sizes) / 1e6:.1f} MB, available "
            f"{(limit_bytes or 0) / 1e6:.1f} MB; raise memory_limit_mb or use smaller images"
        )
    if batch_images is None:
        wanted = [min(max(cache_bytes // max(1, peak), MIN_BATCH), most) for peak in peak_bytes]
        # a pass rather up to twice as large than half as small: its runs of one row cannot be stacked
        passes = max(1, images_per_block // min(wanted))
        wanted = [max(want, -(-images_per_block // passes)) for want in wanted]
    else:
        wanted = [batch_images] * len(sizes)
    batches = tuple(min(want, fit) for want, fit in zip(wanted, fits, strict=True))
    images = min(images_per_block, *batches)
    return Batching(images, batches, 2 * max(size * batch for size, batch in zip(sizes, batches, strict=True)))


def rows_within_memory(
    space: SearchSpace, images_per_pass: int, bytes_per_image: Sequence[int], limit_bytes: int, working_bytes: int = 0
) -> int:
    """Rows of a `pairs` tile whose stored prefixes fit into `limit_bytes` beside `working_bytes`; all rows where they do.

    `bytes_per_image[i]` is what the values alive before layer i take. A tile holds one copy of them for each of its rows of
    earlier layers, one of the float run, and one that is being made.
    """
    available = limit_bytes - working_bytes
    rows = space.num_options
    for layer, size in enumerate(bytes_per_image):
        copy = max(1, size * images_per_pass)
        if (min(rows, space.offsets[layer]) + 2) * copy > available:
            rows = available // copy - 2
            if rows < 1:
                raise ConfigurationError(
                    f"the memory limit of {limit_bytes / 1e6:.0f} MB is too small: needed are three stored prefixes of "
                    f"{images_per_pass} images, {copy / 1e6:.1f} MB each before {space.layers[layer].name}, beside "
                    f"{working_bytes / 1e6:.1f} MB for a run, available {max(available, 0) / 1e6:.1f} MB; raise memory_limit_mb "
                    "or use more sample_blocks (fewer images each)"
                )
    return rows
