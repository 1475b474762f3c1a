"""Labelled or unlabelled images, sliced: what measuring and evaluation read, wherever the images come from."""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from clado.errors import DataError, UnreadableImage

ImageShape = tuple[int, int, int]  # of what sources give; the Python path takes vectors and volumes too
"""Channels, height, width."""


@runtime_checkable
class ImageSlice(Protocol):
    """A fixed sequence of images of one shape, normalised and ready for the network."""

    @property
    def image_shape(self) -> ImageShape:
        """Channels, height, width of every image."""

    @property
    def num_classes(self) -> int | None:
        """Labels lie within 0..num_classes - 1; None where that is not known."""

    @property
    def sha256(self) -> str:
        """Identity of the images, their order and their labels; the class says what is hashed."""

    def __len__(self) -> int:
        """Number of images."""

    def load(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Images start..stop-1 as float32 (n, C, H, W), and their labels as int64 (n,), or None if unlabelled."""


@dataclass(frozen=True)
class DataSlices:
    """Disjoint slices: calibration fits ranges, sensitivity is measured on, validation is seen by no choice. `selection` is what
    these leave over: an answer that must keep a measured loss or accuracy is chosen on it."""

    calibration: ImageSlice
    sensitivity: ImageSlice
    validation: ImageSlice
    selection: ImageSlice
    imagenet: bool = False  # labelled by ImageNet's thousand classes


class MemorySlice:
    """Images (N, C, H, W) float32, or vectors, signals or volumes, and labels (N,) int64 or None, held in memory. The hash covers
    every pixel and label."""

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
        """Of the shape, the float32 pixels in order, and the int64 labels in order."""
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


class PickedSlice:
    """Some images of other slices, all of one shape, in an order: numbers count through the slices one after another.

    The hash covers the slices' hashes and the numbers. Labelled where every slice is.
    """

    def __init__(self, parts: Sequence[ImageSlice], numbers: Sequence[int] | None = None) -> None:
        self._parts = [part for part in parts if len(part)]
        if len({part.image_shape for part in self._parts}) != 1:
            raise DataError(f"images of shapes {sorted({part.image_shape for part in self._parts})}; expected one, and an image")
        self._ends = list(accumulate(map(len, self._parts)))
        self._numbers = range(self._ends[-1]) if numbers is None else numbers

    @property
    def image_shape(self) -> ImageShape:
        """Channels, height, width."""
        return self._parts[0].image_shape

    @property
    def num_classes(self) -> int | None:
        """Number of classes, or None."""
        return self._parts[0].num_classes

    @cached_property
    def sha256(self) -> str:
        """Of the slices' hashes and the numbers picked, in order."""
        return hashlib.sha256(repr(([part.sha256 for part in self._parts], list(self._numbers))).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._numbers)

    def load(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Images and labels start..stop-1."""
        images, labels = [], []
        for number in self._numbers[start:stop]:
            k = bisect_right(self._ends, number)
            first = number - (self._ends[k - 1] if k else 0)
            x, y = self._parts[k].load(first, first + 1)
            images.append(x)
            labels += [] if y is None else [y]
        if not images:
            return torch.empty(0, *self.image_shape), None
        return torch.cat(images), torch.cat(labels) if len(labels) == len(images) else None


class AbsentSlice:
    """So many images that are not there: enough to plan with."""

    num_classes = None
    sha256 = "absent"

    def __init__(self, num_images: int, image_shape: ImageShape, path: object) -> None:
        self._num_images, self.image_shape, self.path = num_images, image_shape, path

    def __len__(self) -> int:
        return self._num_images

    def load(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Refused."""
        raise DataError(f"data.path {self.path} is not a folder; without images a run can be planned, not measured")


def check_batch(
    images: object,
    labels: object,
    image_shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
    whose: str = "the batch",
) -> None:
    """Refuses (DataError) all but float32 images (N, C, H, W), or (N, *image_shape), finite, with integer labels (N,) in range
    or None."""
    usual = image_shape is None or len(image_shape) == 3
    axes = "(N, C, H, W)" if usual else f"(N, {', '.join(map(str, image_shape or ()))})"
    if not isinstance(images, Tensor):
        raise DataError(f"{whose} holds images of type {type(images).__name__}; expected a torch tensor {axes} of float32")
    shape = tuple(images.shape)
    if images.ndim != _axes(image_shape):
        hint = "; a single image becomes a batch with image.unsqueeze(0), a dataset with torch.utils.data.DataLoader"
        expected, one_less = f"four axes {axes}" if usual else axes, images.ndim == _axes(image_shape) - 1
        raise DataError(f"{whose} holds images of shape {shape}; expected {expected}" + (hint if one_less else ""))
    if 0 in shape:
        raise DataError(f"{whose} is empty: its images have shape {shape}; expected at least one image {axes}")
    if image_shape is not None and shape[1:] != tuple(image_shape):
        named = " (channels, height, width)" if usual else ""
        raise DataError(f"{whose} holds images of shape {shape[1:]}; expected {tuple(image_shape)}{named}")
    if images.dtype != torch.float32:
        hint = "images.float() / 255, then normalise" if not images.dtype.is_floating_point else "images.float()"
        raise DataError(f"{whose} holds images of {images.dtype}; expected torch.float32: {hint}")
    bad = (~torch.isfinite(images)).flatten(1).any(1)
    if bad.any():
        first = int(bad.nonzero()[0, 0])
        raise DataError(
            f"{whose} has NaN or infinite pixels in {int(bad.sum())} of {len(images)} images, the first at index {first}"
        )
    if labels is not None:
        _check_labels(labels, len(images), num_classes, whose)


def _check_labels(labels: object, num_images: int, num_classes: int | None, whose: str) -> None:
    if not isinstance(labels, Tensor):
        raise DataError(f"{whose} holds labels of type {type(labels).__name__}; expected a torch tensor (N,) of int64, or none")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise DataError(f"{whose} holds labels of {labels.dtype}; expected class numbers of torch.int64")
    if tuple(labels.shape) != (num_images,):
        raise DataError(f"{whose} holds labels of shape {tuple(labels.shape)} for {num_images} images; expected ({num_images},)")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        bound = "at least 0" if num_classes is None else f"within 0..{num_classes - 1}, for {num_classes} classes"
        raise DataError(f"{whose} has labels from {low} to {high}; expected labels {bound}")


def check_slice(
    images: ImageSlice,
    image_shape: tuple[int, ...] | None = None,
    num_classes: int | None = None,
    batch: int = 256,
    unreadable: dict[int, str] | None = None,
) -> None:
    """Reads every image once, `batch` at a time, and refuses (DataError) what `check_batch` refuses, or an empty slice.

    Images that cannot be read are added to `unreadable` where it is given, names by position; what is read beside them is not
    checked.
    """
    if len(images) == 0:
        raise DataError("the data is empty; expected at least one image")
    for start in range(0, len(images), batch):
        stop = min(start + batch, len(images))
        try:
            x, y = images.load(start, stop)
        except UnreadableImage:
            if unreadable is None:
                raise
            unreadable.update(_unreadable(images, start, stop))
            continue
        check_batch(x, y, image_shape, num_classes, f"images {start} to {stop - 1}")


def _unreadable(images: ImageSlice, start: int, stop: int) -> Iterator[tuple[int, str]]:
    """Those of the images start..stop−1 that cannot be read: (position, name)."""
    for k in range(start, stop):
        try:
            images.load(k, k + 1)
        except UnreadableImage as error:
            yield k, error.image


def as_slice(data: Any, image_shape: tuple[int, ...] | None = None, num_classes: int | None = None) -> ImageSlice:
    """Any of the usual forms of data as one slice, in memory and checked.

    `data`: images (N, C, H, W); a pair (images, labels); an iterable (list, DataLoader, generator) of such batches, all of one
    image shape and all labelled or none; or an ImageSlice, which is returned as it is. Raises DataError.
    """
    if isinstance(data, ImageSlice):
        return data
    if isinstance(data, Tensor) or _is_pair(data, _axes(image_shape)):
        data = [data]
    elif not isinstance(data, Iterable):
        raise DataError(
            f"data is a {type(data).__name__}; expected an iterable of image batches (N, C, H, W) or (images, labels)"
        )
    batches: list[Tensor] = []
    labels: list[Tensor] = []
    for number, batch in enumerate(data):
        x, y = _split(batch, number)
        whose = f"batch {number}"
        check_batch(x, y, image_shape, num_classes, whose)
        if batches and x.shape[1:] != batches[0].shape[1:]:
            raise DataError(
                f"images of mixed size: {whose} has shape {tuple(x.shape[1:])}, batch 0 has {tuple(batches[0].shape[1:])}; "
                "expected one size, so resize or crop them first"
            )
        if batches and (y is not None) != bool(labels):
            raise DataError(
                f"{whose} is {'un' if y is None else ''}labelled, the batches before are not so; expected labels on all or none"
            )
        batches.append(x.detach().cpu())
        if y is not None:
            labels.append(y.detach().cpu().long())
    if not batches:
        raise DataError("data is empty; expected at least one batch (an iterator that was read before has nothing left)")
    return MemorySlice(torch.cat(batches), torch.cat(labels) if labels else None, num_classes)


def _axes(image_shape: tuple[int, ...] | None) -> int:
    """Number of axes of a batch."""
    return 4 if image_shape is None else 1 + len(image_shape)


def _is_pair(data: object, axes: int) -> bool:
    # A tuple of two image batches is an iterable of batches; of images and anything else, one labelled batch.
    if not (isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)):
        return False
    return bool(data[0].ndim == axes and data[1].ndim != axes)


def _split(batch: Any, number: int) -> tuple[Any, Any]:
    if isinstance(batch, tuple | list):
        if len(batch) in (1, 2):
            return batch[0], batch[1] if len(batch) == 2 else None
        raise DataError(f"batch {number} has {len(batch)} parts; expected images, or (images, labels)")
    return batch, None
