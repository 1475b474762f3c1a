"""Sweeps: every point is the optimum at its bound, and the other direction is its inverse."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from clado.choosing import constraints, pareto, solvers
from clado.choosing.program import Program
from clado.choosing.solution import Solution
from clado.errors import ConfigurationError, InfeasibleError
from clado.space import Assignment
from tests.choosing.test_program import a_matrix


def a_program(seed: int = 1) -> Program:
    matrix = a_matrix(seed=seed, num_layers=6)
    values = matrix.values * np.outer(*[[2.0**-b for _, b, _ in matrix.space.options]] * 2)
    matrix = replace(matrix, values=values + np.diag(np.abs(values).sum(axis=1) / 3))
    return Program.build(matrix, [constraints.constraint("size", matrix.space, 1e6)])


def exhaustive(program: Program, starts: Sequence[Assignment] = ()) -> Solution:
    return solvers.solve(program, "exhaustive", starts=starts)


def test_each_point_is_the_optimum_at_its_bound() -> None:
    program = a_program()
    bounds = np.floor(np.linspace(*program.reachable(0), 12)).tolist()
    points = pareto.sweep(program, "size", bounds, solvers.prepare(program))
    assert [point.bound for point in points] == sorted(set(bounds))
    for point in points:
        alone = exhaustive(program.with_bounds({"size": point.bound}))
        assert point.solution.objective == pytest.approx(alone.objective, rel=3e-6)
        assert point.value <= point.bound
        assert point.solution.slack["size"] == point.bound - point.value
    objectives = [point.solution.objective for point in points]
    assert objectives == sorted(objectives, reverse=True)


def test_bounds_at_which_forbidden_pairs_leave_nothing_have_no_point() -> None:
    whole = a_program()
    program = replace(whole, forbidden=((int(whole.starts[0]), int(whole.starts[1])),))
    low, high = whole.reachable(0)
    points = pareto.sweep(program, "size", [low, high], exhaustive)
    assert [point.bound for point in points] == [high]
    with pytest.raises(InfeasibleError, match="forbidden"):
        pareto.sweep(program, "size", [low], exhaustive)


def test_an_answer_that_fits_is_not_solved_again() -> None:
    program = a_program()
    solved: list[float] = []

    def counting(program: Program, starts: Sequence[Assignment] = ()) -> Solution:
        solved.append(program.constraints[0].bound)
        return exhaustive(program, starts)

    top = program.reachable(0)[1]
    pareto.sweep(program, "size", [top, top + 5, top + 9], counting)
    assert solved == [top + 9]


@pytest.mark.parametrize("seed", range(4))
def test_smallest_bound_inverts(seed: int) -> None:
    program = a_program(seed)
    low, high = program.reachable(0)
    for share in (0.3, 0.7):
        middle = exhaustive(program.with_bounds({"size": np.floor(low + share * (high - low))}))
        smallest = pareto.smallest_bound(program, "size", middle.minimised, exhaustive)
        assert smallest.minimised <= middle.minimised
        assert smallest.values["size"] <= middle.values["size"]
        if smallest.values["size"] > low:
            below = exhaustive(program.with_bounds({"size": smallest.values["size"] - 1}))
            assert below.minimised > middle.minimised
    with pytest.raises(InfeasibleError, match="whatever the size"):
        pareto.smallest_bound(program, "size", -1e9, exhaustive)
    tight = program.with_bounds({"size": low})
    assert pareto.smallest_bound(tight, "size", 1e9, exhaustive).values["size"] == low
    with pytest.raises(InfeasibleError, match=f"within a size of {low:g}"):
        pareto.smallest_bound(tight, "size", exhaustive(tight).minimised - 1e-6, exhaustive)


def test_what_is_refused() -> None:
    program = a_program()
    with pytest.raises(InfeasibleError, match="smallest"):
        pareto.sweep(program, "size", [1.0, 1e6], exhaustive)
    with pytest.raises(ConfigurationError, match="no constraint 'bops'"):
        pareto.sweep(program, "bops", [1.0], exhaustive)
    with pytest.raises(ConfigurationError, match="at least one"):
        pareto.sweep(program, "size", [], exhaustive)
