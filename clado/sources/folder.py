"""Images below a folder, one sub-folder a class as in torchvision's ImageFolder, decoded when they are read.

Three layouts: FOLDER/train and FOLDER/val (validation comes from val, the other two slices from train); FOLDER with class
sub-folders; FOLDER with images only, which is unlabelled. Within one folder the slices are cut from one seeded permutation:
sensitivity from its front, calibration from its back, validation from between; so a larger slice of the same seed holds the
smaller (of the first two).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clado.config import DataSettings
from clado.errors import DataError
from clado.images import DataSlices, ImageShape

MODES = {1: "L", 3: "RGB"}


@dataclass(frozen=True)
class Preprocessing:
    """Resize of the shorter side (bilinear, antialiased), centre crop, pixels / 255, minus mean, divided by std."""

    image_shape: ImageShape
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, path: Path) -> Tensor:
        """The image file as float32 (C, H, W); DataError names a file that cannot be read."""
        from PIL import Image
        from torchvision.transforms import functional as F

        channels, height, width = self.image_shape
        try:
            with Image.open(path) as file:
                image = file.convert(MODES[channels])
        except (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"image {path} cannot be read ({error}); repair or remove it") from error
        cropped = F.center_crop(F.resize(image, [self.resize], antialias=True), [height, width])
        pixels: Tensor = F.pil_to_tensor(cropped).float() / 255
        return (pixels - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


class FolderSlice:
    """Image files in a fixed order, with labels or none, decoded anew at each `load`."""

    def __init__(
        self,
        root: Path,
        files: Sequence[Path],
        labels: Sequence[int] | None,
        num_classes: int | None,
        preprocessing: Preprocessing,
    ) -> None:
        self.root, self.files, self.labels, self.preprocessing = root, tuple(files), labels, preprocessing
        self._num_classes = num_classes

    @property
    def image_shape(self) -> ImageShape:
        """Channels, height, width after the crop."""
        return self.preprocessing.image_shape

    @property
    def num_classes(self) -> int | None:
        """Number of class sub-folders; None where there are none."""
        return self._num_classes

    @cached_property
    def sha256(self) -> str:
        """Of each file's name below the folder, content and label, in order, and of the preprocessing; not of the decoder."""
        digest = hashlib.sha256(repr(self.preprocessing).encode())
        for k, file in enumerate(self.files):
            content = hashlib.sha256(file.read_bytes()).hexdigest()
            label = None if self.labels is None else self.labels[k]
            digest.update(f"{file.relative_to(self.root).as_posix()}\n{content} {label}\n".encode())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def load(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Images start..stop-1 as float32 (n, C, H, W), and labels int64 (n,) or None."""
        chosen = self.files[start:stop]
        images = torch.stack([self.preprocessing(file) for file in chosen]) if chosen else torch.empty(0, *self.image_shape)
        return images, None if self.labels is None else torch.tensor(self.labels[start:stop], dtype=torch.int64)


@dataclass(frozen=True)
class _Listing:
    """Image files of one folder in alphabetical order, and the class of each."""

    root: Path
    files: tuple[Path, ...]
    labels: tuple[int, ...] | None
    classes: tuple[str, ...] | None

    def slice(self, chosen: Sequence[int], preprocessing: Preprocessing) -> FolderSlice:
        labels = None if self.labels is None else [self.labels[k] for k in chosen]
        num_classes = None if self.classes is None else len(self.classes)
        return FolderSlice(self.root, [self.files[k] for k in chosen], labels, num_classes, preprocessing)


def load_data(settings: DataSettings, image_shape: ImageShape) -> DataSlices:
    """The three slices of the folder `settings.path`; file names only are read here, images when they are loaded."""
    preprocessing = _preprocessing(settings, image_shape)
    root = settings.path
    if root is None or not root.is_dir():
        raise DataError(f"data.path {root} is not a folder; expected one with a sub-folder of images for each class")
    train_and_val = (root / "train").is_dir() and (root / "val").is_dir()
    if not train_and_val and any((root / part).is_dir() and _has_folders(root / part) for part in ("train", "val", "test")):
        raise DataError(
            f"{root} has class sub-folders one level down; expected both {root}/train and {root}/val, or the path of one of them"
        )
    training = _list(root / "train" if train_and_val else root)
    order = np.random.default_rng(settings.seed).permutation(len(training.files)).tolist()
    num_sensitivity, num_calibration = settings.sensitivity_images, settings.calibration_images
    asked = f"{num_sensitivity} for sensitivity and {num_calibration} for calibration"
    if train_and_val:
        _enough(training, num_sensitivity + num_calibration, asked)
        validation = _relabelled(_list(root / "val"), training)
        everything = list(range(len(validation.files)))
        left = order[num_sensitivity : len(order) - num_calibration]
        shuffled = np.random.default_rng(settings.seed).permutation(len(everything)).tolist()
        pool = everything if settings.validation_images is None else shuffled
    else:
        num_validation = settings.validation_images or 1
        asked += f", and {'at least ' if settings.validation_images is None else ''}{num_validation} for validation"
        _enough(training, num_sensitivity + num_calibration + num_validation, asked)
        validation, pool = training, order[num_sensitivity : len(order) - num_calibration]
    num_validation = settings.validation_images or len(pool)
    _enough(validation, num_validation, f"{num_validation} for validation")
    left = left if train_and_val else pool[num_validation:]
    return DataSlices(
        calibration=training.slice(order[::-1][:num_calibration], preprocessing),
        sensitivity=training.slice(order[:num_sensitivity], preprocessing),
        validation=validation.slice(pool[:num_validation], preprocessing),
        selection=training.slice(left[: settings.selection_images], preprocessing),
    )


def _preprocessing(settings: DataSettings, image_shape: ImageShape) -> Preprocessing:
    channels, height, width = image_shape
    if channels not in MODES:
        raise DataError(f"the network takes images of {channels} channels; image files give 1 (grey) or 3 (red, green, blue)")
    for name, values in (("mean", settings.mean), ("std", settings.std)):
        if len(values) != channels:
            raise DataError(
                f"data.{name} has {len(values)} values; the network takes images of {channels} channels: one value each"
            )
    resize = settings.resize or max(height, width)
    if resize < max(height, width):
        raise DataError(f"data.resize is {resize} pixels; the crop needs {height} x {width}, so at least {max(height, width)}")
    return Preprocessing((channels, height, width), resize, settings.mean, settings.std)


def _list(root: Path) -> _Listing:
    from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder

    if _has_folders(root):
        found = ImageFolder(str(root), allow_empty=True)
        listing = _Listing(
            root, tuple(Path(file) for file, _ in found.samples), tuple(label for _, label in found.samples), tuple(found.classes)
        )
    else:
        files = sorted(file for file in root.iterdir() if file.suffix.lower() in IMG_EXTENSIONS)
        listing = _Listing(root, tuple(files), None, None)
    if not listing.files:
        raise DataError(
            f"{root} holds no images; expected files of the kinds {' '.join(IMG_EXTENSIONS)}, in one sub-folder a class or flat"
        )
    return listing


def _has_folders(root: Path) -> bool:
    return any(child.is_dir() and not child.name.startswith(".") for child in root.iterdir())


def _relabelled(validation: _Listing, training: _Listing) -> _Listing:
    """The validation images with the training images' class numbers."""
    if validation.classes is None or training.classes is None or validation.labels is None:
        if validation.classes != training.classes:
            raise DataError(
                f"one of {training.root} and {validation.root} has class sub-folders, the other has not; expected both or neither"
            )
        return validation
    if unknown := [name for name in validation.classes if name not in training.classes]:
        raise DataError(
            f"{validation.root} has classes that {training.root} lacks: {', '.join(unknown[:5])}; expected the same sub-folders"
        )
    number = [training.classes.index(name) for name in validation.classes]
    return _Listing(validation.root, validation.files, tuple(number[label] for label in validation.labels), training.classes)


def _enough(listing: _Listing, needed: int, asked: str) -> None:
    if len(listing.files) < needed:
        raise DataError(f"{listing.root} holds {len(listing.files)} images; {needed} are needed ({asked})")
