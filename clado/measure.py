"""Executes one tile: stored prefixes, stacked batches, float64 sums over a sample block. Needs torch and NumPy, nothing else.

The heart is `_sweep`: it walks the layers once and carries, for each row (an option already put in place), the values alive at
the current cut. At layer j every pair (row, j at b bits) is one resumed run; all rows share the weights from j on, so they are
stacked in the batch dimension.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clado import criteria
from clado.network import Network, State
from clado.probes import Tile
from clado.quantizers import WeightQuantizer
from clado.space import Assignment, SearchSpace

Array = NDArray[np.float64]
Batch = tuple[Tensor, Tensor | None]


@dataclass
class Workbench:
    """What measuring needs and one process keeps: the network, every quantized weight, the images of each sample block.

    `load` gives (images, labels or None) of a range of the sensitivity set; `batch_images` is how many images one resumed run
    takes. Blocks are loaded when first asked for and the last one is kept.
    """

    network: Network
    space: SearchSpace
    quantizer: WeightQuantizer
    criterion: str
    blocks: Sequence[tuple[int, int]]
    load: Callable[[int, int], Batch]
    batch_images: int = 256
    quantized: tuple[Tensor, ...] = field(init=False)
    _block: tuple[int, "Block"] | None = None

    def __post_init__(self) -> None:
        self.quantized = quantize_all(self.network, self.space, self.quantizer)

    def block(self, number: int) -> "Block":
        """One sample block with its float logits."""
        if self._block is None or self._block[0] != number:
            images, labels = self.load(*self.blocks[number])
            device = self.network.device
            images, labels = images.to(device), None if labels is None else labels.to(device)
            float_logits = self.network.logits(images)
            self._block = number, Block(number, images, labels, float_logits)
        return self._block[1]

    def weights(self, assignment: Assignment) -> dict[int, Tensor]:
        """Layer -> quantized weight, for the layers that the assignment quantizes."""
        return {self.space.options[k][0]: self.quantized[k] for k in self.space.chosen_options(assignment)}


@dataclass(frozen=True)
class Block:
    """Images of one sample block, and what the float network says of them."""

    number: int
    images: Tensor
    labels: Tensor | None
    float_logits: Tensor

    def criterion(self, name: str) -> criteria.Criterion:
        """The per-sample loss as a function of logits (..., N, C)."""
        return criteria.bind(name, self.float_logits, self.labels)


@dataclass
class _Stack:
    """Rows whose values at the current cut lie behind one another in the batch."""

    rows: list[int]
    state: State


def quantize_all(network: Network, space: SearchSpace, quantizer: WeightQuantizer) -> tuple[Tensor, ...]:
    """Q(w_i, b) of every option, once."""
    return tuple(
        quantizer.fake_quantize(network.weights[i], b, network.layers[i].channel_axis).contiguous() for i, b in space.options
    )


def measure_tile(bench: Workbench, tile: Tile) -> Array:
    """Float64 sums over the tile's sample block; shapes as in `probes.py`. Entries of `pairs` that are no pair are NaN."""
    if tile.kind == "pairs":
        return _pairs(bench, tile)
    return _gram(bench, tile) if tile.kind == "gram" else _singles(bench, tile)


def losses(bench: Workbench, assignment: Assignment, block: int) -> Array:
    """Per-sample losses (n,) of one assignment, partial or full, on one sample block, by whole forwards."""
    data = bench.block(block)
    criterion = data.criterion(bench.criterion)
    return _numpy(criterion(bench.network.logits(data.images, bench.weights(assignment))))


def _singles(bench: Workbench, tile: Tile) -> Array:
    data = bench.block(tile.block)
    criterion = data.criterion(bench.criterion)
    sums = np.empty(1 + bench.space.num_options)
    sums[0] = _numpy(criterion(data.float_logits)).sum()
    for rows, logits in _finished_rows(bench, data):
        sums[[1 + row for row in rows]] = _numpy(criterion(logits)).sum(1)
    return sums


def _gram(bench: Workbench, tile: Tile) -> Array:
    """Row 0: Σ_n (p − y)ᵀ u (zero for KL). Rows 1..: Σ_n u_kᵀ F_n u_l, where F = diag(p) − p pᵀ, so that with
    v = √p (u − pᵀu) it is the Gram matrix of v: positive semidefinite as computed."""
    data = bench.block(tile.block)
    k, (n, classes) = bench.space.num_options, data.float_logits.shape
    reference = data.float_logits.double()
    p = reference.softmax(-1)
    slope = criteria.residual(bench.criterion, data.float_logits, data.labels)
    rooted = torch.empty((k, n * classes), dtype=torch.float64, device=reference.device)
    first = torch.zeros(k, dtype=torch.float64, device=reference.device)
    for rows, logits in _finished_rows(bench, data):
        u = logits.double() - reference
        where = torch.tensor(rows, device=reference.device)
        if slope is not None:
            first[where] = (u * slope).sum((1, 2))
        rooted[where] = (p.sqrt() * (u - (p * u).sum(-1, keepdim=True))).reshape(len(rows), -1)
    gram = rooted @ rooted.T
    return np.concatenate([_numpy(first)[None], _numpy((gram + gram.T) / 2)])


def _pairs(bench: Workbench, tile: Tile) -> Array:
    data = bench.block(tile.block)
    criterion = data.criterion(bench.criterion)
    sums = np.full((tile.stop - tile.first, bench.space.num_options), np.nan)
    offsets = bench.space.offsets
    for layer, stacks in _sweep(bench, data, range(tile.first, tile.stop)):
        for stack in stacks:
            where = [row - tile.first for row in stack.rows]
            for option in range(offsets[layer], offsets[layer + 1]):
                logits = bench.network.finish(stack.state, {layer: bench.quantized[option]})
                loss = criterion(logits.reshape(len(stack.rows), *data.float_logits.shape))
                sums[where, option] = _numpy(loss).sum(1)
    return sums


def _finished_rows(bench: Workbench, data: Block) -> Iterator[tuple[list[int], Tensor]]:
    """(rows, logits (rows, n, classes)) of every option alone, stack by stack."""
    last: list[_Stack] = []
    for layer, stacks in _sweep(bench, data, range(bench.space.num_options), to_the_end=True):
        if layer == bench.space.num_layers:
            last = stacks
    for stack in last:
        logits = bench.network.graph.output(stack.state)
        yield stack.rows, logits.reshape(len(stack.rows), *data.float_logits.shape)


def _sweep(bench: Workbench, data: Block, rows: range, to_the_end: bool = False) -> Iterator[tuple[int, list[_Stack]]]:
    """Yields (layer, the rows of earlier layers as stacks at this layer's cut) for every layer behind the first row.

    With `to_the_end` a last item (num_layers, all rows) holds finished runs.
    """
    network, space = bench.network, bench.space
    num_layers, capacity = space.num_layers, max(1, bench.batch_images // len(data.images))
    end = num_layers if to_the_end else num_layers - 1

    first, last = space.options[rows.start][0], space.options[rows.stop - 1][0]
    float_state = network.advance(network.begin(data.images), first)
    stacks: list[_Stack] = []
    for layer in range(first, end):
        born = [
            _Stack([option], network.advance(float_state, layer + 1, {layer: bench.quantized[option]}))
            for option in range(max(rows.start, space.offsets[layer]), min(rows.stop, space.offsets[layer + 1]))
        ]
        for stack in stacks:
            stack.state = network.advance(stack.state, layer + 1)
        stacks = _packed(network, stacks + born, capacity, layer + 1) if born else stacks
        if layer < last:
            float_state = network.advance(float_state, layer + 1)
        yield layer + 1, stacks


def _packed(network: Network, stacks: list[_Stack], capacity: int, layer: int) -> list[_Stack]:
    """The same rows in as few stacks as `capacity` rows each allow; full ones are left alone."""
    full = [stack for stack in stacks if len(stack.rows) >= capacity]
    loose = [stack for stack in stacks if len(stack.rows) < capacity]
    packed: list[_Stack] = []
    group: list[_Stack] = []
    for stack in [*loose, None]:
        if group and (stack is None or sum(len(s.rows) for s in group) + len(stack.rows) > capacity):
            state = network.stack([s.state for s in group], layer)
            packed.append(_Stack([row for s in group for row in s.rows], state))
            group = []
        if stack is not None:
            group.append(stack)
    return full + packed


def _numpy(tensor: Tensor) -> Array:
    return tensor.double().cpu().numpy()
