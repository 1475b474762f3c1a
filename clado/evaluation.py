"""What an assignment is worth: top-1, top-5 and loss, as counts and sums that add up over shards of the images."""

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
from clado.records import Accuracy

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Counts:
    """Sums over a shard of images: `loss` is the sum of losses; `top1` and `top5` count hits, None without labels. `classes` has
    (class, images, top-1 hits) of each class that was met, in order of the classes. Of
    sensitivity images `brier` is the sum of Brier scores, and `hits` has a 1 or 0 for each (`measure.Scores`)."""

    num_images: int = 0
    loss: float = 0.0
    top1: int | None = None
    top5: int | None = None
    classes: tuple[tuple[int, int, int], ...] = ()
    brier: float | None = None
    hits: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple((label, images, hits) for label, images, hits in self.classes))  # from JSON

    def __add__(self, other: "Counts") -> "Counts":
        if not self.num_images:
            return other
        return Counts(
            self.num_images + other.num_images,
            self.loss + other.loss,
            _added(self.top1, other.top1),
            _added(self.top5, other.top5),
            _merged(self.classes, other.classes),
            _added(self.brier, other.brier),
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


def _added(a: Number | None, b: Number | None) -> Number | None:
    return None if a is None or b is None else a + b


def _merged(one: tuple[tuple[int, int, int], ...], other: tuple[tuple[int, int, int], ...]) -> tuple[tuple[int, int, int], ...]:
    images: Counter[int] = Counter()
    right: Counter[int] = Counter()
    for label, num_images, hits in (*one, *other):
        images[label] += num_images
        right[label] += hits
    return tuple((label, images[label], right[label]) for label in sorted(images))


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

    The loss is cross entropy where the images have labels, else KL to the float network, which is `reference` where final
    corrections have changed `network`. `batch_images` are those of one run (default: as many as are fast).
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
    """`count` of several networks with layers replaced, in one pass: each image is decoded once. The same sums, bit for bit."""
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
            totals[k] += _counted(network.logits(x, replaced), labels, floats.get(id(float_network)))
    return totals


def _counted(logits: Tensor, labels: Tensor | None, floats: Tensor | None) -> Counts:
    """Of one batch: cross entropy and hits where there are labels, else KL to the float logits."""
    if labels is None:
        if floats is None:
            raise DataError("the images have no labels and no float network to compare with; expected one of them")
        return Counts(len(logits), float(kl_to_float(logits, floats).sum()))
    there = labels.to(logits.device)
    loss = cross_entropy(logits, there).sum()
    top5 = logits.topk(min(5, logits.shape[1]), 1).indices == there[:, None]
    best, labels = (top5 & _finite(logits)[:, None]).cpu(), labels.cpu()
    images, hits = Counter(labels.tolist()), Counter(labels[best[:, 0]].tolist())
    classes = tuple((label, images[label], hits[label]) for label in sorted(images))
    return Counts(len(logits), float(loss), int(best[:, 0].sum()), int(best.sum()), classes)


def per_image(
    network: Network, replaced: Replaced, images: ImageSlice, batch_images: int | None = None, reference: Network | None = None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(loss, top-1 hit) of each image (n,): for paired comparisons. Without labels: KL, and agreement with the float network."""
    losses, hits, float_network = [], [], reference or network
    network, replaced = network.folded_with(replaced)
    for low, high in evaluation_batches(len(images), batch_images or network.images_at_once):
        x, labels = images.load(low, high)
        x = x.to(network.device)
        logits = network.logits(x, replaced)
        if labels is None:
            floats = float_network.logits(x)
            loss, expected = kl_to_float(logits, floats), floats.argmax(1)
        else:
            expected = labels.to(network.device)
            loss = cross_entropy(logits, expected)
        losses.append(loss.cpu().numpy())
        hits.append(((logits.argmax(1) == expected) & _finite(logits)).cpu().numpy())
    return np.concatenate(losses), np.concatenate(hits)


def _finite(logits: Tensor) -> Tensor:
    """Rows that may hit: of NaN any class may be called the largest."""
    return logits.isfinite().all(1)


def evaluation_batches(num_images: int, size: int) -> list[tuple[int, int]]:
    """Consecutive ranges of at most `size` images that cover the slice."""
    return [(start, min(start + size, num_images)) for start in range(0, num_images, size)]


@torch.inference_mode()
def evaluate_weights(network: Network, replaced: Replaced, images: ImageSlice, batch_images: int | None = None) -> Accuracy:
    """Accuracy over a whole slice."""
    return count(network, replaced, images, 0, len(images), batch_images).accuracy()
