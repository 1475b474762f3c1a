"""The deployed network as an ONNX file.

DequantizeLinear follows the codes of each weight. QuantizeLinear and DequantizeLinear precede each
use of a quantized input.

Codes of weights have the narrowest integer type of the operator set that holds them: int4, int8 or
int16, unsigned for affine grids. From operator set 25 on there are types of two bits. The default
operator set is older, because more runtimes read it: there, weights of 1, 2 and 3 bits take four
bits. The packed format has no such loss. Inputs have eight or sixteen bits; narrower ones are
clipped first. Batch norm stays an operator.

Sources: the operators QuantizeLinear and DequantizeLinear at onnx.ai; torch.onnx.export with
`dynamo=True`, and our translation of the operator that marks inputs. Needs the packages of the
extra `onnx`: pip install 'clado[onnx]'.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from clado.errors import ConfigurationError, NetworkError
from clado.exporting._onnx_agreement import library
from clado.exporting._onnx_graph import initializer, node
from clado.exporting._torch_module import as_layers, as_module
from clado.exporting.packed import bits_of, integers
from clado.grids import ActivationGrid, Codes, Grid, QuantizedLayer
from clado.network.network import Network, Replaced
from clado.space import Layer

OPSET = 21  # the first with four bits, and with sixteen
NEWEST_EXPORTED = (
    23  # the set that torch 2.8 to 2.15 export; a later set can be declared, because the used operators mean the same there
)
TWO_BITS, TWO_BITS_IR = 25, 13  # operator set and file format that have two-bit types


@dataclass(frozen=True)
class OnnxSize:
    """Bytes of an exported file."""

    file_bytes: int
    """The whole file."""
    weight_bytes: int
    """The stored codes of quantized weights."""
    widened: tuple[tuple[str, int, str], ...]
    """(layer, bits, data type) of the layers whose codes have a wider type than their bits."""


def export_onnx(path: Path, network: Network, layers: Replaced, opset: int = OPSET) -> OnnxSize:
    """Writes a network and its layers (by index), as `Prepared.deployed` returns them.

    The file maps images (batch, C, H, W) to logits.

    Raises:
        ConfigurationError: Packages are not installed, or the operator set is too old.
        NetworkError: torch cannot export the network, or its outputs are not logits.
    """
    if not network.outputs.are_logits:
        raise NetworkError(
            f"the network returns outputs of the form {network.outputs.text()}, and ONNX files are checked on logits (N, C); "
            "expected another format, or torch.onnx.export of the module that clado.quantize gives"
        )
    ir, _ = library("onnx_ir"), library("onnxscript")
    if opset < OPSET:
        raise ConfigurationError(f"ONNX operator set {opset} has no four-bit integers; expected {OPSET} or later")
    replaced = as_layers(layers)
    model = as_module(network, replaced, _mark).cpu()
    exported = _onnx_program(model, network.example.cpu(), opset)
    graph = exported.model.graph
    codes = _put_codes(ir, graph, model, network, replaced, opset)
    exported.optimize()
    code_bytes = _code_bytes(graph, codes)
    _name_batch(ir, graph)
    import_module("onnx_ir.passes.common").ClearMetadataAndDocStringPass()(exported.model)  # they name files of this machine
    bits = {network.layers[i].name: bits_of(layer.grid.codes) for i, layer in replaced.items() if layer.grid is not None}
    exported.model.producer_name = "clado"
    exported.model.metadata_props["clado.bits"] = json.dumps(bits)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        exported.save(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    dtypes = {name: value.dtype for name, value in codes.items()}
    widened = tuple((name, bits[name], dtype.name.lower()) for name, dtype in dtypes.items() if bits[name] < dtype.bitwidth)
    return OnnxSize(path.stat().st_size, code_bytes, widened)


def _onnx_program(model: nn.Module, example: Tensor, opset: int) -> Any:
    """The model as torch exports it to ONNX: weights are float, and marked inputs are translated."""
    exported = torch.onnx.export(
        _program(model, example),
        (),
        dynamo=True,
        optimize=False,  # optimising comes after weights have their operators; before, it would fold them as constants
        verbose=False,
        opset_version=min(opset, NEWEST_EXPORTED),
        input_names=["images"],
        output_names=["logits"],
        custom_translation_table={torch.ops.clado.on_grid.default: _translation(opset)},
    )
    if exported is None:
        raise NetworkError("torch.onnx.export gave no program; expected a network that it takes")
    exported.model.graph.opset_imports[""] = opset
    if opset >= TWO_BITS:
        exported.model.ir_version = max(exported.model.ir_version, TWO_BITS_IR)
    return exported


def _code_bytes(graph: Any, codes: Mapping[str, Any]) -> int:
    """Bytes of the layers' codes in an optimised graph; equal codes have become one tensor.

    Raises NetworkError if the optimisation has removed a layer's codes.
    """
    inputs: list[Any] = [value for node in graph if node.op_type == "DequantizeLinear" for value in node.inputs[:1]]
    tensors = {_content(value): value for value in inputs if value.const_value is not None}
    contents = {name: _content(value) for name, value in codes.items()}
    if removed := [name for name, content in contents.items() if content not in tensors]:
        raise NetworkError(f"{', '.join(removed[:8])} lost its codes during the export to ONNX; export it in another format")
    return sum(int(tensors[content].const_value.nbytes) for content in set(contents.values()))


def _program(model: nn.Module, example: Tensor) -> ExportedProgram:
    """The model as `torch.export` has it, for any number of images."""
    try:
        with torch.no_grad():
            batch = torch.cat([example, example])  # torch.export treats a batch of one as a constant
            return torch.export.export(model, (batch,), dynamic_shapes=({0: Dim("batch", max=2**20)},))
    except Exception as error:  # it raises exceptions of many types; each means that there is no program
        summary = next((line.strip(" -") for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise NetworkError(f"torch.export cannot turn the quantized network into ONNX's operators: {summary[:300]}") from error


# -- inputs ----------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("clado::on_grid", mutates_args=())
def _on_grid(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    """Marks a quantized input in an exported program."""
    return ActivationGrid(bits, scale, zero_point).fake_quantize(x)


@_on_grid.register_fake
def _(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    return torch.empty_like(x)


def _mark(x: Tensor, grid: ActivationGrid) -> Tensor:
    output: Tensor = torch.ops.clado.on_grid(x.float(), grid.scale, grid.zero_point, grid.bits)
    return output.to(x.dtype)


def _translation(opset: int) -> Callable[..., Any]:
    """The function that translates the mark into ONNX's operators."""
    ir, op = library("onnx_ir"), library("onnxscript").opset21

    def on_grid(x: Any, scale: float, zero_point: int, bits: int) -> Any:
        # ONNX Runtime's optimisation takes no four-bit inputs behind a Clip
        codes, dtype = Codes.of(bits, False), _integer_type(ir, Codes.of(max(bits, 8), False), opset)
        step = op.Constant(value=ir.tensor(np.float32(scale)))
        zero = op.Constant(value=ir.tensor(np.array(zero_point, dtype.numpy()), dtype=dtype))
        if dtype.bitwidth > bits:  # the integer type would saturate outside of the grid
            ends = [np.float32((code - zero_point) * scale) for code in (codes.low, codes.high)]
            x = op.Clip(x, *(op.Constant(value=ir.tensor(end)) for end in ends))
        return op.DequantizeLinear(op.QuantizeLinear(x, step, zero), step, zero)

    return on_grid


# -- weights ---------------------------------------------------------------------------------------------------------------


def _put_codes(
    ir: ModuleType, graph: Any, model: nn.Module, network: Network, layers: Mapping[int, QuantizedLayer], opset: int
) -> dict[str, Any]:
    """Replaces float weights by codes and DequantizeLinear. Returns layer -> its codes."""
    members: dict[str, list[int]] = {}
    for i, place in enumerate(network.places):
        members.setdefault(place.parameter, []).append(i)
    codes: dict[str, Any] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for parameter, indices in members.items():
        if not any(i in layers and layers[i].grid is not None for i in indices):
            continue
        nodes, values = [], []
        for i in indices:
            spec, layer = network.layers[i], layers.get(i, QuantizedLayer(network.weights[i]))
            if layer.grid is None:
                values.append(initializer(ir, graph, f"{spec.name}.values", layer.weight.detach().float().cpu().numpy()))
                continue
            nodes.append(_dequantize_node(ir, graph, spec, layer, layer.grid, opset))
            values.append(nodes[-1].outputs[0])
            codes[spec.name] = nodes[-1].inputs[0]
        if len(values) > 1:
            nodes.append(node(ir, f"{parameter}.whole", "Concat", values, [ir.AttrInt64("axis", 0)]))
        names = [name for name, tensor in parameters.items() if tensor is parameters[parameter]]
        _replace_weight(ir, graph, parameter, [graph.initializers[name] for name in names if name in graph.initializers], nodes)
    return codes


def _dequantize_node(ir: ModuleType, graph: Any, spec: Layer, layer: QuantizedLayer, grid: Grid, opset: int) -> Any:
    """The node that computes a layer's weight from its codes, scales and zero points.

    The codes, scales and zero points are added to the graph. The node is not.
    """
    name, dtype = spec.name, _integer_type(ir, grid.codes, opset)
    codes = integers(name, layer, grid).cpu().numpy()
    zero_point = grid.zero_point.expand_as(grid.scale).flatten().cpu().numpy()
    if (zero_point != zero_point.round()).any():
        raise NetworkError(f"the grid of {name} has a zero point that is not an integer; ONNX cannot hold it")
    is_per_tensor = grid.scale.numel() == 1
    shape = () if is_per_tensor else (-1,)
    inputs = [
        initializer(ir, graph, f"{name}.codes", codes, dtype),
        initializer(ir, graph, f"{name}.scale", grid.scale.detach().float().cpu().numpy().reshape(shape)),
        initializer(ir, graph, f"{name}.zero_point", zero_point.reshape(shape), dtype),
    ]
    axis = [] if is_per_tensor else [ir.AttrInt64("axis", spec.channel_axis)]
    return node(ir, f"{name}.values", "DequantizeLinear", inputs, axis)


def _replace_weight(ir: ModuleType, graph: Any, parameter: str, initializers: Sequence[Any], nodes: list[Any]) -> None:
    """Adds nodes to the graph. The output of the last one replaces the float weight.

    `initializers` are the float weight, which may have several names.
    """
    dtype, shape = initializers[0].dtype, initializers[0].shape
    if dtype != ir.DataType.FLOAT:
        nodes.append(node(ir, f"{parameter}.cast", "Cast", nodes[-1].outputs, [ir.AttrInt64("to", int(dtype))]))
    graph.insert_before(graph[0], nodes)
    weight = nodes[-1].outputs[0]
    weight.dtype, weight.shape = dtype, shape
    for value in initializers:
        ir.convenience.replace_all_uses_with(value, weight)
        del graph.initializers[value.name]


def _content(value: Any) -> tuple[Any, tuple[int, ...], bytes]:
    """Data type, shape and bytes of a stored tensor, without its name."""
    return value.dtype, tuple(value.const_value.shape), value.const_value.tobytes()


def _integer_type(ir: ModuleType, codes: Codes, opset: int) -> Any:
    """The narrowest integer type that holds the codes."""
    for bits in (2, 4, 8, 16):
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if codes.low < 0 else (0, 2**bits - 1)
        if low <= codes.low and codes.high <= high and (bits > 2 or opset >= TWO_BITS):
            return getattr(ir.DataType, f"{'INT' if codes.low < 0 else 'UINT'}{bits}")
    raise NetworkError(f"codes {codes.low}..{codes.high} do not fit into sixteen bits")


def _name_batch(ir: ModuleType, graph: Any) -> None:
    """Names the axis of images `batch`, which torch.export does not."""
    unnamed = graph.inputs[0].shape[0]
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(["batch" if length == unnamed else length for length in value.shape])
