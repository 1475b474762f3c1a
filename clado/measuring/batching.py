"""How many images and rows go through the network at once. Integers only, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from clado.errors import ConfigurationError
from clado.network.batch_size import CPU, Processor
from clado.space import SearchSpace


@dataclass(frozen=True)
class Batching:
    """How many images are run at once."""

    images_per_pass: int
    """Most images of a sample block that are measured at a time."""
    batch_images: tuple[int, ...]
    """Images of one run from each layer on, with stacked rows."""
    working_bytes: int
    """Most bytes of one such run, without the stored prefixes."""


def batching(
    alive_bytes: Sequence[int],
    peak_bytes: Sequence[int],
    images_per_block: int,
    batch_images: int | None = None,
    limit_bytes: int | None = None,
    processor: Processor = CPU,
) -> Batching:
    """The batching of a network. An image takes `alive_bytes[i]` at the cut before layer i, at most `peak_bytes[i]` after it.

    A run is fastest if its values stay in the cache and its batch is large. So by default a batch has the size that is fastest
    on the processor, and at least one pass. A run takes at most a quarter of `limit_bytes`. Buffers of operators are as large as
    their values again, and stored prefixes need the rest.

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
        # a pass up to twice as large is better than one half as small, because runs of one row cannot be stacked
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
    """Rows of a `pairs` tile whose stored prefixes fit into `limit_bytes` together with `working_bytes`, at most all rows.

    `bytes_per_image[i]` is the size of the values alive before layer i. A tile holds one copy of them for each of its rows of
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
