"""Finds where a run of a graph can be resumed, how values stack there, and which operators can run in place."""

import operator
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from clado.errors import NetworkError
from clado.network.engine import Cut
from clado.network.graph import IN_PLACE, Graph, Instruction
from clado.network.lowering import Lowered
from clado.network.program import INSTEAD, Program
from clado.network.weights import macs_of

# Operators that never return a view.
_FRESH = {
    "aten.conv1d.default",
    "aten.conv2d.default",
    "aten.conv3d.default",
    "aten.linear.default",
    "aten.batch_norm.default",
    "aten.add.Tensor",
    "aten.layer_norm.default",
}


def find_cuts(program: Program, lowered: Lowered, axes: dict[int, int]) -> list[Cut]:
    """The cut of each searched weight: the last place before its first use where all values stack.

    Args:
        program: The exported program.
        lowered: Its operators that run.
        axes: Slot -> axis of the images, as `image_axes` gives it.

    Raises:
        NetworkError: A weight has no such cut.
    """
    macs_at = [macs_of(program, node) for node in lowered.operators]
    births = {program.slots[node]: k for k, node in enumerate([program.input, *lowered.operators], -1)}
    sizes = {program.slots[node]: program.bytes_per_image(node) for node in (program.input, *lowered.operators)}
    firsts = [weight.positions(lowered.operators)[0] for weight in lowered.weights]
    cuts = []
    for weight, first in zip(lowered.weights, firsts, strict=True):
        earliest = max((k for k in firsts if k < first), default=-1) + 1  # the parts of a split weight have one cut
        for position in range(first, earliest - 1, -1):
            alive = [slot for slot, birth in births.items() if birth < position <= lowered.last_reads.get(slot, -1)]
            if all(slot in axes for slot in alive):
                break
        else:
            raise NetworkError(f"the values alive before {weight.layer.name} cannot be stacked along the batch\n  {INSTEAD}")
        held = {slot: sizes[slot] for slot in alive}
        peak = _peak_bytes(lowered.instructions[position:], held, sizes)
        cuts.append(Cut(position, {slot: axes[slot] for slot in alive}, sum(held.values()), sum(macs_at[position:]), peak))
    return cuts


def _peak_bytes(steps: Sequence[Instruction], alive: dict[int, int], sizes: dict[int, int]) -> int:
    """Most bytes of one image's values that exist at once. A view counts as the tensor that it shows."""
    held = dict(alive)
    peak = sum(held.values())
    for step in steps:
        held[step.slot] = sizes[step.slot]
        peak = max(peak, sum(held.values()))
        for slot in step.frees:
            held.pop(slot, None)
    return peak


def image_axes(program: Program, lowered: Lowered, graph: Graph, example: Tensor) -> dict[int, int]:
    """Axes along which values of separate images, one after another, are the value of all images.

    They follow from the symbolic shapes, and are checked by running two images together and apart. An
    axis that merges positions and images, with the images inside, fails the check, and there is no cut
    at it. Attention's output projection has such an axis.

    Args:
        program: The exported program.
        lowered: Its operators that run.
        graph: The same, ready to run.
        example: Images (N, ...); only their shape and type matter.

    Returns:
        Slot -> axis.
    """
    device = next((t.device for t in graph.constants.values() if isinstance(t, Tensor)), example.device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((2, *example.shape[1:]), generator=generator).to(device, example.dtype)
    # step by step side by side, so that only the values exist that a run needs
    together, *apart = [graph.start(part) for part in (images, images[:1], images[1:])]
    axes: dict[int, int] = {}

    def check(node: fx.Node) -> None:
        value, slot = node.meta["val"], program.slots[node]
        if isinstance(value, Tensor):
            candidates = [k for k, length in enumerate(value.shape) if program.has_batch(length)]
            parts = [state.values[slot] for state in apart]
            if len(candidates) == 1 and _are_joined(together.values[slot], parts, candidates[0]):
                axes[slot] = candidates[0]

    check(program.input)
    with torch.inference_mode():
        for k, node in enumerate(lowered.operators):
            together, *apart = [graph.run(state, k + 1, {}) for state in (together, *apart)]
            check(node)
    return axes


def _are_joined(whole: Tensor, parts: Sequence[Tensor], axis: int) -> bool:
    """Whether a value of two images is the values of each, one after another along an axis, up to rounding."""
    if any(part.shape[axis] * 2 != whole.shape[axis] for part in parts):
        return False
    precision = torch.promote_types(whole.dtype, torch.float32)
    joined = torch.cat(list(parts), axis).to(precision)
    tolerance = 1e-3 * float(joined.abs().max()) + 1e-6
    return joined.shape == whole.shape and float((joined - whole.to(precision)).abs().max()) <= tolerance


def in_place(program: Program, lowered: Lowered, cuts: Sequence[Cut]) -> tuple[Instruction, ...]:
    """The instructions. Operators run in place if nothing needs their first argument afterwards.

    The argument must have its own memory, no other reader, and not be alive at a cut.
    """
    births = {node: k for k, node in enumerate(lowered.operators)}
    positions = {cut.position for cut in cuts}
    steps = []
    for k, (node, step) in enumerate(zip(lowered.operators, lowered.instructions, strict=True)):
        twin = IN_PLACE.get(node.target)  # type: ignore[call-overload]
        argument = node.args[0] if twin is not None else None
        if (
            isinstance(argument, fx.Node)
            and _may_be_overwritten(node, argument)
            and not any(births[argument] < position <= k for position in positions)
        ):
            step = replace(step, function=twin)
        steps.append(step)
    return tuple(steps)


def _may_be_overwritten(node: fx.Node, argument: fx.Node) -> bool:
    """Whether the first argument is new memory in the form of the result, without another reader."""
    before, after = argument.meta["val"], node.meta["val"]
    return (
        argument not in node.args[1:]
        and len(argument.users) == 1
        and _is_fresh(argument)
        and before.shape == after.shape
        and before.dtype == after.dtype
    )


def _is_fresh(node: fx.Node) -> bool:
    """Whether a value has its own memory: it is the result of an operator that never returns a view."""
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and "batch_norm" in str(source.target)
    return str(node.target) in _FRESH
