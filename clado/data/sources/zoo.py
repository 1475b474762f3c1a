"""The zoo's networks, and the Fashion-MNIST images that ship beside them. Every file is checked against the manifest's hash."""

import hashlib
import io
import json
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clado.data import zoo
from clado.data.images import DataSlices, ImageShape, MemorySlice
from clado.errors import DataError, NetworkError
from clado.plugins import nearest
from clado.settings.schema import DataSettings, NetworkSettings

IMAGE_SHAPE: ImageShape = (1, 28, 28)
NUM_CLASSES = 10
TRAIN_SLICES, TEST = "fashion_mnist_train_slices.npz", "fashion_mnist_test.npz"


def load_network(settings: NetworkSettings) -> tuple[nn.Module, ImageShape]:
    """The zoo's architecture of that name with the zoo's weights, unless the settings name others."""
    from clado.data.sources import load_weights

    if settings.name not in zoo.NETWORKS:
        names = sorted(zoo.NETWORKS)
        raise NetworkError(f"the zoo has no network {settings.name!r}{nearest(settings.name, names)}; it has {', '.join(names)}")
    model = zoo.NETWORKS[settings.name]()
    if settings.weights is None:
        name = f"{settings.name}.safetensors"
        read_file(name, NetworkError)
        load_weights(model, zoo.ZOO / name)
    return model, IMAGE_SHAPE


def load_data(settings: DataSettings, image_shape: ImageShape) -> DataSlices:
    """Calibration and sensitivity images from the 1,024 shipped for each, validation from the 10,000 test images."""
    if tuple(image_shape) != IMAGE_SHAPE:
        raise DataError(
            f"the zoo's images have shape {IMAGE_SHAPE}; the network takes {tuple(image_shape)}: set data.source: folder"
        )
    train, test = _arrays(TRAIN_SLICES), _arrays(TEST)
    return DataSlices(
        calibration=_draw(train, "calibration", settings.calibration_images, settings.seed),
        sensitivity=_draw(train, "sensitivity", settings.sensitivity_images, settings.seed),
        validation=_draw(test, "test", settings.validation_images, settings.seed, "validation_images"),
        selection=_selection(train, settings),
    )


def read_file(name: str, error: type[NetworkError] | type[DataError]) -> bytes:
    """The bytes of one of the zoo's files.

    Raises `error` if their SHA-256 is not the manifest's.
    """
    path, manifest = zoo.ZOO / name, zoo.ZOO / "manifest.json"
    for file in (path, manifest):
        if not file.is_file():
            raise error(
                f"the zoo's file {file.name} is missing from {zoo.ZOO}; install clado again, or run "
                "python -m clado.data.zoo.train"
            )
    raw = path.read_bytes()
    expected: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))["sha256"]
    digest = hashlib.sha256(raw).hexdigest()
    if digest != expected.get(name):
        raise error(f"{path} is damaged: its SHA-256 is {digest[:16]}…, not {str(expected.get(name))[:16]}…; install clado again")
    return raw


def normalise(images: "np.ndarray[Any, np.dtype[np.uint8]]") -> Tensor:
    """uint8 (N, 28, 28) -> float32 (N, 1, 28, 28), as the networks of the zoo were trained."""
    return ((torch.from_numpy(images.astype(np.float32)) / 255 - zoo.MEAN) / zoo.STD).unsqueeze(1)


def _arrays(name: str) -> dict[str, Any]:
    with np.load(io.BytesIO(read_file(name, DataError))) as file:
        return {key: file[key] for key in file.files}


def _selection(arrays: dict[str, Any], settings: DataSettings) -> MemorySlice:
    """The training images in neither the calibration nor the sensitivity set.

    The rest of calibration's images comes first.
    """
    images, labels = [], []
    for name, count in (("calibration", settings.calibration_images), ("sensitivity", settings.sensitivity_images)):
        rest = np.random.default_rng(settings.seed).permutation(len(arrays[f"{name}_images"]))[count:]
        images.append(arrays[f"{name}_images"][rest])
        labels.append(arrays[f"{name}_labels"][rest])
    limit = slice(settings.selection_images)
    return MemorySlice(
        normalise(np.concatenate(images)[limit]), torch.from_numpy(np.concatenate(labels).astype(np.int64)[limit]), NUM_CLASSES
    )


def _draw(arrays: dict[str, Any], name: str, count: int | None, seed: int, setting: str | None = None) -> MemorySlice:
    images, labels = arrays[f"{name}_images"], arrays[f"{name}_labels"]
    if count is not None:
        if count > len(images):
            raise DataError(f"data.{setting or f'{name}_images'} asks for {count} images; the zoo ships {len(images)}")
        # The first of one permutation, so that a larger set of the same seed holds the smaller one.
        positions = np.random.default_rng(seed).permutation(len(images))[:count]
        images, labels = images[positions], labels[positions]
    return MemorySlice(normalise(images), torch.from_numpy(labels.astype(np.int64)), NUM_CLASSES)
