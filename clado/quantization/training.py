"""Fine-tuning: a few epochs of straight-through training that start at the corrected, quantized weights and stay on their grids.

A latent float weight w is trained, and its grid's value ŵ = (clip(round(w / s + z)) − z) · s is what runs; backwards, rounding
counts as the identity and clipping as what it is (Bengio et al. 2013, arXiv 1308.3432). With `learned_scales` the scales s are
trained too, as in LSQ (Esser et al. 2020, arXiv 1902.08153), whose gradient follows from the same formula. Biases, batch norm's
affine parameters and layers that stay in float are trained beside them; grids of inputs keep their range.

Batch norm keeps the statistics that the network starts with, as it runs once deployed. Statistics of training batches, and their
pooling afterwards, add the noise of few images: at 4 bits no epoch was then better than the start (notebooks/LOG.md).
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from clado import criteria
from clado.data.images import ImageSlice, PickedSlice
from clado.errors import ConfigurationError, DataError, MeasurementError, NetworkError
from clado.grids import Grid, QuantizedLayer
from clado.network.network import Network

LEAST_SCALE = 1e-2  # of its first value: how small a learned scale may become
Layers = Mapping[int, QuantizedLayer]


@dataclass(frozen=True)
class Training:
    """How a network is fine-tuned.

    `criterion`: kl_to_float distils from the float network and needs no labels; cross_entropy needs them. `learning_rate` is
    Adam's at first; it falls to zero with a cosine. `patience` is after how many epochs without a lower held-out loss it ends.
    `augment` shifts each image by up to a fourteenth of its side and mirrors every other, at random.
    """

    epochs: int = 4
    criterion: str = "kl_to_float"
    learning_rate: float = 1e-3
    batch_images: int = 64
    patience: int = 2
    learned_scales: bool = False
    augment: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 0), ("batch_images", 2), ("patience", 1)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name} is {getattr(self, name)}; expected {least} or more")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigurationError(f"learning_rate is {self.learning_rate}; expected a number above 0, such as 0.001")
        criteria.criterion_of(self.criterion)  # refuses an unknown name

    @property
    def objective(self) -> criteria.Criterion:
        """The criterion that training minimises."""
        return criteria.criterion_of(self.criterion)


@dataclass(frozen=True)
class Epoch:
    """Mean losses after so many epochs (0: before training; its `training_loss` is None), and the seconds the epoch took."""

    number: int
    training_loss: float | None
    held_out_loss: float
    seconds: float


@dataclass(frozen=True)
class FineTuned:
    """The network and its layers as they ship, of the epoch that was best on the held-out images, which may be none."""

    network: Network
    layers: dict[int, QuantizedLayer]
    epochs: tuple[Epoch, ...]
    best_epoch: int


def finetune(
    network: Network,
    layers: Layers,
    reference: Network,
    training_set: ImageSlice,
    held_out: ImageSlice,
    training: Training | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    told: Callable[[Epoch], None] = lambda epoch: None,
) -> FineTuned:
    """Trains `layers` (by index, as `Prepared.deployed` gives them with `network`) against the float network `reference`.

    The result's loss on `held_out` is never above the start's; nothing given is changed. `progress(batches, of)` is called after
    every batch, `told` after every epoch. NetworkError for a layer without a grid, DataError for images that are too few or whose
    labels are none or too large, MeasurementError where the loss is no longer finite.
    """
    training = training or Training()
    _check(network, layers, training_set, held_out, training)
    # made under inference mode, as corrections are, a tensor could not be trained with
    network = network.updated({name: value.clone() for name, value in network.changed.items()})
    pupil = _Pupil(network, layers, training)
    best: tuple[Network, dict[int, QuantizedLayer]] = network, dict(layers)
    begin = time.perf_counter()
    lowest = held_out_loss(*best, reference, held_out, training)
    epochs = [Epoch(0, None, lowest, time.perf_counter() - begin)]
    told(epochs[0])
    best_epoch, generator = 0, torch.Generator().manual_seed(training.seed)
    batch_images = min(training.batch_images, len(training_set))
    per_epoch = len(training_set) // batch_images
    steps = training.epochs * per_epoch
    optimiser = torch.optim.Adam(pupil.groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 0.5 + 0.5 * math.cos(math.pi * step / max(1, steps)))
    for number in range(1, training.epochs + 1):
        begin, total = time.perf_counter(), 0.0
        order = torch.randperm(len(training_set), generator=generator)
        for k, chosen in enumerate(torch.split(order, batch_images)[:per_epoch]):
            images, labels = PickedSlice([training_set], chosen.tolist()).load(0, batch_images)
            images = augmented(images, generator) if training.augment else images
            loss = pupil.loss(images, labels, reference)
            if not math.isfinite(loss.item()):
                raise MeasurementError(
                    f"the loss of batch {k + 1} of epoch {number} is {loss.item()}; training diverged: lower the learning rate"
                )
            pupil.step(loss, optimiser)
            schedule.step()
            total += loss.item()
            progress((number - 1) * per_epoch + k + 1, steps)
        found = pupil.deployed()
        loss_now = held_out_loss(*found, reference, held_out, training)
        epochs.append(Epoch(number, total / per_epoch, loss_now, time.perf_counter() - begin))
        told(epochs[-1])
        if loss_now < lowest:
            lowest, best, best_epoch = loss_now, found, number
        elif number - best_epoch >= training.patience:
            break
    return FineTuned(*best, tuple(epochs), best_epoch)


def held_out_loss(network: Network, layers: Layers, reference: Network, images: ImageSlice, training: Training) -> float:
    """Mean of the training's criterion over a slice, as the network ships."""
    total = 0.0
    folded, replaced = network.folded_with(layers)
    for start in range(0, len(images), 128):
        batch = images.load(start, min(start + 128, len(images)))
        x, labels = _on_device(batch, network)
        floats = reference.logits(x)
        _check_labels(batch[1], floats, training)
        loss = criteria.bind(training.criterion, floats, labels)
        total += float(loss(folded.logits(x, replaced)).sum())
    return total / len(images)


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images (n, C, H, W), each shifted by up to a fourteenth of its sides over its edge pixels, and mirrored or not."""
    n, _, height, width = images.shape
    down, right = -(-height // 14), -(-width // 14)
    padded = F.pad(images, (right, right, down, down), mode="replicate")
    rows = torch.arange(height) + torch.randint(0, 2 * down + 1, (n, 1), generator=generator)
    columns = torch.arange(width) + torch.randint(0, 2 * right + 1, (n, 1), generator=generator)
    columns = torch.where(torch.rand(n, 1, generator=generator) < 0.5, columns.flip(1), columns)
    each = torch.arange(n)[:, None, None]
    return padded[each, :, rows[:, :, None], columns[:, None, :]].movedim(3, 1).contiguous()


class _Pupil:
    """What is trained: latent weights, biases, scales where asked, and the network's other parameters."""

    def __init__(self, network: Network, layers: Layers, training: Training) -> None:
        self.network, self.layers, self.training = network, layers, training
        self.weights = {i: _leaf(layer.weight) for i, layer in layers.items()}
        self.biases = {i: _leaf(layer.bias) for i, layer in layers.items() if layer.bias is not None}
        self.others = {name: _leaf(value) for name, value in network.trainable(layers).items()}
        self.grids = {i: _owned(layer.grid) for i, layer in layers.items() if layer.grid is not None}
        self.scales = {i: _leaf(grid.scale) for i, grid in self.grids.items()} if training.learned_scales else {}
        floats = [*self.weights.values(), *self.biases.values(), *self.others.values()]
        self.trained = [*floats, *self.scales.values()]
        self.groups = [{"params": floats, "lr": training.learning_rate}]
        for i, scale in self.scales.items():  # a step of a scale is a part of the scale itself
            self.groups.append({"params": [scale], "lr": training.learning_rate * float(self.grids[i].scale.mean())})

    def grid(self, i: int) -> Grid:
        """A layer's grid as it is now."""
        return replace(self.grids[i], scale=self.scales[i]) if i in self.scales else self.grids[i]

    def loss(self, images: Tensor, labels: Tensor | None, reference: Network) -> Tensor:
        """Mean criterion of a batch, with gradients."""
        x, known = _on_device((images, labels), self.network)
        running = {
            i: replace(layer, weight=straight_through(self.weights[i], self.grid(i)), bias=self.biases.get(i), grid=None)
            for i, layer in self.layers.items()
        }
        # cloned: what is made under inference mode cannot be saved for the way back
        floats = reference.logits(x).clone() if self.training.objective.needs_float_logits else x.new_zeros(())
        logits = self.network.updated(self.others).differentiable_logits(x, running)
        _check_labels(labels, logits, self.training)
        return criteria.bind(self.training.criterion, floats, known)(logits).mean()

    def step(self, loss: Tensor, optimiser: torch.optim.Optimizer) -> None:
        """One step of everything that is trained; parameters of the module itself get no gradient."""
        for parameter, gradient in zip(self.trained, torch.autograd.grad(loss, self.trained, allow_unused=True), strict=True):
            parameter.grad = gradient
        optimiser.step()
        with torch.no_grad():
            for i, scale in self.scales.items():
                torch.maximum(scale, LEAST_SCALE * self.grids[i].scale, out=scale)

    def deployed(self) -> tuple[Network, dict[int, QuantizedLayer]]:
        """The network and its layers on their grids."""
        layers = {}
        for i, layer in self.layers.items():
            grid = replace(self.grids[i], scale=self.grid(i).scale.detach().clone())
            weight = grid.fake_quantize(self.weights[i].detach().float()).to(layer.weight.dtype)
            bias = self.biases[i].detach().clone() if i in self.biases else None
            layers[i] = replace(layer, weight=weight, bias=bias, grid=grid)
        return self.network.updated({name: value.detach().clone() for name, value in self.others.items()}), layers


def straight_through(weight: Tensor, grid: Grid) -> Tensor:
    """The weight on its grid; backwards rounding is the identity, and only a learned scale hears of weights beyond the range."""
    position = weight.float() / grid.scale + grid.zero_point
    inside = position.clamp(grid.codes.low, grid.codes.high)
    codes = inside + (grid.quantize(weight.float()) - inside).detach()
    return grid.dequantize(codes).to(weight.dtype)


def _owned(grid: Grid) -> Grid:
    return Grid(grid.scale.clone(), grid.zero_point.clone(), grid.codes)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


def _on_device(batch: tuple[Tensor, Tensor | None], network: Network) -> tuple[Tensor, Tensor | None]:
    images, labels = batch
    return images.to(network.device), None if labels is None else labels.to(network.device)


def _check_labels(labels: Tensor | None, logits: Tensor, training: Training) -> None:
    """Raises DataError for labels beyond the network's outputs."""
    if training.objective.needs_labels and labels is not None:
        low, high, classes = int(labels.min()), int(labels.max()), logits.shape[-1]
        if low < 0 or high >= classes:
            raise DataError(f"labels reach from {low} to {high}; expected 0 to {classes - 1}, one for each output of the network")


def _check(network: Network, layers: Layers, training_set: ImageSlice, held_out: ImageSlice, training: Training) -> None:
    if not layers:
        raise ConfigurationError("no layer is quantized; expected an assignment that gives bits to at least one")
    if bare := [network.layers[i].name for i, layer in layers.items() if layer.grid is None]:
        raise NetworkError(f"{', '.join(bare[:8])} have no grid to stay on; expected layers as `Prepared.deployed` gives them")
    for images, name in ((training_set, "training"), (held_out, "held-out")):
        if len(images) < 2:
            raise DataError(f"there are {len(images)} {name} images; expected two or more")
        if training.objective.needs_labels and images.load(0, 1)[1] is None:
            raise DataError(f"{training.criterion} needs labels and the {name} images have none; use the criterion kl_to_float")
