"""What every constraint owes. Subclass it and give `space`, `build(bound)` and `expected(assignment)`, an independent count."""

import itertools
import random
from pathlib import Path

import numpy as np
import pytest

from clado.choosing.constraints import Constraint
from clado.choosing.program import Program
from clado.interaction.matrix import InteractionMatrix
from clado.space import Assignment, Layer, SearchSpace


class ConstraintContract:
    """Laws of a constraint."""

    wide_bound: float
    unit: str
    activation_widths: tuple[int, ...] = ()

    @pytest.fixture
    def space(self) -> SearchSpace:
        layers = [
            Layer("stem", (3, 5, 7), "conv2d", macs=111),
            Layer("body", (11, 13), "linear", macs=222),
            Layer("head", (9,), "linear", macs=7),
        ]
        return SearchSpace(tuple(layers), ((2, 4, 8), (3, 5), (1, 2, 16))).with_activations(self.activation_widths)

    def build(self, space: SearchSpace, bound: float, folder: Path) -> Constraint:
        raise NotImplementedError

    def expected(self, space: SearchSpace, assignment: Assignment) -> float:
        raise NotImplementedError

    def assignments(self, space: SearchSpace) -> list[Assignment]:
        rng = random.Random(0)
        choices = [[rng.choice(range(a, b)) for a, b in itertools.pairwise(space.offsets)] for _ in range(20)]
        return [space.narrowest, space.widest, *map(space.assignment, choices)]

    def test_one_cost_per_option(self, space: SearchSpace, tmp_path: Path) -> None:
        constraint = self.build(space, self.wide_bound, tmp_path)
        assert len(constraint.costs) == space.num_options
        assert constraint.unit == self.unit

    def test_value_is_an_independent_count(self, space: SearchSpace, tmp_path: Path) -> None:
        constraint = self.build(space, self.wide_bound, tmp_path)
        for assignment in self.assignments(space):
            assert constraint.value(space, assignment) == pytest.approx(self.expected(space, assignment), rel=1e-12)

    def test_wider_never_costs_less(self, space: SearchSpace, tmp_path: Path) -> None:
        constraint = self.build(space, self.wide_bound, tmp_path)
        for a, b in itertools.permutations(range(space.num_options), 2):
            narrow, wide = space.options[a], space.options[b]
            if narrow.layer == wide.layer and all(x <= y for x, y in zip(narrow[1:], wide[1:], strict=True) if x and y):
                assert constraint.costs[a] <= constraint.costs[b]

    def test_holds_exactly_up_to_its_value(self, space: SearchSpace, tmp_path: Path) -> None:
        constraint = self.build(space, self.wide_bound, tmp_path)
        for assignment in self.assignments(space):
            value = constraint.value(space, assignment)
            assert constraint.with_bound(value).holds(space, assignment)
            assert not constraint.with_bound(value * (1 - 1e-6) - 1e-6).holds(space, assignment)

    def test_program_counts_the_same(self, space: SearchSpace, tmp_path: Path) -> None:
        matrix = InteractionMatrix(space, np.eye(space.num_options), "none", "none", 0.0, 1)
        constraint = self.build(space, self.wide_bound, tmp_path)
        program = Program.build(matrix, [constraint.with_bound(1e18)])
        for assignment in self.assignments(space):
            counted = program.costs[0, program.choices(assignment)].sum()
            assert counted == pytest.approx(constraint.value(space, assignment), rel=1e-12)
