"""The searched weights of an exported program: the operators that read them, and their biases."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx

from clado.errors import NetworkError
from clado.network.program import Program
from clado.space import Layer

# Operators that consume a weight: position of the weight, and the weight's axis of output channels.
CONSUMERS: dict[str, tuple[int, int]] = {
    "aten.conv1d.default": (1, 0),
    "aten.conv2d.default": (1, 0),
    "aten.conv3d.default": (1, 0),
    "aten.conv1d.padding": (1, 0),
    "aten.conv2d.padding": (1, 0),
    "aten.conv3d.padding": (1, 0),
    "aten.conv_transpose1d.default": (1, 1),
    "aten.conv_transpose2d.input": (1, 1),
    "aten.conv_transpose3d.input": (1, 1),
    "aten.linear.default": (1, 0),
}
# Operators through which a weight may pass on its way to a consumer (attention splits in_proj).
_WEIGHT_VIEWS = {
    f"aten.{name}"
    for name in (
        *("view.default", "reshape.default", "slice.Tensor", "select.int", "split.Tensor", "split_with_sizes.default"),
        *("chunk.default", "unsqueeze.default", "squeeze.dim", "clone.default", "alias.default", "detach.default"),
        "contiguous.default",
    )
} | {"<built-in function getitem>"}


@dataclass(frozen=True)
class SearchedWeight:
    """A searched weight, or rows of a weight that are searched separately."""

    layer: Layer
    """The layer as the search space knows it."""
    nodes: tuple[fx.Node, ...]
    """Where the program reads the weight: several nodes if it is tied."""
    consumers: tuple[fx.Node, ...]
    """Operators that consume it, in execution order."""
    bias: fx.Node | None
    """Where the program reads its bias. None: it has no bias."""
    lacks_bias: bool
    """Whether it has no bias, but one can be added."""
    rows: slice | None = None
    """Rows of the tensor that belong to it. None: all."""

    @property
    def consumer(self) -> fx.Node:
        """The first operator that reads it."""
        return self.consumers[0]

    def positions(self, operators: Sequence[fx.Node]) -> list[int]:
        """Positions of the operators that read it."""
        return [k for k, node in enumerate(operators) if set(self.nodes) & set(node.all_input_nodes)]


def searched_weights(program: Program, fixed: Callable[[str], bool], split: Callable[[str], bool]) -> list[SearchedWeight]:
    """Every searched weight. They are parameters, because buffers are not trained.

    Raises:
        NetworkError: `split` names a weight that does not consist of three projections.
    """
    groups: dict[int, list[fx.Node]] = {}
    for node, tensor in program.tensors.items():
        if (
            node in program.parameters
            and isinstance(tensor, Tensor)
            and tensor.is_floating_point()
            and tensor.ndim >= 2
            and any(True for _ in _consumed(node))
        ):
            groups.setdefault(tensor.data_ptr(), []).append(node)
    weights: list[SearchedWeight] = []
    for nodes in groups.values():
        name = program.names[nodes[0]]
        if not fixed(name):
            weight, direct = _searched_weight(program, nodes)
            weights += _thirds(weight, direct) if split(name) else [weight]
    return weights


def _searched_weight(program: Program, nodes: Sequence[fx.Node]) -> tuple[SearchedWeight, bool]:
    """The weight that is read at these nodes, and whether a single operator reads it directly."""
    pairs = [pair for node in nodes for pair in _consumed(node)]
    consumers = tuple(dict.fromkeys(consumer for consumer, _ in pairs))
    first = str(consumers[0].target)
    direct = len(consumers) == 1 and consumers[0].args[CONSUMERS[first][0]] in nodes
    bias, lacks_bias = _bias(program, consumers[0]) if direct else (None, False)
    shape, macs = tuple(program.tensors[nodes[0]].shape), sum(macs_of(program, consumer) for consumer in consumers)
    layer = Layer(program.names[nodes[0]], shape, first.split(".")[1], macs, pairs[0][1])
    return SearchedWeight(layer, tuple(nodes), consumers, bias, lacks_bias), direct


def _thirds(whole: SearchedWeight, direct: bool) -> list[SearchedWeight]:
    """Queries, keys and values of a weight that holds all three."""
    layer = whole.layer
    rows = layer.shape[0]
    if not direct or layer.operator != "linear" or rows % 3:
        raise NetworkError(
            f"{layer.name} cannot be split into queries, keys and values: expected one linear operator that reads it whole, "
            f"with rows in thirds; it has {rows} rows and is read by {', '.join(str(c.target) for c in whole.consumers)}"
        )
    shape = (rows // 3, *layer.shape[1:])
    return [
        replace(
            whole,
            layer=replace(layer, name=f"{layer.name}.{part}", shape=shape, macs=layer.macs // 3),
            lacks_bias=False,
            rows=slice(k * rows // 3, (k + 1) * rows // 3),
        )
        for k, part in enumerate("qkv")
    ]


def _consumed(node: fx.Node) -> Iterable[tuple[fx.Node, int]]:
    """(operator, channel axis of the weight) of each operator that reads a weight, directly or through views."""
    for user in node.users:
        target = str(user.target)
        if target in CONSUMERS and user.args[CONSUMERS[target][0]] is node:
            yield user, CONSUMERS[target][1]
        elif target in _WEIGHT_VIEWS:
            yield from _consumed(user)


def _bias(program: Program, consumer: fx.Node) -> tuple[fx.Node | None, bool]:
    """The placeholder of an operator's bias, and whether it has no bias but one can be added."""
    bias = consumer.args[2] if len(consumer.args) > 2 else consumer.kwargs.get("bias")
    if bias is None:
        return None, True
    return (bias, False) if isinstance(bias, fx.Node) and bias in program.tensors and len(bias.users) == 1 else (None, False)


def macs_of(program: Program, node: fx.Node) -> int:
    """Multiply-accumulates of one image in a consumer; 0 for any other operator."""
    target = str(node.target)
    if target not in CONSUMERS:
        return 0
    weight = node.args[CONSUMERS[target][0]]
    # Each output value meets shape[1:] of the weight. Of a transposed convolution, with a weight
    # (in, out / groups, ...), each input value does.
    counted = node.args[0] if "transpose" in target else node
    assert isinstance(weight, fx.Node)
    assert isinstance(counted, fx.Node)
    return program.elements_per_image(counted.meta["val"]) * math.prod(int(n) for n in weight.meta["val"].shape[1:])


def unsearched(
    program: Program, weights: Sequence[SearchedWeight], fixed: Callable[[str], bool]
) -> tuple[tuple[str, int, str], ...]:
    """(name, bytes, why) of every parameter that is not searched."""
    parameters = program.exported.graph_signature.inputs_to_parameters
    # a tied parameter has several placeholders, some of them unused
    listed = {program.names[node] for weight in weights for node in weight.nodes}
    rows = []
    for node, name in program.names.items():
        if node.name not in parameters or name in listed:
            continue
        listed.add(name)
        tensor = program.tensors[node]
        users = ", ".join(sorted({str(user.target) for user in node.users})) or "nothing"
        rows.append((name, tensor.numel() * tensor.element_size(), why_unsearched(tensor, fixed(name), users)))
    return tuple(rows)


CHANNELWISE = "a bias, scale or shift: one value a channel"
"""Why most tensors are not searched."""


def why_unsearched(tensor: Tensor, is_fixed: bool, used_by: str) -> str:
    """Why a parameter is not searched, for the coverage report."""
    if is_fixed:
        return "fixed by the configuration"
    return CHANNELWISE if tensor.ndim < 2 else f"used by {used_by}"
