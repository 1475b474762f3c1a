"""From a module to a Graph: `torch.export` gives a flat list of ATen operators, and this file reads it once.

It finds the searched weights and their biases, computes what depends on no image, and decides in integers when each value dies,
where a run may be cut (before the first use of each searched weight) and along which axis the values alive there are stacked.
"""

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from clado.errors import NetworkError
from clado.network.attention import images_first
from clado.network.graph import IN_PLACE, Constant, Cut, Graph, Instruction, Norm, Scalar, State, Value, batch_norm
from clado.space import Layer

# Operators that consume a weight: position of the weight, and the weight's axis of output channels.
_CONSUMERS: dict[str, tuple[int, int]] = {
    "aten.conv1d.default": (1, 0),
    "aten.conv2d.default": (1, 0),
    "aten.conv3d.default": (1, 0),
    "aten.conv1d.padding": (1, 0),
    "aten.conv2d.padding": (1, 0),
    "aten.conv3d.padding": (1, 0),
    "aten.conv_transpose1d.default": (1, 1),
    "aten.conv_transpose2d.input": (1, 1),
    "aten.conv_transpose3d.input": (1, 1),
    "aten.linear.default": (1, 0),
}
# Operators through which a weight may pass on its way to a consumer (attention splits in_proj into q, k and v).
_WEIGHT_VIEWS = {
    f"aten.{name}"
    for name in (
        *("view.default", "reshape.default", "slice.Tensor", "select.int", "split.Tensor", "split_with_sizes.default"),
        *("chunk.default", "unsqueeze.default", "squeeze.dim", "clone.default", "alias.default", "detach.default"),
        "contiguous.default",
    )
} | {"<built-in function getitem>"}
# Operators that read of their tensor argument only its type and shape.
_SHAPE_ONLY = {f"aten.new_{kind}.default" for kind in ("zeros", "ones", "full", "empty")}
# of one run: cuDNN's batch norm takes no more, and torch.export refuses a range on CUDA that another kernel would serve in part
MOST_IMAGES = 65_535
_INSTEAD = (
    "Measure it by whole forwards instead (slower, the same numbers): clado.Network(model, example_input, graph=False), "
    "or graph: false under network in the settings"
)
_FRESH = {
    "aten.conv1d.default",
    "aten.conv2d.default",
    "aten.conv3d.default",
    "aten.linear.default",
    "aten.batch_norm.default",
    "aten.add.Tensor",
    "aten.layer_norm.default",
}


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules() if module.training]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def why_unsearched(tensor: Tensor, is_fixed: bool, used_by: str) -> str:
    """Why a parameter is not searched, for the coverage report."""
    if is_fixed:
        return "fixed by the configuration"
    return "a bias, scale or shift: one value a channel" if tensor.ndim < 2 else f"used by {used_by}"


def export(model: nn.Module, example: Tensor) -> ExportedProgram:
    """`torch.export` with a dynamic batch, in eval mode whatever mode the model arrives in; functional, nothing decomposed."""
    try:
        # torch.export takes a batch of one for a constant
        batch = example if len(example) > 1 else torch.cat([example, example])
        with torch.no_grad(), eval_mode(model):
            sizes = {0: Dim("batch", max=MOST_IMAGES)}
            program: ExportedProgram = torch.export.export(model, (batch,), dynamic_shapes=(sizes,))
            program = program.run_decompositions({})
            return program
    except Exception as error:  # torch.export raises many kinds; each means that this network has no graph
        lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        first = next((line for line in lines if "specialized" in line), lines[0])
        if "specialized" in first:
            first = "its code makes the number of images a constant; use x.shape[0] where it has len(x) or int(...)"
        raise NetworkError(
            f"torch.export cannot turn {type(model).__name__} into a graph of operators with a dynamic batch: {first[:300]}\n"
            f"  {_INSTEAD}"
        ) from error


def compile_graph(
    model: nn.Module, example: Tensor, fixed: Callable[[str], bool], split: Callable[[str], bool] = lambda name: False
) -> Graph:
    """The graph of a model whose layers are all weights of convolutions and linear operators except those that `fixed` names.

    A linear weight that `split` names becomes three layers, its rows for queries, keys and values: name.q, name.k, name.v.
    """
    program = export(model, example)
    images_first(program)
    return _Compiler(model, program, fixed, split).compile(example)


@dataclass(frozen=True)
class _Found:
    """A weight that is searched: its placeholders and consumers, and where its bias is."""

    nodes: tuple[fx.Node, ...]
    consumers: tuple[fx.Node, ...]
    axis: int
    operator: str
    macs: int
    bias: fx.Node | None
    adds_bias: bool
    rows: slice | None = None
    part: str = ""

    @property
    def consumer(self) -> fx.Node:
        """The first operator that reads it."""
        return self.consumers[0]


class _Compiler:
    """Turns an exported program into a Graph; exists only while it does."""

    def __init__(
        self, model: nn.Module, program: ExportedProgram, fixed: Callable[[str], bool], split: Callable[[str], bool]
    ) -> None:
        self.program = program
        self.fixed = fixed
        self.split = split
        self.nodes = list(program.graph_module.graph.nodes)
        self.number = {node: k for k, node in enumerate(self.nodes)}
        self.tensors: dict[fx.Node, Any] = {}
        self.names: dict[fx.Node, str] = {}
        self.parameters: set[fx.Node] = set()
        self.input = self._read_signature(model)
        self.output = self._read_output()
        self.batch_symbol = self.input.meta["val"].shape[0].node.expr
        mutated = program.graph_signature.buffers_to_mutate
        if mutated:
            raise NetworkError(
                f"the network changes its buffers when it runs ({', '.join(mutated.values())}); "
                "expected an eval mode that does not"
            )

    def _read_signature(self, model: nn.Module) -> fx.Node:
        inputs = []
        placeholders = [node for node in self.nodes if node.op == "placeholder"]
        parameters = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
        # of a tensor with several names the module's first is used, whichever torch.export keeps
        first_names = {id(parameter): name for name, parameter in model.named_parameters()}
        for node, spec in zip(placeholders, self.program.graph_signature.input_specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                inputs.append(node)
            elif spec.target is not None:
                name = str(spec.target)
                if spec.kind is InputKind.PARAMETER:
                    self.parameters.add(node)
                self.names[node] = first_names.get(id(parameters.get(name)), name)
                source = self.program.constants.get(name) if spec.kind is InputKind.CONSTANT_TENSOR else None
                tensor = source if source is not None else parameters.get(name, self.program.constants.get(name))
                if tensor is None:
                    raise NetworkError(f"the exported graph reads {name}, which the network does not have")
                self.tensors[node] = tensor.detach() if isinstance(tensor, Tensor) else tensor
        if len(inputs) != 1:
            raise NetworkError(f"the network takes {len(inputs)} inputs; expected one batch of images")
        images: fx.Node = inputs[0]
        return images

    def _read_output(self) -> fx.Node:
        """The logits: what the network returns, not what torch.export puts beside it where the images are changed in place."""
        nodes = next(node for node in self.nodes if node.op == "output").args[0]
        specs = self.program.graph_signature.output_specs
        returned = [node for node, spec in zip(nodes, specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT]
        if len(returned) != 1 or not isinstance(returned[0], fx.Node):
            raise NetworkError(
                f"the network returns {len(returned)} values; expected logits (images, classes) alone: wrap it in a module that "
                "returns them"
            )
        return returned[0]

    def compile(self, example: Tensor) -> Graph:
        self.found = self._find_layers()
        weights = {node for found in self.found for node in found.nodes}
        dynamic, constants, scalars = self._classify(weights)
        self.found.sort(key=lambda found: self._first_use(found.nodes, dynamic))
        added = {found.consumer: len(self.nodes) + k for k, found in enumerate(self.found) if found.adds_bias}
        self.instructions = self._schedule(dynamic, constants, scalars, added)
        positions = {node: k for k, node in enumerate(dynamic)}
        macs_at = [0] * len(dynamic)
        for node in dynamic:
            macs_at[positions[node]] = self._macs(node)
        graph = Graph(
            layers=tuple(self._layer(found) for found in self.found),
            cuts=(),
            instructions=(),
            constants={**{self.number[node]: value for node, value in constants.items()}, **dict.fromkeys(added.values())},
            slots=tuple(tuple(self.number[node] for node in found.nodes) for found in self.found),
            rows=tuple(found.rows for found in self.found),
            bias_slots=tuple(
                added[found.consumer] if found.adds_bias else self.number[found.bias] if found.bias is not None else None
                for found in self.found
            ),
            last_uses=tuple(
                max(k for k, node in enumerate(dynamic) if set(found.nodes) & set(node.all_input_nodes)) for found in self.found
            ),
            norms=self._norms(),
            named=self._named(dynamic),
            parameters=tuple((self.names[found.nodes[0]], found.rows) for found in self.found),
            bias_names=tuple(None if found.bias is None else self.names[found.bias] for found in self.found),
            norm_means=tuple(self._norm_mean(found) for found in self.found),
            input_slot=self.number[self.input],
            output_slot=self.number[self.output],
            macs=sum(macs_at),
            unsearched=self._unsearched(weights),
            scalars=scalars,
        )
        consumed: dict[int, list[int]] = {}
        for i, found in enumerate(self.found):
            for consumer in found.consumers:
                consumed.setdefault(positions[consumer], []).append(i)
        self.instructions = [replace(step, layers=tuple(consumed.get(k, ()))) for k, step in enumerate(self.instructions)]
        graph.instructions = tuple(self.instructions)
        firsts = [self._first_use(found.nodes, dynamic) for found in self.found]
        graph.cuts = self._cut(graph, dynamic, firsts, macs_at, example)
        graph.instructions = tuple(self._in_place(graph, dynamic))
        return graph

    def _layer(self, found: "_Found") -> Layer:
        name, shape = self.names[found.nodes[0]], tuple(self.tensors[found.nodes[0]].shape)
        if found.rows is None:
            return Layer(name, shape, found.operator, found.macs, found.axis)
        return Layer(f"{name}.{found.part}", (shape[0] // 3, *shape[1:]), found.operator, found.macs // 3, found.axis)

    def _norms(self) -> tuple[Norm, ...]:
        """Batch norms whose statistics are buffers that nothing else reads."""
        norms = []
        slots = {self.number[node]: name for node, name in self.names.items() if len(node.users) == 1}
        for k, step in enumerate(self.instructions):
            if step.function is not batch_norm:
                continue
            x, _, _, mean, variance, _, eps = step.arguments
            if isinstance(x, Value) and mean.slot in slots and variance.slot in slots:
                norms.append(Norm(k, x.slot, slots[mean.slot], slots[variance.slot], float(eps)))
        return tuple(norms)

    def _norm_mean(self, found: "_Found") -> str | None:
        """Name of the mean of the batch norm that alone reads what the one consumer of a layer gives, over its channels."""
        readers = list(found.consumer.users)
        channels_last = found.operator == "linear" and found.consumer.meta["val"].ndim != 2  # batch norm's are on axis 1
        if len(found.consumers) > 1 or len(readers) != 1 or channels_last:
            return None
        slot = self.number[found.consumer]
        return next((norm.mean for norm in self._norms() if norm.input_slot == slot), None)

    def _named(self, dynamic: Sequence[fx.Node]) -> dict[str, tuple[int, ...]]:
        """Slots of the parameters and buffers that only operators read that run: none of them is part of a folded constant."""
        running = set(dynamic)
        named: dict[str, list[int]] = {}
        folded = set()
        for node, name in self.names.items():
            named.setdefault(name, []).append(self.number[node])
            if not set(node.users) <= running:
                folded.add(name)
        return {name: tuple(slots) for name, slots in named.items() if name not in folded}

    # -- layers ------------------------------------------------------------------------------------------------------------

    def _consumed(self, node: fx.Node) -> Iterable[tuple[fx.Node, int]]:
        """Consumers that a weight reaches, directly or through views of itself, with the weight's channel axis there."""
        for user in node.users:
            target = str(user.target)
            if target in _CONSUMERS and user.args[_CONSUMERS[target][0]] is node:
                yield user, _CONSUMERS[target][1]
            elif target in _WEIGHT_VIEWS:
                yield from self._consumed(user)

    def _find_layers(self) -> list["_Found"]:
        """Every weight that is searched: parameters, as buffers are no weights that training made."""
        groups: dict[int, list[fx.Node]] = {}
        for node, tensor in self.tensors.items():
            if (
                node in self.parameters
                and isinstance(tensor, Tensor)
                and tensor.is_floating_point()
                and tensor.ndim >= 2
                and any(True for _ in self._consumed(node))
            ):
                groups.setdefault(tensor.data_ptr(), []).append(node)
        found: list[_Found] = []
        for nodes in groups.values():
            name = self.names[nodes[0]]
            if self.fixed(name):
                continue
            pairs = [pair for node in nodes for pair in self._consumed(node)]
            consumers = tuple(dict.fromkeys(consumer for consumer, _ in pairs))
            operator_name = str(consumers[0].target).split(".")[1]
            direct = len(consumers) == 1 and consumers[0].args[_CONSUMERS[str(consumers[0].target)][0]] in nodes
            bias, adds = self._bias(consumers[0]) if direct else (None, False)
            macs = sum(self._macs(consumer) for consumer in consumers)
            whole = _Found(tuple(nodes), consumers, pairs[0][1], operator_name, macs, bias, adds)
            if not self.split(name):
                found.append(whole)
                continue
            rows = self.tensors[nodes[0]].shape[0]
            if not direct or operator_name != "linear" or rows % 3:
                raise NetworkError(
                    f"{name} cannot be split into queries, keys and values: expected one linear operator that reads it whole, "
                    f"with rows in thirds; it has {rows} rows and is read by {', '.join(str(c.target) for c in consumers)}"
                )
            for k, part in enumerate("qkv"):
                third = slice(k * rows // 3, (k + 1) * rows // 3)
                found.append(replace(whole, adds_bias=False, rows=third, part=part))
        return found

    def _bias(self, consumer: fx.Node) -> tuple[fx.Node | None, bool]:
        """(the placeholder of an operator's own bias, whether it has none and may be given one)."""
        bias = consumer.args[2] if len(consumer.args) > 2 else consumer.kwargs.get("bias")
        if bias is None:
            return None, True
        return (bias, False) if isinstance(bias, fx.Node) and bias in self.tensors and len(bias.users) == 1 else (None, False)

    def _macs(self, node: fx.Node) -> int:
        """Multiply-accumulates of one image in a consumer; 0 for any other operator."""
        target = str(node.target)
        if target not in _CONSUMERS:
            return 0
        out = node.meta["val"]
        weight = node.args[_CONSUMERS[target][0]]
        assert isinstance(weight, fx.Node)
        shape = weight.meta["val"].shape
        if "transpose" in target:  # weight (in, out / groups, ...): each input value meets shape[1:] of them
            source = node.args[0]
            assert isinstance(source, fx.Node)
            return self._per_image(source.meta["val"]) * math.prod(int(n) for n in shape[1:])
        return self._per_image(out) * math.prod(int(n) for n in shape[1:])

    def _per_image(self, value: Any) -> int:
        return math.prod(self._at_batch(length, 1) for length in value.shape)

    def _at_batch(self, value: Any, num_images: int) -> int:
        expression = getattr(getattr(value, "node", None), "expr", None)
        return int(value) if expression is None else int(expression.subs(self.batch_symbol, num_images))

    def _unsearched(self, weights: set[fx.Node]) -> tuple[tuple[str, int, str], ...]:
        """(name, bytes, why) of every parameter that is not searched."""
        parameters = self.program.graph_signature.inputs_to_parameters
        seen = {self.names[node] for node in weights}  # a tied parameter has several placeholders, some of them unused
        rows = []
        for node, name in self.names.items():
            if node.name not in parameters or name in seen:
                continue
            seen.add(name)
            tensor = self.tensors[node]
            users = ", ".join(sorted({str(user.target) for user in node.users})) or "nothing"
            rows.append((name, tensor.numel() * tensor.element_size(), why_unsearched(tensor, self.fixed(name), users)))
        return tuple(rows)

    # -- what runs ---------------------------------------------------------------------------------------------------------

    def _classify(self, weights: set[fx.Node]) -> tuple[list[fx.Node], dict[fx.Node, Any], dict[int, Callable[[int], int]]]:
        """Operators that depend on the images or on a searched weight, in order; folded constants; rules of scalars."""
        dynamic: list[fx.Node] = []
        constants: dict[fx.Node, Any] = dict(self.tensors)
        scalars: dict[int, Callable[[int], int]] = {}
        tainted: set[fx.Node] = {self.input, *weights}
        for node in self.nodes:
            if node.op in ("placeholder", "output") or not node.users:
                continue
            if node.op != "call_function":
                raise NetworkError(f"the exported graph holds a {node.op} node ({node.target}), which cannot be run in part")
            tags = getattr(node.target, "tags", ())
            if torch.Tag.nondeterministic_seeded in tags and not _is_attention_without_dropout(node):
                raise NetworkError(
                    f"the network draws random numbers in {node.target} ({node.name}); expected a deterministic eval mode"
                )
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt | int) and not isinstance(value, bool):
                scalars[self.number[node]] = self._rule(value)
                continue
            read = [argument for argument in node.all_input_nodes if self.number[argument] not in scalars]
            batchless = isinstance(value, Tensor) and not any(self._has_batch(length) for length in value.shape)
            if not tainted & set(read) or (str(node.target) in _SHAPE_ONLY and batchless):
                if isinstance(value, Tensor) and not batchless:  # such as an expanded class token: cheap, depends on the batch
                    tainted.add(node)
                    dynamic.append(node)
                else:
                    constants[node] = self._fold(node, constants)
            else:
                tainted.add(node)
                dynamic.append(node)
        return dynamic, constants, scalars

    def _has_batch(self, length: Any) -> bool:
        expression = getattr(getattr(length, "node", None), "expr", None)
        return expression is not None and self.batch_symbol in expression.free_symbols

    def _rule(self, value: Any) -> Callable[[int], int]:
        expression = getattr(getattr(value, "node", None), "expr", None)
        if expression is None:
            return lambda _: int(value)
        if expression.free_symbols - {self.batch_symbol}:
            raise NetworkError(
                f"the network has a size that follows from the images' content ({expression}); expected fixed shapes"
            )
        return lambda num_images: int(expression.subs(self.batch_symbol, num_images))

    def _fold(self, node: fx.Node, constants: Mapping[fx.Node, Any]) -> Any:
        def known(argument: fx.Node) -> Any:
            if argument in constants:
                return constants[argument]
            value = argument.meta["val"]  # read for its type and shape only
            if not isinstance(value, Tensor):
                return int(value)
            device = next((t.device for t in self.tensors.values() if isinstance(t, Tensor)), torch.device("cpu"))
            return torch.empty(0, dtype=value.dtype, device=device)

        arguments = fx.map_arg(node.args, known)
        keywords = fx.map_arg(node.kwargs, known)
        with torch.no_grad():
            assert callable(node.target)
            return node.target(*arguments, **keywords)

    def _schedule(
        self, dynamic: list[fx.Node], constants: Mapping[fx.Node, Any], scalars: Mapping[int, Any], added: Mapping[fx.Node, int]
    ) -> list[Instruction]:
        last: dict[fx.Node, int] = {}
        for k, node in enumerate(dynamic):
            for argument in node.all_input_nodes:
                last[argument] = k
        output = next(node for node in self.nodes if node.op == "output")
        for argument in output.all_input_nodes:
            last[argument] = len(dynamic)
        mine = {self.input, *dynamic}
        self.last = {self.number[node]: k for node, k in last.items() if node in mine}

        def refer(node: fx.Node) -> Value | Constant | Scalar:
            slot = self.number[node]
            if slot in scalars:
                return Scalar(slot)
            return Constant(slot) if node in constants else Value(slot)

        def template(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                return refer(argument)
            if isinstance(argument, list | tuple):
                return [template(part) for part in argument]
            return argument

        steps = []
        for k, node in enumerate(dynamic):
            dying = tuple(self.number[a] for a in dict.fromkeys(node.all_input_nodes) if a in mine and last[a] == k)
            assert callable(node.target)
            keywords = {key: template(argument) for key, argument in node.kwargs.items()}
            function = node.target
            arguments = tuple(template(argument) for argument in node.args)
            if node in added:
                keywords.pop("bias", None)
                arguments = (*arguments[:2], Constant(added[node]), *arguments[3:])
            elif str(function) in _CONSUMERS and "bias" in keywords:
                arguments = (*arguments, keywords.pop("bias"))
            if str(function) == "aten._native_batch_norm_legit_no_training.default":
                # the same operator as modules run: the decomposed one returns empty statistics that only cost a tuple
                function = batch_norm
            elif function is torch.ops.aten.view.default:
                function = torch.ops.aten.reshape.default  # the same, and it copies where channels_last leaves no view
            steps.append(Instruction(function, arguments, keywords, self.number[node], dying, node.name))
        return steps

    @staticmethod
    def _first_use(nodes: Sequence[fx.Node], dynamic: Sequence[fx.Node]) -> int:
        return min(k for k, node in enumerate(dynamic) if set(nodes) & set(node.all_input_nodes))

    # -- cuts --------------------------------------------------------------------------------------------------------------

    def _cut(
        self, graph: Graph, dynamic: list[fx.Node], firsts: list[int], macs_at: list[int], example: Tensor
    ) -> tuple[Cut, ...]:
        axes = self._stack_axes(graph, dynamic, example)
        shapes = {self.number[node]: node.meta["val"] for node in [self.input, *dynamic]}
        born = {self.number[self.input]: -1, **{self.number[node]: k for k, node in enumerate(dynamic)}}
        cuts = []
        for i, first in enumerate(firsts):
            earliest = max((k for k in firsts if k < first), default=-1) + 1  # the parts of a split weight have one cut
            for position in range(first, earliest - 1, -1):
                alive = [slot for slot, k in born.items() if k < position <= self.last.get(slot, -1)]
                if all(slot in axes for slot in alive):
                    break
            else:
                raise NetworkError(
                    f"the values alive before {graph.layers[i].name} cannot be stacked along the batch\n  {_INSTEAD}"
                )
            size = sum(self._per_image(shapes[slot]) * shapes[slot].dtype.itemsize for slot in alive)
            peak = self._peak_bytes(dynamic, position, alive, shapes)
            cuts.append(Cut(position, {slot: axes[slot] for slot in alive}, size, sum(macs_at[position:]), peak))
        return tuple(cuts)

    def _peak_bytes(self, dynamic: list[fx.Node], position: int, alive: list[int], shapes: Mapping[int, Any]) -> int:
        """Most bytes of one image's values that exist at once from `position` on; a view counts as what it shows."""

        def size(slot: int) -> int:
            value = shapes[slot]
            return self._per_image(value) * value.dtype.itemsize if isinstance(value, Tensor) else 0

        held = {slot: size(slot) for slot in alive}
        peak = sum(held.values())
        for k in range(position, len(dynamic)):
            held[self.number[dynamic[k]]] = size(self.number[dynamic[k]])
            peak = max(peak, sum(held.values()))
            for slot in self.instructions[k].frees:
                held.pop(slot, None)
        return peak

    def _stack_axes(self, graph: Graph, dynamic: list[fx.Node], example: Tensor) -> dict[int, int]:
        """Slot -> axis along which values of separate images, put one after another, are the value of all images.

        Read off the symbolic shapes, then checked by running two images together and apart: an axis that merges batch and
        positions with the batch inside (as attention's output projection has it) fails the check and is not cut at.
        """
        device = next((t.device for t in graph.constants.values() if isinstance(t, Tensor)), example.device)
        generator = torch.Generator().manual_seed(0)
        images = torch.randn((2, *example.shape[1:]), generator=generator).to(device, example.dtype)
        stacked, *apart = (self._values(graph, part) for part in (images, images[:1], images[1:]))
        axes = {}
        for node in [self.input, *dynamic]:
            value = node.meta["val"]
            if not isinstance(value, Tensor):
                continue
            candidates = [k for k, length in enumerate(value.shape) if self._has_batch(length)]
            slot = self.number[node]
            if len(candidates) != 1 or any(
                part[slot].shape[candidates[0]] * 2 != stacked[slot].shape[candidates[0]] for part in apart
            ):
                continue
            joined = torch.cat([part[slot] for part in apart], candidates[0]).double()
            tolerance = 1e-3 * float(joined.abs().max()) + 1e-6
            if joined.shape == stacked[slot].shape and float((joined - stacked[slot].double()).abs().max()) <= tolerance:
                axes[slot] = candidates[0]
        return axes

    def _values(self, graph: Graph, images: Tensor) -> dict[int, Any]:
        """Every value of a run."""
        kept: dict[int, Any] = {graph.input_slot: images}
        state = State({graph.input_slot: images}, 0, len(images), len(images))
        with torch.inference_mode():
            for k, step in enumerate(graph.instructions):
                state = graph.run(state, k + 1, {})
                kept[step.slot] = state.values.get(step.slot)
        return kept

    def _in_place(self, graph: Graph, dynamic: list[fx.Node]) -> list[Instruction]:
        """The instructions, with in-place twins where the first argument is fresh, read by nobody else, and alive at no cut."""
        born = {self.number[node]: k for k, node in enumerate(dynamic)}
        positions = sorted(cut.position for cut in graph.cuts)
        steps = []
        for k, (node, step) in enumerate(zip(dynamic, graph.instructions, strict=True)):
            twin = IN_PLACE.get(node.target)  # type: ignore[call-overload]
            if twin is not None:
                argument = node.args[0]
                others = [a for a in node.args[1:] if isinstance(a, fx.Node)]
                if (
                    isinstance(argument, fx.Node)
                    and argument not in others
                    and len(argument.users) == 1
                    and self._is_fresh(argument)
                    and argument.meta["val"].shape == node.meta["val"].shape
                    and argument.meta["val"].dtype == node.meta["val"].dtype
                    and not any(born[self.number[argument]] < position <= k for position in positions)
                ):
                    step = replace(step, function=twin)
            steps.append(step)
        return steps

    def _is_fresh(self, node: fx.Node) -> bool:
        """Whether a value is memory of its own: the result of an operator that never returns a view."""
        if node.target is operator.getitem:
            source = node.args[0]
            return isinstance(source, fx.Node) and "batch_norm" in str(source.target)
        return str(node.target) in _FRESH


def _is_attention_without_dropout(node: fx.Node) -> bool:
    dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    return "scaled_dot_product_attention" in str(node.target) and isinstance(dropout, float | int) and dropout == 0
