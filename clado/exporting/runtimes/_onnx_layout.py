"""Rewrites an exported ONNX graph into the forms that ONNX Runtime has kernels for on a CPU.

The file of `clado.exporting.onnx` says what is computed. Here the same is said so that integer
kernels are taken. Each form was found by loading small graphs and reading the optimised ones.

- Batch norm goes into the scales and the bias of the convolution before it. It changes no code.
- A product with quantized inputs reads int8 codes. Narrower codes stay narrow in the file, behind a
  Cast that ONNX Runtime folds when it loads the file.
- A linear layer or 1x1 convolution whose input is float reads its codes as [inputs, outputs]. ONNX
  Runtime then fuses DequantizeLinear and MatMul into `MatMulNBits`.
- Their zero points are made when the file is loaded.
- Other weights whose input is float are decoded once, when the file is loaded.
- An int8 convolution writes int8. Where clado has no grid for its result, one is made of the range
  that calibration images have there. clado has not measured this rounding.
- A tensor that has a grid is on it for each of its readers, such as the addition of a residual block.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clado.exporting._onnx_agreement import library
from clado.exporting._onnx_graph import initializer, node
from clado.grids import ActivationGrid

CONVOLUTIONS = ("Conv", "ConvTranspose")
PRODUCTS = (*CONVOLUTIONS, "MatMul", "Gemm")
CLIPS = ("Relu", "Clip")
PASSES = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")  # they commute with rounding
MOST_BIAS = 2.0**30  # codes of an int32 bias, with room for the products
LEAST_SCALE = 1e-20  # a channel that batch norm switches off would divide by zero
SESSION = "clado.session"
"""Key of the file's metadata: ONNX Runtime's session entries that it is to be opened with, as JSON."""
EXACT_SUMS = (("session.x64quantprecision", "1"),)
"""Without it, sums of two products of 8-bit codes saturate on CPUs that have AVX2 and no VNNI."""
Ranges = Callable[[Path, Sequence[str]], Mapping[str, tuple[float, float]]]
"""(file, names of tensors) -> lowest and highest value of each on the calibration images."""


def lay_out(path: Path, ranges: Ranges) -> None:
    """Rewrites the file that `export_onnx` wrote, in place.

    Args:
        path: The file.
        ranges: Gives the ranges of tensors. It is called once, with the file as it is then.
    """
    ir = library("onnx_ir")
    model = ir.load(path)
    layout = _Layout(ir, model.graph)
    layout.fold_batch_norms()
    layout.share_grids()
    for product in list(layout.products()):
        layout.write_product(product)
    layout.drop_clips()
    model.metadata_props[SESSION] = json.dumps(dict(EXACT_SUMS) if layout.needs_exact_sums() else {})
    if missing := layout.convolutions_without_grid():
        layout.clean()
        ir.save(model, path)
        measured_ranges = ranges(path, [value.name for value in missing])
        for value in missing:
            layout.put_grid(value, ActivationGrid.of_range(*measured_ranges[value.name], 8))
        layout.drop_clips()
    layout.clean()
    ir.save(model, path)


@dataclass(frozen=True)
class _Product:
    """A convolution or matrix product whose weight is stored."""

    node: Any
    """The node that multiplies."""
    parts: tuple[Any, ...]
    """The values that the weight is made of, one after another along its first axis."""
    is_transposed: bool
    """Whether a matrix product reads the weight transposed: [outputs, inputs] is stored."""

    @property
    def decoders(self) -> tuple[Any, ...]:
        """The DequantizeLinear of each part, None for a part in float."""
        return tuple(part.producer() for part in self.parts)


class _Layout:
    """The graph, and the steps that rewrite it."""

    def __init__(self, ir: ModuleType, graph: Any) -> None:
        self.ir, self.graph = ir, graph
        self._tensors: dict[Any, Any] = {}
        self._decoders: dict[Any, Any] = {}
        self._names: set[str] = set()

    # -- batch norm --------------------------------------------------------------------------------------------------------

    def fold_batch_norms(self) -> None:
        """Puts each batch norm that alone reads a convolution into its scales and bias."""
        for norm in [n for n in self.graph if n.op_type == "BatchNormalization"]:
            conv = norm.inputs[0].producer()
            statistics = [_array(value) for value in norm.inputs[1:5]]
            if conv is None or conv.op_type != "Conv" or len(conv.outputs[0].uses()) != 1:
                continue
            if any(array is None for array in statistics):
                continue
            gamma, beta, mean, variance = (array.astype(np.float64) for array in statistics if array is not None)
            epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
            factor = gamma / np.sqrt(variance + epsilon)
            weight = conv.inputs[1]
            scaled = self._scaled(weight, factor)
            bias = _array(conv.inputs[2]) if len(conv.inputs) > 2 and conv.inputs[2] is not None else np.zeros_like(mean)
            if scaled is None or bias is None:
                continue
            shift = (bias.astype(np.float64) - mean) * factor + beta
            stored = self._stored(f"{_layer_name(weight)}.folded_bias", shift.astype(np.float32))
            conv.resize_inputs(3)
            conv.replace_input_with(1, scaled)
            conv.replace_input_with(2, stored)
            self.ir.convenience.replace_all_uses_with(norm.outputs[0], conv.outputs[0])
            self.graph.remove(norm, safe=True)

    def _scaled(self, weight: Any, factor: NDArray[np.float64]) -> Any | None:
        """The weight times a factor for each output channel; None if it cannot be written so."""
        if len(weight.uses()) != 1:
            return None
        decoder, array = weight.producer(), _array(weight)
        if array is not None:
            shape = (-1, *[1] * (array.ndim - 1))
            return self._stored(weight.name, (array * factor.reshape(shape)).astype(np.float32))
        if decoder is None or decoder.op_type != "DequantizeLinear" or _axis(decoder) != 0:
            return None
        codes, scale, zero_point = self._decoded(decoder)
        negative = factor < 0  # a scale is positive: codes change their sign, around the middle of their range
        if negative.any():
            low, high = _code_range(decoder.inputs[0].dtype)
            around = 2 * zero_point if low < 0 and not zero_point.any() else np.full_like(zero_point, low + high)
            flip = negative.reshape(-1, *[1] * (codes.ndim - 1))
            codes = np.where(flip, around.reshape(flip.shape) - codes, codes)
            zero_point = np.where(negative, around - zero_point, zero_point)
        return self._decoder(decoder, codes, np.abs(scale * factor), zero_point, 0).outputs[0]

    # -- grids of inputs ---------------------------------------------------------------------------------------------------

    def share_grids(self) -> None:
        """Gives each tensor one grid, the widest of its readers', and each reader the rounded tensor."""
        values: dict[Any, list[Any]] = {}
        for quantize in [n for n in self.graph if n.op_type == "QuantizeLinear"]:
            values.setdefault(quantize.inputs[0], []).append(quantize)
        for value, quantizers in values.items():
            widest = max(quantizers, key=_span)
            rounded = _dequantize(widest).outputs[0]
            for other in quantizers:
                if other is not widest:
                    self.ir.convenience.replace_all_uses_with(_dequantize(other).outputs[0], rounded)
            if self._is_unrounded_product(value) and not value.is_graph_output():
                for reader, index in value.uses():
                    if reader.op_type != "QuantizeLinear":
                        reader.replace_input_with(index, rounded)
        self.clean()

    def drop_clips(self) -> None:
        """Removes Relu and Clip where the grid behind them ends no later, and takes a grid before what passes it on."""
        changed = True
        while changed:
            changed = False
            for quantize in [n for n in self.graph if n.op_type == "QuantizeLinear"]:
                source = quantize.inputs[0].producer()
                if source is None or len(quantize.inputs[0].uses()) != 1:
                    continue
                if source.op_type in CLIPS and self._is_within(quantize, source):
                    quantize.replace_input_with(0, source.inputs[0])
                    changed = True
                elif source.op_type in PASSES and self._is_unrounded_product(source.inputs[0]):
                    self._round(source.inputs[0], *quantize.inputs[1:3])
                    changed = True
            self.clean()

    def _is_within(self, quantize: Any, clip: Any) -> bool:
        """Whether a grid ends within the bounds of a Relu or Clip, so that rounding clips as well."""
        low, high, scale = _grid(quantize)
        bounds = [-np.inf, np.inf]
        if clip.op_type == "Relu":
            bounds[0] = 0.0
        for position in (1, 2):
            if clip.op_type == "Clip" and len(clip.inputs) > position and clip.inputs[position] is not None:
                array = _array(clip.inputs[position])
                if array is None:
                    return False
                bounds[position - 1] = float(array)
        tolerance = scale / 1000  # of how a scale is rounded
        return bool(bounds[0] <= low + tolerance and high - tolerance <= bounds[1])

    def _is_unrounded_product(self, value: Any) -> bool:
        """Whether a value comes from a convolution, perhaps by an addition, and is not on a grid itself."""
        if _is_dequantized(value):
            return False
        source = value.producer()
        while source is not None and source.op_type in (*CLIPS, *PASSES, "Add"):
            source = source.inputs[0].producer()
        return source is not None and (source.op_type == "Conv" or _is_dequantized(source.outputs[0]))

    def put_grid(self, value: Any, grid: ActivationGrid) -> None:
        """A grid in front of every reader of a value."""
        scale = self._stored(f"{value.name}.grid_scale", np.array(grid.scale, np.float32))
        zero = self._stored(f"{value.name}.grid_zero_point", np.array(grid.zero_point, np.uint8))
        self._round(value, scale, zero)

    def _round(self, value: Any, scale: Any, zero_point: Any) -> None:
        uses = list(value.uses())
        quantize = self._node(f"{value.name}.on_codes", "QuantizeLinear", [value, scale, zero_point])
        dequantize = self._node(f"{value.name}.rounded", "DequantizeLinear", [quantize.outputs[0], scale, zero_point])
        dequantize.outputs[0].dtype, dequantize.outputs[0].shape = value.dtype, value.shape
        self.graph.insert_after(value.producer(), [quantize, dequantize])
        for reader, index in uses:
            reader.replace_input_with(index, dequantize.outputs[0])

    def needs_exact_sums(self) -> bool:
        """Whether a product with a quantized input has codes of eight bits. Sums of narrower ones do not saturate.

        ONNX Runtime 1.32 does not load a file with the option if two products read one weight.
        """
        decoders = [p.inputs[1].producer() for p in self.graph if p.op_type in PRODUCTS and _is_int8(p)]
        is_shared = any(len(decoder.outputs[0].uses()) > 1 for decoder in decoders)
        return not is_shared and any(_array(decoder.inputs[0]) is not None for decoder in decoders)

    def convolutions_without_grid(self) -> list[Any]:
        """The results of int8 convolutions, behind their Relu or Clip, that nothing rounds."""
        missing = []
        for conv in self.graph:
            if conv.op_type != "Conv" or not _is_int8(conv):
                continue
            value = conv.outputs[0]
            while len(value.uses()) == 1 and value.uses()[0][0].op_type in CLIPS and not value.is_graph_output():
                value = value.uses()[0][0].outputs[0]
            is_rounded = len(value.uses()) == 1 and value.uses()[0][0].op_type == "QuantizeLinear"
            if not is_rounded and not value.is_graph_output():
                missing.append(value)
        return missing

    # -- weights -----------------------------------------------------------------------------------------------------------

    def products(self) -> Iterator[_Product]:
        """Convolutions and matrix products with a stored weight."""
        for product in self.graph:
            if product.op_type not in PRODUCTS:
                continue
            weight, is_transposed = product.inputs[1], product.op_type in CONVOLUTIONS
            source = weight.producer()
            if source is not None and source.op_type == "Transpose" and list(source.attributes["perm"].as_ints()) == [1, 0]:
                weight, is_transposed = source.inputs[0], True
                source = weight.producer()
            if product.op_type == "Gemm":
                flags = {key: int(product.attributes[key].as_int()) for key in ("transA", "transB") if key in product.attributes}
                if flags.get("transA") or any(
                    key in product.attributes and product.attributes[key].as_float() != 1 for key in ("alpha", "beta")
                ):
                    continue
                is_transposed ^= bool(flags.get("transB"))
            parts = [weight]
            if source is not None and source.op_type == "Concat" and source.attributes["axis"].as_int() == 0:
                parts = list(source.inputs)
            if all(_array(part) is not None or _is_decoder(part.producer()) for part in parts):
                yield _Product(product, tuple(parts), is_transposed)

    def write_product(self, product: _Product) -> None:
        """Writes a product so that its kernel is taken, and calls the node by its layer."""
        is_static = _is_dequantized(product.node.inputs[0])
        names = [_layer_name(part) for part in product.parts]
        if product.node.op_type in CONVOLUTIONS:
            self._call(product.node, names[0])
            decoder = product.decoders[0]
            if decoder is None or len(names) > 1:
                return
            is_plain = product.node.op_type == "Conv"
            if is_plain and is_static and _fits_int8(decoder):
                self._write_int8_convolution(product.node, decoder)
            elif is_plain and not is_static and _is_pointwise(product.node) and _bits(decoder) <= 8:
                self._write_pointwise(product.node, decoder)
            elif _axis(decoder) is not None:
                product.node.replace_input_with(1, self._decoded_at_load(decoder))
            return
        if not product.is_transposed or all(decoder is None for decoder in product.decoders):
            if len(names) == 1:
                product.node.name = self._unused(names[0])
            return
        self._write_matrix_product(product, names, is_static)

    def _call(self, conv: Any, name: str) -> None:
        """Calls a convolution and its results by its layer: ONNX Runtime's fused nodes keep one of these names."""
        conv.name = self._unused(name)
        value = conv.outputs[0]
        while not value.is_graph_output():
            value.name = self._unused(f"{name}.product" if value is conv.outputs[0] else f"{name}.clipped")
            if len(value.uses()) != 1 or value.uses()[0][0].op_type not in CLIPS:
                break
            value = value.uses()[0][0].outputs[0]

    def _write_int8_convolution(self, conv: Any, decoder: Any) -> None:
        """Codes behind a Cast to int8. The scales are large enough for the bias to fit 32 bits."""
        codes, scale, zero_point = self._decoded(decoder)
        bias = _array(conv.inputs[2]) if len(conv.inputs) > 2 and conv.inputs[2] is not None else None
        if bias is not None:
            input_scale = float(_array(conv.inputs[0].producer().inputs[1]))
            least = np.abs(bias.astype(np.float64)) / (input_scale * MOST_BIAS)
            small = scale < (least := np.maximum(least, LEAST_SCALE))
            ratio = np.where(small, scale / np.where(small, least, 1), 1.0).reshape(-1, *[1] * (codes.ndim - 1))
            codes, scale = np.rint(codes * ratio), np.where(small, least, scale)
        conv.replace_input_with(1, self._decoder(decoder, codes, scale, zero_point, 0, as_int8=True).outputs[0])

    def _write_pointwise(self, conv: Any, decoder: Any) -> None:
        """A 1x1 convolution as a matrix product over channels, which are moved last and back."""
        ir, name, (x, *_) = self.ir, conv.name, conv.inputs
        rank = len(decoder.inputs[0].shape)
        last, back = [0, *range(2, rank), 1], [0, rank - 1, *range(1, rank - 1)]
        nodes = []
        strides = list(conv.attributes["strides"].as_ints()) if "strides" in conv.attributes else [1] * (rank - 2)
        if any(stride != 1 for stride in strides):
            axes = list(range(2, rank))
            numbers = {"starts": [0] * len(axes), "ends": [2**31 - 1] * len(axes), "axes": axes, "steps": strides}
            slice_inputs = [self._stored(f"{name}.{key}", np.array(v, np.int64)) for key, v in numbers.items()]
            nodes.append(self._node(f"{name}.strided", "Slice", [x, *slice_inputs]))
            x = nodes[-1].outputs[0]
        nodes.append(self._node(f"{name}.channels_last", "Transpose", [x], [ir.AttrInt64s("perm", last)]))
        codes, scale, zero_point = self._decoded(decoder)
        matrix = codes.reshape(codes.shape[:2]).T
        weight = self._decoder(decoder, matrix, scale, zero_point, 1).outputs[0]
        nodes.append(self._node(f"{name}.product", "MatMul", [nodes[-1].outputs[0], weight]))
        nodes[-1].name = self._unused(name)
        if len(conv.inputs) > 2 and conv.inputs[2] is not None:
            nodes.append(self._node(f"{name}.with_bias", "Add", [nodes[-1].outputs[0], conv.inputs[2]]))
        nodes.append(self._node(f"{name}.channels_first", "Transpose", [nodes[-1].outputs[0]], [ir.AttrInt64s("perm", back)]))
        result = nodes[-1].outputs[0]
        result.dtype, result.shape = conv.outputs[0].dtype, conv.outputs[0].shape
        self.graph.insert_before(conv, nodes)
        self._replace(conv, result)

    def _write_matrix_product(self, product: _Product, names: Sequence[str], is_static: bool) -> None:
        """One product for each part of the weight, with codes as [inputs, outputs]."""
        ir, original = self.ir, product.node
        x = original.inputs[0]
        bias = original.inputs[2] if original.op_type == "Gemm" and len(original.inputs) > 2 else None
        read = [self._matrix(part, decoder, is_static) for part, decoder in zip(product.parts, product.decoders, strict=True)]
        if original.op_type == "Gemm" and len(read) == 1:
            weight, scale = read[0]
            if scale is not None and bias is not None and _array(bias) is not None:
                bias = self._int32_bias(names[0], _array(bias), scale, float(_array(x.producer().inputs[1])))
            nodes = [self._node(f"{names[0]}.product", "Gemm", [x, weight, *([] if bias is None else [bias])])]
            bias = None
        else:
            nodes = [self._node(f"{name}.product", "MatMul", [x, weight]) for name, (weight, _) in zip(names, read, strict=True)]
        for made, name in zip(nodes, names, strict=True):
            made.name = self._unused(name)
        if len(nodes) > 1:
            nodes.append(self._node(f"{names[0]}.whole", "Concat", [n.outputs[0] for n in nodes], [ir.AttrInt64("axis", -1)]))
        if bias is not None:
            nodes.append(self._node(f"{names[0]}.with_bias", "Add", [nodes[-1].outputs[0], bias]))
        result = nodes[-1].outputs[0]
        result.dtype, result.shape = original.outputs[0].dtype, original.outputs[0].shape
        self.graph.insert_before(original, nodes)
        self._replace(original, result)

    def _matrix(self, part: Any, decoder: Any, is_static: bool) -> tuple[Any, NDArray[np.float64] | None]:
        """(a part of a weight as [inputs, outputs], its scales where the kernel reads int8 codes)."""
        if decoder is None:
            return self._stored(f"{_layer_name(part)}.transposed", np.ascontiguousarray(_array(part).T)), None
        codes, scale, zero_point = self._decoded(decoder)
        as_int8 = is_static and _fits_int8(decoder)
        weight = self._decoder(decoder, codes.T, scale, zero_point, 1, as_int8=as_int8).outputs[0]
        return weight, scale if as_int8 else None

    def _int32_bias(self, name: str, bias: Any, scale: NDArray[np.float64], input_scale: float) -> Any:
        """A bias on the grid of the product's sums, which the integer kernel adds."""
        step = scale * input_scale
        codes = np.clip(np.rint(bias / step), -(2**31) + 1, 2**31 - 1)
        inputs = [
            self._stored(f"{name}.bias_codes", codes.astype(np.int32)),
            self._stored(f"{name}.bias_scale", step.astype(np.float32)),
            self._stored(f"{name}.bias_zero_point", np.zeros(len(codes), np.int32)),
        ]
        decoder = self._node(f"{name}.bias", "DequantizeLinear", inputs, [self.ir.AttrInt64("axis", 0)])
        self.graph.insert_before(self.graph[0], [decoder])
        return decoder.outputs[0]

    def _decoded_at_load(self, decoder: Any) -> Any:
        """A weight of Cast and Mul, which ONNX Runtime computes once. It would decode at each call otherwise."""
        ir, name, codes = self.ir, _layer_name(decoder.outputs[0]), decoder.inputs[0]
        _, scale, zeros = self._decoded(decoder)
        shape = [1] * len(codes.shape)
        shape[_axis(decoder) or 0] = -1
        to_float = [ir.AttrInt64("to", int(ir.DataType.FLOAT))]
        nodes = [self._node(f"{name}.floats", "Cast", [codes], to_float)]
        if zeros.any():
            shift = self._stored(f"{name}.shift", zeros.astype(np.float32).reshape(shape))
            nodes.append(self._node(f"{name}.shifted", "Sub", [nodes[-1].outputs[0], shift]))
        step = self._stored(f"{name}.step", scale.astype(np.float32).reshape(shape))
        nodes.append(self._node(f"{name}.decoded", "Mul", [nodes[-1].outputs[0], step]))
        self.graph.insert_before(self.graph[0], nodes)
        return nodes[-1].outputs[0]

    def _decoded(self, decoder: Any) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """(codes, scale, zero point) of a weight, the last two one number for each output channel."""
        codes = _array(decoder.inputs[0]).astype(np.float64)
        axis = _axis(decoder) or 0
        numbers = (_array(decoder.inputs[1]), _zero_points(decoder))
        scale, zero_point = (np.broadcast_to(array.astype(np.float64), (codes.shape[axis],)) for array in numbers)
        return codes, scale, zero_point

    def _decoder(
        self,
        like: Any,
        codes: NDArray[np.float64],
        scale: NDArray[np.float64],
        zero_point: NDArray[np.float64],
        axis: int,
        as_int8: bool = False,
    ) -> Any:
        """A DequantizeLinear of other codes, in the same data type in the file."""
        ir, name, dtype = self.ir, _layer_name(like.outputs[0]), like.inputs[0].dtype
        key = (name, axis, as_int8, codes.tobytes(), scale.tobytes())
        if key in self._decoders:  # a layer that is used twice
            return self._decoders[key]
        codes_read = self._stored(f"{name}.codes", codes, dtype)
        nodes = []
        if as_int8 and dtype != ir.DataType.INT8:
            nodes.append(self._node(f"{name}.int8", "Cast", [codes_read], [ir.AttrInt64("to", int(ir.DataType.INT8))]))
            codes_read = nodes[-1].outputs[0]
        inputs = [codes_read, self._stored(f"{name}.scale", scale.astype(np.float32))]
        if as_int8:
            # Kernels are found only where zero points are given, and ONNX Runtime fails where layers share them. So each layer's
            # are made of its own scales when the file is loaded, and take no bytes.
            nodes.append(self._node(f"{name}.no_scale", "Sub", [inputs[1], inputs[1]]))
            nodes.append(self._node(f"{name}.zeros", "Cast", nodes[-1].outputs, [ir.AttrInt64("to", int(ir.DataType.INT8))]))
            nodes[-1].outputs[0].dtype = ir.DataType.INT8
            inputs.append(nodes[-1].outputs[0])
        elif zero_point.any():
            inputs.append(self._stored(f"{name}.zero_point", zero_point, dtype))
        nodes.append(self._node(f"{name}.values", "DequantizeLinear", inputs, [ir.AttrInt64("axis", axis)]))
        nodes[-1].outputs[0].dtype = ir.DataType.FLOAT
        nodes[-1].outputs[0].shape = ir.Shape(codes.shape)
        self.graph.insert_before(self.graph[0], nodes)
        self._decoders[key] = nodes[-1]
        return nodes[-1]

    # -- the graph ---------------------------------------------------------------------------------------------------------

    def _stored(self, name: str, array: Any, dtype: Any = None) -> Any:
        """A stored tensor. Equal ones are stored once."""
        array = np.asarray(array) if dtype is None else np.asarray(array).astype(dtype.numpy())
        key = (array.dtype.str if dtype is None else dtype.name, array.shape, array.tobytes())
        if key not in self._tensors or self._tensors[key].name not in self.graph.initializers:
            while name in self.graph.initializers:
                name += "'"
            self._tensors[key] = initializer(self.ir, self.graph, name, array, dtype)
        return self._tensors[key]

    def _node(self, result: str, operator: str, inputs: Sequence[Any], attributes: Sequence[Any] = ()) -> Any:
        return node(self.ir, self._unused(result), operator, inputs, attributes)

    def _unused(self, name: str) -> str:
        """The name, longer where a layer that is used twice has it already."""
        while name in self._names:
            name += "'"
        self._names.add(name)
        return name

    def _replace(self, old: Any, result: Any) -> None:
        output = old.outputs[0]
        if output.is_graph_output():
            result.name, output.name = output.name, f"{output.name}.replaced"
            for position, value in enumerate(self.graph.outputs):
                if value is output:
                    self.graph.outputs[position] = result
        self.ir.convenience.replace_all_uses_with(output, result)
        self.graph.remove(old, safe=True)

    def clean(self) -> None:
        """Sorts the graph, and removes nodes and stored tensors that nothing reads."""
        self.graph.sort()
        for unread in reversed(list(self.graph)):
            if not any(value.uses() or value.is_graph_output() for value in unread.outputs):
                self.graph.remove(unread, safe=True)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]


def _array(value: Any) -> Any:
    """Values of a stored tensor, None for any other value."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    source = value.producer()
    if source is not None and source.op_type == "Constant" and "value" in source.attributes:
        return source.attributes["value"].as_tensor().numpy()
    return None


def _layer_name(value: Any) -> str:
    """Name of the layer whose weight a value is."""
    return str(value.name).rstrip("'").removesuffix(".values")


def _is_decoder(producer: Any) -> bool:
    return producer is not None and producer.op_type == "DequantizeLinear" and _array(producer.inputs[0]) is not None


def _axis(decoder: Any) -> int | None:
    """The axis of a decoder's scales, None without codes."""
    if not _is_decoder(decoder):
        return None
    axis = int(decoder.attributes["axis"].as_int()) if "axis" in decoder.attributes else 0
    return axis % len(decoder.inputs[0].shape)


def _bits(decoder: Any) -> int:
    return int(decoder.inputs[0].dtype.bitwidth)


def _code_range(dtype: Any) -> tuple[int, int]:
    bits = int(dtype.bitwidth)
    return (0, 2**bits - 1) if dtype.name.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _fits_int8(decoder: Any) -> bool:
    """Whether codes are signed, of at most eight bits, and around zero."""
    return _bits(decoder) <= 8 and not decoder.inputs[0].dtype.name.startswith("U") and not np.any(_zero_points(decoder))


def _zero_points(decoder: Any) -> Any:
    """A decoder's zero points, 0 where it has none."""
    return _array(decoder.inputs[2]) if len(decoder.inputs) > 2 else np.array(0)


def _is_int8(conv: Any) -> bool:
    """Whether a product has a quantized input and int8 codes."""
    decoder = conv.inputs[1].producer()
    return (
        _is_dequantized(conv.inputs[0])
        and decoder is not None
        and decoder.op_type == "DequantizeLinear"
        and (len(decoder.inputs) > 2 and decoder.inputs[2].dtype.name == "INT8")
    )


def _is_pointwise(conv: Any) -> bool:
    """Whether a convolution is a matrix product over channels."""
    shape = list(conv.inputs[1].shape)
    attributes = conv.attributes
    groups = int(attributes["group"].as_int()) if "group" in attributes else 1
    pads = list(attributes["pads"].as_ints()) if "pads" in attributes else [0]
    return groups == 1 and all(length == 1 for length in shape[2:]) and not any(pads)


def _is_dequantized(value: Any) -> bool:
    """Whether a value is an input on an eight-bit grid."""
    source = value.producer()
    if source is None or source.op_type != "DequantizeLinear":
        return False
    quantize = source.inputs[0].producer()
    return quantize is not None and quantize.op_type == "QuantizeLinear" and quantize.inputs[2].dtype.name in ("UINT8", "INT8")


def _dequantize(quantize: Any) -> Any:
    return quantize.outputs[0].uses()[0][0]


def _grid(quantize: Any) -> tuple[float, float, float]:
    """(lowest value, highest value, scale) of a quantizer's grid."""
    scale, zero_point = float(_array(quantize.inputs[1])), float(_array(quantize.inputs[2]))
    low, high = _code_range(quantize.inputs[2].dtype)
    return (low - zero_point) * scale, (high - zero_point) * scale, scale


def _span(quantize: Any) -> float:
    low, high, _ = _grid(quantize)
    return high - low
