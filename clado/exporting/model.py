"""The folder that MLflow gets as a model: a packed network, and a file that says how to build it.

Nothing is unpickled.

    packed.safetensors   the deployed network (`packed.py`)
    model.json           how to build the float network, its inputs and outputs, and library versions

MLflow's `python_function` flavour names this module and calls `_load_pyfunc`. Nothing here imports
MLflow. A network from a Python factory can be loaded where the factory's module is installed.
"""

import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._pytree import tree_map

from clado.data.sources import build_network
from clado.errors import StoreError
from clado.exporting.packed import PackedSize, export_packed, load_packed
from clado.network.network import Network, Replaced
from clado.records.text import write_text
from clado.settings.schema import NetworkSettings

PACKED, MODEL = "packed.safetensors", "model.json"
FORMAT = "clado-model/1"
LIBRARIES = ("clado", "torch", "numpy", "safetensors")


def export_model(folder: Path, network: Network, layers: Replaced, settings: NetworkSettings) -> PackedSize:
    """Writes a network and its layers (by index), as `Prepared.deployed` returns them. `settings` name the float network.

    Raises NetworkError, as `export_packed` does, if a torch module cannot hold the layers. Nothing is written then.
    """
    size = export_packed(folder / PACKED, network, layers)
    document = {
        "format": FORMAT,
        "name": name_of(settings),
        "network": settings.model_dump(mode="json"),
        "image_shape": list(network.example.shape[1:]),
        "num_classes": int(network.logits(network.example).shape[1]) if network.outputs.are_logits else None,
        "output_shape": network.outputs.shape,
        "requirements": requirements(settings),
    }
    write_text(folder / MODEL, json.dumps(document, indent=1))
    return size


def name_of(settings: NetworkSettings) -> str:
    """A name that identifies the network: source, name, and named weights. It has no / and :, which MLflow forbids."""
    weights = [] if settings.weights is None else [Path(settings.weights).stem]
    return re.sub("[/:]", ".", ".".join([settings.source, settings.name, *weights]))


def requirements(settings: NetworkSettings) -> list[str]:
    """The libraries that loading needs, each with the installed version.

    A local version such as +cpu is cut off, because no package index has it.
    """
    source_libraries = {"torchvision": ("torchvision",), "timm": ("timm", "torchvision")}.get(settings.source, ())
    return [f"{name}=={version(name).partition('+')[0]}" for name in (*LIBRARIES, *source_libraries)]


def read_model(folder: Path) -> dict[str, Any]:
    """model.json of a folder that `export_model` wrote. Raises StoreError for another folder."""
    try:
        document: dict[str, Any] = json.loads((folder / MODEL).read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise ValueError(f"its format is {document['format']!r}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{folder} does not hold a model of clado ({error}); expected {FORMAT}, as `clado run` writes it"
        ) from None
    return document


class PackedModel:
    """The network with its packed weights, with the interface that MLflow calls."""

    def __init__(self, folder: Path) -> None:
        settings = NetworkSettings.model_validate(read_model(folder)["network"])
        self.module = load_packed(folder / PACKED, build_network(settings)[0])

    def predict(self, model_input: NDArray[np.float32], params: Mapping[str, Any] | None = None) -> Any:
        """Logits float32 (n, classes) of images float32 (n, C, H, W), normalised as the run normalised them.

        Other outputs come in the network's own form.
        """
        with torch.inference_mode():
            return tree_map(lambda output: output.numpy(), self.module(torch.tensor(model_input)))


def _load_pyfunc(data_path: str) -> PackedModel:
    """The model in a folder; MLflow finds this function by its name."""
    return PackedModel(Path(data_path))
