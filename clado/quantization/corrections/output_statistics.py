"""Per output channel: the quantized layer's mean and standard deviation become those of the float layer.

This is bias correction (Nagel et al. 2019, arXiv 1906.04721, section 4.2, for the mean; Banner et al. 2019, arXiv 1810.05723,
section 4, for mean and spread of weights), measured on calibration images with float inputs. With y = s (W_q * x) + b, the float
layer's mean μ and deviation σ are matched by s = σ / σ_q and b = μ − s μ_q. The factor s goes into the weight's scale: codes stay
the same, and the network gets no operation. A per-tensor scale stays one scale. Then only the mean is corrected.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from clado.errors import DataError
from clado.grids import Grid, QuantizedLayer
from clado.quantization.corrections import LayerCorrection, LayerSample

MIN_OBSERVATIONS = 32  # of one channel; its deviation is then known to about an eighth
ROUNDING = 1e-6  # share of a layer's largest values; a smaller deviation is the rounding of sums in float32


def correct(sample: LayerSample, quantized: Sequence[QuantizedLayer]) -> list[QuantizedLayer]:
    """Corrects the bias (channels,) of quantized layers and, where scales are per channel, the scales.

    Returns the same layers where the layer takes no bias.

    Raises:
        DataError: There are too few calibration images.
    """
    if skipped(sample):
        return list(quantized)
    float_moments = _Moments()
    quantized_moments = [_Moments() for _ in quantized]
    for x in sample.inputs():
        float_moments.add(_channels(sample, sample.apply(x, sample.weight, sample.bias)))
        for moments, layer in zip(quantized_moments, quantized, strict=True):
            layer_input = x if layer.activation is None else layer.activation.fake_quantize(x)
            moments.add(_channels(sample, sample.apply(layer_input, layer.weight, None)))
    if float_moments.count < MIN_OBSERVATIONS:
        needed = -(-MIN_OBSERVATIONS * sample.num_images // max(1, float_moments.count))
        raise DataError(
            f"output_statistics needs {MIN_OBSERVATIONS} observations of a channel of {sample.layer.name}, and "
            f"{sample.num_images} calibration images give {float_moments.count}; "
            f"expected data.calibration_images: {needed} or more"
        )
    return [_matched(sample, layer, float_moments, moments) for layer, moments in zip(quantized, quantized_moments, strict=True)]


def skipped(sample: LayerSample) -> str | None:
    """Why a layer is left as it is, or None."""
    return None if sample.takes_bias else "its bias is not its own"


def _channels(sample: LayerSample, y: Tensor) -> Tensor:
    """An output as (channels, observations)."""
    axis = -1 if sample.layer.operator == "linear" else 1
    return y.movedim(axis, 0).flatten(1)


def _matched(sample: LayerSample, layer: QuantizedLayer, floats: "_Moments", quantized: "_Moments") -> QuantizedLayer:
    """The layer with the float layer's mean and, where its scales are per channel, deviation."""
    channels = len(floats.mean)
    ratio = torch.ones(channels, dtype=torch.float64)
    grid = layer.grid
    per_channel = grid is not None and grid.scale.numel() == channels == sample.layer.num_channels and channels > 1
    if per_channel:
        # a channel that does not vary, quantized or not, has no deviation to match
        varies = quantized.varies & floats.varies
        ratio = torch.where(varies, floats.deviation / quantized.deviation.clamp(min=1e-30), ratio)
    bias = (floats.mean - ratio * quantized.mean).to(layer.weight)
    if not per_channel or grid is None:
        return replace(layer, bias=bias)
    codes = grid.quantize(layer.weight.float())
    scaled = Grid(grid.scale * ratio.to(grid.scale).reshape(grid.scale.shape), grid.zero_point, grid.codes)
    return replace(layer, weight=scaled.dequantize(codes).to(layer.weight.dtype), bias=bias, grid=scaled)


class _Moments:
    """Count, mean and deviation (channels,) over batches, about a fixed first guess of the mean.

    Sums over one batch are in float32 at least, on the device of its values. Sums over batches are in float64.
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
