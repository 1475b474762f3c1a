"""One float run over a block of calibration images gathers the statistics of every layer's input that quantizing needs.

Blocks are fixed ranges of the calibration images. Their results are added in order, so that the sums are the same bit for bit
for any number of workers. Rows are sampled: a layer's moments need a multiple of its columns, not millions of positions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from clado.grids import ActivationGrid
from clado.network.engine import Call
from clado.network.network import Network
from clado.quantization.matrix_form import MatrixForm
from clado.quantization.moments import Moments, MomentSums, merged
from clado.space import Layer

MOST_BLOCKS = 8  # most blocks of calibration images, each of at least BLOCK_IMAGES; if there are few images, two blocks
BLOCK_IMAGES = 16
# rows of all calibration images: at 4 bits more rows change the loss by less than its standard error (benchmarks/PREPARING.md)
ROWS_PER_COLUMN, FEWEST_ROWS = 16, 4096
SAMPLED_VALUES = 2**20  # values of a layer's input to fit an activation range on, with the exact extremes
SAMPLED_ELEMENTS = 2**16  # most elements of the rows for corrections, of all calibration images; at least one row of a block


@dataclass(frozen=True, eq=False)
class LayerInput:
    """Statistics of one layer's input on calibration images."""

    num_images: int
    """Number of images."""
    arguments: tuple[Any, ...] | None
    """The operator's arguments after the bias. None if no run of the layer can be observed."""
    uses: int
    """How often a run uses the weight. Rows and moments are those of the first use."""
    moments: Moments | None
    """Moments of the rows of the input. None if nothing needs them."""
    rows: Tensor
    """A sample of rows, float32 (groups, rows, columns)."""
    values: Tensor
    """A sample of the input's values over every use, and their extremes, float32 (n,). Empty if nothing needs them."""
    on_grid: Mapping[int, Moments]
    """Activation width -> moments of the rows of the input on its grid."""


def joined(parts: Sequence[LayerInput]) -> LayerInput:
    """The statistics over all blocks, from those of each block in order."""
    first = parts[0]
    moments = [part.moments for part in parts if part.moments is not None]
    return replace(
        first,
        num_images=sum(part.num_images for part in parts),
        moments=merged(moments) if moments else None,
        rows=torch.cat([part.rows for part in parts], 1) if moments else first.rows,
        values=torch.cat([part.values for part in parts]),
        on_grid={width: merged([part.on_grid[width] for part in parts]) for width in first.on_grid},
    )


def calibration_blocks(num_images: int) -> list[tuple[int, int]]:
    """Ranges of calibration images with separate sweeps: (first, image after the last)."""
    count = min(MOST_BLOCKS, max(min(2, num_images), num_images // BLOCK_IMAGES))
    return [(num_images * k // count, num_images * (k + 1) // count) for k in range(count)]


def layer_forms(network: Network) -> dict[int, MatrixForm]:
    """The matrix form of every layer whose input can be observed, from one run of the example."""
    forms: dict[int, MatrixForm] = {}

    def see(layer: int, call: Call) -> None:
        forms.setdefault(layer, MatrixForm.of(network.layers[layer], call.arguments))

    network.observe(network.example.to(network.device), range(len(network.layers)), see)
    return forms


def moments_bytes(form: MatrixForm) -> int:
    """Bytes of the float32 scatter of one block."""
    return 4 * form.groups * form.num_columns**2


def wanted_rows(form: MatrixForm) -> int:
    """Most rows of all calibration images for a layer's moments."""
    return max(FEWEST_ROWS, ROWS_PER_COLUMN * form.num_columns)


def gathering_macs(form: MatrixForm, layer: Layer, num_images: int) -> float:
    """Multiply-accumulates of a layer's second moments over a number of calibration images."""
    positions = layer.macs // layer.num_weights
    return float(min(wanted_rows(form), positions * num_images) * form.groups * form.num_columns**2)


def groups_within_memory(sizes: Mapping[int, int], limit_bytes: int) -> list[tuple[int, ...]]:
    """Layers in groups, in order: the sizes of a group's layers add up to at most the limit, or it has one layer.

    Args:
        sizes: Bytes that a sweep holds for each layer.
        limit_bytes: The limit.
    """
    groups: list[list[int]] = []
    room = 0
    for layer, size in sizes.items():
        if not groups or size > room:
            groups.append([])
            room = limit_bytes
        groups[-1].append(layer)
        room -= size
    return [tuple(group) for group in groups]


@dataclass(frozen=True)
class Sweep:
    """What a sweep gathers."""

    num_images: int
    """Number of all calibration images, not of one block."""
    moments: bool = False
    """Whether moments and rows are gathered."""
    values: bool = False
    """Whether values are gathered, which ranges of activations are fitted on."""
    on_grids: bool = False
    """Whether moments of inputs on their grids are gathered, instead of those of float inputs."""
    grids: Mapping[int, Mapping[int, ActivationGrid]] = field(default_factory=dict)
    """Layer -> activation width -> the grid of its input, if moments on grids are gathered."""
    seed: int = 0
    """Seed of the rows that are sampled."""

    @torch.inference_mode()
    def gather(self, network: Network, images: Tensor, first_image: int, layers: Iterable[int]) -> dict[int, LayerInput]:
        """Statistics of these layers' inputs on one block of calibration images (n, C, H, W), in one float run.

        Args:
            network: The float network.
            images: The images of the block.
            first_image: Number of the first one among all calibration images.
            layers: The layers.
        """
        gatherers = {layer: _Gatherer(self, network, layer) for layer in layers}
        for batch in torch.split(images, network.images_at_once):
            for gatherer in gatherers.values():
                gatherer.begin(first_image, len(batch))
            network.observe(batch, gatherers, lambda layer, call: gatherers[layer].add(call))
            first_image += len(batch)
        return {layer: gatherer.result(len(images)) for layer, gatherer in gatherers.items()}


class _Gatherer:
    """Adds up the inputs of one layer, batch by batch."""

    def __init__(self, sweep: Sweep, network: Network, layer: int) -> None:
        self.sweep = sweep
        self.layer: Layer = network.layers[layer]
        self.weight = network.weights[layer]
        self.grids = sweep.grids.get(layer, {})
        self.generator = torch.Generator().manual_seed(sweep.seed * 1_000_003 + layer)
        self.order = torch.zeros(0, dtype=torch.int64)
        self.arguments: tuple[Any, ...] | None = None
        self.sums = MomentSums()
        self.on_grid = {width: MomentSums() for width in self.grids}
        self.rows: list[Tensor] = []
        self.values: list[Tensor] = []
        self.first_image = self.num_images = self.uses = 0

    def begin(self, first_image: int, num_images: int) -> None:
        """Starts the next batch of images."""
        self.first_image, self.num_images, self.uses = first_image, num_images, 0

    def add(self, call: Call) -> None:
        """Adds the input of one use of the weight."""
        self.uses += 1
        if self.sweep.values:
            self._add_values(call.input.float().flatten())
        # the operator may read rows of a split weight, but no other shape
        if self.uses == 1 and call.weight_shape[1:] == tuple(self.weight.shape[1:]):
            self.arguments = call.arguments
            if self.sweep.moments or self.grids:
                self._add_rows(call.input.to(self.weight.dtype))  # autocast may have reduced its precision

    def _add_values(self, x: Tensor) -> None:
        count = max(1, SAMPLED_VALUES * self.num_images // self.sweep.num_images)
        # the stride is a prime, so that it does not always hit the same channel
        stride = max(1, x.numel() // count) | 1
        self.values += [x[::stride], torch.stack(x.aminmax())]

    def _add_rows(self, x: Tensor) -> None:
        form = MatrixForm.of(self.layer, self.arguments or ())
        rows = form.rows(x, self._numbers(form, x)).float()
        for width, grid in self.grids.items():
            self.on_grid[width].add(
                grid.fake_quantize(rows)
            )  # zero is on the grid, so the padding of a convolution does not change
        if self.sweep.moments:
            self.sums.add(rows)
            count = SAMPLED_ELEMENTS * self.num_images // (self.sweep.num_images * rows.shape[0] * rows.shape[2])
            self.rows.append(rows[:, : max(count, 0 if self.rows else 1)].clone())

    def _numbers(self, form: MatrixForm, x: Tensor) -> Tensor | None:
        """The sampled rows of an input: for each image another part of one random order. None: all rows."""
        whole = form.num_rows(x)
        items = self.num_images if whole % self.num_images == 0 else 1  # an input whose first axis is not the images
        positions, num_items = whole // items, -(-self.sweep.num_images * items // self.num_images)
        count = -(-wanted_rows(form) // num_items)
        if count >= positions:
            return None
        if len(self.order) != positions:
            self.order = torch.randperm(positions, generator=self.generator)
        first = (self.first_image + torch.arange(items)) * count
        places = self.order[(first[:, None] + torch.arange(count)) % positions]
        return (torch.arange(items)[:, None] * positions + places).flatten().to(x.device)

    def result(self, num_images: int) -> LayerInput:
        """The statistics of the block."""
        none = torch.zeros(0)
        return LayerInput(
            num_images,
            self.arguments,
            self.uses,
            self.sums.moments() if self.sums.count else None,
            torch.cat(self.rows, 1) if self.rows else none,
            torch.cat(self.values) if self.values else none,
            {width: sums.moments() for width, sums in self.on_grid.items() if sums.count},
        )
