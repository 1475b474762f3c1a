"""Images below a folder, one sub-folder a class as in torchvision's ImageFolder and ImageNet, decoded when they are read.

Three layouts: FOLDER/train and FOLDER/val (validation comes from val, the other slices from train); FOLDER with class
sub-folders; FOLDER with images only, which is unlabelled.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clado.data.decoding import SUFFIXES, EncodedSlice, Listing, Preprocessing, cut, folder_error
from clado.data.images import DataSlices, ImageShape
from clado.errors import DataError
from clado.settings.schema import DataSettings


@dataclass(frozen=True)
class ImageFile:
    """An image file."""

    top: Path
    """The folder `data.path`."""
    path: Path
    """The file, which lies below `top`."""

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """Path below `top`."""
        return self.path.relative_to(self.top).as_posix()

    def read(self) -> bytes:
        """Its content."""
        return self.path.read_bytes()


def load_data(settings: DataSettings, image_shape: ImageShape) -> DataSlices:
    """The slices of the folder `settings.path`.

    Only file names are read here; images are read when they are loaded.
    """
    return cut(settings, image_shape, *listings(settings.path))


def listings(root: Path | None) -> tuple[Listing, Listing | None]:
    """The images of a folder: all of them and None, or those of train/ and of val/.

    Raises:
        DataError: The folder does not exist, holds no images, or has them in unexpected places.
    """
    if root is None or not root.is_dir():
        raise folder_error(root, "one with a sub-folder of images for each class")
    train_and_val = (root / "train").is_dir() and (root / "val").is_dir()
    if not train_and_val and any((root / name).is_dir() and _has_folders(root / name) for name in ("train", "val", "test")):
        raise DataError(
            f"{root} has class sub-folders one level down; expected both {root}/train and {root}/val, or the path of one of them"
        )
    training = _list(root, root / "train" if train_and_val else root)
    return training, _list(root, root / "val") if train_and_val else None


def training_slice(
    root: Path, settings: DataSettings, image_shape: ImageShape, classes: tuple[str, ...] | None = None
) -> EncodedSlice:
    """Every image of root/train, or of root if there is no such folder, without the images to skip.

    With `classes`, the names of classes in order, labels are the numbers of these.
    """
    listing = _list(root, root / "train" if (root / "train").is_dir() else root).with_class_numbers(settings.class_numbers)
    if classes is not None:
        listing = listing.with_classes(classes)
    positions = [k for k, image in enumerate(listing.images) if image.name not in settings.skip]
    return listing.slice(positions, Preprocessing.of(settings, image_shape))


def _list(top: Path, root: Path) -> Listing:
    files = sorted(file for file in root.iterdir() if file.suffix.lower() in SUFFIXES)
    listing = Listing(root, tuple(ImageFile(top, file) for file in files))
    classes = sorted(folder.name for folder in _folders(root))
    pairs = [(file, number) for number, name in enumerate(classes) for file in _images_below(root / name)]
    if classes and (pairs or not files):  # next to images, a folder without an image is not a class
        images = tuple(ImageFile(top, file) for file, _ in pairs)
        listing = Listing(root, images, tuple(number for _, number in pairs), tuple(classes))
    if not listing.images:
        raise DataError(
            f"{root} holds no images; expected files of the kinds {' '.join(SUFFIXES)}, in one sub-folder a class or flat"
        )
    return listing


def _images_below(folder: Path) -> Iterator[Path]:
    """Image files of a folder and of all below it, in torchvision's order."""
    for name, _, files in sorted(os.walk(folder, followlinks=True)):
        yield from (Path(name, file) for file in sorted(files) if file.lower().endswith(SUFFIXES))


def _has_folders(root: Path) -> bool:
    return any(True for _ in _folders(root))


def _folders(root: Path) -> Iterator[Path]:
    """Sub-folders that may be classes: not those that tools hide, such as .ipynb_checkpoints."""
    return (child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
