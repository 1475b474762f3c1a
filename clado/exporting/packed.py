"""The network that ships as one safetensors file in which every searched weight takes as many bits as it was given.

    LAYER.codes        uint8 (ceil(n b / 8),): codes of the weight in order, b bits each, least significant bit first
    LAYER.scale        float32 (channels,), or (1,) for one scale a tensor
    LAYER.zero_point   (channels,) or (1,), of an affine grid only
    LAYER.input        float32 (2,): scale and zero point of the grid of its input, where that is quantized
    LAYER.values       rows of a split weight that stay in float beside rows that do not
    any other name     a parameter or buffer of the module: fixed layers, biases, also added ones, batch norm

A stored code u stands for the integer low + step · u, and that for the value (integer − zero point) · scale. The header says, as
JSON under "document", what each layer is, and a hash covers it and every tensor. `load_packed` puts the file into a module.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from clado.errors import NetworkError, StoreError
from clado.grids import ActivationGrid, Codes, Grid, QuantizedLayer
from clado.network.network import Network, Replaced, computing
from clado.network.tensors import unfit
from clado.network.whole_forwards import WholeForwards

FORMAT = "clado-packed/1"
CHUNK = 2**20  # codes that are packed at a time; a multiple of eight, so that each part ends on a byte
OFF_GRID = 1e-3  # of a step: what arithmetic in another order may leave between a weight and its code's value
_CALLED = tuple(
    getattr(nn, name) for name in ("Linear", *(f"Conv{n}d" for n in (1, 2, 3)), *(f"ConvTranspose{n}d" for n in (1, 2, 3)))
)
Rounding = Callable[[Tensor, ActivationGrid], Tensor]


@dataclass(frozen=True)
class PackedSize:
    """Bytes of a packed file: `total_bytes` of all tensors, `weight_bytes` of them codes of searched weights, and its header."""

    total_bytes: int
    weight_bytes: int
    header_bytes: int

    @property
    def file_bytes(self) -> int:
        """Bytes of the file."""
        return self.total_bytes + self.header_bytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integers 0 .. 2^bits − 1 of any shape, n of them, as a stream of ceil(n · bits / 8) bytes (uint8), 1 to 16 bits each."""
    values = codes.detach().cpu().numpy().reshape(-1).astype("<u2")
    parts = [np.zeros(0, np.uint8)]
    for start in range(0, len(values), CHUNK):
        rows = values[start : start + CHUNK].view(np.uint8).reshape(-1, 2)
        parts.append(np.packbits(np.unpackbits(rows, axis=1, bitorder="little")[:, :bits], bitorder="little"))
    return torch.from_numpy(np.concatenate(parts))


def unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """The `count` integers (int32) that `pack` made a stream of."""
    if stream.dtype != torch.uint8 or stream.numel() != (count * bits + 7) // 8:
        raise ValueError(f"{stream.numel()} bytes are not {count} codes of {bits} bits")
    source, parts = stream.numpy(), [np.zeros(0, np.int32)]
    for start in range(0, count, CHUNK):
        here = min(CHUNK, count - start)
        row = np.unpackbits(source[start * bits // 8 :], count=here * bits, bitorder="little").reshape(here, bits)
        bytes_of = np.packbits(row, axis=1, bitorder="little")
        parts.append(bytes_of.astype(np.int32) @ (1 << 8 * np.arange(bytes_of.shape[1], dtype=np.int32)))
    return torch.from_numpy(np.concatenate(parts).astype(np.int32))


def export_packed(path: Path, network: Network, layers: Replaced) -> PackedSize:
    """Writes a network with layers (by index) replaced, as `Prepared.deployed` gives both, and says what the file takes.

    NetworkError, naming the layer, for a weight that is off its grid, a tensor that holds a NaN or an infinity, and an input or
    an added bias that a torch module cannot hold; nothing is written then.
    """
    as_module(network, layers)  # what could not be loaded again is refused here
    document, tensors = _packed(network, layers)
    if bad := unfit(tensors):
        raise NetworkError(f"weights hold a NaN or an infinity: {', '.join(bad[:8])}")
    owned = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    text = json.dumps(document, separators=(",", ":"))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(owned, part, {"format": FORMAT, "document": text, "sha256": _digest(text, owned)})
        part.chmod(0o644)  # safetensors writes it for its owner alone
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return packed_size(path)


def packed_size(path: Path) -> PackedSize:
    """What a packed file takes. StoreError where it is none, or damaged."""
    document, tensors = _read(path)
    total = sum(tensor.nbytes for tensor in tensors.values())
    with path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    codes = [f"{row['name']}.codes" for row in document["layers"] if row["bits"] is not None]
    return PackedSize(total, sum(tensors[name].nbytes for name in codes), header)


def load_packed(path: str | Path, network: nn.Module | Network) -> nn.Module:
    """A copy of a module in eval mode with the packed weights in it; the module given is left as it is.

    Weights are floats on their grids; inputs are put on theirs by hooks of the modules that read them. So its outputs are those
    of fake quantization, and `torch.export` takes it as it takes the module. StoreError where the file is none, damaged or of
    an unknown version; NetworkError where it is of another network.
    """
    path = Path(path)
    document, tensors = _read(path)
    try:
        state, inputs = _unpacked(document, tensors)
        added = [str(name) for name in document["added"]]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise StoreError(f"{path} is damaged: its header does not describe its tensors ({error}); export it again") from error
    model = network.model if isinstance(network, Network) else network
    if faults := _faults(state, added, model):
        raise NetworkError(f"{path} does not fit: {'; '.join(faults)}; expected the network that was exported")
    loaded, _ = _assembled(model, state, added, inputs, rounded)
    return loaded


def as_module(network: Network, layers: Replaced, rounding: Rounding | None = None) -> nn.Module:
    """The network with layers (by index) replaced, as a torch module: what `load_packed` gives, without a file.

    `rounding(x, grid)` puts a layer's input on its grid. NetworkError where a module cannot hold the grid of an input, or an
    added bias, or where what it computes then is not what was measured: a forward of its own may read neither.
    """
    state = network.state_dict(layers)
    added = [name for name in state if name not in network.model.state_dict()]
    inputs: dict[str, ActivationGrid] = {}
    for i, layer in as_layers(layers).items():
        _note_input(inputs, network.places[i].parameter, layer.activation)
    model, readers = _assembled(network.model, state, added, inputs, rounding or rounded)
    called: set[nn.Module] = set()
    hooks = [reader.register_forward_pre_hook(lambda module, _: called.add(module)) for reader in readers.values()]
    if hooks:
        with torch.no_grad():
            model(network.example.to(network.device))
        if unseen := [name for name, reader in readers.items() if reader not in called]:
            raise NetworkError(_unreachable(unseen))
    for hook in hooks:
        hook.remove()
    _refuse_another_function(model, network, layers)
    return model


def _refuse_another_function(model: nn.Module, network: Network, layers: Replaced) -> None:
    """NetworkError where a module's logits are not those of the network with its layers replaced."""
    images = network.example.to(network.device)
    if not isinstance(network.engine, WholeForwards):  # which is the network as this one image met it
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
        images = torch.cat([images, noise.to(images)])
    with torch.no_grad(), computing(network.numeric, network.device):
        own = model(images.clone()).float()
    measured = network.logits(images, layers).float()
    scale = float(measured.abs().max())
    tolerance = 1e-2 if network.numeric == "float32" else 1e-1  # a value between two codes may take either
    if isfinite(scale) and not float((own - measured).abs().max()) <= tolerance * scale:
        raise NetworkError(
            f"{type(model).__name__}'s own forward reads an added bias or a quantized input elsewhere than its modules do: as a "
            "torch module it computes another function than was measured; call convolutions and linear layers as modules, or do "
            "without activation bits and corrections that add biases"
        )


def rounded(x: Tensor, grid: ActivationGrid) -> Tensor:
    """`grid.fake_quantize(x)` bit for bit in float32, in operators that `torch.export` takes."""
    inverse = float(1 / torch.tensor(grid.scale, dtype=torch.float32))
    codes = ((x.float() * inverse).round() + grid.zero_point).clamp(0, 2**grid.bits - 1)
    return ((codes - grid.zero_point) * grid.scale).to(x.dtype)


def integers(name: str, layer: QuantizedLayer, grid: Grid) -> Tensor:
    """Codes (int32, the weight's shape) of a weight on its grid; NetworkError, with the layer's name, where it is off it."""
    codes = grid.quantize(layer.weight.float())
    error = (grid.dequantize(codes).to(layer.weight.dtype) - layer.weight).float().abs()
    if not bool((error <= OFF_GRID * grid.scale).all()):  # a NaN is off it too
        raise NetworkError(f"{name} does not lie on its grid; expected layers as `Prepared.deployed` gives them")
    return codes


def bits_of(codes: Codes) -> int:
    """The bit-width whose codes these are."""
    if codes.step == 2:
        return 1
    return codes.high.bit_length() + (1 if codes.low < 0 else 0)


# -- the file --------------------------------------------------------------------------------------------------------------


def _packed(network: Network, layers: Replaced) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the header's document, tensors by name)."""
    chosen, state = as_layers(layers), network.state_dict(layers)
    own = network.model.state_dict()
    aliases = _aliases(own)
    packed = {network.places[i].parameter for i, layer in chosen.items() if layer.grid is not None}
    rows: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for i, spec in enumerate(network.layers):
        parameter, part = network.places[i].parameter, network.places[i].rows
        layer = chosen.get(i, QuantizedLayer(network.weights[i]))
        if layer.grid is None and layer.activation is None and parameter not in packed:
            continue
        bits = None if layer.grid is None else bits_of(layer.grid.codes)
        axis = None if layer.grid is None or layer.grid.scale.numel() == 1 else spec.channel_axis
        row: dict[str, Any] = {"name": spec.name, "shape": list(spec.shape), "bits": bits}
        if layer.grid is not None:
            row |= {"codes": [layer.grid.codes.low, layer.grid.codes.high, layer.grid.codes.step], "channel_axis": axis}
        if part is not None:
            row |= {"parameter": parameter, "rows": [part.start, part.stop]}
        if layer.weight.dtype != torch.float32:
            row["dtype"] = str(layer.weight.dtype).removeprefix("torch.")
        if layer.activation is not None:
            row["input_bits"] = layer.activation.bits
        rows.append(row)
        if layer.grid is not None and bits is not None:
            tensors |= {f"{spec.name}.{key}": tensor for key, tensor in _coded(spec.name, layer, layer.grid, bits).items()}
            expected = [spec.shape[k] if k == axis else 1 for k in range(len(spec.shape))]
            if list(layer.grid.scale.shape) != expected and layer.grid.scale.numel() > 1:
                raise NetworkError(f"the grid of {spec.name} has scales {tuple(layer.grid.scale.shape)}; expected one a channel")
        elif parameter in packed:
            tensors[f"{spec.name}.values"] = layer.weight
        if layer.activation is not None:
            numbers = [layer.activation.scale, float(layer.activation.zero_point)]
            tensors[f"{spec.name}.input"] = torch.tensor(numbers, dtype=torch.float32)
    tensors |= {name: tensor for name, tensor in state.items() if name not in aliases and name not in packed}
    return {"layers": rows, "aliases": aliases, "added": [name for name in state if name not in own]}, tensors


def _coded(name: str, layer: QuantizedLayer, grid: Grid, bits: int) -> dict[str, Tensor]:
    """A weight's codes, scales and zero points as the file has them."""
    stored = (integers(name, layer, grid) - grid.codes.low) // grid.codes.step
    tensors = {"codes": pack(stored, bits), "scale": grid.scale.flatten()}
    zero_point = grid.zero_point.expand_as(grid.scale).flatten()
    if bool(zero_point.any()) or grid.codes.low == 0:
        whole = bool((zero_point == zero_point.round()).all())
        dtype = torch.uint8 if bits <= 8 else torch.int32
        tensors["zero_point"] = zero_point.to(dtype) if whole and grid.codes.low == 0 else zero_point
    return tensors


def _unpacked(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, ActivationGrid]]:
    """(the module's state by name, grids of inputs by parameter)."""
    left = dict(tensors)
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    inputs: dict[str, ActivationGrid] = {}
    for row in document["layers"]:
        name, bits, shape = row["name"], row["bits"], row["shape"]
        parameter, begin = row.get("parameter", name), row.get("rows", [0])[0]
        if "input_bits" in row:
            scale, zero_point = left.pop(f"{name}.input").tolist()
            _note_input(inputs, parameter, ActivationGrid(row["input_bits"], scale, int(zero_point)))
        if bits is not None:
            codes = Codes(*row["codes"])
            spread = [1] * len(shape)
            if row["channel_axis"] is not None:
                spread[row["channel_axis"]] = -1
            scale = left.pop(f"{name}.scale").reshape(spread)
            zero_point = left.pop(f"{name}.zero_point", torch.zeros(scale.numel())).reshape(spread).to(scale.dtype)
            integers = unpack(left.pop(f"{name}.codes"), bits, int(np.prod(shape))).reshape(shape) * codes.step + codes.low
            weight = Grid(scale, zero_point, codes).dequantize(integers).to(getattr(torch, row.get("dtype", "float32")))
        elif f"{name}.values" in left:
            weight = left.pop(f"{name}.values")
        else:
            continue
        parts.setdefault(parameter, []).append((begin, weight))
    whole = {name: torch.cat([part for _, part in sorted(rows, key=lambda row: row[0])]) for name, rows in parts.items()}
    state = {**left, **whole}
    return {**state, **{name: state[first] for name, first in document["aliases"].items()}}, inputs


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(document, tensors) of a file whose hash is right."""
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise StoreError(f"{path} is absent or damaged ({error}); expected the file that `clado export` wrote") from error
    found = header.get("format", "")
    if found != FORMAT:
        if found.startswith(FORMAT.partition("/")[0] + "/"):
            raise StoreError(f"{path} is of format {found}; this clado reads {FORMAT}: export it again, or install a later clado")
        raise StoreError(f"{path} is not a packed network; expected a file that `clado export --format packed` wrote")
    text = header.get("document", "")
    if header.get("sha256") != _digest(text, tensors):
        raise StoreError(f"{path} is damaged: its hash is another; copy or export it again")
    return json.loads(text), tensors


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the document, and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _faults(state: Mapping[str, Tensor], added: Sequence[str], model: nn.Module) -> list[str]:
    """Why a state is another network's: names, shapes, types, and names that share a tensor there alone."""
    own = model.state_dict()
    expected = set(state) - set(added)
    faults = []
    if missing := sorted(set(own) - expected):
        faults.append(f"the file lacks {', '.join(missing[:8])}")
    if unknown := sorted(expected - set(own)):
        faults.append(f"the network has no {', '.join(unknown[:8])}")
    unlike = [
        f"{name} ({_shape_and_dtype(state[name])} in the file, {_shape_and_dtype(own[name])} in the network)"
        for name in sorted(expected & set(own))
        if _shape_and_dtype(state[name]) != _shape_and_dtype(own[name])
    ]
    if unlike:
        faults.append(f"tensors differ: {', '.join(unlike[:8])}")
    pairs = [(name, first) for name, first in _aliases(own).items() if {name, first} <= expected]
    if tied := [f"{name} and {first}" for name, first in pairs if not torch.equal(state[name], state[first])]:
        faults.append(f"the network shares one tensor for {', '.join(tied[:8])}, and the file has two")
    return faults


def _shape_and_dtype(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names that share a tensor with an earlier name -> that name."""
    first: dict[Any, str] = {}
    found = {name: first.setdefault((t.data_ptr(), t.shape, t.stride()), name) for name, t in state.items() if t.numel()}
    return {name: earlier for name, earlier in found.items() if name != earlier}


def as_layers(layers: Replaced) -> dict[int, QuantizedLayer]:
    """Layers where some may be weights alone."""
    return {i: layer if isinstance(layer, QuantizedLayer) else QuantizedLayer(layer) for i, layer in layers.items()}


# -- the module ------------------------------------------------------------------------------------------------------------


def _note_input(inputs: dict[str, ActivationGrid], parameter: str, grid: ActivationGrid | None) -> None:
    """Parts of a split weight read one input, on the widest of their grids: as in the graph."""
    if grid is not None and (parameter not in inputs or grid.bits > inputs[parameter].bits):
        inputs[parameter] = grid


def bias_place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """(module, its attribute) that an added bias goes to; NetworkError where a module takes none."""
    place = name.rpartition(".")[0]
    module = model.get_submodule(place)
    attribute = "in_proj_bias" if isinstance(module, nn.MultiheadAttention) else "bias"
    if not isinstance(module, (*_CALLED, nn.MultiheadAttention)) or getattr(module, attribute) is not None:
        raise NetworkError(f"{place or 'the network'} ({type(module).__name__}) takes no added bias; correct it without biases")
    return module, attribute


def _assembled(
    model: nn.Module,
    state: Mapping[str, Tensor],
    added: Sequence[str],
    inputs: Mapping[str, ActivationGrid],
    rounding: Rounding,
) -> tuple[nn.Module, dict[str, nn.Module]]:
    """(a copy of a module with a state, added biases and grids of inputs by parameter; the modules that have such a grid)."""
    model = _copy(model).eval()
    state = dict(state)
    for name in added:
        place = name.rpartition(".")[0]
        module, attribute = bias_place(model, name)
        bias = state.pop(name)
        setattr(module, attribute, nn.Parameter(torch.empty_like(bias, device=next(module.parameters()).device)))
        state[f"{place}.{attribute}".lstrip(".")] = bias
    model.load_state_dict(state)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    readers = {}
    for parameter_name, grid in inputs.items():
        for name in names[id(model.get_parameter(parameter_name))]:
            readers[name] = _reader(model, name)
            readers[name].register_forward_pre_hook(InputGrid(grid, rounding), with_kwargs=True)
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
    """The module whose call reads a weight together with its input."""
    place, _, attribute = parameter.rpartition(".")
    above, _, own = place.rpartition(".")
    module, parent = model.get_submodule(place), model.get_submodule(above)
    if isinstance(parent, nn.MultiheadAttention) and own == "out_proj" and attribute == "weight":
        if type(parent) is nn.MultiheadAttention and parent.bias_k is None and not parent.add_zero_attn:
            parent.__class__ = OpenAttention
        if not isinstance(parent, OpenAttention):
            raise NetworkError(_unreachable([parameter]))
        return module
    if (isinstance(module, _CALLED) and attribute == "weight") or (
        isinstance(module, nn.MultiheadAttention) and attribute == "in_proj_weight"
    ):
        return module
    raise NetworkError(_unreachable([parameter]))


def _unreachable(names: Sequence[str]) -> str:
    return (
        f"the input of {', '.join(names[:8])} cannot be quantized in a torch module; expected weights of convolution, linear or "
        "attention modules that are called: leave activations in float, or export as safetensors"
    )


@dataclass(frozen=True)
class InputGrid:
    """A forward hook that puts what a module reads on a grid; one tensor that is given several times stays one."""

    grid: ActivationGrid
    rounding: Rounding

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the call with its inputs on the grid: query, key and value of attention, else the first."""
        keys = ("query", "key", "value") if isinstance(module, nn.MultiheadAttention) else ("input",)
        done: dict[int, Tensor] = {}

        def put(x: Tensor) -> Tensor:
            if id(x) not in done:
                done[id(x)] = self.rounding(x, self.grid)
            return done[id(x)]

        args = (*(put(x) for x in args[: len(keys)]), *args[len(keys) :])
        return args, {key: put(x) if key in keys else x for key, x in kwargs.items()}


class OpenAttention(nn.MultiheadAttention):
    """The same attention, with its output projection called as a module, so that what that reads can be put on a grid."""

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
        """As `nn.MultiheadAttention`, of batches and without masks."""
        if query.ndim != 3 or key_padding_mask is not None or attn_mask is not None or is_causal:
            raise NetworkError("attention with a mask or of one sequence cannot have a quantized output projection")
        same = query is key and key is value
        sources = [query] if same else [query, key, value]
        if not self.batch_first:
            sources = [source.transpose(0, 1) for source in sources]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if same:
            parts = list(F.linear(sources[0], weight, bias).chunk(3, -1))
        else:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            parts = [F.linear(x, w, b) for x, w, b in zip(sources, weight.chunk(3), biases, strict=True)]
        q, k, v = (part.reshape(*part.shape[:2], self.num_heads, -1).transpose(1, 2) for part in parts)
        shares: Tensor | None = None
        if need_weights:
            shares = ((q * self.head_dim**-0.5) @ k.transpose(2, 3)).softmax(-1)
            y = shares @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        if shares is not None and average_attn_weights:
            shares = shares.mean(1)
        return (y if self.batch_first else y.transpose(0, 1)), shares
