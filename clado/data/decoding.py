"""Lists encoded images, numbers their classes, and cuts them into slices.

Folders and tar shards share it.

An image is decoded when it is read. The sets of one listing are cut from one seeded permutation:
sensitivity from its front, calibration from its back, validation from between. So a larger
sensitivity or calibration set contains the smaller one of the same seed.
"""

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from threading import Condition, Thread
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from clado.data.images import DataSlices, ImageShape
from clado.errors import DataError, UnreadableImage
from clado.settings.schema import IMAGENET_MEAN, IMAGENET_STD, DataSettings

if TYPE_CHECKING:
    from PIL import Image

DECODERS = 4  # threads help, because Pillow decodes and resizes without Python's lock
MODES = {1: "L", 3: "RGB"}
SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".ppm",
    ".bmp",
    ".pgm",
    ".tif",
    ".tiff",
    ".webp",
)  # names of image files, the same as in torchvision


class EncodedImage(Protocol):
    """The bytes of an image file, and its name below `data.path`. `str` gives its place."""

    @property
    def name(self) -> str:
        """Path below `data.path`, with forward slashes."""

    def read(self) -> bytes:
        """The whole file. Raises OSError."""


def _numbers(values: Sequence[float]) -> str:
    """One number for each channel."""
    return ", ".join(f"{value:.6g}" for value in values)


@dataclass(frozen=True)
class Preprocessing:
    """Resize of the shorter side (antialiased), centre crop, pixels / 255, minus mean, divided by std."""

    image_shape: ImageShape
    """Channels, height and width after the crop."""
    resize: int
    """Length of the shorter side before the crop, in pixels."""
    mean: tuple[float, ...]
    """Mean of each channel, for pixels within 0..1."""
    std: tuple[float, ...]
    """Standard deviation of each channel, for pixels within 0..1."""
    interpolation: str = "bilinear"
    """torchvision's name of the interpolation."""

    @classmethod
    def of(cls, settings: DataSettings, image_shape: ImageShape) -> "Preprocessing":
        """The preprocessing that the settings ask for. DataError if it does not fit the network's images."""
        channels, height, width = image_shape
        mean, std = settings.mean or IMAGENET_MEAN, settings.std or IMAGENET_STD
        if channels not in MODES:
            raise DataError(f"the network takes images of {channels} channels; image files give 1 (grey) or 3 (red, green, blue)")
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise DataError(
                    f"data.{name} has {len(values)} values; the network takes images of {channels} channels: one value each"
                )
        resize = settings.resize or max(height, width)
        if resize < max(height, width):
            raise DataError(
                f"data.resize is {resize} pixels; the crop needs {height} x {width}, so at least {max(height, width)}"
            )
        return cls((channels, height, width), resize, mean, std, settings.interpolation or "bilinear")

    def __str__(self) -> str:
        """The preprocessing in words, for a README."""
        _, height, width = self.image_shape
        return (
            f"shorter side resized to {self.resize} pixels ({self.interpolation}), centre crop of {height} x {width}, "
            f"pixels / 255, minus {_numbers(self.mean)}, divided by {_numbers(self.std)}"
        )

    def __call__(self, encoded: EncodedImage) -> Tensor:
        """The image as float32 (C, H, W). Raises UnreadableImage with its name if it cannot be read."""
        pixels = self.pixels(encoded).float()
        return (pixels / 255 - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]

    def check(self, encoded: EncodedImage) -> None:
        """Raises the errors of `pixels`. A JPEG file is read to its end, but decoded at an eighth of its size."""
        self._decoded(encoded, small=True)

    def pixels(self, encoded: EncodedImage) -> Tensor:
        """The resized and cropped image as uint8 (C, H, W). Raises UnreadableImage with its name if it cannot be read.

        The result equals that of torchvision's resize, center_crop and pil_to_tensor. Their import would take seconds.
        """
        from PIL import Image

        channels, height, width = self.image_shape
        image = self._decoded(encoded)
        shorter, longer = sorted(image.size)
        scaled = int(self.resize * longer / shorter)
        size = (self.resize, scaled) if image.width <= image.height else (scaled, self.resize)
        if image.size != size:
            image = image.resize(size, Image.Resampling[self.interpolation.upper()])
        left, top = round((size[0] - width) / 2.0), round((size[1] - height) / 2.0)
        cropped = np.array(image.crop((left, top, left + width, top + height))).reshape(height, width, channels)
        return torch.from_numpy(cropped).permute(2, 0, 1)

    def _decoded(self, encoded: EncodedImage, small: bool = False) -> "Image.Image":
        """The image with eight bits a channel and the network's channels, where the format allows at a reduced size."""
        from PIL import Image

        try:
            with Image.open(io.BytesIO(encoded.read())) as file:
                if small:
                    file.draft(None, (1, 1))  # keeps the mode
                return _eight_bits(file, encoded).convert(MODES[self.image_shape[0]])
        except (OSError, EOFError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UnreadableImage(
                f"image {encoded} cannot be read ({error}); repair or remove it, or allow some with data.max_corrupt_images",
                encoded.name,
            ) from error


def _eight_bits(image: "Image.Image", encoded: EncodedImage) -> "Image.Image":
    """The image with eight bits a channel. Pillow's conversion would turn wider values into white."""
    if image.mode in ("I", "F"):
        raise DataError(f"image {encoded} has values of 32 bits with an unknown range; expected 8 or 16 bits a channel")
    if not image.mode.startswith("I;16"):
        return image
    from PIL import Image

    return Image.fromarray(np.round(np.asarray(image).astype(np.float32) / 257).astype(np.uint8))


def folder_error(path: Path | None, expected: str) -> DataError:
    """The error for a path that is not a folder.

    Settings keep a relative path, and a command may run in any directory. So the message names the directory.
    """
    where = "" if path is None or path.is_absolute() else f" (in {Path.cwd()})"
    return DataError(f"data.path {path}{where} is not a folder; expected {expected}")


class Ahead:
    """Checks images in threads and in order, each once, so that a reader in this order need not wait.

    Args:
        count: Number of images.
        check: Raises an error if the image of a number is not readable. `wait` raises it again.
    """

    def __init__(self, count: int, check: Callable[[int], None]) -> None:
        self._count, self._check = count, check
        self._results: dict[int, Exception | None] = {}
        self._next = 0
        self._changed = Condition()
        for _ in range(DECODERS):
            Thread(target=self._work, name="clado-decoding", daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._next >= self._count:
                    return
                number = self._next
                self._next += 1
            error = None
            try:
                self._check(number)
            except Exception as raised:
                error = raised
            with self._changed:
                self._results[number] = error
                self._changed.notify_all()

    def wait(self, number: int) -> None:
        """Waits until the image of a number is checked. Raises the error of its check."""
        with self._changed:
            self._changed.wait_for(lambda: number in self._results or self._count == 0)
            error = self._results.get(number)
        if error is not None:
            raise error
        if number not in self._results:
            self._check(number)

    def stop(self) -> None:
        """Ends the threads."""
        with self._changed:
            self._count = 0
            self._changed.notify_all()


class EncodedSlice:
    """Encoded images in a fixed order, with or without labels. Each `load` decodes them again."""

    def __init__(
        self,
        images: Sequence[EncodedImage],
        labels: Sequence[int] | None,
        classes: tuple[str, ...] | None,
        preprocessing: Preprocessing,
    ) -> None:
        self.images, self.labels, self.classes, self.preprocessing = tuple(images), labels, classes, preprocessing
        self._ahead: Ahead | None = None

    @property
    def image_shape(self) -> ImageShape:
        """Channels, height, width after the crop."""
        return self.preprocessing.image_shape

    @property
    def num_classes(self) -> int | None:
        """Number of classes that are known by name; None if there are none."""
        return None if self.classes is None else len(self.classes)

    @cached_property
    def sha256(self) -> str:
        """A hash of each image's name, content and label, in order, and of the preprocessing. It does not cover the decoder."""
        digest = hashlib.sha256(repr(self.preprocessing).encode())
        for k, image in enumerate(self.images):
            content = hashlib.sha256(image.read()).hexdigest()
            label = None if self.labels is None else self.labels[k]
            digest.update(
                f"{image.name}\n{content} {label}\n".encode("utf-8", "surrogateescape")
            )  # class names may hold any bytes
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.images)

    def load(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Images start..stop-1 as float32 (n, C, H, W), and labels int64 (n,) or None."""
        numbers = range(len(self))[start:stop]
        decoded = [self.preprocessing(self.images[k]) for k in numbers]
        return torch.stack(decoded) if decoded else torch.empty(0, *self.image_shape), self._labels(start, stop)

    def part(self, start: int, stop: int) -> "EncodedSlice":
        """Images start..stop-1 as a slice."""
        labels = None if self.labels is None else self.labels[start:stop]
        return EncodedSlice(self.images[start:stop], labels, self.classes, self.preprocessing)

    def check(self, start: int, stop: int) -> Tensor | None:
        """Labels of images start..stop-1, as `load` returns them. Images are decoded only far enough to know that they can be.

        Raises:
            UnreadableImage: An image cannot be read.
            DataError: `load` refuses an image for another reason.
        """
        for number in range(len(self))[start:stop]:
            if self._ahead is None:
                self.preprocessing.check(self.images[number])
            else:
                self._ahead.wait(number)
        return self._labels(start, stop)

    def check_ahead(self) -> None:
        """Begins to check the images in order, because all of them will be checked soon."""
        if self._ahead is None:
            self._ahead = Ahead(len(self), lambda number: self.preprocessing.check(self.images[number]))

    def end_ahead(self) -> None:
        """Stops `check_ahead`."""
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = None

    def _labels(self, start: int, stop: int) -> Tensor | None:
        return None if self.labels is None else torch.tensor(self.labels[start:stop], dtype=torch.int64)


@dataclass(frozen=True)
class Listing:
    """Encoded images in a fixed order, with or without classes."""

    root: Path
    """The folder that holds the images, for messages."""
    images: tuple[EncodedImage, ...]
    """The images in order."""
    labels: tuple[int, ...] | None = None
    """Class number of each image; None without labels."""
    classes: tuple[str, ...] | None = None
    """Name of each class, by its number; None if classes have no names."""
    imagenet: bool = False
    """Whether the class numbers are those of ImageNet's thousand classes."""

    def slice(self, positions: Sequence[int], preprocessing: Preprocessing) -> EncodedSlice:
        """The images at these positions."""
        labels = None if self.labels is None else [self.labels[k] for k in positions]
        return EncodedSlice([self.images[k] for k in positions], labels, self.classes, preprocessing)

    def with_classes(self, classes: tuple[str, ...]) -> "Listing":
        """The listing with the class numbers of another one.

        Images without classes stay without classes.
        """
        if self.classes is None or self.labels is None:
            return self
        if unknown := [name for name in self.classes if name not in classes]:
            raise DataError(
                f"{self.root} has classes that the run lacks: {', '.join(unknown[:5])}; expected sub-folders of the same names"
            )
        numbers = [classes.index(name) for name in self.classes]
        return replace(self, labels=tuple(numbers[label] for label in self.labels), classes=classes)

    def with_class_numbers(self, class_numbers: str) -> "Listing":
        """The listing with ImageNet's class numbers: 0..999, of the sorted synsets.

        The numbers change only if synsets name every class, or if `class_numbers` is "imagenet". So a
        folder with 50 of the thousand classes gets the network's numbers, not 0..49.

        Raises:
            DataError: `class_numbers` is "imagenet", and a class does not belong to ImageNet.
        """
        if class_numbers == "folders" or self.labels is None:
            return self
        synset_numbers = imagenet_numbers()
        if self.classes is None:
            return replace(self, classes=tuple(synset_numbers), imagenet=True) if class_numbers == "imagenet" else self
        if unknown := [name for name in self.classes if name not in synset_numbers]:
            if class_numbers == "imagenet":
                raise DataError(
                    f"{self.root} has classes that are not ImageNet's: {', '.join(unknown[:5])}; expected names such as "
                    "n01440764, or data.class_numbers: folders, which numbers them in alphabetical order"
                )
            return self
        labels = tuple(synset_numbers[self.classes[label]] for label in self.labels)
        return replace(self, labels=labels, classes=tuple(synset_numbers), imagenet=True)


@cache
def imagenet_numbers() -> dict[str, int]:
    """WordNet synset → class number of ILSVRC 2012: the thousand synsets in alphabetical order."""
    synsets = Path(__file__).with_name("imagenet_synsets.txt").read_text(encoding="ascii").split()
    return {synset: number for number, synset in enumerate(synsets)}


def cut(settings: DataSettings, image_shape: ImageShape, training: Listing, separate: Listing | None) -> DataSlices:
    """The sets of one listing, or of two: validation from `separate`, the others from `training`.

    Images named in `data.skip` are left out. The order of the others stays the same.

    Raises:
        DataError: There are too few images, or classes or preprocessing do not fit.
    """
    preprocessing = Preprocessing.of(settings, image_shape)
    training = training.with_class_numbers(settings.class_numbers)
    validation = training if separate is None else _relabel(separate.with_class_numbers(settings.class_numbers), training)
    skip = set(settings.skip)
    sensitivity, calibration, rest = _training_positions(settings, training, skip, separate is None)
    if separate is None:
        pool = rest
    elif settings.validation_images is None:
        pool = [k for k, image in enumerate(validation.images) if image.name not in skip]
    else:
        pool = _order(validation, settings.seed, skip)
    validation_positions = _validation_positions(settings, validation, pool)
    if separate is None:
        validation_set = set(validation_positions)
        rest = [k for k in pool if k not in validation_set]
    return DataSlices(
        calibration=training.slice(calibration, preprocessing),
        sensitivity=training.slice(sensitivity, preprocessing),
        validation=validation.slice(validation_positions, preprocessing),
        selection=training.slice(rest[: settings.selection_images], preprocessing),
        imagenet=validation.imagenet,
    )


def _training_positions(
    settings: DataSettings, training: Listing, skip: set[str], has_validation: bool
) -> tuple[list[int], list[int], list[int]]:
    """Positions of the sensitivity images, of the calibration images, and of all others.

    With `has_validation`, the others also contain the validation images, and there must be enough of them.
    """
    num_sensitivity, num_calibration = settings.sensitivity_images, settings.calibration_images
    request, num_validation = f"{num_sensitivity} for sensitivity and {num_calibration} for calibration", 0
    order = _order(training, settings.seed, skip)
    if has_validation:
        num_validation = settings.validation_images or 1
        request += f", and {'at least ' if settings.validation_images is None else ''}{num_validation} for validation"
    _check_count(training, len(order), num_sensitivity + num_calibration + num_validation, request)
    if not settings.class_balanced:
        rest = order[num_sensitivity : len(order) - num_calibration]
        return order[:num_sensitivity], order[::-1][:num_calibration], rest
    sensitivity = _balance(training, order, num_sensitivity, settings.seed)
    calibration = _balance(training, order[::-1], num_calibration, settings.seed)
    if overlap := set(sensitivity) & set(calibration):
        raise DataError(
            f"class {_class_name(training, next(iter(overlap)))} of {training.root} has too few images for balanced slices "
            f"({request}); expected more of them, or data.class_balanced: false"
        )
    positions = {*sensitivity, *calibration}
    return sensitivity, calibration, [k for k in order if k not in positions]


def _validation_positions(settings: DataSettings, validation: Listing, pool: list[int]) -> list[int]:
    """Positions of the validation images: the first of a pool, or of each class in it."""
    count = settings.validation_images or len(pool)
    _check_count(validation, len(pool), count, f"{count} for validation")
    if settings.class_balanced and settings.validation_images is not None:
        return _balance(validation, pool, count, settings.seed)
    return pool[:count]


def _order(listing: Listing, seed: int, skip: set[str]) -> list[int]:
    order: list[int] = np.random.default_rng(seed).permutation(len(listing.images)).tolist()
    return [k for k in order if listing.images[k].name not in skip] if skip else order


def _balance(listing: Listing, order: Sequence[int], count: int, seed: int) -> list[int]:
    """The first `count` positions of an order that takes one image of each class in turn.

    So the counts of two classes differ by at most one image.
    """
    if listing.labels is None:
        raise DataError(f"{listing.root} has no labels; data.class_balanced needs them: expected one sub-folder a class")
    classes = sorted({listing.labels[k] for k in order})
    turns = dict(zip(classes, np.random.default_rng(seed).permutation(len(classes)).tolist(), strict=True))
    counts: Counter[int] = Counter()
    rounds = []
    for k in order:
        label = listing.labels[k]
        rounds.append((counts[label], turns[label], k))
        counts[label] += 1
    entries = sorted(rounds)[:count]
    num_rounds = entries[-1][0] if entries else 0
    if num_rounds > min(counts.values()):
        fewest = min(counts, key=lambda label: counts[label])
        example = next(k for k in order if listing.labels[k] == fewest)
        raise DataError(
            f"class {_class_name(listing, example)} of {listing.root} has {counts[fewest]} images left; balanced slices of "
            f"{count} images need {num_rounds} or more of each of {len(classes)} classes: expected fewer images, or "
            "data.class_balanced: false"
        )
    return [k for _, _, k in entries]


def _class_name(listing: Listing, k: int) -> str:
    label = 0 if listing.labels is None else listing.labels[k]
    return str(label) if listing.classes is None else listing.classes[label]


def _relabel(validation: Listing, training: Listing) -> Listing:
    """The validation images with the class numbers of the training images."""
    if (validation.labels is None) != (training.labels is None) or (validation.classes is None) != (training.classes is None):
        raise DataError(
            f"one of {training.root} and {validation.root} has class sub-folders, the other has not; expected both or neither"
        )
    if validation.classes is None or training.classes is None or validation.labels is None:
        return validation
    if unknown := [name for name in validation.classes if name not in training.classes]:
        raise DataError(
            f"{validation.root} has classes that {training.root} lacks: {', '.join(unknown[:5])}; expected the same sub-folders"
        )
    numbers = [training.classes.index(name) for name in validation.classes]
    return replace(validation, labels=tuple(numbers[label] for label in validation.labels), classes=training.classes)


def _check_count(listing: Listing, num_images: int, num_needed: int, request: str) -> None:
    if num_images < num_needed:
        raise DataError(f"{listing.root} holds {num_images} images; {num_needed} are needed ({request})")
