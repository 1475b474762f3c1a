"""What every estimator keeps. Subclass, set `name`, and the tests come with it."""

from functools import cache

import numpy as np
import pytest

from clado.interaction.estimators import Measured, estimate, kinds_of
from clado.measuring.kinds import tile_kinds
from clado.measuring.measurements import measure_tile
from clado.measuring.plan import Plan, sample_blocks
from clado.measuring.scores import scores
from clado.measuring.workbench import Workbench
from clado.network.network import Network
from clado.quantization.preparation import Recipe, prepare
from clado.quantization.quantizers import WeightQuantizer
from clado.space import Assignment
from tests.networks import Residual, build, images, labels
from tests.tolerance import FORWARD, LOSS, assert_close

ENTRY = 4 * 2**0.5 * FORWARD  # four mean losses, each with a slope of at most √2 in the logits: a share of the largest entry
BLOCKS = ((0, 2), (1,), (3, 4))  # of the layers of `measured_network`, the first not contiguous
NAMES = (("stem.*", "grouped.*"), ("up.*", "head.*"))


@cache
def measured_network(
    criterion: str = "kl_to_float", num_images: int = 24, num_blocks: int = 4, bits: tuple[int, ...] = (2, 8)
) -> tuple[Workbench, Measured]:
    """A network measured by tiles of every kind. Shared: tests change copies."""
    network = Network(build(Residual), images(1))
    space = network.search_space(bits).blocked(NAMES)
    x, y = images(num_images), labels(num_images)
    blocks = sample_blocks(num_images, num_blocks)
    bench = Workbench(prepare(network, space, Recipe(WeightQuantizer())), criterion, blocks, lambda a, b: (x[a:b], y[a:b]), 16)
    plan = Plan(space, blocks, tuple(tile_kinds()), space.num_options)
    sums = {kind: np.stack([measure_tile(bench, t) for t in plan.tiles if t.kind == kind]) for kind in plan.kinds}
    return bench, Measured(space, criterion, np.array([b - a for a, b in blocks]), sums)


def true_increase(bench: Workbench, assignment: Assignment) -> float:
    """The increase of the mean loss, by whole forwards."""
    sums = [
        [scores(bench, a, block).losses.sum() for block in range(len(bench.sample_blocks))]
        for a in (assignment, bench.space.nothing)
    ]
    return float((sum(sums[0]) - sum(sums[1])) / bench.sample_blocks[-1][1])


class EstimatorContract:
    """Laws of every estimator."""

    name: str
    draws = False  # whether it rests on random vectors of each sample block

    @pytest.mark.parametrize("criterion", ["kl_to_float", "cross_entropy"])
    def test_the_matrix_is_symmetric_finite_and_nothing_costs_nothing(self, criterion):
        bench, measured = measured_network(criterion)
        matrix = estimate(self.name, measured)
        assert matrix.estimator == self.name
        assert np.array_equal(matrix.values, matrix.values.T)
        assert np.isfinite(matrix.values).all()
        assert matrix.predicted_increase(bench.space.nothing) == 0.0
        assert matrix.num_samples == 24

    def test_its_own_kinds_of_tiles_are_all_it_reads(self):
        _, measured = measured_network("cross_entropy")
        read = {kind: measured.sums[kind] for kind in kinds_of([self.name])}
        matrix = estimate(self.name, Measured(measured.space, measured.criterion, measured.counts, read))
        whole = estimate(self.name, measured)
        assert_close(matrix.values, whole.values, ENTRY, least=0.0)
        assert matrix.baseline == pytest.approx(whole.baseline, abs=LOSS * max(1, whole.baseline))
        assert whole.baseline > 0.1

    def test_narrow_bits_everywhere_rank_behind_wide_ones(self):
        bench, measured = measured_network()
        matrix = estimate(self.name, measured)
        assert matrix.predicted_increase(bench.space.narrowest) > matrix.predicted_increase(bench.space.widest)

    def test_standard_errors_have_the_shape_of_the_matrix_and_need_two_blocks(self):
        _, measured = measured_network()
        errors = estimate(self.name, measured).standard_error
        assert errors is not None
        assert errors.shape == (measured.space.num_options,) * 2
        assert (errors >= 0).all()
        assert (np.diag(errors)[np.diag(estimate(self.name, measured).values) > 0] > 0).all()
        assert estimate(self.name, measured_network(num_blocks=1)[1]).standard_error is None

    def test_the_same_images_in_other_blocks_give_the_same_matrix_but_for_what_is_drawn(self):
        one, four = (estimate(self.name, measured_network("cross_entropy", num_blocks=blocks)[1]) for blocks in (1, 4))
        if self.draws:  # other blocks draw other vectors
            assert four.standard_error is not None
            assert_close(one.values, four.values, 6 * float(four.standard_error.max() / four.values.max()), least=0.0)
        else:
            assert_close(one.values, four.values, ENTRY, least=0.0)

    def test_an_option_without_a_finite_number_is_quarantined(self):
        _, measured = measured_network()
        sums = {kind: array.copy() for kind, array in measured.sums.items()}
        sums["singles"][1, 3] = np.inf
        sums["gram"][1, :, 3] = sums["gram"][1, 4, :] = np.nan
        sums["gradients"][1, :, 3] = sums["trace"][1, 3] = np.nan
        matrix = estimate(self.name, Measured(measured.space, measured.criterion, measured.counts, sums))
        assert matrix.quarantined == (2,)
        assert np.isfinite(matrix.values).all()
