"""Smallest: the smallest network whose measured loss increase or top-1 drop keeps a bound, on images reserved for this."""

from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from clado.choosing.constraints import Constraint
from clado.choosing.proposals import Budget, budget_solver, merge_limits, program_of
from clado.choosing.smallest import MeasuredAssignment, Smallest, smallest
from clado.errors import ConfigurationError, DataError, InfeasibleError
from clado.evaluation import judged_per_image, per_image
from clado.network.network import Network, Replaced
from clado.records.interval import Interval
from clado.records.text import markdown_table
from clado.reporting.summary import layers_text
from clado.reporting.tables import loss_text
from clado.run.opened_run import OpenedRun
from clado.space import Assignment
from flows.commands.stored import StoredRun
from flows.progress import progress

FIRST = 8  # budgets of the first front, for each estimator
ROUNDS = 4
FILL = 3  # budgets that fill the gap below an answer, for each estimator and round


def find(stored: StoredRun, run: OpenedRun, bound: float, top1: bool, metric: bool = False) -> Smallest:
    """Measures assignments on the selection set, until the smallest one that keeps the bound is known with its neighbours.

    With `top1` the bound is on the drop of top-1 (a fraction), which needs labels. With `metric` it is on the drop of the run's
    metric. Otherwise it is on the increase of the user-defined criterion if there is one. If not, it is on the increase of cross
    entropy, or without labels on that of the KL divergence from the float network.
    """
    images, space = run.slices.selection, run.space
    if len(images) < 2:
        raise DataError(
            "no images are left over to choose on; lower data.sensitivity_images or data.calibration_images, or set "
            "data.validation_images for a folder without train/ and val/"
        )
    if top1 and (images.load(0, 1)[1] is None or not run.has_classes):
        raise DataError("a bound on top-1 needs logits and labelled images; use --max-loss-increase instead")
    if metric and run.judge.metric is None:
        raise ConfigurationError("the run has no metric; expected metric: package.module:name in its settings")
    interval_of = _own_interval(run, metric) if metric or run.judge.criterion is not None else _interval(run, top1)
    measured = 0

    def measure(assignment: Assignment) -> Interval:
        nonlocal measured
        interval = interval_of(*run.preparation.deployed(assignment))
        measured += 1
        advance(1)
        return interval

    low, high, solve = solver_of(stored)
    most = (FIRST + ROUNDS * FILL) * len(stored.config.estimators)  # fewer if estimators agree
    with progress("measuring", most) as advance:
        front = solve(np.linspace(low, high, FIRST).astype(int).tolist())
        return smallest(
            space,
            front,
            measure,
            lambda a, b: [
                x for x in solve(np.linspace(a, b, FILL + 2)[1:-1].astype(int).tolist()) if a < space.size_bytes(x) < b
            ],
            bound,
            ROUNDS,
        )


def _interval(run: OpenedRun, top1: bool) -> Callable[[Network, Replaced], Interval]:
    """The function that measures the drop of top-1, or the increase of the loss, of a deployed network."""
    images = run.slices.selection
    float_losses, float_hits = per_image(run.float_network, {}, images)

    def interval(network: Network, layers: Replaced) -> Interval:
        losses, hits = per_image(network, layers, images, reference=run.float_network)
        return Interval.of_hits(float_hits, hits) if top1 else Interval.of(losses - float_losses)

    return interval


def _own_interval(run: OpenedRun, metric: bool) -> Callable[[Network, Replaced], Interval]:
    """The function that measures the drop of the metric, or the increase of a user-defined criterion, of a deployed network."""

    def values(network: Network, layers: Replaced) -> NDArray[np.float64]:
        columns = judged_per_image(network, layers, run.slices.selection, run.float_network, run.judge)
        return -columns["metric"] if metric else columns["loss"]

    float_values = values(run.float_network, {})
    return lambda network, layers: Interval.of(values(network, layers) - float_values)


def solver_of(stored: StoredRun) -> tuple[int, int, Callable[[Sequence[int]], list[Assignment]]]:
    """The least reachable size, the largest size that the run allows, and a solver for the sizes between them.

    The solver gives every estimator's optimum at each of some sizes. Programs and convexification are made once.
    """
    space = stored.measured.space
    matrices = stored.matrices.named.values()
    solvers = [budget_solver(matrix, stored.prepare) for matrix in matrices]

    def limits_at(size: int) -> list[Constraint]:
        return merge_limits(Budget("size", size).limit(space), stored.limits)  # the constraint on the size is the first

    def solve(sizes: Sequence[int]) -> list[Assignment]:
        assignments: list[Assignment] = []
        for solver in solvers:
            for size in sizes:
                with suppress(InfeasibleError):  # forbidden pairs or other limits leave no assignment there
                    assignments.append(solver(Budget("size", size), limits_at(size)).assignment)
        return assignments

    largest = limits_at(space.size_bytes(space.widest))
    programs = [program_of(matrix, largest) for matrix in matrices]
    least = min(space.size_bytes(program.assignment(program.narrowest)) for program in programs)
    return least, int(largest[0].bound), solve


def text(result: Smallest, run: OpenedRun, top1: bool, metric: bool = False) -> str:
    """The answer and its neighbours for the terminal."""
    what, scale = ("top-1 drop %", 100.0) if top1 else (f"{run.judge.metric_name} drop" if metric else "loss increase", 1.0)

    def row(name: str, one: MeasuredAssignment) -> list[str]:
        m = one.measured
        bits = run.space.average_bits(one.assignment)
        inside = "within" if m.high <= result.bound else "above"
        mean, low, high = (loss_text(scale * value) for value in (m.mean, m.low, m.high))
        return [name, f"{one.size_bytes:,}", f"{bits:.3f}", mean, f"{low} to {high}", inside]

    named = [("smaller neighbour", result.smaller), ("answer", result.answer), ("larger neighbour", result.larger)]
    table = markdown_table(
        ["", "bytes", "bits", what, "95 % interval", "bound"], [row(name, c) for name, c in named if c is not None]
    )
    again = [c for c in result.measured if c.size_bytes > result.answer.size_bytes and c.measured.high > result.bound]
    note = (
        f"\n{len(again)} larger assignments exceed the bound: the measured loss does not fall evenly with size." if again else ""
    )
    return (
        f"{table}\n{len(result.measured)} assignments measured on {result.answer.measured.num_images} images that neither "
        f"calibrate, nor measure, nor validate.{note}\n{layers_text(run.space.names, result.answer.assignment)}\n"
        f"Recommended: the answer, {result.answer.size_bytes:,} bytes.\n"
        f"Next: clado export {run.folder} --size-bytes {result.answer.size_bytes}"
    )
