"""Range from the 0.01 % to the 99.99 % quantile: rare outliers saturate (Wu et al. 2020, arXiv 2004.09602, section 4)."""

from torch import Tensor

from clado.grids import Codes
from clado.quantization.quantizers import Quantizer

SHARE = 1e-4


def fit_range(weight: Tensor, codes: Codes, symmetric: bool) -> tuple[Tensor, Tensor]:
    """(channels, n) -> the quantiles of each row, (channels, 1) each; of a few values the extremes."""
    ordered = weight.sort(1).values
    skipped = int(SHARE * weight.shape[1])
    return ordered[:, skipped : skipped + 1], ordered[:, weight.shape[1] - 1 - skipped : weight.shape[1] - skipped]


quantizer = Quantizer(fit_range)
