"""Laws of the interaction matrix: exact for two layers, exact for every assignment where the loss is quadratic in the weights."""

import itertools

import numpy as np
import pytest

from clado.errors import ConfigurationError, MeasurementError
from clado.estimators import Measured, estimate, kinds_of, non_finite
from clado.interaction import InteractionMatrix
from clado.measure import Workbench, losses, measure_tile
from clado.network import Network
from clado.plugins import available
from clado.probes import Plan, sample_blocks
from clado.quantizers import WeightQuantizer
from clado.space import Assignment, Layer, SearchSpace
from tests.networks import Residual, all_assignments, build, images, labels

WIDTHS = (2, 4, 8)


def quadratic_measurements(seed=0, num_layers=4, blocks=3):
    """Measurements of a loss that is exactly quadratic in the perturbation: per block ½ δᵀ H δ with its own H."""
    rng = np.random.default_rng(seed)
    space = SearchSpace.uniform([Layer(f"l{i}", (3,), "linear") for i in range(num_layers)], WIDTHS)
    delta = {option: rng.normal(size=3) * 2.0 ** -space.options[option][1] for option in range(space.num_options)}
    roots = rng.normal(size=(blocks, 3 * num_layers, 3 * num_layers))
    hessians = roots @ roots.transpose(0, 2, 1)
    counts = rng.integers(1, 9, blocks)

    def loss(block, options):
        step = np.zeros(3 * num_layers)
        for option in options:
            layer = space.options[option][0]
            step[3 * layer : 3 * layer + 3] = delta[option]
        return 1.5 + 0.5 * step @ hessians[block] @ step

    k = space.num_options
    singles = np.array([[loss(b, []), *[loss(b, [o]) for o in range(k)]] for b in range(blocks)]) * counts[:, None]
    pairs = np.full((blocks, k, k), np.nan)
    for b, m, n in itertools.product(range(blocks), range(k), range(k)):
        if space.options[m][0] < space.options[n][0]:
            pairs[b, m, n] = loss(b, [m, n]) * counts[b]

    def increase(assignment):
        options = space.chosen_options(assignment)
        return float(np.average([loss(b, options) - loss(b, []) for b in range(blocks)], weights=counts))

    return Measured(space, "kl_to_float", counts, {"singles": singles, "pairs": pairs}), increase


def measured_network(criterion="kl_to_float", num_images=24, num_blocks=4, bits=(2, 8)):
    network = Network(build(Residual), images(1))
    space = network.search_space(bits)
    x, y = images(num_images), labels(num_images)
    blocks = sample_blocks(num_images, num_blocks)
    bench = Workbench(network, space, WeightQuantizer(), criterion, blocks, lambda a, b: (x[a:b], y[a:b]), 16)
    plan = Plan(space, blocks, ("singles", "pairs", "gram"), space.num_options)
    sums = {kind: np.stack([measure_tile(bench, t) for t in plan.tiles if t.kind == kind]) for kind in plan.kinds}
    return bench, Measured(space, criterion, np.array([b - a for a, b in blocks]), sums)


def true_increase(bench, assignment):
    sums = [[losses(bench, a, block).sum() for block in range(len(bench.blocks))] for a in (assignment, bench.space.nothing)]
    return (sum(sums[0]) - sum(sums[1])) / bench.blocks[-1][1]


class EstimatorContract:
    """Laws of every estimator. Subclass, set `name`."""

    name: str

    @pytest.mark.parametrize("criterion", ["kl_to_float", "cross_entropy"])
    def test_the_matrix_is_symmetric_finite_and_nothing_costs_nothing(self, criterion):
        bench, measured = measured_network(criterion)
        matrix = estimate(self.name, measured)
        assert matrix.estimator == self.name
        assert np.array_equal(matrix.values, matrix.values.T)
        assert np.isfinite(matrix.values).all()
        assert matrix.predicted_increase(bench.space.nothing) == 0.0
        assert matrix.num_samples == 24

    def test_standard_errors_have_the_shape_of_the_matrix_and_need_two_blocks(self):
        _, measured = measured_network()
        errors = estimate(self.name, measured).standard_error
        assert errors is not None
        assert errors.shape == (measured.space.num_options,) * 2
        assert (errors >= 0).all()
        assert estimate(self.name, measured_network(num_blocks=1)[1]).standard_error is None

    def test_the_same_images_in_other_blocks_give_the_same_matrix(self):
        matrices = [estimate(self.name, measured_network(num_blocks=blocks)[1]).values for blocks in (1, 4)]
        np.testing.assert_allclose(matrices[0], matrices[1], rtol=1e-4, atol=1e-7)

    def test_an_option_with_an_infinite_loss_is_quarantined(self):
        _, measured = measured_network()
        sums = {kind: array.copy() for kind, array in measured.sums.items()}
        sums["singles"][1, 3] = np.inf
        sums["gram"][1, :, 2] = sums["gram"][1, 3, :] = np.nan
        matrix = estimate(self.name, Measured(measured.space, measured.criterion, measured.counts, sums))
        assert matrix.quarantined == (2,)
        assert np.isfinite(matrix.values).all()


class TestLayerwise(EstimatorContract):
    name = "layerwise"

    def test_is_the_diagonal_of_pairwise(self):
        _, measured = measured_network()
        pairwise = estimate("pairwise", measured).values
        assert np.array_equal(estimate("layerwise", measured).values, np.diag(np.diag(pairwise)))


class TestPairwise(EstimatorContract):
    name = "pairwise"

    def test_is_exact_for_at_most_two_layers(self):
        bench, measured = measured_network()
        matrix = estimate("pairwise", measured)
        for pair in itertools.combinations(range(bench.space.num_options), 2):
            for options in (pair[:1], pair):
                if len({bench.space.options[o][0] for o in options}) == len(options):
                    assignment = bench.space.assignment(options)
                    assert abs(matrix.predicted_increase(assignment) - true_increase(bench, assignment)) < 1e-5

    def test_is_exact_for_every_assignment_of_a_quadratic_loss(self):
        measured, increase = quadratic_measurements()
        matrix = estimate("pairwise", measured)
        for bits in all_assignments(measured.space.bit_widths):
            assert matrix.predicted_increase(Assignment(bits)) == pytest.approx(increase(Assignment(bits)), rel=1e-9)

    def test_the_law_fails_for_a_wrong_entry(self):
        measured, increase = quadratic_measurements()
        sums = {**measured.sums, "pairs": measured.sums["pairs"] * 1.001}
        matrix = estimate("pairwise", Measured(measured.space, "kl_to_float", measured.counts, sums))
        assert matrix.predicted_increase(measured.space.narrowest) != pytest.approx(increase(measured.space.narrowest), rel=1e-9)

    def test_in_layer_entries_are_zero(self):
        matrix = estimate("pairwise", measured_network()[1])
        inside = matrix.in_layer_mask() & ~np.eye(len(matrix.values), dtype=bool)
        assert not matrix.values[inside].any()

    def test_standard_error_is_of_the_combination_on_the_same_images(self):
        measured, _ = quadratic_measurements(blocks=5)
        even = Measured(
            measured.space,
            "kl_to_float",
            np.ones(5, dtype=np.int64),
            {k: v / measured.counts.reshape(-1, *[1] * (v.ndim - 1)) for k, v in measured.sums.items()},
        )
        s, p = even.sums["singles"], even.sums["pairs"]
        entry = p[:, 0, 5] - s[:, 1] - s[:, 6] + s[:, 0]
        assert estimate("pairwise", even).standard_error[0, 5] == pytest.approx(entry.std(ddof=1) / np.sqrt(5))

    def test_a_pair_that_is_infinite_only_together_is_forbidden(self):
        _, measured = measured_network()
        sums = {**measured.sums, "pairs": measured.sums["pairs"].copy()}
        sums["pairs"][0, 1, 6] = np.inf
        matrix = estimate("pairwise", Measured(measured.space, measured.criterion, measured.counts, sums))
        assert matrix.forbidden == ((1, 6),)
        assert matrix.quarantined == ()


class TestGaussNewton(EstimatorContract):
    name = "gauss_newton"

    def test_is_positive_semidefinite_under_kl(self):
        values = estimate("gauss_newton", measured_network()[1]).values
        assert np.linalg.eigvalsh(values)[0] >= -1e-12 * np.abs(values).max()

    @pytest.mark.parametrize("criterion", ["kl_to_float", "cross_entropy"])
    def test_tends_to_the_measured_increase_for_small_errors(self, criterion):
        bench, measured = measured_network(criterion, bits=(8, 12))
        matrix = estimate("gauss_newton", measured)
        for assignment in (bench.space.narrowest, bench.space.nothing.replace(0, 8).replace(3, 8)):
            increase = true_increase(bench, assignment)
            assert matrix.predicted_increase(assignment) == pytest.approx(increase, rel=0.1, abs=2e-6)


def test_what_is_not_finite_is_named_with_layer_bits_and_sample_block_and_stays_out_of_the_matrix():
    _, measured = measured_network()
    assert non_finite(measured) == []
    sums = {kind: array.copy() for kind, array in measured.sums.items()}
    sums["singles"][1, 3] = sums["singles"][3, 3] = np.inf  # an overflow alone stays one in every pair
    sums["pairs"][[1, 3], :2, 2] = sums["pairs"][[1, 3], 2, 4:] = np.inf
    sums["pairs"][0, 1, 6] = np.nan
    broken = Measured(measured.space, measured.criterion, measured.counts, sums)
    assert non_finite(broken) == [
        "depthwise.weight at 2 bits has a NaN or infinite loss in sample blocks 1, 3: this candidate is excluded",
        "stem.weight at 8 bits with up.weight at 2 bits has a NaN or infinite loss in sample block 0: "
        "the two are not chosen together",
    ]
    matrix = estimate("pairwise", broken)
    assert matrix.quarantined == (2,)
    assert matrix.forbidden == ((1, 6),)


def test_every_estimator_has_a_contract_class():
    assert {test.name for test in EstimatorContract.__subclasses__()} == set(available("estimators"))


def test_kinds_are_the_union_and_an_unknown_name_lists_the_valid_ones():
    assert kinds_of(["layerwise"]) == ("singles",)
    assert kinds_of(["gauss_newton", "pairwise"]) == ("singles", "pairs", "gram")
    with pytest.raises(ConfigurationError, match=r"gauss_newton, layerwise, pairwise \(did you mean 'pairwise'\?\)"):
        kinds_of(["pairwize"])


def test_a_layer_without_any_finite_loss_ends_the_run_by_name():
    _, measured = measured_network()
    sums = {**measured.sums, "singles": measured.sums["singles"].copy()}
    sums["singles"][0, 3:5] = np.nan
    with pytest.raises(MeasurementError, match=r"depthwise\.weight"):
        estimate("layerwise", Measured(measured.space, measured.criterion, measured.counts, sums))


def test_a_matrix_refuses_nan_by_name_and_asymmetry():
    space = SearchSpace.uniform([Layer("a", (2,), "linear"), Layer("b", (2,), "linear")], (2, 4))
    values = np.zeros((4, 4))
    values[3, 1] = values[1, 3] = np.nan
    with pytest.raises(MeasurementError, match="a at 4 bits, b at 4 bits"):
        InteractionMatrix(space, values, "x", "kl_to_float", 0.0, 1)
    with pytest.raises(MeasurementError, match="not symmetric"):
        InteractionMatrix(space, np.triu(np.ones((4, 4))), "x", "kl_to_float", 0.0, 1)


def test_clipping_is_the_nearest_positive_semidefinite_matrix():
    rng = np.random.default_rng(0)
    space = SearchSpace.uniform([Layer(f"l{i}", (2,), "linear") for i in range(3)], (2, 4))
    raw = rng.normal(size=(6, 6))
    matrix = InteractionMatrix(space, raw + raw.T, "x", "kl_to_float", 0.0, 1)
    clipped = matrix.clip_psd()
    eigenvalues = np.linalg.eigvalsh(clipped.values)
    assert eigenvalues[0] > -1e-12
    kept = np.linalg.eigvalsh(matrix.values)
    np.testing.assert_allclose(eigenvalues, np.maximum(kept, 0), atol=1e-12)
    assert clipped.negative_share() < 1e-12 < matrix.negative_share() < 1
    assert clipped.clip_psd().values == pytest.approx(clipped.values)
