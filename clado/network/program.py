"""From a module to an exported program: a flat list of ATen operators, and what they read.

Sizes in a program are symbolic: each follows from the number of images.
"""

import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from clado.errors import NetworkError

# of one run: cuDNN's batch norm takes no more. On CUDA torch.export refuses a range of sizes that
# another kernel would serve in part.
MOST_IMAGES = 65_535
INSTEAD = (
    "Measure it by whole forwards instead (slower, the same numbers): clado.Network(model, example_input, graph=False), "
    "or graph: false under network in the settings"
)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode during the context. Every module then gets its own mode back."""
    modes = [(module, module.training) for module in model.modules() if module.training]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _without_dumps() -> Iterator[None]:
    """Keeps back what torch.export prints and logs where it fails: a part of a graph. Otherwise it is printed afterwards."""
    loggers = [logging.getLogger(name) for name in ("torch.export._trace", "torch.fx.experimental.symbolic_shapes")]
    disabled, printed = [logger.disabled for logger in loggers], StringIO()
    try:
        for logger in loggers:
            logger.disabled = True
        with redirect_stderr(printed):
            yield
        sys.stderr.write(printed.getvalue())
    finally:
        for logger, was_disabled in zip(loggers, disabled, strict=True):
            logger.disabled = was_disabled


def _reason(error: Exception) -> str:
    """Why torch.export refuses a network, in a line."""
    lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if any("data-dependent" in line for line in lines):
        return (
            "its code decides by the content of the images, such as by `if x.sum() > 0`, or by int() or .item() of a value "
            "that it computes; use torch.where, or tensors in place of numbers"
        )
    if any("specialized" in line for line in lines):
        return "its code makes the number of images a constant; use x.shape[0] where it has len(x) or int(...)"
    return lines[0]


def export(model: nn.Module, example: Tensor) -> ExportedProgram:
    """`torch.export` with a dynamic batch, in eval mode. The program is functional and not decomposed.

    Args:
        model: The network.
        example: Images (N, ...); their values do not matter.

    Raises:
        NetworkError: `torch.export` refuses the network.
    """
    try:
        # torch.export treats a batch of one as a constant
        batch = example if len(example) > 1 else torch.cat([example, example])
        with torch.no_grad(), eval_mode(model), _without_dumps():
            sizes = {0: Dim("batch", max=MOST_IMAGES)}
            program: ExportedProgram = torch.export.export(model, (batch,), dynamic_shapes=(sizes,))
            program = program.run_decompositions({})
            return program
    except Exception as error:  # torch.export raises exceptions of many types; each means that this network has no graph
        raise NetworkError(
            f"torch.export cannot turn {type(model).__name__} into a graph of operators with a dynamic batch: "
            f"{_reason(error)[:300]}\n"
            f"  {INSTEAD}"
        ) from error


def expression_of(size: Any) -> Any:
    """The symbolic expression of a size, None if it is a plain integer."""
    return getattr(getattr(size, "node", None), "expr", None)


def size_at(size: Any, batch_symbol: Any, num_images: int) -> int:
    """A size for a number of images."""
    expression = expression_of(size)
    return int(size) if expression is None else int(expression.subs(batch_symbol, num_images))


@dataclass(frozen=True)
class SizeRule:
    """A size that follows from the number of images. It is plain data for almost every network, so that it can be sent."""

    constant: int
    """The part that is the same for every number of images."""
    per_image: int
    """What each image adds."""
    expression: Any = None
    """The symbolic expression of a size of another form, else None."""
    batch_symbol: Any = None
    """The number of images in the expression."""

    @classmethod
    def of(cls, size: Any, batch_symbol: Any) -> "SizeRule":
        """The rule of a size of a program."""
        constant = size_at(size, batch_symbol, 0)
        per_image = size_at(size, batch_symbol, 1) - constant
        expression = expression_of(size)
        if expression is None or (expression - constant - per_image * batch_symbol).expand() == 0:
            return cls(constant, per_image)
        return cls(0, 0, expression, batch_symbol)

    def __call__(self, num_images: int) -> int:
        """The size for a number of images."""
        if self.expression is None:
            return self.constant + self.per_image * num_images
        return int(self.expression.subs(self.batch_symbol, num_images))


class Program:
    """An exported program: its operators, the tensors that they read, and its sizes."""

    def __init__(self, model: nn.Module, exported: ExportedProgram) -> None:
        self.exported = exported
        self.nodes: list[fx.Node] = list(exported.graph_module.graph.nodes)
        """Operators and what they read, in execution order."""
        self.slots = {node: k for k, node in enumerate(self.nodes)}
        """Number of each node: the slot of its value."""
        self.tensors: dict[fx.Node, Any] = {}
        """Parameters, buffers and constants."""
        self.names: dict[fx.Node, str] = {}
        """Their names in the module."""
        self.parameters: set[fx.Node] = set()
        """Those that are parameters."""
        self.input = self._read_inputs(model)
        self.output = self._read_output()
        self.batch_symbol = expression_of(self.input.meta["val"].shape[0])
        mutated = exported.graph_signature.buffers_to_mutate
        if mutated:
            raise NetworkError(
                f"the network changes its buffers when it runs ({', '.join(mutated.values())}); "
                "expected an eval mode that does not"
            )

    def _read_inputs(self, model: nn.Module) -> fx.Node:
        """Reads the tensors and their names; returns the images."""
        inputs = []
        placeholders = [node for node in self.nodes if node.op == "placeholder"]
        parameters = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
        # if a tensor has several names, the module's first one is used, not the one that torch.export keeps
        first_names = {id(parameter): name for name, parameter in model.named_parameters()}
        for node, spec in zip(placeholders, self.exported.graph_signature.input_specs, strict=True):
            if spec.kind is InputKind.USER_INPUT:
                inputs.append(node)
            elif spec.target is not None:
                name = str(spec.target)
                if spec.kind is InputKind.PARAMETER:
                    self.parameters.add(node)
                self.names[node] = first_names.get(id(parameters.get(name)), name)
                source = self.exported.constants.get(name) if spec.kind is InputKind.CONSTANT_TENSOR else None
                tensor = source if source is not None else parameters.get(name, self.exported.constants.get(name))
                if tensor is None:
                    raise NetworkError(f"the exported graph reads {name}, which the network does not have")
                self.tensors[node] = tensor.detach() if isinstance(tensor, Tensor) else tensor
        if len(inputs) != 1:
            raise NetworkError(f"the network takes {len(inputs)} inputs; expected one batch of images")
        images: fx.Node = inputs[0]
        return images

    def _read_output(self) -> fx.Node:
        """The logits.

        If the network changes the images in place, torch.export also returns the images.
        """
        nodes: Any = next(node for node in self.nodes if node.op == "output").args[0]
        specs = self.exported.graph_signature.output_specs
        returned = [node for node, spec in zip(nodes, specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT]
        if len(returned) != 1 or not isinstance(returned[0], fx.Node):
            raise NetworkError(
                f"the network returns {len(returned)} values; expected logits (images, classes) alone: wrap it in a module that "
                "returns them"
            )
        return returned[0]

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next((t.device for t in self.tensors.values() if isinstance(t, Tensor)), torch.device("cpu"))

    def has_batch(self, size: Any) -> bool:
        """Whether a size follows from the number of images."""
        expression = expression_of(size)
        return expression is not None and self.batch_symbol in expression.free_symbols

    def elements_per_image(self, value: Any) -> int:
        """Elements of a value for one image."""
        return math.prod(size_at(length, self.batch_symbol, 1) for length in value.shape)

    def bytes_per_image(self, node: fx.Node) -> int:
        """Bytes of a node's value for one image. 0 if it is not a tensor."""
        value = node.meta["val"]
        return self.elements_per_image(value) * value.dtype.itemsize if isinstance(value, Tensor) else 0

    def size_rule(self, size: Any) -> SizeRule:
        """The rule for a size, as a function of the number of images.

        Raises:
            NetworkError: The size follows from the images' content.
        """
        expression = expression_of(size)
        if expression is not None and expression.free_symbols - {self.batch_symbol}:
            raise NetworkError(
                f"the network has a size that follows from the images' content ({expression}); expected fixed shapes"
            )
        return SizeRule.of(size, self.batch_symbol)
