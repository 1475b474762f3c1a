"""The bounds of tests/tolerance.py hold for sums in any order, and what is no rounding is beyond them."""

import numpy as np
import pytest
import torch

from clado.network.network import Network
from tests import tolerance
from tests.networks import Attention, Normed, Recurrent, Residual, Tied, Tokens, Volume, build, images

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("terms", [1, 16, 1000])
def test_a_sum_stays_within_its_bound_in_any_order(terms):
    generator = torch.Generator().manual_seed(terms)
    products = torch.randn(50, terms, generator=generator)
    exact, scale = products.double().sum(1), products.double().abs().sum(1)
    one_by_one = torch.stack([products[:, k] for k in range(terms)]).cumsum(0)[-1]
    for total in (products.sum(1), products.flip(1).sum(1), products.sort(1).values.sum(1), one_by_one):
        assert bool(((total.double() - exact).abs() <= tolerance.of_sum(terms) * scale).all())


@pytest.mark.parametrize("terms", [4, 24, 300])
def test_an_eigenvalue_of_a_gram_matrix_stays_within_its_bound(terms):
    vectors = torch.randn(terms + 30, terms, generator=torch.Generator().manual_seed(terms))  # more than their rank
    gram = (vectors @ vectors.T).double().numpy()
    bound = tolerance.of_eigenvalue(np.diag(gram), terms)
    assert -bound <= np.linalg.eigvalsh((gram + gram.T) / 2)[0] < 0
    gram[0, 1] = gram[1, 0] = 1.1 * np.sqrt(gram[0, 0] * gram[1, 1])  # of no two vectors
    assert np.linalg.eigvalsh(gram)[0] < -bound


def test_the_networks_of_the_tests_add_up_no_more_terms_than_their_tolerance_says():
    for kind in (Residual, Attention, Tied, Recurrent, Volume, Normed, Tokens):
        network = Network(build(kind), images(1))
        assert max(layer.num_weights // layer.num_channels for layer in network.layers) <= 64
        assert tolerance.of_layers(network.layers) <= tolerance.FORWARD


def test_what_is_beyond_its_tolerance_is_refused():
    loss = np.array([0.5, 3.0])
    tolerance.assert_close_losses(loss + np.array([0.9e-5, 2.9e-5]), loss)
    for wrong in (loss + np.array([1.1e-5, 0]), loss + np.array([0, 3.1e-5]), np.array([np.nan, 3.0]), loss[:1]):
        with pytest.raises(AssertionError):
            tolerance.assert_close_losses(wrong, loss)
    logits = torch.tensor([[1.0, -2.0], [0.5, 0.25]])
    tolerance.assert_close(logits + tolerance.FORWARD, logits)
    with pytest.raises(AssertionError):
        tolerance.assert_close(logits + 3 * tolerance.FORWARD, logits)
    tie = logits + torch.tensor([[0.1, 0], [0, 0]])
    tolerance.assert_close_but_for_ties(tie, logits)
    with pytest.raises(AssertionError):
        tolerance.assert_close_but_for_ties(tie, logits, images=0)
