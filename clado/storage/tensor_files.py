"""Tensors in a safetensors file with texts in its header. It is written through a rename, so a file that exists is complete."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from clado.errors import StoreError


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], file_format: str) -> None:
    """Writes tensors by name, and texts by name. `file_format` says what the file is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(copies, temporary, {"format": file_format, **header})
    temporary.chmod(0o644)  # safetensors makes it readable for its owner only
    temporary.replace(path)


def read_tensors(path: Path, device: torch.device, file_format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, texts by name) of a file of this format; StoreError if it is absent, damaged or another."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from None
    if header.get("format") != file_format:
        raise StoreError(f"{path} is not a file of quantized layers; delete its folder and run again")
    return tensors, header


def damaged(path: Path, error: Exception) -> StoreError:
    """The error for a file that cannot be read."""
    return StoreError(f"{path} is absent or damaged ({error!r}); delete it and run again; it is then made again")
