"""What an assignment is worth: top-1, top-5 and loss, as counts and sums that add up over shards of the images."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clado import criteria
from clado.images import ImageSlice
from clado.network import Network
from clado.records import Accuracy


@dataclass(frozen=True)
class Counts:
    """Sums over a shard of images: `loss` is the sum of losses; `top1` and `top5` count hits, None without labels."""

    num_images: int = 0
    loss: float = 0.0
    top1: int | None = None
    top5: int | None = None

    def __add__(self, other: "Counts") -> "Counts":
        if not self.num_images:
            return other
        return Counts(
            self.num_images + other.num_images,
            self.loss + other.loss,
            _added(self.top1, other.top1),
            _added(self.top5, other.top5),
        )

    def accuracy(self) -> Accuracy:
        """Means over the images counted."""
        n = self.num_images
        return Accuracy(
            n, self.loss / n, None if self.top1 is None else self.top1 / n, None if self.top5 is None else self.top5 / n
        )


def _added(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a + b


def count(
    network: Network, weights: Mapping[int, Tensor], images: ImageSlice, start: int, stop: int, batch_images: int = 128
) -> Counts:
    """Counts over images start..stop−1 of a slice, with the given tensors in place of layers' weights.

    The loss is cross entropy where the images have labels, else KL to the float network.
    """
    total = Counts()
    for low in range(start, stop, batch_images):
        x, labels = images.load(low, min(low + batch_images, stop))
        x = x.to(network.device)
        logits = network.logits(x, weights)
        if labels is None:
            total += Counts(len(x), float(criteria.kl_to_float(logits, network.logits(x)).sum()))
            continue
        labels = labels.to(network.device)
        best = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
        loss = float(criteria.cross_entropy(logits, labels).sum())
        total += Counts(len(x), loss, int(best[:, 0].sum()), int(best.sum()))
    return total


def per_image(
    network: Network, weights: Mapping[int, Tensor], images: ImageSlice, batch_images: int = 128
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(loss, top-1 hit) of each image (n,): for paired comparisons. Without labels: KL, and agreement with the float network."""
    losses, hits = [], []
    for low, high in shards(len(images), batch_images):
        x, labels = images.load(low, high)
        x = x.to(network.device)
        logits = network.logits(x, weights)
        if labels is None:
            floats = network.logits(x)
            loss, expected = criteria.kl_to_float(logits, floats), floats.argmax(1)
        else:
            expected = labels.to(network.device)
            loss = criteria.cross_entropy(logits, expected)
        losses.append(loss.cpu().numpy())
        hits.append((logits.argmax(1) == expected).cpu().numpy())
    return np.concatenate(losses), np.concatenate(hits)


def shards(num_images: int, size: int) -> list[tuple[int, int]]:
    """Consecutive ranges of at most `size` images that cover the slice."""
    return [(start, min(start + size, num_images)) for start in range(0, num_images, size)]


@torch.inference_mode()
def evaluate_weights(network: Network, weights: Mapping[int, Tensor], images: ImageSlice, batch_images: int = 128) -> Accuracy:
    """Accuracy over a whole slice."""
    return count(network, weights, images, 0, len(images), batch_images).accuracy()
