"""Batch norm's statistics measured again on the quantized network, on unlabelled calibration images.

Sun et al. 2019, "Hybrid 8-bit floating point", section 3.2; Nahshan et al. 2021, arXiv 1911.07190; for post-training quantization
Finkelstein et al. 2019, arXiv 1906.03193. Statistics are pooled over all calibration images, layer by layer in execution order,
so they do not depend on the batch size. The network keeps its operations: running means and variances have other values. Where a
target folds batch norm into the convolution before it, `fold` does so, with the integer codes unchanged.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from clado.errors import DataError, NetworkError
from clado.network import Network
from clado.quantizers import Grid, QuantizedLayer

STAGE = "final"
MIN_IMAGES = 16


def reestimate(network: Network, quantized: Mapping[int, QuantizedLayer], images: Sequence[Tensor]) -> dict[str, Tensor]:
    """New running means and variances by buffer name, for `network.updated`; empty for a network without batch norm.

    `images` are batches (n, C, H, W). Raises NetworkError where batch norm is there and out of reach, DataError for too few
    images.
    """
    if not any(name.endswith("running_var") for name, _ in network.model.named_buffers()):
        return {}
    count = sum(len(batch) for batch in images)
    if count < MIN_IMAGES:
        raise DataError(
            f"batchnorm_reestimation has {count} calibration images; expected data.calibration_images: {MIN_IMAGES} or more"
        )
    found = network.normalisation(images, quantized)
    if not found:
        raise NetworkError(
            "batchnorm_reestimation finds no batch norm that it can stop at, though the network has statistics of some; expected "
            "batch norm in eval mode, not folded, or corrections without it"
        )
    return found


def fold(layer: QuantizedLayer, norm: Mapping[str, Tensor], eps: float) -> QuantizedLayer:
    """A convolution with the batch norm behind it inside: γ/σ goes into the per-channel scale, the rest into the bias.

    `norm` has weight γ, bias β, mean and variance, each (channels,), of the batch norm behind the layer. Integer codes stay.
    Raises NetworkError for a per-tensor grid, which has no scale of its own for each channel.
    """
    grid = layer.grid
    channels = len(norm["mean"])
    if grid is None or grid.scale.numel() != channels:
        raise NetworkError("batch norm is folded into the scale of each channel; expected a per-channel grid")
    factor = norm["weight"] / (norm["variance"] + eps).sqrt()
    codes = grid.quantize(layer.weight.float())
    scaled = Grid(grid.scale * factor.reshape(grid.scale.shape), grid.zero_point, grid.codes)
    bias = 0.0 if layer.bias is None else layer.bias
    shifted = norm["bias"] + (bias - norm["mean"]) * factor
    return QuantizedLayer(scaled.dequantize(codes).to(layer.weight.dtype), shifted, layer.activation, scaled)
