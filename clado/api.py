"""The Python path: measure, solve, evaluate in one process, without any orchestrator."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from clado.choosing import constraints, solvers
from clado.choosing.program import Solution
from clado.choosing.proposals import program_of
from clado.data.images import ImageSlice, as_slice, check_slice
from clado.errors import ConfigurationError
from clado.evaluation import count, evaluate_weights
from clado.interaction import estimators
from clado.interaction.estimators import Measured
from clado.interaction.matrix import InteractionMatrix
from clado.measuring.measurements import measure_tile
from clado.measuring.plan import Plan, sample_blocks
from clado.measuring.workbench import Workbench, rows_per_tile
from clado.network.network import Network
from clado.quantization import preparation
from clado.quantization.preparation import Prepared, Recipe, calibration_batches
from clado.quantization.quantizers import WeightQuantizer
from clado.records import Accuracy
from clado.space import Assignment, SearchSpace, check_bits


def prepare(
    network: Network,
    space: SearchSpace,
    calibration: Any = None,
    *,
    quantizer: WeightQuantizer | None = None,
    corrections: Sequence[str] = (),
    activation_range: str = "mse",
    seed: int = 0,
    adaround_steps: int = 1000,
) -> Prepared:
    """Every layer at every candidate, with the named corrections (`clado.quantization.corrections`) and, where the space has
    activation widths, the grids of its input. `calibration` is data as in `measure`, without need of labels; 256 images are
    plenty.

    Raises DataError where images are needed and there are none, or too few; ConfigurationError for an unknown correction.
    """
    recipe = Recipe(quantizer or WeightQuantizer(), activation_range, tuple(corrections), seed, adaround_steps)
    batches: list[Tensor] = []
    if calibration is not None:
        images = _checked(network, calibration)
        batches = calibration_batches(images.load(0, len(images))[0], network.images_at_once)
    return preparation.prepare(network, space, recipe, batches)


def measure(
    network: Network,
    space: SearchSpace,
    data: Any,
    estimator: str = "gauss_newton",
    criterion: str = "kl_to_float",
    *,
    quantizer: WeightQuantizer | None = None,
    prepared: Prepared | None = None,
    num_blocks: int = 16,
    batch_images: int | None = None,
    memory_limit_mb: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> InteractionMatrix:
    """The interaction matrix of a network on `data`: a batch of images (N, C, H, W), (images, labels), or an iterable of either.

    `estimator` is a name of `clado.interaction.estimators`, `criterion` of `clado.criteria`: `kl_to_float` needs no labels,
    `cross_entropy` does. `prepared` (see `prepare`) brings corrections and activations; without it weights are rounded to
    nearest by `quantizer`.
    `batch_images` is how many images one run takes (default: as many as are fast), `memory_limit_mb` bounds what stored prefixes
    and a run take together. `progress(done, total)` is called after every tile. Raises DataError for images that do not fit,
    ConfigurationError where the limit is too small or `prepared` is of another network or space, MeasurementError where a layer
    has no finite loss.
    """
    images = _checked(network, data)
    blocks = sample_blocks(len(images), min(num_blocks, len(images)))
    limit = None if memory_limit_mb is None else memory_limit_mb * 10**6
    ready = _matching(network, space, prepared, quantizer) or prepare(network, space, quantizer=quantizer)
    bench = Workbench(ready, criterion, blocks, images.load, batch_images, limit)
    plan = Plan(space, blocks, estimators.kinds_of([estimator]), rows_per_tile(network, space, bench.batching, limit))
    tiles: dict[str, list[NDArray[np.float64]]] = {kind: [] for kind in plan.kinds}
    for done, tile in enumerate(plan.tiles):  # block by block, and row tile by row tile in a block
        tiles[tile.kind].append(measure_tile(bench, tile))
        progress(done + 1, len(plan.tiles))
    counts = np.array([stop - start for start, stop in blocks])
    sums = {kind: np.concatenate(parts).reshape(len(blocks), -1, *parts[0].shape[1:]) for kind, parts in tiles.items()}
    return estimators.estimate(estimator, Measured(space, criterion, counts, sums))


def solve(
    matrix: InteractionMatrix,
    average_bits: float | None = None,
    size_bytes: int | None = None,
    *,
    solver: str = "scip",
    time_limit: float = 60.0,
) -> Solution:
    """The assignment of least predicted loss within every budget that is given.

    `average_bits` is per searched weight, `size_bytes` of the searched weights, each tensor packed. `solver` is a name of
    `clado.choosing.solvers`: `scip` proves optimality, or gives the gap left after `time_limit` seconds. Further limits (BOPs,
    latency) are `clado.choosing.constraints`; `clado.choosing.proposals.program_of` poses a program under them. Raises
    InfeasibleError with the reachable range, ConfigurationError for an unknown solver.
    """
    limits = []
    if average_bits is not None:
        limits.append(constraints.constraint("average_bits", matrix.space, average_bits))
    if size_bytes is not None:
        limits.append(constraints.constraint("size", matrix.space, size_bytes))
    return solvers.solve(program_of(matrix, limits), solver, time_limit=time_limit)


def evaluate(
    network: Network,
    assignment: Assignment,
    data: Any,
    *,
    quantizer: WeightQuantizer | None = None,
    prepared: Prepared | None = None,
) -> Accuracy:
    """Top-1, top-5 and loss of an assignment on `data` (as in `measure`; labels give top-1 and cross entropy, none give KL).

    A layer without bits stays in float. With `prepared` it is the network that ships, final corrections applied; without it
    weights are rounded to nearest by `quantizer`. Raises DataError for images or labels that do not fit, NetworkError for an
    assignment of another network, ConfigurationError for one with activation bits where there is no `prepared`.
    """
    network.check_assignment(assignment)
    _matching(network, None, prepared, quantizer)
    images = _checked(network, data)
    if prepared is not None:
        return count(*prepared.deployed(assignment), images, 0, len(images), reference=network).accuracy()
    if assignment.activation_bits:
        raise ConfigurationError("the assignment has activation bits; expected prepared=clado.prepare(...), with their grids")
    for bits in {bits for bits in assignment.bits if bits is not None}:
        check_bits((bits,), "the assignment")
    chosen = quantizer or WeightQuantizer()
    weights = {
        i: chosen.fake_quantize(network.weights[i], bits, network.layers[i].channel_axis)
        for i, bits in enumerate(assignment.bits)
        if bits is not None
    }
    return evaluate_weights(network, weights, images)


def _matching(
    network: Network, space: SearchSpace | None, prepared: Prepared | None, quantizer: WeightQuantizer | None
) -> Prepared | None:
    """`prepared` as it is; refused where it is of another network or space, or a quantizer stands beside it."""
    if prepared is None:
        return None
    if prepared.network.model is not network.model:
        raise ConfigurationError("prepared is of another network; expected clado.prepare(network, ...) with this network")
    if space is not None and prepared.space != space:
        raise ConfigurationError("prepared is of another space; expected clado.prepare(network, space, ...) with this space")
    if quantizer is not None:
        raise ConfigurationError("prepared has its quantizer; expected clado.prepare(..., quantizer=...) instead of another here")
    return prepared


def _checked(network: Network, data: Any) -> ImageSlice:
    """The data as a slice that fits the network: image shape, and labels within its classes."""
    images = as_slice(data, image_shape=network.image_shape)
    check_slice(images, network.image_shape, int(network.logits(network.example).shape[1]))
    return images
