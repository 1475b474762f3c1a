"""What a process needs to measure tiles: the network, every layer at every candidate, and the images of a sample block."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from clado import criteria
from clado.errors import ConfigurationError
from clado.grids import QuantizedLayer
from clado.measuring.batching import Batching, batching, rows_within_memory
from clado.measuring.plan import NUM_VECTORS, sample_blocks
from clado.network.batch_size import processor_of
from clado.network.network import Network
from clado.quantization.preparation import Prepared
from clado.space import Assignment, SearchSpace

Array = NDArray[np.float64]
Batch = tuple[Tensor, Tensor | None]
FLOAT_LOGITS_BYTES = 2**24
"""Most float logits that a workbench keeps: those of 4,096 images with 1,000 classes."""


@dataclass(frozen=True)
class Pass:
    """Images of a sample block that are measured at a time."""

    images: Tensor
    """(n, C, H, W)."""
    labels: Tensor | None
    """Labels (n,), or other targets (n, ...). None if there are none."""
    float_logits: Tensor
    """Logits (n, classes) of the float network. Outputs of another form are packed."""

    def loss(self, criterion: criteria.PackedCriterion) -> criteria.Loss:
        """The per-sample loss as a function of logits (..., n, classes)."""
        return criterion.of(self.float_logits, self.labels)


@dataclass
class Workbench:
    """What measuring needs. A process keeps it, with the images of the last sample block."""

    prepared: Prepared
    """The float network, and every layer at every candidate."""
    criterion: Any
    """The loss that must not grow: a name, a callable or a `Criterion`."""
    sample_blocks: Sequence[tuple[int, int]]
    """(start, stop) ranges of the sensitivity set."""
    load: Callable[[int, int], Batch]
    """(images, labels or None) of a range of the sensitivity set."""
    batch_images: int | None = None
    """Images of one resumed run. None: as many as are fast (`batching`)."""
    memory_limit: int | None = None
    """Most bytes of a run."""
    batch_statistics: bool = False
    """Whether batch norms of probes use the statistics of the whole sample block."""
    num_vectors: int = NUM_VECTORS
    """As in a plan."""
    seed: int = 0
    """As in a plan."""
    network: Network = field(init=False)
    """The network of probes. Its batch norms are folded, or use batch statistics."""
    quantized: tuple[QuantizedLayer, ...] = field(init=False)
    """The layer that replaces the float layer in `network`, for each option."""
    packed_criterion: criteria.PackedCriterion = field(init=False)
    """The criterion on the packed outputs of `network`."""
    batching: Batching = field(init=False)
    """How many images are run at once through `network`."""
    _kept: tuple[int, tuple[Pass, ...]] | None = None
    """The number of the last sample block, and its passes."""
    _float_logits: dict[int, list[Tensor]] = field(default_factory=dict)
    """Logits of the float network for each pass, by sample block."""

    def __post_init__(self) -> None:
        largest = max(stop - start for start, stop in self.sample_blocks)
        self.network, self.quantized = self.prepared.network, self.prepared.layers
        self.packed_criterion = criteria.packed(self.criterion, self.network.outputs)
        self.batching = network_batching(self.network, largest, self.batch_images, self.memory_limit, self.batch_statistics)
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
        """Layer -> its replacement in `network`, for the layers that an assignment quantizes."""
        options = self.space.options
        return {options[k].layer: self.quantized[k] for k in self.space.chosen_options(assignment) if options[k].bits is not None}

    def loaded(self, sample_block: int) -> Batch:
        """Images and labels of one sample block, on the device of the network."""
        return on_device(self.network, self.load(*self.sample_blocks[sample_block]))

    def passes(self, sample_block: int) -> tuple[Pass, ...]:
        """One sample block with its float logits, in passes as even as integers allow."""
        if self._kept is None or self._kept[0] != sample_block:
            images, labels = self.loaded(sample_block)
            parts = split(images, labels, self.batching.images_per_pass)
            logits = self._float_logits.get(sample_block) or [self.network.logits(x) for x, _ in parts]
            if sum(part.nbytes for part in logits) * len(self.sample_blocks) <= FLOAT_LOGITS_BYTES:
                self._float_logits[sample_block] = logits
            self._kept = sample_block, tuple(Pass(x, y, z) for (x, y), z in zip(parts, logits, strict=True))
        return self._kept[1]


def on_device(network: Network, batch: Batch) -> Batch:
    """Images and labels on the device of a network."""
    images, labels = batch
    return images.to(network.device), None if labels is None else labels.to(network.device)


def split(images: Tensor, labels: Tensor | None, images_per_part: int) -> list[Batch]:
    """Images and labels in parts of at most `images_per_part`, as even as integers allow."""
    count = -(-len(images) // images_per_part)
    return [(images[a:b], None if labels is None else labels[a:b]) for a, b in sample_blocks(len(images), count)]


def network_batching(
    network: Network,
    images_per_block: int,
    batch_images: int | None = None,
    memory_limit: int | None = None,
    whole_blocks: bool = False,
) -> Batching:
    """How many images are run at once on the device of this network. With `whole_blocks`, a sample block is run as one batch."""
    cuts = [place.cut for place in network.places]
    default = batching(
        [cut.bytes_per_image for cut in cuts],
        [cut.peak_bytes_per_image for cut in cuts],
        images_per_block,
        batch_images,
        memory_limit,
        processor_of(network.device.type),
    )
    if not whole_blocks or default.images_per_pass >= images_per_block:
        return default
    if memory_limit is not None:
        raise ConfigurationError(
            f"batch statistics need a block of {images_per_block} images at once, and the memory limit holds "
            f"{default.images_per_pass}; raise memory_limit_mb or use more sample_blocks (fewer images each)"
        )
    batches = tuple(max(batch, images_per_block) for batch in default.batch_images)
    return Batching(images_per_block, batches, default.working_bytes * -(-images_per_block // default.images_per_pass))


def rows_per_tile(network: Network, space: SearchSpace, batching: Batching, memory_limit: int | None) -> int:
    """Rows of a row tile: all of them, or as many as have prefixes within the limit (bytes)."""
    if memory_limit is None:
        return space.num_options
    alive = [place.cut.bytes_per_image for place in network.places]
    usable = memory_limit - memory_limit // 6  # allocators keep part of the freed memory
    return rows_within_memory(space, batching.images_per_pass, alive, usable, batching.working_bytes)


def to_numpy(tensor: Tensor) -> Array:
    """The values in float64."""
    return tensor.double().cpu().numpy()
