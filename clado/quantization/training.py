"""Fine-tuning: a few epochs of straight-through training of a whole network.

Training starts at the corrected, quantized weights, and every weight stays on its grid: see `pupil.py`. With `learned_scales` the
scales of weights and of inputs are also trained.

Batch norm keeps its initial statistics, as in the deployed network. Statistics of training batches add the noise of few images.
With them, no epoch at 4 bits was better than the start (docs/lab-log.md).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from clado import criteria
from clado.data.images import ImageSlice, PickedSlice
from clado.errors import ConfigurationError, DataError, MeasurementError
from clado.grids import QuantizedLayer
from clado.network.network import Network
from clado.quantization.pupil import Descent, Layers, Pupil, Rates

STEPS_OF_RATE = 10.0  # rate of latent positions in steps of the grid, at a learning rate of 1
HELD_OUT_BATCH = 128  # images


@dataclass(frozen=True)
class Training:
    """How a network is fine-tuned."""

    epochs: int = 4
    """Most epochs. 0 trains nothing."""
    criterion: str = "kl_to_float"
    """kl_to_float distils from the float network and needs no labels. cross_entropy needs labels."""
    learning_rate: float = 1e-3
    """Adam's first learning rate. It falls to zero with a cosine. The rate of latent positions is ten times as high."""
    batch_images: int = 64
    """Images of a training batch."""
    patience: int = 2
    """Training ends after this many epochs without a lower held-out loss."""
    learned_scales: bool = False
    """Whether the scales of weights and inputs are trained."""
    augment: bool = True
    """Whether images are shifted by up to a fourteenth of their side, and half of them mirrored, at random.

    Images with targets that are not classes are not changed.
    """
    seed: int = 0
    """The seed of the order of images and of augmentation."""

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("batch_images", 2), ("patience", 1)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; expected {least} or more")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigurationError(f"learning_rate is {self.learning_rate}; expected a number above 0, such as 0.001")
        criteria.criterion_of(self.criterion)  # refuses an unknown name

    @property
    def rates(self) -> Rates:
        """Learning rates of the trained tensors."""
        rate = self.learning_rate
        return Rates(STEPS_OF_RATE * rate, rate if self.learned_scales else 0.0, rate)

    def objective(self, network: Network) -> criteria.PackedCriterion:
        """The criterion that training minimises, on the outputs of a network."""
        return criteria.packed(self.criterion, network.outputs)


@dataclass(frozen=True)
class Epoch:
    """Mean losses of one epoch."""

    number: int
    """The epoch's number from 1. 0 is the start, before training."""
    training_loss: float | None
    """Mean loss of the training batches; None at the start."""
    held_out_loss: float
    """Mean loss of the held-out images after the epoch."""
    seconds: float
    """How long the epoch took."""


@dataclass(frozen=True)
class FineTuned:
    """The deployed network of the epoch that was best on the held-out images."""

    network: Network
    """The network with its trained float parameters."""
    layers: dict[int, QuantizedLayer]
    """The quantized layers by number."""
    epochs: tuple[Epoch, ...]
    """The start and every epoch, in order."""
    best_epoch: int
    """The number of the best epoch. 0 if no epoch was better than the start."""


def finetune(
    network: Network,
    layers: Layers,
    reference: Network,
    training_set: ImageSlice,
    held_out: ImageSlice,
    training: Training | None = None,
    progress: Callable[[int, int], None] = lambda batches, total: None,
    report: Callable[[Epoch], None] = lambda epoch: None,
) -> FineTuned:
    """Trains quantized layers against the float network. The arguments are not changed.

    Args:
        network: The deployed network, as `Prepared.deployed` returns it.
        layers: Its quantized layers by number.
        reference: The float network.
        training_set: Images to train on.
        held_out: Images that choose the epoch.
        training: How to train; by default `Training()`.
        progress: Called with (batches so far, all batches) after every batch.
        report: Called after every epoch, and before the first.

    Returns:
        The best epoch's network. Its loss on `held_out` is never above the start's.

    Raises:
        NetworkError: A layer has no grid.
        DataError: There are too few images, or their labels are absent or too large.
        MeasurementError: The loss is no longer finite.
    """
    training = training or Training()
    _check(network, layers, training_set, held_out, training)
    pupil = Pupil(network, layers)
    best: tuple[Network, dict[int, QuantizedLayer]] = pupil.network, dict(layers)
    begin = time.perf_counter()
    lowest = held_out_loss(*best, reference, held_out, training)
    epochs = [Epoch(0, None, lowest, time.perf_counter() - begin)]
    report(epochs[0])
    best_epoch, course = 0, _Course(pupil, training_set, reference, training)
    for number in range(1, training.epochs + 1):
        begin = time.perf_counter()
        training_loss = course.epoch(number, progress)
        deployed = pupil.deployed()
        loss = held_out_loss(*deployed, reference, held_out, training)
        epochs.append(Epoch(number, training_loss, loss, time.perf_counter() - begin))
        report(epochs[-1])
        if loss < lowest:
            lowest, best, best_epoch = loss, deployed, number
        elif number - best_epoch >= training.patience:
            break
    return FineTuned(*best, tuple(epochs), best_epoch)


def held_out_loss(network: Network, layers: Layers, reference: Network, images: ImageSlice, training: Training) -> float:
    """Mean of the training's criterion over a slice, of the deployed network."""
    total = 0.0
    folded, replaced = network.folded_with(layers)
    for start in range(0, len(images), HELD_OUT_BATCH):
        batch = images.load(start, min(start + HELD_OUT_BATCH, len(images)))
        x, labels = _on_device(batch, network)
        floats = reference.logits(x)
        _check_labels(batch[1], floats, training.objective(network))
        loss = training.objective(network).of(floats, labels)
        total += float(loss(folded.logits(x, replaced)).sum())
    return total / len(images)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (n, C, H, W), each shifted by up to a fourteenth of its sides, and half of them mirrored.

    Edge pixels fill the empty part of a shifted image.
    """
    n, _, height, width = images.shape
    down, right = -(-height // 14), -(-width // 14)
    padded = F.pad(images, (right, right, down, down), mode="replicate")
    rows = torch.arange(height) + torch.randint(0, 2 * down + 1, (n, 1), generator=generator)
    columns = torch.arange(width) + torch.randint(0, 2 * right + 1, (n, 1), generator=generator)
    columns = torch.where(torch.rand(n, 1, generator=generator) < 0.5, columns.flip(1), columns)
    image = torch.arange(n)[:, None, None]
    return padded[image, :, rows[:, :, None], columns[:, None, :]].movedim(3, 1).contiguous()


class _Course:
    """The steps of a training, epoch by epoch."""

    def __init__(self, pupil: Pupil, images: ImageSlice, reference: Network, training: Training) -> None:
        self.pupil, self.images, self.reference, self.training = pupil, images, reference, training
        self.objective = training.objective(pupil.network)
        self.generator = torch.Generator().manual_seed(training.seed)
        self.batch_images = min(training.batch_images, len(images))
        self.per_epoch = len(images) // self.batch_images
        self.steps = training.epochs * self.per_epoch
        self.descent = Descent(pupil, pupil.layers, pupil.others, training.rates, self.steps)

    def epoch(self, number: int, progress: Callable[[int, int], None]) -> float:
        """Trains one epoch and returns the mean loss of its batches."""
        total = 0.0
        order = torch.randperm(len(self.images), generator=self.generator)
        for k, numbers in enumerate(torch.split(order, self.batch_images)[: self.per_epoch]):
            images, labels = PickedSlice([self.images], numbers.tolist()).load(0, self.batch_images)
            if self._augments(labels):
                images = augmented(images, self.generator)
            loss = self._loss(images, labels)
            if not math.isfinite(loss.item()):
                raise MeasurementError(
                    f"the loss of batch {k + 1} of epoch {number} is {loss.item()}; training diverged; lower the learning rate"
                )
            self.descent.step(loss)
            total += loss.item()
            progress((number - 1) * self.per_epoch + k + 1, self.steps)
        return total / self.per_epoch

    def _augments(self, labels: Tensor | None) -> bool:
        """Whether images are shifted and mirrored. They are not if targets, such as masks, would no longer fit."""
        return self.training.augment and (labels is None or "classes" in self.objective.offers)

    def _loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Mean criterion of a batch, with gradients."""
        x, device_labels = _on_device((images, labels), self.pupil.network)
        network, layers = self.pupil.training(self.pupil.layers, self.pupil.others)
        # cloned: autograd cannot save a tensor of inference mode for the backward pass
        floats = self.reference.logits(x).clone() if self.objective.needs_float_outputs else x.new_zeros(())
        logits = network.differentiable_logits(x, layers)
        _check_labels(labels, logits, self.objective)
        return self.objective.of(floats, device_labels)(logits).mean()


def _on_device(batch: tuple[Tensor, Tensor | None], network: Network) -> tuple[Tensor, Tensor | None]:
    images, labels = batch
    return images.to(network.device), None if labels is None else labels.to(network.device)


def _check_labels(labels: Tensor | None, logits: Tensor, objective: criteria.PackedCriterion) -> None:
    """Raises DataError for labels that are not among the network's outputs."""
    if objective.needs_targets and "classes" in objective.offers and labels is not None:
        low, high, classes = int(labels.min()), int(labels.max()), logits.shape[-1]
        if low < 0 or high >= classes:
            raise DataError(f"labels reach from {low} to {high}; expected 0 to {classes - 1}, one for each output of the network")


def _check(network: Network, layers: Layers, training_set: ImageSlice, held_out: ImageSlice, training: Training) -> None:
    if not layers:
        raise ConfigurationError("no layer is quantized; expected an assignment that gives bits to at least one")
    objective = training.objective(network)
    for images, name in ((training_set, "training"), (held_out, "held-out")):
        if len(images) < 2:
            raise DataError(f"there are {len(images)} {name} images; expected two or more")
        if objective.needs_targets and images.load(0, 1)[1] is None:
            raise DataError(f"{training.criterion} needs labels and the {name} images have none; use the criterion kl_to_float")
