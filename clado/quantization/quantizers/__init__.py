"""Weight quantizers: each file chooses a range, and the grid follows from it.

To add a quantizer, add a file to this folder with an object `quantizer = Quantizer(...)`, and subclass `QuantizerContract`
(tests/contracts/quantizer.py) for it. The file's name is the quantizer's name.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from clado.grids import Codes, Grid, grid_of_range
from clado.plugins import load


@dataclass(frozen=True)
class Quantizer:
    """Everything that the rest of the code must know about a quantizer."""

    fit_range: Callable[[Tensor, Codes, bool], tuple[Tensor, Tensor]]
    """(float rows (channels, n), codes, whether zero is in the middle) -> the range (low, high) that the codes span in each row,
    (channels, 1) each. Per-tensor quantization passes one row."""


def quantizer_of(name: str) -> Quantizer:
    """The quantizer of a name, or of `package.module:name`."""
    quantizer: Quantizer = load("quantizers", name)
    return quantizer


@dataclass(frozen=True)
class WeightQuantizer:
    """Rounds weights to the nearest code of a b-bit grid."""

    name: str = "mse"
    """The file that chooses the range."""
    per_channel: bool = True
    """Whether each output channel has its own scale, or the tensor has one."""
    symmetric: bool = True
    """Whether the grid is symmetric about zero, or affine."""

    def __post_init__(self) -> None:
        quantizer_of(self.name)  # refuses an unknown name

    def grid(self, weight: Tensor, bits: int, channel_axis: int = 0) -> Grid:
        """The grid of a weight of any shape; scales broadcast along `channel_axis` when per channel."""
        codes = Codes.of(bits, self.symmetric)
        rows = weight.detach().float()
        rows = rows.movedim(channel_axis, 0).reshape(rows.shape[channel_axis], -1) if self.per_channel else rows.reshape(1, -1)
        low, high = quantizer_of(self.name).fit_range(rows, codes, self.symmetric)
        grid = grid_of_range(low, high, codes, self.symmetric)
        shape = [1] * weight.ndim
        if self.per_channel:
            shape[channel_axis] = -1
        return Grid(grid.scale.reshape(shape), grid.zero_point.reshape(shape), codes)

    def fake_quantize(self, weight: Tensor, bits: int, channel_axis: int = 0) -> Tensor:
        """Q(w, b): the weight rounded to its b-bit grid. Shape, dtype and device are kept, and the input is not changed."""
        return self.grid(weight, bits, channel_axis).fake_quantize(weight.detach().float()).to(weight.dtype)


def range_of(name: str, values: Tensor, bits: int) -> tuple[float, float]:
    """(low, high) of an affine per-tensor grid for activations, fitted by a quantizer of this folder on values (n,)."""
    low, high = quantizer_of(name).fit_range(values.reshape(1, -1), Codes.of(bits, False), False)
    return float(low), float(high)
