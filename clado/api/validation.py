"""A deployed network beside the float network, image by image, so that the difference has an interval."""

from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from clado import criteria
from clado.api.progress import Advance
from clado.criteria.cross_entropy import cross_entropy
from clado.criteria.kl_to_float import kl_to_float
from clado.data.images import ImageSlice
from clado.evaluation import evaluation_batches
from clado.grids import QuantizedLayer
from clado.network.network import Network
from clado.records.interval import Z95
from clado.records.results import Accuracy


@dataclass(frozen=True)
class Validation:
    """What was counted of a deployed network beside the float network."""

    float_accuracy: Accuracy
    """Accuracy of the float network."""
    accuracy: Accuracy
    """Accuracy of the deployed network."""
    loss: float
    """Mean of the criterion."""
    agreement: float
    """Fraction of images with the same top class."""
    drop_interval: float | None
    """Half the 95 % interval of the difference in top-1."""


@torch.inference_mode()
def validate(
    network: Network, deployed: tuple[Network, dict[int, QuantizedLayer]], criterion: Any, images: ImageSlice, advance: Advance
) -> Validation:
    """Runs both networks over the images, once.

    Args:
        network: The float network.
        deployed: The deployed network and its layers.
        criterion: The loss that must not grow.
        images: The images.
        advance: It is called with (images that are done, all images).
    """
    folded, replaced = deployed[0].folded_with(deployed[1])
    numbers: list[dict[str, Tensor]] = []
    for start, stop in evaluation_batches(len(images), network.images_at_once):
        x, labels = images.load(start, stop)
        x, labels = x.to(network.device), None if labels is None else labels.to(network.device)
        floats, logits = network.logits(x), folded.logits(x, replaced)
        batch = {
            "criterion": criteria.bind(criterion, floats, labels)(logits),
            "agrees": logits.argmax(1) == floats.argmax(1),
            **{f"float_{name}": number for name, number in _judged(floats, floats, labels).items()},
            **_judged(logits, floats, labels),
        }
        numbers.append({name: number.double().cpu() for name, number in batch.items()})
        advance(stop, len(images))
    each = {name: torch.cat([batch[name] for batch in numbers]) for name in numbers[0]}
    means = {name: float(number.mean()) for name, number in each.items()}
    interval = None
    if "top1" in each and len(images) > 1:
        interval = Z95 * float((each["top1"] - each["float_top1"]).std(correction=1)) / sqrt(len(images))
    before, after = (
        Accuracy(len(images), means[f"{of}loss"], means.get(f"{of}top1"), means.get(f"{of}top5")) for of in ("float_", "")
    )
    return Validation(before, after, means["criterion"], means["agrees"], interval)


def _judged(logits: Tensor, floats: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """Of each image (n,): cross entropy, and hits in the top class and the top five. Without labels the KL divergence alone."""
    if labels is None:
        return {"loss": kl_to_float(logits, floats)}
    hits = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
    hits &= logits.isfinite().all(1, keepdim=True)  # any class may be the largest of NaNs
    return {"loss": cross_entropy(logits, labels), "top1": hits[:, 0], "top5": hits.any(1)}
