"""A network with replaced layers as an ordinary torch module.

Weights lie on their grids. Hooks put inputs on their grids.

The packed file is loaded into such a module, and ONNX is exported from one.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clado.errors import NetworkError
from clado.grids import ActivationGrid, QuantizedLayer
from clado.network.network import Network, Replaced, computing
from clado.network.whole_forwards import WholeForwards

_MODULE_TYPES = tuple(
    getattr(nn, name) for name in ("Linear", *(f"Conv{n}d" for n in (1, 2, 3)), *(f"ConvTranspose{n}d" for n in (1, 2, 3)))
)
"""Modules whose call reads their `weight` and their first argument."""
Rounding = Callable[[Tensor, ActivationGrid], Tensor]
"""Puts a tensor on a grid."""
GRID_BUFFERS = ("input_grid_scale", "input_grid_zero_point", "input_grid_last_code")
"""Buffers of a module whose input is quantized."""


STEPS = 0.5
"""Share of what the grids of inputs change, that a module's logits may differ by. Without the grids all of it is missing.

EfficientNet-Lite0 with 44 inputs on grids of 8 bits differed by 0.38 of it, and by a millionth of the logits without the grids.
"""


def as_module(network: Network, layers: Replaced, rounding: Rounding | None = None) -> nn.Module:
    """The network with layers (by index) replaced, as a torch module.

    `load_packed` gives the same from a file.

    Args:
        network: The float network.
        layers: Layers by index, or their weights alone.
        rounding: Puts a layer's input on its grid. By default `InputGrid` does, with buffers of the module.

    Returns:
        A copy of the network's module in eval mode.

    Raises:
        NetworkError: A module cannot hold the grid of an input or the bias of a correction. Or the
            copy does not compute what was measured, because a module's forward reads neither.
    """
    state = network.state_dict(layers)
    new_biases = [name for name in state if name not in network.model.state_dict()]
    inputs: dict[str, ActivationGrid] = {}
    for i, layer in as_layers(layers).items():
        merge_input_grid(inputs, network.places[i].parameter, layer.activation)
    model, readers = assemble(network.model, state, new_biases, inputs, rounding)
    called_modules: set[nn.Module] = set()
    hooks = [reader.register_forward_pre_hook(lambda module, _: called_modules.add(module)) for reader in readers.values()]
    if hooks:
        with torch.no_grad():
            model(network.example.to(network.device))
        if uncalled_readers := [name for name, reader in readers.items() if reader not in called_modules]:
            raise NetworkError(_unreachable_inputs(uncalled_readers))
    for hook in hooks:
        hook.remove()
    _refuse_another_function(model, network, layers)
    if inputs:
        without_grids = {i: replace(layer, activation=None) for i, layer in as_layers(layers).items()}
        _refuse_another_function(assemble(network.model, state, new_biases, {}, rounding)[0], network, without_grids)
    return model


def _refuse_another_function(model: nn.Module, network: Network, layers: Replaced) -> None:
    """Raises NetworkError if the module's logits are not those of the replaced layers.

    Both add in another order. A value in the middle of two codes may then take either, and a step of one input changes others in
    the layers behind it. So with inputs on grids, logits may differ by a share of what the grids change.
    """
    images = network.example.to(network.device)
    if not isinstance(network.engine, WholeForwards):  # with whole forward passes, layers are known for this image only
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        images = torch.cat([images, noise.to(images)])
    with torch.no_grad(), computing(network.numeric, network.device):
        logits = network.outputs.packed(model(images.clone())).float()
    measured = network.logits(images, layers).float()
    scale, known = float(measured.abs().max()), as_layers(layers)
    tolerance = (1e-3 if network.numeric == "float32" else 1e-1) * scale
    if any(layer.activation is not None for layer in known.values()):
        in_float = network.logits(images, {i: replace(layer, activation=None) for i, layer in known.items()}).float()
        tolerance = max(tolerance, 1e-2 * scale, STEPS * float((in_float - measured).abs().max()))
    if isfinite(scale) and not float((logits - measured).abs().max()) <= tolerance:
        raise NetworkError(
            f"{type(model).__name__}'s own forward does not read an added bias or a quantized input through its modules. As a "
            "torch module it computes another function than was measured: call convolutions and linear layers as modules, or do "
            "without activation bits and corrections that add biases"
        )


def as_layers(layers: Replaced) -> dict[int, QuantizedLayer]:
    """Quantized layers by index. A plain weight becomes a layer without a grid."""
    return {i: layer if isinstance(layer, QuantizedLayer) else QuantizedLayer(layer) for i, layer in layers.items()}


def fake_quantize_by_tensors(x: Tensor, scale: Tensor, zero_point: Tensor, last_code: Tensor) -> Tensor:
    """The same as `ActivationGrid.fake_quantize`, in operators that `torch.export` takes. Bit for bit in float32.

    Args:
        x: Any tensor.
        scale: The grid's scale, float32, a scalar.
        zero_point: The grid's zero point, an integer.
        last_code: The largest code, 2^bits - 1.
    """
    codes = ((x.float() * (1 / scale)).round() + zero_point).clamp_min(0).minimum(last_code)
    return ((codes - zero_point) * scale).to(x.dtype)


def merge_input_grid(inputs: dict[str, ActivationGrid], parameter: str, grid: ActivationGrid | None) -> None:
    """Adds a grid to `inputs`.

    Parts of a split weight read one input. The widest of their grids stays, as in the graph.
    """
    if grid is not None and (parameter not in inputs or grid.bits > inputs[parameter].bits):
        inputs[parameter] = grid


def bias_place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module, and the name of its attribute, for the bias of a correction.

    Raises NetworkError if the module takes none.
    """
    module_name = name.rpartition(".")[0]
    module = model.get_submodule(module_name)
    attribute = "in_proj_bias" if isinstance(module, nn.MultiheadAttention) else "bias"
    if not isinstance(module, (*_MODULE_TYPES, nn.MultiheadAttention)) or getattr(module, attribute) is not None:
        raise NetworkError(
            f"{module_name or 'the network'} ({type(module).__name__}) takes no added bias; use corrections without biases"
        )
    return module, attribute


def assemble(
    model: nn.Module,
    state: Mapping[str, Tensor],
    new_biases: Sequence[str],
    inputs: Mapping[str, ActivationGrid],
    rounding: Rounding | None = None,
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A copy of a module with a state, new biases, and grids of inputs.

    Args:
        model: The module. It is not changed.
        state: Tensors by name, those of new biases among them.
        new_biases: Names of biases that corrections added.
        inputs: Grid of an input, by the name of the parameter that reads it.
        rounding: Puts an input on its grid. By default buffers in the module's state do.

    Returns:
        The copy in eval mode, and the modules that have a grid by the name of their parameter.

    Raises:
        NetworkError: A module cannot hold a new bias or the grid of its input.
    """
    model = _copy(model).eval()
    state = dict(state)
    for name in new_biases:
        module_name = name.rpartition(".")[0]
        module, attribute = bias_place(model, name)
        bias = state.pop(name)
        setattr(module, attribute, nn.Parameter(torch.empty_like(bias, device=next(module.parameters()).device)))
        state[f"{module_name}.{attribute}".lstrip(".")] = bias
    model.load_state_dict(state)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    readers = {}
    for parameter_name, grid in inputs.items():
        for name in names[id(model.get_parameter(parameter_name))]:
            readers[name] = _reader(model, name)
            InputGrid(grid, rounding).attach(readers[name])
    return model, readers


def _copy(model: nn.Module) -> nn.Module:
    try:
        return deepcopy(model)
    except RuntimeError as error:
        raise NetworkError(
            f"{type(model).__name__} cannot be copied ({error}); expected weights that are parameters: "
            "torch.nn.utils.parametrizations.weight_norm where torch.nn.utils.weight_norm is used"
        ) from error


def _reader(model: nn.Module, parameter: str) -> nn.Module:
    """The module whose call reads both a weight and its input."""
    module_name, _, attribute = parameter.rpartition(".")
    parent_name, _, child_name = module_name.rpartition(".")
    module, parent = model.get_submodule(module_name), model.get_submodule(parent_name)
    if isinstance(parent, nn.MultiheadAttention) and child_name == "out_proj" and attribute == "weight":
        if type(parent) is nn.MultiheadAttention and parent.bias_k is None and not parent.add_zero_attn:
            parent.__class__ = OpenAttention
        if not isinstance(parent, OpenAttention):
            raise NetworkError(_unreachable_inputs([parameter]))
        return module
    if (isinstance(module, _MODULE_TYPES) and attribute == "weight") or (
        isinstance(module, nn.MultiheadAttention) and attribute == "in_proj_weight"
    ):
        return module
    raise NetworkError(_unreachable_inputs([parameter]))


def _unreachable_inputs(names: Sequence[str]) -> str:
    return (
        f"the input of {', '.join(names[:8])} cannot be quantized in a torch module; expected weights of convolution, linear or "
        "attention modules that are called: leave activations in float, or export as safetensors"
    )


@dataclass(frozen=True)
class InputGrid:
    """A forward hook that puts the inputs of a module on a grid.

    A tensor that is passed several times is put on the grid once.
    """

    grid: ActivationGrid
    """The grid of the module's inputs."""
    rounding: Rounding | None = None
    """Puts a tensor on the grid. None: the buffers of `attach` do.

    The buffers are part of the module's state and follow it to other devices.
    """

    def attach(self, module: nn.Module) -> None:
        """Makes this the hook of a module."""
        if self.rounding is None:
            device = next(module.parameters()).device
            last_code = 2**self.grid.bits - 1
            scale = torch.tensor(self.grid.scale, dtype=torch.float32)
            values = (scale, torch.tensor(self.grid.zero_point), torch.tensor(last_code))
            for name, value in zip(GRID_BUFFERS, values, strict=True):
                module.register_buffer(name, value.to(device))
        module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the call with its inputs on the grid.

        The inputs are attention's query, key and value, and other modules' first argument.
        """
        keys = ("query", "key", "value") if isinstance(module, nn.MultiheadAttention) else ("input",)
        results: dict[int, Tensor] = {}

        def put(x: Tensor) -> Tensor:
            if id(x) not in results:
                if self.rounding is None:
                    results[id(x)] = fake_quantize_by_tensors(x, *(getattr(module, name) for name in GRID_BUFFERS))
                else:
                    results[id(x)] = self.rounding(x, self.grid)
            return results[id(x)]

        args = (*(put(x) for x in args[: len(keys)]), *args[len(keys) :])
        return args, {key: put(x) if key in keys else x for key, x in kwargs.items()}


class OpenAttention(nn.MultiheadAttention):
    """The same attention, except that its output projection is called as a module.

    So the input of the output projection can be put on a grid.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The forward of `nn.MultiheadAttention`, for batches and without masks."""
        if query.ndim != 3 or key_padding_mask is not None or attn_mask is not None or is_causal:
            raise NetworkError("attention with a mask or of one sequence cannot have a quantized output projection")
        is_self_attention = query is key and key is value
        sources = [query] if is_self_attention else [query, key, value]
        if not self.batch_first:
            sources = [source.transpose(0, 1) for source in sources]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if is_self_attention:
            projections = list(F.linear(sources[0], weight, bias).chunk(3, -1))
        else:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            projections = [F.linear(x, w, b) for x, w, b in zip(sources, weight.chunk(3), biases, strict=True)]
        q, k, v = (x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2) for x in projections)
        attention: Tensor | None = None
        if need_weights:
            attention = ((q * self.head_dim**-0.5) @ k.transpose(2, 3)).softmax(-1)
            y = attention @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if attention is not None and average_attn_weights:
            attention = attention.mean(1)
        return (y if self.batch_first else y.transpose(0, 1)), attention


def shape_and_dtype(tensor: Tensor) -> str:
    """A tensor's shape and dtype, for messages: "(8, 3) float32"."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
