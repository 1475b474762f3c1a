"""Rewrites an exported ONNX graph into the forms that ONNX Runtime has kernels for on a CPU.

The file of `clado.exporting.onnx` has every operator as it was measured. This module rewrites it so
that integer kernels are used. Each form was found by loading small graphs and reading the
optimised ones.

- Batch norm is folded into the scales and the bias of the convolution before it. No code changes.
- A product with quantized inputs reads int8 codes. Narrower codes stay narrow in the file. A Cast
  follows them, and ONNX Runtime folds it when it loads the file.
- A linear layer or 1x1 convolution whose input is float reads its codes as [inputs, outputs]. ONNX
  Runtime then fuses DequantizeLinear and MatMul into `MatMulNBits`.
- The zero points of these codes are computed when the file is loaded.
- Other weights whose input is float are decoded once, when the file is loaded.
- ONNX Runtime would quantize a float layer between int8 layers on its own. If some layers are in
  float, its optimiser `WeightBiasQuantization` is switched off, and biases are written as int32.
- An int8 convolution writes int8. If clado has no grid for its result, the grid covers the range
  that the result has on calibration images. clado's measurements do not include this rounding.
- If a tensor has a grid, all its readers read the rounded values. The addition of a residual block
  is such a reader.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clado.exporting._onnx_agreement import library
from clado.exporting.runtimes._onnx_editing import (
    GraphEditor,
    array_of,
    axis_of,
    code_range,
    dequantize_of,
    fits_int8,
    grid_of,
    is_decoder,
    is_dequantized,
    is_int8,
    is_pointwise,
    layer_name,
    span_of,
    stored_bits,
)
from clado.grids import ActivationGrid

CONVOLUTIONS = ("Conv", "ConvTranspose")
PRODUCTS = (*CONVOLUTIONS, "MatMul", "Gemm")
CLIPS = ("Relu", "Clip")
PASSES = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")  # they commute with rounding
MOST_BIAS = 2.0**30  # codes of an int32 bias, with room for the products
LEAST_SCALE = 1e-20  # without it, a channel that batch norm sets to zero would divide by zero
SESSION = "clado.session"
"""Key in the file's metadata. Its value is the session entries for opening the file in ONNX Runtime, as JSON."""
EXACT_SUMS = (("session.x64quantprecision", "1"),)
"""Without it, sums of two products of 8-bit codes saturate on CPUs that have AVX2 and no VNNI."""
FLOAT_STAYS = (("optimization.disable_specified_optimizers", "WeightBiasQuantization;QDQPropagationTransformer"),)
"""Without the first, a layer in float between two int8 layers becomes an int8 layer when the file is loaded.

Without the second, rounding is moved before the pooling that follows a layer in float. Its int8 kernel is slow there: ResNet-18
with its first and last layer in float took twice the time.
"""
Ranges = Callable[[Path, Sequence[str]], Mapping[str, tuple[float, float]]]
"""(file, names of tensors) -> lowest and highest value of each on the calibration images."""


def lay_out(path: Path, ranges: Ranges) -> None:
    """Rewrites the file that `export_onnx` wrote, in place.

    Args:
        path: The file.
        ranges: Gives the ranges of tensors. It is called once, with the partly rewritten file.
    """
    ir = library("onnx_ir")
    model = ir.load(path)
    layout = _Layout(ir, model.graph)
    layout.fold_batch_norms()
    layout.share_grids()
    for product in list(layout.products()):
        layout.write_product(product)
    layout.drop_clips()
    entries = dict(EXACT_SUMS) if layout.needs_exact_sums() else {}
    if layout.mixes_float():
        layout.write_int32_biases()
        entries |= dict(FLOAT_STAYS)
    model.metadata_props[SESSION] = json.dumps(entries)
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
    """The parts of the weight, one after another along its first axis."""
    is_transposed: bool
    """Whether a matrix product reads the weight transposed: [outputs, inputs] is stored."""

    @property
    def decoders(self) -> tuple[Any, ...]:
        """The DequantizeLinear of each part, None for a part in float."""
        return tuple(part.producer() for part in self.parts)


class _Layout(GraphEditor):
    """The steps that rewrite a graph."""

    # -- batch norm --------------------------------------------------------------------------------------------------------

    def fold_batch_norms(self) -> None:
        """Folds each batch norm into the convolution before it, if nothing else reads the convolution's result."""
        for norm in [n for n in self.graph if n.op_type == "BatchNormalization"]:
            conv = norm.inputs[0].producer()
            statistics = [array_of(value) for value in norm.inputs[1:5]]
            if conv is None or conv.op_type != "Conv" or len(conv.outputs[0].uses()) != 1:
                continue
            if any(array is None for array in statistics):
                continue
            gamma, beta, mean, variance = (array.astype(np.float64) for array in statistics if array is not None)
            epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
            factor = gamma / np.sqrt(variance + epsilon)
            weight = conv.inputs[1]
            scaled = self._scaled(weight, factor)
            bias = array_of(conv.inputs[2]) if len(conv.inputs) > 2 and conv.inputs[2] is not None else np.zeros_like(mean)
            if scaled is None or bias is None:
                continue
            shift = (bias.astype(np.float64) - mean) * factor + beta
            stored = self.stored(f"{layer_name(weight)}.folded_bias", shift.astype(np.float32))
            conv.resize_inputs(3)
            conv.replace_input_with(1, scaled)
            conv.replace_input_with(2, stored)
            self.ir.convenience.replace_all_uses_with(norm.outputs[0], conv.outputs[0])
            self.graph.remove(norm, safe=True)

    def _scaled(self, weight: Any, factor: NDArray[np.float64]) -> Any | None:
        """The weight times a factor for each output channel; None if it cannot be written so."""
        if len(weight.uses()) != 1:
            return None
        decoder, array = weight.producer(), array_of(weight)
        if array is not None:
            shape = (-1, *[1] * (array.ndim - 1))
            return self.stored(weight.name, (array * factor.reshape(shape)).astype(np.float32))
        if decoder is None or decoder.op_type != "DequantizeLinear" or axis_of(decoder) != 0:
            return None
        codes, scale, zero_point = self.decoded(decoder)
        negative = factor < 0  # scales must be positive, so the codes change their sign, around the middle of their range
        if negative.any():
            low, high = code_range(decoder.inputs[0].dtype)
            around = 2 * zero_point if low < 0 and not zero_point.any() else np.full_like(zero_point, low + high)
            flip = negative.reshape(-1, *[1] * (codes.ndim - 1))
            codes = np.where(flip, around.reshape(flip.shape) - codes, codes)
            zero_point = np.where(negative, around - zero_point, zero_point)
        return self.decoder(decoder, codes, np.abs(scale * factor), zero_point, 0).outputs[0]

    # -- grids of inputs ---------------------------------------------------------------------------------------------------

    def share_grids(self) -> None:
        """Gives each tensor the widest grid of its readers. Every reader then reads the rounded tensor."""
        values: dict[Any, list[Any]] = {}
        for quantize in [n for n in self.graph if n.op_type == "QuantizeLinear"]:
            values.setdefault(quantize.inputs[0], []).append(quantize)
        for value, quantizers in values.items():
            widest = max(quantizers, key=span_of)
            rounded = dequantize_of(widest).outputs[0]
            for other in quantizers:
                if other is not widest:
                    self.ir.convenience.replace_all_uses_with(dequantize_of(other).outputs[0], rounded)
            if self._is_unrounded_product(value) and not value.is_graph_output():
                for reader, index in value.uses():
                    if reader.op_type != "QuantizeLinear":
                        reader.replace_input_with(index, rounded)
        self.clean()

    def drop_clips(self) -> None:
        """Removes a Relu or Clip if the grid after it ends within its bounds. Moves grids before the operators `PASSES`.

        A grid stays behind them if a convolution in float comes before them: see `FLOAT_STAYS`.
        """
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
                elif source.op_type in PASSES and self._is_unrounded_product(source.inputs[0], among_int8=True):
                    self._round(source.inputs[0], *quantize.inputs[1:3])
                    changed = True
            self.clean()

    def _is_within(self, quantize: Any, clip: Any) -> bool:
        """Whether a grid ends within the bounds of a Relu or Clip. Then rounding also clips."""
        low, high, scale = grid_of(quantize)
        bounds = [-np.inf, np.inf]
        if clip.op_type == "Relu":
            bounds[0] = 0.0
        for position in (1, 2):
            if clip.op_type == "Clip" and len(clip.inputs) > position and clip.inputs[position] is not None:
                array = array_of(clip.inputs[position])
                if array is None:
                    return False
                bounds[position - 1] = float(array)
        tolerance = scale / 1000  # because scales are rounded
        return bool(bounds[0] <= low + tolerance and high - tolerance <= bounds[1])

    def _is_unrounded_product(self, value: Any, among_int8: bool = False) -> bool:
        """Whether a value comes from a convolution, perhaps by an addition, and is not on a grid itself.

        With `among_int8`, a convolution in float does not count.
        """
        if is_dequantized(value):
            return False
        source = value.producer()
        while source is not None and source.op_type in (*CLIPS, *PASSES, "Add"):
            source = source.inputs[0].producer()
        if source is not None and source.op_type == "Conv":
            return is_int8(source) or not among_int8
        return source is not None and is_dequantized(source.outputs[0])

    def put_grid(self, value: Any, grid: ActivationGrid) -> None:
        """Puts a value on a grid, for all its readers."""
        scale = self.stored(f"{value.name}.grid_scale", np.array(grid.scale, np.float32))
        zero = self.stored(f"{value.name}.grid_zero_point", np.array(grid.zero_point, np.uint8))
        self._round(value, scale, zero)

    def _round(self, value: Any, scale: Any, zero_point: Any) -> None:
        uses = list(value.uses())
        quantize = self.node(f"{value.name}.on_codes", "QuantizeLinear", [value, scale, zero_point])
        dequantize = self.node(f"{value.name}.rounded", "DequantizeLinear", [quantize.outputs[0], scale, zero_point])
        dequantize.outputs[0].dtype, dequantize.outputs[0].shape = value.dtype, value.shape
        self.graph.insert_after(value.producer(), [quantize, dequantize])
        for reader, index in uses:
            reader.replace_input_with(index, dequantize.outputs[0])

    def needs_exact_sums(self) -> bool:
        """Whether a product with a quantized input has codes of eight bits. Sums of narrower ones do not saturate.

        ONNX Runtime 1.32 does not load a file with the option if two products read one weight.
        """
        decoders = [p.inputs[1].producer() for p in self.graph if p.op_type in PRODUCTS and is_int8(p)]
        is_shared = any(len(decoder.outputs[0].uses()) > 1 for decoder in decoders)
        return not is_shared and any(array_of(decoder.inputs[0]) is not None for decoder in decoders)

    def mixes_float(self) -> bool:
        """Whether some products have a stored float weight, and values of the graph are on grids."""
        in_float = any(n.op_type in PRODUCTS and array_of(n.inputs[1]) is not None for n in self.graph)
        return in_float and any(n.op_type == "QuantizeLinear" for n in self.graph)

    def write_int32_biases(self) -> None:
        """Puts the float bias of each int8 convolution on the grid of its sums, as ONNX Runtime would."""
        for conv in [n for n in self.graph if n.op_type == "Conv" and is_int8(n)]:
            bias = array_of(conv.inputs[2]) if len(conv.inputs) > 2 else None
            if bias is not None:
                scale = np.broadcast_to(array_of(conv.inputs[1].producer().inputs[1]).astype(np.float64), bias.shape)
                input_scale = float(array_of(conv.inputs[0].producer().inputs[1]))
                conv.replace_input_with(2, self._int32_bias(conv.name, bias, scale, input_scale, with_zeros=False))

    def convolutions_without_grid(self) -> list[Any]:
        """The results of int8 convolutions that are not rounded, after their Relu or Clip."""
        missing = []
        for conv in self.graph:
            if conv.op_type != "Conv" or not is_int8(conv):
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
            if all(array_of(part) is not None or is_decoder(part.producer()) for part in parts):
                yield _Product(product, tuple(parts), is_transposed)

    def write_product(self, product: _Product) -> None:
        """Writes a product so that its kernel is used, and names the node after its layer."""
        is_static = is_dequantized(product.node.inputs[0])
        names = [layer_name(part) for part in product.parts]
        if product.node.op_type in CONVOLUTIONS:
            self._call(product.node, names[0])
            decoder = product.decoders[0]
            if decoder is None or len(names) > 1:
                return
            is_plain = product.node.op_type == "Conv"
            if is_plain and is_static and fits_int8(decoder):
                self._write_int8_convolution(product.node, decoder)
            elif is_plain and not is_static and is_pointwise(product.node) and stored_bits(decoder) <= 8:
                self._write_pointwise(product.node, decoder)
            elif axis_of(decoder) is not None:
                product.node.replace_input_with(1, self.decoded_at_load(decoder))
            return
        if not product.is_transposed or all(decoder is None for decoder in product.decoders):
            if len(names) == 1:
                product.node.name = self.unused(names[0])
            return
        self._write_matrix_product(product, names, is_static)

    def _call(self, conv: Any, name: str) -> None:
        """Names a convolution and its results after its layer. ONNX Runtime's fused nodes keep one of these names."""
        conv.name = self.unused(name)
        value = conv.outputs[0]
        while not value.is_graph_output():
            value.name = self.unused(f"{name}.product" if value is conv.outputs[0] else f"{name}.clipped")
            if len(value.uses()) != 1 or value.uses()[0][0].op_type not in CLIPS:
                break
            value = value.uses()[0][0].outputs[0]

    def _write_int8_convolution(self, conv: Any, decoder: Any) -> None:
        """Writes the codes and a Cast to int8. The scales are large enough for the bias to fit 32 bits."""
        codes, scale, zero_point = self.decoded(decoder)
        bias = array_of(conv.inputs[2]) if len(conv.inputs) > 2 and conv.inputs[2] is not None else None
        if bias is not None:
            input_scale = float(array_of(conv.inputs[0].producer().inputs[1]))
            least = np.abs(bias.astype(np.float64)) / (input_scale * MOST_BIAS)
            small = scale < (least := np.maximum(least, LEAST_SCALE))
            ratio = np.where(small, scale / np.where(small, least, 1), 1.0).reshape(-1, *[1] * (codes.ndim - 1))
            codes, scale = np.rint(codes * ratio), np.where(small, least, scale)
        conv.replace_input_with(1, self.decoder(decoder, codes, scale, zero_point, 0, as_int8=True).outputs[0])

    def _write_pointwise(self, conv: Any, decoder: Any) -> None:
        """Writes a 1x1 convolution as a matrix product over channels. They are moved to the last axis and back."""
        ir, name, (x, *_) = self.ir, conv.name, conv.inputs
        rank = len(decoder.inputs[0].shape)
        last, back = [0, *range(2, rank), 1], [0, rank - 1, *range(1, rank - 1)]
        nodes = []
        strides = list(conv.attributes["strides"].as_ints()) if "strides" in conv.attributes else [1] * (rank - 2)
        if any(stride != 1 for stride in strides):
            axes = list(range(2, rank))
            numbers = {"starts": [0] * len(axes), "ends": [2**31 - 1] * len(axes), "axes": axes, "steps": strides}
            slice_inputs = [self.stored(f"{name}.{key}", np.array(v, np.int64)) for key, v in numbers.items()]
            nodes.append(self.node(f"{name}.strided", "Slice", [x, *slice_inputs]))
            x = nodes[-1].outputs[0]
        nodes.append(self.node(f"{name}.channels_last", "Transpose", [x], [ir.AttrInt64s("perm", last)]))
        codes, scale, zero_point = self.decoded(decoder)
        matrix = codes.reshape(codes.shape[:2]).T
        weight = self.decoder(decoder, matrix, scale, zero_point, 1).outputs[0]
        nodes.append(self.node(f"{name}.product", "MatMul", [nodes[-1].outputs[0], weight]))
        nodes[-1].name = self.unused(name)
        if len(conv.inputs) > 2 and conv.inputs[2] is not None:
            nodes.append(self.node(f"{name}.with_bias", "Add", [nodes[-1].outputs[0], conv.inputs[2]]))
        nodes.append(self.node(f"{name}.channels_first", "Transpose", [nodes[-1].outputs[0]], [ir.AttrInt64s("perm", back)]))
        result = nodes[-1].outputs[0]
        result.dtype, result.shape = conv.outputs[0].dtype, conv.outputs[0].shape
        self.graph.insert_before(conv, nodes)
        self.replace(conv, result)

    def _write_matrix_product(self, product: _Product, names: Sequence[str], is_static: bool) -> None:
        """Writes one product for each part of the weight, with codes as [inputs, outputs]."""
        ir, original = self.ir, product.node
        x = original.inputs[0]
        bias = original.inputs[2] if original.op_type == "Gemm" and len(original.inputs) > 2 else None
        read = [self._matrix(part, decoder, is_static) for part, decoder in zip(product.parts, product.decoders, strict=True)]
        if original.op_type == "Gemm" and len(read) == 1:
            weight, scale = read[0]
            if scale is not None and bias is not None and array_of(bias) is not None:
                bias = self._int32_bias(names[0], array_of(bias), scale, float(array_of(x.producer().inputs[1])))
            nodes = [self.node(f"{names[0]}.product", "Gemm", [x, weight, *([] if bias is None else [bias])])]
            bias = None
        else:
            nodes = [self.node(f"{name}.product", "MatMul", [x, weight]) for name, (weight, _) in zip(names, read, strict=True)]
        for made, name in zip(nodes, names, strict=True):
            made.name = self.unused(name)
        if len(nodes) > 1:
            nodes.append(self.node(f"{names[0]}.whole", "Concat", [n.outputs[0] for n in nodes], [ir.AttrInt64("axis", -1)]))
        if bias is not None:
            nodes.append(self.node(f"{names[0]}.with_bias", "Add", [nodes[-1].outputs[0], bias]))
        result = nodes[-1].outputs[0]
        result.dtype, result.shape = original.outputs[0].dtype, original.outputs[0].shape
        self.graph.insert_before(original, nodes)
        self.replace(original, result)

    def _matrix(self, part: Any, decoder: Any, is_static: bool) -> tuple[Any, NDArray[np.float64] | None]:
        """(a part of a weight as [inputs, outputs], its scales if the kernel reads int8 codes)."""
        if decoder is None:
            return self.stored(f"{layer_name(part)}.transposed", np.ascontiguousarray(array_of(part).T)), None
        codes, scale, zero_point = self.decoded(decoder)
        as_int8 = is_static and fits_int8(decoder)
        weight = self.decoder(decoder, codes.T, scale, zero_point, 1, as_int8=as_int8).outputs[0]
        return weight, scale if as_int8 else None

    def _int32_bias(self, name: str, bias: Any, scale: NDArray[np.float64], input_scale: float, with_zeros: bool = True) -> Any:
        """A bias on the grid of the product's sums, which the integer kernel adds."""
        step = scale * input_scale
        codes = np.clip(np.rint(bias / step), -(2**31) + 1, 2**31 - 1)
        inputs = [
            self.stored(f"{name}.bias_codes", codes.astype(np.int32)),
            self.stored(f"{name}.bias_scale", step.astype(np.float32)),
        ]
        if with_zeros:  # several convolutions would share one tensor of zeros
            inputs.append(self.stored(f"{name}.bias_zero_point", np.zeros(len(codes), np.int32)))
        decoder = self.node(f"{name}.bias", "DequantizeLinear", inputs, [self.ir.AttrInt64("axis", 0)])
        self.graph.insert_before(self.graph[0], [decoder])
        return decoder.outputs[0]
