"""Batch norm's statistics moved by what quantization changes, measured on unlabelled calibration images.

Quantized weights shift and stretch what a batch norm sees. Its statistics follow, so that each channel of its output has the
float network's mean and deviation on the same images. With trained statistics μ, σ, those of the float network's inputs μ_f, σ_f
and of the quantized network's inputs μ_q, σ_q, all measured on the same images, the new ones are

    σ' = σ σ_q / σ_f        μ' = μ_q − (μ_f − μ) σ_q / σ_f

Without quantization μ' = μ and σ' = σ: trained statistics stay. Replacing them by μ_q, σ_q instead (Sun et al. 2019, "Hybrid
8-bit floating point", section 3.2; Finkelstein et al. 2019, arXiv 1906.03193) also replaces what training averaged over
augmented images by what a few hundred centre crops have. On an ImageNet network that costs 3 to 7 points of top-1 by itself
(tests/benchmarks/NO_HARM.md).

Statistics are pooled over images and taken layer by layer in execution order, so they do not depend on the batch size. The
network keeps its operations.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from clado.errors import DataError, NetworkError
from clado.grids import QuantizedLayer
from clado.network.graph import Moments, NormStatistics
from clado.network.network import Network
from clado.quantization.corrections import FinalCorrection

MIN_IMAGES = 16
MOST_IMAGES = 128  # the first of them: both networks see the same, so that more move the loss by less than its standard error


def reference(network: Network, images: Sequence[Tensor]) -> dict[str, Moments]:
    """What the batch norms of the float network see: (mean, variance) by the name of the running mean. Measured once.

    Args:
        network: The float network.
        images: Batches (n, C, H, W); the first `MOST_IMAGES` are read.

    Raises:
        NetworkError: Batch norm is there and out of reach.
        DataError: There are too few images.
    """
    if not any(name.endswith("running_var") for name, _ in network.model.named_buffers()):
        return {}
    count = sum(len(batch) for batch in images)
    if count < MIN_IMAGES:
        raise DataError(
            f"batchnorm_reestimation has {count} calibration images; expected data.calibration_images: {MIN_IMAGES} or more"
        )
    found: dict[str, Moments] = {}

    def trained(norm: NormStatistics) -> Moments:
        found[norm.mean] = norm.seen
        return norm.trained

    network.normalisation(_first(images), statistics=trained)
    if not found:
        raise NetworkError(
            "batchnorm_reestimation finds no batch norm that it can stop at, though the network has statistics of some; expected "
            "batch norm in eval mode, not folded, or corrections without it"
        )
    return found


def reestimate(
    network: Network, quantized: Mapping[int, QuantizedLayer], images: Sequence[Tensor], floats: Mapping[str, Moments]
) -> dict[str, Tensor]:
    """New running means and variances by buffer name, for `network.updated`; empty for a network without batch norm.

    Args:
        network: The float network.
        quantized: Layer -> what stands in its place.
        images: Batches (n, C, H, W), those of `floats`.
        floats: What `reference` gives.
    """
    if not floats:
        return {}
    return network.normalisation(_first(images), quantized, lambda norm: matched(norm, floats[norm.mean]))


def _first(batches: Sequence[Tensor]) -> list[Tensor]:
    """The first `MOST_IMAGES` images, in batches."""
    left, first = MOST_IMAGES, []
    for batch in batches:
        first.append(batch[:left])
        left -= len(first[-1])
        if not left:
            break
    return first


def forward_images(model: nn.Module, num_images: int, has_graph: bool) -> int:
    """Forward images of one assignment: those that are read, by whole forwards once for each batch norm. None without batch norm.

    It is an upper bound: a batch norm that a forward meets twice is left as it is.
    """
    norms = sum(name.endswith("running_var") for name, _ in model.named_buffers())
    return min(num_images, MOST_IMAGES) * (min(norms, 1) if has_graph else norms)


def matched(norm: NormStatistics, floats: Moments) -> Moments:
    """The statistics under which a batch norm's output has the float network's mean and deviation in each channel.

    Args:
        norm: What the batch norm has, and what it sees of the quantized network.
        floats: What it sees of the float network on the same images.
    """
    (mean, variance), (float_mean, float_variance), (seen_mean, seen_variance) = (
        [part.double() for part in moments] for moments in (norm.trained, floats, norm.seen)
    )
    # ε stands in the batch norm's own deviation; it also keeps channels that never vary as they are
    ratio = (seen_variance + norm.eps) / (float_variance + norm.eps)
    moved = seen_mean - (float_mean - mean) * ratio.sqrt()
    widened = ((variance + norm.eps) * ratio - norm.eps).clamp(min=0.0)
    return moved.to(norm.trained[0]), widened.to(norm.trained[1])


correction = FinalCorrection(reference, reestimate, forward_images)
