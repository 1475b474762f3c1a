"""Reconstruction: fits a deployed network to the float network, without labels.

It is fitted block by block, then as a whole, on calibration images.

Corrections act on one layer at a time. A reconstruction trains the layers of a block together, such
as those of a residual block or of an encoder layer. The target is the output of the float block (Li
et al. 2021, BRECQ, arXiv 2102.05426). Codes, scales, biases, scales of inputs and the affine
parameters of normalisations are trained: see `pupil.py`. Searched layers that stay in float are not
changed. The loss is the squared error divided by the variance of the float output. A block reads
the output of the deployed blocks before it. With probability one half, an element of this input is
replaced by that of the float network (Wei et al. 2022, QDrop, arXiv 2203.05740). After the blocks,
the whole network is trained towards the float network's outputs.

A fifth of the images is held out. These images pick the best state of a block and of the network.
If no state is better than the start, the start is kept. The deployed network gets no new operation.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from clado import criteria
from clado.errors import ConfigurationError, DataError
from clado.grids import QuantizedLayer
from clado.network.graph import Graph
from clado.network.network import Network, computing
from clado.network.segments import Segment, segments
from clado.quantization.pupil import Descent, Layers, Pupil, Rates

HELD_OUT = 0.2  # share of the images
LEAST_IMAGES = 10
FLOAT_INPUTS = 0.5  # share of the elements of a block's input
BLOCK_RATES, NETWORK_RATES = Rates(0.01, 1e-3, 1e-3), Rates(0.005, 5e-4, 5e-4)
SETTLED = 0.2  # least distance from a latent position to another code before the whole network is trained, in steps
CHECKS = 4  # evaluations of the held-out images, for each block and for the whole network
PASS_IMAGES = 64  # images of a forward pass without training
ERRORS = "errors"  # name of the errors of finished blocks, among the kept tensors


@dataclass(frozen=True)
class Effort:
    """How long a network is reconstructed."""

    proposals: int
    """How many answers of a budget are reconstructed, at most."""
    block_steps: int
    """Training steps of each block."""
    network_steps: int
    """Training steps of the whole network, after the blocks."""
    batch_images: int = 32
    """Images of a step."""

    @property
    def trained_images(self) -> int:
        """Images that pass forwards and backwards through the network. All blocks together count as one network."""
        return self.batch_images * (self.block_steps + self.network_steps)


EFFORTS = {"balanced": Effort(1, 300, 100), "best": Effort(2, 800, 200)}
"""Efforts by the names in settings and assignments."""


@dataclass(frozen=True)
class Reconstructed:
    """A reconstructed network. On the held-out images it is never worse than the start."""

    network: Network
    """The network with its trained float parameters."""
    layers: dict[int, QuantizedLayer]
    """The quantized layers by number."""
    start_loss: float
    """Mean KL divergence from the float network on the held-out images, at the start."""
    blocks_loss: float
    """The same after the training of blocks."""
    loss: float
    """The same for this network."""
    errors: tuple[tuple[float, float], ...]
    """Error of each trained block on the held-out images, before and after, as a share of the float output's variance."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the result, for the user."""
        whole = f"held-out loss {self.start_loss:.5f} before, {self.blocks_loss:.5f} after the blocks, {self.loss:.5f} at the end"
        return (whole, *(f"block {k}: error {old:.5f} before, {new:.5f} after" for k, (old, new) in enumerate(self.errors)))


def reconstruct(
    starts: Sequence[tuple[Network, Layers]],
    reference: Network,
    images: Tensor,
    blocks: Sequence[Sequence[int]],
    effort: Effort,
    seed: int = 0,
    *,
    memory_limit: int | None = None,
    kept: Mapping[str, Tensor] | None = None,
    keep: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reconstructed:
    """Fits a deployed network to the float network. The arguments are not changed.

    Args:
        starts: The deployed network and its layers, in one or more variants. The best on the held-out images is the start.
        reference: The float network, with the weights that the layers were quantized from.
        images: Calibration images (n, C, H, W). A seeded fifth is held out.
        blocks: Blocks of layers, by index. The graph decides where a block begins and ends, and may join some.
        effort: The numbers of steps.
        seed: Seed of the split, of the order of images and of the mixed inputs.
        memory_limit: Most bytes of a block's inputs and outputs that are kept. Larger ones are computed again in each step.
        kept: The tensors that an earlier call gave to `keep`. The result is the same as without the interruption.
        keep: Called after every block with all trained tensors, by name.
        progress: Called with (steps so far, all steps).

    Raises:
        DataError: There are too few images.
        ConfigurationError: No layer is quantized.
        NetworkError: A layer has no grid.
    """
    if len(images) < LEAST_IMAGES:
        raise DataError(f"there are {len(images)} calibration images for the reconstruction; expected {LEAST_IMAGES} or more")
    if not all(layers for _, layers in starts):
        raise ConfigurationError("no layer is quantized; expected an assignment that gives bits to at least one")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(images.device)
    num_held_out = max(2, int(HELD_OUT * len(images)))
    training_set, held_out = images[order[num_held_out:]], images[order[:num_held_out]]
    judge = _Judge(reference, held_out)
    losses = [_ordered(judge.loss(*start)) for start in starts]
    start_loss = min(losses)
    network, layers = starts[losses.index(start_loss)]
    in_float = [place for i, place in enumerate(network.places) if i not in layers]
    unchanged = {name for place in in_float for name in (place.parameter, place.bias_name) if name is not None}
    pupil, floats = Pupil(network.differentiable(), layers, unchanged), reference.differentiable()
    places = segments(floats.engine, blocks, images[:2]) if isinstance(floats.engine, Graph) else ()
    course = _Course(pupil, floats, effort, seed, progress, len(places) * effort.block_steps + effort.network_steps)
    errors = course.blocks(places, training_set, held_out, memory_limit, dict(kept or {}), keep)
    blocks_loss = _ordered(judge.loss(*pupil.deployed()))
    loss, state = course.whole(training_set, judge, blocks_loss)
    if not loss < start_loss:
        return Reconstructed(network, dict(layers), start_loss, blocks_loss, start_loss, tuple(errors))
    pupil.put(state)
    trained, trained_layers = pupil.deployed()
    return Reconstructed(network.updated(trained.changed), trained_layers, start_loss, blocks_loss, loss, tuple(errors))


class _Judge:
    """The KL divergence from the float network on some images."""

    def __init__(self, reference: Network, images: Tensor) -> None:
        self.images, self.criterion = images, criteria.packed("kl_to_float", reference.outputs)
        self.floats = [reference.logits(batch).clone() for batch in torch.split(images, PASS_IMAGES)]

    def loss(self, network: Network, layers: Layers) -> float:
        """The mean divergence of a deployed network."""
        folded, replaced = network.folded_with(layers)
        batches = zip(torch.split(self.images, PASS_IMAGES), self.floats, strict=True)
        return float(sum(self.criterion.of(z, None)(folded.logits(x, replaced)).sum() for x, z in batches)) / len(self.images)


@dataclass(frozen=True)
class _Values:
    """The values of images at a place of a graph. They are kept, or computed again from those of an earlier place."""

    kept: Tensor
    """Values (n, ...) of all images, at an earlier place or at this one."""
    path: tuple[tuple[Graph, Segment, Layers], ...] = ()
    """The segments from there to this place."""

    def at(self, numbers: Tensor | slice) -> Tensor:
        """The values of some images."""
        x = self.kept[numbers]
        for graph, segment, layers in self.path:
            x = segment.run(graph, x, layers)
        return x

    def behind(self, graph: Graph, segment: Segment, layers: Layers, limit: int | None) -> "_Values":
        """The values after a segment. They are kept if they take no more bytes than the limit."""
        values = _Values(self.kept, (*self.path, (graph, segment, layers)))
        batches = [slice(k, k + PASS_IMAGES) for k in range(0, len(self.kept), PASS_IMAGES)]
        first = values.at(batches[0])
        if limit is not None and first.nbytes * len(batches) > limit:
            return values
        return _Values(torch.cat([first, *(values.at(batch) for batch in batches[1:])]))


@dataclass(frozen=True)
class _Sample:
    """The values of images at a place, in the float network and in the deployed one."""

    floats: _Values
    """The values in the float network."""
    deployed: _Values
    """The values in the deployed network."""

    @classmethod
    def of(cls, images: Tensor) -> "_Sample":
        """Images at the first segment."""
        return cls(_Values(images), _Values(images))


class _Course:
    """The training of a pupil: blocks, then the whole network."""

    def __init__(
        self, pupil: Pupil, floats: Network, effort: Effort, seed: int, progress: Callable[[int, int], None], steps: int
    ) -> None:
        self.pupil, self.floats, self.effort, self.seed = pupil, floats, effort, seed
        self.progress, self.steps, self.done = progress, steps, 0

    @property
    def graph(self) -> Graph:
        """The graph of the float network."""
        assert isinstance(self.floats.engine, Graph)
        return self.floats.engine

    def blocks(
        self,
        places: Sequence[Segment],
        training_set: Tensor,
        held_out: Tensor,
        memory_limit: int | None,
        kept: dict[str, Tensor],
        keep: Callable[[dict[str, Tensor]], None],
    ) -> list[tuple[float, float]]:
        """Trains one block after the other. Returns the error of each on the held-out images, before and after."""
        errors = [(first, last) for first, last in kept.pop(ERRORS, torch.zeros(0, 2)).tolist()]
        self.pupil.put(kept)
        self.done = len(errors) * self.effort.block_steps
        limit = (
            None if memory_limit is None else memory_limit // 4
        )  # a quarter each: inputs and outputs, of the float and the deployed network
        samples = [_Sample.of(training_set), _Sample.of(held_out)]
        # a parameter that two segments read is trained in the first, so that later blocks do not change the inputs of the second
        unread = set(self.pupil.others)
        for k, segment in enumerate(places):
            with torch.no_grad(), self._computing():
                targets = [sample.floats.behind(self.graph, segment, {}, limit) for sample in samples]
            names = sorted(segment.reads(self.graph) & unread)
            unread -= set(names)
            if k >= len(errors):
                errors.append(self._block(k, segment, names, samples, targets))
                keep({**self._state(self.pupil.layers, self.pupil.others), ERRORS: torch.tensor(errors, dtype=torch.float64)})
            with torch.no_grad(), self._computing():
                graph, layers = self._deployed(segment)
                samples = [
                    _Sample(target, sample.deployed.behind(graph, segment, layers, limit))
                    for sample, target in zip(samples, targets, strict=True)
                ]
        return errors

    def _block(
        self, k: int, segment: Segment, names: Sequence[str], samples: Sequence[_Sample], targets: Sequence[_Values]
    ) -> tuple[float, float]:
        """Trains one block with the named float parameters. A block of layers in float is not trained."""
        layers = [i for i in segment.layers if i in self.pupil.layers]
        unit = _variance(targets[1])
        first = lowest = self._error(segment, samples[1], targets[1], unit)
        if not layers:
            self._advance(self.effort.block_steps)
            return first, lowest
        generator, descent = self._generator(k), Descent(self.pupil, layers, names, BLOCK_RATES, self.effort.block_steps)
        best = self._state(layers, names)
        for step, numbers in enumerate(self._batches(len(samples[0].floats.kept), self.effort.block_steps, generator)):
            with self._computing():
                with torch.no_grad():
                    x, target = samples[0].deployed.at(numbers), targets[0].at(numbers)
                    drawn = torch.rand(x.shape, generator=generator).to(x.device) < FLOAT_INPUTS
                    x = torch.where(drawn, samples[0].floats.at(numbers), x)
                network, replaced = self.pupil.training(layers, names)
                error = (segment.run(_graph(network), x, replaced) - target).square().mean() / unit
            if not math.isfinite(error.item()):
                break
            descent.step(error)
            self._advance()
            if _is_check(step, self.effort.block_steps):
                error_now = self._error(segment, samples[1], targets[1], unit)
                if error_now < lowest:
                    lowest, best = error_now, self._state(layers, names)
        self.pupil.put(best)
        return first, lowest

    def whole(self, training_set: Tensor, judge: _Judge, lowest: float) -> tuple[float, dict[str, Tensor]]:
        """Trains the whole network towards the float network's outputs. Returns the least held-out loss, and its tensors."""
        layers, names, steps = self.pupil.layers, self.pupil.others, self.effort.network_steps
        best = self._state(layers, names)
        floats = torch.cat([self.floats.logits(batch).clone() for batch in torch.split(training_set, PASS_IMAGES)])
        self.pupil.settle(SETTLED)
        descent = Descent(self.pupil, layers, names, NETWORK_RATES, steps)
        for step, numbers in enumerate(self._batches(len(training_set), steps, self._generator(-1))):
            network, replaced = self.pupil.training(layers, names)
            logits = network.differentiable_logits(training_set[numbers], replaced)
            loss = judge.criterion.of(floats[numbers], None)(logits).mean()
            if not math.isfinite(loss.item()):
                break
            descent.step(loss)
            self._advance()
            if _is_check(step, steps) and (now := _ordered(judge.loss(*self.pupil.deployed()))) < lowest:
                lowest, best = now, self._state(layers, names)
        return lowest, best

    def _deployed(self, segment: Segment) -> tuple[Graph, dict[int, QuantizedLayer]]:
        """The graph and a segment's layers in their present state."""
        network, layers = self.pupil.deployed([i for i in segment.layers if i in self.pupil.layers])
        return _graph(network), layers

    @torch.no_grad()
    def _error(self, segment: Segment, sample: _Sample, target: _Values, unit: float) -> float:
        """Squared error of a segment in its present state."""
        (graph, layers), total, n = self._deployed(segment), 0.0, len(sample.floats.kept)
        with self._computing():
            for k in range(0, n, PASS_IMAGES):
                batch = slice(k, k + PASS_IMAGES)
                error = segment.run(graph, sample.deployed.at(batch), layers) - target.at(batch)
                total += float(error.square().mean()) * len(error)
        return _ordered(total / n / unit)

    def _batches(self, num_images: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Numbers of the images of each step: one random order after another."""
        size = min(self.effort.batch_images, num_images)
        left: tuple[Tensor, ...] = ()
        for _ in range(steps):
            left = left or torch.split(torch.randperm(num_images, generator=generator), size)[: num_images // size]
            numbers, *rest = left
            left = tuple(rest)
            yield numbers.to(self.floats.device)

    def _generator(self, k: int) -> torch.Generator:
        """The random numbers of a block, or of the whole network for -1. They do not depend on earlier blocks."""
        return torch.Generator().manual_seed(1000 * self.seed + 1 + k)

    def _state(self, layers: Sequence[int] | Layers, names: Sequence[str] | Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.pupil.tensors(list(layers), list(names)).items()}

    def _computing(self) -> AbstractContextManager[None]:
        return computing(self.floats.numeric, self.floats.device)

    def _advance(self, steps: int = 1) -> None:
        self.done += steps
        self.progress(self.done, self.steps)


def _graph(network: Network) -> Graph:
    assert isinstance(network.engine, Graph)
    return network.engine


def _variance(target: _Values) -> float:
    """Mean variance of the values (n, ...) between images, per element. 1 if they do not vary."""
    n = len(target.kept)
    total, squares = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for k in range(0, n, PASS_IMAGES):
            batch = target.at(slice(k, k + PASS_IMAGES)).cpu().double()
            total, squares = total + batch.sum(0), squares + batch.square().sum(0)
    variance = float((squares / n - (total / n).square()).mean())
    return variance if variance > 0 else 1.0


def _is_check(step: int, steps: int) -> bool:
    """Whether the held-out images are evaluated after a step. The last step is such a step. Others are at equal distances."""
    return (step + 1) % -(-steps // CHECKS) == 0 or step + 1 == steps


def _ordered(value: float) -> float:
    """The value. NaN becomes infinity, so that it is never the least."""
    return value if math.isfinite(value) else math.inf
