"""The deployed network as float tensors in one safetensors file.

It can be loaded like the float network.

The searched weights are already rounded (fake-quantized). So the outputs equal the measured ones,
if activations stay in float: a state dict does not hold their rounding. The weights are floats, so
the file has the size of the float network. `size_bytes` in the assignment is the size of the packed
codes.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from clado.errors import NetworkError, StoreError
from clado.exporting._torch_module import bias_place, shape_and_dtype
from clado.network.tensors import unfit
from clado.records.text import write_text

WEIGHTS, ASSIGNMENT, README = "weights.safetensors", "assignment.json", "README.md"
FORMAT = "clado-export/1"


def export_network(
    folder: Path,
    state: Mapping[str, torch.Tensor],
    assignment_document: Mapping[str, Any],
    snippet: str,
    facts: Sequence[str] = (),
) -> Path:
    """Writes weights.safetensors, assignment.json and README.md into a folder.

    Replaces an earlier export.

    Args:
        folder: Where to write.
        state: The network's whole state dict. Its searched weights are already fake-quantized.
        assignment_document: The JSON object that `SearchSpace.to_json` makes.
        snippet: The Python code that loads the folder again.
        facts: Lines of the README about inputs, outputs and accuracy.

    Returns:
        The folder.

    Raises:
        NetworkError: A searched layer is not in the state, or a tensor holds a NaN or an infinity.
            Nothing is written then.
        StoreError: The document is not an assignment, or the folder holds another README.
            Nothing is written then.
    """
    bits = assignment_document.get("bits")
    if assignment_document.get("format") != "clado-assignment/1" or not isinstance(bits, Mapping):
        raise StoreError("not an assignment; expected the JSON object that SearchSpace.to_json makes")
    if (folder / README).exists() and not (folder / WEIGHTS).exists():
        raise StoreError(f"{folder} holds a {README} and no {WEIGHTS}, so it is not an export; name another folder, or a new one")
    # the state holds the parts of a split weight as one tensor
    missing = sorted(name for name in bits if name not in state and _split_weight(name) not in state)
    if missing:
        raise NetworkError(
            f"the state lacks layers of the assignment: {_some(missing)}; expected the state dict of the same network"
        )
    if unfit_names := sorted(unfit(state)):
        raise NetworkError(f"weights hold a NaN or an infinity: {_some(unfit_names)}")
    # safetensors refuses tensors that share memory (tied weights), so each gets its own copy
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    document = json.dumps(assignment_document, indent=1)
    temporary = folder / f".{WEIGHTS}.{os.getpid()}.part"
    try:
        # the weights file also has the assignment, so that a reader sees if the two files belong to different exports
        save_file(tensors, str(temporary), metadata={"format": FORMAT, "assignment": document})
        temporary.chmod(0o644)  # safetensors makes it readable for its owner only
        temporary.replace(folder / WEIGHTS)
    finally:
        temporary.unlink(missing_ok=True)
    write_text(folder / ASSIGNMENT, document)
    write_text(folder / README, _readme(assignment_document, snippet, facts))
    return folder


def load_network(folder: Path, network: torch.nn.Module) -> dict[str, Any]:
    """Loads exported weights into `network`, in place.

    A layer without a bias gets the bias that a correction added.

    Returns:
        The assignment's JSON object.

    Raises:
        NetworkError: Names, shapes or dtypes differ from the network's. The network is not changed.
        StoreError: The folder is not a complete export. The network is not changed.
    """
    state, document = _read(folder)
    model_state = network.state_dict()
    new_biases: dict[str, tuple[torch.nn.Module, str]] = {}
    for name in set(state) - set(model_state):
        with suppress(NetworkError, AttributeError):  # any other name is unknown
            new_biases[name] = bias_place(network, name)
    faults = []
    if missing := sorted(set(model_state) - set(state)):
        faults.append(f"the file lacks {_some(missing)}")
    if unknown := sorted(set(state) - set(model_state) - set(new_biases)):
        faults.append(f"the network has no {_some(unknown)}")
    if differences := [
        f"{name} ({shape_and_dtype(state[name])} in the file, {shape_and_dtype(model_state[name])} in the network)"
        for name in sorted(set(model_state) & set(state))
        if shape_and_dtype(model_state[name]) != shape_and_dtype(state[name])
    ]:
        faults.append(f"tensors differ: {_some(differences)}")
    if faults:
        raise NetworkError(f"{folder / WEIGHTS} does not fit: {'; '.join(faults)}; expected the network that was exported")
    for name, (module, attribute) in new_biases.items():
        module.register_parameter(attribute, torch.nn.Parameter(state[name].clone()))
    network.load_state_dict(state)
    return document


def _read(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state dict and the assignment's JSON object of an export.

    Raises StoreError if it is not complete.
    """
    try:
        with safe_open(str(folder / WEIGHTS), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            state: dict[str, torch.Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        document = json.loads((folder / ASSIGNMENT).read_text(encoding="utf-8"))
    except (OSError, ValueError, SafetensorError) as error:
        raise StoreError(
            f"{folder} is not an export ({error}); expected the {WEIGHTS} and {ASSIGNMENT} of `clado export`"
        ) from error
    if metadata.get("format") != FORMAT or json.loads(metadata.get("assignment", "null")) != document:
        raise StoreError(f"{WEIGHTS} and {ASSIGNMENT} in {folder} belong to different exports; export again")
    return state, dict(document)


def _some(names: list[str], most: int = 8) -> str:
    """The names, at most eight of them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _readme(document: Mapping[str, Any], snippet: str, facts: Sequence[str]) -> str:
    activations = document.get("activation_bits", {})
    rows = [[" layer ", " bits ", " activation bits "], ["---"] * 3]
    rows += [
        [f" `{name}` ", *(f" {'float' if width is None else width} " for width in (bits, activations.get(name)))]
        for name, bits in document["bits"].items()
    ]
    table = "\n".join(f"|{'|'.join(row if activations else row[:2])}|" for row in rows)
    note = (
        "- Activations: when measured, each layer's input was rounded to its activation bits. The file holds weights only: a\n"
        "  network that loads it computes with float activations.\n"
    )
    return f"""# A network with mixed-precision weights

{len(document["bits"])} layers, {document["average_bits"]:.3f} bits per searched weight on average.
Packed, the searched weights take {document["size_bytes"]:,} bytes.

{"".join(f"- {fact}{chr(10)}" for fact in facts)}
To load it, in this folder:

```python
{snippet.strip()}
```

- `{WEIGHTS}`: the network's state. The searched weights are rounded to the levels of their bit-width and kept as floats. So
  the outputs equal the measured ones, and the file is as large as the float network.
- `{ASSIGNMENT}`: the bit-width of each searched layer.
{note if activations else ""}
{table}
"""


def _split_weight(name: str) -> str:
    """The tensor whose rows include this part of a split weight."""
    stem, _, part = name.rpartition(".")
    return stem if part in ("q", "k", "v") else name
