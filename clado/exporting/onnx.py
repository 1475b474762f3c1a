"""The network that ships as ONNX: DequantizeLinear behind the codes of each weight, QuantizeLinear and DequantizeLinear before
each use of a quantized input.

Codes of weights are kept in the narrowest integer type of the operator set that holds them: int4, int8 or int16, unsigned for
affine grids, and from operator set 25 on two bits. So weights of 1, 2 and 3 bits take four in a file of the default operator
set, which more runtimes read; the packed format has none of that. Inputs are of eight bits or sixteen, clipped first where they
are narrower. Batch norm stays an operator of its own.

Sources: the operators QuantizeLinear and DequantizeLinear at onnx.ai; torch.onnx.export with `dynamo=True` and a translation of
our own for an operator that marks inputs. Needs the packages of the extra `onnx`: pip install 'clado[onnx]'.
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
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from clado.errors import ConfigurationError, NetworkError
from clado.exporting.packed import as_layers, as_module, bits_of, integers
from clado.grids import ActivationGrid, Codes, QuantizedLayer
from clado.network.network import Network, Replaced

OPSET = 21  # the first with four bits, and with sixteen
NEWEST_EXPORTED = 23  # by torch 2.8 to 2.15; a later one is declared, since what is used here means the same there
TWO_BITS, TWO_BITS_IR = 25, 13  # operator set and file format that have them
NEAR = 1e-3  # logits that differ by less may change places
BATCH_IMAGES = 128


@dataclass(frozen=True)
class OnnxSize:
    """Bytes of the file, of the stored codes of quantized weights, and (layer, bits, type) of those kept in a wider type."""

    file_bytes: int
    weight_bytes: int
    widened: tuple[tuple[str, int, str], ...]


@dataclass(frozen=True)
class Agreement:
    """ONNX Runtime against torch on the same images.

    `max_difference` of any logit and `disagreements` (images whose first class differs though torch's first two lie further
    apart than 1e-3) are with graph optimisation off. Where inputs are quantized, a difference in the last place moves a code by
    one now and then, and logits by more than rounding: torch in float64 differs from torch in float32 as much. `top1_optimised`
    is a fraction, with ONNX Runtime's usual optimisation, which where inputs are quantized rounds biases too, unless its
    `WeightBiasQuantization` is switched off: of labels met, beside `top1_torch`, or without labels of torch's first
    classes met, and `top1_torch` is None.
    """

    num_images: int
    max_difference: float
    disagreements: int
    top1_optimised: float
    top1_torch: float | None

    def __str__(self) -> str:
        reference_text = "as in torch" if self.top1_torch is None else f"right, {100 * self.top1_torch:.2f} % in torch"
        return (
            f"ONNX Runtime on {self.num_images:,} images: logits within {self.max_difference:.2g} of torch without graph "
            f"optimisation, another first class on {self.disagreements}; with its usual optimisation first classes are "
            f"{100 * self.top1_optimised:.2f} % {reference_text}"
        )


def export_onnx(path: Path, network: Network, layers: Replaced, opset: int = OPSET) -> OnnxSize:
    """Writes a network with layers (by index) replaced, as `Prepared.deployed` gives both: images (batch, C, H, W) -> logits.

    ConfigurationError where packages are missing or the operator set is too old; NetworkError where torch cannot export it.
    """
    ir, _ = _library("onnx_ir"), _library("onnxscript")
    if opset < OPSET:
        raise ConfigurationError(f"ONNX operator set {opset} has no four-bit integers; expected {OPSET} or later")
    chosen = as_layers(layers)
    model = as_module(network, chosen, _marked).cpu()
    exported = torch.onnx.export(
        _program(model, network.example.cpu()),
        (),
        dynamo=True,
        optimize=False,  # only once weights are behind their operator: it would fold what it takes for constants
        verbose=False,
        opset_version=min(opset, NEWEST_EXPORTED),
        input_names=["images"],
        output_names=["logits"],
        custom_translation_table={torch.ops.clado.on_grid.default: _translated(opset)},
    )
    if exported is None:
        raise NetworkError("torch.onnx.export gave no program; expected a network that it takes")
    graph = exported.model.graph
    graph.opset_imports[""] = opset
    if opset >= TWO_BITS:
        exported.model.ir_version = max(exported.model.ir_version, TWO_BITS_IR)
    stored = _put_codes(ir, graph, model, network, chosen, opset)
    exported.optimize()
    read: list[Any] = [value for node in graph if node.op_type == "DequantizeLinear" for value in node.inputs[:1]]
    left = {_content(value): value for value in read if value.const_value is not None}  # equal codes have become one
    codes = {name: _content(value) for name, value in stored.items()}
    if lost := [name for name, content in codes.items() if content not in left]:
        raise NetworkError(f"{', '.join(lost[:8])} lost its codes on the way to ONNX; export it in another format")
    _name_batch(ir, graph)
    import_module("onnx_ir.passes.common").ClearMetadataAndDocStringPass()(exported.model)  # places in this machine's files
    bits = {network.layers[i].name: bits_of(layer.grid.codes) for i, layer in chosen.items() if layer.grid is not None}
    exported.model.producer_name = "clado"
    exported.model.metadata_props["clado.bits"] = json.dumps(bits)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        exported.save(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    dtypes = {name: value.dtype for name, value in stored.items()}
    widened = tuple((name, bits[name], dtype.name.lower()) for name, dtype in dtypes.items() if bits[name] < dtype.bitwidth)
    weight_bytes = sum(int(left[content].const_value.nbytes) for content in set(codes.values()))
    return OnnxSize(path.stat().st_size, weight_bytes, widened)


def compare(path: Path, network: Network, layers: Replaced, images: Tensor, labels: Tensor | None = None) -> Agreement:
    """Runs an exported file in ONNX Runtime on images (N, C, H, W), and torch on the same."""
    runtime = _library("onnxruntime")
    levels = runtime.GraphOptimizationLevel
    exact, usual = (_session(runtime, path, level) for level in (levels.ORT_DISABLE_ALL, levels.ORT_ENABLE_ALL))
    model = as_module(network, layers).cpu()
    largest, differing, right_torch, right_usual = 0.0, 0, 0, 0
    for batch, truth in zip(torch.split(images, BATCH_IMAGES), _split(labels, len(images)), strict=True):
        with torch.inference_mode():
            expected = model(batch)
        found, optimised = (torch.from_numpy(run(batch)) for run in (exact, usual))
        best = expected.topk(2).values
        clear = best[:, 0] - best[:, 1] > NEAR
        first = expected.argmax(1)
        truth = first if truth is None else truth
        largest = max(largest, float((found - expected).abs().max()))
        differing += int((clear & (found.argmax(1) != first)).sum())
        right_torch += int((first == truth).sum())
        right_usual += int((optimised.argmax(1) == truth).sum())
    top1 = None if labels is None else right_torch / len(images)
    return Agreement(len(images), largest, differing, right_usual / len(images), top1)


def _program(model: nn.Module, example: Tensor) -> ExportedProgram:
    """The model as `torch.export` has it, for any number of images."""
    try:
        with torch.no_grad():
            batch = torch.cat([example, example])  # torch.export takes a batch of one for a constant
            return torch.export.export(model, (batch,), dynamic_shapes=({0: Dim("batch", max=2**20)},))
    except Exception as error:  # it raises many kinds; each means that there is no program
        first = next((line.strip(" -") for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise NetworkError(f"torch.export cannot turn the quantized network into ONNX's operators: {first[:300]}") from error


def _split(labels: Tensor | None, count: int) -> Sequence[Tensor | None]:
    return [None] * -(-count // BATCH_IMAGES) if labels is None else torch.split(labels, BATCH_IMAGES)


def _session(runtime: ModuleType, path: Path, level: Any) -> Callable[[Tensor], NDArray[np.float32]]:
    options = runtime.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = session.run(["logits"], {"images": images.contiguous().numpy()})[0]
        return logits

    return run


# -- inputs ----------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("clado::on_grid", mutates_args=())
def _on_grid(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    """Marks a quantized input in an exported program."""
    return ActivationGrid(bits, scale, zero_point).fake_quantize(x)


@_on_grid.register_fake
def _(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    return torch.empty_like(x)


def _marked(x: Tensor, grid: ActivationGrid) -> Tensor:
    marked: Tensor = torch.ops.clado.on_grid(x.float(), grid.scale, grid.zero_point, grid.bits)
    return marked.to(x.dtype)


def _translated(opset: int) -> Callable[..., Any]:
    """What the mark becomes."""
    ir, op = _library("onnx_ir"), _library("onnxscript").opset21

    def on_grid(x: Any, scale: float, zero_point: int, bits: int) -> Any:
        # ONNX Runtime's optimisation takes no four-bit inputs behind a Clip
        codes, dtype = Codes.of(bits, False), _integer_dtype(ir, Codes.of(max(bits, 8), False), opset)
        step = op.Constant(value=ir.tensor(np.float32(scale)))
        zero = op.Constant(value=ir.tensor(np.array(zero_point, dtype.numpy()), dtype=dtype))
        if dtype.bitwidth > bits:  # the type would saturate beyond the grid
            ends = [np.float32((code - zero_point) * scale) for code in (codes.low, codes.high)]
            x = op.Clip(x, *(op.Constant(value=ir.tensor(end)) for end in ends))
        return op.DequantizeLinear(op.QuantizeLinear(x, step, zero), step, zero)

    return on_grid


# -- weights ---------------------------------------------------------------------------------------------------------------


def _put_codes(
    ir: ModuleType, graph: Any, model: nn.Module, network: Network, layers: Mapping[int, QuantizedLayer], opset: int
) -> dict[str, Any]:
    """Puts codes and DequantizeLinear in place of float weights; layer -> its codes."""
    members: dict[str, list[int]] = {}
    for i, place in enumerate(network.places):
        members.setdefault(place.parameter, []).append(i)
    stored: dict[str, Any] = {}
    named = dict(model.named_parameters(remove_duplicate=False))
    for parameter, parts in members.items():
        if not any(i in layers and layers[i].grid is not None for i in parts):
            continue
        nodes, values = [], []
        for i in parts:
            name, layer = network.layers[i].name, layers.get(i, QuantizedLayer(network.weights[i]))
            if layer.grid is None:
                values.append(_initializer(ir, graph, f"{name}.values", layer.weight.detach().float().cpu().numpy()))
                continue
            grid, dtype = layer.grid, _integer_dtype(ir, layer.grid.codes, opset)
            codes = integers(name, layer, grid).cpu().numpy()
            zero_point = grid.zero_point.expand_as(grid.scale).flatten().cpu().numpy()
            if (zero_point != zero_point.round()).any():
                raise NetworkError(f"the grid of {name} has a zero point that is no integer, which ONNX cannot hold")
            one = grid.scale.numel() == 1
            shape = () if one else (-1,)
            inputs = [
                _initializer(ir, graph, f"{name}.codes", codes, dtype),
                _initializer(ir, graph, f"{name}.scale", grid.scale.detach().float().cpu().numpy().reshape(shape)),
                _initializer(ir, graph, f"{name}.zero_point", zero_point.reshape(shape), dtype),
            ]
            axis = [] if one else [ir.AttrInt64("axis", network.layers[i].channel_axis)]
            nodes.append(_node(ir, f"{name}.values", "DequantizeLinear", inputs, axis))
            values.append(nodes[-1].outputs[0])
            stored[name] = inputs[0]
        if len(values) > 1:
            nodes.append(_node(ir, f"{parameter}.whole", "Concat", values, [ir.AttrInt64("axis", 0)]))
        old = [graph.initializers[name] for name in named if named[name] is named[parameter] and name in graph.initializers]
        if old[0].dtype != ir.DataType.FLOAT:
            to = ir.AttrInt64("to", int(old[0].dtype))
            nodes.append(_node(ir, f"{parameter}.cast", "Cast", nodes[-1].outputs, [to]))
        graph.insert_before(graph[0], nodes)
        whole = nodes[-1].outputs[0]
        whole.dtype, whole.shape = old[0].dtype, old[0].shape
        for value in old:
            ir.convenience.replace_all_uses_with(value, whole)
            del graph.initializers[value.name]
    return stored


def _node(ir: ModuleType, result: str, operator: str, inputs: Sequence[Any], attributes: Sequence[Any]) -> Any:
    node = ir.Node("", operator, inputs, attributes=attributes)
    node.outputs[0].name = result
    return node


def _content(value: Any) -> tuple[Any, tuple[int, ...], bytes]:
    """What makes a stored tensor equal to another, whatever their names."""
    return value.dtype, tuple(value.const_value.shape), value.const_value.tobytes()


def _initializer(ir: ModuleType, graph: Any, name: str, array: NDArray[Any], dtype: Any = None) -> Any:
    array = np.array(array, None if dtype is None else dtype.numpy(), order="C")
    tensor = ir.tensor(array, dtype=dtype, name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
    graph.register_initializer(value)
    return value


def _integer_dtype(ir: ModuleType, codes: Codes, opset: int) -> Any:
    """The narrowest integer type that holds the codes."""
    for bits in (2, 4, 8, 16):
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if codes.low < 0 else (0, 2**bits - 1)
        if low <= codes.low and codes.high <= high and (bits > 2 or opset >= TWO_BITS):
            return getattr(ir.DataType, f"{'INT' if codes.low < 0 else 'UINT'}{bits}")
    raise NetworkError(f"codes {codes.low}..{codes.high} do not fit into sixteen bits")


def _name_batch(ir: ModuleType, graph: Any) -> None:
    """Calls the number of images `batch`, as torch.export does not."""
    unnamed = graph.inputs[0].shape[0]
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape(["batch" if length == unnamed else length for length in value.shape])


def _library(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigurationError(
            f"ONNX needs packages that are not installed ({error.name}); install them with: pip install 'clado[onnx]'"
        ) from error
