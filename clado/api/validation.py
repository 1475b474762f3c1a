"""Compares a deployed network with the float network image by image, so that the difference has an interval."""

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
from clado.evaluation import Judge, evaluation_batches
from clado.grids import QuantizedLayer
from clado.measuring.workbench import on_device
from clado.network.network import Network
from clado.records.interval import Z95
from clado.records.results import Accuracy


@dataclass(frozen=True)
class Validation:
    """Counts of a deployed network compared with the float network."""

    float_accuracy: Accuracy
    """Accuracy of the float network."""
    accuracy: Accuracy
    """Accuracy of the deployed network."""
    loss: float
    """Mean of the criterion."""
    agreement: float | None
    """Fraction of images for which both give the same top class. None without logits."""
    drop_interval: float | None
    """Half the 95 % interval of the difference in the metric, or else in top-1."""


@torch.inference_mode()
def validate(
    network: Network,
    deployed: tuple[Network, dict[int, QuantizedLayer]],
    criterion: Any,
    images: ImageSlice,
    advance: Advance,
    metric: Any = None,
) -> Validation:
    """Runs both networks over the images, once.

    Args:
        network: The float network.
        deployed: The deployed network and its layers.
        criterion: The loss that must not grow.
        images: The images.
        advance: It is called with (done images, all images).
        metric: A user-defined metric, as in `clado.evaluate`.
    """
    judge, packed = Judge.of(network.outputs, criterion, metric), criteria.packed(criterion, network.outputs)
    folded, replaced = deployed[0].folded_with(deployed[1])
    numbers: list[dict[str, Tensor]] = []
    for start, stop in evaluation_batches(len(images), network.images_at_once):
        x, labels = on_device(network, images.load(start, stop))
        floats, logits = network.logits(x), folded.logits(x, replaced)
        batch = {
            "criterion": packed.of(floats, labels)(logits),
            **({"agrees": logits.argmax(1) == floats.argmax(1)} if network.outputs.are_logits else {}),
            **{f"float_{name}": number for name, number in _judged(floats, floats, labels, judge).items()},
            **_judged(logits, floats, labels, judge),
        }
        numbers.append({name: number.double().cpu() for name, number in batch.items()})
        advance(stop, len(images))
    each = {name: torch.cat([batch[name] for batch in numbers]) for name in numbers[0]}
    means = {name: float(number.mean()) for name, number in each.items()}
    interval, paired = None, next((name for name in ("metric", "top1") if name in each), None)
    if paired is not None and len(images) > 1:
        interval = Z95 * float((each[paired] - each[f"float_{paired}"]).std(correction=1)) / sqrt(len(images))

    def accuracy(of: str) -> Accuracy:
        top1, top5, metric = (means.get(f"{of}{name}") for name in ("top1", "top5", "metric"))
        return Accuracy(len(images), means[f"{of}loss"], top1, top5, metric=metric, metric_name=judge.metric_name)

    return Validation(accuracy("float_"), accuracy(""), means["criterion"], means.get("agrees"), interval)


def _judged(logits: Tensor, floats: Tensor, labels: Tensor | None, judge: Judge) -> dict[str, Tensor]:
    """For each image (n,): cross entropy, and hits in the top class and the top five. Without labels only the KL divergence.

    User-defined values of the judge replace these or are added.
    """
    columns: dict[str, Tensor] = {}
    if judge.has_classes(labels) and labels is not None:
        hits = logits.topk(min(5, logits.shape[1]), 1).indices == labels[:, None]
        hits &= logits.isfinite().all(1, keepdim=True)  # with NaNs, argmax may give any class
        columns = {"top1": hits[:, 0], "top5": hits.any(1)}
    if judge.criterion is None:
        columns["loss"] = kl_to_float(logits, floats) if labels is None else cross_entropy(logits, labels)
    return columns | judge.columns(logits, labels, floats)
