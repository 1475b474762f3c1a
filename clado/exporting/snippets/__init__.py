"""A Python file (snippet) that applies an assignment with another library (a peer): the common parts.

To add a peer, add a file to this folder with a function `snippet(space, assignment) -> str`. The
file's name is the format's name.

Every snippet holds the assignment as the literal `BITS`. `read_assignment` reads it without running
the file. It quantizes weights symmetrically, with one scale per output channel if the peer allows
it. It checks that each layer has the assigned bits.

Activation bits are the literal `ACTIVATION_BITS`. ModelOpt applies them. torchao and MCT do not, and
their snippets say so: MCT quantizes outputs of layers, not inputs. Assignments that a peer cannot
express are refused, with the names of the layers.
"""

import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path

from clado.errors import ConfigurationError, StoreError
from clado.plugins import available, load
from clado.records.text import write_text
from clado.space import Assignment, SearchSpace

ASSIGNMENT = "assignment.json"

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


def write_snippet(folder: Path, peer: str, space: SearchSpace, assignment: Assignment, warning: str = "") -> Path:
    """Writes assignment_<peer>.py and assignment.json of this assignment into `folder`. Returns the snippet's path.

    `warning` is a comment at its top.
    """
    text = load("snippets", check_peer(peer)).snippet(space, assignment)
    text = "".join(f"# {line}\n" for line in warning.splitlines()) + text
    document, assignment_file = space.to_json(assignment), folder / ASSIGNMENT
    if not assignment_file.is_file():
        write_text(assignment_file, json.dumps(document, indent=1))
    elif not holds(assignment_file, document):
        raise StoreError(f"{folder} holds the export of another assignment; name another folder, or remove that one")
    file = folder / f"assignment_{peer}.py"
    write_text(file, text)
    return file


def holds(file: Path, document: Mapping[str, object]) -> bool:
    """Whether a file holds this JSON document. False for a damaged file."""
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")) == document)
    except ValueError:
        return False


def check_peer(peer: str) -> str:
    """The peer's name. Raises ConfigurationError if there is no snippet for it."""
    peers = available("snippets")
    if peer not in peers:
        raise ConfigurationError(f"unknown format {peer!r}; expected safetensors, {', '.join(peers[:-1])} or {peers[-1]}")
    return peer


def literal(space: SearchSpace, assignment: Assignment) -> str:
    """The assignment as Python: `BITS = {parameter: bits}`, and `ACTIVATION_BITS` if it has activation bits."""

    def mapping(name: str, values: Sequence[int | None]) -> str:
        rows = [f"    {json.dumps(layer)}: {bits},\n" for layer, bits in zip(space.names, values, strict=True)]
        return f"{name} = {{\n{''.join(rows)}}}\n"

    widths = assignment.activation_bits
    return mapping("BITS", assignment.bits) + (mapping("ACTIVATION_BITS", widths) if widths else "")


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
