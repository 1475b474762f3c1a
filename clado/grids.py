"""Integer grids for weights and inputs, and a layer whose weight lies on one."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Codes:
    """The integers of a b-bit grid.

    Symmetric: −(2^(b−1)−1) .. 2^(b−1)−1, and −1 and +1 for b = 1. Affine: 0 .. 2^b − 1.
    """

    low: int
    """The least code."""
    high: int
    """The largest code."""
    step: int = 1
    """Distance of neighbouring codes."""

    @classmethod
    def of(cls, bits: int, symmetric: bool) -> "Codes":
        """The codes of a bit-width."""
        if not symmetric:
            return cls(0, 2**bits - 1)
        if bits == 1:
            return cls(-1, 1, step=2)
        return cls(-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1)


@dataclass(frozen=True)
class Grid:
    """A b-bit grid: value = (code − zero_point) · scale."""

    scale: Tensor
    """Distance of neighbouring integers; it broadcasts against the tensor."""
    zero_point: Tensor
    """The integer that stands for zero; it broadcasts against the tensor."""
    codes: Codes
    """The integers of the grid."""

    def quantize(self, weight: Tensor) -> Tensor:
        """Nearest codes (int32) of a float tensor. Values outside of the range saturate."""
        position = weight / self.scale + self.zero_point
        if self.codes.step == 2:
            return torch.where(position >= 0, 1, -1).to(torch.int32)
        return position.round().clamp(self.codes.low, self.codes.high).to(torch.int32)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Float values of codes."""
        return (codes - self.zero_point) * self.scale

    def fake_quantize(self, weight: Tensor) -> Tensor:
        """Float values of the nearest codes, with the shape and device of the input. The input is not changed."""
        return self.dequantize(self.quantize(weight))


@dataclass(frozen=True)
class ActivationGrid:
    """An affine per-tensor grid of 2^bits codes for a layer's input: value = (code − zero_point) · scale."""

    bits: int
    """Bit-width of the codes."""
    scale: float
    """Distance of neighbouring codes."""
    zero_point: int
    """The code that stands for zero."""

    @classmethod
    def of_range(cls, low: float, high: float, bits: int) -> "ActivationGrid":
        """The grid that spans low..high. Zero is always on it."""
        grid = grid_of_range(torch.tensor(float(low)), torch.tensor(float(high)), Codes.of(bits, False), False)
        return cls(bits, float(grid.scale), int(grid.zero_point))

    def fake_quantize(self, x: Tensor) -> Tensor:
        """The nearest values on the grid. Values outside of its range saturate, and NaN stays NaN. The input is not changed."""
        if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            return self.fake_quantize(x.float()).to(x.dtype)
        if x.requires_grad or x.is_cuda:
            on_grid = torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, 0, 2**self.bits - 1)
            return torch.where(x.isnan(), x, on_grid)  # torch's operator treats NaN as the lowest value
        # bit for bit the same on a CPU, where torch's operator takes twenty times as long
        codes = (x.float() * self._inverse).round_().clamp_(-self.zero_point, 2**self.bits - 1 - self.zero_point)
        return codes.mul_(self.scale).to(x.dtype)

    @cached_property
    def _inverse(self) -> float:
        """1 / scale in float32, with torch's rounding."""
        return float(1 / torch.tensor(self.scale, dtype=torch.float32))


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A layer at one option: its weight, and optionally its bias and the grid of its input."""

    weight: Tensor
    """Float values, with the shape of the layer's weight."""
    bias: Tensor | None = None
    """The bias (channels,) of a correction; None keeps the layer's bias."""
    activation: ActivationGrid | None = None
    """The grid of the layer's input; None keeps the input in float."""
    grid: Grid | None = None
    """The grid that the weight lies on; None for a weight in float."""


def grid_of_range(low: Tensor, high: Tensor, codes: Codes, symmetric: bool) -> Grid:
    """The grid whose codes span low..high.

    An empty range gets scale 1, so that zeros stay zeros. A range is empty if a channel is all
    zero, or if its step is too small for a float.
    """
    ones = torch.ones_like(high)
    if symmetric:
        magnitude = torch.maximum(low.abs(), high.abs())
        # a one-bit grid has no zero: an all-zero channel keeps the least positive scale instead of becoming ±1
        empty = torch.full_like(magnitude, torch.finfo(magnitude.dtype).tiny) if codes.step == 2 else ones
        scale = magnitude / codes.high
        return Grid(torch.where(scale > 0, scale, empty), torch.zeros_like(magnitude), codes)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)  # zero is always on an affine grid
    scale = (high - low) / codes.high
    scale = torch.where(scale > 0, scale, ones)
    return Grid(scale, (-low / scale).round().clamp(codes.low, codes.high), codes)
