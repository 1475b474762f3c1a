"""The default number of images of one run. One rule for tiles, losses, accuracies and re-estimation. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Processor:
    """The fastest sizes for a device. The values were measured: tests/benchmarks/MEASURE.md, tests/benchmarks/GPU.md."""

    fast_bytes: int
    """Bytes of the values of one run. They fit into a CPU's cache, or keep a GPU busy."""
    most: int
    """Most images of one run."""

    def images(self, peak_bytes: int) -> int:
        """The number of images of a fast run. The values of an image take `bytes_per_image` bytes."""
        return min(max(self.fast_bytes // max(1, peak_bytes), MIN_BATCH), self.most)


MIN_BATCH = 8
CPU = Processor(32 * 10**6, 512)
GPU = Processor(2 * 10**9, 4096)


def processor_of(device_type: str) -> Processor:
    """The processor of a `torch.device.type`."""
    return GPU if device_type == "cuda" else CPU
