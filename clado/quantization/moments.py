"""First and second moments of a layer's input rows, of which everything that is quadratic in a weight's error follows.

For rows x with mean μ and second moment Σ = E[x xᵀ], a weight column w and its error e: the mean output is wᵀ μ, its variance
wᵀ (Σ − μ μᵀ) w, and the expected squared output error eᵀ Σ e.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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

    @property
    def products(self) -> Tensor:
        """Σ over rows of x xᵀ, float64 (groups, columns, columns)."""
        return self.scatter.double() + self.count * self.mean[..., None] * self.mean[..., None, :]

    def output_mean(self, columns: Tensor) -> Tensor:
        """Mean of x @ columns for columns (groups, columns, channels): float64 (groups, channels)."""
        return (self.mean[:, None] @ columns.double())[:, 0]

    def output_variance(self, columns: Tensor) -> Tensor:
        """Variance of x @ columns for columns (groups, columns, channels): float64 (groups, channels)."""
        columns = columns.double()
        return (columns * (self.scatter.double() @ columns)).sum(1).clamp(min=0.0) / self.count


def merged(parts: Sequence[Moments]) -> Moments:
    """The moments of all rows, from those of parts of them, added in the order given (Chan et al. 1983, equation 2.1)."""
    first, *others = parts
    count, mean, scatter = first.count, first.mean, first.scatter.double()
    for part in others:
        difference, total = part.mean - mean, count + part.count
        scatter = scatter + part.scatter
        scatter += (count * part.count / total) * difference[..., None] * difference[..., None, :]
        mean = mean + difference * (part.count / total)
        count = total
    return Moments(count, mean, scatter)


class MomentSums:
    """Adds up rows, (groups, rows, columns) at a time, about a fixed first guess of their mean.

    Products are summed in float32, on the device of the rows. The guess keeps them small, so that little is lost when the mean
    is taken away.
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
        """Adds the products of the rows that wait: of many at once, since each time all products are read and written."""
        if self._waiting:
            rows = torch.cat(self._waiting, 1)
            self._total = self._total + rows.sum(1)
            self._products.baddbmm_(rows.mT, rows)
            self._waiting.clear()

    def moments(self) -> Moments:
        """The moments of the rows added, scatter in float32. Nothing can be added after it."""
        self._multiply()
        shift = self._total / self.count
        column, row = shift[..., None].float(), shift[..., None, :].float()
        scatter = self._products.baddbmm_(column, row, alpha=-self.count)  # in place: it may be large
        return Moments(self.count, self._centre[:, 0].double() + shift, scatter)
