"""Nodes and stored tensors of an ONNX graph in memory, made with the package `onnx_ir`."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray


def node(ir: ModuleType, result: str, operator: str, inputs: Sequence[Any], attributes: Sequence[Any] = ()) -> Any:
    """A node with one output that is called `result`. It is not part of a graph yet."""
    node = ir.Node("", operator, inputs, attributes=attributes)
    node.outputs[0].name = result
    return node


def initializer(ir: ModuleType, graph: Any, name: str, array: NDArray[Any], dtype: Any = None) -> Any:
    """A stored tensor of a graph. It replaces one of the same name.

    Args:
        ir: The package `onnx_ir`.
        graph: The graph.
        name: Name of the tensor.
        array: Its values.
        dtype: Its data type, such as `ir.DataType.INT4`. None: that of the array.
    """
    array = np.array(array, None if dtype is None else dtype.numpy(), order="C")
    tensor = ir.tensor(array, dtype=dtype, name=name)
    value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
    graph.register_initializer(value)
    return value
