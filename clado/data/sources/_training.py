"""A training set named on the command line: idx files like Fashion-MNIST's, or a folder of images."""

import gzip
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from clado.data import zoo
from clado.data.decoding import EncodedSlice, Preprocessing
from clado.data.images import ImageShape, ImageSlice, MemorySlice, PickedSlice
from clado.data.sources.folder import ImageFile, training_slice
from clado.errors import DataError
from clado.settings.schema import DataSettings

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def load_training(folder: Path, settings: DataSettings, image_shape: ImageShape, validation: ImageSlice) -> ImageSlice:
    """All training images of a folder, with the preprocessing of the run.

    The folder holds idx files, images below FOLDER/train, or images below FOLDER. Image files that
    are also validation images are left out.

    Raises:
        DataError: The folder holds neither idx files nor images, or a file is damaged.
    """
    if settings.source == "zoo":
        settings = settings.model_copy(update={"mean": (zoo.MEAN,), "std": (zoo.STD,)})
    if not folder.is_dir():
        raise DataError(f"--data {folder} is not a folder; expected one of Fashion-MNIST's idx files, or of images")
    if (images := _idx(folder, IMAGES)) is not None:
        return _from_idx(images, _idx(folder, LABELS), settings, image_shape)
    try:
        classes = validation.classes if isinstance(validation, EncodedSlice) else None
        training = training_slice(folder, settings, image_shape, classes)
    except DataError as error:
        raise DataError(f"{error}; or idx files named {IMAGES}.gz and {LABELS}.gz") from None
    if not isinstance(validation, EncodedSlice):
        return training
    return _exclude_files(training, [image.path for image in validation.images if isinstance(image, ImageFile)])


def _exclude_files(training: EncodedSlice, files: Iterable[Path]) -> ImageSlice:
    """The slice without the given files."""
    paths = {file.resolve() for file in files}
    numbers = [
        k for k, image in enumerate(training.images) if not isinstance(image, ImageFile) or image.path.resolve() not in paths
    ]
    if not numbers:
        raise DataError("every image of --data is a validation image of the run; expected images to train on")
    return training if len(numbers) == len(training) else PickedSlice([training], numbers)


def _from_idx(images: Path, labels: Path | None, settings: DataSettings, image_shape: ImageShape) -> ImageSlice:
    pixels = read_idx(images)
    if (1, *pixels.shape[1:]) != tuple(image_shape):
        raise DataError(f"{images} holds images of shape {(1, *pixels.shape[1:])}; the network takes {tuple(image_shape)}")
    preprocessing = Preprocessing.of(settings, image_shape)
    x = ((torch.from_numpy(pixels.astype(np.float32)) / 255 - preprocessing.mean[0]) / preprocessing.std[0]).unsqueeze(1)
    if labels is None:
        return MemorySlice(x)
    y = read_idx(labels)
    if y.shape != pixels.shape[:1]:
        raise DataError(f"{labels} holds {len(y)} labels for {len(pixels)} images; expected one for each image")
    return MemorySlice(x, torch.from_numpy(y.astype(np.int64)), int(y.max()) + 1)


def _idx(folder: Path, name: str) -> Path | None:
    return next((folder / file for file in (f"{name}.gz", name) if (folder / file).is_file()), None)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An idx file of unsigned bytes, plain or gzip: magic 0, 0, 8, rank; the lengths as big-endian 32-bit; the values."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if raw[:3] != bytes((0, 0, 8)):
            raise ValueError("its first bytes are not those of an idx file of unsigned bytes")
        shape = [int.from_bytes(raw[4 + 4 * k : 8 + 4 * k], "big") for k in range(raw[3])]
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error}); expected an idx file, plain or .gz") from error
