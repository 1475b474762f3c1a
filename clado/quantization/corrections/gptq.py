"""GPTQ: weights rounded one after another, each making up for the errors of the others (Frantar et al., arXiv 2210.17323).

A layer's squared output error on the calibration inputs is Σ over output channels of ½ eᵀ H e. Here e is the channel's weight
error, and H = 2 Σ x xᵀ sums over its inputs: rows of a linear operator, patches of a convolution, one H for each group. Two
kinds of sweeps over the columns of the weight reduce it:

- GPTQ, which is OBQ (arXiv 2208.11580) with one order of columns for all channels. Where H + λI = R Rᵀ with R upper triangular,
  column k becomes the nearest codes of w_k + Σ_{i<k} (w_i − q_i) R_ik / R_kk. These are the numbers of the paper's Cholesky
  factor of the inverse (Chee et al., arXiv 2307.13304, theorem 6), without an inverse.
- Coordinate descent (after CDQuant, arXiv 2406.17542; here in cyclic order) from there: column k becomes the nearest codes of
  w_k + Σ_{i≠k} (w_i − q_i) H_ik / H_kk, the best ones given all other columns. It never raises the error.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from clado.grids import Grid
from clado.quantization.corrections import LayerSample, Rounding
from clado.space import Layer

ARGUMENTS = ("stride", "padding", "dilation", "groups")
TRANSPOSED_ARGUMENTS = ("stride", "padding", "output_padding", "groups", "dilation")

DAMPENING = 0.01  # λ as a share of H's mean diagonal: the paper's choice
DESCENTS = 5  # most sweeps of coordinate descent; ten gain less than a percent more, at 2 bits
PANEL = 128  # columns that the errors of all other columns reach in one product
MAX_COLUMNS = 8192  # H and R then take 1.1 GB
CHUNK = 2**22  # elements of the patches in memory at a time; at least those of one image


def skipped(layer: Layer) -> str | None:
    """Why a layer is rounded to nearest instead, or None."""
    columns = layer.num_weights // layer.num_channels
    if columns > MAX_COLUMNS:
        return f"{columns:,} weights an output channel; GPTQ keeps a Hessian of up to {MAX_COLUMNS:,}"
    return None


def rounder(sample: LayerSample, seed: int = 0, steps: int = 1000) -> Callable[[Grid], Tensor]:
    """Reads the calibration inputs once.

    No output channel's squared error on the calibration inputs is above that of nearest codes. Where feeding errors forward
    does not help, the descent starts at nearest codes. Nothing is random: `seed` and `steps` change nothing.

    Returns:
        A function from a grid of the weight to codes, int32 of the weight's shape.
    """
    weight = sample.weight.detach().float()
    if skipped(sample.layer):
        return lambda grid: grid.quantize(weight)
    # ordinary tensors, also where the caller is in inference mode, because later calls use them
    with torch.inference_mode(False), torch.no_grad():
        operator = _Operator.of(sample)
        hessian = _hessian(operator, sample)
        order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        hessian = _take(_take(hessian, order).mT, order)
        factor = _upper_factor(hessian)
        columns = _take(operator.columns(weight), order)

    @torch.inference_mode(False)
    @torch.no_grad()
    def codes(grid: Grid) -> Tensor:
        scale, zero_point = (_take(operator.columns(part.expand_as(weight)), order) for part in (grid.scale, grid.zero_point))
        column_grid = Grid(scale, zero_point, grid.codes)
        nearest = column_grid.quantize(columns)
        rounded = _better(_sweep(columns, nearest, column_grid, factor), nearest, columns, column_grid, hessian)
        for _ in range(DESCENTS):
            previous, rounded = rounded, _sweep(columns, rounded, column_grid, hessian)
            if torch.equal(previous, rounded):
                break
        rounded = _better(rounded, nearest, columns, column_grid, hessian)  # descent rounds in float32
        return operator.weight(_take(rounded, order.argsort(dim=1)))

    return codes


def _take(matrix: Tensor, order: Tensor) -> Tensor:
    """(groups, columns, n) with the columns of each group in its order, (groups, columns)."""
    return matrix.gather(1, order[..., None].expand_as(matrix))


def _better(codes: Tensor, nearest: Tensor, columns: Tensor, grid: Grid, hessian: Tensor) -> Tensor:
    """For each output channel the codes with the smaller eᵀ H e; nearest codes where both are equal."""
    errors = [columns.double() - grid.dequantize(variant).double() for variant in (codes, nearest)]
    squared = [(error * (hessian @ error)).sum(1, keepdim=True) for error in errors]
    return torch.where(squared[0] < squared[1], codes, nearest)


def _sweep(columns: Tensor, codes: Tensor, grid: Grid, feedback: Tensor) -> Tensor:
    """Rounds one column after another to the nearest codes of w_k + Σ_{i≠k} (w_i − q_i) F_ik / F_kk.

    Each column uses the latest q_i of the other columns.

    Args:
        columns: The weight w, float32 (groups, columns, rows).
        codes: The codes to start from, int32 (groups, columns, rows).
        grid: The grid of the columns.
        feedback: F, float64 (groups, columns, columns).
    """
    codes = codes.clone()
    error = columns.double() - grid.dequantize(codes).double()
    diagonal = feedback.diagonal(dim1=1, dim2=2)[..., None]
    diagonal = torch.where(diagonal > 0, diagonal, 1.0)
    for start in range(0, columns.shape[1], PANEL):
        panel = slice(start, start + PANEL)
        others = feedback[:, :, panel].mT @ error - diagonal[:, panel] * error[:, panel]
        change = torch.zeros_like(others)
        for k, column in enumerate(range(start, start + others.shape[1])):
            correction = others[:, k] + (feedback[:, None, start:column, column] @ change[:, :k])[:, 0]
            target = columns[:, column] + correction / diagonal[:, column]
            column_grid = Grid(grid.scale[:, column], grid.zero_point[:, column], grid.codes)
            codes[:, column] = column_grid.quantize(target.float())  # float32, so that no correction gives nearest codes
            change[:, k] = columns[:, column].double() - column_grid.dequantize(codes[:, column]).double() - error[:, column]
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


def _hessian(operator: "_Operator", sample: LayerSample) -> Tensor:
    """2 Σ x xᵀ over the calibration inputs, (groups, columns, columns): products in float32, sums in float64."""
    groups, columns, _ = operator.columns(sample.weight).shape
    total = torch.zeros(groups, columns, columns, dtype=torch.float64, device=sample.weight.device)
    for inputs in sample.inputs():
        for part in operator.chunks(inputs):
            patches = operator.patches(part.float())
            total += patches.mT @ patches
    return 2 * total


@dataclass(frozen=True)
class _Operator:
    """A layer as products of matrices: for each group, outputs (positions, rows) = patches (positions, columns) @ columns.

    A transposed convolution is a convolution of its input with zeros between its values, by the flipped kernel.
    """

    shape: tuple[int, ...]
    """The weight's shape."""
    groups: int = 1
    """Groups of a convolution."""
    transposed: bool = False
    """Whether the convolution is transposed."""
    stride: tuple[int, ...] = ()
    """Stride of each spatial axis; empty for a linear operator."""
    dilation: tuple[int, ...] = ()
    """Dilation of each spatial axis."""
    padding: tuple[tuple[int, int], ...] = ()
    """(before, after) of each spatial axis, of the convolution that is computed."""

    @classmethod
    def of(cls, sample: LayerSample) -> "_Operator":
        """The operator of a layer. Without `arguments` a convolution has the defaults of torch."""
        shape, kernel = sample.layer.shape, sample.layer.shape[2:]
        if not kernel:
            return cls(shape)
        transposed = "transpose" in sample.layer.operator
        arguments = dict(zip(TRANSPOSED_ARGUMENTS if transposed else ARGUMENTS, sample.arguments, strict=False))
        stride, dilation = (_per_axis(arguments.get(name, 1), kernel) for name in ("stride", "dilation"))
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if arguments.get("padding") == "same":
            sides = [(r // 2, r - r // 2) for r in reach]
        else:
            padding = _per_axis(0 if arguments.get("padding") == "valid" else arguments.get("padding", 0), kernel)
            sides = [(p, p) for p in padding]
            if transposed:
                extra = _per_axis(arguments.get("output_padding", 0), kernel)
                sides = [(r - p, r - p + e) for r, p, e in zip(reach, padding, extra, strict=True)]
        return cls(shape, int(arguments.get("groups", 1)), transposed, stride, dilation, tuple(sides))

    def columns(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as (groups, columns, rows)."""
        if not self.transposed:
            return weight.reshape(self.groups, self.shape[0] // self.groups, -1).mT.contiguous()
        split = weight.reshape(self.groups, self.shape[0] // self.groups, self.shape[1], -1)
        return split.transpose(2, 3).reshape(self.groups, -1, self.shape[1])

    def weight(self, columns: Tensor) -> Tensor:
        """The inverse of `columns`: a tensor of the weight's shape."""
        if not self.transposed:
            return columns.mT.reshape(self.shape)
        split = columns.reshape(self.groups, self.shape[0] // self.groups, -1, self.shape[1])
        return split.transpose(2, 3).reshape(self.shape)

    def chunks(self, inputs: Tensor) -> Iterator[Tensor]:
        """Inputs in parts whose patches have at most CHUNK elements, or one image."""
        if not self.stride:
            yield from torch.split(inputs.reshape(-1, self.shape[1]), max(1, CHUNK // self.shape[1]))
            return
        grown = [s if self.transposed else 1 for s in self.stride]
        shrunk = [1 if self.transposed else s for s in self.stride]
        positions = prod(n * g // s + 1 for n, g, s in zip(inputs.shape[2:], grown, shrunk, strict=True))
        yield from torch.split(inputs, max(1, CHUNK // (positions * inputs.shape[1] * prod(self.shape[2:]))))

    def patches(self, inputs: Tensor) -> Tensor:
        """Inputs of the operator -> (groups, positions of all images, columns)."""
        if not self.stride:
            return inputs[None]
        x, stride = inputs, self.stride
        if self.transposed:
            lengths = [s * (n - 1) + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
            x = inputs.new_zeros(*inputs.shape[:2], *lengths)
            stuffed = x
            for axis, s in enumerate(stride, 2):
                stuffed = stuffed[(slice(None),) * axis + (slice(None, None, s),)]
            stuffed.copy_(inputs)
            stride = (1,) * len(stride)
        x = F.pad(x, [side for sides in reversed(self.padding) for side in sides])
        for axis, (k, s, d) in enumerate(zip(self.shape[2:], stride, self.dilation, strict=True), 2):
            x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
        if self.transposed:
            x = x.flip(list(range(-len(stride), 0)))
        # (images, channels, positions..., kernel...): channels move next to the kernel
        x = x.movedim(1, 1 + len(stride))
        columns = inputs.shape[1] // self.groups * prod(self.shape[2:])
        return x.reshape(-1, self.groups, columns).transpose(0, 1)


def _per_axis(value: int | list[int] | tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
    """A number for each spatial axis, from one number for all or from one for each."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * len(kernel) if len(values) == 1 else values


correction = Rounding(rounder, skipped)
