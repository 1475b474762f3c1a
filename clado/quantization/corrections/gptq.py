"""GPTQ: weights are rounded one after another, and each corrects errors of the others (Frantar et al., arXiv 2210.17323).

A layer's squared output error on the calibration inputs is Σ over output channels of ½ eᵀ H e. Here e is the channel's weight
error, and H = 2 Σ x xᵀ sums over rows of its input (`MatrixForm`), one H for each group. Two kinds of sweeps over the columns of
the weight reduce it:

- GPTQ, which is OBQ (arXiv 2208.11580) with one order of columns for all channels. Where H + λI = R Rᵀ with R upper triangular,
  column k becomes the nearest codes of w_k + Σ_{i<k} (w_i − q_i) R_ik / R_kk. These are the numbers of the paper's Cholesky
  factor of the inverse (Chee et al., arXiv 2307.13304, theorem 6), without an inverse.
- Coordinate descent from there (after CDQuant, arXiv 2406.17542; here in cyclic order). Column k becomes the nearest codes of
  w_k + Σ_{i≠k} (w_i − q_i) H_ik / H_kk. They are the best ones for the present codes of the other columns. The error never rises.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clado.grids import Grid
from clado.quantization.corrections import LayerSample, Rounding
from clado.space import Layer

DAMPENING = 0.01  # λ as a share of H's mean diagonal: the paper's choice
DESCENTS = 3  # most sweeps of coordinate descent; five would gain one percent more at 2 bits, on EfficientNet-Lite0
PANEL = 128  # number of columns to which one product feeds the errors of all other columns
MAX_COLUMNS = 8192  # H and R then take 1.1 GB


def skipped(layer: Layer) -> str | None:
    """Why a layer is rounded to nearest instead, or None."""
    columns = layer.num_weights // layer.num_channels
    if columns > MAX_COLUMNS:
        return f"{columns:,} weights an output channel; GPTQ keeps a Hessian of up to {MAX_COLUMNS:,}"
    return None


@torch.inference_mode(False)  # ordinary tensors, even if the caller is in inference mode
@torch.no_grad()
def round_columns(sample: LayerSample, grids: Sequence[Grid], steps: int = 0) -> list[Tensor]:
    """Codes for each grid, int32 of the weight's shape. All grids are rounded in the same sweeps.

    No output channel's squared error on the calibration inputs is above that of nearest codes. If feeding errors forward does
    not help, the descent starts at nearest codes. Nothing is random. `steps` is not used.
    """
    weight, form = sample.weight.detach().float(), sample.form
    if skipped(sample.layer):
        return [grid.quantize(weight) for grid in grids]
    hessian = 2 * sample.moments.products
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    hessian = _take(_take(hessian, order).mT, order)

    def ordered(part: Tensor) -> Tensor:
        return _take(form.columns(part.expand_as(weight)), order)

    columns = ordered(weight).repeat(1, 1, len(grids))
    column_grid = _ColumnGrid.of([Grid(ordered(grid.scale), ordered(grid.zero_point), grid.codes) for grid in grids])
    nearest = column_grid.quantize(columns)
    objective = _Objective(hessian.float(), columns, column_grid)
    nearest_errors = objective.squared_errors(nearest)
    rounded = _sweep(columns, nearest, column_grid, _upper_factor(hessian))
    rounded = torch.where(objective.squared_errors(rounded) < nearest_errors, rounded, nearest)
    for _ in range(DESCENTS):
        previous, rounded = rounded, _sweep(columns, rounded, column_grid, hessian)
        if torch.equal(previous, rounded):
            break
    rounded = torch.where(objective.squared_errors(rounded) < nearest_errors, rounded, nearest)  # because a descent rounds too
    return [form.weight(codes) for codes in _take(rounded, order.argsort(dim=1)).chunk(len(grids), 2)]


@dataclass(frozen=True, eq=False)
class _ColumnGrid:
    """Grids of a weight's columns next to each other along the last axis, also of several widths."""

    scale: Tensor
    """Scales, (..., channels) or (groups, columns, channels)."""
    zero_point: Tensor
    """Zero points, of the same shape."""
    low: Tensor
    """The least code of each channel, (channels,)."""
    high: Tensor
    """The largest code of each channel, (channels,)."""
    binary: Tensor
    """Whether a channel has the codes -1 and 1 only, (channels,)."""
    has_binary: bool
    """Whether any channel has only these codes."""

    @classmethod
    def of(cls, grids: Sequence[Grid]) -> "_ColumnGrid":
        """Grids (groups, columns, channels) next to each other."""
        scale, zero_point = (torch.cat([getattr(grid, name) for grid in grids], 2) for name in ("scale", "zero_point"))

        def each(value: Callable[[Grid], float]) -> Tensor:
            return torch.cat([torch.full((grid.scale.shape[2],), value(grid)) for grid in grids]).to(scale.device)

        return cls(
            scale,
            zero_point,
            each(lambda grid: float(grid.codes.low)),
            each(lambda grid: float(grid.codes.high)),
            each(lambda grid: float(grid.codes.step == 2)).bool(),
            any(grid.codes.step == 2 for grid in grids),
        )

    def column(self, number: int) -> "_ColumnGrid":
        """The grid of one column."""
        return replace(self, scale=self.scale[:, number], zero_point=self.zero_point[:, number])

    def quantize(self, weight: Tensor) -> Tensor:
        """Nearest codes (int32), the same as from `Grid.quantize`."""
        position = weight / self.scale + self.zero_point
        codes = torch.minimum(torch.maximum(position.round(), self.low), self.high)
        if self.has_binary:
            codes = torch.where(self.binary, torch.where(position >= 0, 1.0, -1.0), codes)
        return codes.to(torch.int32)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Float values of codes."""
        return (codes - self.zero_point) * self.scale


def _take(matrix: Tensor, order: Tensor) -> Tensor:
    """(groups, columns, n) with the columns of each group in its order, (groups, columns)."""
    return matrix.gather(1, order[..., None].expand_as(matrix))


@dataclass(frozen=True, eq=False)
class _Objective:
    """The error that sweeps reduce: eᵀ H e of each output channel."""

    hessian: Tensor
    """H, float32 (groups, columns, columns)."""
    columns: Tensor
    """The weight, float32 (groups, columns, channels)."""
    grid: _ColumnGrid
    """The grid of the columns."""

    def squared_errors(self, codes: Tensor) -> Tensor:
        """eᵀ H e for codes (groups, columns, channels), (groups, 1, channels)."""
        error = self.columns - self.grid.dequantize(codes)
        return (error * (self.hessian @ error)).sum(1, keepdim=True)


def _sweep(columns: Tensor, codes: Tensor, grid: _ColumnGrid, feedback: Tensor) -> Tensor:
    """Rounds one column after another to the nearest codes of w_k + Σ_{i≠k} (w_i − q_i) F_ik / F_kk.

    Each column uses the latest q_i of the other columns. Products are in float32. Their rounding is far below a step of a grid.

    Args:
        columns: The weight w, float32 (groups, columns, channels).
        codes: The codes to start from, int32 (groups, columns, channels).
        grid: The grid of the columns.
        feedback: F, float64 (groups, columns, columns).
    """
    codes = codes.clone()
    error = columns - grid.dequantize(codes)
    diagonal = feedback.diagonal(dim1=1, dim2=2)[..., None]
    feedback = (feedback / torch.where(diagonal > 0, diagonal, 1.0).mT).float()  # F_ik / F_kk
    feedback.diagonal(dim1=1, dim2=2).zero_()
    for start in range(0, columns.shape[1], PANEL):
        panel = slice(start, start + PANEL)
        others = feedback[:, :, panel].mT @ error
        change = torch.zeros_like(others)
        for k, column in enumerate(range(start, start + others.shape[1])):
            correction = others[:, k] + (feedback[:, None, start:column, column] @ change[:, :k])[:, 0]
            column_grid = grid.column(column)
            rounded = column_grid.quantize(columns[:, column] + correction)  # without feedback, codes are the nearest ones
            codes[:, column] = rounded
            change[:, k] = columns[:, column] - column_grid.dequantize(rounded) - error[:, column]
        error[:, panel] += change
    return codes


def _upper_factor(hessian: Tensor) -> Tensor:
    """R, upper triangular, of H + λI = R Rᵀ, (groups, columns, columns).

    λ is a share of the mean diagonal over inputs that are not always zero. Inputs that are always zero have a zero row in H.
    Their columns are rounded to nearest, and no error reaches them.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.sum(1, keepdim=True) / (diagonal > 0).sum(1, keepdim=True).clamp(min=1)
    flipped = hessian.flip(1, 2)  # its factor is lower triangular, and flipped back it is R
    flipped.diagonal(dim1=1, dim2=2).add_(torch.where(mean > 0, DAMPENING * mean, 1.0))
    lower: Tensor = torch.linalg.cholesky(flipped)
    return lower.flip(1, 2)


correction = Rounding(round_columns, skipped)
