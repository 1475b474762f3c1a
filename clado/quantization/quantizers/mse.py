"""Range that minimises the mean squared error of rounding, searched as a share of the min-max range.

The paper's choice (CLADO, arXiv 2307.05657, section 5; the search is that of Banner et al. 2019, arXiv 1810.05723, done by
enumeration). Two passes: a coarse one over shares of the whole range, a fine one around each row's best.
"""

import torch
from torch import Tensor

from clado.grids import Codes, grid_of_range
from clado.quantization.quantizers import Quantizer

COARSE, FINE = 24, 8


def fit_range(weight: Tensor, codes: Codes, symmetric: bool) -> tuple[Tensor, Tensor]:
    """(channels, n) -> the range of least squared error of each row, (channels, 1) each."""
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    best_share = torch.ones_like(high)
    best_error = torch.full_like(high, torch.inf)
    for width, steps in ((1.0, COARSE), (1.0 / COARSE, FINE)):
        centre = best_share.clone()
        for step in range(steps):
            # the first pass runs down from the whole range, the second to both sides of the best share so far
            share = 1.0 - width * step / steps if width == 1.0 else centre + width * (2 * step / (steps - 1) - 1)
            share = (torch.zeros_like(high) + share).clamp(min=1e-3, max=1.0)
            grid = grid_of_range(low * share, high * share, codes, symmetric)
            error = (grid.fake_quantize(weight) - weight).square().sum(1, keepdim=True)
            better = error < best_error
            best_share = torch.where(better, share, best_share)
            best_error = torch.where(better, error, best_error)
    return low * best_share, high * best_share


quantizer = Quantizer(fit_range)
