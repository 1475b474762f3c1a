"""A network as a flat list of ATen operators that can be run in part: from the input or from the values alive at a cut.

tracing.py decides once, in integers, what each operator reads, when a value dies, where the run may be cut and along which axis
the values alive there can be stacked. Running is then a loop without decisions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from clado.errors import NetworkError
from clado.grids import ActivationGrid, QuantizedLayer
from clado.space import Layer

# Pure operators with an in-place twin, used where the argument is fresh and dies: it saves a pass over new memory.
IN_PLACE = {
    torch.ops.aten.relu.default: torch.ops.aten.relu_.default,
    torch.ops.aten.hardtanh.default: torch.ops.aten.hardtanh_.default,
    torch.ops.aten.hardswish.default: torch.ops.aten.hardswish_.default,
    torch.ops.aten.silu.default: torch.ops.aten.silu_.default,
    torch.ops.aten.gelu.default: torch.ops.aten.gelu_.default,
    torch.ops.aten.add.Tensor: torch.ops.aten.add_.Tensor,
}
NUM_PROBES = -1  # the scalar slot that holds how many probes are stacked


@dataclass(frozen=True)
class Value:
    """Reads the value that an earlier operator computed."""

    slot: int


@dataclass(frozen=True)
class Constant:
    """Reads a parameter, a buffer or a folded constant, unless a weight is put in its place."""

    slot: int


@dataclass(frozen=True)
class Scalar:
    """Reads an integer that follows from the number of images."""

    slot: int


@dataclass(frozen=True)
class Call:
    """One use of a layer's weight: its input, the operator, the operator's arguments behind the bias, and the shape in which it
    reads the weight, which a view may have changed."""

    input: Tensor
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    weight_shape: tuple[int, ...]

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What the operator makes of an input, a weight and a bias."""
        result: Tensor = self.function(x, weight, bias, *self.arguments)
        return result


@dataclass(frozen=True)
class Instruction:
    """One operator: where its arguments come from, where its result goes, and which values die with it."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    slot: int
    frees: tuple[int, ...]
    name: str
    layers: tuple[int, ...] = ()
    """Searched layers whose weight this operator consumes: one, or the parts of a split weight."""


@dataclass
class State:
    """The values alive before instruction `position`, for `num_images` stacked images: slot -> tensor.

    `pending` holds replaced layers that have uses from `position` on; `probe_images` is how many images one probe has.
    """

    values: dict[int, Tensor]
    position: int
    num_images: int
    probe_images: int
    pending: Mapping[int, QuantizedLayer] = field(default_factory=dict)


@dataclass(frozen=True)
class Norm:
    """A batch norm: the instruction that it is, the slot of its input, the names of its statistics, and its ε."""

    position: int
    input_slot: int
    mean: str
    variance: str
    eps: float


Moments = tuple[Tensor, Tensor]  # mean and variance of each channel, (channels,) each


@dataclass(frozen=True)
class NormStatistics:
    """The statistics that a batch norm has, and those of what it sees, over all images and positions."""

    mean: str
    """Name of the buffer of the running mean."""
    variance: str
    """Name of the buffer of the running variance."""
    eps: float
    trained: Moments
    """What the network has."""
    seen: Moments
    """What was measured."""


Statistics = Callable[[NormStatistics], Moments]


def as_seen(norm: NormStatistics) -> Moments:
    """The statistics of what a batch norm sees, in place of those that it has."""
    return norm.seen


@dataclass(frozen=True)
class Cut:
    """Where a run may be resumed for a layer: before instruction `position`, with these values alive (slot -> axis of images)."""

    position: int
    axes: Mapping[int, int]
    bytes_per_image: int
    suffix_macs: int
    peak_bytes_per_image: int


@dataclass(frozen=True, eq=False)
class Fold:
    """How a layer takes in the batch norm behind it: weight · γ/σ, and bias · γ/σ + β − μ γ/σ, each (channels,) in float64."""

    weight_factor: Tensor
    factor: Tensor
    shift: Tensor

    def __call__(self, layer: QuantizedLayer) -> QuantizedLayer:
        """The folded layer: no longer on its grid; a bias of None stays the network's own, which is folded already."""
        weight = (layer.weight.double() * self.weight_factor).to(layer.weight.dtype)
        bias = None if layer.bias is None else self.shifted(layer.bias, weight)
        return QuantizedLayer(laid_out_like(weight, layer.weight), bias, layer.activation)

    def shifted(self, bias: Tensor | None, like: Tensor) -> Tensor:
        """The folded bias, in the weight's type."""
        return (self.shift if bias is None else bias.double() * self.factor + self.shift).to(like.dtype)


@dataclass
class Graph:
    """A network ready to run in part. `layers[i]` may be replaced; `cuts[i]` is the last position before its first use.

    `slots[i]` are where its weight is read, `rows[i]` which rows of that tensor are its own (None: all), `bias_slots[i]` where
    its bias is read (None: it can have none of its own), `last_uses[i]` the last instruction that reads it. `named` gives
    the slots of each parameter and buffer that operators read as it is. `parameters[i]` is the module's name of the weight and
    its rows, `bias_names[i]` that of its bias, `norm_means[i]` that of the mean of the batch norm that alone reads its result.
    """

    layers: tuple[Layer, ...]
    cuts: tuple[Cut, ...]
    instructions: tuple[Instruction, ...]
    constants: dict[int, Any]
    slots: tuple[tuple[int, ...], ...]
    rows: tuple[slice | None, ...]
    bias_slots: tuple[int | None, ...]
    last_uses: tuple[int, ...]
    norms: tuple[Norm, ...]
    named: Mapping[str, tuple[int, ...]]
    parameters: tuple[tuple[str, slice | None], ...]
    bias_names: tuple[str | None, ...]
    norm_means: tuple[str | None, ...]
    input_slot: int
    output_slot: int
    macs: int
    unsearched: tuple[tuple[str, int, str], ...]
    scalars: Mapping[int, Callable[[int], int]]
    _scalars_of: dict[int, dict[int, int]] = field(default_factory=dict)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Float weight of each layer."""
        return tuple(
            self.constants[slots[0]][rows] if rows is not None else self.constants[slots[0]]
            for slots, rows in zip(self.slots, self.rows, strict=True)
        )

    @property
    def biases(self) -> tuple[Tensor | None, ...]:
        """Float bias of each layer, None where it has none of its own."""
        found: list[Tensor | None] = []
        for slot, rows in zip(self.bias_slots, self.rows, strict=True):
            bias = None if slot is None else self.constants[slot]
            found.append(bias[rows] if bias is not None and rows is not None else bias)
        return tuple(found)

    @property
    def takes_bias(self) -> tuple[bool, ...]:
        """Whether a layer's bias may be replaced, or given to it."""
        return tuple(
            slot is not None and (rows is None or self.constants[slot] is not None)
            for slot, rows in zip(self.bias_slots, self.rows, strict=True)
        )

    @property
    def replaceable(self) -> frozenset[str]:
        """Names of parameters and buffers that `updated` takes."""
        return frozenset(self.named)

    def updated(self, named: Mapping[str, Tensor]) -> "Graph":
        """The same graph with other values of parameters and buffers, by name."""
        unknown = [name for name in named if name not in self.named]
        if unknown:
            raise NetworkError(f"{', '.join(unknown)} is not read as it is by any operator; it cannot be given another value")
        values = {slot: tensor for name, tensor in named.items() for slot in self.named[name]}
        return replace(self, constants={**self.constants, **values})

    def with_batch_statistics(self) -> "Graph":
        """The same graph with every batch norm on the statistics of each probe's own images, also where probes are stacked."""
        steps = list(self.instructions)
        for norm in self.norms:
            step = steps[norm.position]
            x, weight, bias, *_ = step.arguments
            arguments = (x, weight, bias, norm.eps, Scalar(NUM_PROBES))
            steps[norm.position] = replace(step, function=_batch_norm_of_probes, arguments=arguments)
        return replace(self, instructions=tuple(steps))

    def normalisation(
        self, batches: Sequence[Tensor], replaced: Mapping[int, QuantizedLayer], statistics: Statistics = as_seen
    ) -> dict[str, Tensor]:
        """What `statistics` makes of those that batch norms see with layers replaced, by buffer name, in execution order."""
        graph, found = self, dict[str, Tensor]()
        # from the images on: a layer before the first batch norm may be none that is searched
        states = [State({self.input_slot: batch}, 0, len(batch), len(batch)) for batch in batches]
        for norm in self.norms:
            states = [graph.run(state, norm.position, replaced) for state in states]
            seen = [state.values[norm.input_slot] for state in states]
            trained = tuple(self.constants[self.named[name][0]] for name in (norm.mean, norm.variance))
            moments = pooled_moments(seen, trained[0].dtype)
            of_norm = NormStatistics(norm.mean, norm.variance, norm.eps, (trained[0], trained[1]), moments)
            found[norm.mean], found[norm.variance] = statistics(of_norm)
            graph = graph.updated({name: found[name] for name in (norm.mean, norm.variance)})
        return found

    def folded(self) -> tuple["Graph", dict[int, Fold]]:
        """The same graph with batch norms inside the layers before them, and how to fold what replaces such a layer.

        Folded are batch norms that alone read the result of a layer with one use, where no run is resumed in between. Their
        instructions stay, as identities, so positions and cuts are the same; results are, up to rounding.
        """
        folds: dict[int, Fold] = {}
        constants, steps = dict(self.constants), list(self.instructions)
        cuts = {cut.position for cut in self.cuts}
        for i, mean_name in enumerate(self.norm_means):
            if mean_name is None or self.rows[i] is not None:
                continue
            norm = next(norm for norm in self.norms if norm.mean == mean_name)
            use = self.last_uses[i]
            bias_slot = self.bias_slots[i]
            # between the two a stored value would be changed in place by what follows the batch norm
            if bias_slot is None or any(use < position <= norm.position + 1 for position in cuts):
                continue
            _, gamma, beta, mean, variance, *_ = (_resolve(a, {Constant: constants}) for a in steps[norm.position].arguments)
            factor = (variance.double() + norm.eps).rsqrt() * (1.0 if gamma is None else gamma.double())
            shape = [1] * constants[self.slots[i][0]].ndim
            shape[self.layers[i].channel_axis] = -1
            if len(factor) != self.layers[i].num_channels:  # a grouped transposed convolution has more channels than its axis
                continue
            shift = -mean.double() * factor + (0.0 if beta is None else beta.double())
            fold = folds[i] = Fold(factor.reshape(shape), factor, shift)
            float_layer = QuantizedLayer(constants[self.slots[i][0]], constants[bias_slot])
            folded = fold(float_layer)
            constants |= dict.fromkeys(self.slots[i], folded.weight)
            constants[bias_slot] = fold.shifted(constants[bias_slot], folded.weight)
            steps[norm.position] = replace(steps[norm.position], function=_identity, arguments=steps[norm.position].arguments[:1])
        return replace(self, constants=constants, instructions=tuple(steps), _scalars_of={}), folds

    def differentiable(self) -> "Graph":
        """The same graph for autograd: no operator writes over what a gradient needs, no constant is of inference mode."""
        twins = {twin: function for function, twin in IN_PLACE.items()}
        steps = tuple(
            replace(step, function=twins.get(step.function, step.function))  # type: ignore[call-overload]
            for step in self.instructions
        )
        constants = {slot: outside_inference(value) for slot, value in self.constants.items()}
        return replace(self, constants=constants, instructions=steps)

    def begin(self, images: Tensor) -> State:
        """The state before the first layer."""
        return self.advance(State({self.input_slot: images}, 0, len(images), len(images)), 0, {})

    def advance(self, state: State, layer: int, replaced: Mapping[int, QuantizedLayer]) -> State:
        """Runs to the cut before `layer`, or to the end where that is the number of layers."""
        return self.run(state, self.cuts[layer].position if layer < len(self.cuts) else len(self.instructions), replaced)

    def run(self, state: State, stop: int, replaced: Mapping[int, QuantizedLayer]) -> State:
        """Runs instructions up to `stop` with these layers replaced; `state` is left as it is."""
        if stop < state.position:
            raise ValueError(f"a run at instruction {state.position} cannot go back to {stop}")
        values = dict(state.values)
        constants = self.constants
        replaced = {**state.pending, **replaced} if state.pending else replaced
        inputs: dict[int, ActivationGrid] = {}
        if replaced:
            constants = {**constants, **self._put(replaced)}
            inputs = {i: layer.activation for i, layer in replaced.items() if layer.activation is not None}
        scalars = self._scalars_of.get(state.num_images)
        if scalars is None:
            scalars = {slot: rule(state.num_images) for slot, rule in self.scalars.items()}
            self._scalars_of[state.num_images] = scalars
        num_probes = state.num_images // state.probe_images
        if num_probes != scalars.get(NUM_PROBES):
            scalars = {**scalars, NUM_PROBES: num_probes}
        tables: dict[type, Mapping[int, Any]] = {Value: values, Constant: constants, Scalar: scalars}
        table_of = tables.get
        for step in self.instructions[state.position : stop]:
            # `_resolve` written out: this is what there is between two operators
            arguments = [
                table[argument.slot] if (table := table_of(type(argument))) is not None else _resolve(argument, tables)
                for argument in step.arguments
            ]
            if inputs and step.layers:
                grids = [inputs[i] for i in step.layers if i in inputs]
                if grids:  # the parts of a split weight read one input
                    arguments[0] = max(grids, key=lambda grid: grid.bits).fake_quantize(arguments[0])
            if step.keywords:
                keywords = {key: _resolve(argument, tables) for key, argument in step.keywords.items()}
                values[step.slot] = step.function(*arguments, **keywords)
            else:
                values[step.slot] = step.function(*arguments)
            for slot in step.frees:
                del values[slot]
        pending = {i: layer for i, layer in replaced.items() if self.last_uses[i] >= stop}
        return State(values, stop, state.num_images, state.probe_images, pending)

    def _put(self, replaced: Mapping[int, QuantizedLayer]) -> dict[int, Tensor]:
        """Constants that replaced layers change: whole tensors, or rows of a copy."""
        changed: dict[int, Tensor] = {}

        def put(slot: int, rows: slice | None, tensor: Tensor) -> None:
            if rows is None:
                changed[slot] = tensor
                return
            whole = changed.get(slot)
            if whole is None:
                whole = changed[slot] = self.constants[slot].clone()
            whole[rows] = tensor

        for i, layer in replaced.items():
            for slot in self.slots[i]:
                put(slot, self.rows[i], layer.weight)
            bias_slot = self.bias_slots[i]
            if layer.bias is not None:
                if bias_slot is None:
                    raise NetworkError(f"{self.layers[i].name} cannot have a bias of its own")
                put(bias_slot, self.rows[i], layer.bias)
        return changed

    def stack_key(self, state: State) -> tuple[tuple[int, int], ...]:
        """States may be stacked where this is equal: the replaced layers that they have yet to use."""
        return tuple((i, id(layer)) for i, layer in state.pending.items())

    def observe(self, state: State, layer: int) -> list[Call]:
        """The calls that consume a layer's weight in a float run that goes on from a state, in order of execution."""
        calls = []
        for position, step in enumerate(self.instructions):
            if layer not in step.layers:
                continue
            state = self.run(state, position, {})
            tables: dict[type, Mapping[int, Any]] = {Value: state.values, Constant: self.constants, Scalar: {}}
            rest = tuple(_resolve(argument, tables) for argument in step.arguments[3:])
            x, weight = (_resolve(argument, tables) for argument in step.arguments[:2])
            calls.append(Call(x, step.function, rest, tuple(weight.shape)))
        return calls

    def stack(self, states: Sequence[State], layer: int) -> State:
        """Several states at the cut before `layer` as one, images after images; at the end for the number of layers."""
        first = states[0]
        if len(states) == 1:
            return first
        axes = self.cuts[layer].axes if layer < len(self.cuts) else {self.output_slot: 0}
        values = {slot: torch.cat([state.values[slot] for state in states], axis) for slot, axis in axes.items()}
        total = sum(state.num_images for state in states)
        return State(values, first.position, total, first.probe_images, first.pending)

    def output(self, state: State) -> Tensor:
        """Logits (images, classes) of a finished run."""
        return logits_of(state.values[self.output_slot])


def _resolve(argument: Any, tables: Mapping[type, Mapping[int, Any]]) -> Any:
    table = tables.get(type(argument))
    if table is not None:
        return table[argument.slot]
    if type(argument) is list:
        return [_resolve(part, tables) for part in argument]
    return argument


def pooled_moments(batches: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and variance (unbiased, as batch norm keeps it) of each channel over batches (n, channels, ...), in a type.

    Sums over one image are taken in float32 at least, which is several times as fast, those over images in float64.
    """

    def total(values: Tensor) -> Tensor:
        return (values.sum(list(range(2, values.ndim))) if values.ndim > 2 else values).double().sum(0)

    count = sum(batch.numel() // batch.shape[1] for batch in batches)
    inner = torch.promote_types(batches[0].dtype, torch.float32)
    mean = torch.stack([total(batch.to(inner)) for batch in batches]).sum(0) / count
    centre = mean.to(inner)
    around = centre.reshape([1, -1, *[1] * (batches[0].ndim - 2)])
    squares = torch.stack([total((batch.to(inner) - around).square_()) for batch in batches]).sum(0)
    squares -= count * (mean - centre.double()).square()  # the squares are around a rounded mean
    return mean.to(dtype), (squares / max(1, count - 1)).to(dtype)


def logits_of(value: Any) -> Tensor:
    """What a network returned, refused unless it is one tensor (images, classes)."""
    if not isinstance(value, Tensor) or value.ndim != 2:
        raise NetworkError(
            f"the network returns {getattr(value, 'shape', type(value).__name__)}; expected logits (images, classes)"
        )
    return value


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> tuple[Tensor]:
    """Batch norm in eval mode, with the result of a tuple that the exported operator has."""
    return (torch.ops.aten.batch_norm.default(x, weight, bias, mean, var, False, momentum, eps, False),)


def _batch_norm_of_probes(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, num_probes: int) -> tuple[Tensor]:
    """Batch norm on the statistics of each probe: x (probes · n, channels, ...), n images, or their tokens one after another."""
    probes = x.reshape(num_probes, -1, *x.shape[1:])
    around = [1, *range(3, probes.ndim)]
    variance, mean = torch.var_mean(probes, around, correction=0, keepdim=True)
    scale = (variance + eps).rsqrt()
    channels = [1, 1, -1, *[1] * (probes.ndim - 3)]
    if weight is not None:
        scale = scale * weight.reshape(channels)
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias.reshape(channels)
    return (torch.addcmul(shift, probes, scale).reshape(x.shape),)


def _identity(x: Tensor) -> tuple[Tensor]:
    return (x,)


def outside_inference(value: Any) -> Any:
    """A tensor without gradient that autograd may save; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone() if value.is_inference() else value.detach()


def laid_out_like(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor in the memory format of another of its shape."""
    nhwc = like.ndim == 4 and not like.is_contiguous() and like.is_contiguous(memory_format=torch.channels_last)
    return tensor.contiguous(memory_format=torch.channels_last if nhwc else torch.contiguous_format)
