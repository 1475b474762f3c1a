"""A torch network whose weights can be replaced by name, run whole or resumed from any searched layer."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from clado.errors import ConfigurationError, DataError, NetworkError
from clado.graph import Cut, compile_graph
from clado.space import Assignment, Layer, SearchSpace
from clado.whole import WholeForwards

Numeric = Literal["float32", "tf32", "bfloat16"]
State = Any  # of a run that is not finished: what the engine that made it knows how to resume


class Engine(Protocol):
    """What runs a network in part. States are opaque; layer number `len(layers)` means the end."""

    layers: tuple[Layer, ...]
    cuts: tuple[Cut, ...]
    macs: int
    unsearched: tuple[tuple[str, int, str], ...]

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Float weight of each layer."""

    def begin(self, images: Tensor) -> State:
        """The state before the first layer."""

    def advance(self, state: State, layer: int, weights: Mapping[int, Tensor]) -> State:
        """Runs to the cut before `layer` with weights replaced; `state` is left as it is."""

    def stack(self, states: Sequence[State], layer: int) -> State:
        """Several states at the cut before `layer` as one, images after images."""

    def output(self, state: State) -> Tensor:
        """Logits (images, classes) of a finished run."""


class Network:
    """Wraps a `torch.nn.Module` that `torch.export` accepts; the module itself is never changed.

    `example_input` is one batch (N, C, H, W) or a single image (C, H, W); it gives shapes, its values do not matter. `fixed`
    holds name patterns of layers that stay in float. All runs are in inference mode and in eval mode, on the device where the
    module lies.

    `numeric` is how products are computed: float32 (default; on CUDA without TF32, which keeps ten bits of a float32: less than
    the differences we measure), tf32, or bfloat16 (autocast). `channels_last` lays images out as (N, H, W, C); weights follow
    where the module was converted with `model.to(memory_format=torch.channels_last)`.

    `graph=False` is for networks that torch.export refuses: the same numbers by whole forwards, with layers as the example meets
    them (so its values matter where the network branches on them), at three times the cost and more.
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Tensor,
        fixed: Sequence[str] = (),
        *,
        graph: bool = True,
        numeric: Numeric = "float32",
        channels_last: bool = False,
    ) -> None:
        if not isinstance(example_input, Tensor) or example_input.ndim < 2:
            raise DataError("example_input is not a batch of images; expected a tensor (N, C, H, W)")
        self.model = model
        self.example = example_input[:1] if example_input.ndim != 3 else example_input.unsqueeze(0)
        if numeric not in get_args(Numeric):
            raise ConfigurationError(f"unknown numeric mode {numeric!r}; expected one of {', '.join(get_args(Numeric))}")
        self.numeric: Numeric = numeric
        self.channels_last = channels_last
        _refuse_bad_weights(model)
        engine = compile_graph if graph else WholeForwards
        with _computing("float32", self.example.device):
            self.graph: Engine = engine(model, self.example, lambda name: any(fnmatchcase(name, pattern) for pattern in fixed))
        if not self.graph.layers:
            raise NetworkError("no convolution or linear weight is left to search; is every layer named in fixed?")
        self.weights: tuple[Tensor, ...] = self.graph.weights

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Searched layers in execution order."""
        return self.graph.layers

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image."""
        return tuple(self.example.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.weights[0].device

    def search_space(self, bits: Sequence[int] = (2, 4, 8), ties: Sequence[Sequence[int]] = ()) -> SearchSpace:
        """The same candidate bit-widths for every layer; `SearchSpace.restricted` gives some layers others."""
        return SearchSpace.uniform(self.layers, bits, ties)

    @torch.inference_mode()
    def logits(self, images: Tensor, weights: Mapping[int, Tensor] | None = None) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W), with the given tensors in place of layers' weights (by layer index)."""
        return self.finish(self.begin(images), weights)

    @torch.inference_mode()
    def begin(self, images: Tensor) -> State:
        """The values alive before the first layer."""
        if self.channels_last and images.ndim == 4:
            images = images.contiguous(memory_format=torch.channels_last)
        with _computing(self.numeric, images.device):
            return self.graph.begin(images)

    @torch.inference_mode()
    def advance(self, state: State, layer: int, weights: Mapping[int, Tensor] | None = None) -> State:
        """Runs from a state to the cut before `layer`, or to the end where that is the number of layers."""
        with _computing(self.numeric, self.device):
            return self.graph.advance(state, layer, weights or {})

    @torch.inference_mode()
    def finish(self, state: State, weights: Mapping[int, Tensor] | None = None) -> Tensor:
        """Runs from a state to the logits (images of the state, classes)."""
        return self.graph.output(self.advance(state, len(self.layers), weights))

    @torch.inference_mode()
    def stack(self, states: Sequence[State], layer: int) -> State:
        """States at the cut before `layer` as one state, images after images; finished runs for the number of layers."""
        return self.graph.stack(states, layer)

    def state_dict(self, weights: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """The module's state with the given tensors in place of layers' weights, tied names included."""
        state = {name: tensor.detach() for name, tensor in self.model.state_dict().items()}
        replaced = {tensor.data_ptr(): weights[i] for i, tensor in enumerate(self.weights) if i in weights}
        return {name: replaced.get(tensor.data_ptr(), tensor).contiguous() for name, tensor in state.items()}

    def coverage(self) -> list[tuple[str, int, str]]:
        """(name, bytes, why) of every parameter that is not searched."""
        return list(self.graph.unsearched)

    def check_assignment(self, assignment: Assignment) -> None:
        """Refuses an assignment of another network."""
        if len(assignment.bits) != len(self.layers):
            raise NetworkError(f"the assignment has {len(assignment.bits)} layers, the network {len(self.layers)}")


@contextmanager
def _computing(numeric: Numeric, device: torch.device) -> Iterator[None]:
    """Products in a numeric mode while the context lasts; what the process had chosen comes back."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    try:
        if device.type == "cuda":
            cudnn.allow_tf32 = matmul.allow_tf32 = numeric == "tf32"
        if numeric == "bfloat16":
            with torch.autocast(device.type, torch.bfloat16):
                yield
        else:
            yield
    finally:
        if device.type == "cuda":
            cudnn.allow_tf32, matmul.allow_tf32 = before


def _refuse_bad_weights(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NetworkError(
                f"{name} holds a NaN or an infinity; expected finite weights: was the training that made them finished?"
            )
