"""First and second moments of a layer's input rows. Everything that is quadratic in a weight's error follows from them.

Rows x have mean μ and second moment Σ = E[x xᵀ]. A weight column w has the error e. Then the mean output is wᵀ μ, its variance is
wᵀ (Σ − μ μᵀ) w, and the expected squared output error is eᵀ Σ e.

A few hundred images do not say what the covariance of a thousand inputs is. A classifier sees one row of each image. Rounding
that is fitted to the covariance of 256 rows has almost no error on them. On other images it has more than nearest codes
(tests/benchmarks/OVERFITTING.md). So rounding corrections read `Moments.shrunk`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ROWS_AT_ONCE = 1024


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter of rows, for each group of a layer's columns."""

    count: int
    """Number of rows."""
    mean: Tensor
    """μ, float64 (groups, columns)."""
    scatter: Tensor
    """Σ over rows of (x − μ)(x − μ)ᵀ, (groups, columns, columns): float32 of one block of images, float64 of several."""
    noise: Tensor | None = None
    """Share of the squared covariances that is sampling noise, float64 (groups,). None if there are too few blocks."""

    @property
    def products(self) -> Tensor:
        """Σ over rows of x xᵀ, float64 (groups, columns, columns)."""
        return self.scatter.double() + self.count * self.mean[..., None] * self.mean[..., None, :]

    def shrunk(self) -> "Moments":
        """The same moments, with covariances shrunk by the share of `noise`. Variances and means stay.

        That is the shrinkage of least expected squared error towards the diagonal, after Ledoit and Wolf 2004. (Schäfer and
        Strimmer 2005, "A shrinkage approach to large-scale covariance matrix estimation", target D.)
        """
        if self.noise is None:
            return self
        variances = self.scatter.diagonal(dim1=1, dim2=2).clone()
        scatter = self.scatter * (1 - self.noise)[:, None, None]
        scatter.diagonal(dim1=1, dim2=2).copy_(variances)
        return replace(self, scatter=scatter)

    def output_mean(self, columns: Tensor) -> Tensor:
        """Mean of x @ columns for columns (groups, columns, channels): float64 (groups, channels)."""
        return (self.mean[:, None] @ columns.double())[:, 0]

    def output_variance(self, columns: Tensor) -> Tensor:
        """Variance of x @ columns for columns (groups, columns, channels): float64 (groups, channels)."""
        columns = columns.double()
        return (columns * (self.scatter.double() @ columns)).sum(1).clamp(min=0.0) / self.count


def merged(parts: Sequence[Moments]) -> Moments:
    """The moments of all rows, from those of parts of them, added in the order given (Chan et al. 1983, equation 2.1).

    Args:
        parts: Moments of disjoint blocks of images. How far they differ is the noise of the sum: rows of one image are no
            independent sample.
    """
    first, *others = parts
    count, mean, scatter = first.count, first.mean, first.scatter.double()
    for part in others:
        difference, total = part.mean - mean, count + part.count
        scatter = scatter + part.scatter
        scatter += (count * part.count / total) * difference[..., None] * difference[..., None, :]
        mean = mean + difference * (part.count / total)
        count = total
    return Moments(count, mean, scatter, _noise(parts, mean, scatter / count) if len(parts) > 1 else None)


def _noise(parts: Sequence[Moments], mean: Tensor, covariance: Tensor) -> Tensor:
    """Σ_{i≠j} Var(s_ij) / Σ_{i≠j} s_ij² of each group, at most 1: the variance is that of a mean over parts of unequal counts."""
    total = sum(part.count for part in parts)
    variance = torch.zeros(len(mean), dtype=torch.float64, device=mean.device)
    for part in parts:
        shift = part.mean - mean
        difference = part.scatter.double() / part.count - covariance
        difference += shift[..., None] * shift[..., None, :]
        difference.diagonal(dim1=1, dim2=2).zero_()
        variance += (part.count / total) ** 2 * difference.square_().sum((1, 2))
    size = covariance.square().sum((1, 2)) - covariance.diagonal(dim1=1, dim2=2).square().sum(1)
    share = variance * len(parts) / (len(parts) - 1) / size
    return torch.where(size > 0, share, 0.0).clamp(0.0, 1.0)


class MomentSums:
    """Adds up rows, (groups, rows, columns) at a time, about a fixed first guess of their mean.

    Products are summed in float32, on the device of the rows. The guess keeps them small, so that little is lost when the mean
    is subtracted.
    """

    def __init__(self) -> None:
        self.count = 0
        self._centre = self._total = self._products = torch.zeros(0)
        self._waiting: list[Tensor] = []

    def add(self, rows: Tensor) -> None:
        """Adds rows."""
        rows = rows.float()
        if not self.count:
            self._centre = rows.mean(1, keepdim=True)
            self._total = torch.zeros_like(self._centre[:, 0], dtype=torch.float64)
            self._products = rows.new_zeros(rows.shape[0], rows.shape[2], rows.shape[2])
        self.count += rows.shape[1]
        self._waiting.append(rows - self._centre)
        if sum(part.shape[1] for part in self._waiting) >= ROWS_AT_ONCE:
            self._multiply()

    def _multiply(self) -> None:
        """Adds the products of the collected rows. Many at a time, because each time all products are read and written."""
        if self._waiting:
            # rows of several groups are a view whose first axis in memory is the rows: joining along it copies whole blocks
            rows = torch.cat([part.transpose(0, 1) for part in self._waiting]).transpose(0, 1)
            self._total = self._total + rows.sum(1)
            self._products.baddbmm_(rows.mT, rows)
            self._waiting.clear()

    def moments(self) -> Moments:
        """The moments of the added rows, with the scatter in float32. No rows can be added afterwards."""
        self._multiply()
        shift = self._total / self.count
        column, row = shift[..., None].float(), shift[..., None, :].float()
        scatter = self._products.baddbmm_(column, row, alpha=-self.count)  # in place, because it may be large
        return Moments(self.count, self._centre[:, 0].double() + shift, scatter)
