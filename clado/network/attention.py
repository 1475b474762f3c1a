"""Attention with the images first: removes changes of the order of axes from a program.

`nn.MultiheadAttention` computes with the positions first, whatever order its input has. Its
exported graph transposes before each projection, copies queries, keys and values apart, and
transposes back. The module itself takes a fused path in inference. A linear operator treats rows
alone, so the order of rows may be changed after it instead of before it. Operators that move
elements are evaluated on the elements' numbers, so this file does not depend on which operators
they are.
"""

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from clado.network.program import expression_of, size_at

_LINEAR = torch.ops.aten.linear.default
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
# Operators whose result holds elements of their first argument in another order.
_MOVES = {
    f"aten.{name}"
    for name in (
        *("view.default", "reshape.default", "_unsafe_view.default", "transpose.int", "permute.default", "clone.default"),
        *("unsqueeze.default", "squeeze.dim", "squeeze.dims", "select.int", "slice.Tensor", "alias.default"),
        *("split.Tensor", "split_with_sizes.default", "chunk.default", "unbind.int", "contiguous.default"),
    )
} | {str(operator.getitem)}
_AS_RESHAPE = {"aten.view.default", "aten._unsafe_view.default"}
_COUNTS = (2, 3)  # number of images for which a movement is computed


@dataclass(frozen=True)
class Movement:
    """Splits axes, picks one index of some, permutes the rest, merges. The result is a view if possible."""

    split: tuple[int, ...]
    """Sizes of the axes after splitting."""
    picks: tuple[tuple[int, int], ...]
    """(axis, index) of each axis of which one index is picked."""
    order: tuple[int, ...]
    """The permutation of the axes that are left."""
    shape: tuple[int, ...]
    """Sizes after merging."""

    def __call__(self, x: Tensor) -> Tensor:
        """The moved tensor."""
        x = x.reshape(self.split)
        for axis, index in self.picks:
            x = x.select(axis, index)
        return x.permute(self.order).reshape(self.shape)

    def is_view(self, shape: Sequence[int]) -> bool:
        """Whether a contiguous tensor of this shape is moved without a copy."""
        x = torch.empty(tuple(shape))
        return self(x).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def images_first(program: ExportedProgram) -> None:
    """Changes the graph in place: the same function, projections image by image."""
    graph = program.graph_module.graph
    inputs = {spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"}
    images = next((node for node in graph.nodes if node.op == "placeholder" and node.name in inputs), None)
    symbol = None if images is None else expression_of(images.meta["val"].shape[0])
    if symbol is None:
        return
    sizes = _Sizes(symbol)
    for node in list(graph.nodes):
        if node.target is _ATTENTION:
            for projection in {source for source in map(_source, node.args[:3]) if source.target is _LINEAR}:
                _project_first(graph, projection, sizes)
            _move_first(graph, node, sizes)


@dataclass(frozen=True)
class _Sizes:
    """Sizes of values for a number of images."""

    symbol: Any
    """The symbol that stands for the number of images."""

    def number(self, value: Any, count: int) -> int:
        return size_at(value, self.symbol, count)

    def shape(self, node: fx.Node, count: int) -> tuple[int, ...]:
        return tuple(self.number(length, count) for length in node.meta["val"].shape)

    def images_lead(self, node: fx.Node) -> bool:
        """Whether the first axis, and no other, is that of the images."""
        one, two = (self.shape(node, count) for count in _COUNTS)
        return one[:1] == _COUNTS[:1] and two[:1] == _COUNTS[1:] and one[1:] == two[1:]


def _project_first(graph: fx.Graph, linear: fx.Node, sizes: _Sizes) -> None:
    """linear(moved rows) -> moved(linear(rows)), without a copy, if only attention reads it."""
    source: Any = linear.args[0]
    while str(source.target) in _MOVES and not sizes.images_lead(source):
        source = source.args[0]
    if source is linear.args[0] or not sizes.images_lead(source):
        return
    ends = _ends(linear)
    if any(user.target is not _ATTENTION or end not in user.args[:3] for end in ends for user in end.users):
        return
    outputs = int(linear.meta["val"].shape[-1])
    shape = (*source.meta["val"].shape[:-1], outputs)

    def indices(end: fx.Node) -> Callable[[int], Tensor | None]:
        def of(count: int) -> Tensor | None:
            rows = _rows(_moved(linear.args[0], source, _numbered(sizes.shape(source, count)), sizes, count))
            total = math.prod(sizes.shape(source, count)[:-1])
            if rows is None or rows.numel() != total:
                return None
            return _moved(end, linear, _numbered((total, outputs))[rows], sizes, count)

        return of

    plain = tuple((*sizes.shape(source, count)[:-1], outputs) for count in _COUNTS)
    movements = [_movement(indices(end), plain) for end in ends]
    if not movements or any(movement is None or not movement.is_view(plain[0]) for movement in movements):
        return
    with graph.inserting_before(linear):
        replacement = graph.call_function(_LINEAR, (source, *linear.args[1:]), dict(linear.kwargs))
        replacement.meta["val"] = linear.meta["val"].new_empty(shape)
    for end, movement in zip(ends, movements, strict=True):
        _put(graph, end, replacement, movement)


def _move_first(graph: fx.Graph, attention: fx.Node, sizes: _Sizes) -> None:
    """moved(linear(copied)) -> linear(moved): at most one copy of attention's result."""
    linear = attention
    while len(linear.users) == 1 and linear.target is not _LINEAR:
        (user,) = linear.users
        if user.target is not _LINEAR and str(user.target) not in _MOVES:
            return
        linear = user
    ends = _ends(linear) if linear.target is _LINEAR else []
    if len(ends) != 1 or ends[0] is linear or _source(linear.args[0]) is not attention or not sizes.images_lead(attention):
        return
    (end,) = ends
    width = int(linear.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]

    def before(count: int) -> Tensor | None:
        return _moved(linear.args[0], attention, _numbered(sizes.shape(attention, count)), sizes, count)

    def through(count: int) -> Tensor | None:
        entered, rows = before(count), _rows(_moved(end, linear, _numbered(sizes.shape(linear, count)), sizes, count))
        if entered is None or rows is None or rows.numel() * width != entered.numel():
            return None
        return entered.reshape(-1, width)[rows]

    shapes = tuple(sizes.shape(attention, count) for count in _COUNTS)
    now, movement = _movement(before, shapes), _movement(through, shapes)
    if movement is None or (now is not None and now.is_view(shapes[0])):
        return
    with graph.inserting_before(linear):
        moved = graph.create_node("call_function", movement, (attention,), {}, f"{linear.name}_input")
        moved.meta["val"] = attention.meta["val"].new_empty((*end.meta["val"].shape[:-1], width))
        replacement = graph.call_function(_LINEAR, (moved, *linear.args[1:]), dict(linear.kwargs))
        replacement.meta["val"] = end.meta["val"].new_empty(end.meta["val"].shape)
    end.replace_all_uses_with(replacement)
    _erase(graph, end)


def _put(graph: fx.Graph, old: fx.Node, source: fx.Node, movement: Movement | None) -> None:
    """Puts the moved source in the place of a node."""
    assert movement is not None
    with graph.inserting_before(old):
        moved = graph.create_node("call_function", movement, (source,), {}, f"{old.name}_moved")
        moved.meta["val"] = old.meta["val"]
    old.replace_all_uses_with(moved)
    _erase(graph, old)


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Removes the node, and nodes that only it used."""
    unused = [node]
    while unused:
        node = unused.pop()
        read = [other for other in node.all_input_nodes if other.op == "call_function"]
        graph.erase_node(node)
        unused += [other for other in read if not other.users and other not in unused]


def _source(node: Any) -> Any:
    """The source of a node's elements."""
    while str(node.target) in _MOVES:
        node = node.args[0]
    return node


def _ends(node: fx.Node) -> list[fx.Node]:
    """The node, or its parts after operators that move elements. None if a reader does more."""
    users = list(node.users)
    moving = [user for user in users if str(user.target) in _MOVES]
    if not moving:
        return [node]
    if len(moving) < len(users):
        return []
    parts = [_ends(user) for user in moving]
    return [end for part in parts for end in part] if all(parts) else []


def _numbered(shape: Sequence[int]) -> Tensor:
    return torch.arange(math.prod(shape)).reshape(tuple(shape))


def _moved(node: Any, source: fx.Node, value: Tensor, sizes: _Sizes, count: int) -> Tensor:
    """The result of the operators between `source` and `node` for a value in the source's shape."""
    path = [node]
    while path[-1] is not source:
        path.append(path[-1].args[0])
    result: Any = value.reshape(*sizes.shape(source, count)[:-1], -1)
    for step in reversed(path[:-1]):
        rest = fx.map_arg(step.args[1:], lambda argument: sizes.number(argument.meta["val"], count))
        function = torch.ops.aten.reshape.default if str(step.target) in _AS_RESHAPE else step.target
        result = function(result, *rest, **step.kwargs)
    assert isinstance(result, Tensor)
    return result


def _rows(numbers: Tensor) -> Tensor | None:
    """Numbers of the rows after a movement of numbered elements. None if rows are split."""
    width = numbers.shape[-1]
    whole = bool((numbers % width == torch.arange(width)).all()) and bool((numbers // width == numbers[..., :1] // width).all())
    return numbers[..., 0] // width if whole else None


def _movement(indices: Callable[[int], Tensor | None], shapes: Sequence[tuple[int, ...]]) -> Movement | None:
    """The movement that gives these indices into a contiguous source for any number of images."""
    movements = set()
    for count, shape in zip(_COUNTS, shapes, strict=True):
        numbers = indices(count)
        movement = None if numbers is None else _worked_out(numbers, shape)
        if movement is None:
            return None
        movements.add(movement)
    return movements.pop() if len(movements) == 1 else None


def _worked_out(numbers: Tensor, shape: tuple[int, ...]) -> Movement | None:
    bounds, stride = [], 1  # strides of the source's axes, inner before outer
    for length in reversed(shape):
        bounds.append((stride, stride * length))
        stride *= length
    lines = [numbers[tuple(slice(None) if k == axis else 0 for k in range(numbers.ndim))] for axis in range(numbers.ndim)]
    axes = [[part for factor in _factors(line.tolist()) for part in _cut(factor, bounds)] for line in lines]
    factors = [factor for axis in axes for factor in axis]
    split = _split(factors, bounds)
    if split is None or len(set(factors)) < len(factors):
        return None
    images = split[0]
    holders = [k for k, axis in enumerate(axes) if images in axis]
    if images[0] != shape[0] or len(holders) != 1:
        return None
    offset = int(numbers.reshape(-1)[0])
    picks = tuple((k, offset // s % n) for k, (n, s) in reversed(list(enumerate(split))) if (n, s) not in factors)
    left = [part for part in split if part in factors]
    target = tuple(-1 if k in holders else length for k, length in enumerate(numbers.shape))
    movement = Movement((-1, *(n for n, _ in split[1:])), picks, tuple(left.index(factor) for factor in factors), target)
    return movement if torch.equal(movement(_numbered(shape)), numbers) else None


def _factors(line: Sequence[int]) -> list[tuple[int, int]]:
    """(length, stride) of the nested runs in a line of indices, outer before inner."""
    factors: list[tuple[int, int]] = []
    while len(line) > 1:
        stride = line[1] - line[0]
        length = next((k for k in range(len(line)) if line[k] != line[0] + k * stride), len(line))
        factors.insert(0, (length, stride))
        line = line[::length]
    return factors


def _cut(factor: tuple[int, int], bounds: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """A factor in parts that each lie within one axis of the source."""
    length, stride = factor
    for low, high in bounds:
        inner = high // stride if low <= stride else 0
        if 1 < inner < length and high % stride == 0 and length % inner == 0:
            return [*_cut((length // inner, high), bounds), (inner, stride)]
    return [factor]


def _split(factors: Sequence[tuple[int, int]], bounds: Sequence[tuple[int, int]]) -> list[tuple[int, int]] | None:
    """(length, stride) of the source's axes, outer first, in factors; None if they overlap."""
    split: list[tuple[int, int]] = []
    for low, high in bounds:
        at = low
        for length, stride in sorted((f for f in factors if low <= f[1] < high), key=lambda factor: factor[1]):
            if stride % at:
                return None
            if stride > at:
                split.append((stride // at, at))
            split.append((length, stride))
            at = stride * length
        if high % at:
            return None
        if high > at:
            split.append((high // at, at))
    return split[::-1]
