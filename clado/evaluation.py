"""Evaluates an assignment: top-1, top-5 and loss.

They are counts and sums, which add up over evaluation batches.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clado.criteria.cross_entropy import cross_entropy
from clado.criteria.kl_to_float import kl_to_float
from clado.data.images import ImageSlice
from clado.errors import DataError
from clado.network.network import Network, Replaced
from clado.records.results import Accuracy

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Counts:
    """Counts and sums over images."""

    num_images: int = 0
    """Number of images."""
    loss: float = 0.0
    """Sum of the losses."""
    top1: int | None = None
    """Number of top-1 hits; None without labels."""
    top5: int | None = None
    """Number of top-5 hits; None without labels."""
    classes: tuple[tuple[int, int, int], ...] = ()
    """(class, images, top-1 hits) of each class that has images, in order of the classes."""
    brier: float | None = None
    """Sum of the Brier scores of sensitivity images; None if they were not measured."""
    hits: str = ""
    """A 1 or a 0 for each sensitivity image: whether its top class is right."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple((label, images, hits) for label, images, hits in self.classes))  # from JSON

    def __add__(self, other: "Counts") -> "Counts":
        if not self.num_images:
            return other
        return Counts(
            self.num_images + other.num_images,
            self.loss + other.loss,
            _sum_or_none(self.top1, other.top1),
            _sum_or_none(self.top5, other.top5),
            _merge_classes(self.classes, other.classes),
            _sum_or_none(self.brier, other.brier),
            self.hits + other.hits,
        )

    def accuracy(self) -> Accuracy:
        """Means over the images counted."""
        n = self.num_images
        return Accuracy(
            n, self.loss / n, None if self.top1 is None else self.top1 / n, None if self.top5 is None else self.top5 / n
        )

    @property
    def mean_brier(self) -> float:
        """NaN where it was not measured."""
        return math.nan if self.brier is None else self.brier / self.num_images

    @property
    def each_hit(self) -> NDArray[np.float64]:
        """`hits` as numbers (n,)."""
        return np.array([float(hit) for hit in self.hits])


def _sum_or_none(a: Number | None, b: Number | None) -> Number | None:
    return None if a is None or b is None else a + b


def _merge_classes(
    first: tuple[tuple[int, int, int], ...], second: tuple[tuple[int, int, int], ...]
) -> tuple[tuple[int, int, int], ...]:
    num_images: Counter[int] = Counter()
    num_hits: Counter[int] = Counter()
    for label, images, hits in (*first, *second):
        num_images[label] += images
        num_hits[label] += hits
    return tuple((label, num_images[label], num_hits[label]) for label in sorted(num_images))


def count(
    network: Network,
    replaced: Replaced,
    images: ImageSlice,
    start: int,
    stop: int,
    batch_images: int | None = None,
    reference: Network | None = None,
) -> Counts:
    """Counts over images start..stop−1 of a slice, with layers replaced.

    The loss is cross entropy if the images have labels. Otherwise it is KL to the float network.

    Args:
        network: The network, as final corrections have changed it.
        replaced: Layers by index.
        images: The slice.
        start: The first image.
        stop: The image after the last.
        batch_images: Images of one forward pass; by default as many as are fast.
        reference: The float network, if final corrections have changed `network`.
    """
    return count_each([(network, replaced)], images, start, stop, batch_images, reference)[0]


def count_each(
    variants: Sequence[tuple[Network, Replaced]],
    images: ImageSlice,
    start: int,
    stop: int,
    batch_images: int | None = None,
    reference: Network | None = None,
) -> list[Counts]:
    """`count` of several networks with layers replaced, in one pass. Each image is decoded once.

    The sums are the same, bit for bit.
    """
    totals = [Counts() for _ in variants]
    folded = [network.folded_with(replaced) for network, replaced in variants]
    step = batch_images or variants[0][0].images_at_once
    for low in range(start, stop, step):
        x, labels = images.load(low, min(low + step, stop))
        x = x.to(folded[0][0].device)
        floats: dict[int, Tensor] = {}
        for k, ((plain, _), (network, replaced)) in enumerate(zip(variants, folded, strict=True)):
            float_network = reference or plain
            if labels is None and id(float_network) not in floats:
                floats[id(float_network)] = float_network.logits(x)
            totals[k] += _batch_counts(network.logits(x, replaced), labels, floats.get(id(float_network)))
    return totals


def _batch_counts(logits: Tensor, labels: Tensor | None, floats: Tensor | None) -> Counts:
    """Counts of one batch: cross entropy and hits with labels, KL to the float logits without."""
    if labels is None:
        if floats is None:
            raise DataError("the images have no labels and no float network to compare with; expected one of them")
        return Counts(len(logits), float(kl_to_float(logits, floats).sum()))
    targets = labels.to(logits.device)
    loss = cross_entropy(logits, targets).sum()
    top5 = logits.topk(min(5, logits.shape[1]), 1).indices == targets[:, None]
    hits, labels = (top5 & _is_finite(logits)[:, None]).cpu(), labels.cpu()  # column k: the class of rank k is the label
    num_images, num_hits = Counter(labels.tolist()), Counter(labels[hits[:, 0]].tolist())
    classes = tuple((label, num_images[label], num_hits[label]) for label in sorted(num_images))
    return Counts(len(logits), float(loss), int(hits[:, 0].sum()), int(hits.sum()), classes)


def per_image(
    network: Network, replaced: Replaced, images: ImageSlice, batch_images: int | None = None, reference: Network | None = None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(loss, top-1 hit) of each image, both (n,), for paired comparisons.

    Without labels: KL to the float network, and whether the top class is the float network's.
    """
    losses, hits, float_network = [], [], reference or network
    network, replaced = network.folded_with(replaced)
    for low, high in evaluation_batches(len(images), batch_images or network.images_at_once):
        x, labels = images.load(low, high)
        x = x.to(network.device)
        logits = network.logits(x, replaced)
        if labels is None:
            floats = float_network.logits(x)
            loss, targets = kl_to_float(logits, floats), floats.argmax(1)
        else:
            targets = labels.to(network.device)
            loss = cross_entropy(logits, targets)
        losses.append(loss.cpu().numpy())
        hits.append(((logits.argmax(1) == targets) & _is_finite(logits)).cpu().numpy())
    return np.concatenate(losses), np.concatenate(hits)


def _is_finite(logits: Tensor) -> Tensor:
    """Rows without a NaN or an infinity.

    Only these can be hits: any class may be the largest of NaNs.
    """
    return logits.isfinite().all(1)


def evaluation_batches(num_images: int, size: int) -> list[tuple[int, int]]:
    """Consecutive ranges of at most `size` images that cover the slice."""
    return [(start, min(start + size, num_images)) for start in range(0, num_images, size)]


@torch.inference_mode()
def evaluate_weights(network: Network, replaced: Replaced, images: ImageSlice, batch_images: int | None = None) -> Accuracy:
    """Accuracy over a whole slice."""
    return count(network, replaced, images, 0, len(images), batch_images).accuracy()
