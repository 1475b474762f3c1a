"""Executes one tile: stored prefixes, stacked batches, float64 sums over a sample block. Needs torch and NumPy, nothing else.

The heart is `_sweep`: it walks the layers once and carries, for each row (an option already put in place), the values alive at
the current cut. At layer j every pair (row, j at b bits) is one resumed run; all rows share the weights from j on, so they are
stacked in the batch dimension, the more the later the layer. A sample block goes through in passes of a few images: what is
stored at a time is one pass of every row.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clado import criteria
from clado.errors import ConfigurationError
from clado.grids import QuantizedLayer
from clado.measuring import gradients
from clado.measuring.plan import (
    NUM_VECTORS,
    OF_PAIRS,
    TEMPERATURES,
    Batching,
    Tile,
    batching,
    later_layers,
    pair_mask,
    rows_within_memory,
    sample_blocks,
)
from clado.network.network import GPU_BYTES, Network, Replaced, State
from clado.quantization.preparation import Prepared
from clado.space import Assignment, SearchSpace

Array = NDArray[np.float64]
Batch = tuple[Tensor, Tensor | None]
GPU_BATCH = 4096  # images of one run that keep a large GPU busy
FLOAT_LOGITS_BYTES = 2**24  # of all blocks together that a workbench keeps: 4,096 images of 1,000 classes


@dataclass
class Workbench:
    """What measuring needs and one process keeps: the network, every layer at every candidate, the images of each sample block.

    `load` gives (images, labels or None) of a range of the sensitivity set; `batch_images` is how many images one resumed run
    takes (None: as many as are fast, see `probes.batching`), within `memory_limit` bytes. Blocks are loaded when first asked
    for and the last one is kept, as are the float logits of all where they are few. `batch_statistics` measures probes with batch
    norm on the statistics of the whole block. `num_vectors` and `seed` are as in a plan.
    """

    prepared: Prepared
    criterion: str
    blocks: Sequence[tuple[int, int]]
    load: Callable[[int, int], Batch]
    batch_images: int | None = None
    memory_limit: int | None = None
    batch_statistics: bool = False
    num_vectors: int = NUM_VECTORS
    seed: int = 0
    network: Network = field(init=False)
    quantized: tuple[QuantizedLayer, ...] = field(init=False)
    batching: Batching = field(init=False)
    _block: tuple[int, "tuple[Pass, ...]"] | None = None
    _float_logits: dict[int, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        widest = max(stop - start for start, stop in self.blocks)
        self.network, self.quantized = self.prepared.network, self.prepared.layers
        self.batching = network_batching(self.network, widest, self.batch_images, self.memory_limit, self.batch_statistics)
        if self.batch_statistics:
            self.network = self.network.with_batch_statistics()
        else:
            self.network, fold = self.network.folded()
            self.quantized = tuple(
                fold(option.layer, layer) for option, layer in zip(self.space.options, self.quantized, strict=True)
            )

    @property
    def space(self) -> SearchSpace:
        """Layers and their candidates."""
        return self.prepared.space

    def chosen(self, assignment: Assignment) -> dict[int, QuantizedLayer]:
        """Layer -> what stands in its place in `network`, for the layers that an assignment quantizes."""
        return {self.space.options[k].layer: self.quantized[k] for k in self.space.chosen_options(assignment)}

    def passes(self, number: int) -> "tuple[Pass, ...]":
        """One sample block with its float logits, in passes as even as integers allow."""
        if self._block is None or self._block[0] != number:
            images, labels = self.load(*self.blocks[number])
            device = self.network.device
            images, labels = images.to(device), None if labels is None else labels.to(device)
            count = -(-len(images) // self.batching.images_per_pass)
            parts = [(images[a:b], None if labels is None else labels[a:b]) for a, b in sample_blocks(len(images), count)]
            logits = self._float_logits.get(number) or [self.network.logits(x) for x, _ in parts]
            if sum(part.nbytes for part in logits) * len(self.blocks) <= FLOAT_LOGITS_BYTES:
                self._float_logits[number] = logits
            self._block = number, tuple(Pass(x, y, z) for (x, y), z in zip(parts, logits, strict=True))
        return self._block[1]

    def shipped_passes(self, number: int) -> "tuple[Pass, ...]":
        """The same with the logits of the float network as it ships, which differ where probes are on batch statistics."""
        if not self.batch_statistics:
            return self.passes(number)
        return tuple(replace(part, float_logits=self.prepared.network.logits(part.images)) for part in self.passes(number))


@dataclass(frozen=True)
class Pass:
    """Images of a sample block that are measured at a time, and what the float network says of them."""

    images: Tensor
    labels: Tensor | None
    float_logits: Tensor

    def criterion(self, name: str) -> criteria.Loss:
        """The per-sample loss as a function of logits (..., N, C)."""
        return criteria.bind(name, self.float_logits, self.labels)


@dataclass(eq=False)
class _Stack:
    """Rows whose values at the current cut lie behind one another in the batch."""

    rows: list[int]
    state: State


def network_batching(
    network: Network,
    images_per_block: int,
    batch_images: int | None = None,
    memory_limit: int | None = None,
    whole_blocks: bool = False,
) -> Batching:
    """How images travel through this network on its device; `whole_blocks` sends the images of a block together."""
    cuts = [place.cut for place in network.places]
    found = batching(
        [cut.bytes_per_image for cut in cuts],
        [cut.peak_bytes_per_image for cut in cuts],
        images_per_block,
        batch_images,
        memory_limit,
        **({"cache_bytes": GPU_BYTES, "most": GPU_BATCH} if network.device.type == "cuda" else {}),
    )
    if not whole_blocks or found.images_per_pass >= images_per_block:
        return found
    if memory_limit is not None:
        raise ConfigurationError(
            f"batch statistics need a block of {images_per_block} images at once, and the memory limit holds "
            f"{found.images_per_pass}; raise memory_limit_mb or use more sample_blocks (fewer images each)"
        )
    batches = tuple(max(batch, images_per_block) for batch in found.batch_images)
    return Batching(images_per_block, batches, found.working_bytes * -(-images_per_block // found.images_per_pass))


def rows_per_tile(network: Network, space: SearchSpace, batching: Batching, memory_limit: int | None) -> int:
    """Rows of a `pairs` tile: all of them, or as many as the limit (bytes) holds prefixes of."""
    if memory_limit is None:
        return space.num_options
    alive = [place.cut.bytes_per_image for place in network.places]
    usable = memory_limit - memory_limit // 6  # allocators keep some of what they were given back
    return rows_within_memory(space, batching.images_per_pass, alive, usable, batching.working_bytes)


def measure_tile(bench: Workbench, tile: Tile) -> Array:
    """Float64 sums over the tile's sample block; shapes as in `plan.py`. Entries of pairs that are none are NaN.

    The bench of `plain_singles` holds layers without corrections, that of all other kinds those that ship.
    """
    if tile.kind in OF_PAIRS:
        return _pairs(bench, tile)
    if tile.kind == "gradients":
        return _gradients(bench, tile)
    if tile.kind == "trace":
        return _trace(bench, tile)
    return _gram(bench, tile) if tile.kind == "gram" else _singles(bench, tile)


class Scores(NamedTuple):
    """What an assignment does to each sample (n,): the criterion, the Brier score, and whether the top class stays right."""

    losses: Array
    briers: Array
    hits: Array


def scores(bench: Workbench, assignment: Assignment, block: int) -> Scores:
    """Of one assignment, partial or full, on one sample block, by whole forwards, as probes see it."""
    return _scores(bench, bench.network, bench.chosen(assignment), bench.passes(block))


def deployed_scores(bench: Workbench, network: Network, replaced: Replaced, block: int) -> Scores:
    """The same of a network that ships, with the layers that stand in it."""
    return _scores(bench, network, replaced, bench.shipped_passes(block))


def _scores(bench: Workbench, network: Network, replaced: Replaced, parts: Sequence[Pass]) -> Scores:
    found = []
    for part in parts:
        logits = network.logits(part.images, replaced)
        given = bench.criterion, logits, part.float_logits, part.labels
        found.append((part.criterion(bench.criterion)(logits), criteria.brier(*given), criteria.hits(*given)))
    return Scores(*(np.concatenate([_numpy(value) for value in column]) for column in zip(*found, strict=True)))


def _singles(bench: Workbench, tile: Tile) -> Array:
    sums = np.zeros(1 + bench.space.num_options)
    for part in bench.passes(tile.block):
        criterion = part.criterion(bench.criterion)
        sums[0] += _numpy(criterion(part.float_logits)).sum()
        for options, logits in _each_option(bench, part):
            sums[[1 + option for option in options]] += _numpy(criterion(logits)).sum(1)
    return sums


def _gram(bench: Workbench, tile: Tile) -> Array:
    """Row 0: what `_singles` gives, of the same forwards. Row 1: 0 and Σ_n (p − y)ᵀ u (zero for KL). Then K rows for each of
    TEMPERATURES: 0 and Σ_n u_kᵀ F_n u_l, where F = diag(q) − q qᵀ of q = softmax(z / temperature), so that with
    v = √q (u − qᵀu) it is the Gram matrix of v: positive semidefinite up to rounding. Only one pass of u is held at a time."""
    k = bench.space.num_options
    device = bench.network.device
    sums = np.zeros((2 + len(TEMPERATURES) * k, 1 + k))
    first = torch.zeros(k, dtype=torch.float64, device=device)
    grams = torch.zeros((len(TEMPERATURES), k, k), dtype=torch.float64, device=device)
    for part in bench.passes(tile.block):
        criterion = part.criterion(bench.criterion)
        sums[0, 0] += _numpy(criterion(part.float_logits)).sum()
        dtype = torch.promote_types(part.float_logits.dtype, torch.float32)
        reference = part.float_logits.to(dtype)
        slope = criteria.residual(bench.criterion, part.float_logits, part.labels)
        u = torch.empty((k, *reference.shape), dtype=dtype, device=device)
        for options, logits in _each_option(bench, part):
            sums[0, [1 + option for option in options]] += _numpy(criterion(logits)).sum(1)
            where = torch.tensor(options, device=device)
            u[where] = logits - reference  # exact but for its own last digit; sums over samples are float64
            if slope is not None:
                first[where] += (u[where] * slope).sum((1, 2))
        _add_products(grams, u, torch.stack([(part.float_logits.double() / t).softmax(-1) for t in TEMPERATURES]))
    whole = grams.tril() + grams.tril(-1).mT
    sums[1, 1:], sums[2:, 1:] = _numpy(first), _numpy(whole).reshape(-1, k)
    return sums


def _add_products(grams: Tensor, u: Tensor, q: Tensor) -> None:
    """Adds the products v vᵀ of v = √q (u − qᵀu) to grams (T, K, K), float64: on and below the diagonal, and a bit above.

    u (K, N, C), q (T, N, C). On a CPU a few samples at a time, which its cache holds from step to step, each product in the type
    of u: twice as fast, and as exact as differences of logits are. On a GPU all in float64.
    """
    on_cpu = u.device.type == "cpu"
    kind, elements, rows = (u.dtype, 4096, 32) if on_cpu else (torch.float64, 2**16, 1024)
    q, roots = q.to(kind), q.sqrt().to(kind)
    at_once = max(1, elements // u.shape[-1])
    for first in range(0, u.shape[1], at_once):
        samples = slice(first, first + at_once)
        x = u[:, samples].to(kind)
        means = torch.matmul(x.transpose(0, 1), q[:, samples].permute(1, 2, 0))  # (n, K, T)
        for t, gram in enumerate(grams):
            v = ((x - means[..., t].T[..., None]) * roots[t, samples]).flatten(1)
            for start in range(0, len(v), rows):
                stop = min(start + rows, len(v))
                gram[start:stop, :stop] += v[start:stop] @ v[:stop].T


def _pairs(bench: Workbench, tile: Tile) -> Array:
    space, network = bench.space, bench.network
    rows = range(tile.first, tile.stop)
    is_pair = pair_mask(space, tile.kind, rows)
    sums = np.where(is_pair, 0.0, np.nan)
    blocks = space.blocks if tile.kind == "block_pairs" else (tuple(range(space.num_layers)),)
    first_options = [row for row, columns in zip(rows, is_pair, strict=True) if columns.any()]
    groups = [[row for row in first_options if space.options[row].layer in block] for block in blocks]
    groups = sorted(filter(None, groups))  # in order of their first row, so that one float run serves them all
    for part in bench.passes(tile.block):
        float_state = network.begin(part.images)
        for group in groups:
            float_state = network.advance(float_state, space.options[group[0]].layer)
            _add_pairs(bench, part, tile, group, float_state, sums)
    return sums


def _add_pairs(bench: Workbench, part: Pass, tile: Tile, rows: Sequence[int], float_state: State, sums: Array) -> None:
    """Adds the losses of one pass to the tile's `sums`, for rows of one block of layers with all options of its later layers."""
    space = bench.space
    criterion = part.criterion(bench.criterion)
    layers = later_layers(space, tile.kind, space.options[rows[0]].layer)
    for layer, stacks in _sweep(bench, part, rows, float_state, layers[-1]):
        entries, losses = [], []
        for stack in stacks if layer in layers else []:
            for option in space.options_of(layer):
                logits = bench.network.finish(stack.state, {layer: bench.quantized[option]})
                losses.append(criterion(logits.reshape(len(stack.rows), *part.float_logits.shape)))
                entries += [(row - tile.first, option) for row in stack.rows]
        if losses:  # read back at once: a GPU would wait each time
            row, column = np.array(entries).T
            sums[row, column] += _numpy(torch.cat(losses)).sum(1)


def _gradients(bench: Workbench, tile: Tile) -> Array:
    if bench.batch_statistics:
        raise ConfigurationError(
            "gradients of single samples do not exist on batch statistics; expected running statistics, or other estimators"
        )
    images, labels = _loaded(bench, tile.block)
    return gradients.squared_slopes(bench.prepared, bench.criterion, images, labels, _random(bench, tile))


def _trace(bench: Workbench, tile: Tile) -> Array:
    images, labels = _loaded(bench, tile.block)
    at_once = gradients.images_at_once(bench.network, bench.batching.images_per_pass, bench.memory_limit)
    count = 1 if bench.batch_statistics else -(-len(images) // at_once)
    parts = [(images[a:b], None if labels is None else labels[a:b]) for a, b in sample_blocks(len(images), count)]
    random = _random(bench, tile)
    return gradients.average_traces(bench.prepared, bench.criterion, parts, bench.num_vectors, random, bench.batch_statistics)


def _loaded(bench: Workbench, block: int) -> Batch:
    images, labels = bench.load(*bench.blocks[block])
    return images.to(bench.network.device), None if labels is None else labels.to(bench.network.device)


def _random(bench: Workbench, tile: Tile) -> np.random.Generator:
    """Random numbers of a tile: whoever measures it draws the same."""
    return np.random.default_rng([bench.seed, tile.block])


def _each_option(bench: Workbench, part: Pass) -> Iterator[tuple[list[int], Tensor]]:
    """(options, logits (options, n, classes)) of each option alone, stack by stack."""
    space = bench.space
    for _, stacks in _sweep(bench, part, range(space.num_options), bench.network.begin(part.images), space.num_layers):
        for stack in stacks:
            logits = bench.network.finish(stack.state)
            yield stack.rows, logits.reshape(len(stack.rows), *part.float_logits.shape)


def _sweep(bench: Workbench, part: Pass, rows: Sequence[int], float_state: State, end: int) -> Iterator[tuple[int, list[_Stack]]]:
    """Yields (layer, the rows of earlier layers as stacks at this layer's cut) for every layer behind the first row, to `end`.

    `rows` ascend; `float_state` is a float run of the pass, at or before the first row's layer. Where `end` is the number of
    layers a stack is run to the end as soon as it is full, while its values are in the cache, and yielded once, as a finished
    run; what is left is yielded behind the last layer.
    """
    network, space = bench.network, bench.space
    to_the_end = end == space.num_layers
    first, last = space.options[rows[0]].layer, space.options[rows[-1]].layer
    float_state = network.advance(float_state, first)
    stacks: list[_Stack] = []
    for layer in range(first, end):
        born = [
            _Stack([option], network.advance(float_state, layer + 1, {layer: bench.quantized[option]}))
            for option in space.options_of(layer)
            if option in rows
        ]
        for stack in stacks:
            stack.state = network.advance(stack.state, layer + 1)
        capacity = _capacity(bench, part, layer, to_the_end)
        stacks = _packed(network, stacks + born, capacity, layer + 1)
        if layer < last:
            float_state = network.advance(float_state, layer + 1)
        if not to_the_end:
            yield layer + 1, stacks
            continue
        full = [stack for stack in stacks if layer + 1 == end or len(stack.rows) >= capacity]
        stacks = [stack for stack in stacks if stack not in full]
        for stack in full:
            stack.state = network.advance(stack.state, end)
        yield end, full


def _capacity(bench: Workbench, part: Pass, layer: int, to_the_end: bool) -> int:
    """Rows of a full stack behind a layer. Of pairs a power of two, so that full stacks still fill the larger ones of later
    layers."""
    batch = bench.batching.batch_images[min(layer + 1, bench.space.num_layers - 1)]
    capacity = max(1, batch // len(part.images))
    return capacity if to_the_end else 1 << (capacity.bit_length() - 1)


def _packed(network: Network, stacks: list[_Stack], capacity: int, layer: int) -> list[_Stack]:
    """The same rows in as few stacks as `capacity` rows each allow; full ones are left alone, and unlike ones kept apart."""
    packed = [stack for stack in stacks if len(stack.rows) >= capacity]
    alike: dict[Hashable, list[_Stack]] = {}
    for stack in stacks:
        if len(stack.rows) < capacity:
            alike.setdefault(stack.state.stack_key, []).append(stack)
    for loose in alike.values():
        group: list[_Stack] = []
        for stack in loose:
            if group and sum(len(s.rows) for s in group) + len(stack.rows) > capacity:
                packed.append(_joined(network, group, layer))
                group = []
            group.append(stack)
        packed.append(_joined(network, group, layer))
    return packed


def _joined(network: Network, group: list[_Stack], layer: int) -> _Stack:
    if len(group) == 1:
        return group[0]
    return _Stack([row for s in group for row in s.rows], network.stack([s.state for s in group], layer))


def _numpy(tensor: Tensor) -> Array:
    return tensor.double().cpu().numpy()
