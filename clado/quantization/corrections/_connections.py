"""Channels that lie between two neighbours of a network, and the scales that equalisation gives them (`equalization`)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

LIMIT = 2.0**10  # a scale is within 1 / LIMIT .. LIMIT; outside of it a channel is almost zero, or floats overflow
HEADROOM = 0.9  # share of a clip for the largest scaled activation, because other images exceed the measured maximum


@dataclass(frozen=True)
class Layout:
    """The place of the channels in a value."""

    axis: int
    """The axis of the channels."""
    repeat: int = 1
    """How many neighbouring indices make one channel: index k belongs to channel k // repeat."""


@dataclass(frozen=True)
class Clip:
    """An operator that clips its input from above."""

    position: int
    """The number of its instruction."""
    slot: int
    """The slot of its input."""
    layout: Layout
    """The layout of its input."""
    high: float
    """The largest value that passes."""


@dataclass(frozen=True)
class Side:
    """The output channels or the input channels of a weight."""

    name: str
    """The weight's name."""
    axis: int
    """The weight's axis: 0 or 1."""
    groups: int = 1
    """Groups of the operator. Channels of axis 1 are (groups, length of the axis)."""
    repeat: int = 1
    """How many neighbouring inputs make one channel, for a linear operator after a flattened image."""

    def ranges(self, magnitude: Tensor) -> Tensor:
        """The maximum of `|w|` of each channel, (channels,), from the maximum over the kernel."""
        if self.axis == 1:
            magnitude = magnitude.reshape(self.groups, -1, magnitude.shape[1]).transpose(1, 2).flatten(0, 1)
        return magnitude.reshape(-1, self.repeat * magnitude.shape[1]).amax(1)

    def spread(self, scale: Tensor, weight: Tensor) -> Tensor:
        """The scale of each channel in a shape that multiplies a weight, or its magnitude."""
        scales = scale.repeat_interleave(self.repeat)
        if self.axis == 1:
            rows = scales.reshape(self.groups, 1, -1).expand(-1, weight.shape[0] // self.groups, -1)
            return rows.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
        return scales.reshape(-1, *[1] * (weight.ndim - 1))


@dataclass(eq=False)
class Connection:
    """The channels between two neighbours, or the reason why they may not be scaled."""

    first: str
    """The name of the first layer."""
    second: str
    """The name of the second layer, or of the batch norm."""
    reason: str | None = None
    """The reason why nothing is scaled. None if something is scaled."""
    rows: Side | None = None
    """Output channels of the first layer, which are divided by the scale."""
    columns: Side | None = None
    """Input channels of the second layer, which are multiplied by the scale."""
    vectors: tuple[str, ...] = ()
    """Names of vectors that are divided by the scale."""
    variance: str | None = None
    """Name of the variance of a batch norm. The variance plus `eps` is divided by the square of the scale."""
    eps: float = 0.0
    """ε of the batch norm."""
    clips: tuple[Clip, ...] = ()
    """The clips between the neighbours."""
    num_fixed: int = 0
    """How many channels keep scale 1 because of a clip."""
    scale: Tensor = field(default_factory=lambda: torch.ones(0))
    """The scale of each channel, float64."""
    least: Tensor = field(default_factory=lambda: torch.ones(0))
    """The least allowed scale of each channel."""
    most: Tensor = field(default_factory=lambda: torch.ones(0))
    """The largest allowed scale of each channel."""

    def prepare(self, values: Mapping[str, Tensor], magnitudes: dict[str, Tensor], maxima: Mapping[Clip, Tensor | None]) -> None:
        """Writes max |w| over the kernel of its weights, float64, into `magnitudes`, and sets the allowed scales."""
        sides = [side for side in (self.rows, self.columns) if side is not None]
        if self.reason is not None:
            return
        for side in sides:
            if side.name not in magnitudes:
                weight = values[side.name].abs().double()
                magnitudes[side.name] = weight.flatten(2).amax(2) if weight.ndim > 2 else weight
        self.scale = torch.ones_like(sides[0].ranges(magnitudes[sides[0].name]))
        self.least, self.most = self.scale / LIMIT, self.scale * LIMIT
        for clip in self.clips:
            maximum = maxima[clip]
            if maximum is None:
                self.reason = f"a clip at {clip.high:g} lies between them, and there are no images to measure the maximum on"
                return
            unclipped = maximum < clip.high
            least = torch.maximum(self.least, (maximum / (HEADROOM * clip.high)).clamp(max=1.0))
            self.least = torch.where(unclipped, least, 1.0)
            self.most = torch.where(unclipped, self.most, 1.0)
        self.num_fixed = int((self.most == 1.0).sum())
        if self.num_fixed == len(self.most):
            self.reason = f"the measured maximum of every channel reaches the clip at {self.clips[0].high:g}"

    def equalize(self, magnitudes: dict[str, Tensor]) -> float:
        """Sets every channel's scale by its ranges, and returns the largest |log| of a change."""
        scale = self.scale.clone()
        nonzero = torch.ones_like(self.scale, dtype=torch.bool)
        for side, sign in ((self.rows, 1.0), (self.columns, -1.0)):
            if side is not None:
                ranges = side.ranges(magnitudes[side.name])
                nonzero &= ranges > 0
                share = torch.where(ranges > 0, ranges / ranges.max(), 1.0)
                scale *= share ** (sign if self.rows is None or self.columns is None else sign / 2)
        scale = torch.where(nonzero, scale.clamp(self.least, self.most), self.scale)
        step = scale / self.scale
        self.scale = scale
        for side, factor in ((self.rows, 1 / step), (self.columns, step)):
            if side is not None:
                magnitude = magnitudes[side.name]
                magnitudes[side.name] = magnitude * side.spread(factor, magnitude)
        return float(step.log().abs().max())

    def apply(self, values: Mapping[str, Tensor], tensors: dict[str, Tensor]) -> None:
        """Writes the scaled values of its weights and vectors into `tensors`, in float64."""

        def current(name: str) -> Tensor:
            return tensors[name] if name in tensors else values[name].double()

        for side, factor in ((self.rows, 1 / self.scale), (self.columns, self.scale)):
            if side is not None:
                weight = current(side.name)
                tensors[side.name] = weight * side.spread(factor, weight)
        for name in self.vectors:
            tensors[name] = current(name) / self.scale
        if self.variance is not None:
            variance = current(self.variance)
            scaled = (variance + self.eps) / self.scale.square() - self.eps
            tensors[self.variance] = torch.where(self.scale == 1, variance, scaled)
