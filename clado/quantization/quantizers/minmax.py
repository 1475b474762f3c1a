"""Range from the least to the largest weight: nothing saturates, and outliers set the step."""

from torch import Tensor

from clado.grids import Codes
from clado.quantization.quantizers import Quantizer


def fit_range(weight: Tensor, codes: Codes, symmetric: bool) -> tuple[Tensor, Tensor]:
    """(channels, n) -> the least and the largest value of each row, (channels, 1) each."""
    return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)


quantizer = Quantizer(fit_range)
