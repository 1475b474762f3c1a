"""Per output channel: the quantized layer's mean and standard deviation become those of the float layer.

Bias correction (Nagel et al. 2019, arXiv 1906.04721, section 4.2, there for the mean; Banner et al. 2019, arXiv 1810.05723,
section 4, for mean and spread of weights), measured on calibration images with float inputs. With y = s (W_q * x) + b, scale and
bias that match mean μ and deviation σ of the float layer are s = σ / σ_q and b = μ − s μ_q; s goes into the weight's scale, so
codes stay as they are and the network gets no operation. A per-tensor scale stays one scale: then only the mean is corrected.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from clado.errors import DataError
from clado.grids import Grid, QuantizedLayer
from clado.quantization.corrections import LayerCorrection, LayerSample

MIN_OBSERVATIONS = 32  # of one channel: a deviation is then known to about an eighth of itself
ROUNDING = 1e-6  # share of a layer's largest values: what varies less is the rounding of sums in float32


def correct(sample: LayerSample, quantized: Sequence[QuantizedLayer]) -> list[QuantizedLayer]:
    """The same layers with corrected bias (channels,) and, per channel, scale; unchanged where the layer takes no bias.

    Raises DataError where the calibration images are too few.
    """
    if skipped(sample):
        return list(quantized)
    floats = _Moments()
    ours = [_Moments() for _ in quantized]
    for x in sample.inputs():
        floats.add(_channels(sample, sample.apply(x, sample.weight, sample.bias)))
        for moments, layer in zip(ours, quantized, strict=True):
            seen = x if layer.activation is None else layer.activation.fake_quantize(x)
            moments.add(_channels(sample, sample.apply(seen, layer.weight, None)))
    if floats.count < MIN_OBSERVATIONS:
        needed = -(-MIN_OBSERVATIONS * sample.num_images // max(1, floats.count))
        raise DataError(
            f"output_statistics needs {MIN_OBSERVATIONS} observations of a channel of {sample.layer.name}, and "
            f"{sample.num_images} calibration images give {floats.count}; expected data.calibration_images: {needed} or more"
        )
    return [_matched(sample, layer, floats, moments) for layer, moments in zip(quantized, ours, strict=True)]


def skipped(sample: LayerSample) -> str | None:
    """Why a layer is left as it is, or None."""
    return None if sample.takes_bias else "its bias is not its own"


def _channels(sample: LayerSample, y: Tensor) -> Tensor:
    """An output as (channels, observations)."""
    axis = -1 if sample.layer.operator == "linear" else 1
    return y.movedim(axis, 0).flatten(1)


def _matched(sample: LayerSample, layer: QuantizedLayer, floats: "_Moments", ours: "_Moments") -> QuantizedLayer:
    channels = len(floats.mean)
    ratio = torch.ones(channels, dtype=torch.float64)
    grid = layer.grid
    per_channel = grid is not None and grid.scale.numel() == channels == sample.layer.num_channels and channels > 1
    if per_channel:
        # a channel that does not vary, quantized or not, has no deviation to match
        varies = ours.varies & floats.varies
        ratio = torch.where(varies, floats.deviation / ours.deviation.clamp(min=1e-30), ratio)
    bias = (floats.mean - ratio * ours.mean).to(layer.weight)
    if not per_channel or grid is None:
        return replace(layer, bias=bias)
    codes = grid.quantize(layer.weight.float())
    scaled = Grid(grid.scale * ratio.to(grid.scale).reshape(grid.scale.shape), grid.zero_point, grid.codes)
    return replace(layer, weight=scaled.dequantize(codes).to(layer.weight.dtype), bias=bias, grid=scaled)


class _Moments:
    """Count, mean and deviation (channels,) over batches, about a fixed first guess of the mean.

    Sums over one batch are taken in float32 at least and where its values are, those over batches in float64.
    """

    def __init__(self) -> None:
        self.count = 0
        self.centre = self.total = self.squares = torch.zeros(0)

    def add(self, values: Tensor) -> None:
        """Adds observations (channels, n)."""
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if not self.count:
            self.centre = values.mean(1)
            self.total = self.squares = torch.zeros_like(self.centre, dtype=torch.float64)
        values = values - self.centre[:, None]
        self.count += values.shape[1]
        self.total = self.total + values.sum(1)
        self.squares = self.squares + values.square_().sum(1)

    @property
    def mean(self) -> Tensor:
        """Mean of each channel."""
        return (self.centre.double() + self.total / self.count).cpu()

    @property
    def deviation(self) -> Tensor:
        """Standard deviation of each channel."""
        return (self.squares / self.count - (self.total / self.count).square()).clamp(min=0.0).sqrt().cpu()

    @property
    def varies(self) -> Tensor:
        """Whether a channel varies by more than the rounding of float32."""
        return self.deviation > ROUNDING * float((self.mean.abs() + self.deviation).max())


correction = LayerCorrection(correct, skipped)
