"""Executes one tile: stored prefixes, stacked batches, float64 sums over a sample block. Needs torch and NumPy, nothing else.

The heart is `_sweep`: it walks the layers once and carries, for each row (an option already put in place), the values alive at
the current cut. At layer j every pair (row, j at b bits) is one resumed run; all rows share the weights from j on, so they are
stacked in the batch dimension, the more the later the layer. A sample block goes through in passes of a few images: what is
stored at a time is one pass of every row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clado import criteria
from clado.network import Network, State
from clado.probes import Batching, Tile, batching, rows_within_memory, sample_blocks
from clado.quantizers import WeightQuantizer
from clado.space import Assignment, SearchSpace

Array = NDArray[np.float64]
Batch = tuple[Tensor, Tensor | None]
GPU_BYTES = 2 * 10**9  # values of one run that keep a large GPU busy


@dataclass
class Workbench:
    """What measuring needs and one process keeps: the network, every quantized weight, the images of each sample block.

    `load` gives (images, labels or None) of a range of the sensitivity set; `batch_images` is how many images one resumed run
    takes (None: as many as are fast, see `probes.batching`), within `memory_limit` bytes. Blocks are loaded when first asked
    for and the last one is kept.
    """

    network: Network
    space: SearchSpace
    quantizer: WeightQuantizer
    criterion: str
    blocks: Sequence[tuple[int, int]]
    load: Callable[[int, int], Batch]
    batch_images: int | None = None
    memory_limit: int | None = None
    quantized: tuple[Tensor, ...] = field(init=False)
    batching: Batching = field(init=False)
    _block: tuple[int, "tuple[Pass, ...]"] | None = None

    def __post_init__(self) -> None:
        widest = max(stop - start for start, stop in self.blocks)
        self.batching = network_batching(self.network, widest, self.batch_images, self.memory_limit)
        self.quantized = quantize_all(self.network, self.space, self.quantizer)

    def passes(self, number: int) -> "tuple[Pass, ...]":
        """One sample block with its float logits, in passes as even as integers allow."""
        if self._block is None or self._block[0] != number:
            images, labels = self.load(*self.blocks[number])
            device = self.network.device
            images, labels = images.to(device), None if labels is None else labels.to(device)
            count = -(-len(images) // self.batching.images_per_pass)
            parts = [(images[a:b], None if labels is None else labels[a:b]) for a, b in sample_blocks(len(images), count)]
            self._block = number, tuple(Pass(x, y, self.network.logits(x)) for x, y in parts)
        return self._block[1]

    def weights(self, assignment: Assignment) -> dict[int, Tensor]:
        """Layer -> quantized weight, for the layers that the assignment quantizes."""
        return {self.space.options[k][0]: self.quantized[k] for k in self.space.chosen_options(assignment)}


@dataclass(frozen=True)
class Pass:
    """Images of a sample block that are measured at a time, and what the float network says of them."""

    images: Tensor
    labels: Tensor | None
    float_logits: Tensor

    def criterion(self, name: str) -> criteria.Criterion:
        """The per-sample loss as a function of logits (..., N, C)."""
        return criteria.bind(name, self.float_logits, self.labels)


@dataclass(eq=False)
class _Stack:
    """Rows whose values at the current cut lie behind one another in the batch."""

    rows: list[int]
    state: State


def network_batching(
    network: Network, images_per_block: int, batch_images: int | None = None, memory_limit: int | None = None
) -> Batching:
    """How images travel through this network on its device."""
    cuts = network.graph.cuts
    return batching(
        [cut.bytes_per_image for cut in cuts],
        [cut.peak_bytes_per_image for cut in cuts],
        images_per_block,
        batch_images,
        memory_limit,
        **({"cache_bytes": GPU_BYTES} if network.device.type == "cuda" else {}),
    )


def quantize_all(network: Network, space: SearchSpace, quantizer: WeightQuantizer) -> tuple[Tensor, ...]:
    """Q(w_i, b) of every option, once, laid out as the float weights are."""
    quantized = []
    for i, bits in space.options:
        weight = network.weights[i]
        value = quantizer.fake_quantize(weight, bits, network.layers[i].channel_axis)
        nhwc = weight.ndim == 4 and not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
        quantized.append(value.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format))
    return tuple(quantized)


def rows_per_tile(network: Network, space: SearchSpace, batching: Batching, memory_limit: int | None) -> int:
    """Rows of a `pairs` tile: all of them, or as many as the limit (bytes) holds prefixes of."""
    if memory_limit is None:
        return space.num_options
    alive = [cut.bytes_per_image for cut in network.graph.cuts]
    usable = memory_limit - memory_limit // 6  # allocators keep some of what they were given back
    return rows_within_memory(space, batching.images_per_pass, alive, usable, batching.working_bytes)


def measure_tile(bench: Workbench, tile: Tile) -> Array:
    """Float64 sums over the tile's sample block; shapes as in `probes.py`. Entries of `pairs` that are no pair are NaN."""
    if tile.kind == "pairs":
        return _pairs(bench, tile)
    return _gram(bench, tile) if tile.kind == "gram" else _singles(bench, tile)


def losses(bench: Workbench, assignment: Assignment, block: int) -> Array:
    """Per-sample losses (n,) of one assignment, partial or full, on one sample block, by whole forwards."""
    weights = bench.weights(assignment)
    parts = bench.passes(block)
    return np.concatenate([_numpy(part.criterion(bench.criterion)(bench.network.logits(part.images, weights))) for part in parts])


def _singles(bench: Workbench, tile: Tile) -> Array:
    sums = np.zeros(1 + bench.space.num_options)
    for part in bench.passes(tile.block):
        criterion = part.criterion(bench.criterion)
        sums[0] += _numpy(criterion(part.float_logits)).sum()
        for rows, logits in _finished_rows(bench, part):
            sums[[1 + row for row in rows]] += _numpy(criterion(logits)).sum(1)
    return sums


def _gram(bench: Workbench, tile: Tile) -> Array:
    """Row 0: Σ_n (p − y)ᵀ u (zero for KL). Rows 1..: Σ_n u_kᵀ F_n u_l, where F = diag(p) − p pᵀ, so that with
    v = √p (u − pᵀu) it is the Gram matrix of v: positive semidefinite as computed. Only one pass of u is held at a time."""
    k = bench.space.num_options
    device = bench.network.device
    first = torch.zeros(k, dtype=torch.float64, device=device)
    gram = torch.zeros((k, k), dtype=torch.float64, device=device)
    for part in bench.passes(tile.block):
        reference = part.float_logits.double()
        p = reference.softmax(-1)
        slope = criteria.residual(bench.criterion, part.float_logits, part.labels)
        rooted = torch.empty((k, reference.numel()), dtype=torch.float64, device=device)
        for rows, logits in _finished_rows(bench, part):
            u = logits.double().sub_(reference)
            where = torch.tensor(rows, device=device)
            if slope is not None:
                first[where] += (u * slope).sum((1, 2))
            u -= (p * u).sum(-1, keepdim=True)
            rooted[where] = u.mul_(p.sqrt()).reshape(len(rows), -1)
        gram.addmm_(rooted, rooted.T)
    return np.concatenate([_numpy(first)[None], _numpy((gram + gram.T) / 2)])


def _pairs(bench: Workbench, tile: Tile) -> Array:
    space, network = bench.space, bench.network
    owner = np.array([layer for layer, _ in space.options])
    later = owner[tile.first : tile.stop, None] < owner[None, :]
    sums = np.where(later, 0.0, np.nan)
    for part in bench.passes(tile.block):
        criterion = part.criterion(bench.criterion)
        for layer, stacks in _sweep(bench, part, range(tile.first, tile.stop)):
            for stack in stacks:
                where = [row - tile.first for row in stack.rows]
                for option in range(space.offsets[layer], space.offsets[layer + 1]):
                    logits = network.finish(stack.state, {layer: bench.quantized[option]})
                    loss = criterion(logits.reshape(len(stack.rows), *part.float_logits.shape))
                    sums[where, option] += _numpy(loss).sum(1)
    return sums


def _finished_rows(bench: Workbench, part: Pass) -> Iterator[tuple[list[int], Tensor]]:
    """(rows, logits (rows, n, classes)) of every option alone, stack by stack."""
    for _, stacks in _sweep(bench, part, range(bench.space.num_options), to_the_end=True):
        for stack in stacks:
            logits = bench.network.graph.output(stack.state)
            yield stack.rows, logits.reshape(len(stack.rows), *part.float_logits.shape)


def _sweep(bench: Workbench, part: Pass, rows: range, to_the_end: bool = False) -> Iterator[tuple[int, list[_Stack]]]:
    """Yields (layer, the rows of earlier layers as stacks at this layer's cut) for every layer behind the first row.

    With `to_the_end` a stack is run to the end as soon as it is full, while its values are in the cache, and yielded once, as
    a finished run; what is left is yielded behind the last layer.
    """
    network, space = bench.network, bench.space
    num_layers = space.num_layers
    end = num_layers if to_the_end else num_layers - 1
    first, last = space.options[rows.start][0], space.options[rows.stop - 1][0]
    float_state = network.advance(network.begin(part.images), first)
    stacks: list[_Stack] = []
    for layer in range(first, end):
        born = [
            _Stack([option], network.advance(float_state, layer + 1, {layer: bench.quantized[option]}))
            for option in range(max(rows.start, space.offsets[layer]), min(rows.stop, space.offsets[layer + 1]))
        ]
        for stack in stacks:
            stack.state = network.advance(stack.state, layer + 1)
        batch = bench.batching.batch_images[min(layer + 1, num_layers - 1)]
        # powers of two, so that full stacks still fill the larger ones of later layers
        capacity = 1 << (max(1, batch // len(part.images)).bit_length() - 1)
        stacks = _packed(network, stacks + born, capacity, layer + 1)
        if layer < last:
            float_state = network.advance(float_state, layer + 1)
        if to_the_end:
            full = [stack for stack in stacks if layer + 1 == num_layers or len(stack.rows) >= capacity]
            stacks = [stack for stack in stacks if stack not in full]
            for stack in full:
                stack.state = network.advance(stack.state, num_layers)
            yield num_layers, full
        else:
            yield layer + 1, stacks


def _packed(network: Network, stacks: list[_Stack], capacity: int, layer: int) -> list[_Stack]:
    """The same rows in as few stacks as `capacity` rows each allow; full ones are left alone."""
    full = [stack for stack in stacks if len(stack.rows) >= capacity]
    loose = [stack for stack in stacks if len(stack.rows) < capacity]
    packed: list[_Stack] = []
    group: list[_Stack] = []
    for stack in [*loose, None]:
        if group and (stack is None or sum(len(s.rows) for s in group) + len(stack.rows) > capacity):
            if len(group) == 1:
                packed += group
                group = [] if stack is None else [stack]
                continue
            state = network.stack([s.state for s in group], layer)
            packed.append(_Stack([row for s in group for row in s.rows], state))
            group = []
        if stack is not None:
            group.append(stack)
    return full + packed


def _numpy(tensor: Tensor) -> Array:
    return tensor.double().cpu().numpy()
