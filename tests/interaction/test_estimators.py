"""Laws of the interaction matrix: exact for two layers, exact for every assignment where the loss is quadratic in the weights."""

import itertools

import numpy as np
import pytest
import torch

import clado
from clado import paper
from clado.errors import ConfigurationError, MeasurementError
from clado.interaction.estimators import Measured, costs, estimate, kinds_of, non_finite
from clado.interaction.matrix import InteractionMatrix
from clado.measuring.kinds.gram import TEMPERATURES
from clado.measuring.plan import Plan
from clado.network.network import Network
from clado.plugins import available
from clado.space import Assignment, Layer, SearchSpace
from tests import tolerance
from tests.contracts.estimator import BLOCKS, ENTRY, EstimatorContract, measured_network, true_increase
from tests.networks import Residual, all_assignments, build, images

pytestmark = pytest.mark.numeric

WIDTHS = (2, 4, 8)
TERMS = 24 * 4  # of an entry of a Gram matrix: images and classes
TEMPERED = {f"tempered{t}": t for t in TEMPERATURES if t != 1}


def quadratic_measurements(seed=0, num_layers=4, blocks=3):
    """Measurements of a loss that is exactly quadratic in the perturbation: per block ½ δᵀ H δ with its own H."""
    rng = np.random.default_rng(seed)
    space = SearchSpace.uniform([Layer(f"l{i}", (3,), "linear") for i in range(num_layers)], WIDTHS)
    delta = {option: rng.normal(size=3) * 2.0 ** -space.options[option].bits for option in range(space.num_options)}
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


def off(measured: Measured) -> float:
    """Rounding of a prediction in float64: entries of four losses each, two pairs of layers for each layer but one."""
    layers = measured.space.num_layers
    largest = max(float(np.nanmax(np.abs(measured.block_means(kind)))) for kind in ("singles", "pairs"))
    return tolerance.of_sum(4 * layers**2, torch.float64) * largest


class TestLayerwise(EstimatorContract):
    name = "layerwise"

    def test_is_the_diagonal_of_pairwise(self):
        _, measured = measured_network()
        pairwise = estimate("pairwise", measured).values
        assert np.array_equal(estimate("layerwise", measured).values, np.diag(np.diag(pairwise)))


class TestPairwise(EstimatorContract):
    name = "pairwise"

    def test_is_exact_for_every_assignment_of_a_quadratic_loss(self):
        measured, increase = quadratic_measurements()
        matrix = estimate("pairwise", measured)
        for bits in all_assignments(measured.space.bit_widths):
            assert abs(matrix.predicted_increase(Assignment(bits)) - increase(Assignment(bits))) <= off(measured)

    def test_the_law_fails_for_a_wrong_entry(self):
        measured, increase = quadratic_measurements()
        sums = {**measured.sums, "pairs": measured.sums["pairs"] * 1.001}
        matrix = estimate("pairwise", Measured(measured.space, "kl_to_float", measured.counts, sums))
        narrowest = measured.space.narrowest
        assert abs(matrix.predicted_increase(narrowest) - increase(narrowest)) > off(measured)

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


class TestBlockwise(EstimatorContract):
    name = "blockwise"

    def test_is_pairwise_within_a_block_and_zero_between_blocks(self):
        _, measured = measured_network()
        blockwise, pairwise = (estimate(name, measured).values for name in ("blockwise", "pairwise"))
        owner = [next(n for n, block in enumerate(BLOCKS) if o.layer in block) for o in measured.space.options]
        same = np.equal.outer(owner, owner)
        assert np.array_equal(blockwise[same], pairwise[same])
        assert not blockwise[~same].any()
        assert blockwise[0, 5] != 0 != pairwise[0, 3]
        without_pairs = {kind: sums for kind, sums in measured.sums.items() if kind != "pairs"}
        alone = estimate("blockwise", Measured(measured.space, measured.criterion, measured.counts, without_pairs))
        tolerance.assert_close(alone.values, blockwise, ENTRY, least=0.0)

    def test_pairs_of_blocks_cost_no_other_pairs(self):
        plan = plan_of(measured_network()[1].space)
        forwards = {name: count for name, (count, _) in costs(["layerwise", "blockwise", "pairwise"], plan).items()}
        # blocks of two, one and two layers at two bit-widths
        assert forwards == {"layerwise": 24 * 11, "blockwise": 24 * (11 + 4 + 4), "pairwise": 24 * (11 + 40)}
        assert kinds_of(["blockwise"]) == ("singles", "block_pairs")
        assert kinds_of(["blockwise", "pairwise"]) == ("singles", "pairs")


def plan_of(space):
    return Plan(space, ((0, 10), (10, 24)), (), space.num_options, num_vectors=3)


class TestHawq(EstimatorContract):
    name = "hawq"
    draws = True

    def test_costs_a_forward_and_a_backward_for_each_vector_and_one(self):
        assert costs(["hawq"], plan_of(measured_network()[1].space)) == {"hawq": (24, 24 * 4)}

    def test_orders_assignments_and_a_negative_trace_counts_as_none(self):
        _, measured = measured_network()
        sums = {**measured.sums, "trace": measured.sums["trace"].copy()}
        sums["trace"][:, 2] *= -1
        matrix = estimate("hawq", Measured(measured.space, measured.criterion, measured.counts, sums))
        assert matrix.ranking_only
        assert matrix.values[1, 1] == 0
        means = measured.mean(measured.block_means("trace"))[2:]
        assert np.array_equal(np.diag(matrix.values)[2:] > 0, means[1:] > 0)
        assert matrix.standard_error[1, 1] > 0  # as noisy as it was


class TestMpqco(EstimatorContract):
    name = "mpqco"

    def test_is_a_loss_under_kl_and_an_order_under_cross_entropy(self):
        for criterion, ranking_only in (("kl_to_float", False), ("cross_entropy", True)):
            matrix = estimate("mpqco", measured_network(criterion)[1])
            assert matrix.ranking_only == ranking_only
            assert (matrix.loss_of(0.5) is None) == ranking_only

    def test_estimates_the_gauss_newton_diagonal_for_small_errors(self):
        _, measured = measured_network(bits=(8, 12), num_images=240)
        sampled, exact = (np.diag(estimate(name, measured).values) for name in ("mpqco", "gauss_newton"))
        errors = np.diag(estimate("mpqco", measured).standard_error)
        assert (np.abs(sampled - exact) < 4 * errors + 0.05 * exact).all()
        assert (errors < 0.5 * exact).all()

    def test_costs_a_forward_and_a_backward(self):
        assert costs(["mpqco"], plan_of(measured_network()[1].space)) == {"mpqco": (24, 24)}


class TestFisher(EstimatorContract):
    name = "fisher"

    def test_shares_its_gradients_with_mpqco_and_orders_assignments(self):
        assert kinds_of(["fisher", "mpqco"]) == ("gradients",)
        assert estimate("fisher", measured_network()[1]).ranking_only

    def test_of_a_half_precision_network_the_small_errors_count_as_well(self):
        model = build(Residual)
        with torch.no_grad():
            model.head.weight.mul_(0.02)
        matrices = []
        for kind in (torch.float16, torch.float32):  # the same weights, rounded once
            network = Network(model.to(kind), images(1).to(kind))
            matrices.append(clado.measure(network, network.search_space((2, 8)), images(16), "fisher"))
        half, wide = matrices
        # a slope goes through ten operators and back, and is squared
        slope = tolerance.of_forward(20, 64, torch.float16)
        np.testing.assert_allclose(np.diag(half.values), np.diag(wide.values), rtol=2 * slope)


class TestGaussNewton(EstimatorContract):
    name = "gauss_newton"

    def test_is_positive_semidefinite_under_kl(self):
        values = estimate("gauss_newton", measured_network()[1]).values
        assert np.linalg.eigvalsh(values)[0] >= -tolerance.of_eigenvalue(np.diag(values), TERMS)

    @pytest.mark.parametrize("criterion", ["kl_to_float", "cross_entropy"])
    def test_tends_to_the_measured_increase_for_small_errors(self, criterion):
        bench, measured = measured_network(criterion, bits=(8, 12))
        matrix = estimate("gauss_newton", measured)
        for assignment in (bench.space.narrowest, bench.space.nothing.replace(0, 8).replace(3, 8)):
            increase = true_increase(bench, assignment)
            # the slope of a divergence of ℓ is about √(2ℓ), that of a loss of labels about 1
            rounding = 4 * tolerance.eps() * ((2 * increase) ** 0.5 if criterion == "kl_to_float" else 1.0)
            assert matrix.predicted_increase(assignment) == pytest.approx(increase, rel=0.1, abs=rounding)


class TestTempered2(EstimatorContract):
    name = "tempered2"

    @pytest.mark.parametrize("name", TEMPERED)
    def test_is_positive_semidefinite_under_kl_and_orders_only(self, name):
        matrix = estimate(name, measured_network()[1])
        assert np.linalg.eigvalsh(matrix.values)[0] >= -tolerance.of_eigenvalue(np.diag(matrix.values), TERMS)
        assert matrix.ranking_only

    def test_costs_nothing_beside_gauss_newton(self):
        assert kinds_of(["gauss_newton", *TEMPERED]) == kinds_of(["gauss_newton"])

    @pytest.mark.parametrize(("name", "temperature"), TEMPERED.items())
    def test_is_the_form_of_the_tempered_softmax(self, name, temperature):
        bench, measured = measured_network()
        z, u = logits_and_changes(bench)
        q = np.exp(z / temperature) / np.exp(z / temperature).sum(-1, keepdims=True)
        centred = (u - (q * u).sum(-1, keepdims=True)) * np.sqrt(q)
        expected = np.einsum("knc,lnc->kl", centred, centred) / len(z)
        count = len(z)
        bound = tolerance.of_gram(np.diag(expected) * count, count, TERMS) / count
        assert (np.abs(estimate(name, measured).values - expected) <= bound).all()

    def test_sees_what_a_sure_network_hides(self):
        """If the float network is sure of an image, a change of its logits costs nothing until it is large. The form at
        temperature 1 says nothing there, and ranks the ruinous assignment first. The tempered one does not."""
        sure, change = np.array([12.0, 0.0]), np.array([[-40.0, 0.0], [-1.0, 0.0]])
        forms = {}
        for temperature in (1, 2, 4):
            q = np.exp(sure / temperature) / np.exp(sure / temperature).sum()
            forms[temperature] = [0.5 * float(u @ (np.diag(q) - np.outer(q, q)) @ u) for u in change]
        p = np.exp(sure) / np.exp(sure).sum()
        true = [float((p * (np.log(p) - (sure + u) + np.log(np.exp(sure + u).sum()))).sum()) for u in change]
        assert true[0] > 20
        assert 100 * forms[1][0] < 1 < forms[2][0] < forms[4][0]
        assert forms[4][1] < 0.1


class TestTempered4(EstimatorContract):
    name = "tempered4"


class TestTempered8(EstimatorContract):
    name = "tempered8"


def logits_and_changes(bench):
    """The float network's logits (n, classes) of all images, and how each option alone changes them (K, n, classes)."""
    images, space = bench.load(0, bench.sample_blocks[-1][1])[0], bench.space
    z, *changed = (
        bench.network.logits(images, bench.chosen(assignment)).double().numpy()
        for assignment in (space.nothing, *(space.assignment([k]) for k in range(space.num_options)))
    )
    return z, np.stack(changed) - z


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
    assert kinds_of(["layerwise", "pairwise"]) == ("singles", "pairs")
    assert kinds_of(["layerwise", "gauss_newton", "pairwise"]) == ("pairs", "gram")  # a tile of gram holds the singles
    with pytest.raises(ConfigurationError, match=r"mpqco, pairwise, tempered2, .* \(did you mean 'pairwise'\?\)"):
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


@pytest.mark.parametrize(
    ("widths", "options"),
    [
        ((), ["a:2", "a:4", "b:8"]),
        ((8,), ["a:2/8", "a:4/8", "b:8/8"]),
        ((4, 8), ["a:2/4", "a:2/8", "a:4/4", "a:4/8", "b:8/4", "b:8/8"]),
    ],
)
def test_a_saved_matrix_names_its_options(tmp_path, widths, options):
    layers = (Layer("a", (2,), "linear"), Layer("b", (2,), "linear"))
    space = SearchSpace(layers, ((2, 4), (8,))).with_activations(widths)
    matrix = InteractionMatrix(space, np.eye(space.num_options), "x", "kl_to_float", 0.0, 1)
    matrix.save(tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as stored:
        assert stored["options"].tolist() == options
        assert np.array_equal(stored["values"], matrix.values)


def test_clipping_is_the_papers():
    rng = np.random.default_rng(0)
    space = SearchSpace.uniform([Layer(f"l{i}", (2,), "linear") for i in range(3)], (2, 4))
    raw = rng.normal(size=(6, 6))
    matrix = InteractionMatrix(space, raw + raw.T, "x", "kl_to_float", 0.0, 1)
    clipped = matrix.clip_psd()
    # two decompositions, and a product of six terms, in float64
    share = 3 * tolerance.of_sum(2 * 6, torch.float64)
    np.testing.assert_allclose(clipped.values, paper.clip(matrix.values), rtol=0, atol=share * np.linalg.norm(matrix.values))
    assert clipped.negative_share() < share < matrix.negative_share() < 1
    assert clipped.clip_psd().values == pytest.approx(clipped.values)
