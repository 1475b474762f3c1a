"""The deployed network as one safetensors file.

Each searched weight takes only the bits that the assignment gives it.

    LAYER.codes        uint8 (ceil(n b / 8),): codes of the weight in order, b bits each, least significant bit first
    LAYER.scale        float32 (channels,), or (1,) for one scale a tensor
    LAYER.zero_point   (channels,) or (1,), of an affine grid only
    LAYER.input        float32 (2,): scale and zero point of the grid of its input, if that is quantized
    LAYER.values       rows of a split weight that stay in float, if other rows do not
    any other name     a parameter or buffer of the module: layers in float, batch norm, biases (also those of corrections)

A stored code u stands for the integer low + step · u. An integer stands for the value (integer −
zero point) · scale. The header holds JSON under "document": it describes each layer. A hash covers
it and every tensor. `load_packed` puts the file into a module.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clado.errors import NetworkError, StoreError
from clado.exporting._torch_module import (
    as_layers,
    as_module,
    assemble,
    merge_input_grid,
    shape_and_dtype,
)
from clado.grids import ActivationGrid, Codes, Grid, QuantizedLayer
from clado.network.network import Network, Replaced
from clado.network.tensors import unfit

FORMAT = "clado-packed/1"
CHUNK = 2**20  # codes that are packed at a time: a multiple of eight, so that each part ends at a byte
OFF_GRID = (
    1e-3  # share of a step: rounding in another order of operations may cause this difference between a weight and its code
)


@dataclass(frozen=True)
class PackedSize:
    """Bytes of a packed file."""

    total_bytes: int
    """All tensors."""
    weight_bytes: int
    """Codes of the searched weights, and values of those that stay in float. They are part of `total_bytes`."""
    header_bytes: int
    """The header, with the eight bytes that hold its length."""

    @property
    def file_bytes(self) -> int:
        """Bytes of the file."""
        return self.total_bytes + self.header_bytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """Integers 0 .. 2^bits − 1 of any shape, n of them, as a stream of ceil(n · bits / 8) bytes (uint8), 1 to 16 bits each."""
    values = codes.detach().cpu().numpy().reshape(-1).astype("<u2")
    parts = [np.zeros(0, np.uint8)]
    for start in range(0, len(values), CHUNK):
        rows = values[start : start + CHUNK].view(np.uint8).reshape(-1, 2)
        parts.append(np.packbits(np.unpackbits(rows, axis=1, bitorder="little")[:, :bits], bitorder="little"))
    return torch.from_numpy(np.concatenate(parts))


def unpack(stream: Tensor, bits: int, count: int) -> Tensor:
    """The `count` integers (int32) that `pack` made a stream of."""
    if stream.dtype != torch.uint8 or stream.numel() != (count * bits + 7) // 8:
        raise ValueError(f"{stream.numel()} bytes are not {count} codes of {bits} bits")
    source, parts = stream.numpy(), [np.zeros(0, np.int32)]
    for start in range(0, count, CHUNK):
        num_codes = min(CHUNK, count - start)
        rows = np.unpackbits(source[start * bits // 8 :], count=num_codes * bits, bitorder="little").reshape(num_codes, bits)
        code_bytes = np.packbits(rows, axis=1, bitorder="little")
        parts.append(code_bytes.astype(np.int32) @ (1 << 8 * np.arange(code_bytes.shape[1], dtype=np.int32)))
    return torch.from_numpy(np.concatenate(parts).astype(np.int32))


def export_packed(path: Path, network: Network, layers: Replaced) -> PackedSize:
    """Writes a network and its layers (by index), as `Prepared.deployed` returns them.

    Returns:
        The bytes of the file.

    Raises:
        NetworkError: A weight is not on its grid, or a tensor holds a NaN or an infinity. Or a torch
            module cannot hold the grid of an input or the bias of a correction. Nothing is written
            then.
    """
    as_module(network, layers)  # refused here, because it could not be loaded again
    document, tensors = _document_and_tensors(network, layers)
    if unfit_names := unfit(tensors):
        raise NetworkError(f"weights hold a NaN or an infinity: {', '.join(unfit_names[:8])}")
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    text = json.dumps(document, separators=(",", ":"))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(copies, temporary, {"format": FORMAT, "document": text, "sha256": _digest(text, copies)})
        temporary.chmod(0o644)  # safetensors makes it readable for its owner only
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return packed_size(path)


def packed_size(path: Path) -> PackedSize:
    """The bytes of a packed file.

    Raises StoreError if the file is damaged, or is not a packed file.
    """
    document, tensors = _read(path)
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    with path.open("rb") as file:
        header_bytes = 8 + int.from_bytes(file.read(8), "little")
    weight_bytes = sum(
        math.prod(row["shape"]) * getattr(torch, row.get("dtype", "float32")).itemsize
        if row["bits"] is None
        else tensors[f"{row['name']}.codes"].nbytes
        for row in document["layers"]
    )
    return PackedSize(total_bytes, weight_bytes, header_bytes)


def load_packed(path: str | Path, network: nn.Module | Network) -> nn.Module:
    """A copy of a module, in eval mode, with the packed weights. The module itself is not changed.

    Weights are floats on their grids. Hooks of the modules put inputs on their grids, which are
    buffers. So the outputs are those of fake quantization, and `torch.export` accepts the copy if it
    accepts the module.

    Args:
        path: A file that `clado export --format packed` or `clado finetune` wrote.
        network: The float network, or its module.

    Returns:
        The copy. It maps images (N, C, H, W) to logits (N, classes), as the module does.

    Raises:
        StoreError: The file is damaged, is not a packed file, or has an unknown version.
        NetworkError: The file belongs to another network.
    """
    path = Path(path)
    document, tensors = _read(path)
    try:
        state, inputs = _state_and_inputs(document, tensors)
        new_biases = [str(name) for name in document["added"]]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise StoreError(f"{path} is damaged: its header does not describe its tensors ({error}); export it again") from error
    model = network.model if isinstance(network, Network) else network
    if faults := _faults(state, new_biases, model):
        raise NetworkError(f"{path} does not fit: {'; '.join(faults)}; expected the network that was exported")
    loaded, _ = assemble(model, state, new_biases, inputs)
    return loaded


def integers(name: str, layer: QuantizedLayer, grid: Grid) -> Tensor:
    """Codes (int32, the weight's shape) of a weight on its grid.

    Raises NetworkError with the layer's name if the weight is not on the grid.
    """
    codes = grid.quantize(layer.weight.float())
    error = (grid.dequantize(codes).to(layer.weight.dtype) - layer.weight).float().abs()
    if not bool((error <= OFF_GRID * grid.scale).all()):  # true for NaN too
        raise NetworkError(f"{name} does not lie on its grid; expected layers as `Prepared.deployed` gives them")
    return codes


def bits_of(codes: Codes) -> int:
    """The bit-width whose codes these are."""
    if codes.step == 2:
        return 1
    return codes.high.bit_length() + (1 if codes.low < 0 else 0)


def _document_and_tensors(network: Network, layers: Replaced) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(the header's document, tensors by name)."""
    replaced, state = as_layers(layers), network.state_dict(layers)
    model_state = network.model.state_dict()
    aliases = _aliases(model_state)
    coded_parameters = {network.places[i].parameter for i, layer in replaced.items() if layer.grid is not None}
    rows: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for i, spec in enumerate(network.layers):
        parameter, part = network.places[i].parameter, network.places[i].rows
        layer = replaced.get(i, QuantizedLayer(network.weights[i]))
        bits = None if layer.grid is None else bits_of(layer.grid.codes)
        axis = None if layer.grid is None or layer.grid.scale.numel() == 1 else spec.channel_axis
        row: dict[str, Any] = {"name": spec.name, "shape": list(spec.shape), "bits": bits}
        if layer.grid is not None:
            row |= {"codes": [layer.grid.codes.low, layer.grid.codes.high, layer.grid.codes.step], "channel_axis": axis}
        if part is not None:
            row |= {"parameter": parameter, "rows": [part.start, part.stop]}
        if layer.weight.dtype != torch.float32:
            row["dtype"] = str(layer.weight.dtype).removeprefix("torch.")
        if layer.activation is not None:
            row["input_bits"] = layer.activation.bits
        rows.append(row)
        if layer.grid is not None and bits is not None:
            tensors |= {
                f"{spec.name}.{key}": tensor for key, tensor in _weight_tensors(spec.name, layer, layer.grid, bits).items()
            }
            scale_shape = [spec.shape[k] if k == axis else 1 for k in range(len(spec.shape))]
            if list(layer.grid.scale.shape) != scale_shape and layer.grid.scale.numel() > 1:
                raise NetworkError(
                    f"the grid of {spec.name} has scales {tuple(layer.grid.scale.shape)}; expected one for each channel"
                )
        elif parameter in coded_parameters:
            tensors[f"{spec.name}.values"] = layer.weight
        if layer.activation is not None:
            numbers = [layer.activation.scale, float(layer.activation.zero_point)]
            tensors[f"{spec.name}.input"] = torch.tensor(numbers, dtype=torch.float32)
    tensors |= {name: tensor for name, tensor in state.items() if name not in aliases and name not in coded_parameters}
    return {"layers": rows, "aliases": aliases, "added": [name for name in state if name not in model_state]}, tensors


def _weight_tensors(name: str, layer: QuantizedLayer, grid: Grid, bits: int) -> dict[str, Tensor]:
    """A weight's codes, scales and zero points in the form of the file."""
    codes = (integers(name, layer, grid) - grid.codes.low) // grid.codes.step
    tensors = {"codes": pack(codes, bits), "scale": grid.scale.flatten()}
    zero_point = grid.zero_point.expand_as(grid.scale).flatten()
    if bool(zero_point.any()) or grid.codes.low == 0:
        is_integer = bool((zero_point == zero_point.round()).all())
        dtype = torch.uint8 if bits <= 8 else torch.int32
        tensors["zero_point"] = zero_point.to(dtype) if is_integer and grid.codes.low == 0 else zero_point
    return tensors


def _state_and_inputs(
    document: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, ActivationGrid]]:
    """(the module's state by name, grids of inputs by parameter)."""
    remaining = dict(tensors)
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    inputs: dict[str, ActivationGrid] = {}
    for row in document["layers"]:
        name, bits, shape = row["name"], row["bits"], row["shape"]
        parameter, first_row = row.get("parameter", name), row.get("rows", [0])[0]
        if "input_bits" in row:
            scale, zero_point = remaining.pop(f"{name}.input").tolist()
            merge_input_grid(inputs, parameter, ActivationGrid(row["input_bits"], scale, int(zero_point)))
        if bits is not None:
            codes = Codes(*row["codes"])
            scale_shape = [1] * len(shape)
            if row["channel_axis"] is not None:
                scale_shape[row["channel_axis"]] = -1
            scale = remaining.pop(f"{name}.scale").reshape(scale_shape)
            zero_point = remaining.pop(f"{name}.zero_point", torch.zeros(scale.numel())).reshape(scale_shape).to(scale.dtype)
            integers = unpack(remaining.pop(f"{name}.codes"), bits, int(np.prod(shape))).reshape(shape) * codes.step + codes.low
            weight = Grid(scale, zero_point, codes).dequantize(integers).to(getattr(torch, row.get("dtype", "float32")))
        elif f"{name}.values" in remaining:
            weight = remaining.pop(f"{name}.values")
        else:
            continue
        parts.setdefault(parameter, []).append((first_row, weight))
    weights = {name: torch.cat([part for _, part in sorted(rows, key=lambda row: row[0])]) for name, rows in parts.items()}
    state = {**remaining, **weights}
    return {**state, **{name: state[target] for name, target in document["aliases"].items()}}, inputs


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The document and the tensors of a file, after a check of its hash."""
    try:
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise StoreError(f"{path} is absent or damaged ({error}); expected the file that `clado export` wrote") from error
    file_format = header.get("format", "")
    if file_format != FORMAT:
        if file_format.startswith(FORMAT.partition("/")[0] + "/"):
            raise StoreError(
                f"{path} is of format {file_format}; this clado reads {FORMAT}: export it again, or install a later clado"
            )
        raise StoreError(f"{path} is not a packed network; expected a file that `clado export --format packed` wrote")
    text = header.get("document", "")
    if header.get("sha256") != _digest(text, tensors):
        raise StoreError(f"{path} is damaged: its hash differs; copy or export it again")
    return json.loads(text), tensors


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the document, and of every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _faults(state: Mapping[str, Tensor], new_biases: Sequence[str], model: nn.Module) -> list[str]:
    """The differences between a state and a network: names, shapes, dtypes, or shared tensors."""
    model_state = model.state_dict()
    file_names = set(state) - set(new_biases)
    faults = []
    if missing := sorted(set(model_state) - file_names):
        faults.append(f"the file lacks {', '.join(missing[:8])}")
    if unknown := sorted(file_names - set(model_state)):
        faults.append(f"the network has no {', '.join(unknown[:8])}")
    differences = [
        f"{name} ({shape_and_dtype(state[name])} in the file, {shape_and_dtype(model_state[name])} in the network)"
        for name in sorted(file_names & set(model_state))
        if shape_and_dtype(state[name]) != shape_and_dtype(model_state[name])
    ]
    if differences:
        faults.append(f"tensors differ: {', '.join(differences[:8])}")
    aliases = [(name, target) for name, target in _aliases(model_state).items() if {name, target} <= file_names]
    if broken := [f"{name} and {target}" for name, target in aliases if not torch.equal(state[name], state[target])]:
        faults.append(f"the network shares one tensor for {', '.join(broken[:8])}, and the file has two")
    return faults


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names that share a tensor with an earlier name -> that name."""
    names: dict[Any, str] = {}
    targets = {name: names.setdefault((t.data_ptr(), t.shape, t.stride()), name) for name, t in state.items() if t.numel()}
    return {name: target for name, target in targets.items() if name != target}
