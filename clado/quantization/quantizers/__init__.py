"""Weight quantizers: each file chooses a range, and the grid follows from it.

A quantizer is a module of this folder with one function

    fit_range(weight, codes, symmetric) -> (low, high)

on a float tensor (channels, n): per channel (row) the range that the codes `codes.low .. codes.high` shall span, two tensors
(channels, 1). Per-tensor quantization passes one row. Names are file names; a new file is a new quantizer.
"""

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from torch import Tensor

from clado.errors import ConfigurationError
from clado.grids import Codes, Grid, grid_of_range
from clado.plugins import available


@dataclass(frozen=True)
class WeightQuantizer:
    """Round to nearest on a b-bit grid, per tensor or per output channel; `name` is the file that chooses the range."""

    name: str = "mse"
    per_channel: bool = True
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.name not in available("quantizers"):
            raise ConfigurationError(f"unknown quantizer {self.name!r}; expected one of {', '.join(available('quantizers'))}")

    def grid(self, weight: Tensor, bits: int, channel_axis: int = 0) -> Grid:
        """The grid of a weight of any shape; scales broadcast along `channel_axis` when per channel."""
        codes = Codes.of(bits, self.symmetric)
        rows = weight.detach().float()
        rows = rows.movedim(channel_axis, 0).reshape(rows.shape[channel_axis], -1) if self.per_channel else rows.reshape(1, -1)
        low, high = _module(self.name).fit_range(rows, codes, self.symmetric)
        grid = grid_of_range(low, high, codes, self.symmetric)
        shape = [1] * weight.ndim
        if self.per_channel:
            shape[channel_axis] = -1
        return Grid(grid.scale.reshape(shape), grid.zero_point.reshape(shape), codes)

    def fake_quantize(self, weight: Tensor, bits: int, channel_axis: int = 0) -> Tensor:
        """Q(w, b): the weight rounded to its b-bit grid; shape, dtype and device are kept, the input is not changed."""
        return self.grid(weight, bits, channel_axis).fake_quantize(weight.detach().float()).to(weight.dtype)


def range_of(name: str, values: Tensor, bits: int) -> tuple[float, float]:
    """(low, high) of an affine per-tensor grid for activations, fitted by a quantizer of this folder on values (n,)."""
    low, high = _module(name).fit_range(values.reshape(1, -1), Codes.of(bits, False), False)
    return float(low), float(high)


def _module(name: str) -> ModuleType:
    return import_module(f"clado.quantization.quantizers.{name}")
