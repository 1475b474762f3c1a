"""Reads and edits an ONNX graph that `clado.exporting.onnx` wrote."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clado.exporting._onnx_graph import initializer, node


class GraphEditor:
    """A graph, and the tensors and nodes that were added to it. Equal tensors are stored once. Names are unique."""

    def __init__(self, ir: ModuleType, graph: Any) -> None:
        self.ir, self.graph = ir, graph
        self._tensors: dict[Any, Any] = {}
        self._decoders: dict[Any, Any] = {}
        self._names: set[str] = set()

    def decoded_at_load(self, decoder: Any) -> Any:
        """A weight decoded by Cast and Mul. ONNX Runtime computes these once, but DequantizeLinear at each call."""
        ir, name, codes = self.ir, layer_name(decoder.outputs[0]), decoder.inputs[0]
        _, scale, zeros = self.decoded(decoder)
        shape = [1] * len(codes.shape)
        shape[axis_of(decoder) or 0] = -1
        to_float = [ir.AttrInt64("to", int(ir.DataType.FLOAT))]
        nodes = [self.node(f"{name}.floats", "Cast", [codes], to_float)]
        if zeros.any():
            shift = self.stored(f"{name}.shift", zeros.astype(np.float32).reshape(shape))
            nodes.append(self.node(f"{name}.shifted", "Sub", [nodes[-1].outputs[0], shift]))
        step = self.stored(f"{name}.step", scale.astype(np.float32).reshape(shape))
        nodes.append(self.node(f"{name}.decoded", "Mul", [nodes[-1].outputs[0], step]))
        self.graph.insert_before(self.graph[0], nodes)
        return nodes[-1].outputs[0]

    def decoded(self, decoder: Any) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """(codes, scale, zero point) of a weight. Scale and zero point have one number for each output channel."""
        codes = array_of(decoder.inputs[0]).astype(np.float64)
        axis = axis_of(decoder) or 0
        numbers = (array_of(decoder.inputs[1]), zero_points_of(decoder))
        scale, zero_point = (np.broadcast_to(array.astype(np.float64), (codes.shape[axis],)) for array in numbers)
        return codes, scale, zero_point

    def decoder(
        self,
        like: Any,
        codes: NDArray[np.float64],
        scale: NDArray[np.float64],
        zero_point: NDArray[np.float64],
        axis: int,
        as_int8: bool = False,
    ) -> Any:
        """A DequantizeLinear of new codes. They have the same data type in the file as those of `like`."""
        ir, name, dtype = self.ir, layer_name(like.outputs[0]), like.inputs[0].dtype
        key = (name, axis, as_int8, codes.tobytes(), scale.tobytes())
        if key in self._decoders:  # a layer that is used twice
            return self._decoders[key]
        codes_read = self.stored(f"{name}.codes", codes, dtype)
        nodes = []
        if as_int8 and dtype != ir.DataType.INT8:
            nodes.append(self.node(f"{name}.int8", "Cast", [codes_read], [ir.AttrInt64("to", int(ir.DataType.INT8))]))
            codes_read = nodes[-1].outputs[0]
        inputs = [codes_read, self.stored(f"{name}.scale", scale.astype(np.float32))]
        if as_int8:
            # ONNX Runtime finds kernels only if zero points are given, and fails if layers share them. So each layer computes
            # its zero points from its scales when the file is loaded. They take no bytes in the file.
            nodes.append(self.node(f"{name}.no_scale", "Sub", [inputs[1], inputs[1]]))
            nodes.append(self.node(f"{name}.zeros", "Cast", nodes[-1].outputs, [ir.AttrInt64("to", int(ir.DataType.INT8))]))
            nodes[-1].outputs[0].dtype = ir.DataType.INT8
            inputs.append(nodes[-1].outputs[0])
        elif zero_point.any():
            inputs.append(self.stored(f"{name}.zero_point", zero_point, dtype))
        nodes.append(self.node(f"{name}.values", "DequantizeLinear", inputs, [ir.AttrInt64("axis", axis)]))
        nodes[-1].outputs[0].dtype = ir.DataType.FLOAT
        nodes[-1].outputs[0].shape = ir.Shape(codes.shape)
        self.graph.insert_before(self.graph[0], nodes)
        self._decoders[key] = nodes[-1]
        return nodes[-1]

    def stored(self, name: str, array: Any, dtype: Any = None) -> Any:
        """A stored tensor. Equal tensors are stored once."""
        array = np.asarray(array) if dtype is None else np.asarray(array).astype(dtype.numpy())
        key = (array.dtype.str if dtype is None else dtype.name, array.shape, array.tobytes())
        if key not in self._tensors or self._tensors[key].name not in self.graph.initializers:
            while name in self.graph.initializers:
                name += "'"
            self._tensors[key] = initializer(self.ir, self.graph, name, array, dtype)
        return self._tensors[key]

    def node(self, result: str, operator: str, inputs: Sequence[Any], attributes: Sequence[Any] = ()) -> Any:
        """A node with one output, which is not part of the graph yet."""
        return node(self.ir, self.unused(result), operator, inputs, attributes)

    def unused(self, name: str) -> str:
        """The name. If a layer is used twice, its name is already taken, and gets longer."""
        while name in self._names:
            name += "'"
        self._names.add(name)
        return name

    def replace(self, old: Any, result: Any) -> None:
        """Replaces a node's output by a value, and removes the node."""
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


def array_of(value: Any) -> Any:
    """Values of a stored tensor. None for any other value."""
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    source = value.producer()
    if source is not None and source.op_type == "Constant" and "value" in source.attributes:
        return source.attributes["value"].as_tensor().numpy()
    return None


def layer_name(value: Any) -> str:
    """Name of the layer whose weight a value is."""
    return str(value.name).rstrip("'").removesuffix(".values")


def is_decoder(producer: Any) -> bool:
    """Whether a node decodes stored codes."""
    return producer is not None and producer.op_type == "DequantizeLinear" and array_of(producer.inputs[0]) is not None


def axis_of(decoder: Any) -> int | None:
    """The axis of a decoder's scales. None if the node decodes no stored codes."""
    if not is_decoder(decoder):
        return None
    axis = int(decoder.attributes["axis"].as_int()) if "axis" in decoder.attributes else 0
    return axis % len(decoder.inputs[0].shape)


def stored_bits(decoder: Any) -> int:
    """Bits of the data type of the codes in the file."""
    return int(decoder.inputs[0].dtype.bitwidth)


def code_range(dtype: Any) -> tuple[int, int]:
    """The least and the largest code of a type."""
    bits = int(dtype.bitwidth)
    return (0, 2**bits - 1) if dtype.name.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def fits_int8(decoder: Any) -> bool:
    """Whether codes are signed, have at most eight bits, and have no zero point."""
    return stored_bits(decoder) <= 8 and not decoder.inputs[0].dtype.name.startswith("U") and not np.any(zero_points_of(decoder))


def zero_points_of(decoder: Any) -> Any:
    """A decoder's zero points, or 0 if it has none."""
    return array_of(decoder.inputs[2]) if len(decoder.inputs) > 2 else np.array(0)


def is_int8(conv: Any) -> bool:
    """Whether a product has a quantized input and int8 codes."""
    decoder = conv.inputs[1].producer()
    return (
        is_dequantized(conv.inputs[0])
        and decoder is not None
        and decoder.op_type == "DequantizeLinear"
        and (len(decoder.inputs) > 2 and decoder.inputs[2].dtype.name == "INT8")
    )


def is_pointwise(conv: Any) -> bool:
    """Whether a convolution is a matrix product over channels."""
    shape = list(conv.inputs[1].shape)
    attributes = conv.attributes
    groups = int(attributes["group"].as_int()) if "group" in attributes else 1
    pads = list(attributes["pads"].as_ints()) if "pads" in attributes else [0]
    return groups == 1 and all(length == 1 for length in shape[2:]) and not any(pads)


def is_dequantized(value: Any) -> bool:
    """Whether a value is an input on an eight-bit grid."""
    source = value.producer()
    if source is None or source.op_type != "DequantizeLinear":
        return False
    quantize = source.inputs[0].producer()
    return quantize is not None and quantize.op_type == "QuantizeLinear" and quantize.inputs[2].dtype.name in ("UINT8", "INT8")


def dequantize_of(quantize: Any) -> Any:
    """The node that reads a quantizer's codes."""
    return quantize.outputs[0].uses()[0][0]


def grid_of(quantize: Any) -> tuple[float, float, float]:
    """(lowest value, highest value, scale) of a quantizer's grid."""
    scale, zero_point = float(array_of(quantize.inputs[1])), float(array_of(quantize.inputs[2]))
    low, high = code_range(quantize.inputs[2].dtype)
    return (low - zero_point) * scale, (high - zero_point) * scale, scale


def span_of(quantize: Any) -> float:
    """The difference of the highest and the lowest value of a quantizer's grid."""
    low, high, _ = grid_of(quantize)
    return high - low
