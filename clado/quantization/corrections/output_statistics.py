"""For each output channel, the quantized layer gets the mean and standard deviation of the float layer.

This is bias correction (Nagel et al. 2019, arXiv 1906.04721, section 4.2, for the mean; Banner et al. 2019, arXiv 1810.05723,
section 4, for mean and spread of weights), on the moments of float inputs of calibration images. With y = s (W_q * x) + b, the
float layer's mean μ and deviation σ are matched by s = σ / σ_q and b = μ − s μ_q. The factor s goes into the weight's scale:
codes stay the same, and the network gets no extra operation. A per-tensor scale stays one scale. Then only the mean is corrected.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from clado.errors import DataError
from clado.grids import Grid, QuantizedLayer
from clado.quantization.corrections import LayerCorrection, LayerSample
from clado.quantization.moments import Moments

MIN_OBSERVATIONS = 32  # least observations of a channel; its deviation is then known to about an eighth
ROUNDING = 1e-6  # share of a layer's largest values; a smaller deviation is only rounding of float32 sums


def correct(sample: LayerSample, quantized: Sequence[QuantizedLayer]) -> list[QuantizedLayer]:
    """Corrects the bias (channels,) of quantized layers and, where scales are per channel, the scales.

    Returns the same layers if the layer takes no bias.

    Raises:
        DataError: There are too few calibration images.
    """
    if skipped(sample):
        return list(quantized)
    count = sample.moments.count
    if count < MIN_OBSERVATIONS:
        needed = -(-MIN_OBSERVATIONS * sample.num_images // max(1, count))
        raise DataError(
            f"output_statistics needs {MIN_OBSERVATIONS} observations of a channel of {sample.layer.name}, and "
            f"{sample.num_images} calibration images give {count}; expected data.calibration_images: {needed} or more"
        )
    floats = _Output(sample, sample.moments, sample.weight)
    if sample.bias is not None:
        floats.mean = floats.mean + sample.bias.double()
    return [_matched(sample, layer, floats) for layer in quantized]


def skipped(sample: LayerSample) -> str | None:
    """Why a layer is left as it is, or None."""
    return None if sample.takes_bias else "it has no bias that can be changed for it alone"


class _Output:
    """Mean and deviation (channels,) of a layer's output without its bias, float64."""

    def __init__(self, sample: LayerSample, moments: Moments, weight: Tensor) -> None:
        columns = sample.form.columns(weight)
        self.mean = moments.output_mean(columns).flatten()
        self.deviation = moments.output_variance(columns).flatten().sqrt()

    @property
    def varies(self) -> Tensor:
        """Whether a channel varies by more than the rounding of float32."""
        return self.deviation > ROUNDING * float((self.mean.abs() + self.deviation).max())


def _matched(sample: LayerSample, layer: QuantizedLayer, floats: _Output) -> QuantizedLayer:
    """The layer with the float layer's mean and, if its scales are per channel, deviation."""
    moments = sample.moments if layer.activation is None else sample.on_grid[layer.activation.bits]
    quantized = _Output(sample, moments, layer.weight)
    channels = len(floats.mean)
    ratio = torch.ones_like(floats.mean)
    grid = layer.grid
    per_channel = grid is not None and grid.scale.numel() == channels == sample.layer.num_channels and channels > 1
    if per_channel:
        # a channel that does not vary in one of the two has no deviation to match
        varies = quantized.varies & floats.varies
        ratio = torch.where(varies, floats.deviation / quantized.deviation.clamp(min=1e-30), ratio)
    bias = (floats.mean - ratio * quantized.mean).to(layer.weight)
    if not per_channel or grid is None:
        return replace(layer, bias=bias)
    codes = grid.quantize(layer.weight.float())
    scaled = Grid(grid.scale * ratio.to(grid.scale).reshape(grid.scale.shape), grid.zero_point, grid.codes)
    return replace(layer, weight=scaled.dequantize(codes).to(layer.weight.dtype), bias=bias, grid=scaled)


correction = LayerCorrection(correct, skipped)
