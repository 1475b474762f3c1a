"""From a module to a `Graph`, step by step.

`program` exports the module, `weights` finds the searched layers, `lowering` makes instructions,
and `cuts` finds where a run can be resumed.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, fx, nn

from clado.network.attention import images_first
from clado.network.cuts import find_cuts, image_axes, in_place
from clado.network.engine import Cut
from clado.network.graph import Graph, GraphLayer, Instruction, Norm, Value
from clado.network.lowering import Lowered, batch_norm, lowered
from clado.network.program import Program, export
from clado.network.weights import SearchedWeight, macs_of, searched_weights, unsearched


def compile_graph(
    model: nn.Module, example: Tensor, fixed: Callable[[str], bool], split: Callable[[str], bool] = lambda name: False
) -> Graph:
    """The graph of a model whose layers are all weights of convolutions and linear operators.

    Args:
        model: The network.
        example: Images (N, ...); their values do not matter.
        fixed: Whether the parameter of a name stays in float.
        split: Whether the linear weight of a name becomes three layers, its rows for queries, keys
            and values: name.q, name.k, name.v.

    Raises:
        NetworkError: The model cannot be exported, or cannot be run in part.
    """
    exported = export(model, example)
    images_first(exported)
    program = Program(model, exported)
    weights = searched_weights(program, fixed, split)
    operators = lowered(program, weights)
    graph = Graph(
        layers=(),
        instructions=operators.instructions,
        constants=operators.constants,
        scalars=operators.scalars,
        norms=_norms(program, operators.instructions),
        named=_named(program, operators.operators),
        input_slot=program.slots[program.input],
        output_slot=program.slots[program.output],
        macs=sum(macs_of(program, node) for node in operators.operators),
        unsearched=unsearched(program, weights, fixed),
    )
    cuts = find_cuts(program, operators, image_axes(program, operators, graph, example))
    layers = tuple(
        _layer(program, operators, graph.norms, weight, bias_slot, cut)
        for weight, bias_slot, cut in zip(operators.weights, operators.bias_slots, cuts, strict=True)
    )
    return replace(graph, layers=layers, instructions=in_place(program, operators, cuts))


def _layer(
    program: Program, operators: Lowered, norms: Sequence[Norm], weight: SearchedWeight, bias_slot: int | None, cut: Cut
) -> GraphLayer:
    return GraphLayer(
        layer=weight.layer,
        parameter=program.names[weight.nodes[0]],
        rows=weight.rows,
        bias_name=None if weight.bias is None else program.names[weight.bias],
        # rows of a bias are replaced in a copy of it
        takes_bias=bias_slot is not None and (weight.rows is None or operators.constants[bias_slot] is not None),
        norm_mean=_norm_mean(program, norms, weight),
        cut=cut,
        slots=tuple(program.slots[node] for node in weight.nodes),
        bias_slot=bias_slot,
        last_use=weight.positions(operators.operators)[-1],
    )


def _norms(program: Program, instructions: Sequence[Instruction]) -> tuple[Norm, ...]:
    """Batch norms whose statistics are buffers that nothing else reads."""
    norms = []
    slots = {program.slots[node]: name for node, name in program.names.items() if len(node.users) == 1}
    for k, step in enumerate(instructions):
        if step.function is not batch_norm:
            continue
        x, _, _, mean, variance, _, eps = step.arguments
        if isinstance(x, Value) and mean.slot in slots and variance.slot in slots:
            norms.append(Norm(k, x.slot, slots[mean.slot], slots[variance.slot], float(eps)))
    return tuple(norms)


def _norm_mean(program: Program, norms: Sequence[Norm], weight: SearchedWeight) -> str | None:
    """Name of the running mean of a batch norm over channels, if only it reads a layer's result."""
    consumer = weight.consumer
    channels_last = weight.layer.operator == "linear" and consumer.meta["val"].ndim != 2  # batch norm's are on axis 1
    if len(weight.consumers) > 1 or len(consumer.users) != 1 or channels_last:
        return None
    slot = program.slots[consumer]
    return next((norm.mean for norm in norms if norm.input_slot == slot), None)


def _named(program: Program, operators: Sequence[fx.Node]) -> dict[str, tuple[int, ...]]:
    """Slots of the parameters and buffers that are part of no folded constant, by name."""
    running = set(operators)
    named: dict[str, tuple[int, ...]] = {}
    constant = set()
    for node, name in program.names.items():
        named[name] = (*named.get(name, ()), program.slots[node])
        if not set(node.users) <= running:
            constant.add(name)
    return {name: slots for name, slots in named.items() if name not in constant}
