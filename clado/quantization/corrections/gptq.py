"""GPTQ: weights rounded one after another, each making up for the errors of the others (Frantar et al., arXiv 2210.17323).

A layer's squared output error on the calibration inputs is Σ over output channels of ½ eᵀ H e, where e is the channel's weight
error and H = 2 Σ x xᵀ over its inputs: rows of a linear operator, patches of a convolution, one H for each group. Two sweeps over
the columns of the weight lessen it:

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
DESCENTS = 5  # sweeps of coordinate descent at most; ten gain less than a percent more, at 2 bits
BLOCK = 128  # columns that the errors of all others reach in one product
MAX_COLUMNS = 8192  # H and R take 1.1 GB there
CHUNK = 2**22  # elements of the patches in memory at a time; those of one image at least


def skipped(layer: Layer) -> str | None:
    """Why a layer is rounded to nearest instead; None where GPTQ acts."""
    columns = layer.num_weights // layer.num_channels
    if columns > MAX_COLUMNS:
        return f"{columns:,} weights an output channel; GPTQ keeps a Hessian of up to {MAX_COLUMNS:,}"
    return None


def rounder(sample: LayerSample, seed: int = 0, steps: int = 1000) -> Callable[[Grid], Tensor]:
    """Reads the calibration inputs once; the function returned takes a grid of the weight and gives codes, int32 of its shape.

    No output channel's squared error on the calibration inputs is above that of nearest codes: where feeding errors forward
    does not help, those are the start of the descent. Nothing is random: `seed` and `steps` change nothing.
    """
    weight = sample.weight.detach().float()
    if skipped(sample.layer):
        return lambda grid: grid.quantize(weight)
    # ordinary tensors, also where the caller is in inference mode: they serve every later call
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
        own = Grid(scale, zero_point, grid.codes)
        nearest = own.quantize(columns)
        found = _better(_sweep(columns, nearest, own, factor), nearest, columns, own, hessian)
        for _ in range(DESCENTS):
            before, found = found, _sweep(columns, found, own, hessian)
            if torch.equal(before, found):
                break
        found = _better(found, nearest, columns, own, hessian)  # descent rounds in float32
        return operator.weight(_take(found, order.argsort(dim=1)))

    return codes


def _take(matrix: Tensor, order: Tensor) -> Tensor:
    """(groups, columns, n) with the columns of each group in its order, (groups, columns)."""
    return matrix.gather(1, order[..., None].expand_as(matrix))


def _better(found: Tensor, nearest: Tensor, columns: Tensor, grid: Grid, hessian: Tensor) -> Tensor:
    """Of each output channel the codes of less eᵀ H e; nearest codes where both are equal."""
    errors = [columns.double() - grid.dequantize(codes).double() for codes in (found, nearest)]
    squared = [(error * (hessian @ error)).sum(1, keepdim=True) for error in errors]
    return torch.where(squared[0] < squared[1], found, nearest)


def _sweep(columns: Tensor, codes: Tensor, grid: Grid, feedback: Tensor) -> Tensor:
    """Rounds one column after another: the nearest codes of w_k + Σ_{i≠k} (w_i − q_i) F_ik / F_kk, the q_i as they then are.

    `columns` float32 and `codes` int32 (groups, columns, rows); `feedback` F float64 (groups, columns, columns).
    """
    codes = codes.clone()
    error = columns.double() - grid.dequantize(codes).double()
    diagonal = feedback.diagonal(dim1=1, dim2=2)[..., None]
    diagonal = torch.where(diagonal > 0, diagonal, 1.0)
    for start in range(0, columns.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        others = feedback[:, :, block].mT @ error - diagonal[:, block] * error[:, block]
        change = torch.zeros_like(others)
        for k, column in enumerate(range(start, start + others.shape[1])):
            fed = others[:, k] + (feedback[:, None, start:column, column] @ change[:, :k])[:, 0]
            target = columns[:, column] + fed / diagonal[:, column]
            one = Grid(grid.scale[:, column], grid.zero_point[:, column], grid.codes)
            codes[:, column] = one.quantize(target.float())  # in float32 as nearest codes are: nothing fed gives these
            change[:, k] = columns[:, column].double() - one.dequantize(codes[:, column]).double() - error[:, column]
        error[:, block] += change
    return codes


def _upper_factor(hessian: Tensor) -> Tensor:
    """R, upper triangular, of H + λI = R Rᵀ, (groups, columns, columns).

    λ is a share of the mean diagonal over inputs that are not always zero. Those that are have no row in H: they are
    rounded to nearest, and no error reaches them.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.sum(1, keepdim=True) / (diagonal > 0).sum(1, keepdim=True).clamp(min=1)
    turned = hessian.flip(1, 2)  # by half: its factor is lower triangular, and turned back it is R
    turned.diagonal(dim1=1, dim2=2).add_(torch.where(mean > 0, DAMPENING * mean, 1.0))
    lower: Tensor = torch.linalg.cholesky(turned)
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

    A transposed convolution is a convolution of its input with zeros between its values, by the kernel turned round.
    """

    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, sample: LayerSample) -> "_Operator":
        """The operator of a layer; without `arguments` a convolution has the defaults of torch."""
        shape, kernel = sample.layer.shape, sample.layer.shape[2:]
        if not kernel:
            return cls(shape)
        transposed = "transpose" in sample.layer.operator
        given = dict(zip(TRANSPOSED_ARGUMENTS if transposed else ARGUMENTS, sample.arguments, strict=False))
        stride, dilation = (_each(given.get(name, 1), kernel) for name in ("stride", "dilation"))
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if given.get("padding") == "same":
            sides = [(r // 2, r - r // 2) for r in reach]
        else:
            both = _each(0 if given.get("padding") == "valid" else given.get("padding", 0), kernel)
            sides = [(p, p) for p in both]
            if transposed:
                extra = _each(given.get("output_padding", 0), kernel)
                sides = [(r - p, r - p + e) for r, p, e in zip(reach, both, extra, strict=True)]
        return cls(shape, int(given.get("groups", 1)), transposed, stride, dilation, tuple(sides))

    def columns(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as (groups, columns, rows)."""
        if not self.transposed:
            return weight.reshape(self.groups, self.shape[0] // self.groups, -1).mT.contiguous()
        split = weight.reshape(self.groups, self.shape[0] // self.groups, self.shape[1], -1)
        return split.transpose(2, 3).reshape(self.groups, -1, self.shape[1])

    def weight(self, columns: Tensor) -> Tensor:
        """What `columns` made, in the weight's shape again."""
        if not self.transposed:
            return columns.mT.reshape(self.shape)
        split = columns.reshape(self.groups, self.shape[0] // self.groups, -1, self.shape[1])
        return split.transpose(2, 3).reshape(self.shape)

    def chunks(self, inputs: Tensor) -> Iterator[Tensor]:
        """Inputs in parts whose patches are few enough to be in memory at a time."""
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
        # (images, channels, positions..., kernel...), of which channels go beside the kernel
        x = x.movedim(1, 1 + len(stride))
        columns = inputs.shape[1] // self.groups * prod(self.shape[2:])
        return x.reshape(-1, self.groups, columns).transpose(0, 1)


def _each(value: int | list[int] | tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
    """A number for each spatial axis, of one number for all or one each."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * len(kernel) if len(values) == 1 else values


correction = Rounding(rounder, skipped)
