"""The slower path for networks that have no graph: every probe is a whole forward of the module with weights replaced.

Same interface as `Graph`, so that measuring does not know which of the two it drives: a state is a run that has not been made
yet, advancing it notes which weights to replace, and finishing it makes the run. Stacked states are finished one by one, since
each has weights of its own.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from clado.errors import NetworkError
from clado.graph import Cut, eval_mode, logits_of, why_unsearched
from clado.space import Layer

# Functions that consume a weight as their second argument `weight`, and the weight's axis of output channels.
_CONSUMERS: dict[Any, tuple[str, int]] = {
    F.linear: ("linear", 0),
    **{getattr(torch, f"conv{n}d"): (f"conv{n}d", 0) for n in (1, 2, 3)},
    **{getattr(torch, f"conv_transpose{n}d"): (f"conv_transpose{n}d", 1) for n in (1, 2, 3)},
}
# Attention calls linear where no mode sees it; these of its arguments (with their positions) are its weights, in order of use.
_ATTENTION = {"in_proj_weight": 5, "q_proj_weight": None, "k_proj_weight": None, "v_proj_weight": None, "out_proj_weight": 11}
_UNSEEN = "no convolution, linear function or attention that the example met"


@dataclass(frozen=True)
class Deferred:
    """Runs that are not made yet: (images, weights to replace) of each, and their logits once they are."""

    parts: tuple[tuple[Tensor, Mapping[int, Tensor]], ...]
    logits: Tensor | None = None

    @property
    def num_images(self) -> int:
        """Images of all runs."""
        return sum(len(images) for images, _ in self.parts)


class WholeForwards:
    """A module run whole. Layers are the weights that convolutions, linear functions and attention read when the example runs."""

    def __init__(self, model: nn.Module, example: Tensor, fixed: Callable[[str], bool]) -> None:
        self.model = model
        with eval_mode(model), torch.inference_mode():
            watch = _Watch(model, len(example))
            before = {name: tensor.clone() for name, tensor in model.named_buffers()}
            first, second = model(example), model(example)
            with watch:  # on its own: attention leaves its fused path where it is watched
                model(example)
        for name, tensor in model.named_buffers():
            if not torch.equal(tensor, before[name]):
                raise NetworkError(f"the network changes its buffer {name} when it runs; expected an eval mode that does not")
        if not torch.equal(logits_of(first), logits_of(second)):
            raise NetworkError("two runs on the same images differ: the network draws random numbers or keeps a state")
        self.layers: tuple[Layer, ...] = tuple(layer for layer in watch.layers.values() if not fixed(layer.name))
        parameters = dict(model.named_parameters())
        self.weights: tuple[Tensor, ...] = tuple(parameters[layer.name].detach() for layer in self.layers)
        self.macs: int = sum(layer.macs for layer in watch.layers.values())
        # nothing is kept of a run, and resuming it costs all of it
        self.cuts: tuple[Cut, ...] = tuple(Cut(0, {}, 0, self.macs, watch.peak_bytes) for _ in self.layers)
        searched = {layer.name for layer in self.layers}
        self.unsearched: tuple[tuple[str, int, str], ...] = tuple(
            (name, tensor.numel() * tensor.element_size(), why_unsearched(tensor, fixed(name), _UNSEEN))
            for name, tensor in parameters.items()
            if name not in searched
        )

    def begin(self, images: Tensor) -> Deferred:
        """A run of images (N, ...) with no weight replaced."""
        return Deferred(((images, {}),))

    def advance(self, state: Deferred, layer: int, weights: Mapping[int, Tensor]) -> Deferred:
        """The same runs with these weights replaced as well; made at once where `layer` is the number of layers."""
        parts = tuple((images, {**replaced, **weights}) for images, replaced in state.parts)
        if layer < len(self.layers) or state.logits is not None:
            return Deferred(parts, state.logits)
        return Deferred(parts, torch.cat([self._forward(images, replaced) for images, replaced in parts]))

    def stack(self, states: Sequence[Deferred], layer: int) -> Deferred:
        """Several states as one."""
        logits = [state.logits for state in states if state.logits is not None]
        return Deferred(tuple(part for state in states for part in state.parts), torch.cat(logits) if logits else None)

    def output(self, state: Deferred) -> Tensor:
        """Logits (images, classes) of finished runs."""
        return logits_of(state.logits)

    def _forward(self, images: Tensor, replaced: Mapping[int, Tensor]) -> Tensor:
        named = {self.layers[i].name: weight for i, weight in replaced.items()}
        with eval_mode(self.model):
            return logits_of(torch.func.functional_call(self.model, named, (images,)))


class _Watch(TorchFunctionMode):
    """Notes, while the example runs, which parameters are read as weights, in order, with multiply-accumulates of one image."""

    def __init__(self, model: nn.Module, num_images: int) -> None:
        super().__init__()
        self.num_images = num_images
        # of a tensor with several names the module's first is used
        self.names = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
        self.layers: dict[str, Layer] = {}
        self.peak_bytes = 0  # of one image: most that one of these functions reads and writes, a lower bound of what a run takes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _CONSUMERS:
            operator, axis = _CONSUMERS[func]
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            positions = args[0] if axis else result
            self.peak_bytes = max(self.peak_bytes, (args[0].nbytes + result.nbytes) // self.num_images)
            self._note(weight, operator, axis, positions.numel() * weight[0].numel())
        elif func is F.multi_head_attention_forward:
            for name, position in _ATTENTION.items():
                weight = kwargs.get(name, args[position] if position is not None and position < len(args) else None)
                if weight is not None:
                    tokens = args[0].numel() // args[0].shape[-1]
                    self._note(weight, "linear", 0, tokens * weight.numel())
        return result

    def _note(self, weight: Tensor, operator: str, axis: int, macs: int) -> None:
        name = self.names.get(weight.data_ptr())
        if name is None or not weight.is_floating_point():
            return  # a weight that is computed, or a buffer: not a parameter to choose bits for
        seen = self.layers.get(name)
        total = macs // self.num_images + (seen.macs if seen else 0)
        self.layers[name] = Layer(name, tuple(weight.shape), operator, total, axis)
