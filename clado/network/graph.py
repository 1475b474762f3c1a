"""A network as a flat list of ATen operators that can be run in part: from the input or from a cut.

tracing.py decides once, in integers, what each operator reads, when a value is freed, where the run
can be cut, and along which axis the values alive there are stacked. Running is then a loop without
decisions.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from clado.errors import NetworkError
from clado.grids import ActivationGrid, QuantizedLayer
from clado.network.engine import Call, Engine, LayerPlace
from clado.network.tensors import logits_of

# Pure operators with an in-place form. It is used if the argument is new memory that is freed anyway, to save memory.
IN_PLACE = {
    torch.ops.aten.relu.default: torch.ops.aten.relu_.default,
    torch.ops.aten.hardtanh.default: torch.ops.aten.hardtanh_.default,
    torch.ops.aten.hardswish.default: torch.ops.aten.hardswish_.default,
    torch.ops.aten.silu.default: torch.ops.aten.silu_.default,
    torch.ops.aten.gelu.default: torch.ops.aten.gelu_.default,
    torch.ops.aten.add.Tensor: torch.ops.aten.add_.Tensor,
}
NUM_PROBES = -1  # the scalar slot with the number of stacked probes


@dataclass(frozen=True)
class Value:
    """Reads the value that an earlier operator computed."""

    slot: int
    """The number of the slot that holds it."""


@dataclass(frozen=True)
class Constant:
    """Reads a parameter, a buffer or a folded constant, unless a weight is put in its place."""

    slot: int
    """The number of the slot that holds it."""


@dataclass(frozen=True)
class Scalar:
    """Reads an integer that follows from the number of images."""

    slot: int
    """The number of the slot that holds it."""


@dataclass(frozen=True)
class Instruction:
    """One operator: where its arguments come from, where its result goes, and which values it frees."""

    function: Callable[..., Any]
    """The operator."""
    arguments: tuple[Any, ...]
    """Its arguments. Those that are read from a slot are a `Value`, `Constant` or `Scalar`."""
    keywords: Mapping[str, Any]
    """Its keyword arguments, in the same form."""
    slot: int
    """Where its result goes."""
    frees: tuple[int, ...]
    """Slots of the values that no later instruction reads."""
    name: str
    """Name of the exported node."""
    layers: tuple[int, ...] = ()
    """Searched layers whose weight this operator consumes: one, or the parts of a split weight."""


@dataclass
class GraphState:
    """A run that has reached an instruction."""

    values: dict[int, Tensor]
    """The values alive before instruction `position`: slot -> tensor."""
    position: int
    """The next instruction."""
    num_images: int
    """Images of all stacked probes."""
    probe_images: int
    """Images of one probe."""
    pending: Mapping[int, QuantizedLayer] = field(default_factory=dict)
    """Replaced layers that have uses from `position` on."""

    @property
    def stack_key(self) -> tuple[tuple[int, int], ...]:
        """The replaced layers that are still to be used. States with equal keys may be stacked."""
        return tuple((i, id(layer)) for i, layer in self.pending.items())


@dataclass(frozen=True)
class Norm:
    """A batch norm whose statistics nothing else reads."""

    position: int
    """The instruction that it is."""
    input_slot: int
    """Where its input is read."""
    mean: str
    """Name of the buffer of the running mean."""
    variance: str
    """Name of the buffer of the running variance."""
    eps: float
    """ε, which is added to the variance."""


@dataclass(frozen=True)
class GraphLayer(LayerPlace):
    """The place of a searched layer in a graph."""

    slots: tuple[int, ...]
    """Slots of the constants that hold the weight: several if it is tied."""
    bias_slot: int | None
    """Slot of the constant that holds the bias. None: the layer cannot have a bias."""
    last_use: int
    """The last instruction that reads the weight."""


@dataclass
class Graph(Engine[GraphState]):
    """A network ready to run in part. Each of `layers` may be replaced."""

    layers: tuple[GraphLayer, ...]
    """Searched layers in execution order."""
    instructions: tuple[Instruction, ...]
    """Operators in execution order."""
    constants: dict[int, Any]
    """Parameters, buffers and folded constants by slot. None for a bias that may be added."""
    scalars: Mapping[int, Callable[[int], int]]
    """Integers that follow from the number of images, by slot."""
    norms: tuple[Norm, ...]
    """Batch norms in execution order."""
    named: Mapping[str, tuple[int, ...]]
    """Slots of each parameter and buffer that operators read directly."""
    input_slot: int
    """Where the images are read."""
    output_slot: int
    """Where the logits go."""
    macs: int
    """Multiply-accumulates of one image."""
    unsearched: tuple[tuple[str, int, str], ...]
    """(name, bytes, why) of every parameter that is not searched."""

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Float weight of each layer."""
        return tuple(_rows_of(self.constants[place.slots[0]], place.rows) for place in self.layers)

    @property
    def biases(self) -> tuple[Tensor | None, ...]:
        """Float bias of each layer. None if it has no bias."""
        return tuple(
            None if place.bias_slot is None else _rows_of(self.constants[place.bias_slot], place.rows) for place in self.layers
        )

    @property
    def replaceable(self) -> frozenset[str]:
        """Names of parameters and buffers that `updated` takes."""
        return frozenset(self.named)

    def updated(self, named: Mapping[str, Tensor]) -> "Graph":
        """The same graph with other values of parameters and buffers, by name."""
        unknown = [name for name in named if name not in self.named]
        if unknown:
            raise NetworkError(f"{', '.join(unknown)} is not read directly by any operator; it cannot get another value")
        values = {slot: tensor for name, tensor in named.items() for slot in self.named[name]}
        return replace(self, constants={**self.constants, **values})

    def begin(self, images: Tensor) -> GraphState:
        """The state before the first layer."""
        return self.advance(self.start(images), 0, {})

    def start(self, images: Tensor) -> GraphState:
        """The state before the first instruction."""
        return GraphState({self.input_slot: images}, 0, len(images), len(images))

    def advance(self, state: GraphState, layer: int, replaced: Mapping[int, QuantizedLayer]) -> GraphState:
        """Runs to the cut before `layer`, or to the end if `layer` is the number of layers."""
        stop = self.layers[layer].cut.position if layer < len(self.layers) else len(self.instructions)
        return self.run(state, stop, replaced)

    def run(self, state: GraphState, stop: int, replaced: Mapping[int, QuantizedLayer]) -> GraphState:
        """Runs instructions up to `stop` with these layers replaced. `state` is not changed."""
        if stop < state.position:
            raise ValueError(f"a run at instruction {state.position} cannot go back to {stop}")
        values = dict(state.values)
        constants = self.constants
        replaced = {**state.pending, **replaced} if state.pending else replaced
        inputs: dict[int, ActivationGrid] = {}
        if replaced:
            constants = {**constants, **_replaced_constants(self, replaced)}
            inputs = {i: layer.activation for i, layer in replaced.items() if layer.activation is not None}
        scalars = {slot: rule(state.num_images) for slot, rule in self.scalars.items()}
        scalars[NUM_PROBES] = state.num_images // state.probe_images
        tables: dict[type, Mapping[int, Any]] = {Value: values, Constant: constants, Scalar: scalars}
        table_of = tables.get
        for step in self.instructions[state.position : stop]:
            # `resolved` written out, because this loop runs between every two operators
            arguments = [
                table[argument.slot] if (table := table_of(type(argument))) is not None else resolved(argument, tables)
                for argument in step.arguments
            ]
            if inputs and step.layers:
                grids = [inputs[i] for i in step.layers if i in inputs]
                if grids:  # the parts of a split weight read one input
                    arguments[0] = max(grids, key=lambda grid: grid.bits).fake_quantize(arguments[0])
            if step.keywords:
                keywords = {key: resolved(argument, tables) for key, argument in step.keywords.items()}
                values[step.slot] = step.function(*arguments, **keywords)
            else:
                values[step.slot] = step.function(*arguments)
            for slot in step.frees:
                del values[slot]
        pending = {i: layer for i, layer in replaced.items() if self.layers[i].last_use >= stop}
        return GraphState(values, stop, state.num_images, state.probe_images, pending)

    def observe(self, images: Tensor, layers: Collection[int], see: Callable[[int, Call], None]) -> None:
        """Runs images in float up to the last of these layers. `see` gets each layer with the call that reads its weight."""
        state = self.start(images)
        for position, step in enumerate(self.instructions):
            observed = [layer for layer in step.layers if layer in layers]
            if not observed:
                continue
            state = self.run(state, position, {})
            tables: dict[type, Mapping[int, Any]] = {Value: state.values, Constant: self.constants, Scalar: {}}
            rest = tuple(resolved(argument, tables) for argument in step.arguments[3:])
            x, weight = (resolved(argument, tables) for argument in step.arguments[:2])
            for layer in observed:
                see(layer, Call(x, step.function, rest, tuple(weight.shape)))

    def stack(self, states: Sequence[GraphState], layer: int) -> GraphState:
        """Stacks states with equal `stack_key` at the cut before `layer`: the images of one after those of the other."""
        first = states[0]
        if len(states) == 1:
            return first
        axes = self.layers[layer].cut.axes if layer < len(self.layers) else {self.output_slot: 0}
        values = {slot: torch.cat([state.values[slot] for state in states], axis) for slot, axis in axes.items()}
        total = sum(state.num_images for state in states)
        return GraphState(values, first.position, total, first.probe_images, first.pending)

    def output(self, state: GraphState) -> Tensor:
        """Logits (images, classes) of a finished run."""
        return logits_of(state.values[self.output_slot])


def resolved(argument: Any, tables: Mapping[type, Mapping[int, Any]]) -> Any:
    """An argument with its slots resolved. `tables` hold the values, constants and scalars by slot."""
    table = tables.get(type(argument))
    if table is not None:
        return table[argument.slot]
    if type(argument) is list:
        return [resolved(part, tables) for part in argument]
    return argument


def _rows_of(tensor: Any, rows: slice | None) -> Any:
    return tensor if tensor is None or rows is None else tensor[rows]


def _replaced_constants(graph: Graph, replaced: Mapping[int, QuantizedLayer]) -> dict[int, Tensor]:
    """The constants that replaced layers change: whole tensors, or rows of a copy."""
    changed: dict[int, Tensor] = {}

    def put(slot: int, rows: slice | None, tensor: Tensor) -> None:
        if rows is None:
            changed[slot] = tensor
            return
        whole = changed.get(slot)
        if whole is None:
            whole = changed[slot] = graph.constants[slot].clone()
        whole[rows] = tensor

    for i, layer in replaced.items():
        place = graph.layers[i]
        for slot in place.slots:
            put(slot, place.rows, layer.weight)
        if layer.bias is not None:
            if place.bias_slot is None:
                raise NetworkError(f"{place.layer.name} cannot have a bias")
            put(place.bias_slot, place.rows, layer.bias)
    return changed
