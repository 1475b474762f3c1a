"""From an exported program to instructions: what runs, what is constant, when each value is freed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from clado.errors import NetworkError
from clado.network.graph import Constant, Instruction, Scalar, Value
from clado.network.program import Program, SizeRule
from clado.network.weights import CONSUMERS, SearchedWeight

# Operators that read of their tensor argument only its type and shape.
_SHAPE_ONLY = {f"aten.new_{filler}.default" for filler in ("zeros", "ones", "full", "empty")}


@dataclass(frozen=True)
class Lowered:
    """The operators that run, as instructions, and what they read."""

    operators: list[fx.Node]
    """Operators that depend on the images or on a searched weight, in execution order."""
    instructions: tuple[Instruction, ...]
    """The same as instructions."""
    constants: dict[int, Any]
    """Parameters, buffers and folded constants by slot. None for a bias that may be added."""
    scalars: Mapping[int, SizeRule]
    """Integers that follow from the number of images, by slot."""
    last_reads: dict[int, int]
    """Slot -> position of the last instruction that reads it. The output is read after all of them."""
    weights: list[SearchedWeight]
    """Searched weights in the order of their first use."""
    bias_slots: tuple[int | None, ...]
    """Slot of each weight's bias, or of one that may be added. None: it cannot have a bias."""


def lowered(program: Program, weights: Sequence[SearchedWeight]) -> Lowered:
    """The operators of a program that run for each batch, and what they read.

    Raises:
        NetworkError: The program draws random numbers, or cannot be run in part.
    """
    operators, constants, rules = _classified(program, {node for weight in weights for node in weight.nodes})
    ordered = sorted(weights, key=lambda weight: weight.positions(operators)[0])
    bias_positions = {weight.consumer: len(program.nodes) + k for k, weight in enumerate(ordered) if weight.lacks_bias}
    last_reads = _last_reads(program, operators)

    def read(argument: Any) -> Any:
        """The instruction's form of a node's argument."""
        if isinstance(argument, fx.Node):
            slot = program.slots[argument]
            return Scalar(slot) if slot in rules else Constant(slot) if argument in constants else Value(slot)
        return [read(part) for part in argument] if isinstance(argument, list | tuple) else argument

    instructions = []
    for k, node in enumerate(operators):
        consumed = tuple(i for i, weight in enumerate(ordered) if node in weight.consumers)
        frees = tuple(slot for slot in _slots_read(program, node) if last_reads.get(slot) == k)
        function, arguments, keywords = _call(node, read, bias_positions.get(node))
        instructions.append(Instruction(function, arguments, keywords, program.slots[node], frees, node.name, consumed))
    return Lowered(
        operators,
        tuple(instructions),
        {**{program.slots[node]: value for node, value in constants.items()}, **dict.fromkeys(bias_positions.values())},
        rules,
        last_reads,
        ordered,
        tuple(
            bias_positions[weight.consumer] if weight.lacks_bias else None if weight.bias is None else program.slots[weight.bias]
            for weight in ordered
        ),
    )


def _classified(program: Program, weights: set[fx.Node]) -> tuple[list[fx.Node], dict[fx.Node, Any], dict[int, SizeRule]]:
    """(operators that depend on images or searched weights, folded constants, rules of scalars)."""
    operators: list[fx.Node] = []
    constants: dict[fx.Node, Any] = dict(program.tensors)
    rules: dict[int, SizeRule] = {}
    tainted: set[fx.Node] = {program.input, *weights}
    for node in program.nodes:
        if node.op in ("placeholder", "output") or not node.users:
            continue
        _refuse_unrunnable(node)
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | int) and not isinstance(value, bool):
            rules[program.slots[node]] = program.size_rule(value)
            continue
        has_batch = isinstance(value, Tensor) and any(program.has_batch(length) for length in value.shape)
        reads_shape_only = str(node.target) in _SHAPE_ONLY and isinstance(value, Tensor)
        is_free = reads_shape_only or not tainted.intersection(node.all_input_nodes)
        if is_free and not has_batch:
            constants[node] = _folded_constant(program, node, constants)
        else:  # also values that only have the batch's shape, such as an expanded class token: they are cheap
            tainted.add(node)
            operators.append(node)
    return operators, constants, rules


def _refuse_unrunnable(node: fx.Node) -> None:
    if node.op != "call_function":
        raise NetworkError(f"the exported graph holds a {node.op} node ({node.target}), which cannot be run in part")
    tags = getattr(node.target, "tags", ())
    if torch.Tag.nondeterministic_seeded in tags and not _is_attention_without_dropout(node):
        raise NetworkError(f"the network draws random numbers in {node.target} ({node.name}); expected a deterministic eval mode")


def _is_attention_without_dropout(node: fx.Node) -> bool:
    dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    return "scaled_dot_product_attention" in str(node.target) and isinstance(dropout, float | int) and dropout == 0


def _folded_constant(program: Program, node: fx.Node, constants: Mapping[fx.Node, Any]) -> Any:
    """The result of an operator that depends on no image."""

    def known(argument: fx.Node) -> Any:
        if argument in constants:
            return constants[argument]
        value = argument.meta["val"]  # read for its type and shape only
        return torch.empty(0, dtype=value.dtype, device=program.device) if isinstance(value, Tensor) else int(value)

    with torch.no_grad():
        assert callable(node.target)
        return node.target(*fx.map_arg(node.args, known), **fx.map_arg(node.kwargs, known))


def _last_reads(program: Program, operators: Sequence[fx.Node]) -> dict[int, int]:
    """Slot -> position of the last operator that reads it, for the values of a run."""
    output = next(node for node in program.nodes if node.op == "output")
    values = {program.slots[node] for node in (program.input, *operators)}
    reads = {slot: k for k, node in enumerate([*operators, output]) for slot in _slots_read(program, node)}
    return {slot: k for slot, k in reads.items() if slot in values}


def _slots_read(program: Program, node: fx.Node) -> list[int]:
    return [program.slots[argument] for argument in dict.fromkeys(node.all_input_nodes)]


def _call(
    node: fx.Node, read: Callable[[Any], Any], given_bias: int | None
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """(operator, arguments, keywords). `given_bias` is the slot of an added bias."""
    function = node.target
    assert callable(function)
    arguments = tuple(read(argument) for argument in node.args)
    keywords = {key: read(argument) for key, argument in node.kwargs.items()}
    if given_bias is not None:
        keywords.pop("bias", None)
        arguments = (*arguments[:2], Constant(given_bias), *arguments[3:])
    elif str(function) in CONSUMERS and "bias" in keywords:
        arguments = (*arguments, keywords.pop("bias"))
    if str(function) == "aten._native_batch_norm_legit_no_training.default":
        # the operator that modules run; the decomposed one also returns empty statistics
        function = batch_norm
    elif function is torch.ops.aten.view.default:
        function = torch.ops.aten.reshape.default  # the same, but it copies if channels_last allows no view
    return function, arguments, keywords


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, momentum: float, eps: float
) -> tuple[Tensor]:
    """Batch norm of x (N, channels, ...) in eval mode. Returns a tuple, like the exported operator."""
    return (torch.ops.aten.batch_norm.default(x, weight, bias, mean, var, False, momentum, eps, False),)
