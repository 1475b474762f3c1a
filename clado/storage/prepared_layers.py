"""Quantized layers on disk: one folder for each key, and one safetensors file for each layer.

    KEY/network.safetensors     parameters and buffers that corrections of the float network changed, by name
    KEY/0007.safetensors        layer 7 at each of its options: k.weight, k.scale, k.zero_point, k.bias; grids in the header
    KEY/inputs/                 results of sweeps over calibration images, until the layers are prepared (`layer_inputs`)
    KEY/final/reference.safetensors  what final corrections measured on the float network, by correction and name
    KEY/final/HASH.safetensors  parameters and buffers that final corrections changed for one assignment, by name
    KEY/reconstructed/HASH.safetensors       a reconstructed network: its layers as above, and float parameters by name
    KEY/reconstructed/HASH.part.safetensors  the tensors trained so far, until it is complete

KEY is a hash of everything that the layers depend on. One task makes the file of one layer. Tasks
run in any order, in any process. Each file is written whole, so a file that exists is complete.
Every worker reads the files memory-mapped.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from clado.errors import StoreError
from clado.grids import ActivationGrid, Codes, Grid, QuantizedLayer
from clado.space import Assignment
from clado.storage.layer_inputs import LayerInputs
from clado.storage.tensor_files import damaged, read_tensors, write_tensors

FORMAT = "clado-layers/1"


class PreparedLayers:
    """The folder of one key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def layer_file(self, layer: int) -> Path:
        """The file of a layer."""
        return self.folder / f"{layer:04d}.safetensors"

    @property
    def network_file(self) -> Path:
        """The file of changed parameters of the float network."""
        return self.folder / "network.safetensors"

    @property
    def inputs(self) -> LayerInputs:
        """Results of sweeps for the layers that are not prepared yet."""
        return LayerInputs(self.folder / "inputs")

    def final_file(self, assignment: Assignment) -> Path:
        """The file of the final corrections of an assignment."""
        return self.folder / "final" / f"{assignment.key}.safetensors"

    def reconstructed_file(self, assignment: Assignment, images: str) -> Path:
        """The file of a reconstructed network. `images` is the hash of the images that it was fitted to."""
        return self.folder / "reconstructed" / f"{assignment.key}-{images[:8]}.safetensors"

    def missing(self, num_layers: int) -> list[int]:
        """Layers without a file."""
        return [layer for layer in range(num_layers) if not self.layer_file(layer).exists()]

    def write_layer(self, layer: int, options: Sequence[QuantizedLayer], notes: Sequence[str]) -> None:
        """Keeps a layer at each of its options, in order."""
        tensors, header = _encoded(options)
        write_tensors(self.layer_file(layer), tensors, {**header, "notes": json.dumps(list(notes))}, FORMAT)

    def read_layer(self, layer: int, device: torch.device) -> tuple[list[QuantizedLayer], list[str]]:
        """(a layer at each of its options, notes).

        Raises StoreError if the file is absent or damaged.
        """
        tensors, header = read_tensors(self.layer_file(layer), device, FORMAT)
        try:
            return _decoded(tensors, header), json.loads(header["notes"])
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(self.layer_file(layer), error) from None

    def write_network(self, tensors: Mapping[str, Tensor], notes: Sequence[str]) -> None:
        """Keeps the changes by corrections of the float network."""
        write_tensors(self.network_file, tensors, {"notes": json.dumps(list(notes))}, FORMAT)

    def read_network(self, device: torch.device) -> tuple[dict[str, Tensor], list[str]]:
        """The changes by corrections of the float network, and notes."""
        tensors, header = read_tensors(self.network_file, device, FORMAT)
        try:
            return tensors, json.loads(header["notes"])
        except (KeyError, ValueError) as error:
            raise damaged(self.network_file, error) from None

    @property
    def reference_file(self) -> Path:
        """The file of what final corrections measured on the float network."""
        return self.folder / "final" / "reference.safetensors"

    def write_references(self, references: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keeps what final corrections measured on the float network, by correction."""
        named = {f"{name}/{key}": tensor for name, tensors in references.items() for key, tensor in tensors.items()}
        write_tensors(self.reference_file, named, {}, FORMAT)

    def read_references(self, names: Iterable[str], device: torch.device) -> dict[str, Mapping[str, Tensor]]:
        """What these final corrections measured on the float network. Empty if it was not kept."""
        if not self.reference_file.exists():
            return {}
        tensors, _ = read_tensors(self.reference_file, device, FORMAT)
        return {
            name: {key.removeprefix(f"{name}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}
            for name in names
        }

    def write_final(self, assignment: Assignment, tensors: Mapping[str, Tensor]) -> None:
        """Keeps the final corrections of an assignment."""
        write_tensors(self.final_file(assignment), tensors, {"assignment": str(assignment)}, FORMAT)

    def read_final(self, assignment: Assignment, device: torch.device) -> dict[str, Tensor] | None:
        """The final corrections of an assignment. None if they are missing, or belong to another assignment."""
        if not self.final_file(assignment).exists():
            return None
        tensors, header = read_tensors(self.final_file(assignment), device, FORMAT)
        return tensors if header.get("assignment") == str(assignment) else None

    def write_reconstructed(
        self, file: Path, layers: Mapping[int, QuantizedLayer], tensors: Mapping[str, Tensor], notes: Sequence[str]
    ) -> None:
        """Keeps a reconstructed network: its layers by number, and the changed float parameters and buffers by name."""
        encoded, header = _encoded(list(layers.values()))
        named = {f"{_FLOATS}{name}": tensor for name, tensor in tensors.items()}
        header |= {"layers": json.dumps(list(layers)), "notes": json.dumps(list(notes))}
        write_tensors(file, {**encoded, **named}, header, FORMAT)
        self.part_file(file).unlink(missing_ok=True)

    def read_reconstructed(
        self, file: Path, device: torch.device
    ) -> tuple[dict[int, QuantizedLayer], dict[str, Tensor], list[str]] | None:
        """(layers by number, float parameters and buffers by name, notes) of a reconstructed network. None if it is absent."""
        if not file.exists():
            return None
        tensors, header = read_tensors(file, device, FORMAT)
        try:
            layers = dict(zip(json.loads(header["layers"]), _decoded(tensors, header), strict=True))
            named = {name.removeprefix(_FLOATS): tensor for name, tensor in tensors.items() if name.startswith(_FLOATS)}
            return layers, named, json.loads(header["notes"])
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(file, error) from None

    def part_file(self, file: Path) -> Path:
        """The file of the tensors trained so far, until the reconstructed network is complete."""
        return file.with_suffix(".part.safetensors")

    def write_part(self, file: Path, tensors: Mapping[str, Tensor]) -> None:
        """Keeps the tensors trained so far."""
        write_tensors(self.part_file(file), tensors, {}, FORMAT)

    def read_part(self, file: Path, device: torch.device) -> dict[str, Tensor]:
        """The tensors trained before. Empty if the file is absent or damaged. Training then starts anew."""
        try:
            return read_tensors(self.part_file(file), device, FORMAT)[0]
        except StoreError:
            return {}


_FLOATS = "float parameter "


def _encoded(options: Sequence[QuantizedLayer]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Quantized layers as tensors by name, and a header."""
    tensors: dict[str, Tensor] = {}
    grids = []
    for k, option in enumerate(options):
        tensors[f"{k}.weight"] = option.weight
        if option.bias is not None:
            tensors[f"{k}.bias"] = option.bias
        if option.grid is not None:
            tensors |= {f"{k}.scale": option.grid.scale, f"{k}.zero_point": option.grid.zero_point}
        codes = None if option.grid is None else [option.grid.codes.low, option.grid.codes.high, option.grid.codes.step]
        activation = option.activation
        grids.append(
            {
                "codes": codes,
                "channels_last": _is_channels_last(option.weight),
                # hexadecimal, to read exactly the same float
                "activation": activation and [activation.bits, activation.scale.hex(), activation.zero_point],
            }
        )
    return tensors, {"candidates": json.dumps(grids)}


def _decoded(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> list[QuantizedLayer]:
    """The quantized layers of `_encoded`."""
    options = []
    for k, row in enumerate(json.loads(header["candidates"])):
        grid = activation = None
        if row["codes"] is not None:
            grid = Grid(tensors[f"{k}.scale"], tensors[f"{k}.zero_point"], Codes(*row["codes"]))
        if row["activation"]:
            bits, scale, zero_point = row["activation"]
            activation = ActivationGrid(bits, float.fromhex(scale), zero_point)
        weight = tensors[f"{k}.weight"]
        if row["channels_last"]:
            weight = weight.contiguous(memory_format=torch.channels_last)
        options.append(QuantizedLayer(weight, tensors.get(f"{k}.bias"), activation, grid))
    return options


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)
