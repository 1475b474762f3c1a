"""A graph without the module's tensors. Another process with the same module need not export it again."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from clado.errors import NetworkError
from clado.network.graph import Graph


@dataclass(frozen=True)
class Operator:
    """Stands for an operator of torch."""

    name: str
    """Its name below torch.ops, such as aten.relu.default."""


@dataclass(frozen=True)
class Named:
    """Stands for a parameter or buffer of the module."""

    name: str
    """Its name in the module."""


@dataclass(frozen=True)
class PortableGraph:
    """A graph as plain data, with names instead of operators and of the module's tensors."""

    graph: Graph
    """The graph before it is restored."""
    device: str
    """The type of device for which it was exported. Operators differ between types."""
    shapes: Mapping[str, tuple[int, ...]]
    """The shape of each of the module's tensors that it reads."""

    def fits(self, model: nn.Module) -> bool:
        """Whether the graph fits a module. The module may be an older one, or on another device."""
        tensors = _tensors(model)
        return all(
            name in tensors and tuple(tensors[name].shape) == shape and tensors[name].device.type == self.device
            for name, shape in self.shapes.items()
        )

    def restored(self, model: nn.Module) -> Graph:
        """Restores the graph with a module's tensors.

        Raises:
            NetworkError: The module does not have them.
        """
        if not self.fits(model):
            raise NetworkError(f"the graph of another network was given for {type(model).__name__}; expected its own")
        tensors = _tensors(model)
        device = next(iter(tensors.values())).device

        def constant(value: Any) -> Any:
            if isinstance(value, Named):
                return tensors[value.name]
            return value.to(device) if isinstance(value, Tensor) else value

        steps = (
            replace(step, function=_operator(step.function.name)) if isinstance(step.function, Operator) else step
            for step in self.graph.instructions
        )
        constants = {slot: constant(value) for slot, value in self.graph.constants.items()}
        return replace(self.graph, instructions=tuple(steps), constants=constants)


def portable(graph: Graph, model: nn.Module) -> PortableGraph:
    """A graph of a module in a form that may be sent to a process with the same module.

    It contains folded constants, but not parameters and buffers.
    """
    tensors = _tensors(model)
    names = {_place(tensor): name for name, tensor in reversed(tensors.items()) if tensor.numel()}

    def constant(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        name = names.get(_place(value))
        return value.detach().cpu() if name is None else Named(name)

    constants = {slot: constant(value) for slot, value in graph.constants.items()}
    steps = (
        replace(step, function=cast(Any, Operator(str(step.function))))
        if isinstance(step.function, torch._ops.OpOverload)
        else step
        for step in graph.instructions
    )
    shapes = {value.name: tuple(tensors[value.name].shape) for value in constants.values() if isinstance(value, Named)}
    return PortableGraph(
        replace(graph, instructions=tuple(steps), constants=constants), next(iter(tensors.values())).device.type, shapes
    )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by every name that they have."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in named}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """A key that identifies the memory of a tensor."""
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _operator(name: str) -> Any:
    operator: Any = torch.ops
    for part in name.split("."):
        operator = getattr(operator, part)
    return operator
