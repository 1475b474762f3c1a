"""Slices of images, with or without labels. Measuring and evaluation read them, whatever their source."""

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from clado.errors import DataError, UnreadableImage

ImageShape = tuple[int, int, int]  # images of sources; the Python interface also takes vectors and volumes
"""Channels, height, width."""


@runtime_checkable
class ImageSlice(Protocol):
    """A fixed sequence of images of one shape, normalised and ready for the network."""

    @property
    def image_shape(self) -> ImageShape:
        """Channels, height, width of every image."""

    @property
    def num_classes(self) -> int | None:
        """Labels lie within 0..num_classes - 1; None if that is not known."""

    @property
    def sha256(self) -> str:
        """A hash of the images, their order and their labels. Each class says what it covers."""

    def __len__(self) -> int:
        """Number of images."""

    def load(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Images start..stop-1 as float32 (n, C, H, W), and their labels as int64 (n,), or None if unlabelled.

        For a user-defined criterion or metric, labels are targets of any type and shape (n, ...).
        """


@dataclass(frozen=True)
class DataSlices:
    """Disjoint slices of the images."""

    calibration: ImageSlice
    """Ranges and corrections are fitted to these images."""
    sensitivity: ImageSlice
    """The interaction matrix is measured on these images. In a run they are the first half of the sensitivity set."""
    validation: ImageSlice
    """Results are reported on these images. No choice uses them."""
    selection: ImageSlice
    """The other images. `clado smallest` chooses on them."""
    decision: ImageSlice | None = None
    """Proposals are measured on these images, and the best is chosen. No proposal is fitted to them."""
    imagenet: bool = False
    """Whether labels are the numbers of ImageNet's thousand classes."""

    @property
    def used(self) -> tuple[ImageSlice, ...]:
        """The slices that a run reads. There may be no calibration images."""
        decision = () if self.decision is None else (self.decision,)
        return (self.sensitivity, *decision, *([self.calibration] if len(self.calibration) else []), self.validation)

    def held_out(self) -> "DataSlices":
        """The same slices, with the second half of the sensitivity set held out to decide. A single image is not held out."""
        count, images = len(self.sensitivity), self.sensitivity
        if count < 2:
            return self
        first = count - count // 2
        return replace(self, sensitivity=part(images, 0, first), decision=part(images, first, count))


@runtime_checkable
class Checkable(Protocol):
    """A slice that can check its images faster than it loads them."""

    def check(self, start: int, stop: int) -> Tensor | None:
        """The labels of images start..stop-1, as `load` returns them. Raises the errors of `load`."""


@runtime_checkable
class Divisible(Protocol):
    """A slice that can return a part of itself as a slice of the same class."""

    def part(self, start: int, stop: int) -> ImageSlice:
        """Images start..stop-1."""


def part(images: ImageSlice, start: int, stop: int) -> ImageSlice:
    """Images start..stop-1 of a slice."""
    return images.part(start, stop) if isinstance(images, Divisible) else PickedSlice([images], range(start, stop))


class MemorySlice:
    """Images (N, C, H, W) float32, and labels (N,) int64 or None, in memory.

    The images may also be vectors, signals or volumes, and the labels targets of any type and shape (N, ...). The hash covers
    every pixel and label.
    """

    def __init__(self, images: Tensor, labels: Tensor | None = None, num_classes: int | None = None) -> None:
        self._images, self._labels, self._num_classes = images, labels, num_classes

    @property
    def image_shape(self) -> ImageShape:
        """Channels, height, width."""
        return tuple(self._images.shape[1:])  # type: ignore[return-value]

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None."""
        return self._num_classes

    @cached_property
    def sha256(self) -> str:
        """A hash of the shape, the float32 pixels in order, and the int64 labels in order."""
        digest = hashlib.sha256(f"{tuple(self._images.shape)} labelled={self._labels is not None}".encode())
        digest.update(self._images.contiguous().numpy().tobytes())
        if self._labels is not None:
            digest.update(self._labels.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def load(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Images and labels start..stop-1: views, not copies."""
        return self._images[start:stop], None if self._labels is None else self._labels[start:stop]

    def part(self, start: int, stop: int) -> "MemorySlice":
        """Images start..stop-1 as a slice."""
        return MemorySlice(*self.load(start, stop), self._num_classes)


class KeptSlice:
    """A slice that keeps its images in memory once they were read."""

    def __init__(self, images: ImageSlice) -> None:
        self.source = images
        """The slice that is read."""
        self._kept: dict[int, tuple[Tensor, Tensor | None]] = {}

    @property
    def image_shape(self) -> ImageShape:
        """Channels, height, width."""
        return self.source.image_shape

    @property
    def num_classes(self) -> int | None:
        """The value of the slice."""
        return self.source.num_classes

    @property
    def sha256(self) -> str:
        """The value of the slice."""
        return self.source.sha256

    def __len__(self) -> int:
        return len(self.source)

    def load(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Images and labels start..stop-1. Data that do not fit the protocol are returned unchanged, and not kept."""
        absent = [k for k in range(start, stop) if k not in self._kept]
        if absent:
            first, last = absent[0], absent[-1] + 1
            images, labels = self.source.load(first, last)
            if not self._fits(images, labels, last - first):
                return self.source.load(start, stop)
            self._kept |= {first + k: (image, None if labels is None else labels[k]) for k, image in enumerate(images)}
        if start >= stop:
            return self.source.load(start, stop)
        rows = [self._kept[k] for k in range(start, stop)]
        labels_of_rows = [label for _, label in rows if label is not None]
        return torch.stack([image for image, _ in rows]), torch.stack(labels_of_rows) if labels_of_rows else None

    def _fits(self, images: object, labels: object, count: int) -> bool:
        is_image_batch = (
            isinstance(images, Tensor) and images.dtype == torch.float32 and images.shape == (count, *self.image_shape)
        )
        return is_image_batch and (labels is None or (isinstance(labels, Tensor) and labels.shape[:1] == (count,)))


def kept(images: ImageSlice, limit_bytes: int) -> ImageSlice:
    """A slice that keeps what it reads, if all of it fits into the limit. A slice in memory is returned unchanged."""
    size = 4 * len(images) * math.prod(images.image_shape)
    return images if isinstance(images, MemorySlice) or not 0 < size <= limit_bytes else KeptSlice(images)


class PickedSlice:
    """Some images of other slices, in a given order. All images have one shape.

    Numbers count through the slices one after another. The hash covers the slices' hashes and the
    numbers. The images have labels if every slice has labels.
    """

    def __init__(self, slices: Sequence[ImageSlice], numbers: Sequence[int] | None = None) -> None:
        self._slices = [image_slice for image_slice in slices if len(image_slice)]
        shapes = {image_slice.image_shape for image_slice in self._slices}
        if len(shapes) != 1:
            raise DataError(f"images of shapes {sorted(shapes)}; expected one, and an image")
        self._ends = list(accumulate(map(len, self._slices)))
        self._numbers = range(self._ends[-1]) if numbers is None else numbers

    @property
    def image_shape(self) -> ImageShape:
        """Channels, height, width."""
        return self._slices[0].image_shape

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None."""
        return self._slices[0].num_classes

    @cached_property
    def sha256(self) -> str:
        """A hash of the slices' hashes and of the picked numbers, in order."""
        return hashlib.sha256(
            repr(([image_slice.sha256 for image_slice in self._slices], list(self._numbers))).encode()
        ).hexdigest()

    def __len__(self) -> int:
        return len(self._numbers)

    def load(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Images and labels start..stop-1."""
        images, labels = [], []
        for number in self._numbers[start:stop]:
            k = bisect_right(self._ends, number)
            position = number - (self._ends[k - 1] if k else 0)
            x, y = self._slices[k].load(position, position + 1)
            images.append(x)
            labels += [] if y is None else [y]
        if not images:
            return torch.empty(0, *self.image_shape), None
        return torch.cat(images), torch.cat(labels) if len(labels) == len(images) else None


class AbsentSlice:
    """Stands for a number of absent images. A plan needs no more."""

    num_classes = None
    sha256 = "absent"

    def __init__(self, num_images: int, image_shape: ImageShape, path: object) -> None:
        self._num_images, self.image_shape, self.path = num_images, image_shape, path

    def __len__(self) -> int:
        return self._num_images

    def load(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Raises DataError."""
        raise DataError(f"data.path {self.path} is not a folder; without images a run can be planned, but not measured")


def check_batch(
    images: object,
    labels: object,
    image_shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
    subject: str = "the batch",
    classes: bool = True,
) -> None:
    """Checks one batch.

    Args:
        images: Finite float32 images (N, C, H, W), or N times `image_shape`.
        labels: Integer labels (N,), or None.
        image_shape: The shape that each image must have, if it is known.
        num_classes: Labels must lie within 0..num_classes − 1, if it is known.
        subject: What the batch is, for messages.
        classes: Whether labels are class numbers. Else they are targets of any type and shape (N, ...).

    Raises:
        DataError: The batch does not fit.
    """
    is_image = image_shape is None or len(image_shape) == 3
    axes = "(N, C, H, W)" if is_image else f"(N, {', '.join(map(str, image_shape or ()))})"
    if not isinstance(images, Tensor):
        hint = ": torch.from_numpy(images).float()" if type(images).__name__ == "ndarray" else ""
        raise DataError(
            f"{subject} holds images of type {type(images).__name__}; expected a torch tensor {axes} of float32{hint}"
        )
    shape = tuple(images.shape)
    if images.ndim != _axes(image_shape):
        hint = "; a single image becomes a batch with image.unsqueeze(0), a dataset with torch.utils.data.DataLoader"
        expected, one_less = f"four axes {axes}" if is_image else axes, images.ndim == _axes(image_shape) - 1
        raise DataError(f"{subject} holds images of shape {shape}; expected {expected}" + (hint if one_less else ""))
    if 0 in shape:
        raise DataError(f"{subject} is empty: its images have shape {shape}; expected at least one image {axes}")
    if image_shape is not None and shape[1:] != tuple(image_shape):
        axis_names = " (channels, height, width)" if is_image else ""
        raise DataError(f"{subject} holds images of shape {shape[1:]}; expected {tuple(image_shape)}{axis_names}")
    if images.dtype != torch.float32:
        hint = "images.float() / 255, then normalise" if not images.dtype.is_floating_point else "images.float()"
        raise DataError(f"{subject} holds images of {images.dtype}; expected torch.float32: {hint}")
    unfit = (~torch.isfinite(images)).flatten(1).any(1)
    if unfit.any():
        index = int(unfit.nonzero()[0, 0])
        raise DataError(
            f"{subject} has NaN or infinite pixels in {int(unfit.sum())} of {len(images)} images, the first at index {index}"
        )
    if labels is not None and classes:
        _check_labels(labels, len(images), num_classes, subject)
    elif labels is not None and not (isinstance(labels, Tensor) and labels.shape[:1] == images.shape[:1]):
        shown = f"shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"type {type(labels).__name__}"
        raise DataError(f"{subject} holds targets of {shown} for {len(images)} images; expected one tensor, the images first")


def _check_labels(labels: object, num_images: int, num_classes: int | None, subject: str) -> None:
    if not isinstance(labels, Tensor):
        raise DataError(f"{subject} holds labels of type {type(labels).__name__}; expected a torch tensor (N,) of int64, or none")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise DataError(f"{subject} holds labels of {labels.dtype}; expected class numbers of torch.int64")
    if tuple(labels.shape) != (num_images,):
        raise DataError(
            f"{subject} holds labels of shape {tuple(labels.shape)} for {num_images} images; expected ({num_images},)"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        bound = "at least 0" if num_classes is None else f"within 0..{num_classes - 1}, for {num_classes} classes"
        raise DataError(f"{subject} has labels from {low} to {high}; expected labels {bound}")


def check_slice(
    images: ImageSlice,
    image_shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
    batch: int = 256,
    unreadable: dict[int, str] | None = None,
    classes: bool = True,
) -> None:
    """Reads every image once, `batch` at a time, and checks it with `check_batch`.

    If `unreadable` is given, an image that cannot be read is added to it: position -> name. The
    other images of its batch are then not checked.

    Raises:
        DataError: An image does not fit, or the slice is empty.
        UnreadableImage: An image cannot be read, and there is no `unreadable`.
    """
    if len(images) == 0:
        raise DataError("the data is empty; expected at least one image")
    for start in range(0, len(images), batch):
        stop = min(start + batch, len(images))
        try:
            _check_images(images, start, stop, image_shape, num_classes, classes)
        except UnreadableImage:
            if unreadable is None:
                raise
            unreadable.update(_unreadable(images, start, stop))


def _check_images(
    images: ImageSlice, start: int, stop: int, image_shape: tuple[int, ...] | None, num_classes: int | None, classes: bool
) -> None:
    subject, source = f"images {start} to {stop - 1}", images.source if isinstance(images, KeptSlice) else images
    # decoded images have the shape of the slice and finite pixels; so only the first is loaded
    whole = (start, stop) if not isinstance(source, Checkable) else (start, min(start + 1, stop))
    if isinstance(source, Checkable):
        labels = source.check(start, stop)
        if labels is not None and classes:
            _check_labels(labels, stop - start, num_classes, subject)
    check_batch(*images.load(*whole), image_shape, num_classes, subject, classes)


def _unreadable(images: ImageSlice, start: int, stop: int) -> Iterator[tuple[int, str]]:
    """Those of the images start..stop−1 that cannot be read: (position, name)."""
    source = images.source if isinstance(images, KeptSlice) else images
    for k in range(start, stop):
        try:
            source.check(k, k + 1) if isinstance(source, Checkable) else images.load(k, k + 1)
        except UnreadableImage as error:
            yield k, error.image


def as_slice(
    data: Any, image_shape: tuple[int, ...] | None = None, num_classes: int | None = None, classes: bool = True
) -> ImageSlice:
    """Converts the usual forms of data to one slice, in memory and checked.

    Args:
        data: Images (N, C, H, W), a pair (images, labels), an iterable (list, DataLoader, generator)
            of either, or an ImageSlice, which is returned itself. All batches have one image shape,
            and all have labels or none has.
        image_shape: The shape that each image must have, if it is known.
        num_classes: Labels must lie within 0..num_classes − 1, if it is known.
        classes: Whether labels are class numbers. Else they are targets of any type and shape (N, ...).

    Raises:
        DataError: The data have another form.
    """
    if isinstance(data, ImageSlice):
        return data
    if isinstance(data, Tensor) or _is_pair(data, _axes(image_shape)):
        data = [data]
    elif not isinstance(data, Iterable):
        hint = ": torch.utils.data.DataLoader(dataset, batch_size=64) makes one" if hasattr(data, "__getitem__") else ""
        raise DataError(
            f"data is a {type(data).__name__}; expected an iterable of image batches (N, C, H, W) or (images, labels){hint}"
        )
    batches: list[Tensor] = []
    labels: list[Tensor] = []
    for number, batch in enumerate(data):
        x, y = _images_and_labels(batch, number)
        subject = f"batch {number}"
        check_batch(x, y, image_shape, num_classes, subject, classes)
        if batches and x.shape[1:] != batches[0].shape[1:]:
            raise DataError(
                f"images of mixed size: {subject} has shape {tuple(x.shape[1:])}, batch 0 has {tuple(batches[0].shape[1:])}; "
                "expected one size, so resize or crop them first"
            )
        if batches and (y is not None) != bool(labels):
            raise DataError(
                f"{subject} is {'un' if y is None else ''}labelled, the batches before are not; expected labels in all or in none"
            )
        batches.append(x.detach().cpu())
        if y is not None:
            y = y.detach().cpu()
            labels.append(y if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool else y.long())
    if not batches:
        raise DataError("data is empty; expected at least one batch (an iterator that was already read is empty)")
    return MemorySlice(torch.cat(batches), torch.cat(labels) if labels else None, num_classes)


def _axes(image_shape: tuple[int, ...] | None) -> int:
    """Number of axes of a batch."""
    return 4 if image_shape is None else 1 + len(image_shape)


def _is_pair(data: object, axes: int) -> bool:
    # Two image batches are an iterable of batches; images and anything else are one labelled batch.
    if not (isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(element, Tensor) for element in data)):
        return False
    return bool(data[0].ndim == axes and data[1].ndim != axes)


def _images_and_labels(batch: Any, number: int) -> tuple[Any, Any]:
    if isinstance(batch, tuple | list):
        if len(batch) in (1, 2):
            return batch[0], batch[1] if len(batch) == 2 else None
        raise DataError(f"batch {number} has {len(batch)} parts; expected images, or (images, labels)")
    return batch, None
