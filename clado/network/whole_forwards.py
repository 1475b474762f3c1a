"""The slower engine, for networks without a graph. Every probe is a whole forward pass of the module.

A state is a run that has not been made yet. Advancing it notes which weights to replace, and
finishing it makes the run. Stacked states are finished one by one, because each has its own
weights.
"""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from clado.errors import NetworkError
from clado.grids import ActivationGrid, QuantizedLayer
from clado.network.engine import Call, Cut, Engine, LayerPlace
from clado.network.program import eval_mode
from clado.network.tensors import logits_of
from clado.network.weights import why_unsearched
from clado.space import Layer

# Functions that consume a weight as their second argument, and its axis of output channels.
_CONSUMERS: dict[Any, tuple[str, int]] = {
    F.linear: ("linear", 0),
    **{getattr(torch, f"conv{n}d"): (f"conv{n}d", 0) for n in (1, 2, 3)},
    **{getattr(torch, f"conv_transpose{n}d"): (f"conv_transpose{n}d", 1) for n in (1, 2, 3)},
}
# The arguments after weight and bias, in order, with their defaults.
_CONVOLUTION = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_TRANSPOSED = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
# Attention calls linear in a way that torch function modes do not see. These of its arguments (with their positions) are
# its weights, in order of use.
_ATTENTION = {"in_proj_weight": 5, "q_proj_weight": None, "k_proj_weight": None, "v_proj_weight": None, "out_proj_weight": 11}
_UNSEEN = "no convolution, linear function or attention that the example met"


@dataclass(frozen=True)
class DeferredRuns:
    """Runs that are not made yet."""

    parts: tuple[tuple[Tensor, Mapping[int, QuantizedLayer]], ...]
    """(images, layers to replace) of each run."""
    logits: Tensor | None = None
    """Logits (images, classes) of all runs once they are made."""

    @property
    def num_images(self) -> int:
        """Images of all runs."""
        return sum(len(images) for images, _ in self.parts)

    @property
    def stack_key(self) -> Hashable:
        """Deferred runs can always be stacked."""
        return ()


class WholeForwards(Engine[DeferredRuns]):
    """A module run whole.

    Layers are the weights that convolutions, linear functions and attention read when the example
    runs.
    """

    def __init__(self, model: nn.Module, example: Tensor, fixed: Callable[[str], bool]) -> None:
        self.model = model
        self.changed: dict[str, Tensor] = {}
        watch = _watched(model, example)
        parameters = dict(model.named_parameters())
        self.macs: int = sum(layer.macs for layer in watch.layers.values())
        # nothing of a run is kept, so resuming it costs the whole run
        cut = Cut(0, {}, 0, self.macs, watch.peak_bytes)
        self.layers: tuple[LayerPlace, ...] = tuple(
            # batch norms are inside the module's code, where a run cannot stop
            LayerPlace(layer, layer.name, None, bias := _bias_name(layer.name, parameters), bias is not None, None, cut)
            for layer in watch.layers.values()
            if not fixed(layer.name)
        )
        searched = {place.parameter for place in self.layers}
        self.unsearched: tuple[tuple[str, int, str], ...] = tuple(
            (name, tensor.numel() * tensor.element_size(), why_unsearched(tensor, fixed(name), _UNSEEN))
            for name, tensor in parameters.items()
            if name not in searched
        )

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Float weight of each layer."""
        values = {**dict(self.model.named_parameters()), **self.changed}
        return tuple(values[place.parameter].detach() for place in self.layers)

    @property
    def biases(self) -> tuple[Tensor | None, ...]:
        """Float bias of each layer, None if it has none."""
        values = {**dict(self.model.named_parameters()), **self.changed}
        return tuple(None if place.bias_name is None else values[place.bias_name].detach() for place in self.layers)

    @property
    def replaceable(self) -> frozenset[str]:
        """Names of parameters and buffers that `updated` takes."""
        return frozenset({*dict(self.model.named_parameters()), *dict(self.model.named_buffers())})

    def updated(self, named: Mapping[str, Tensor]) -> "WholeForwards":
        """The same network with other values of parameters and buffers, by name."""
        unknown = [name for name in named if name not in self.replaceable]
        if unknown:
            raise NetworkError(f"the network has no {', '.join(unknown)}; it cannot get another value")
        other = copy(self)
        other.changed = {**self.changed, **named}
        return other

    def begin(self, images: Tensor) -> DeferredRuns:
        """A run of images (N, ...) with no weight replaced."""
        return DeferredRuns(((images, {}),))

    def advance(self, state: DeferredRuns, layer: int, replaced: Mapping[int, QuantizedLayer]) -> DeferredRuns:
        """The same runs with these layers replaced too. They are made if `layer` means the end."""
        parts = tuple((images, {**earlier, **replaced}) for images, earlier in state.parts)
        if layer < len(self.layers) or state.logits is not None:
            return DeferredRuns(parts, state.logits)
        return DeferredRuns(parts, torch.cat([self.forward(images, chosen) for images, chosen in parts]))

    def stack(self, states: Sequence[DeferredRuns], layer: int) -> DeferredRuns:
        """Several states as one."""
        logits = [state.logits for state in states if state.logits is not None]
        return DeferredRuns(tuple(part for state in states for part in state.parts), torch.cat(logits) if logits else None)

    def observe(self, images: Tensor, layers: Collection[int], see: Callable[[int, Call], None]) -> None:
        """Runs images in float. `see` gets each layer with the call that reads its weight, except attention's weights."""
        with _Seen({layer: self.weights[layer] for layer in layers}, see):
            self.forward(images, {})

    def output(self, state: DeferredRuns) -> Tensor:
        """Logits (images, classes) of finished runs."""
        return logits_of(state.logits)

    def forward(self, images: Tensor, replaced: Mapping[int, QuantizedLayer]) -> Tensor:
        """Logits (N, classes) of images (N, ...) with these layers replaced."""
        named = dict(self.changed)
        grids = {}
        for i, layer in replaced.items():
            place = self.layers[i]
            named[place.parameter] = layer.weight
            if layer.bias is not None:
                if place.bias_name is None:
                    raise NetworkError(f"{place.layer.name} has no bias, and whole forward passes cannot add one")
                named[place.bias_name] = layer.bias
            if layer.activation is not None:
                grids[layer.weight.data_ptr()] = layer.activation
        with eval_mode(self.model):
            if not grids:
                return logits_of(torch.func.functional_call(self.model, named, (images,)))
            with _QuantizedInputs(grids) as inputs:
                logits = logits_of(torch.func.functional_call(self.model, named, (images,)))
        if inputs.met != set(grids):
            names = [self.layers[i].layer.name for i, layer in replaced.items() if layer.weight.data_ptr() not in inputs.met]
            raise NetworkError(
                f"the input of {', '.join(names)} cannot be reached with whole forward passes; leave activations in float"
            )
        return logits


def _watched(model: nn.Module, example: Tensor) -> "_Watch":
    """The weights that a run of the example input reads. Refuses a network whose runs cannot be repeated."""
    with eval_mode(model), torch.inference_mode():
        watch = _Watch(model, len(example))
        before = {name: tensor.clone() for name, tensor in model.named_buffers()}
        images = example.clone()
        first = model(images)
        if not torch.equal(images, example):
            raise NetworkError("the network changes its images in place; expected one that does not change its input")
        second = model(example)
        with watch:  # without the recorder: attention does not take its fused path when it is recorded
            model(example)
    for name, tensor in model.named_buffers():
        if not torch.equal(tensor, before[name]):
            raise NetworkError(f"the network changes its buffer {name} when it runs; expected an eval mode that does not")
    if not torch.equal(logits_of(first), logits_of(second)):
        raise NetworkError("two runs on the same images differ: the network draws random numbers or keeps a state")
    return watch


def _bias_name(weight: str, parameters: Mapping[str, Tensor]) -> str | None:
    """Name of the bias that belongs to a weight. None if there is none."""
    folder, _, name = weight.rpartition(".")
    candidate = f"{folder}.{name.replace('weight', 'bias')}".lstrip(".")
    return candidate if candidate != weight and candidate in parameters else None


def _positional(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """(input, weight, bias, later arguments) of a call that reads a weight."""
    operator, axis = _CONSUMERS[func]
    rest = {} if operator == "linear" else _TRANSPOSED if axis else _CONVOLUTION
    by_name = {**dict(zip(("input", "weight", "bias", *rest), args, strict=False)), **kwargs}
    return (
        by_name["input"],
        by_name["weight"],
        by_name.get("bias"),
        *(by_name.get(name, default) for name, default in rest.items()),
    )


class _Seen(TorchFunctionMode):
    """Reports calls of convolutions and linear functions that read given weights, by layer."""

    def __init__(self, weights: Mapping[int, Tensor], see: Callable[[int, Call], None]) -> None:
        super().__init__()
        # the first rows of a weight have its address too
        self.layers = {(weight.data_ptr(), weight.numel()): layer for layer, weight in weights.items()}
        self.see = see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CONSUMERS:
            x, weight, _, *rest = _positional(func, args, kwargs)
            layer = self.layers.get((weight.data_ptr(), weight.numel()))
            if layer is not None:
                self.see(layer, Call(x, func, tuple(rest), tuple(weight.shape)))
        return func(*args, **kwargs)


class _QuantizedInputs(TorchFunctionMode):
    """Puts the inputs of the functions that read certain weights (by address) on their grids."""

    def __init__(self, grids: Mapping[int, ActivationGrid]) -> None:
        super().__init__()
        self.grids = grids
        self.met: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CONSUMERS:
            x, weight, *rest = _positional(func, args, kwargs)
            if (address := weight.data_ptr()) in self.grids:
                self.met.add(address)
                args, kwargs = (self.grids[address].fake_quantize(x), weight, *rest), {}
        return func(*args, **kwargs)


class _Watch(TorchFunctionMode):
    """Records the parameters that a run of the example input reads as weights, in order, and their cost."""

    def __init__(self, model: nn.Module, num_images: int) -> None:
        super().__init__()
        self.num_images = num_images
        # if a tensor has several names, the module's first one is used
        self.names = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
        self.parameters = dict(model.named_parameters())
        self.owners: dict[int, list[str]] = {}
        for name, parameter in self.parameters.items():
            self.owners.setdefault(parameter.untyped_storage().data_ptr(), []).append(name)
        self.layers: dict[str, Layer] = {}
        self.peak_bytes = 0  # bytes of one image: the most that one of these functions reads and writes, a lower bound for a run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _CONSUMERS:
            operator, axis = _CONSUMERS[func]
            x, weight, *_ = _positional(func, args, kwargs)
            positions = x if axis else result
            self.peak_bytes = max(self.peak_bytes, (x.nbytes + result.nbytes) // self.num_images)
            self._note(weight, operator, axis, positions.numel() * weight[0].numel())
        elif func is F.multi_head_attention_forward:
            for name, position in _ATTENTION.items():
                weight = kwargs.get(name, args[position] if position is not None and position < len(args) else None)
                if weight is not None:
                    tokens = args[0].numel() // args[0].shape[-1]
                    self._note(weight, "linear", 0, tokens * weight.numel())
        return result

    def _note(self, weight: Tensor, operator: str, axis: int, macs: int) -> None:
        owners = self.owners.get(weight.untyped_storage().data_ptr(), [])
        name = self.names.get(weight.data_ptr()) or (owners[0] if len(owners) == 1 else None)  # or further rows of a parameter
        if name is None or not weight.is_floating_point() or self.parameters[name].ndim < 2:
            return  # a computed weight, a buffer, or a vector is not a parameter to choose bits for
        whole, stride = self.parameters[name], weight.stride(axis)
        if whole.stride(axis) != stride and stride in whole.stride():  # it is read transposed
            axis = whole.stride().index(stride)
        known = self.layers.get(name)
        total = macs // self.num_images + (known.macs if known else 0)
        self.layers[name] = Layer(name, tuple(whole.shape), operator, total, axis)
