"""Transforms of an engine: fold batch norms, use batch statistics, or record for autograd."""

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clado.errors import NetworkError
from clado.grids import QuantizedLayer
from clado.network.graph import IN_PLACE, NUM_PROBES, Constant, Graph, GraphLayer, Norm, Scalar, resolved
from clado.network.tensors import laid_out_like, outside_inference
from clado.network.whole_forwards import WholeForwards


@dataclass(frozen=True, eq=False)
class Fold:
    """How a batch norm is folded into a layer: weight · γ/σ and bias · γ/σ + β − μ γ/σ, in float64."""

    weight_factor: Tensor
    """γ/σ in a shape that multiplies the weight's channels."""
    factor: Tensor
    """γ/σ (channels,)."""
    shift: Tensor
    """β − μ γ/σ (channels,)."""

    def __call__(self, layer: QuantizedLayer) -> QuantizedLayer:
        """The folded layer, which is not on its grid. A bias of None stays None: the network's bias is folded already."""
        weight = (layer.weight.double() * self.weight_factor).to(layer.weight.dtype)
        bias = None if layer.bias is None else self.shifted(layer.bias, weight)
        return QuantizedLayer(laid_out_like(weight, layer.weight), bias, layer.activation)

    def shifted(self, bias: Tensor | None, like: Tensor) -> Tensor:
        """The folded bias, in the weight's type."""
        return (self.shift if bias is None else bias.double() * self.factor + self.shift).to(like.dtype)


def folded(engine: Graph | WholeForwards, replaced: Collection[int] = ()) -> tuple[Graph | WholeForwards, dict[int, Fold]]:
    """The same network with batch norms inside the layers before them.

    A batch norm is folded if only it reads the result of a layer with one use, and no cut is between
    them. Its instruction stays as an identity, so positions and cuts are the same. Results are the
    same up to rounding. Whole forward passes fold nothing, because the module runs its own code.

    Args:
        engine: The network.
        replaced: Layers whose weights every run of the folded network replaces. They are not folded.

    Returns:
        The network, and layer -> how to fold what replaces it.
    """
    if isinstance(engine, WholeForwards):
        return engine, {}
    graph = engine
    folds: dict[int, Fold] = {}
    constants, steps = dict(graph.constants), list(graph.instructions)
    cuts = {place.cut.position for place in graph.layers}
    for i, place in enumerate(graph.layers):
        if place.norm_mean is None or place.rows is not None:
            continue
        norm = next(norm for norm in graph.norms if norm.mean == place.norm_mean)
        # between the two, operators after the batch norm would change a stored value in place
        if place.bias_slot is None or any(place.last_use < position <= norm.position + 1 for position in cuts):
            continue
        fold = _fold(graph, place, norm)
        if fold is None:
            continue
        folds[i] = fold
        weight, bias = constants[place.slots[0]], constants[place.bias_slot]
        if i not in replaced:
            constants |= dict.fromkeys(place.slots, fold(QuantizedLayer(weight)).weight)
        constants[place.bias_slot] = fold.shifted(bias, weight)
        steps[norm.position] = replace(steps[norm.position], function=_identity, arguments=steps[norm.position].arguments[:1])
    return replace(graph, constants=constants, instructions=tuple(steps)), folds


def _fold(graph: Graph, place: GraphLayer, norm: Norm) -> Fold | None:
    """How a layer is folded with the batch norm after it.

    None for a grouped transposed convolution, because its channels are on two axes.
    """
    tables: dict[type, dict[int, Any]] = {Constant: graph.constants}
    _, gamma, beta, mean, variance, *_ = (resolved(a, tables) for a in graph.instructions[norm.position].arguments)
    factor = (variance.double() + norm.eps).rsqrt() * (1.0 if gamma is None else gamma.double())
    if len(factor) != place.layer.num_channels:
        return None
    shape = [1] * len(place.layer.shape)
    shape[place.layer.channel_axis] = -1
    shift = -mean.double() * factor + (0.0 if beta is None else beta.double())
    return Fold(factor.reshape(shape), factor, shift)


def with_batch_statistics(engine: Graph | WholeForwards) -> Graph:
    """The same graph with every batch norm on the statistics of each probe's own images.

    Raises:
        NetworkError: The engine runs whole forward passes, which cannot separate stacked probes.
    """
    if isinstance(engine, WholeForwards):
        raise NetworkError("probes on batch statistics need a graph; expected graph: true under network")
    steps = list(engine.instructions)
    for norm in engine.norms:
        step = steps[norm.position]
        arguments = (*step.arguments[:3], norm.eps, Scalar(NUM_PROBES))
        steps[norm.position] = replace(step, function=_batch_norm_of_probes, arguments=arguments)
    return replace(engine, instructions=tuple(steps))


def differentiable(engine: Graph | WholeForwards) -> Graph | WholeForwards:
    """The same network for autograd.

    No operator overwrites values that a gradient needs, and no constant was made in inference mode.
    """
    if isinstance(engine, WholeForwards):
        return engine.updated({name: outside_inference(tensor) for name, tensor in engine.changed.items()})
    twins = {twin: function for function, twin in IN_PLACE.items()}
    steps = tuple(
        replace(step, function=twins.get(step.function, step.function))  # type: ignore[call-overload]
        for step in engine.instructions
    )
    constants = {slot: outside_inference(value) for slot, value in engine.constants.items()}
    return replace(engine, constants=constants, instructions=steps)


def _batch_norm_of_probes(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, num_probes: int) -> tuple[Tensor]:
    """Batch norm on the statistics of each probe.

    x (probes · n, channels, ...) holds n images of each probe, or their tokens one after another.
    """
    probes = x.reshape(num_probes, -1, *x.shape[1:])
    around = [1, *range(3, probes.ndim)]
    variance, mean = torch.var_mean(probes, around, correction=0, keepdim=True)
    scale = (variance + eps).rsqrt()
    channels = [1, 1, -1, *[1] * (probes.ndim - 3)]
    if weight is not None:
        scale = scale * weight.reshape(channels)
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias.reshape(channels)
    return (torch.addcmul(shift, probes, scale).reshape(x.shape),)


def _identity(x: Tensor) -> tuple[Tensor]:
    return (x,)
