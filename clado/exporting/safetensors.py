"""The network with its chosen weights as float tensors in one safetensors file: loads wherever the float network loads.

The searched weights are already rounded (fake-quantized), so the outputs are those that were measured, where activations
stayed in float: their rounding is not in a state dict. The weights are kept as floats: the file has the size of the float
network, and `size_bytes` in the assignment is what the codes need once packed.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from clado.errors import NetworkError, StoreError
from clado.exporting.packed import bias_place
from clado.network.tensors import unfit
from clado.records import write_text

WEIGHTS, ASSIGNMENT, README = "weights.safetensors", "assignment.json", "README.md"
FORMAT = "clado-export/1"


def export_network(folder: Path, state: Mapping[str, torch.Tensor], assignment_document: Mapping[str, Any], snippet: str) -> Path:
    """Writes weights.safetensors, assignment.json and README.md into `folder` and returns it; an earlier export is replaced.

    `state` is the network's whole state dict, its searched weights already fake-quantized; `assignment_document` is what
    `SearchSpace.to_json` makes; `snippet` is the Python that loads the folder again. NetworkError where a searched layer is not
    in the state or a tensor holds a NaN or an infinity, StoreError where the folder has another's README: nothing is written.
    """
    bits = assignment_document.get("bits")
    if assignment_document.get("format") != "clado-assignment/1" or not isinstance(bits, Mapping):
        raise StoreError("not an assignment; expected the JSON object that SearchSpace.to_json makes")
    if (folder / README).exists() and not (folder / WEIGHTS).exists():
        raise StoreError(f"{folder} holds a {README} and no {WEIGHTS}: it is no export's; name another folder, or a new one")
    # the parts of a split weight stand in the state as the one tensor that they are rows of
    absent = sorted(name for name in bits if name not in state and _whole(name) not in state)
    if absent:
        raise NetworkError(
            f"the state lacks layers of the assignment: {_some(absent)}; expected the state dict of the same network"
        )
    if bad := sorted(unfit(state)):
        raise NetworkError(f"weights hold a NaN or an infinity: {_some(bad)}")
    # safetensors refuses tensors that share memory (tied weights): each gets its own
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    document = json.dumps(assignment_document, indent=1)
    part = folder / f".{WEIGHTS}.{os.getpid()}.part"
    try:
        # the weights carry the assignment too, so that a reader sees when the two files are of different exports
        save_file(tensors, str(part), metadata={"format": FORMAT, "assignment": document})
        part.chmod(0o644)  # safetensors makes it readable for its owner alone
        part.replace(folder / WEIGHTS)
    finally:
        part.unlink(missing_ok=True)
    write_text(folder / ASSIGNMENT, document)
    write_text(folder / README, _readme(assignment_document, snippet))
    return folder


def load_network(folder: Path, network: torch.nn.Module) -> dict[str, Any]:
    """Loads exported weights into `network`, in place, and returns the assignment's JSON object. Layers without a bias get those
    that corrections added.

    NetworkError where names, shapes or dtypes differ from the network's, StoreError where the folder is no whole export; the
    network is untouched then.
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
        raise StoreError(f"{WEIGHTS} and {ASSIGNMENT} in {folder} are not of one export; export again")
    own = network.state_dict()
    added: dict[str, tuple[torch.nn.Module, str]] = {}
    for name in set(state) - set(own):
        with suppress(NetworkError, AttributeError):  # what is no bias that corrections added is unknown
            added[name] = bias_place(network, name)
    faults = []
    if missing := sorted(set(own) - set(state)):
        faults.append(f"the file lacks {_some(missing)}")
    if unknown := sorted(set(state) - set(own) - set(added)):
        faults.append(f"the network has no {_some(unknown)}")
    if unlike := [
        f"{name} ({_shape_and_dtype(state[name])} in the file, {_shape_and_dtype(own[name])} in the network)"
        for name in sorted(set(own) & set(state))
        if _shape_and_dtype(own[name]) != _shape_and_dtype(state[name])
    ]:
        faults.append(f"tensors differ: {_some(unlike)}")
    if faults:
        raise NetworkError(f"{folder / WEIGHTS} does not fit: {'; '.join(faults)}; expected the network that was exported")
    for name, (module, attribute) in added.items():
        module.register_parameter(attribute, torch.nn.Parameter(state[name].clone()))
    network.load_state_dict(state)
    return dict(document)


def _shape_and_dtype(tensor: torch.Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _some(names: list[str], most: int = 8) -> str:
    """The names, at most eight of them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _readme(document: Mapping[str, Any], snippet: str) -> str:
    activations = document.get("activation_bits", {})
    rows = [[" layer ", " bits ", " activation bits "], ["---"] * 3]
    rows += [[f" `{name}` ", f" {bits} ", f" {activations.get(name)} "] for name, bits in document["bits"].items()]
    table = "\n".join(f"|{'|'.join(row if activations else row[:2])}|" for row in rows)
    note = (
        "- Activations: when measured, each layer's input was rounded to its activation bits. The file holds weights alone: a\n"
        "  network that loads it computes with float activations.\n"
    )
    return f"""# A network with mixed-precision weights

{len(document["bits"])} layers, {document["average_bits"]:.3f} bits per searched weight on average.
Packed, the searched weights take {document["size_bytes"]:,} bytes.

```python
{snippet.strip()}
```

- `{WEIGHTS}`: the network's state. The searched weights are rounded to the levels of their bit-width and kept as floats, so
  the outputs are those that were measured, and the file is as large as the float network.
- `{ASSIGNMENT}`: the bit-width of each searched layer.
{note if activations else ""}
{table}
"""


def _whole(name: str) -> str:
    """The tensor that a part of a split weight is rows of."""
    stem, _, part = name.rpartition(".")
    return stem if part in ("q", "k", "v") else name
