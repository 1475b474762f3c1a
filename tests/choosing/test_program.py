"""The program as data: what merging, excluding and convexity mean, and the words of what is impossible."""

import itertools

import numpy as np
import pytest

from clado.choosing import constraints
from clado.choosing.program import Program
from clado.choosing.solution import Status
from clado.errors import ConfigurationError, InfeasibleError
from clado.interaction.matrix import InteractionMatrix
from clado.space import Assignment, Layer, SearchSpace
from tests.contracts.solver import random_case


def a_matrix(
    ties: tuple[tuple[int, ...], ...] = (), seed: int = 0, num_layers: int = 4, activations: tuple[int, ...] = ()
) -> InteractionMatrix:
    layers = [Layer(f"layer{i}", (10 + i,), "linear", macs=5) for i in range(num_layers)]
    space = SearchSpace.uniform(layers, (2, 4, 8), ties).with_activations(activations)
    noise = np.random.default_rng(seed).normal(size=(space.num_options, space.num_options))
    return InteractionMatrix(space, noise + noise.T, "random", "none", 0.0, 1)


CASES = [(seed, widths) for widths, seeds in (((), 40), ((8,), 5), ((4, 8), 15)) for seed in range(seeds)]


@pytest.mark.parametrize(("seed", "widths"), [case for case in CASES if random_case(*case).least() is not None])
def test_value_and_cost_equal_those_of_the_assignment(seed: int, widths: tuple[int, ...]) -> None:
    """Ties, pins, quarantine and convexity included: the program's ½xᵀQx is the matrix's own number."""
    case = random_case(seed, widths)
    program = case.program()
    minimised = case.matrix.clip_psd() if case.convexity == "clip_psd" else case.matrix
    scale = np.abs(case.matrix.values).max()
    for choices in itertools.islice(itertools.product(*(range(a, b) for a, b in itertools.pairwise(program.starts))), 50):
        taken = np.array(choices)
        assignment = program.assignment(taken)
        assert None not in assignment.bits
        assert program.minimised(taken) == pytest.approx(minimised.predicted_increase(assignment), rel=1e-9, abs=1e-10 * scale)
        assert np.array_equal(program.choices(assignment), taken)
        assert program.is_feasible(taken) == case.permits(assignment)


def test_a_tie_merges_rows_columns_and_the_inner_pair() -> None:
    matrix = a_matrix(ties=((1, 3),))
    program = Program.build(matrix)
    assert program.groups == ((0,), (1, 3), (2,))
    both = [matrix.space.option(1, 4), matrix.space.option(3, 4)]
    k = program.options.index(tuple(both))
    assert program.quadratic[k, k] == pytest.approx(matrix.values[np.ix_(both, both)].sum())
    untied = Assignment((2, 2, 2, 4))
    with pytest.raises(ConfigurationError, match="layer1, layer3"):
        program.choices(untied)


def test_a_pin_on_one_layer_of_a_tie_pins_the_tie() -> None:
    program = Program.build(a_matrix(ties=((1, 3),)), candidates={"layer3": [4]})
    assert program.assignment(program.widest) == Assignment((8, 4, 8, 4))
    assert program.assignment(program.narrowest) == Assignment((2, 4, 2, 4))


def test_a_tie_shares_the_width_of_activations_too() -> None:
    matrix = a_matrix(ties=((1, 3),), activations=(4, 8))
    program = Program.build(matrix)
    assert program.num_choices == 3 * 3 * 2
    assert program.assignment(program.widest) == Assignment((8,) * 4, (8,) * 4)
    assert program.assignment(program.narrowest) == Assignment((2,) * 4, (4,) * 4)
    both = tuple(matrix.space.option(layer, 4, 8) for layer in (1, 3))
    assert both in program.options
    with pytest.raises(ConfigurationError, match="layer1, layer3"):
        program.choices(Assignment((4,) * 4, (8, 8, 8, 4)))


def test_a_pin_on_weights_leaves_every_width_of_activations() -> None:
    program = Program.build(a_matrix(activations=(4, 8)), candidates={"layer1": [4]})
    space = program.space
    assert [space.options[o] for (o,) in program.options if space.options[o].layer == 1] == [(1, 4, 4), (1, 4, 8)]
    assert program.assignment(program.widest) == Assignment((8, 4, 8, 8), (8,) * 4)


def test_clip_psd_reports_the_raw_objective() -> None:
    matrix = a_matrix()
    program = Program.build(matrix, convexity="clip_psd")
    solution = program.solution(program.widest, Status.HEURISTIC, -np.inf, solver="test")
    assert solution.objective == pytest.approx(matrix.predicted_increase(matrix.space.widest))
    assert solution.minimised == pytest.approx(matrix.clip_psd().predicted_increase(matrix.space.widest))
    assert solution.minimised != pytest.approx(solution.objective)


def test_layerwise_leaves_interactions_out_but_is_scored_with_them() -> None:
    matrix = a_matrix()
    program = Program.build(matrix).layerwise()
    assert program.is_linear
    solution = program.solution(program.widest, Status.HEURISTIC, -np.inf, solver="test")
    assert solution.minimised == pytest.approx(0.5 * sum(matrix.values[k, k] for k in program.widest))
    assert solution.objective == pytest.approx(matrix.predicted_increase(matrix.space.widest))


def test_infeasible_says_the_smallest_the_range_and_what_pins() -> None:
    matrix = a_matrix()
    space = matrix.space
    smallest, largest = space.size_bytes(space.narrowest), space.size_bytes(space.widest)
    with pytest.raises(
        InfeasibleError, match=rf"size: the bound {smallest - 1} bytes is below .* {smallest} to {largest}; .*layer3"
    ):
        Program.build(matrix, [constraints.constraint("size", space, smallest - 1)])
    Program.build(matrix, [constraints.constraint("size", space, smallest)])
    held = r"1 groups have one candidate \(pinned, or the others are quarantined\) and take 12 of it, layer2 the most"
    with pytest.raises(InfeasibleError, match=held):
        Program.build(matrix, [constraints.constraint("size", space, smallest)], candidates={"layer2": [8]})
    with pytest.raises(InfeasibleError, match="no bit-width is left for layer1"):
        Program.build(matrix, quarantined=[3, 4, 5])


def test_what_is_refused() -> None:
    matrix = a_matrix()
    size = constraints.constraint("size", matrix.space, 1e6)
    with pytest.raises(ConfigurationError, match="one of raw, clip_psd"):
        Program.build(matrix, convexity="psd")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="two constraints are called size"):
        Program.build(matrix, [size, size])
    with pytest.raises(ConfigurationError, match="1 costs; the space has 12"):
        Program.build(matrix, [constraints.Constraint("size", "bytes", (1.0,), 3.0)])
    with pytest.raises(ConfigurationError, match="measured at"):
        Program.build(matrix, candidates={"layer0": [3]})
    with pytest.raises(ConfigurationError, match="forbidden pair"):
        Program.build(matrix, forbidden=[(0, 99)])
    with pytest.raises(ConfigurationError, match="quarantined option"):
        Program.build(matrix, quarantined=[12])
    with pytest.raises(ConfigurationError, match="no constraint 'latency'; it has size"):
        Program.build(matrix, [size]).with_bounds({"latency": 1.0})
    program = Program.build(matrix, [constraints.constraint("size", matrix.space, 20)])
    with pytest.raises(ValueError, match="break a constraint"):
        program.solution(program.widest, Status.OPTIMAL, 0.0, solver="test")


def test_every_status_advises() -> None:
    assert all(len(status.advice) > 20 for status in Status)
