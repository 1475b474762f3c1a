"""A layer as products of matrices: in each group, outputs (rows, channels) = inputs (rows, columns) @ weight (columns, channels).

A row is one position of one image's output: a token of a linear operator, or the patch that a convolution reads there.
A transposed convolution is a convolution of its input with zeros between its values, by the flipped kernel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from clado.space import Layer

ARGUMENTS = ("stride", "padding", "dilation", "groups")
TRANSPOSED_ARGUMENTS = ("stride", "padding", "output_padding", "groups", "dilation")


@dataclass(frozen=True)
class MatrixForm:
    """How the weight and the input of a layer are written as matrices."""

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
    def of(cls, layer: Layer, arguments: Sequence[Any]) -> "MatrixForm":
        """The form of a layer.

        Args:
            layer: The layer.
            arguments: The operator's arguments after the bias, as in an exported graph: (stride, padding, dilation, groups) of
                a convolution, (stride, padding, output_padding, groups, dilation) of a transposed one. Missing ones have the
                defaults of torch.
        """
        shape, kernel = layer.shape, layer.shape[2:]
        if not kernel:
            return cls(shape)
        transposed = "transpose" in layer.operator
        by_name = dict(zip(TRANSPOSED_ARGUMENTS if transposed else ARGUMENTS, arguments, strict=False))
        stride, dilation = (_per_axis(by_name.get(name, 1), kernel) for name in ("stride", "dilation"))
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if by_name.get("padding") == "same":
            sides = [(r // 2, r - r // 2) for r in reach]
        else:
            padding = _per_axis(0 if by_name.get("padding") == "valid" else by_name.get("padding", 0), kernel)
            sides = [(p, p) for p in padding]
            if transposed:
                extra = _per_axis(by_name.get("output_padding", 0), kernel)
                sides = [(r - p, r - p + e) for r, p, e in zip(reach, padding, extra, strict=True)]
        return cls(shape, int(by_name.get("groups", 1)), transposed, stride, dilation, tuple(sides))

    @property
    def num_columns(self) -> int:
        """Columns of one group: weights of an output channel."""
        inputs = self.shape[0] // self.groups if self.transposed else self.shape[1]
        return inputs * prod(self.shape[2:])

    def columns(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as (groups, columns, channels of a group)."""
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

    def patches(self, inputs: Tensor) -> Tensor:
        """Inputs of the operator -> a view (items, positions..., groups · columns in two or more axes) of all its rows.

        For a linear operator (..., features) it is (..., 1, features). Nothing but the padded input is copied.
        """
        if not self.stride:
            return inputs.unsqueeze(-2)
        x, stride = inputs, self.stride
        if self.transposed:
            x, stride = self._with_zeros(inputs), (1,) * len(stride)
        x = F.pad(x, [side for sides in reversed(self.padding) for side in sides])
        for axis, (k, s, d) in enumerate(zip(self.shape[2:], stride, self.dilation, strict=True), 2):
            x = x.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
        if self.transposed:
            x = x.flip(list(range(-len(stride), 0)))
        return x.movedim(1, 1 + len(stride))  # (items, positions..., channels, kernel...)

    def rows(self, inputs: Tensor, numbers: Tensor | None = None) -> Tensor:
        """Rows of an input, (groups, rows, columns).

        Args:
            inputs: (items, channels, positions...) of a convolution, (..., features) of a linear operator.
            numbers: Which rows, (rows,) int64, counted over items and then positions; all of them by default.
        """
        patches = self.patches(inputs)
        lead = patches.ndim - 2 if not self.stride else 1 + len(self.stride)
        if numbers is not None:
            places: list[Tensor] = []
            for length in reversed(patches.shape[:lead]):
                places.insert(0, numbers % length)
                numbers = numbers // length
            patches = patches[tuple(places)]
        return patches.reshape(-1, self.groups, self.num_columns).transpose(0, 1)

    def num_rows(self, inputs: Tensor) -> int:
        """How many rows an input has."""
        if not self.stride:
            return inputs.numel() // inputs.shape[-1]
        positions = len(inputs)
        for axis, (k, s, d, (before, after)) in enumerate(
            zip(self.shape[2:], self.stride, self.dilation, self.padding, strict=True), 2
        ):
            length = inputs.shape[axis]
            length, s = (s * (length - 1) + 1, 1) if self.transposed else (length, s)
            positions *= (length + before + after - d * (k - 1) - 1) // s + 1
        return positions

    def _with_zeros(self, inputs: Tensor) -> Tensor:
        """An input of a transposed convolution with stride − 1 zeros between its values."""
        lengths = [s * (n - 1) + 1 for n, s in zip(inputs.shape[2:], self.stride, strict=True)]
        whole = inputs.new_zeros(*inputs.shape[:2], *lengths)
        values = whole
        for axis, s in enumerate(self.stride, 2):
            values = values[(slice(None),) * axis + (slice(None, None, s),)]
        values.copy_(inputs)
        return whole


def _per_axis(value: int | list[int] | tuple[int, ...], kernel: tuple[int, ...]) -> tuple[int, ...]:
    """A number for each spatial axis, from one number for all or from one for each."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * len(kernel) if len(values) == 1 else values
