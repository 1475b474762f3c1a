"""The steps of the method: prepare, measure, solve, evaluate, quantize."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from clado.api.budgets import TableBound, series
from clado.api.budgets import limits as limits_of
from clado.api.checks import (
    check_assignment,
    check_matrix,
    check_network,
    check_prepared,
    check_space,
    checked_criterion,
    image_slice,
)
from clado.api.progress import Progress, showing
from clado.bits import check_bits
from clado.choosing import pareto, solvers
from clado.choosing.constraints import Constraint
from clado.choosing.pareto import Front
from clado.choosing.proposals import program_of
from clado.choosing.solution import Solution
from clado.errors import ConfigurationError
from clado.evaluation import Counts, Judge, Metric, count, evaluation_batches
from clado.exporting._torch_module import as_module
from clado.grids import QuantizedLayer
from clado.interaction import estimators
from clado.interaction.estimators import Measured
from clado.interaction.matrix import InteractionMatrix
from clado.measuring.measurements import measure_tile
from clado.measuring.plan import Plan, sample_blocks
from clado.measuring.workbench import Workbench, on_device, rows_per_tile
from clado.network.network import Network
from clado.quantization import preparation
from clado.quantization.preparation import Prepared, Recipe, calibration_batches
from clado.quantization.quantizers import WeightQuantizer
from clado.records.results import Accuracy
from clado.space import Assignment, SearchSpace

MOST_STEPS = 50
"""Most steps of the progress of an evaluation."""


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
    progress: Progress = False,
) -> Prepared:
    """Quantizes every layer at every option.

    Args:
        network: The float network.
        space: The layers and their candidates.
        calibration: Data as in `measure`; labels are not needed. 256 images are enough.
        quantizer: Rounds the weights; by default `WeightQuantizer()`.
        corrections: Names of `clado.quantization.corrections`.
        activation_range: How the range of an input is fitted, if the space has activation widths.
        seed: Seed of the corrections that draw random numbers.
        adaround_steps: Steps of the correction `adaround`.
        progress: True shows a bar. A callable is called with (prepared layers, all layers).

    Returns:
        The quantized layers, with the grids of their inputs if the space has activation widths.

    Raises:
        DataError: Images are needed, and there are none or too few.
        ConfigurationError: A correction is unknown.
    """
    check_network(network)
    check_space(space)
    recipe = Recipe(quantizer or WeightQuantizer(), activation_range, tuple(corrections), seed, adaround_steps)
    batches: list[Tensor] = []
    if calibration is not None:
        images = image_slice(network, calibration, classes=False)
        batches = calibration_batches(images.load(0, len(images))[0], network.images_at_once)
    with showing(progress, "preparing") as advance:
        return preparation.prepare(network, space, recipe, batches, advance)


def measure(
    network: Network,
    space: SearchSpace,
    data: Any,
    estimator: str = "gauss_newton",
    criterion: Any = "kl_to_float",
    *,
    quantizer: WeightQuantizer | None = None,
    prepared: Prepared | None = None,
    num_blocks: int = 16,
    batch_images: int | None = None,
    memory_limit_mb: int | None = None,
    progress: Progress = False,
) -> InteractionMatrix:
    """The interaction matrix of a network.

    Args:
        network: The float network.
        space: The layers and their candidates.
        data: A batch of images (N, C, H, W), a pair (images, labels), or an iterable of either. For a user-defined criterion,
            labels are targets (N, ...) of any type and shape.
        estimator: A name of `clado.interaction.estimators`.
        criterion: A name of `clado.criteria`. `kl_to_float` needs no labels, `cross_entropy` does. Or a callable
            (outputs, float_outputs, targets) -> loss of each sample (N,), or a `clado.criteria.Criterion`.
        quantizer: Rounds the weights, if there is no `prepared`.
        prepared: Layers with corrections and activations; see `prepare`.
        num_blocks: Number of sample blocks.
        batch_images: Images of one forward pass; by default as many as are fast.
        memory_limit_mb: Limit on the memory of stored prefixes and one forward pass, in megabytes.
        progress: True shows a bar. A callable is called with (measured tiles, all tiles).

    Raises:
        DataError: The images do not fit.
        ConfigurationError: The memory limit is too small, `prepared` belongs to another network or
            space, or the criterion fails or lacks what the estimator needs.
        MeasurementError: A layer has no finite loss.
    """
    return measured(
        network, space, data, [estimator], criterion, quantizer, prepared, num_blocks, batch_images, memory_limit_mb, progress
    )[estimator]


def measured(
    network: Network,
    space: SearchSpace,
    data: Any,
    names: Sequence[str],
    criterion: Any,
    quantizer: WeightQuantizer | None = None,
    prepared: Prepared | None = None,
    num_blocks: int = 16,
    batch_images: int | None = None,
    memory_limit_mb: int | None = None,
    progress: Progress = False,
) -> dict[str, InteractionMatrix]:
    """The matrices of several estimators, from one measurement. Arguments are those of `measure`."""
    check_network(network)
    check_space(space)
    packed = checked_criterion(criterion, names, network)
    images = image_slice(network, data, "classes" in packed.offers)
    x, targets = on_device(network, images.load(0, 1))
    packed.refuse_unfit(network.logits(x), targets)
    block_ranges = sample_blocks(len(images), min(num_blocks, len(images)))
    memory_limit = None if memory_limit_mb is None else memory_limit_mb * 10**6
    layers = check_prepared(network, space, prepared, quantizer) or prepare(network, space, quantizer=quantizer)
    bench = Workbench(layers, criterion, block_ranges, images.load, batch_images, memory_limit)
    plan = Plan(space, block_ranges, estimators.kinds_of(names), rows_per_tile(network, space, bench.batching, memory_limit))
    tiles: dict[str, list[NDArray[np.float64]]] = {kind: [] for kind in plan.kinds}
    with showing(progress, "measuring") as advance:
        for done, tile in enumerate(plan.tiles):  # in the order of blocks, and of row tiles within a block
            tiles[tile.kind].append(measure_tile(bench, tile))
            advance(done + 1, len(plan.tiles))
    counts = np.array([stop - start for start, stop in block_ranges])
    sums = {kind: np.concatenate(parts).reshape(len(block_ranges), -1, *parts[0].shape[1:]) for kind, parts in tiles.items()}
    return {name: estimators.estimate(name, Measured(space, packed.name, counts, sums)) for name in names}


def solve(
    matrix: InteractionMatrix,
    average_bits: float | None = None,
    size_bytes: float | None = None,
    *,
    percent_of_8_bit: float | None = None,
    bops: float | None = None,
    latency: TableBound | None = None,
    table: TableBound | None = None,
    limits: Sequence[Constraint] = (),
    solver: str = "scip",
    time_limit: float = 60.0,
) -> Solution:
    """Finds the assignment with the least predicted loss within all limits.

    Args:
        matrix: The interaction matrix.
        average_bits: Largest average of bits per searched weight.
        size_bytes: Largest size of the searched weights in bytes, each tensor packed.
        percent_of_8_bit: The same in percent of the bytes that 8 bits everywhere would take.
        bops: Most bit operations of one image.
        latency: Most seconds of one image, and a CSV file with the columns layer,bits,seconds.
        table: Largest sum of other costs, and a CSV file with the columns layer,bits,UNIT.
        limits: More constraints, as `clado.choosing.constraints.constraint` makes them.
        solver: A name of `clado.choosing.solvers`. `scip` proves that the answer is optimal, or
            gives the gap that is left.
        time_limit: Seconds that the solver may take.

    Raises:
        InfeasibleError: No assignment keeps the limits. The message gives the reachable range.
        ConfigurationError: There is no limit, a limit is not a number, or the solver is unknown.
    """
    check_matrix(matrix)
    keywords = {
        "average_bits": average_bits,
        "size_bytes": size_bytes,
        "percent_of_8_bit": percent_of_8_bit,
        "bops": bops,
        "latency": latency,
        "table": table,
    }
    return solvers.solve(program_of(matrix, limits_of(matrix.space, keywords, limits)), solver, time_limit=time_limit)


def front(
    matrix: InteractionMatrix,
    *,
    average_bits: Iterable[float] | None = None,
    size_bytes: Iterable[float] | None = None,
    percent_of_8_bit: Iterable[float] | None = None,
    bops: Iterable[float] | None = None,
    solver: str = "scip",
    time_limit: float = 60.0,
) -> Front:
    """Solves for several budgets from one matrix.

    Args:
        matrix: The interaction matrix.
        average_bits: Budgets in average bits per searched weight.
        size_bytes: Budgets in bytes. Give exactly one series of budgets.
        percent_of_8_bit: Budgets in percent of the bytes that 8 bits everywhere would take.
        bops: Budgets in bit operations of one image.
        solver: A name of `clado.choosing.solvers`.
        time_limit: Seconds that the solver may take for each budget.

    Raises:
        InfeasibleError: A budget is out of reach.
        ConfigurationError: There is no series of budgets, or several.
    """
    check_matrix(matrix)
    keywords = {"average_bits": average_bits, "size_bytes": size_bytes, "percent_of_8_bit": percent_of_8_bit, "bops": bops}
    keyword, bounds = series(keywords)
    constraints = {bound: limits_of(matrix.space, {keyword: bound})[0] for bound in sorted(set(bounds))}
    program = program_of(matrix, [next(reversed(constraints.values()))])
    name = program.constraints[0].name
    solve_program = solvers.prepare(program, solver, time_limit=time_limit)
    points = pareto.sweep(program, name, [limit.bound for limit in constraints.values()], solve_program)
    answers = {point.bound: point.solution for point in points}
    reached = {bound: answers[limit.bound] for bound, limit in constraints.items() if limit.bound in answers}
    return Front(keyword, tuple(reached), tuple(reached.values()))


def evaluate(
    network: Network,
    assignment: Assignment,
    data: Any,
    *,
    metric: Metric | str | None = None,
    criterion: Any = None,
    quantizer: WeightQuantizer | None = None,
    prepared: Prepared | None = None,
    progress: Progress = False,
) -> Accuracy:
    """Evaluates an assignment: top-1, top-5, loss, and a metric. A layer without bits stays in float.

    Args:
        network: The float network.
        assignment: A bit-width for each layer.
        data: Data as in `measure`. With labels the loss is cross entropy, without labels KL.
        metric: A callable (outputs, targets) -> a number for each image (N,). Its mean is `metric` of the result.
        criterion: The loss, as in `measure`, for targets that are not classes. Without one, the loss of outputs that are not
            logits is `mse_to_float`.
        quantizer: Rounds the weights, if there is no `prepared`.
        prepared: With it, the deployed network is evaluated, with all final corrections.
        progress: True shows a bar. A callable is called with (counted images, all images).

    Raises:
        DataError: Images or labels do not fit.
        NetworkError: The assignment is of another network.
        ConfigurationError: The assignment has activation bits, and there is no `prepared`. Or the metric or the criterion fails.
    """
    deployed, layers = _deployed(network, assignment, quantizer, prepared)
    judge = Judge.of(network.outputs, criterion, metric)
    images = image_slice(network, data, classes=judge.criterion is None)
    counts, step = Counts(), network.images_at_once
    step *= -(-len(images) // (step * MOST_STEPS))  # whole batches, so that sums do not depend on the steps
    with showing(progress, "evaluating") as advance:
        for start, stop in evaluation_batches(len(images), step):
            counts += count(deployed, layers, images, start, stop, reference=network, judge=judge)
            advance(stop, len(images))
    return counts.accuracy()


def quantize(
    network: Network,
    assignment: Assignment,
    *,
    quantizer: WeightQuantizer | None = None,
    prepared: Prepared | None = None,
) -> nn.Module:
    """The quantized network as a torch module. It computes the network that `evaluate` evaluates.

    The module is a copy in eval mode. Weights are floats on their grids. Grids of inputs are
    buffers. So `to(device)`, `state_dict`, `torch.export` and `torch.onnx.export` work as with the
    float module. `clado.load_packed` reads a file in which a weight takes only its bits.

    Args:
        network: The float network.
        assignment: A bit-width for each layer. A layer without bits stays in float.
        quantizer: Rounds the weights, if there is no `prepared`.
        prepared: Layers with corrections and activations; see `prepare`.

    Raises:
        NetworkError: The assignment is of another network, or a module cannot hold the grid of an
            input or the bias of a correction.
        ConfigurationError: The assignment has activation bits, and there is no `prepared`.
    """
    return as_module(*_deployed(network, assignment, quantizer, prepared))


def _deployed(
    network: Network, assignment: Assignment, quantizer: WeightQuantizer | None, prepared: Prepared | None
) -> tuple[Network, dict[int, QuantizedLayer]]:
    """The deployed network, and its quantized layers by index."""
    check_network(network)
    check_assignment(network, assignment)
    if (ready := check_prepared(network, None, prepared, quantizer)) is not None:
        return ready.deployed(assignment)
    if assignment.activation_bits:
        raise ConfigurationError(
            "the assignment has activation bits; expected prepared=clado.prepare(...), which has the grids of inputs"
        )
    for bits in {bits for bits in assignment.bits if bits is not None}:
        check_bits((bits,), "the assignment")
    weight_quantizer, layers = quantizer or WeightQuantizer(), dict[int, QuantizedLayer]()
    for i, width in enumerate(assignment.bits):
        if width is not None:
            weight = network.weights[i]
            grid = weight_quantizer.grid(weight, width, network.layers[i].channel_axis)
            layers[i] = QuantizedLayer(grid.fake_quantize(weight.detach().float()).to(weight.dtype), grid=grid)
    return network, layers
