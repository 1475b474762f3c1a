"""A survey of a graph: which layers are neighbours, and whether the channels between them may be scaled (`equalization`)."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from clado.network.graph import Constant, Graph, Instruction, Norm, Value
from clado.quantization.corrections._connections import Clip, Connection, Layout, Side

_ELEMENTWISE = {"relu", "leaky_relu", "prelu", "clone", "contiguous", "alias", "detach"}
_CLIPS = {"relu6", "hardtanh", "clamp", "clamp_min", "clamp_max"}
_RESHAPES = {"reshape", "view", "flatten", "unsqueeze", "squeeze"}
_SPATIAL = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample_")
_REDUCTIONS = {"mean", "sum", "amax", "amin"}
_PADS = {"pad", "constant_pad_nd"}


@dataclass
class _Path:
    """The path from a layer's result to the only operator with a weight that reads it, or the reason why it ends earlier."""

    layout: Layout
    """The layout of the value that the path has reached."""
    slot: int
    """The slot of this value."""
    norm: Norm | None = None
    """The batch norm directly after the layer, if there is one."""
    clips: list[Clip] = field(default_factory=list)
    """The clips on the way."""
    second: int | None = None
    """The instruction with a weight at the end of the path."""
    reason: str | None = None
    """The reason why the path ends before an operator with a weight."""


class Survey:
    """The inputs of a graph's operators, and the connections of its layers.

    `shapes` are the shapes of all values by slot, in runs of two images and of three images.
    """

    def __init__(self, graph: Graph, shapes: Sequence[dict[int, torch.Size]]) -> None:
        self.graph = graph
        self.shapes = shapes
        self.readers: dict[int, list[int]] = defaultdict(list)
        self.uses: Counter[int] = Counter()  # number of uses of a tensor by its address, because tied names share it
        self.names = {slot: name for name, slots in graph.named.items() for slot in slots}
        self.norms = {norm.position: norm for norm in graph.norms}
        for position, step in enumerate(graph.instructions):
            for argument in _leaves(step):
                if isinstance(argument, Value):
                    self.readers[argument.slot].append(position)
                elif isinstance(argument, Constant) and isinstance(graph.constants[argument.slot], Tensor):
                    self.uses[graph.constants[argument.slot].data_ptr()] += 1

    def connections(self) -> Iterator[Connection]:
        """For each layer in execution order: one to its batch norm, if there is one, and one to the nearest layer."""
        for position, step in enumerate(self.graph.instructions):
            for layer in step.layers:
                name = self.graph.layers[layer].layer.name
                path = self._path(position)
                if path.norm is not None:
                    yield self._to_norm(name, layer, position, path.norm)
                nearest = path.second if path.second is not None else self._nearest(position)
                if nearest is not None:
                    yield self._to_layer(name, layer, position, path, nearest)

    # -- one connection ----------------------------------------------------------------------------------------------------

    def _to_norm(self, name: str, layer: int, position: int, norm: Norm) -> Connection:
        rows, bias, reason = self._outputs(layer, position)
        norm_fault = self._fault(norm.mean) or self._fault(norm.variance)
        batch_norm = norm.mean.rpartition(".")[0] or norm.mean
        if reason or norm_fault:
            return Connection(name, batch_norm, reason or norm_fault)
        return Connection(name, batch_norm, None, rows, None, (*bias, norm.mean), norm.variance, norm.eps)

    def _to_layer(self, name: str, layer: int, position: int, path: _Path, nearest: int) -> Connection:
        rows, vectors, reason = self._outputs(layer, position)
        if path.norm is not None:
            rows = None
            weight, bias = self.graph.instructions[path.norm.position].arguments[1:3]
            if reason is None and weight is None:
                reason = "the batch norm between them has no scale"
            arguments = [argument for argument in (weight, bias) if argument is not None]
            vectors = tuple(self.names.get(a.slot, "") if isinstance(a, Constant) else "" for a in arguments)
            reason = reason or next((fault for fault in map(self._fault, vectors) if fault), None)
        second = self._name(nearest)
        columns, fault = (None, None) if path.second is None else self._inputs(nearest, path)
        reason = reason or path.reason or fault
        if reason is not None:
            return Connection(name, second, reason)
        return Connection(name, second, None, rows, columns, vectors, clips=tuple(path.clips))

    def _outputs(self, layer: int, position: int) -> tuple[Side | None, tuple[str, ...], str | None]:
        """(output channels of a layer's weight, name of its bias, reason why they cannot be scaled)."""
        step = self.graph.instructions[position]
        fault = self._weight_fault(layer, step)
        bias = step.arguments[2] if len(step.arguments) > 2 else None
        biases: tuple[str, ...] = ()
        if fault is None and bias is not None and not (isinstance(bias, Constant) and self.graph.constants[bias.slot] is None):
            biases = (self.names.get(bias.slot, "") if isinstance(bias, Constant) else "",)
            fault = self._fault(*biases)
        transposed, groups = _form(step)
        name = self.graph.layers[layer].parameter
        side = Side(name, 1, groups) if transposed else Side(name, 0)
        return side, biases, fault

    def _inputs(self, position: int, path: _Path) -> tuple[Side | None, str | None]:
        """(input channels of a layer's weight, reason why they cannot be scaled)."""
        step = self.graph.instructions[position]
        if not step.layers:
            return None, f"{self._name(position)} is not searched"
        fault = self._weight_fault(step.layers[0], step)
        if fault:
            return None, fault
        name = self.graph.layers[step.layers[0]].parameter
        transposed, groups = _form(step)
        shape = self.shapes[0][path.slot]
        kernel = 0 if _operator(step) == "linear" else self.graph.constants[step.arguments[1].slot].ndim - 2
        if path.layout.axis != len(shape) - 1 - kernel:
            return None, f"channels of {self.graph.layers[step.layers[0]].layer.name} lie on another axis"
        repeat = path.layout.repeat
        return (Side(name, 0, 1, repeat) if transposed else Side(name, 1, groups, repeat)), None

    def _weight_fault(self, layer: int, step: Instruction) -> str | None:
        """The reason why a layer's weight cannot be scaled at an operator, or None."""
        place = self.graph.layers[layer]
        name = place.parameter
        if place.rows is not None or len(step.layers) > 1:
            return f"{name} is split"
        weight = step.arguments[1]
        if not isinstance(weight, Constant) or weight.slot not in place.slots:
            return f"{name} passes through other operators before it is used"
        return self._fault(name)

    def _fault(self, name: str) -> str | None:
        """The reason why a parameter or buffer cannot get another value, or None."""
        if name not in self.graph.named:
            return f"{name or 'a bias or a scale'} cannot get another value"
        uses = self.uses[self.graph.constants[self.graph.named[name][0]].data_ptr()]
        return f"{name} is tied: it is used {uses} times" if uses > 1 else None

    def _name(self, position: int) -> str:
        """The layer whose weight an operator uses, searched or not."""
        step = self.graph.instructions[position]
        if step.layers:
            return self.graph.layers[step.layers[0]].layer.name
        weight = step.arguments[1]
        return self.names.get(weight.slot, step.name) if isinstance(weight, Constant) else step.name

    # -- the way between two layers ----------------------------------------------------------------------------------------

    def _nearest(self, position: int) -> int | None:
        """The first operator with a weight that reads the result at `position`, directly or through other operators."""
        slots = {self.graph.instructions[position].slot}
        for k in range(position + 1, len(self.graph.instructions)):
            step = self.graph.instructions[k]
            if slots.intersection(_slots_read(step)):
                if _has_weight(step):
                    return k
                slots.add(step.slot)
        return None

    def _path(self, position: int) -> _Path:
        step = self.graph.instructions[position]
        axis = len(self.shapes[0][step.slot]) - 1 if _operator(step) == "linear" else 1
        path = _Path(Layout(axis), step.slot)
        while path.second is None and path.reason is None:
            self._advance(path, first=step)
        return path

    def _advance(self, path: _Path, first: Instruction) -> None:
        """Moves a path past the one operator that reads its value, or to its end."""
        readers = self.readers[path.slot]
        if len(readers) != 1 or path.slot == self.graph.output_slot:
            names = dict.fromkeys(map(self._label, readers))
            path.reason = f"a value between them has other readers: {', '.join([*names, *self._is_output(path.slot)])}"
            return
        k = readers[0]
        step = self.graph.instructions[k]
        operator = _operator(step)
        if step.arguments[:1] != (Value(path.slot),) or (len(_slots_read(step)) > 1 and not _has_weight(step)):
            path.reason = f"{operator} joins it with other values"
        elif _has_weight(step):
            path.second = k
        elif k in self.norms and isinstance(step.arguments[3], Constant):
            if path.slot != first.slot or path.layout != Layout(1):
                path.reason = "a batch norm lies between them that is not directly after the first"
            else:
                path.norm, path.slot = self.norms[k], step.slot
        elif operator.startswith("batch_norm"):
            path.reason = "a batch norm lies between them whose statistics cannot be changed for it alone"
        else:
            self._follow(path, k, operator)

    def _follow(self, path: _Path, position: int, operator: str) -> None:
        """Moves a path past an operator without a weight."""
        step = self.graph.instructions[position]
        layouts = {_output_layout(operator, step, path.layout, shapes[path.slot], shapes[step.slot]) for shapes in self.shapes}
        layout = layouts.pop()
        if layout is None or layouts:  # several layouts, because they depend on the number of images
            path.reason = f"{operator} is not positively homogeneous in each channel, or this is not known"
            return
        if operator in _CLIPS:
            low, high = _limits(operator, step)
            if step.keywords or low not in (None, 0) or not (high is None or (isinstance(high, int | float) and high > 0)):
                path.reason = f"{operator} is not positively homogeneous with the bounds it has"
                return
            if high is not None:
                path.clips.append(Clip(position, path.slot, path.layout, float(high)))
        path.layout, path.slot = layout, step.slot

    def _is_output(self, slot: int) -> list[str]:
        return ["the output"] if slot == self.graph.output_slot else []

    def _label(self, position: int) -> str:
        step = self.graph.instructions[position]
        return self._name(position) if _has_weight(step) else _operator(step)


def _operator(step: Instruction) -> str:
    """An operator's name: relu for aten.relu_.default. A function of this project has its own name."""
    parts = str(step.function).split(".")
    return parts[1].removesuffix("_") if parts[0] == "aten" else getattr(step.function, "__name__", str(step.function)).strip("_")


def _has_weight(step: Instruction) -> bool:
    operator = _operator(step)
    return bool(step.layers) or operator.startswith("conv") or operator == "linear"


def _form(step: Instruction) -> tuple[bool, int]:
    """(whether a layer is a transposed convolution, its groups). Both convolutions have their groups at the same place."""
    groups = step.arguments[6] if len(step.arguments) > 6 else 1
    return _operator(step).startswith("conv_transpose"), int(groups)


def _leaves(step: Instruction) -> Iterator[Any]:
    """Every argument, also those in lists."""

    def leaves(argument: Any) -> Iterator[Any]:
        if isinstance(argument, list | tuple):
            for part in argument:
                yield from leaves(part)
        else:
            yield argument

    yield from leaves([step.arguments, list(step.keywords.values())])


def _slots_read(step: Instruction) -> list[int]:
    """Slots of the values that an operator reads."""
    return [argument.slot for argument in _leaves(step) if isinstance(argument, Value)]


def _limits(operator: str, step: Instruction) -> tuple[Any, Any]:
    """(least, largest) value that a clip lets pass. None means no limit; a limit may be a tensor of the graph."""
    low, high = [*step.arguments[1:3], None, None][:2]
    if operator == "relu6":
        return 0.0, 6.0
    if operator == "hardtanh" and len(step.arguments) == 1:
        return -1.0, 1.0
    return (None, low) if operator == "clamp_max" else (low, high)


def _output_layout(operator: str, step: Instruction, layout: Layout, source: torch.Size, result: torch.Size) -> Layout | None:
    """The layout of an operator's result if it is positively homogeneous in each channel, else None.

    `layout` and the shape `source` belong to its input. `result` is the shape of its result.
    """
    if operator in _ELEMENTWISE or operator in _CLIPS or (operator == "getitem" and step.arguments[1] == 0):
        return layout
    if operator in _RESHAPES:
        return _reshaped_layout(layout, source, result)
    if operator in _REDUCTIONS:
        return _reduced_layout(step, layout, source, result)
    num_axes = _last_axes(operator, step)
    return layout if num_axes is not None and layout.axis < len(source) - num_axes else None


def _reshaped_layout(layout: Layout, source: torch.Size, result: torch.Size) -> Layout | None:
    """The layout after a change of shape in row-major order. Channels are runs of equal length, and their period stays."""
    inner = prod(source[layout.axis + 1 :])
    run, period = inner * layout.repeat, inner * source[layout.axis]
    for axis, length in enumerate(result):
        inner = prod(result[axis + 1 :])
        if inner * length == period and run % inner == 0:
            return Layout(axis, run // inner)
    return None


def _reduced_layout(step: Instruction, layout: Layout, source: torch.Size, result: torch.Size) -> Layout | None:
    """The layout after a sum, mean or extremum over axes that are neither images nor channels."""
    axes = step.arguments[1] if len(step.arguments) > 1 else None
    reduced = {n % len(source) for n in axes} if isinstance(axes, list) else set()
    if not reduced or reduced & {0, layout.axis}:
        return None
    num_removed = 0 if len(result) == len(source) else sum(n < layout.axis for n in reduced)
    return Layout(layout.axis - num_removed, layout.repeat)


def _last_axes(operator: str, step: Instruction) -> int | None:
    """How many of the last axes a spatial operator or a zero padding acts on; None for any other operator.

    These operators are positively homogeneous, and act on each channel in the same way.
    """
    if operator.startswith(_SPATIAL):
        return next((n for n in (1, 2, 3) if operator.endswith((f"{n}d", f"{n}d_with_indices"))), None)
    value = step.arguments[-1] if operator in _PADS else None
    is_zero = not isinstance(value, int | float) or value == 0
    return len(step.arguments[1]) // 2 if operator in _PADS and is_zero else None


@torch.inference_mode()
def value_shapes(graph: Graph, images: Tensor) -> dict[int, torch.Size]:
    """Shape of every value of a run, by slot. A tuple has the shape of its first part."""
    state = graph.begin(images)
    shapes = {}
    for position in range(state.position, len(graph.instructions)):
        slot = graph.instructions[position].slot
        state = graph.run(state, position + 1, {})
        value = state.values[slot]
        value = value[0] if isinstance(value, list | tuple) else value
        shapes[slot] = value.shape if isinstance(value, Tensor) else torch.Size()
    return shapes
