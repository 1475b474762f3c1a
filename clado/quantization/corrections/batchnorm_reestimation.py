"""Batch norm's statistics follow the changes by quantization, which are measured on unlabelled calibration images.

Quantized weights shift and scale the input of a batch norm. Its statistics are changed, so that each channel of its output has
the float network's mean and deviation on the same images. The trained statistics are μ, σ. Its input has μ_f, σ_f in the
float network and μ_q, σ_q in the quantized network, on the same images. The new statistics are

    σ' = σ σ_q / σ_f        μ' = μ_q − (μ_f − μ) σ_q / σ_f

Without quantization μ' = μ and σ' = σ, so trained statistics stay. Others replace them by μ_q, σ_q (Sun et al. 2019, "Hybrid
8-bit floating point", section 3.2; Finkelstein et al. 2019, arXiv 1906.03193). That also replaces averages over augmented
training images by those of a few hundred centre crops. On an ImageNet network this costs 3 to 7 points of top-1 by itself
(tests/benchmarks/NO_HARM.md).

Statistics are pooled over images and taken layer by layer in execution order, so they do not depend on the batch size. The
network keeps its operations.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from clado.errors import DataError, NetworkError
from clado.grids import QuantizedLayer
from clado.network.network import Network
from clado.network.normalisation import Moments, NormStatistics
from clado.quantization.corrections import FinalCorrection

MIN_IMAGES = 16
# Both networks see the same images. More images than these move the loss by less than its standard error.
MOST_IMAGES = 128


def reference(network: Network, images: Sequence[Tensor]) -> dict[str, Tensor]:
    """The input statistics of the float network's batch norms: mean and variance (2, channels) by the name of the running mean.

    Args:
        network: The float network.
        images: Batches (n, C, H, W); the first `MOST_IMAGES` are read.

    Raises:
        NetworkError: The network has batch norm that cannot be reached.
        DataError: There are too few images.
    """
    if not any(name.endswith("running_var") for name, _ in network.model.named_buffers()):
        return {}
    count = sum(len(batch) for batch in images)
    if count < MIN_IMAGES:
        raise DataError(
            f"batchnorm_reestimation has {count} calibration images; expected data.calibration_images: {MIN_IMAGES} or more"
        )
    moments: dict[str, Tensor] = {}

    def keep(norm: NormStatistics) -> Moments:
        moments[norm.mean] = torch.stack(norm.seen)
        return norm.trained

    network.normalisation(_first_images(images), statistics=keep)
    if not moments:
        raise NetworkError(
            "batchnorm_reestimation finds no batch norm that it can stop at, but the network has statistics of some; expected "
            "batch norm in eval mode, not folded, or corrections without it"
        )
    return moments


def reestimate(
    network: Network, quantized: Mapping[int, QuantizedLayer], images: Sequence[Tensor], floats: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """New running means and variances by buffer name, for `network.updated`. Empty for a network without batch norm.

    Args:
        network: The float network.
        quantized: Layer -> its quantized layer.
        images: Batches (n, C, H, W), the same as for `reference`.
        floats: The result of `reference`.
    """
    if not floats:
        return {}
    return network.normalisation(_first_images(images), quantized, lambda norm: matched(norm, floats[norm.mean]))


def _first_images(batches: Sequence[Tensor]) -> list[Tensor]:
    """The first `MOST_IMAGES` images, in batches."""
    room, parts = MOST_IMAGES, []
    for batch in batches:
        parts.append(batch[:room])
        room -= len(parts[-1])
        if not room:
            break
    return parts


def forward_images(model: nn.Module, num_images: int, has_graph: bool) -> int:
    """Forward images of one assignment: the images that are read, or with whole forward passes this many for each batch norm.

    It is 0 without batch norm. It is an upper bound, because a batch norm that runs twice is not changed.
    """
    norms = sum(name.endswith("running_var") for name, _ in model.named_buffers())
    return min(num_images, MOST_IMAGES) * (min(norms, 1) if has_graph else norms)


def matched(norm: NormStatistics, floats: Moments | Tensor) -> Moments:
    """The statistics that give a batch norm's output the float network's mean and deviation in each channel.

    Args:
        norm: The batch norm's trained statistics, and its input statistics in the quantized network.
        floats: Mean and variance of its input in the float network on the same images.
    """
    (mean, variance), (float_mean, float_variance), (seen_mean, seen_variance) = (
        [part.double() for part in moments] for moments in (norm.trained, floats, norm.seen)
    )
    # the batch norm's deviation contains ε; so channels that never vary do not change
    ratio = (seen_variance + norm.eps) / (float_variance + norm.eps)
    new_mean = seen_mean - (float_mean - mean) * ratio.sqrt()
    new_variance = ((variance + norm.eps) * ratio - norm.eps).clamp(min=0.0)
    return new_mean.to(norm.trained[0]), new_variance.to(norm.trained[1])


correction = FinalCorrection(reference, reestimate, forward_images)
