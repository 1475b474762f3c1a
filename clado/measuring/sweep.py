"""Runs one pass of images through every row of a tile. Rows share the float run before their layer and the weights after it.

A *row* is an option that already replaces its layer. The sweep visits the layers once. For each row it keeps the values that
are alive at the current cut. After the cut all rows use the same weights, so their images are stacked in one batch. Values become
smaller in later layers, so a stack then holds more rows. The caller resumes each stack with one more replaced layer, or reads its
logits.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from clado.measuring.workbench import Pass, Workbench
from clado.network.network import Network, State


@dataclass(eq=False)
class Stack:
    """Rows whose values at the current cut are stacked in the batch, one after another."""

    rows: list[int]
    """Options, in the order of the batch."""
    state: State
    """Their values at the cut."""


def sweep(bench: Workbench, part: Pass, rows: Sequence[int], float_state: State, end: int) -> Iterator[tuple[int, list[Stack]]]:
    """Yields (layer, stacks of the rows of earlier layers, at this layer's cut) for every layer after the first row, up to `end`.

    If `end` is the number of layers, stacks are finished runs. Each is run to the end when it is full, while its values are in
    the cache. It is yielded once. The remaining stacks are yielded after the last layer.

    Args:
        bench: Network and quantized layers.
        part: The images.
        rows: Ascending options.
        float_state: A float run of the pass, at or before the cut of the first row's layer.
        end: The last layer.
    """
    network, space = bench.network, bench.space
    to_the_end = end == space.num_layers
    first, last = space.options[rows[0]].layer, space.options[rows[-1]].layer
    float_state = network.advance(float_state, first)
    stacks: list[Stack] = []
    for layer in range(first, end):
        new = [
            Stack([option], network.advance(float_state, layer + 1, {layer: bench.quantized[option]}))
            for option in space.options_of(layer)
            if option in rows
        ]
        for stack in stacks:
            stack.state = network.advance(stack.state, layer + 1)
        capacity = _capacity(bench, part, layer, to_the_end)
        stacks = _packed(network, stacks + new, capacity, layer + 1)
        if layer < last:
            float_state = network.advance(float_state, layer + 1)
        if not to_the_end:
            yield layer + 1, stacks
            continue
        full = [stack for stack in stacks if layer + 1 == end or len(stack.rows) >= capacity]
        stacks = [stack for stack in stacks if stack not in full]
        for stack in full:
            stack.state = network.advance(stack.state, end)
        yield end, full


def each_option(bench: Workbench, part: Pass) -> Iterator[tuple[list[int], Tensor]]:
    """(options, logits (options, n, classes)) of each option alone, stack by stack. Float options are left out."""
    space = bench.space
    for _, stacks in sweep(bench, part, space.quantized_options, bench.network.begin(part.images), space.num_layers):
        for stack in stacks:
            logits = bench.network.finish(stack.state)
            yield stack.rows, logits.reshape(len(stack.rows), *part.float_logits.shape)


def _capacity(bench: Workbench, part: Pass, layer: int, to_the_end: bool) -> int:
    """Rows of a full stack after a layer.

    For pairs it is a power of two, so that full stacks of one layer exactly fill the larger stacks of later layers.
    """
    batch = bench.batching.batch_images[min(layer + 1, bench.space.num_layers - 1)]
    capacity = max(1, batch // len(part.images))
    return capacity if to_the_end else 1 << (capacity.bit_length() - 1)


def _packed(network: Network, stacks: list[Stack], capacity: int, layer: int) -> list[Stack]:
    """The same rows in as few stacks of `capacity` rows as possible. Full stacks stay, stacks with different keys stay apart."""
    packed = [stack for stack in stacks if len(stack.rows) >= capacity]
    by_shape: dict[Hashable, list[Stack]] = {}
    for stack in stacks:
        if len(stack.rows) < capacity:
            by_shape.setdefault(stack.state.stack_key, []).append(stack)
    for of_shape in by_shape.values():
        group: list[Stack] = []
        for stack in of_shape:
            if group and sum(len(s.rows) for s in group) + len(stack.rows) > capacity:
                packed.append(_joined(network, group, layer))
                group = []
            group.append(stack)
        packed.append(_joined(network, group, layer))
    return packed


def _joined(network: Network, group: list[Stack], layer: int) -> Stack:
    if len(group) == 1:
        return group[0]
    return Stack([row for s in group for row in s.rows], network.stack([s.state for s in group], layer))
