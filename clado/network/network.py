"""A torch network whose weights can be replaced, run whole or resumed from any searched layer."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from fnmatch import fnmatchcase
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clado.errors import ConfigurationError, NetworkError
from clado.grids import QuantizedLayer
from clado.network import transforms
from clado.network.arguments import check_example, check_model
from clado.network.batch_size import processor_of
from clado.network.engine import Call, Engine, LayerPlace
from clado.network.graph import Graph, GraphState
from clado.network.normalisation import Statistics, as_seen, normalisation
from clado.network.outputs import LOGITS, NUM_EXAMPLES, Outputs
from clado.network.portable import PortableGraph, portable
from clado.network.program import eval_mode
from clado.network.tensors import laid_out_like, unfit
from clado.network.tracing import compile_graph
from clado.network.whole_forwards import DeferredRuns, WholeForwards
from clado.space import Assignment, Layer, SearchSpace, check_patterns

ONLY_AVX2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
Numeric = Literal["float32", "tf32", "bfloat16"]
State = GraphState | DeferredRuns  # state of an unfinished run; it is passed only to the network that made it
Replaced = Mapping[int, Tensor | QuantizedLayer]  # layer -> its replacement: a weight, or a weight with bias and grids


def prefers_channels_last(model: nn.Module, device: torch.device) -> bool:
    """Whether a module's 2-d convolutions are faster in (N, H, W, C): see docs/lab-log.md.

    On a CPU with AVX2 but not AVX-512 all of them are, on other CPUs those with one channel a group.
    On a GPU the user decides.
    """
    convolutions = [part for part in model.modules() if isinstance(part, nn.Conv2d)]
    depthwise = any(1 < part.groups == part.in_channels for part in convolutions)
    return device.type == "cpu" and (depthwise or (ONLY_AVX2 and bool(convolutions)))


class Network:
    """Wraps a `torch.nn.Module`. The module itself is never changed.

    All runs are in inference mode and in eval mode, on the module's device.

    Args:
        model: A module that `torch.export` accepts.
        example_input: One batch (N, C, H, W) or a single image (C, H, W). It gives shapes and the
            type that images are cast to. Its values do not matter. If the network does not take
            three axes as one image, they are a batch of signals (N, C, L).
        fixed: Name patterns of layers that stay in float.
        split: Name patterns of linear weights whose rows are queries, keys and values, such as
            "*.in_proj_weight" or "*.qkv.weight". Each becomes three layers instead of one.
        graph: False is for networks that torch.export refuses. Numbers are the same, but come from
            whole forward passes, at three times the cost or more. Layers are those that the example
            input reaches, so its values matter if the network branches on them.
        numeric: How products are computed: float32, tf32, or bfloat16 (autocast). float32 on CUDA
            is without TF32, which keeps ten bits of a float32. That is less than the differences
            that we measure.
        channels_last: Lays images out as (N, H, W, C). Weights follow where the module was
            converted with `model.to(memory_format=torch.channels_last)`.
        exported: The `portable` graph of the same network, from this or another process. Exporting
            it again takes seconds. It is ignored if it does not fit the module.

    Raises:
        DataError: `example_input` is not a batch of images.
        ConfigurationError: A pattern matches no parameter, or the numeric mode is unknown.
        NetworkError: torch.export refuses the module, a weight is not finite, or no layer is left.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor,
        fixed: Sequence[str] = (),
        *,
        split: Sequence[str] = (),
        graph: bool = True,
        numeric: Numeric = "float32",
        channels_last: bool = False,
        exported: PortableGraph | None = None,
    ) -> None:
        check_model(model)
        check_example(example_input)
        self.model = model
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        for key, patterns in (("fixed", fixed), ("split", split)):
            _refuse_unmatched(check_patterns(patterns, key), names, key)
        if numeric not in get_args(Numeric):
            raise ConfigurationError(f"unknown numeric mode {numeric!r}; expected one of {', '.join(get_args(Numeric))}")
        self.numeric: Numeric = numeric
        self.channels_last = channels_last
        _refuse_bad_weights(model)
        if split and not graph:
            raise NetworkError("a weight can be split only in a graph; expected graph=True, or no split")
        self.engine: Graph | WholeForwards
        with computing("float32", example_input.device):
            self.example = _one_image(model, example_input)
            self.outputs: Outputs = _outputs(model, self.example)
            """The form of the module's outputs. `logits` returns them as one tensor (N, M)."""
            packing = self.outputs.packing(model)
            if graph and exported is not None and exported.fits(model):
                self.engine = exported.restored(model)
            elif graph:
                self.engine = compile_graph(packing, self.example, _matching(fixed), _matching(split))
            else:
                self.engine = WholeForwards(packing, self.example, _matching(fixed))
        if not self.engine.layers:
            raise NetworkError("no convolution or linear weight is left to search; is every layer named in fixed?")
        self.layers: tuple[Layer, ...] = tuple(place.layer for place in self.engine.layers)
        """Searched layers in execution order."""
        self.weights: tuple[Tensor, ...] = self.engine.weights
        """Float weight of each layer."""
        self._changed: dict[str, Tensor] = {}

    @property
    def portable(self) -> PortableGraph | None:
        """The graph in a form that another process can restore. None without a graph."""
        return portable(self.engine, self.model) if isinstance(self.engine, Graph) and not self._changed else None

    @property
    def _runner(self) -> Engine[State]:
        """The engine, typed so that each state is passed to the engine that made it."""
        return cast(Engine[State], self.engine)

    @property
    def places(self) -> Sequence[LayerPlace]:
        """The place of each searched layer: its parameter, its bias, its cut."""
        return self.engine.layers

    @property
    def biases(self) -> tuple[Tensor | None, ...]:
        """Float bias (channels,) of each layer. None if it has no bias."""
        return self.engine.biases

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one image."""
        return self.engine.macs

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return tuple(self.example.shape[1:])

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.weights[0].device

    @property
    def images_at_once(self) -> int:
        """The number of images of a fast whole run."""
        return processor_of(self.device.type).images(self.places[0].cut.peak_bytes_per_image)

    def search_space(self, bits: Sequence[int | str | None] = (2, 4, 8), ties: Sequence[Sequence[int]] = ()) -> SearchSpace:
        """The same candidate bit-widths for every layer; `restricted` gives some layers others.

        Args:
            bits: Candidate bit-widths, ascending, each from 1 to 16. "float" after them leaves the
                layer in float.
            ties: Groups of layers (indices) that must have the same bit-width.

        Raises:
            ConfigurationError: Bits or ties are impossible.
        """
        return SearchSpace.uniform(self.layers, bits, ties)

    @torch.inference_mode()
    def logits(self, images: Tensor, replaced: Replaced | None = None) -> Tensor:
        """Logits of images, with some layers replaced.

        Args:
            images: (N, C, H, W), normalised as the network was trained.
            replaced: Index of a layer -> its weight, or its weight, bias and grid of the input.

        Returns:
            (N, classes). Outputs of another form are packed as (N, M), which `outputs.unpacked` undoes.
        """
        return self.finish(self.begin(images), replaced)

    def differentiable_logits(self, images: Tensor, replaced: Replaced | None = None) -> Tensor:
        """`logits` with gradients for replaced weights and biases, and for values of `updated`."""
        with computing(self.numeric, images.device):
            return self._recorded(images, replaced)

    @property
    def changed(self) -> dict[str, Tensor]:
        """Parameters and buffers that `updated` has changed, by name."""
        return dict(self._changed)

    def trainable(self, replaced: Replaced) -> dict[str, Tensor]:
        """Float parameters by name that runs with these layers replaced still read."""
        unread, replaceable = set[str | None](), self.engine.replaceable
        for i, layer in _quantized_layers(replaced).items():
            unread |= {self.places[i].parameter, self.places[i].bias_name if layer.bias is not None else None}
        return {
            name: self._changed.get(name, parameter.detach())
            for name, parameter in self.model.named_parameters()
            if name in replaceable and name not in unread and parameter.is_floating_point()
        }

    @torch.inference_mode()
    def begin(self, images: Tensor) -> State:
        """The values alive before the first layer."""
        with computing(self.numeric, images.device):
            return self._runner.begin(self._laid_out(images))

    def _laid_out(self, images: Tensor) -> Tensor:
        images = images.to(self.example.dtype)
        if self.channels_last and images.ndim == 4:
            return images.contiguous(memory_format=torch.channels_last)
        return images

    @torch.inference_mode()
    def advance(self, state: State, layer: int, replaced: Replaced | None = None) -> State:
        """Runs from a state to the cut before `layer`, or to the end for the number of layers."""
        with computing(self.numeric, self.device):
            return self._runner.advance(state, layer, _quantized_layers(replaced))

    @torch.inference_mode()
    def finish(self, state: State, replaced: Replaced | None = None) -> Tensor:
        """Runs from a state to the logits (images of the state, classes)."""
        return self._runner.output(self.advance(state, len(self.layers), replaced))

    @torch.inference_mode()
    def observe(self, images: Tensor, layers: Collection[int], see: Callable[[int, Call], None]) -> None:
        """Calls `see` for the operators that read the weights of layers, in one float run.

        Args:
            images: Images (N, C, H, W). The run ends after the last of the layers.
            layers: Indices of layers.
            see: Called in execution order with a layer and each call that reads its weight: the
                call's input, operator and arguments. The input is freed after the call.
        """

        def in_float(layer: int, call: Call) -> None:
            with torch.autocast(self.device.type, enabled=False) if self.numeric == "bfloat16" else nullcontext():
                see(layer, call)

        with computing(self.numeric, self.device):
            self._runner.observe(self._laid_out(images), layers, in_float)

    @torch.inference_mode()
    def normalisation(
        self, images: Sequence[Tensor], replaced: Replaced | None = None, statistics: Statistics = as_seen
    ) -> dict[str, Tensor]:
        """New statistics of batch norms by buffer name, measured with layers replaced.

        They are measured in execution order: earlier batch norms of the network already have their
        new statistics. They are pooled over all batches. Sums are float64, so the result depends on
        how images are cut into batches only by rounding.

        Args:
            images: Batches (n, C, H, W).
            replaced: Layer -> its replacement.
            statistics: Computes a batch norm's new statistics from its own ones and those of its
                input. Default: those of its input.
        """
        with computing(self.numeric, self.device):
            batches = [self._laid_out(part) for batch in images for part in torch.split(batch, self.images_at_once)]
            return normalisation(self.engine, batches, _quantized_layers(replaced), statistics)

    def updated(self, named: Mapping[str, Tensor]) -> "Network":
        """The same network with other values of parameters and buffers, by name.

        They get the memory layout of the module's values. The module is not changed.
        """
        floats = self.model.state_dict()
        named = {name: laid_out_like(tensor, floats[name]) if name in floats else tensor for name, tensor in named.items()}
        other = copy(self)
        other.engine = self.engine.updated(named)
        other.weights = other.engine.weights
        other._changed = {**self._changed, **named}
        return other

    def folded(self) -> "tuple[Network, Callable[[int, QuantizedLayer], QuantizedLayer]]":
        """The same function with batch norms folded into the layers before them.

        Results are the same up to rounding. Use it for measuring, not for export.

        Returns:
            The network, and a function (layer index, replacement) -> the replacement for the folded
            network.
        """
        other = copy(self)
        other.engine, folds = transforms.folded(self.engine)
        return other, lambda i, layer: folds[i](layer) if i in folds else layer

    def folded_with(self, replaced: Replaced) -> "tuple[Network, dict[int, QuantizedLayer]]":
        """The folded network for runs with these layers replaced, and the layers in their folded form."""
        layers, other = _quantized_layers(replaced), copy(self)
        other.engine, folds = transforms.folded(self.engine, layers)
        return other, {i: folds[i](layer) if i in folds else layer for i, layer in layers.items()}

    def with_batch_statistics(self) -> "Network":
        """The same network with batch norms on the statistics of each probe's own images."""
        other = copy(self)
        other.engine = transforms.with_batch_statistics(self.engine)
        return other

    def differentiable(self) -> "Network":
        """The same network for `recorded_logits`."""
        other = copy(self)
        other.engine = transforms.differentiable(self.engine)
        return other

    def recorded_logits(self, images: Tensor, replaced: Replaced) -> Tensor:
        """Logits (N, classes) of a `differentiable` network, with autograd's record.

        For first and second derivatives in the replacing tensors.
        """
        with torch.enable_grad(), computing(self.numeric, images.device), sdpa_kernel(SDPBackend.MATH):
            return self._recorded(images, replaced)

    def _recorded(self, images: Tensor, replaced: Replaced | None) -> Tensor:
        state = self._runner.begin(self._laid_out(images))
        return self._runner.output(self._runner.advance(state, len(self.layers), _quantized_layers(replaced)))

    @torch.inference_mode()
    def stack(self, states: Sequence[State], layer: int) -> State:
        """Stacks states with equal `stack_key` at the cut before `layer`: the images of one after those of the other.

        For the number of layers, they are finished runs.
        """
        return self._runner.stack(states, layer)

    def state_dict(self, replaced: Replaced) -> dict[str, Tensor]:
        """The module's state with layers replaced, including tied names, without grids of activations.

        A bias that is added to a layer without one goes into the batch norm after it (the bias is
        subtracted from the mean). Without a batch norm, it gets its own name.
        """
        floats = {name: tensor.detach() for name, tensor in self.model.state_dict().items()}
        values = {
            floats[name].data_ptr(): tensor for name, tensor in self._changed.items()
        }  # by address, because tied names are one tensor
        added: dict[str, Tensor] = {}

        def put(name: str, rows: slice | None, tensor: Tensor) -> None:
            address = floats[name].data_ptr()
            if rows is not None:
                whole = values.get(address, floats[name]).clone()
                whole[rows] = tensor
                tensor = whole
            values[address] = tensor

        for i, layer in _quantized_layers(replaced).items():
            place = self.places[i]
            put(place.parameter, place.rows, layer.weight)
            if layer.bias is not None:
                if place.bias_name is not None:
                    put(place.bias_name, place.rows, layer.bias)
                elif (mean := place.norm_mean) is not None:
                    put(mean, None, values.get(floats[mean].data_ptr(), floats[mean]) - layer.bias)
                else:
                    added[_added_bias_name(place.parameter)] = layer.bias
        state = {name: values.get(tensor.data_ptr(), tensor).contiguous() for name, tensor in floats.items()}
        return {**state, **added}

    def coverage(self) -> list[tuple[str, int, str]]:
        """(name, bytes, why) of every parameter that is not searched."""
        return list(self.engine.unsearched)

    def check_assignment(self, assignment: Assignment) -> None:
        """Raises NetworkError for an assignment of another network.

        Raises:
            NetworkError: It has another number of layers.
        """
        if len(assignment.bits) != len(self.layers):
            raise NetworkError(f"the assignment has {len(assignment.bits)} layers, the network {len(self.layers)}")


def _one_image(model: nn.Module, example: Tensor) -> Tensor:
    """A batch of one.

    Three axes are an image if the module runs on it, else signals if it runs on those.
    """
    if example.ndim != 3:
        return example[:1]
    image, signals = example.unsqueeze(0), example[:1]
    with eval_mode(model), torch.no_grad():
        for batch in (image, signals):
            with suppress(Exception):  # modules raise exceptions of many types
                model(batch.clone())
                return batch
    return image


def _outputs(model: nn.Module, example: Tensor) -> Outputs:
    """The form of a module's outputs. If a module does not run, the engine raises the error."""
    images = torch.cat([example] * NUM_EXAMPLES)
    try:
        with eval_mode(model), torch.no_grad():
            value = model(images)
    except Exception:  # modules raise exceptions of many types
        return LOGITS
    return Outputs.of(value, len(images))


def _refuse_unmatched(patterns: Sequence[str], names: Sequence[str], key: str) -> None:
    """Raises ConfigurationError for a pattern that matches nothing, because it is probably misspelled."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigurationError(f"{key}: no parameter matches {pattern!r}; names are such as {', '.join(names[:3])}")


def _matching(patterns: Sequence[str]) -> Callable[[str], bool]:
    return lambda name: any(fnmatchcase(name, pattern) for pattern in patterns)


def _added_bias_name(weight: str) -> str:
    """Name for a bias that the module lacks: fc.bias, in_proj_bias, or w_bias of a parameter w."""
    folder, dot, name = weight.rpartition(".")
    return folder + dot + (name.replace("weight", "bias") if "weight" in name else f"{name}_bias")


def _quantized_layers(replaced: Replaced | None) -> dict[int, QuantizedLayer]:
    chosen = replaced or {}
    return {i: layer if isinstance(layer, QuantizedLayer) else QuantizedLayer(layer) for i, layer in chosen.items()}


@contextmanager
def computing(numeric: Numeric, device: torch.device) -> Iterator[None]:
    """Sets the numeric mode of products during the context, and then restores the mode of the process."""
    autocast = torch.autocast(device.type, torch.bfloat16) if numeric == "bfloat16" else nullcontext()
    if device.type != "cuda":
        with autocast:
            yield
        return
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    try:
        cudnn.allow_tf32 = matmul.allow_tf32 = numeric == "tf32"
        with autocast:
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def _refuse_bad_weights(model: nn.Module) -> None:
    if bad := unfit(model.state_dict()):
        raise NetworkError(f"{bad[0]} holds a NaN or an infinity; expected finite weights. Did the training diverge?")
