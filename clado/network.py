"""A torch network whose weights can be replaced by name, run whole or resumed from any searched layer."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from clado.errors import DataError, NetworkError
from clado.graph import Graph, State, compile_graph
from clado.space import Assignment, Layer, SearchSpace


class Network:
    """Wraps a `torch.nn.Module` that `torch.export` accepts; the module itself is never changed.

    `example_input` is one batch (N, C, H, W) or a single image (C, H, W); it gives shapes, its values do not matter. `fixed`
    holds name patterns of layers that stay in float. All runs are in inference mode, in eval mode and in float32 without TF32.
    """

    def __init__(self, model: nn.Module, example_input: Tensor, fixed: Sequence[str] = ()) -> None:
        if not isinstance(example_input, Tensor) or example_input.ndim < 2:
            raise DataError("example_input is not a batch of images; expected a tensor (N, C, H, W)")
        self.model = model
        self.example = example_input[:1] if example_input.ndim != 3 else example_input.unsqueeze(0)
        _refuse_bad_weights(model)
        torch.backends.cudnn.allow_tf32 = False  # TF32 keeps ten bits of a float32: less than the differences we measure
        torch.backends.cuda.matmul.allow_tf32 = False
        self.graph: Graph = compile_graph(model, self.example, lambda name: any(fnmatchcase(name, pattern) for pattern in fixed))
        if not self.graph.layers:
            raise NetworkError("no convolution or linear weight is left to search; is every layer named in fixed?")
        self.weights: tuple[Tensor, ...] = tuple(self._float_weight(i) for i in range(len(self.layers)))

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
        graph = self.graph
        return graph.output(graph.run(graph.begin(images), len(graph.instructions), weights or {}))

    @torch.inference_mode()
    def begin(self, images: Tensor) -> State:
        """The values alive before the first layer."""
        return self.graph.run(self.graph.begin(images), self.graph.cuts[0].position, {})

    @torch.inference_mode()
    def advance(self, state: State, layer: int, weights: Mapping[int, Tensor] | None = None) -> State:
        """Runs from a state to the cut before `layer`."""
        return self.graph.run(state, self.graph.cuts[layer].position, weights or {})

    @torch.inference_mode()
    def finish(self, state: State, weights: Mapping[int, Tensor] | None = None) -> Tensor:
        """Runs from a state to the logits (images of the state, classes)."""
        graph = self.graph
        return graph.output(graph.run(state, len(graph.instructions), weights or {}))

    def stack(self, states: Sequence[State], layer: int) -> State:
        """States at the cut before `layer` as one state, images after images."""
        return self.graph.stack(states, self.graph.cuts[layer].axes)

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

    def _float_weight(self, layer: int) -> Tensor:
        tensor = self.graph.constants[self.graph.slots[layer][0]]
        assert isinstance(tensor, Tensor)
        return tensor


def _refuse_bad_weights(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise NetworkError(
                f"{name} holds a NaN or an infinity; expected finite weights: was the training that made them finished?"
            )
