"""The interface of an engine for `Network`, and its facts about each searched layer.

There are two engines: `Graph` runs a network in part, `WholeForwards` runs the module whole.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from clado.grids import QuantizedLayer
from clado.space import Layer

S = TypeVar("S")  # the state of an unfinished run


@dataclass(frozen=True)
class Call:
    """One use of a layer's weight."""

    input: Tensor
    """The operator's input."""
    function: Callable[..., Any]
    """The operator."""
    arguments: tuple[Any, ...]
    """The operator's arguments after the bias."""
    weight_shape: tuple[int, ...]
    """The shape in which the operator reads the weight. A view may have changed it."""

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The operator's result for an input, a weight and a bias."""
        result: Tensor = self.function(x, weight, bias, *self.arguments)
        return result


@dataclass(frozen=True)
class Cut:
    """The place where a run can be resumed for a layer."""

    position: int
    """The run is resumed before this instruction."""
    axes: Mapping[int, int]
    """Values alive there: slot -> axis of the images."""
    bytes_per_image: int
    """Bytes of these values, for one image."""
    suffix_macs: int
    """Multiply-accumulates after the cut, for one image."""
    peak_bytes_per_image: int
    """Most bytes of one image's values that exist at once after the cut."""


@dataclass(frozen=True)
class LayerPlace:
    """The place of a searched layer in its network."""

    layer: Layer
    """The layer as the search space knows it."""
    parameter: str
    """Name of the module's parameter that holds the weight."""
    rows: slice | None
    """Rows of the parameter that belong to this layer. None: all."""
    bias_name: str | None
    """Name of the module's parameter that is the layer's bias. None: it has no bias."""
    takes_bias: bool
    """Whether the bias may be replaced, or given to the layer."""
    norm_mean: str | None
    """Name of the running mean of a batch norm, if only this batch norm reads the layer's result."""
    cut: Cut
    """The last place before the first use of the weight where a run can be resumed."""


class Engine(Protocol[S]):
    """Runs a network in part.

    A state is passed only to the engine that made it. Layer number `len(layers)` means the end.
    """

    layers: Sequence[LayerPlace]
    """Searched layers in execution order."""
    macs: int
    """Multiply-accumulates of one image."""
    unsearched: tuple[tuple[str, int, str], ...]
    """(name, bytes, why) of every parameter that is not searched."""

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Float weight of each layer."""

    @property
    def biases(self) -> tuple[Tensor | None, ...]:
        """Float bias (channels,) of each layer. None if it has no bias."""

    @property
    def replaceable(self) -> frozenset[str]:
        """Names of parameters and buffers that `updated` takes."""

    def updated(self, named: Mapping[str, Tensor]) -> "Engine[S]":
        """The same network with other values of parameters and buffers, by name.

        Raises:
            NetworkError: A name is not in `replaceable`.
        """

    def begin(self, images: Tensor) -> S:
        """The state before the first layer, of images (N, C, H, W)."""

    def advance(self, state: S, layer: int, replaced: Mapping[int, QuantizedLayer]) -> S:
        """Runs to the cut before `layer` with layers replaced. `state` is not changed."""

    def stack(self, states: Sequence[S], layer: int) -> S:
        """Stacks states with equal `stack_key` at the cut before `layer`: the images of one after those of the other."""

    def observe(self, images: Tensor, layers: Collection[int], see: Callable[[int, Call], None]) -> None:
        """Runs images in float up to the last of these layers. `see` gets each layer with the call that reads its weight."""

    def output(self, state: S) -> Tensor:
        """Logits (images, classes) of a finished run."""
