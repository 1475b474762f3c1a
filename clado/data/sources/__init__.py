"""Where networks and images come from: one file for each source, found by its name. Nothing here uses the network.

A source is a module with `load_network(NetworkSettings) -> nn.Module | (nn.Module, example input or image shape)`, with
`load_data(DataSettings, image_shape) -> DataSlices`, or with both. It is imported when it is named. A source of networks may have
a function `preprocessing(NetworkSettings) -> dict` with the resize, interpolation, mean and std that the weights need.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from clado.data.images import AbsentSlice, DataSlices, ImageShape, ImageSlice, MemorySlice, as_slice, check_batch, check_slice
from clado.errors import NetworkError
from clado.plugins import load
from clado.settings.schema import DataSettings, NetworkSettings

__all__ = [
    "DataSlices",
    "ImageShape",
    "ImageSlice",
    "LoadedNetwork",
    "MemorySlice",
    "as_slice",
    "build_network",
    "check_batch",
    "check_slice",
    "load_data",
    "load_network",
    "load_weights",
]

EXAMPLE_BATCH = 2  # two images, because torch.export does not make a batch of one dynamic
BUILD_SEED = 0

CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model")
"""Keys under which a checkpoint may hold a network's state."""
PARALLEL = "module."
"""The prefix that `torch.nn.DataParallel` adds to each name."""


@dataclass(frozen=True)
class LoadedNetwork:
    """A network, and facts about it."""

    model: nn.Module
    """The network, on the CPU and in eval mode."""
    example_input: Tensor
    """Example images (2, C, H, W), float32."""
    description: str
    """One line that says what the network is."""
    preprocessing: dict[str, Any] = field(default_factory=dict)
    """Values of `DataSettings` that belong to the network's weights."""

    @property
    def image_shape(self) -> ImageShape:
        """Channels, height and width of its images."""
        channels, height, width = self.example_input.shape[1:]
        return channels, height, width

    @cached_property
    def weights_sha256(self) -> str:
        """A hash of the state dict: each tensor's name, dtype, shape and bytes, in order of the names."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def load_network(settings: NetworkSettings) -> LoadedNetwork:
    """The network that the settings name, with the weights of the weights file if one is named. Raises NetworkError."""
    source = load("sources", settings.source)
    model, example = build_network(settings)
    if isinstance(settings.weights, Path):
        load_weights(model, settings.weights)
    model = model.cpu().eval()
    _check_weights(model)
    origin = "" if settings.weights is None else f" with {'random weights' if settings.weights == 'random' else settings.weights}"
    preprocessing = source.preprocessing(settings) if hasattr(source, "preprocessing") else {}
    return LoadedNetwork(model, _example_input(example, settings), f"{settings.source}:{settings.name}{origin}", preprocessing)


def build_network(settings: NetworkSettings) -> tuple[nn.Module, Any]:
    """(the network that the settings name, its example input or image shape).

    The weights file of the settings is not read.

    Torch's random numbers are seeded, so that every process builds the same network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(BUILD_SEED)
        model, example = load("sources", settings.source).load_network(settings)
    return model, example


def load_data(
    settings: DataSettings, image_shape: ImageShape, preprocessing: Mapping[str, Any] = MappingProxyType({})
) -> DataSlices:
    """The disjoint slices that the settings name, for a network that takes images of `image_shape`. Raises DataError.

    `preprocessing` belongs to the network's weights. It is used for values that the settings do not give.
    """
    if settings.source != "zoo":
        settings = settings.model_copy(
            update={key: value for key, value in preprocessing.items() if getattr(settings, key) is None}
        )
    slices: DataSlices = load("sources", settings.source).load_data(settings, image_shape)
    return slices


def absent_data(settings: DataSettings, image_shape: ImageShape) -> DataSlices:
    """Slices of the sizes in the settings, without images. A plan needs no more."""

    def absent(count: int | None) -> AbsentSlice:
        return AbsentSlice(count or 0, image_shape, settings.path)

    counts = settings.calibration_images, settings.sensitivity_images, settings.validation_images
    return DataSlices(absent(counts[0]), absent(counts[1]), absent(counts[2]), selection=absent(0))


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a safetensors file, or one of torch.save, into the network.

    Raises:
        NetworkError: The file cannot be read, or its names or shapes do not fit.
    """
    if not path.is_file():
        raise NetworkError(
            f"weights file {path} does not exist; expected a safetensors file with the network's state_dict, or .pth "
            "(a plan needs no weights: clado plan CONFIG network.weights=random)"
        )
    from clado.data.sources.torchvision import current_names

    file_state = _torch_file(path) if path.suffix in (".pth", ".pt") else _safetensors_file(path)
    if all(name.startswith(PARALLEL) for name in file_state) and not hasattr(model, "module"):
        file_state = {name.removeprefix(PARALLEL): tensor for name, tensor in file_state.items()}
    state, versions = OrderedDict(current_names(file_state)), getattr(file_state, "_metadata", None)
    faults: list[str] = []
    # `_metadata` holds the version of each module that was saved; without it, try the first versions and today's
    for state._metadata in (versions,) if versions else ({}, model.state_dict()._metadata):  # type: ignore[attr-defined]
        if not (faults := _faults(model, state)):
            return
    raise NetworkError(
        f"weights file {path} does not fit the network: {'; '.join(faults)} (names are those of model.state_dict(), "
        f"{len(model.state_dict())} in the network, {len(state)} in the file)"
    )


def _faults(model: nn.Module, state: OrderedDict[str, Tensor]) -> list[str]:
    """Loads a state into a network, and says what does not fit.

    A module may rename tensors that its earlier versions have saved.
    """
    tensors = model.state_dict()
    shapes = [
        f"{name} is {tuple(state[name].shape)}, the network's {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if shapes:
        absent, unexpected = [name for name in tensors if name not in state], [name for name in state if name not in tensors]
    else:
        try:
            absent, unexpected = model.load_state_dict(state, strict=False)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            return [str(error)]
    # A tensor that two names share is stored once; the count of batches never acts in eval mode.
    memory = {(tensor.data_ptr(), tensor.shape) for name, tensor in tensors.items() if name not in absent and tensor.numel()}
    missing = [
        name
        for name, tensor in tensors.items()
        if name in absent and (tensor.data_ptr(), tensor.shape) not in memory and not name.endswith("num_batches_tracked")
    ]
    faults = (("missing", missing, ", "), ("unexpected", unexpected, ", "), ("other shapes:", shapes, "; "))
    return [f"{title} {_some(names, separator)}" for title, names, separator in faults if names]


def _safetensors_file(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise NetworkError(
            f"weights file {path} is not a readable safetensors file ({error}); write one with safetensors.torch.save_file"
        ) from None


def _torch_file(path: Path) -> dict[str, Tensor]:
    """Reads a state_dict in the form that torchvision publishes. Only tensors are unpickled, so a file cannot run code."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # it raises exceptions of many types
        raise NetworkError(
            f"weights file {path} is not a state_dict that torch.load reads without running code "
            f"({(str(error).splitlines() or [type(error).__name__])[0]}); expected torch.save(model.state_dict(), FILE)"
        ) from None
    if isinstance(state, dict):  # a checkpoint of a training script holds the state under a key
        state = next((state[key] for key in CHECKPOINT_KEYS if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        held = f"the keys {_some(map(str, state))}" if isinstance(state, dict) else f"a {type(state).__name__}"
        raise NetworkError(
            f"weights file {path} holds {held} and no state_dict; expected torch.save(model.state_dict(), FILE), or a checkpoint "
            f"with one under {', '.join(CHECKPOINT_KEYS)}"
        )
    return state


def _some(names: Iterable[str], separator: str = ", ", limit: int = 5) -> str:
    names = list(names)
    return separator.join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _check_weights(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if not tensor.dtype.is_floating_point:
            continue
        if tensor.dtype != torch.float32:
            raise NetworkError(f"{name} is {tensor.dtype}; expected a network of torch.float32: model.float()")
        if num_unfit := int((~torch.isfinite(tensor)).sum()):
            raise NetworkError(f"{name} has {num_unfit} NaN or infinite values of {tensor.numel()}; expected finite weights")


def _example_input(example: Tensor | ImageShape | None, settings: NetworkSettings) -> Tensor:
    shape = settings.image_shape
    if isinstance(example, Tensor):
        check_batch(example, None, shape, subject=f"the example input of {settings.name}")
        return (
            example.detach().cpu()[:EXAMPLE_BATCH] if len(example) > 1 else example.detach().cpu().repeat(EXAMPLE_BATCH, 1, 1, 1)
        )
    shape = shape or example
    if shape is None:
        raise NetworkError(
            f"the shape of {settings.name}'s images is not known; set network.image_shape, such as [3, 224, 224], "
            "or let the factory return (network, example_input)"
        )
    return torch.randn(EXAMPLE_BATCH, *shape, generator=torch.Generator().manual_seed(BUILD_SEED))
