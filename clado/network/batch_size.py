"""How many images one run of a network takes by default: one rule for tiles, losses, accuracies and re-estimation. No torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Processor:
    """What a device computes fastest with. The values were measured: tests/benchmarks/MEASURE.md, tests/benchmarks/GPU.md."""

    fast_bytes: int
    """Bytes of the values of one run: what a CPU's cache holds, or what keeps a GPU busy."""
    most: int
    """Images of one run at most."""

    def images(self, peak_bytes: int) -> int:
        """Images of one run that is fast, whose values take so many bytes an image."""
        return min(max(self.fast_bytes // max(1, peak_bytes), MIN_BATCH), self.most)


MIN_BATCH = 8
CPU = Processor(32 * 10**6, 512)
GPU = Processor(2 * 10**9, 4096)


def processor_of(device_type: str) -> Processor:
    """The processor of a `torch.device.type`."""
    return GPU if device_type == "cuda" else CPU
