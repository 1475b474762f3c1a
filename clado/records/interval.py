"""Means over paired differences with their confidence intervals. NumPy only."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054
"""Quantile of the normal distribution that leaves 2.5 % above it."""


@dataclass(frozen=True)
class Interval:
    """A mean over paired per-image differences with its 95 % confidence interval."""

    mean: float
    """The mean difference."""
    low: float
    """The lower end of the interval."""
    high: float
    """The upper end of the interval."""
    num_images: int
    """How many images were measured."""

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    @classmethod
    def of(cls, differences: NDArray[np.float64]) -> "Interval":
        """The interval of per-image differences (n,) on the same images (normal approximation)."""
        n = len(differences)
        mean = float(differences.mean())
        reach = Z95 * float(differences.std(ddof=1)) / n**0.5 if n > 1 else float("inf")
        return cls(mean, mean - reach, mean + reach, n)

    @classmethod
    def of_hits(cls, float_hits: NDArray[np.bool_], hits: NDArray[np.bool_]) -> "Interval":
        """The interval of a drop of top-1. The arguments (n,) say which images the float and the quantized network have right.

        Each of the four cells counts half an image more, so that agreement on few images is not overrated. (Agresti and Min,
        "Simple improved confidence intervals for comparing matched proportions", 2005).
        """
        n = len(float_hits)
        lost, won = int((float_hits & ~hits).sum()), int((hits & ~float_hits).sum())
        drop = (lost - won) / (n + 2)
        reach = Z95 * ((lost + won + 1) / (n + 2) - drop**2) ** 0.5 / (n + 2) ** 0.5
        return cls((lost - won) / n, drop - reach, drop + reach, n)
