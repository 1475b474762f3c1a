"""Evaluates an assignment: top-1, top-5 and loss.

They are counts and sums, which add up over evaluation batches.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clado import criteria
from clado.criteria import PackedCriterion
from clado.criteria.cross_entropy import cross_entropy
from clado.criteria.kl_to_float import kl_to_float
from clado.data.images import ImageSlice
from clado.errors import ConfigurationError, DataError
from clado.measuring.plan import sample_blocks
from clado.measuring.workbench import on_device, split
from clado.network.network import Network, Replaced
from clado.network.outputs import LOGITS, Outputs
from clado.plugins import imported
from clado.records.interval import Interval
from clado.records.results import Accuracy, Comparison

Number = TypeVar("Number", int, float)
Metric = Callable[[Any, Any], Tensor]
"""(outputs in the network's own form, targets) -> a number for each image (N,), of which more is better."""


@dataclass(frozen=True)
class Judge:
    """User-defined values of each image, in addition to a classifier's hits."""

    outputs: Outputs = LOGITS
    """The form of the network's outputs."""
    criterion: PackedCriterion | None = None
    """Gives the loss, instead of cross entropy or KL divergence."""
    metric: Metric | None = None
    """A user-defined metric."""
    metric_name: str | None = None
    """Its name in reports."""

    @classmethod
    def of(cls, outputs: Outputs, criterion: Any = None, metric: Any = None) -> "Judge":
        """The judge of a network.

        Args:
            outputs: The form of its outputs.
            criterion: As `clado.criteria.criterion_of` takes it. With a criterion of classes, or without a criterion, the loss of
                logits is cross entropy or KL. Other outputs then have the loss `mse_to_float`.
            metric: A callable, or `package.module:name`.

        Raises:
            ConfigurationError: There is no such criterion or metric.
        """
        packed = criteria.packed(criterion or ("kl_to_float" if outputs.are_logits else "mse_to_float"), outputs)
        function = imported(metric, "metric") if isinstance(metric, str) else metric
        if function is not None and (isinstance(function, type) or not callable(function)):
            raise ConfigurationError(
                f"metric {metric!r} cannot be called; expected (outputs, targets) -> a number for each image"
            )
        name = metric.partition(":")[2] if isinstance(metric, str) else getattr(function, "__name__", type(function).__name__)
        return cls(outputs, None if "classes" in packed.offers else packed, function, None if function is None else name)

    def has_classes(self, labels: Tensor | None) -> bool:
        """Whether the outputs are logits, and labels (if there are any) are their classes."""
        return self.outputs.are_logits and (labels is None or (labels.ndim == 1 and not labels.is_floating_point()))

    def columns(self, logits: Tensor, labels: Tensor | None, floats: Tensor | None) -> dict[str, Tensor]:
        """User-defined `loss` and `metric` of each image (n,)."""
        columns: dict[str, Tensor] = {}
        if self.criterion is not None:
            assert floats is not None  # `count_each` computes them
            columns["loss"] = self.criterion.of(floats, labels)(logits)
        if self.metric is not None:
            columns["metric"] = self.outputs.numbers(f"metric {self.metric_name}", self.metric, logits, labels)
        return columns

    def refuse_unfit(self, logits: Tensor, labels: Tensor | None) -> None:
        """Tries the metric on a few images. ConfigurationError if it fails or does not give numbers."""
        self.columns(logits, labels, logits)


CLASSIFIER = Judge()
"""Counts top-1, top-5, and cross entropy or KL divergence."""


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
    briers: tuple[float, ...] = ()
    """Brier score of each image of the decision set, to six digits, or its loss without classes. Else empty."""
    hits: str = ""
    """1 for each image whose top class is right, else 0. Without labels, the float network's class is right."""
    agreed: str = ""
    """1 for each validation image whose top class is the float network's, else 0."""
    kl: tuple[float, ...] = ()
    """KL divergence from the float network of each validation image, in nats, to six digits."""
    metric: tuple[float, ...] = ()
    """User-defined metric of each image."""
    metric_name: str | None = None
    """Its name."""

    def __post_init__(self) -> None:
        # from JSON
        object.__setattr__(self, "classes", tuple((label, images, hits) for label, images, hits in self.classes))
        object.__setattr__(self, "kl", tuple(self.kl))
        object.__setattr__(self, "briers", tuple(self.briers))
        object.__setattr__(self, "metric", tuple(self.metric))

    def __add__(self, other: "Counts") -> "Counts":
        if not self.num_images:
            return other
        return Counts(
            self.num_images + other.num_images,
            self.loss + other.loss,
            _sum_or_none(self.top1, other.top1),
            _sum_or_none(self.top5, other.top5),
            _merge_classes(self.classes, other.classes),
            self.briers + other.briers,
            self.hits + other.hits,
            self.agreed + other.agreed,
            self.kl + other.kl,
            self.metric + other.metric,
            self.metric_name,
        )

    def accuracy(self) -> Accuracy:
        """Means over the images counted."""
        n = self.num_images
        return Accuracy(
            n,
            self.loss / n,
            None if self.top1 is None else self.top1 / n,
            None if self.top5 is None else self.top5 / n,
            math.fsum(self.kl) / n if self.kl else None,
            self.agreed.count("1") / n if self.agreed else None,
            math.fsum(self.metric) / n if self.metric else None,
            self.metric_name,
        )

    @property
    def each_brier(self) -> NDArray[np.float64]:
        """`briers` (n,)."""
        return np.array(self.briers)

    @property
    def each_hit(self) -> NDArray[np.float64]:
        """`hits` as numbers (n,)."""
        return np.array([float(hit) for hit in self.hits])


def compared(budget: str, method: str, other: str, counts: Counts, other_counts: Counts) -> Comparison | None:
    """Two answers on the same validation images. None if these were not compared with the float network image by image.

    Also None if a network gives logits that are not finite.
    """
    if not counts.kl or len(counts.kl) != len(other_counts.kl) or not np.isfinite([*counts.kl, *other_counts.kl]).all():
        return None

    def difference(of: Callable[[Counts], Iterable[Any]]) -> Interval:
        one, another = (np.array([float(value) for value in of(each)]) for each in (counts, other_counts))
        return Interval.of(one - another)

    top1 = None if counts.top1 is None else difference(lambda each: each.hits)
    return Comparison(budget, method, other, difference(lambda each: each.kl), difference(lambda each: each.agreed), top1)


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
    judge: Judge = CLASSIFIER,
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
        reference: The float network. Each image is compared with it.
        judge: What else is counted.
    """
    return count_each([(network, replaced)], images, start, stop, batch_images, reference, judge)[0]


def count_each(
    variants: Iterable[tuple[Network, Replaced]],
    images: ImageSlice,
    start: int,
    stop: int,
    batch_images: int | None = None,
    reference: Network | None = None,
    judge: Judge = CLASSIFIER,
) -> list[Counts]:
    """`count` of several networks with layers replaced. Each image is decoded once.

    All images are held in memory, and one network at a time. The sums are the same, bit for bit.

    Each image is compared with the float network if `reference` is given, or if the loss needs it.
    """
    x, labels = images.load(start, stop)
    totals: list[Counts] = []
    against, floats = None, list[Tensor]()
    for plain, layers in variants:
        x = x.to(plain.device)
        batches = split(x, labels, batch_images or plain.images_at_once)
        float_network = reference or plain
        if (labels is None or reference is not None or judge.criterion is not None) and against is not float_network:
            against, (folded, _) = float_network, float_network.folded()
            floats = [folded.logits(batch) for batch, _ in batches]
        if plain is against and not layers:
            logits = iter(floats)
        else:
            network, replaced = plain.folded_with(layers)
            logits = (network.logits(batch, replaced) for batch, _ in batches)
        counts = (
            _batch_counts(batch_logits, batches[k][1], floats[k] if floats else None, judge)
            for k, batch_logits in enumerate(logits)
        )
        totals.append(sum(counts, Counts()))
    return totals


def _batch_counts(logits: Tensor, labels: Tensor | None, floats: Tensor | None, judge: Judge = CLASSIFIER) -> Counts:
    """Counts of one batch: cross entropy and hits with labels, KL to the float logits without, and both where both are given.

    User-defined values of the judge replace these or are added.
    """
    if labels is None and floats is None:
        raise DataError("the images have no labels and no float network to compare with; expected one of them")
    targets = None if labels is None else labels.to(logits.device)
    columns: dict[str, Tensor] = {}
    if judge.has_classes(labels) and floats is not None:
        kl = kl_to_float(logits, floats)
        columns |= {"loss": kl, "kl": kl, "agreed": (logits.argmax(1) == floats.argmax(1)) & _is_finite(logits)}
    if judge.has_classes(labels) and targets is not None:
        top5 = (logits.topk(min(5, logits.shape[1]), 1).indices == targets[:, None]) & _is_finite(logits)[:, None]
        # column k of top5: the class of rank k is the label
        columns |= {"hit": top5[:, 0], "hit5": top5.any(1), "label": targets}
        columns |= {"loss": cross_entropy(logits, targets)} if judge.criterion is None else {}
    columns |= judge.columns(logits, targets, floats)
    rows = torch.stack([column.double() for column in columns.values()]).cpu()  # the device is waited for once
    each = dict(zip(columns, rows, strict=True))
    counts = Counts(len(logits), float(each["loss"].sum()))
    if "kl" in each:
        counts = replace(counts, agreed=_digits(each["agreed"]), kl=to_six_digits(each["kl"].tolist()))
    if "hit" in each:
        hit, label = each["hit"].bool(), each["label"].long()
        num_images, num_hits = Counter(label.tolist()), Counter(label[hit].tolist())
        classes = tuple((one, num_images[one], num_hits[one]) for one in sorted(num_images))
        counts = replace(counts, top1=int(hit.sum()), top5=int(each["hit5"].sum()), classes=classes, hits=_digits(hit))
    if "metric" in each:
        counts = replace(counts, metric=to_six_digits(each["metric"].tolist()), metric_name=judge.metric_name)
    return counts


def to_six_digits(values: Iterable[float]) -> tuple[float, ...]:
    """The values of each image, rounded as they are stored."""
    return tuple(float(f"{value:.6g}") for value in values)


def _digits(hits: Tensor) -> str:
    return "".join("01"[hit] for hit in hits.int().tolist())


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


def judged_per_image(
    network: Network, replaced: Replaced, images: ImageSlice, reference: Network, judge: Judge, batch_images: int | None = None
) -> dict[str, NDArray[np.float64]]:
    """User-defined values of each image (`Judge.columns`), for paired comparisons."""
    folded, layers = network.folded_with(replaced)
    parts: list[dict[str, Tensor]] = []
    for low, high in evaluation_batches(len(images), batch_images or network.images_at_once):
        x, targets = on_device(network, images.load(low, high))
        parts.append(judge.columns(folded.logits(x, layers), targets, reference.logits(x)))
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}


def _is_finite(logits: Tensor) -> Tensor:
    """Rows without a NaN or an infinity.

    Only these can be hits, because with NaNs argmax may give any class.
    """
    return logits.isfinite().all(1)


def evaluation_batches(num_images: int, size: int) -> list[tuple[int, int]]:
    """Consecutive ranges of at most `size` images that cover the slice, as even as integers allow."""
    return list(sample_blocks(num_images, -(-num_images // size))) if num_images else []


@torch.inference_mode()
def evaluate_weights(network: Network, replaced: Replaced, images: ImageSlice, batch_images: int | None = None) -> Accuracy:
    """Accuracy over a whole slice."""
    batches = evaluation_batches(len(images), batch_images or network.images_at_once)
    return sum((count(network, replaced, images, *batch, batch_images) for batch in batches), Counts()).accuracy()
