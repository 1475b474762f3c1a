"""Measuring, estimating and solving agree with the method in its plainest form, which shares no code with them."""

import math
from functools import cache

import numpy as np
import pytest
import torch

import clado
from clado import paper
from clado.choosing import constraints, solvers
from clado.choosing.program import Program
from tests import tolerance
from tests.networks import Attention, Normed, Recurrent, Residual, Tied, Volume, build, images, labels

pytestmark = pytest.mark.numeric

NUM_IMAGES = 12
BITS = (2, 4)
NETWORKS = pytest.mark.parametrize("kind", [Residual, Attention, Tied, Recurrent, Volume, Normed])
CRITERIA = pytest.mark.parametrize("criterion", ["kl_to_float", "cross_entropy"])


def kl_to_float(model, x):
    """The mean of KL(float softmax ‖ softmax)."""
    expected = paper.forward(paper.replaced(model, {}), x).double().log_softmax(1)
    return lambda network: float(
        torch.nn.functional.kl_div(
            paper.forward(network, x).double().log_softmax(1), expected, reduction="batchmean", log_target=True
        )
    )


def tell_apart(model, x):
    """Makes a new network tell images apart: rounding would hide the interactions of one that does not.

    The head's weight loses what it says of every image, and logits get a deviation of 1. Returns the largest sum of
    absolute terms of a logit.
    """
    inputs = []
    hook = model.head.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    model.eval()
    paper.forward(model, x)
    hook.remove()
    mean, weight = inputs[0].mean(0), model.head.weight
    with torch.no_grad():
        weight -= torch.outer(weight @ mean, mean) / mean.square().sum()
        weight /= (inputs[0] @ weight.T).std()
        return float((inputs[0].abs() @ weight.abs().T).max())


@cache
def prepared_of(kind):
    """The network with every option rounded to nearest, and the scale of its logits."""
    model = build(kind)
    scale = tell_apart(model, images(NUM_IMAGES))
    network = clado.Network(model, images(1))
    return clado.prepare(network, network.search_space(BITS)), scale


class Case:
    """A network, what the fast path makes of it, and what the paper says."""

    def __init__(self, kind, criterion):
        self.criterion, self.data = criterion, (images(NUM_IMAGES), labels(NUM_IMAGES))
        self.prepared, self.scale = prepared_of(kind)
        self.network, self.space = self.prepared.network, self.prepared.space
        self.model = self.network.model
        self.layers = [self.space.layers[option.layer].name for option in self.space.options]
        self.weights = [layer.weight for layer in self.prepared.layers]
        self.sizes = [math.ceil(self.space.layers[o.layer].num_weights * o.bits / 8) for o in self.space.options]
        self.loss = paper.cross_entropy(*self.data) if criterion == "cross_entropy" else kl_to_float(self.model, self.data[0])
        self.matrix = paper.interaction_matrix(self.model, self.options(), self.loss)

    def options(self):
        return list(zip(self.layers, self.weights, strict=True))

    @cache  # noqa: B019  a case lives as long as the tests
    def measured(self, estimator):
        return clado.measure(self.network, self.space, self.data, estimator, self.criterion, prepared=self.prepared)

    def off(self):
        """How far rounding takes an entry: four mean losses.

        A loss changes by at most |q − p| times what the logits change by. That is √2 at most. With a KL divergence of ℓ
        it is at most √(2ℓ) (Pinsker), and more by what the logits change by. Two options have ℓ ≤ 2 max |Ĝ|.
        """
        moved = tolerance.FORWARD * max(1.0, self.scale)
        slope = 2**0.5 if self.criterion == "cross_entropy" else min(2**0.5, 2 * np.abs(self.matrix).max() ** 0.5 + moved)
        return 4 * slope * moved


case = cache(Case)


@NETWORKS
@CRITERIA
def test_pairwise_is_the_papers_matrix(kind, criterion):
    c = case(kind, criterion)
    matrix = c.measured("pairwise")
    np.testing.assert_allclose(matrix.values, c.matrix, rtol=0, atol=c.off())
    assert matrix.baseline == pytest.approx(c.loss(paper.replaced(c.model, {})), abs=c.off())


@NETWORKS
@CRITERIA
def test_layerwise_is_its_diagonal(kind, criterion):
    c = case(kind, criterion)
    np.testing.assert_allclose(c.measured("layerwise").values, np.diag(np.diag(c.matrix)), rtol=0, atol=c.off())


@NETWORKS
@CRITERIA
def test_the_law_fails_where_a_layer_is_left_in_float(kind, criterion):
    c = case(kind, criterion)
    measured = c.measured("pairwise").values
    for option in range(c.space.num_options):
        wrong = measured.copy()  # an option that changes nothing costs nothing, alone and in pairs
        wrong[option] = wrong[:, option] = 0
        with pytest.raises(AssertionError):
            np.testing.assert_allclose(wrong, c.matrix, rtol=0, atol=c.off())


@NETWORKS
@CRITERIA
def test_the_prediction_for_two_layers_is_the_papers_measured_increase(kind, criterion):
    c = case(kind, criterion)
    matrix, first, last = c.measured("pairwise"), 0, c.space.num_options - 1
    both = paper.replaced(c.model, {c.layers[k]: c.weights[k] for k in (first, last)})
    increase = c.loss(both) - c.loss(paper.replaced(c.model, {}))
    predicted = matrix.predicted_increase(c.space.assignment([first, last]))
    assert predicted == pytest.approx(increase, abs=2 * c.off())  # two halves of the diagonal and a cross term


@NETWORKS
@CRITERIA
def test_an_answer_is_the_papers_answer(kind, criterion):
    """Clipping moves no two matrices apart, because it projects on a convex set.

    So the predictions of two clipped matrices differ by at most ½ αᵀ α = I/2 times the Frobenius norm of the
    difference of the matrices. That norm is at most K times the largest entry of the difference.
    """
    c = case(kind, criterion)
    matrix, clipped = c.measured("pairwise"), paper.clip(c.matrix)
    apart = c.space.num_layers / 2 * c.space.num_options * c.off()
    narrowest, widest = (c.space.size_bytes(a) for a in (c.space.narrowest, c.space.widest))
    for share in (0.0, 0.3, 0.6, 1.0):
        budget = narrowest + int(share * (widest - narrowest))
        expected = paper.solve(clipped, c.layers, c.sizes, budget)
        chosen = c.space.chosen_options(clado.solve(matrix, size_bytes=budget).assignment)
        assert sum(c.sizes[k] for k in chosen) <= budget
        least = paper.predicted_increase(clipped, expected)
        assert paper.predicted_increase(clipped, chosen) <= least + 2 * apart + 2e-6 * least
    assert paper.solve(clipped, c.layers, c.sizes, narrowest - 1) is None


@NETWORKS
@pytest.mark.parametrize("convexity", ["raw", "clip_psd"])
@pytest.mark.parametrize("solver", ["exhaustive", "scip"])
def test_solvers_of_the_same_matrix_find_the_same_least(kind, convexity, solver):
    c = case(kind, "cross_entropy")
    matrix = clado.InteractionMatrix(c.space, c.matrix, "paper", "cross_entropy", 0.0, NUM_IMAGES)
    minimised = c.matrix if convexity == "raw" else paper.clip(c.matrix)
    budget = (c.space.size_bytes(c.space.narrowest) + c.space.size_bytes(c.space.widest)) // 2
    program = Program.build(matrix, (constraints.constraint("size", c.space, budget),), convexity=convexity)
    solution = solvers.solve(program, solver)
    least = paper.predicted_increase(minimised, paper.solve(minimised, c.layers, c.sizes, budget))
    assert solution.minimised == pytest.approx(least, rel=2e-6, abs=1e-9 * np.abs(c.matrix).max())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_papers_quantizer_keeps_the_laws_of_one(bits):
    weight = build(Residual).get_parameter("stem.weight")
    quantized = paper.quantize(weight, bits)
    assert len(quantized.unique()) <= 2**bits - 1
    assert quantized.shape == weight.shape
    assert not quantized.requires_grad
    minmax = clado.WeightQuantizer("minmax", per_channel=False).fake_quantize(weight, bits)
    # its range is among those that are tried
    assert (quantized - weight).norm() <= (minmax - weight).norm() * (1 + tolerance.of_sum(weight.numel()))
