"""How images travel through the network, and how much of a tile memory holds: integers. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from clado.errors import ConfigurationError
from clado.network.batch_size import CPU, Processor
from clado.space import SearchSpace


@dataclass(frozen=True)
class Batching:
    """How images travel."""

    images_per_pass: int
    """Most images of a sample block that are measured at a time."""
    batch_images: tuple[int, ...]
    """Images of one run resumed at each layer, rows stacked."""
    working_bytes: int
    """Bytes that one such run may take, without the stored prefixes."""


def batching(
    alive_bytes: Sequence[int],
    peak_bytes: Sequence[int],
    images_per_block: int,
    batch_images: int | None = None,
    limit_bytes: int | None = None,
    processor: Processor = CPU,
) -> Batching:
    """The batching for values of `alive_bytes[i]` an image at the cut before layer i, and `peak_bytes[i]` from there on.

    A run is fastest while its values stay in the cache and its batch is large. So by default a batch is what the processor runs
    fast, and a pass at least. A run takes a quarter of `limit_bytes` at most. Buffers of operators are as large as their values
    again, and stored prefixes need the rest.

    Raises:
        ConfigurationError: One image does not fit.
    """
    if batch_images is not None and batch_images < 1:
        raise ConfigurationError(f"batch_images is {batch_images}; expected at least 1")
    sizes = [max(1, alive + peak) for alive, peak in zip(alive_bytes, peak_bytes, strict=True)]
    fits = [processor.most if limit_bytes is None else limit_bytes // (4 * size) for size in sizes]
    if min(fits) < 1:
        raise ConfigurationError(
            f"the memory limit is too small for a batch of one image: needed {4 * max(sizes) / 1e6:.1f} MB, available "
            f"{(limit_bytes or 0) / 1e6:.1f} MB; raise memory_limit_mb or use smaller images"
        )
    if batch_images is None:
        ideal = [processor.images(peak) for peak in peak_bytes]
        # a pass rather up to twice as large than half as small: its runs of one row cannot be stacked
        passes = max(1, images_per_block // min(ideal))
        ideal = [max(want, -(-images_per_block // passes)) for want in ideal]
    else:
        ideal = [batch_images] * len(sizes)
    batches = tuple(min(want, fit) for want, fit in zip(ideal, fits, strict=True))
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
