"""The Python path: measure, solve, evaluate in one process, without any orchestrator."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from clado.bits import check_bits
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
from clado.records.results import Accuracy
from clado.space import Assignment, SearchSpace


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
    """Quantizes every layer at every option.

    Args:
        network: The float network.
        space: The layers and their candidates.
        calibration: Data as in `measure`; labels are not needed. 256 images are plenty.
        quantizer: Rounds the weights; by default `WeightQuantizer()`.
        corrections: Names of `clado.quantization.corrections`.
        activation_range: How the range of an input is fitted, if the space has activation widths.
        seed: Seed of the corrections that draw random numbers.
        adaround_steps: Steps of the correction `adaround`.

    Returns:
        The quantized layers, with the grids of their inputs if the space has activation widths.

    Raises:
        DataError: Images are needed, and there are none or too few.
        ConfigurationError: A correction is unknown.
    """
    recipe = Recipe(quantizer or WeightQuantizer(), activation_range, tuple(corrections), seed, adaround_steps)
    batches: list[Tensor] = []
    if calibration is not None:
        images = _image_slice(network, calibration)
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
    """The interaction matrix of a network.

    Args:
        network: The float network.
        space: The layers and their candidates.
        data: A batch of images (N, C, H, W), a pair (images, labels), or an iterable of either.
        estimator: A name of `clado.interaction.estimators`.
        criterion: A name of `clado.criteria`. `kl_to_float` needs no labels, `cross_entropy` does.
        quantizer: Rounds the weights, if there is no `prepared`.
        prepared: Layers with corrections and activations; see `prepare`.
        num_blocks: Number of sample blocks.
        batch_images: Images of one forward pass; by default as many as are fast.
        memory_limit_mb: Limit on the memory of stored prefixes and one forward pass, in megabytes.
        progress: It is called with (tiles that are measured, all tiles) after every tile.

    Raises:
        DataError: The images do not fit.
        ConfigurationError: The memory limit is too small, or `prepared` is of another network or
            space.
        MeasurementError: A layer has no finite loss.
    """
    images = _image_slice(network, data)
    block_ranges = sample_blocks(len(images), min(num_blocks, len(images)))
    memory_limit = None if memory_limit_mb is None else memory_limit_mb * 10**6
    prepared_layers = _check_prepared(network, space, prepared, quantizer) or prepare(network, space, quantizer=quantizer)
    bench = Workbench(prepared_layers, criterion, block_ranges, images.load, batch_images, memory_limit)
    plan = Plan(
        space, block_ranges, estimators.kinds_of([estimator]), rows_per_tile(network, space, bench.batching, memory_limit)
    )
    tiles: dict[str, list[NDArray[np.float64]]] = {kind: [] for kind in plan.kinds}
    for done, tile in enumerate(plan.tiles):  # block by block, and row tile by row tile in a block
        tiles[tile.kind].append(measure_tile(bench, tile))
        progress(done + 1, len(plan.tiles))
    counts = np.array([stop - start for start, stop in block_ranges])
    sums = {kind: np.concatenate(parts).reshape(len(block_ranges), -1, *parts[0].shape[1:]) for kind, parts in tiles.items()}
    return estimators.estimate(estimator, Measured(space, criterion, counts, sums))


def solve(
    matrix: InteractionMatrix,
    average_bits: float | None = None,
    size_bytes: int | None = None,
    *,
    solver: str = "scip",
    time_limit: float = 60.0,
) -> Solution:
    """The assignment of least predicted loss within all budgets.

    Other limits (BOPs, latency) are in `clado.choosing.constraints`.
    `clado.choosing.proposals.program_of` makes a program with them.

    Args:
        matrix: The interaction matrix.
        average_bits: Largest average of bits per searched weight.
        size_bytes: Largest size of the searched weights in bytes, each tensor packed.
        solver: A name of `clado.choosing.solvers`. `scip` proves that the answer is optimal, or
            gives the gap that is left.
        time_limit: Seconds that the solver may take.

    Raises:
        InfeasibleError: No assignment keeps the budgets. The message has the reachable range.
        ConfigurationError: The solver is unknown.
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
    """Top-1, top-5 and loss of an assignment. A layer without bits stays in float.

    Args:
        network: The float network.
        assignment: A bit-width for each layer.
        data: Data as in `measure`. With labels the loss is cross entropy, without labels KL.
        quantizer: Rounds the weights, if there is no `prepared`.
        prepared: With it, the deployed network is evaluated, with all final corrections.

    Raises:
        DataError: Images or labels do not fit.
        NetworkError: The assignment is of another network.
        ConfigurationError: The assignment has activation bits, and there is no `prepared`.
    """
    network.check_assignment(assignment)
    _check_prepared(network, None, prepared, quantizer)
    images = _image_slice(network, data)
    if prepared is not None:
        return count(*prepared.deployed(assignment), images, 0, len(images), reference=network).accuracy()
    if assignment.activation_bits:
        raise ConfigurationError("the assignment has activation bits; expected prepared=clado.prepare(...), with their grids")
    for bits in {bits for bits in assignment.bits if bits is not None}:
        check_bits((bits,), "the assignment")
    weight_quantizer = quantizer or WeightQuantizer()
    weights = {
        i: weight_quantizer.fake_quantize(network.weights[i], bits, network.layers[i].channel_axis)
        for i, bits in enumerate(assignment.bits)
        if bits is not None
    }
    return evaluate_weights(network, weights, images)


def _check_prepared(
    network: Network, space: SearchSpace | None, prepared: Prepared | None, quantizer: WeightQuantizer | None
) -> Prepared | None:
    """`prepared` itself.

    Raises ConfigurationError if it is of another network or space, or if there is also a quantizer.
    """
    if prepared is None:
        return None
    if prepared.network.model is not network.model:
        raise ConfigurationError("prepared is of another network; expected clado.prepare(network, ...) with this network")
    if space is not None and prepared.space != space:
        raise ConfigurationError("prepared is of another space; expected clado.prepare(network, space, ...) with this space")
    if quantizer is not None:
        raise ConfigurationError("prepared has its quantizer; expected clado.prepare(..., quantizer=...) instead of another here")
    return prepared


def _image_slice(network: Network, data: Any) -> ImageSlice:
    """The data as a slice that fits the network. Raises DataError if shapes or labels do not."""
    images = as_slice(data, image_shape=network.image_shape)
    check_slice(images, network.image_shape, int(network.logits(network.example).shape[1]))
    return images
