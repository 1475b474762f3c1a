"""Images for segmentation: four garments of Fashion-MNIST on one canvas, and the class of each pixel."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SIDE = 48
IMAGE_SHAPE = (1, SIDE, SIDE)
NUM_CLASSES = 11
"""The ten of Fashion-MNIST, and the background, which is class 10."""
BACKGROUND = 10
GARMENTS = 4
INK = 24
"""A garment's pixels above this, of 0 to 255, cover what lies below."""


def composites(
    images: NDArray[np.uint8], labels: NDArray[Any], count: int, seed: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Canvases of garments at random places.

    Args:
        images: Garments (M, 28, 28). They are drawn without repetition until all are used, and then again.
        labels: Their classes (M,), 0 to 9.
        count: Number of canvases. The first canvases are the same for any count.
        seed: Seed of garments and places.

    Returns:
        Canvases (count, 48, 48), and the class of each pixel (count, 48, 48).
    """
    random = np.random.default_rng(seed)
    rounds = -(-count * GARMENTS // len(images))
    order = np.concatenate([random.permutation(len(images)) for _ in range(rounds)])
    places = np.random.default_rng([seed, 1]).integers(0, SIDE - 28 + 1, (count, GARMENTS, 2))
    canvases = np.zeros((count, *IMAGE_SHAPE[1:]), np.uint8)
    masks = np.full(canvases.shape, BACKGROUND, np.int64)
    for k in range(count):
        for number, (top, left) in zip(order[k * GARMENTS : (k + 1) * GARMENTS], places[k], strict=True):
            area = slice(top, top + 28), slice(left, left + 28)
            ink = images[number] > INK
            canvases[k][area][ink] = images[number][ink]
            masks[k][area][ink] = labels[number]
    return canvases, masks


def mean_iou(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean intersection over union of each image (N,), over the classes that its target has.

    Args:
        outputs: Logits (N, C, H, W).
        targets: Classes (N, H, W).
    """
    predicted, ious, present = outputs.argmax(1), [], []
    for c in range(outputs.shape[1]):
        one, other = (predicted == c).flatten(1), (targets == c).flatten(1)
        ious.append((one & other).sum(1) / (one | other).sum(1).clamp_min(1))
        present.append(other.any(1))
    counted = torch.stack(present, 1)
    return (torch.stack(ious, 1) * counted).sum(1) / counted.sum(1).clamp_min(1)
