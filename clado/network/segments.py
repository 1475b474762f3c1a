"""Splits a graph into segments. At both ends of a segment a single value is alive. It holds all results until that place.

Residual blocks and encoder layers begin and end at such places. Inside a block more values are alive: the shortcut and the
values of the other path. A network without shortcuts has one segment for each layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clado.grids import QuantizedLayer
from clado.network.graph import Constant, Graph, GraphState, Instruction, Value


@dataclass(frozen=True)
class Segment:
    """Instructions start..stop−1 of a graph. They read one earlier value, and leave one."""

    start: int
    """The first instruction."""
    stop: int
    """The instruction after the last."""
    input_slot: int
    """The slot of the value that it reads."""
    output_slot: int
    """The slot of the value that it leaves."""
    layers: tuple[int, ...]
    """The searched layers whose weights it reads."""

    def run(self, graph: Graph, x: Tensor, replaced: Mapping[int, QuantizedLayer]) -> Tensor:
        """Its output for an input (images, ...), with these layers replaced."""
        state = GraphState({self.input_slot: x}, self.start, len(x), len(x))
        inside = {i: layer for i, layer in replaced.items() if i in self.layers}
        return graph.run(state, self.stop, inside).values[self.output_slot]

    def reads(self, graph: Graph) -> frozenset[str]:
        """Names of the parameters and buffers that it reads directly."""
        slots = {slot for step in graph.instructions[self.start : self.stop] for slot in _slots(step, Constant)}
        return frozenset(name for name, of_name in graph.named.items() if slots & set(of_name))


def segments(graph: Graph, blocks: Sequence[Sequence[int]], images: Tensor) -> tuple[Segment, ...]:
    """The segments of a graph, in order. Each has at least one layer, and together they have all instructions.

    Segments whose layers share a block become one segment.

    Args:
        graph: The network. No operator may overwrite a value.
        blocks: Blocks of layers, by index.
        images: Two images or more (n, ...). They show which values have the images on their first axis.
    """
    ends = _single_values(graph, images)
    uses = [[k for k, step in enumerate(graph.instructions) if i in step.layers] for i in range(len(graph.layers))]
    block_of = {layer: k for k, block in enumerate(blocks) for layer in block}
    gaps: dict[tuple[int, ...], int] = {}  # layers before the place -> the last such place
    for position in sorted(ends):
        before = tuple(i for i, of_layer in enumerate(uses) if of_layer[0] < position)
        after = {i for i, of_layer in enumerate(uses) if of_layer[-1] >= position}
        in_two = any(block_of.get(i, -1 - i) in {block_of.get(j, -1 - j) for j in after} for i in before)
        if before and after and not after & set(before) and not in_two:
            gaps[before] = position
    places = [0, *gaps.values(), len(graph.instructions)]
    result = []
    for start, stop in zip(places, places[1:], strict=False):
        layers = tuple(i for i, of_layer in enumerate(uses) if start <= of_layer[0] < stop)
        slots = [ends.get(place, graph.output_slot) for place in (start, stop)]
        result.append(Segment(start, stop, slots[0], slots[1], layers))
    return tuple(result)


def _single_values(graph: Graph, images: Tensor) -> dict[int, int]:
    """Places with a single value alive that has the images on its first axis -> the slot of the value."""
    places: dict[int, int] = {0: graph.input_slot}
    with torch.inference_mode():
        together, apart = graph.start(images), [graph.start(images[k : k + 1]) for k in range(len(images))]
        for position in range(1, len(graph.instructions)):
            together = graph.run(together, position, {})
            apart = [graph.run(state, position, {}) for state in apart]
            if len(together.values) == 1:
                slot, value = next(iter(together.values.items()))
                parts = [state.values[slot] for state in apart]
                if isinstance(value, Tensor) and _are_parts(value, parts):
                    places[position] = slot
    return places


def _are_parts(value: Tensor, parts: Sequence[Tensor]) -> bool:
    """Whether a value of several images consists of the values of each image, in order."""
    if value.ndim == 0 or len(value) != len(parts) or any(part.shape != (1, *value.shape[1:]) for part in parts):
        return False
    joined = torch.cat(list(parts)).double()
    return float((joined - value.double()).abs().max()) <= 1e-3 * float(joined.abs().max()) + 1e-6


def _slots(step: Instruction, kind: type[Constant] | type[Value]) -> set[int]:
    """Slots of a kind that an instruction reads."""
    found: set[int] = set()

    def look(argument: object) -> None:
        if isinstance(argument, kind):
            found.add(argument.slot)
        elif isinstance(argument, list | tuple):
            for part in argument:
                look(part)

    for argument in (*step.arguments, *step.keywords.values()):
        look(argument)
    return found
