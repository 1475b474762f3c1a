"""Smallest: the least bytes whose measured loss increase or top-1 drop stays under a bound, on images kept for this choice."""

from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from clado.choosing.constraints import Constraint
from clado.choosing.proposals import Budget, budget_solver, merge_limits, program_of
from clado.choosing.smallest import MeasuredAssignment, Smallest, smallest
from clado.errors import DataError, InfeasibleError
from clado.evaluation import per_image
from clado.records.interval import Interval
from clado.records.text import markdown_table
from clado.reporting.summary import layers_text
from clado.run.opened_run import OpenedRun
from clado.space import Assignment
from flows.commands.stored import StoredRun
from flows.progress import progress

FIRST = 8  # budgets of the first front, per estimator
ROUNDS = 4
FILL = 3  # budgets that fill the gap below an answer, per estimator and round


def find(stored: StoredRun, run: OpenedRun, bound: float, top1: bool) -> Smallest:
    """Measures assignments on the selection slice until the smallest that keeps the bound is known, with both its neighbours.

    With `top1` the bound is on the drop of top-1 (a fraction), which needs labels. Else it is on the increase of cross entropy,
    or of KL to the float network if there are no labels.
    """
    images, space = run.slices.selection, run.space
    if len(images) < 2:
        raise DataError(
            "no images are left over to choose on; lower data.sensitivity_images or data.calibration_images, or set "
            "data.validation_images for a folder without train/ and val/"
        )
    if top1 and images.load(0, 1)[1] is None:
        raise DataError("a bound on top-1 needs labelled images; use --max-loss-increase instead")
    float_losses, float_hits = per_image(run.float_network, {}, images)
    measured = 0

    def measure(assignment: Assignment) -> Interval:
        nonlocal measured
        losses, hits = per_image(*run.preparation.deployed(assignment), images, reference=run.float_network)
        measured += 1
        advance(1)
        return Interval.of_hits(float_hits, hits) if top1 else Interval.of(losses - float_losses)

    low, high, solve = solver_of(stored)
    most = (FIRST + ROUNDS * FILL) * len(stored.config.estimators)  # fewer where estimators agree
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


def solver_of(stored: StoredRun) -> tuple[int, int, Callable[[Sequence[int]], list[Assignment]]]:
    """The least size that an estimator reaches, the largest that the run allows, and a solver for the sizes between.

    The solver gives every estimator's optimum at each of some sizes. Programs and convexification are made once.
    """
    space = stored.measured.space
    matrices = stored.matrices.named.values()
    solvers = [budget_solver(matrix, stored.prepare) for matrix in matrices]

    def limits_at(size: int) -> list[Constraint]:
        return merge_limits(Budget("size", size).limit(space), stored.limits)  # that on the size is the first

    def solve(sizes: Sequence[int]) -> list[Assignment]:
        assignments: list[Assignment] = []
        for solver in solvers:
            for size in sizes:
                with suppress(InfeasibleError):  # forbidden pairs or other limits leave nothing there
                    assignments.append(solver(Budget("size", size), limits_at(size)).assignment)
        return assignments

    largest = limits_at(space.size_bytes(space.widest))
    programs = [program_of(matrix, largest) for matrix in matrices]
    least = min(space.size_bytes(program.assignment(program.narrowest)) for program in programs)
    return least, int(largest[0].bound), solve


def text(result: Smallest, run: OpenedRun, top1: bool) -> str:
    """The answer and its neighbours for the terminal."""
    what, scale = ("top-1 drop %", 100.0) if top1 else ("loss increase", 1.0)

    def row(name: str, one: MeasuredAssignment) -> list[str]:
        m = one.measured
        bits = run.space.average_bits(one.assignment)
        inside = "within" if m.high <= result.bound else "above"
        interval = f"{scale * m.low:.4f} to {scale * m.high:.4f}"
        return [name, f"{one.size_bytes:,}", f"{bits:.3f}", f"{scale * m.mean:.4f}", interval, inside]

    named = [("smaller neighbour", result.smaller), ("answer", result.answer), ("larger neighbour", result.larger)]
    table = markdown_table(
        ["", "bytes", "bits", what, "95 % interval", "bound"], [row(name, c) for name, c in named if c is not None]
    )
    again = [c for c in result.measured if c.size_bytes > result.answer.size_bytes and c.measured.high > result.bound]
    note = (
        f"\n{len(again)} larger assignments exceed the bound: what is measured does not fall evenly with size." if again else ""
    )
    return (
        f"{table}\n{len(result.measured)} assignments measured on {result.answer.measured.num_images} images that neither "
        f"calibrate, nor measure, nor validate.{note}\n{layers_text(run.space.names, result.answer.assignment)}\n"
        f"Next: clado export {run.folder} --size-bytes {result.answer.size_bytes}"
    )
