"""The zoo's networks, and the Fashion-MNIST images that come with them. Every file is checked against the manifest's hash."""

import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from clado.data import zoo
from clado.data.images import DataSlices, ImageShape, MemorySlice
from clado.data.zoo import composites
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
    return model, composites.IMAGE_SHAPE if settings.name in zoo.SEGMENTING else IMAGE_SHAPE


def load_data(settings: DataSettings, image_shape: ImageShape) -> DataSlices:
    """Calibration and sensitivity images from the 1,024 shipped for each, validation from the 10,000 test images.

    For segmentation networks there are as many composites of these images, and 2,500 for validation.
    """
    shapes = IMAGE_SHAPE, composites.IMAGE_SHAPE
    if tuple(image_shape) not in shapes:
        raise DataError(
            f"the zoo's images have shape {IMAGE_SHAPE}, or {composites.IMAGE_SHAPE} with a class for each pixel; the network "
            f"takes {tuple(image_shape)}: set data.source: folder"
        )
    train, test = _arrays(TRAIN_SLICES), _arrays(TEST)
    if tuple(image_shape) == composites.IMAGE_SHAPE:
        train, test = (
            _composed(train, ("calibration", "sensitivity"), len(train["calibration_images"])),
            _composed(test, ("test",), len(test["test_images"]) // composites.GARMENTS),
        )
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
    """uint8 (N, H, W) -> float32 (N, 1, H, W), as the networks of the zoo were trained."""
    return ((torch.from_numpy(images.astype(np.float32)) / 255 - zoo.MEAN) / zoo.STD).unsqueeze(1)


def _arrays(name: str) -> dict[str, Any]:
    with np.load(io.BytesIO(read_file(name, DataError))) as file:
        return {key: file[key] for key in file.files}


def _composed(arrays: dict[str, Any], names: Sequence[str], count: int) -> dict[str, Any]:
    """Composites of the images of each name, as many as given."""
    composed: dict[str, Any] = {}
    for name in names:
        canvases, masks = composites.composites(arrays[f"{name}_images"], arrays[f"{name}_labels"], count)
        composed |= {f"{name}_images": canvases, f"{name}_labels": masks}
    return composed


def _selection(arrays: dict[str, Any], settings: DataSettings) -> MemorySlice:
    """The training images in neither the calibration nor the sensitivity set.

    The rest of the calibration images comes first.
    """
    images, labels = [], []
    for name, count in (("calibration", settings.calibration_images), ("sensitivity", settings.sensitivity_images)):
        rest = np.random.default_rng(settings.seed).permutation(len(arrays[f"{name}_images"]))[count:]
        images.append(arrays[f"{name}_images"][rest])
        labels.append(arrays[f"{name}_labels"][rest])
    limit = slice(settings.selection_images)
    return _slice(np.concatenate(images)[limit], np.concatenate(labels)[limit])


def _draw(arrays: dict[str, Any], name: str, count: int | None, seed: int, setting: str | None = None) -> MemorySlice:
    images, labels = arrays[f"{name}_images"], arrays[f"{name}_labels"]
    if count is not None:
        if count > len(images):
            raise DataError(f"data.{setting or f'{name}_images'} asks for {count} images; the zoo ships {len(images)}")
        # The first of one permutation, so that a larger set contains the smaller one of the same seed.
        positions = np.random.default_rng(seed).permutation(len(images))[:count]
        images, labels = images[positions], labels[positions]
    return _slice(images, labels)


def _slice(images: "np.ndarray[Any, np.dtype[np.uint8]]", labels: Any) -> MemorySlice:
    num_classes = NUM_CLASSES if labels.ndim == 1 else composites.NUM_CLASSES
    return MemorySlice(normalise(images), torch.from_numpy(labels.astype(np.int64)), num_classes)
