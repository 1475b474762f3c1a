"""Cross-layer equalisation: channels of a weight get equal ranges, and the float network stays what it is.

Dividing channel c of a layer's result by s_c and multiplying the next layer's input channel by it changes nothing where all that
lies between is positively homogeneous, f(x / s) = f(x) / s (Nagel et al., arXiv 1906.04721; Meller et al., arXiv 1902.01917). A
channel's share p_c is its range max |w| over the tensor's: how much it uses of a per-tensor grid. Three scales, each exact:

    between              divided by s                                multiplied by s        s
    layer, layer         output channels of the first, its bias      inputs of the second   √(p1 / p2): both shares become equal
    layer, batch norm    output channels, bias, mean; σ² + ε by s²                          p1: every share becomes 1
    batch norm, layer    γ and β                                     inputs of the layer    1 / p2: every share becomes 1

The first is the papers' √(r1 r2) / r2 with shares in place of ranges r, which tensors of any size and channels that may not be
scaled leave meaningful. A batch norm that is not folded makes their compromise between two layers needless: s ≤ 1 before it, so
that the new variance is above the old one, thus valid; s ≥ 1 behind it, so that activations shrink, away from any clip.
Quantizers with a range for each output channel gain from input channels alone. Rounds are repeated until no scale moves.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from clado.network.graph import Constant, Graph, Instruction, Norm, Value
from clado.network.network import Network
from clado.quantization.corrections import NetworkCorrection

LIMIT = 2.0**10  # a scale is within 1 / LIMIT .. LIMIT: beyond it a channel is as good as dead, and float has its limits too
HEADROOM = 0.9  # of a clip: scaling brings no activation nearer to it than this, since other images go beyond what was measured
ROUNDS = 200
TOLERANCE = 1e-8  # of the logarithm of a scale, in float64

_ELEMENTWISE = {"relu", "leaky_relu", "prelu", "clone", "contiguous", "alias", "detach"}
_CLIPS = {"relu6", "hardtanh", "clamp", "clamp_min", "clamp_max"}
_RESHAPES = {"reshape", "view", "flatten", "unsqueeze", "squeeze"}
_SPATIAL = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample_")
_REDUCTIONS = {"mean", "sum", "amax", "amin"}
_PADS = {"pad", "constant_pad_nd"}


@dataclass(frozen=True)
class Pair:
    """Two neighbours by name: what was done, or why nothing was. `second` is a layer, or the batch norm behind the first."""

    first: str
    second: str
    done: bool
    note: str

    def __str__(self) -> str:
        return f"{self.first} -> {self.second}: {'equalised' if self.done else 'skipped'}, {self.note}"


@dataclass(frozen=True, eq=False)
class Equalization:
    """New values of parameters and buffers, by the module's names, and a row for every pair in order of execution."""

    tensors: dict[str, Tensor]
    report: tuple[Pair, ...]


@torch.inference_mode(False)  # ordinary tensors, also where the caller is in inference mode
@torch.no_grad()
def equalize(network: Network, images: Sequence[Tensor]) -> Equalization:
    """Equalises neighbouring layers of a float network; apply with `network.updated(result.tensors)`.

    `images` are batches (n, C, H, W) of calibration images. They serve one purpose: a connection clipped from above, such as
    ReLU6, is homogeneous below its clip only, so a channel is scaled there only if its measured maximum is below the clip, and
    never so that it comes near. Elsewhere the float network is the same for every input, up to rounding.

    Scaled are connections of two searched layers whose values have no other reader, through ReLU, leaky ReLU, PReLU, pooling,
    zero padding, upsampling and reshapes that keep channels apart; depthwise and grouped convolutions included. Weights that are
    tied, split or fixed are left alone. A channel whose weights are all zero keeps scale 1.

    A layer has one row for the nearest layer that its result reaches, and one for the batch norm behind it where there is one.
    """
    graph = network.graph
    if not isinstance(graph, Graph):
        reason = "the network is run by whole forwards, which do not show what lies between two layers"
        return Equalization({}, (Pair("every layer", "every layer", False, reason),))
    example = network.example.to(network.device)
    survey = _Survey(graph, [_shapes(graph, example.repeat(n, *[1] * (example.ndim - 1))) for n in (2, 3)])
    found = list(survey.connections())
    clips = [clip for connection in found for clip in connection.clips]
    measured = dict(zip(clips, _maxima(graph, clips, [batch.to(network.device) for batch in images]), strict=True))
    values = {name: graph.constants[slots[0]] for name, slots in graph.named.items()}
    magnitudes: dict[str, Tensor] = {}
    for connection in found:
        connection.prepare(values, magnitudes, measured)
    scaled = [connection for connection in found if connection.reason is None]
    # batch norms take what they can first: that changes no activation
    scaled.sort(key=lambda connection: connection.columns is not None)
    for _ in range(ROUNDS):
        if max((connection.equalize(magnitudes) for connection in scaled), default=0.0) < TOLERANCE:
            break
    new: dict[str, Tensor] = {}
    for connection in scaled:
        connection.apply(values, new)
    typed = {name: tensor.to(values[name].dtype) for name, tensor in new.items()}
    tensors = {name: tensor for name, tensor in typed.items() if not torch.equal(tensor, values[name])}
    return Equalization(tensors, tuple(connection.row() for connection in found))


@dataclass(frozen=True)
class _Layout:
    """Where the channels of a value lie: index k of `axis` belongs to channel k // block."""

    axis: int
    block: int = 1


@dataclass(frozen=True)
class _Clip:
    """An operator that cuts its input off at `high`: its instruction, and its input's slot and layout."""

    position: int
    slot: int
    layout: _Layout
    high: float


@dataclass(frozen=True)
class _Side:
    """The output or the input channels of a weight, by name: a side of the weight's first axis, or of its second.

    With groups, channels of the second axis are (groups, length of the axis). `block` inputs make one channel: those of a
    linear operator behind a flattened image.
    """

    name: str
    axis: int
    groups: int = 1
    block: int = 1

    def ranges(self, magnitude: Tensor) -> Tensor:
        """max |w| of each channel, (channels,), of max |w| over the kernel."""
        if self.axis == 1:
            magnitude = magnitude.reshape(self.groups, -1, magnitude.shape[1]).transpose(1, 2).flatten(0, 1)
        return magnitude.reshape(-1, self.block * magnitude.shape[1]).amax(1)

    def spread(self, scale: Tensor, weight: Tensor) -> Tensor:
        """A scale for each channel, to be multiplied by a weight, or by its magnitude."""
        each = scale.repeat_interleave(self.block)
        if self.axis == 1:
            rows = each.reshape(self.groups, 1, -1).expand(-1, weight.shape[0] // self.groups, -1)
            return rows.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
        return each.reshape(-1, *[1] * (weight.ndim - 1))


@dataclass(eq=False)
class _Connection:
    """Channels that may be scaled on the way from `first` to `second`, or the reason why they may not.

    `rows` and the vectors `divided` are divided by the scale, `columns` multiplied; `variance` plus `eps` is divided by its
    square.
    """

    first: str
    second: str
    reason: str | None = None
    rows: _Side | None = None
    columns: _Side | None = None
    divided: tuple[str, ...] = ()
    variance: str | None = None
    eps: float = 0.0
    clips: tuple[_Clip, ...] = ()
    frozen: int = 0
    scale: Tensor = field(default_factory=lambda: torch.ones(0))
    least: Tensor = field(default_factory=lambda: torch.ones(0))
    most: Tensor = field(default_factory=lambda: torch.ones(0))

    def prepare(
        self, values: Mapping[str, Tensor], magnitudes: dict[str, Tensor], measured: Mapping[_Clip, Tensor | None]
    ) -> None:
        """Puts down max |w| over the kernel of its weights, float64, and how far each channel may be scaled."""
        sides = [side for side in (self.rows, self.columns) if side is not None]
        if self.reason is not None:
            return
        for side in sides:
            if side.name not in magnitudes:
                weight = values[side.name].abs().double()
                magnitudes[side.name] = weight.flatten(2).amax(2) if weight.ndim > 2 else weight
        self.scale = torch.ones_like(sides[0].ranges(magnitudes[sides[0].name]))
        self.least, self.most = self.scale / LIMIT, self.scale * LIMIT
        for clip in self.clips:
            maximum = measured[clip]
            if maximum is None:
                self.reason = f"a clip at {clip.high:g} lies between, and there are no images to measure the maximum on"
                return
            free = maximum < clip.high
            self.least = torch.where(free, torch.maximum(self.least, (maximum / (HEADROOM * clip.high)).clamp(max=1.0)), 1.0)
            self.most = torch.where(free, self.most, 1.0)
        self.frozen = int((self.most == 1.0).sum())
        if self.frozen == len(self.most):
            self.reason = f"the measured maximum of every channel reaches the clip at {self.clips[0].high:g}"

    def equalize(self, magnitudes: dict[str, Tensor]) -> float:
        """Scales every channel as its ranges have it; the largest |log| of what changed."""
        wanted = self.scale.clone()
        alive = torch.ones_like(self.scale, dtype=torch.bool)
        for side, sign in ((self.rows, 1.0), (self.columns, -1.0)):
            if side is not None:
                ranges = side.ranges(magnitudes[side.name])
                alive &= ranges > 0
                share = torch.where(ranges > 0, ranges / ranges.max(), 1.0)
                wanted *= share ** (sign if self.rows is None or self.columns is None else sign / 2)
        wanted = torch.where(alive, wanted.clamp(self.least, self.most), self.scale)
        step = wanted / self.scale
        self.scale = wanted
        for side, factor in ((self.rows, 1 / step), (self.columns, step)):
            if side is not None:
                magnitude = magnitudes[side.name]
                magnitudes[side.name] = magnitude * side.spread(factor, magnitude)
        return float(step.log().abs().max())

    def apply(self, values: Mapping[str, Tensor], new: dict[str, Tensor]) -> None:
        """Puts what follows from the scale into `new`, in float64."""

        def current(name: str) -> Tensor:
            return new[name] if name in new else values[name].double()

        for side, factor in ((self.rows, 1 / self.scale), (self.columns, self.scale)):
            if side is not None:
                weight = current(side.name)
                new[side.name] = weight * side.spread(factor, weight)
        for name in self.divided:
            new[name] = current(name) / self.scale
        if self.variance is not None:
            variance = current(self.variance)
            scaled = (variance + self.eps) / self.scale.square() - self.eps
            new[self.variance] = torch.where(self.scale == 1, variance, scaled)

    def row(self) -> Pair:
        """What the report says."""
        if self.reason is not None:
            return Pair(self.first, self.second, False, self.reason)
        note = f"{len(self.scale)} channels, scales {float(self.scale.min()):.3g} to {float(self.scale.max()):.3g}"
        if self.frozen:
            note += f"; {self.frozen} keep theirs: their measured maximum reaches the clip at {self.clips[0].high:g}"
        return Pair(self.first, self.second, True, note)


@dataclass
class _Path:
    """The way of a layer's result to the one operator with a weight that reads it, or what is in the way."""

    layout: _Layout
    slot: int
    norm: Norm | None = None
    clips: list[_Clip] = field(default_factory=list)
    second: int | None = None
    reason: str | None = None


class _Survey:
    """What a graph's operators read, and the connections of its layers. `shapes` are those of runs of two and of three images."""

    def __init__(self, graph: Graph, shapes: Sequence[dict[int, torch.Size]]) -> None:
        self.graph = graph
        self.shapes = shapes
        self.readers: dict[int, list[int]] = defaultdict(list)
        self.uses: Counter[int] = Counter()  # of a tensor, by address: tied names are one
        self.names = {slot: name for name, slots in graph.named.items() for slot in slots}
        self.norms = {norm.position: norm for norm in graph.norms}
        for position, step in enumerate(graph.instructions):
            for argument in _leaves(step):
                if isinstance(argument, Value):
                    self.readers[argument.slot].append(position)
                elif isinstance(argument, Constant) and isinstance(graph.constants[argument.slot], Tensor):
                    self.uses[graph.constants[argument.slot].data_ptr()] += 1

    def connections(self) -> Iterator[_Connection]:
        """One for every batch norm that alone reads a layer's result, and one to the nearest layer, in order of execution."""
        for position, step in enumerate(self.graph.instructions):
            for layer in step.layers:
                name = self.graph.layers[layer].name
                path = self._path(position)
                if path.norm is not None:
                    yield self._to_norm(name, layer, position, path.norm)
                nearest = path.second if path.second is not None else self._nearest(position)
                if nearest is not None:
                    yield self._to_layer(name, layer, position, path, nearest)

    # -- one connection ----------------------------------------------------------------------------------------------------

    def _to_norm(self, name: str, layer: int, position: int, norm: Norm) -> _Connection:
        rows, bias, reason = self._outputs(layer, position)
        behind = self._changeable(norm.mean) or self._changeable(norm.variance)
        batch_norm = norm.mean.rpartition(".")[0] or norm.mean
        if reason or behind:
            return _Connection(name, batch_norm, reason or behind)
        return _Connection(name, batch_norm, None, rows, None, (*bias, norm.mean), norm.variance, norm.eps)

    def _to_layer(self, name: str, layer: int, position: int, path: _Path, nearest: int) -> _Connection:
        rows, divided, reason = self._outputs(layer, position)
        if path.norm is not None:
            rows = None
            weight, bias = self.graph.instructions[path.norm.position].arguments[1:3]
            if reason is None and weight is None:
                reason = "the batch norm between them has no scale of its own"
            vectors = [argument for argument in (weight, bias) if argument is not None]
            divided = tuple(self.names.get(vector.slot, "") if isinstance(vector, Constant) else "" for vector in vectors)
            reason = reason or next((fault for fault in map(self._changeable, divided) if fault), None)
        second = self._name(nearest)
        columns, fault = (None, None) if path.second is None else self._inputs(nearest, path)
        reason = reason or path.reason or fault
        if reason is not None:
            return _Connection(name, second, reason)
        return _Connection(name, second, None, rows, columns, divided, clips=tuple(path.clips))

    def _outputs(self, layer: int, position: int) -> tuple[_Side | None, tuple[str, ...], str | None]:
        """(output channels of a layer's weight, its bias by name, why they cannot be scaled)."""
        step = self.graph.instructions[position]
        fault = self._weight_fault(layer, step)
        bias = step.arguments[2] if len(step.arguments) > 2 else None
        biases: tuple[str, ...] = ()
        if fault is None and bias is not None and not (isinstance(bias, Constant) and self.graph.constants[bias.slot] is None):
            biases = (self.names.get(bias.slot, "") if isinstance(bias, Constant) else "",)
            fault = self._changeable(*biases)
        transposed, groups = _form(step)
        side = _Side(self.graph.parameters[layer][0], 1, groups) if transposed else _Side(self.graph.parameters[layer][0], 0)
        return side, biases, fault

    def _inputs(self, position: int, path: _Path) -> tuple[_Side | None, str | None]:
        """(input channels of a layer's weight, why they cannot be scaled)."""
        step = self.graph.instructions[position]
        if not step.layers:
            return None, f"{self._name(position)} is not searched"
        fault = self._weight_fault(step.layers[0], step)
        if fault:
            return None, fault
        name = self.graph.parameters[step.layers[0]][0]
        transposed, groups = _form(step)
        shape = self.shapes[0][path.slot]
        kernel = 0 if _operator(step) == "linear" else self.graph.constants[step.arguments[1].slot].ndim - 2
        if path.layout.axis != len(shape) - 1 - kernel:
            return None, f"channels of {self.graph.layers[step.layers[0]].name} lie on another axis"
        block = path.layout.block
        return (_Side(name, 0, 1, block) if transposed else _Side(name, 1, groups, block)), None

    def _weight_fault(self, layer: int, step: Instruction) -> str | None:
        name, rows = self.graph.parameters[layer]
        if rows is not None or len(step.layers) > 1:
            return f"{name} is split"
        weight = step.arguments[1]
        if not isinstance(weight, Constant) or weight.slot not in self.graph.slots[layer]:
            return f"{name} passes through other operators before it is used"
        return self._changeable(name)

    def _changeable(self, name: str) -> str | None:
        """Why a parameter or buffer cannot be given another value; None where it can."""
        if name not in self.graph.named:
            return f"{name or 'a bias or a scale'} cannot be given another value"
        uses = self.uses[self.graph.constants[self.graph.named[name][0]].data_ptr()]
        return f"{name} is tied: it is used {uses} times" if uses > 1 else None

    def _name(self, position: int) -> str:
        """The layer whose weight an operator uses, searched or not."""
        step = self.graph.instructions[position]
        if step.layers:
            return self.graph.layers[step.layers[0]].name
        weight = step.arguments[1]
        return self.names.get(weight.slot, step.name) if isinstance(weight, Constant) else step.name

    # -- the way between two layers ----------------------------------------------------------------------------------------

    def _nearest(self, position: int) -> int | None:
        """The first operator with a weight that is reached by the result at `position`, over whatever lies between."""
        reached = {self.graph.instructions[position].slot}
        for k in range(position + 1, len(self.graph.instructions)):
            step = self.graph.instructions[k]
            if reached.intersection(_read(step)):
                if _has_weight(step):
                    return k
                reached.add(step.slot)
        return None

    def _path(self, position: int) -> _Path:
        step = self.graph.instructions[position]
        axis = len(self.shapes[0][step.slot]) - 1 if _operator(step) == "linear" else 1
        path = _Path(_Layout(axis), step.slot)
        while path.second is None and path.reason is None:
            self._advance(path, first=step)
        return path

    def _advance(self, path: _Path, first: Instruction) -> None:
        """Moves a path past the one operator that reads its value, or to its end."""
        readers = self.readers[path.slot]
        if len(readers) != 1 or path.slot == self.graph.output_slot:
            names = dict.fromkeys(map(self._called, readers))
            path.reason = f"a value between them has other readers: {', '.join([*names, *self._is_output(path.slot)])}"
            return
        k = readers[0]
        step = self.graph.instructions[k]
        operator = _operator(step)
        if step.arguments[:1] != (Value(path.slot),) or (len(_read(step)) > 1 and not _has_weight(step)):
            path.reason = f"{operator} joins it with other values"
        elif _has_weight(step):
            path.second = k
        elif k in self.norms and isinstance(step.arguments[3], Constant):
            if path.slot != first.slot or path.layout != _Layout(1):
                path.reason = "a batch norm lies between them that is not right behind the first"
            else:
                path.norm, path.slot = self.norms[k], step.slot
        elif operator.startswith("batch_norm"):
            path.reason = "a batch norm lies between them whose statistics are not its own"
        else:
            self._pass(path, k, operator)

    def _pass(self, path: _Path, position: int, operator: str) -> None:
        """Moves a path past an operator without weights."""
        step = self.graph.instructions[position]
        layouts = {_behind(operator, step, path.layout, shapes[path.slot], shapes[step.slot]) for shapes in self.shapes}
        layout = layouts.pop()
        if layout is None or layouts:  # or it depends on how many images there are
            path.reason = f"{operator} is not positively homogeneous in each channel, or not known to be"
            return
        if operator in _CLIPS:
            low, high = _limits(operator, step)
            if step.keywords or low not in (None, 0) or not (high is None or (isinstance(high, int | float) and high > 0)):
                path.reason = f"{operator} is not positively homogeneous with the bounds it has"
                return
            if high is not None:
                path.clips.append(_Clip(position, path.slot, path.layout, float(high)))
        path.layout, path.slot = layout, step.slot

    def _is_output(self, slot: int) -> list[str]:
        return ["the output"] if slot == self.graph.output_slot else []

    def _called(self, position: int) -> str:
        step = self.graph.instructions[position]
        return self._name(position) if _has_weight(step) else _operator(step)


def _operator(step: Instruction) -> str:
    """relu for aten.relu_.default; a function of our own by its name."""
    parts = str(step.function).split(".")
    return parts[1].removesuffix("_") if parts[0] == "aten" else getattr(step.function, "__name__", str(step.function)).strip("_")


def _has_weight(step: Instruction) -> bool:
    operator = _operator(step)
    return bool(step.layers) or operator.startswith("conv") or operator == "linear"


def _form(step: Instruction) -> tuple[bool, int]:
    """(whether a layer is a transposed convolution, its groups); both kinds have their groups at the same place."""
    groups = step.arguments[6] if len(step.arguments) > 6 else 1
    return _operator(step).startswith("conv_transpose"), int(groups)


def _leaves(step: Instruction) -> Iterator[Any]:
    """Every argument, those in lists too."""

    def leaves(argument: Any) -> Iterator[Any]:
        if isinstance(argument, list | tuple):
            for part in argument:
                yield from leaves(part)
        else:
            yield argument

    yield from leaves([step.arguments, list(step.keywords.values())])


def _read(step: Instruction) -> list[int]:
    """Slots of the values that an operator reads."""
    return [argument.slot for argument in _leaves(step) if isinstance(argument, Value)]


def _limits(operator: str, step: Instruction) -> tuple[Any, Any]:
    """(least, largest) value that a clip lets pass, None without one; a tensor where the graph has one."""
    low, high = [*step.arguments[1:3], None, None][:2]
    if operator == "relu6":
        return 0.0, 6.0
    if operator == "hardtanh" and len(step.arguments) == 1:
        return -1.0, 1.0
    return (None, low) if operator == "clamp_max" else (low, high)


def _behind(operator: str, step: Instruction, layout: _Layout, before: torch.Size, after: torch.Size) -> _Layout | None:
    """Where channels lie behind an operator that is positively homogeneous in each channel; None for any other."""
    if operator in _ELEMENTWISE or operator in _CLIPS or (operator == "getitem" and step.arguments[1] == 0):
        return layout
    if operator in _RESHAPES:
        return _reshaped(layout, before, after)
    if operator in _REDUCTIONS:
        return _reduced(step, layout, before, after)
    last = _last_axes(operator, step)
    return layout if last is not None and layout.axis < len(before) - last else None


def _reshaped(layout: _Layout, before: torch.Size, after: torch.Size) -> _Layout | None:
    """Behind a change of shape in row-major order: channels are runs of equal length there, in a period that stays."""
    inner = prod(before[layout.axis + 1 :])
    run, period = inner * layout.block, inner * before[layout.axis]
    for axis, length in enumerate(after):
        rest = prod(after[axis + 1 :])
        if rest * length == period and run % rest == 0:
            return _Layout(axis, run // rest)
    return None


def _reduced(step: Instruction, layout: _Layout, before: torch.Size, after: torch.Size) -> _Layout | None:
    """Behind a sum, mean or extremum over axes that are neither images nor channels."""
    axes = step.arguments[1] if len(step.arguments) > 1 else None
    reduced = {n % len(before) for n in axes} if isinstance(axes, list) else set()
    if not reduced or reduced & {0, layout.axis}:
        return None
    gone = 0 if len(after) == len(before) else sum(n < layout.axis for n in reduced)
    return _Layout(layout.axis - gone, layout.block)


def _last_axes(operator: str, step: Instruction) -> int | None:
    """How many of the last axes an operator acts on, in each channel alike and positively homogeneous; None for any other."""
    if operator.startswith(_SPATIAL):
        return next((n for n in (1, 2, 3) if operator.endswith((f"{n}d", f"{n}d_with_indices"))), None)
    value = step.arguments[-1] if operator in _PADS else None
    is_zero = not isinstance(value, int | float) or value == 0
    return len(step.arguments[1]) // 2 if operator in _PADS and is_zero else None


@torch.inference_mode()
def _shapes(graph: Graph, images: Tensor) -> dict[int, torch.Size]:
    """Shape of every value of a run, by slot; of a tuple that of its first part."""
    state = graph.begin(images)
    shapes = {}
    for position in range(state.position, len(graph.instructions)):
        slot = graph.instructions[position].slot
        state = graph.run(state, position + 1, {})
        value = state.values[slot]
        value = value[0] if isinstance(value, list | tuple) else value
        shapes[slot] = value.shape if isinstance(value, Tensor) else torch.Size()
    return shapes


@torch.inference_mode()
def _maxima(graph: Graph, clips: Sequence[_Clip], images: Sequence[Tensor]) -> list[Tensor | None]:
    """The largest value that each channel brings to each clip, (channels,); None without images."""
    found: dict[_Clip, Tensor] = {}
    for batch in images if clips else ():
        state = graph.begin(batch)
        for clip in sorted(clips, key=lambda clip: clip.position):
            state = graph.run(state, clip.position, {})
            value = state.values[clip.slot].movedim(clip.layout.axis, 0)
            largest = value.reshape(value.shape[0] // clip.layout.block, -1).amax(1).double()
            found[clip] = torch.maximum(found[clip], largest) if clip in found else largest
    return [found.get(clip) for clip in clips]


correction = NetworkCorrection(equalize)
