"""A Python file (snippet) that applies an assignment with another library (a peer): the common parts.

To add a peer, add a file to this folder with an object `peer = Peer(...)`. The file's name is the
format's name.

Every snippet holds the assignment as the literal `BITS`. `read_assignment` reads it without running
the file. It quantizes weights with one scale per output channel if the peer allows it. It checks
that each layer has the assigned bits.

If a peer takes the grids of the weights, a file of tensors is written next to the snippet. It holds
the state of the deployed network, corrections included, and the scales of its weights. Such a
snippet computes the measured network. Otherwise the snippet has only bit-widths, and the peer
rounds the weights by its own rule.

Activation bits are the literal `ACTIVATION_BITS`. ModelOpt applies them. torchao and MCT do not, and
their snippets say so. MCT quantizes outputs of layers, not inputs. Assignments that a peer cannot
express are refused, with the names of the layers.
"""

import json
import os
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from clado.errors import ConfigurationError, StoreError
from clado.grids import ActivationGrid, Codes, Grid, QuantizedLayer
from clado.network.network import Network
from clado.plugins import available, load
from clado.records.text import write_text
from clado.space import Assignment, SearchSpace

ASSIGNMENT = "assignment.json"

Deployed = tuple[Network, Mapping[int, QuantizedLayer]]
"""A network, and its quantized layers by index."""


@dataclass(frozen=True)
class Peer:
    """What the rest of the code must know about a peer."""

    title: str
    """Name of the peer's library."""
    snippet: Callable[[SearchSpace, Assignment, str | None], str]
    """(space, assignment, name of the file of tensors next to the snippet, or None) -> text of the Python file.

    Raises ConfigurationError, with the names of the layers, for what the peer cannot express.
    """
    rounded: Callable[[Tensor, int, int], Tensor] | None = None
    """(float weight, bits, channel axis) -> the weight as the peer rounds it by its own rule. None: it takes every grid."""
    takes: Callable[[Grid], bool] = lambda grid: False
    """Whether the peer takes weights that lie on a grid, with their scales."""
    input_grid: Callable[[ActivationGrid], ActivationGrid | None] = lambda grid: None
    """Maps clado's grid of an input to the peer's grid. None: the input stays in float."""

    def carries(self, deployed: Deployed) -> bool:
        """Whether the peer gets the weights as they were measured."""
        grids = [layer.grid for layer in deployed[1].values()]
        return all(grid is not None and self.takes(grid) for grid in grids)

    def computed(self, network: Network, deployed: Deployed) -> Deployed:
        """The network as the peer computes it, emulated here.

        Args:
            network: The float network. The peer rounds it if it does not take the measured weights.
            deployed: The measured network.
        """
        corrected, layers = deployed
        inputs = {i: None if layer.activation is None else self.input_grid(layer.activation) for i, layer in layers.items()}
        if self.carries(deployed):
            return corrected, {i: replace(layer, activation=inputs[i]) for i, layer in layers.items()}
        computed = {}
        for i, layer in layers.items():
            if layer.grid is not None and self.rounded is not None:
                weight = self.rounded(network.weights[i].detach().float(), bits_of(layer.grid), network.layers[i].channel_axis)
                computed[i] = QuantizedLayer(weight.to(network.weights[i].dtype), activation=inputs[i])
        return network, computed


LOAD_MEASURED = '''
def load_measured(model):
    """Loads what was measured, corrections included, into the model. Returns the scales of its weights and inputs."""
    tensors = load_file(Path(__file__).with_name(WEIGHTS))
    scales = {name: tensors.pop(name) for name in list(tensors) if ":" in name}
    for name in tensors.keys() - model.state_dict().keys():  # biases that corrections gave to layers without one
        module, _, attribute = name.rpartition(".")
        model.get_submodule(module).register_parameter(attribute, torch.nn.Parameter(tensors[name]))
    model.load_state_dict(tensors)
    return scales
'''
NO_SHARED_WEIGHTS = '''
def refuse_shared(model):
    """An assignment counts a shared weight once. Quantizing it in only one of its modules would make another network."""
    owners = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    shared = [names for names in owners.values() if len(names) > 1 and not BITS.keys().isdisjoint(names)]
    if shared:
        raise ValueError(f"these names share one weight, which cannot be quantized in one place: {shared}")
'''


def write_snippet(
    folder: Path,
    peer: str,
    space: SearchSpace,
    assignment: Assignment,
    remark: str = "",
    deployed: Deployed | None = None,
) -> Path:
    """Writes assignment_<peer>.py and assignment.json of this assignment into `folder`. Returns the snippet's path.

    Args:
        folder: Where to write.
        peer: Name of the peer.
        space: The searched layers.
        assignment: Their bits.
        remark: A comment at the top of the snippet.
        deployed: The measured network. Its weights and scales are written too if the peer takes them.
    """
    known = peer_of(peer)
    carried = deployed is not None and known.carries(deployed)
    weights = f"weights_{peer}.safetensors" if carried else None
    text = known.snippet(space, assignment, weights)
    text = "".join(f"# {line}\n" for line in remark.splitlines()) + text
    document, assignment_file = space.to_json(assignment), folder / ASSIGNMENT
    if assignment_file.is_file() and not holds(assignment_file, document):
        raise StoreError(f"{folder} holds the export of another assignment; name another folder, or remove that one")
    write_text(assignment_file, json.dumps(document, indent=1))
    if weights is not None and deployed is not None:
        _write_tensors(folder / weights, measured_tensors(known, deployed))
    file = folder / f"assignment_{peer}.py"
    write_text(file, text)
    return file


def measured_tensors(peer: Peer, deployed: Deployed) -> dict[str, Tensor]:
    """The state of the deployed network, and the scales of its quantized weights and inputs.

    LAYER:scale         float32 (channels,)
    LAYER:zero_point    int8 (channels,), of codes -2^(b-1) .. 2^(b-1) - 1
    LAYER:input_amax    float32 (), largest magnitude of an input that the peer quantizes
    """
    network, layers = deployed
    tensors = dict(network.state_dict(dict(layers)))
    for i, layer in layers.items():
        if layer.grid is None:
            continue
        name, channels = network.layers[i].name, network.layers[i].num_channels
        shift = 0 if layer.grid.codes.low < 0 else 2 ** (bits_of(layer.grid) - 1)
        for part, values in (("scale", layer.grid.scale.float()), ("zero_point", (layer.grid.zero_point - shift).char())):
            tensors[f"{name}:{part}"] = values.reshape(-1).expand(channels)
        grid = None if layer.activation is None else peer.input_grid(layer.activation)
        if grid is not None:
            tensors[f"{name}:input_amax"] = layer.weight.new_tensor(grid.scale * (2 ** (grid.bits - 1) - 1)).float()
    return tensors


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors by name."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, temporary)
        temporary.chmod(0o644)  # safetensors makes it readable only by its owner
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def nearest_codes(weight: Tensor, channel_axis: int, codes: Codes, shares: Sequence[float]) -> Tensor:
    """A weight rounded to nearest, with the scale of least squared error for each output channel.

    Args:
        weight: Float, of any shape.
        channel_axis: Axis of the output channels.
        codes: The integers.
        shares: The scales that are tried. At 1 the largest magnitude has the least code.
    """
    rows = weight.movedim(channel_axis, 0).flatten(1)
    largest = rows.abs().amax(1, keepdim=True).clamp_min(1e-12) / -codes.low
    best, least = rows, rows.new_full((len(rows), 1), float("inf"))
    for share in shares:
        scale = share * largest
        values = (rows / scale).round().clamp(codes.low, codes.high) * scale
        error = (values - rows).square().sum(1, keepdim=True)
        best, least = values.where(error < least, best), error.minimum(least)
    return best.reshape(weight.movedim(channel_axis, 0).shape).movedim(0, channel_axis)


def bits_of(grid: Grid) -> int:
    """The bit-width of a grid of two bits or more."""
    return grid.codes.high.bit_length() + (1 if grid.codes.low < 0 else 0)


def holds(file: Path, document: Mapping[str, object]) -> bool:
    """Whether a file holds this JSON document. False for a damaged file."""
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")) == document)
    except ValueError:
        return False


def peer_of(name: str) -> Peer:
    """The peer of a name. Raises ConfigurationError if there is no snippet for it."""
    peers = available("snippets")
    if name not in peers:
        raise ConfigurationError(f"unknown format {name!r}; expected safetensors, {', '.join(peers[:-1])} or {peers[-1]}")
    peer: Peer = load("snippets", name)
    return peer


def literal(space: SearchSpace, assignment: Assignment) -> str:
    """The assignment as Python: `BITS = {parameter: bits}`, and `ACTIVATION_BITS` if it has activation bits."""

    def mapping(name: str, values: Sequence[int | None]) -> str:
        rows = [f"    {json.dumps(layer)}: {bits},\n" for layer, bits in zip(space.names, values, strict=True)]
        return f"{name} = {{\n{''.join(rows)}}}\n"

    widths = assignment.activation_bits
    return mapping("BITS", assignment.bits) + (mapping("ACTIVATION_BITS", widths) if widths else "")


def weights_line(weights: str | None) -> str:
    """The name of the file of tensors, as Python."""
    file = "None  # bit-widths alone" if weights is None else f"{json.dumps(weights)}  # a file beside this one"
    return f"WEIGHTS = {file}\n"


IMPORTS = """from pathlib import Path

import torch
from safetensors.torch import load_file
"""
"""The imports that `LOAD_MEASURED` needs."""


def with_loading(text: str, weights: str | None) -> str:
    """A snippet's text. If there is a file of tensors, the code that reads it is added."""
    return text if weights is None else text.replace("\nimport torch\n", f"\n{IMPORTS}", 1) + f"\n{LOAD_MEASURED}"


def not_applied(peer: str, assignment: Assignment) -> str:
    """A paragraph for the docstring of a snippet whose peer does not apply activation bits."""
    if not assignment.activation_bits:
        return ""
    return f"\nActivations stay in float: ACTIVATION_BITS is the measured assignment, but {peer} does not apply it.\n"


def headline(peer: str, space: SearchSpace, assignment: Assignment) -> str:
    """First line of a snippet's docstring."""
    size = f"{space.average_bits(assignment):.3f} bits a weight, {space.size_bytes(assignment):,} bytes when packed"
    return f"Weight bit-widths for {peer}, one for each layer: {size}."


def check_expressible(
    peer: str, space: SearchSpace, assignment: Assignment, operators: Container[str], least: int, most: int
) -> None:
    """Raises ConfigurationError with the names of layers that a peer cannot express.

    A layer must be the `<module>.weight` of one of the operators. The bit-widths of its weights and
    activations must lie within least..most.
    """
    faults = []
    for layer, (bits, width) in zip(space.layers, assignment.pairs, strict=True):
        if bits is None:
            continue
        if layer.name.rpartition(".")[2] != "weight":
            faults.append(f"{layer.name} is not the weight of a module")
        elif layer.operator not in operators:
            faults.append(f"{layer.name} is used by {layer.operator}")
        elif not least <= bits <= most:
            faults.append(f"{layer.name} has {bits} bits, and {peer} takes {least} to {most}")
        elif width is not None and not least <= width <= most:
            faults.append(f"{layer.name} has activations at {width} bits, and {peer} takes {least} to {most}")
    if faults:
        advice = "pin or fix these layers, or export as safetensors"
        raise ConfigurationError(f"{peer} cannot express this assignment: {'; '.join(faults)}; {advice}")
