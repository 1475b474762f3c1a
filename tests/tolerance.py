"""Tolerances that follow from the arithmetic: the data type, the number of terms and the scale of the operands.

Rounding moves a result by at most eps / 2 of itself. Three rules say what it does to larger computations:

- A sum of n terms is off by at most n · eps / 2 of the sum of the terms' absolute values. This holds in any order
  of the terms, with vectors of any width. (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1.)
- In a forward pass roundings have random signs. A sum of n products of similar size is then off by about
  √n · eps of its size. The roundings of the operators add up.
- An eigenvalue of a symmetric matrix moves by at most the Frobenius norm of what the matrix is off by (Weyl).

The product promises one more number, LOSS. Across batch and tile sizes a sample's loss agrees within it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from clado.space import Layer

LOSS = 1e-5  # of a sample, times max(1, its loss)


def eps(dtype: torch.dtype = torch.float32) -> float:
    """The distance from 1 to the next number of this type."""
    return float(torch.finfo(dtype).eps)


def of_sum(terms: int, dtype: torch.dtype = torch.float32) -> float:
    """Bound of the rounding of a sum of products, as a share of the sum of their absolute values.

    `terms` is the number of products that are added in this type.
    """
    return terms * eps(dtype) / 2


def of_forward(operators: int, terms: int, dtype: torch.dtype = torch.float32) -> float:
    """What two ways of running a network differ by, as a share of the size of its values.

    `operators` run one after another, and each adds up to `terms` products.
    """
    return operators * terms**0.5 * eps(dtype)


def of_layers(layers: Sequence[Layer], dtype: torch.dtype = torch.float32) -> float:
    """The same of a large network.

    Each layer adds up its weights of an output channel. An operator of as many terms, such as a batch norm's
    scale and shift or a shortcut, stands beside it.
    """
    return 2 * sum(of_forward(1, layer.num_weights // layer.num_channels, dtype) for layer in layers)


# of the networks of tests/networks.py: up to 10 operators, of up to 64 terms, on values of about 1
FORWARD = of_forward(10, 64)


def assert_close(actual: Any, expected: Any, share: float = FORWARD, least: float = 1.0) -> None:
    """Asserts that tensors agree within a share of the largest expected value, which counts as `least` or more."""
    expected = torch.as_tensor(expected)
    scale = max(least, float(expected.detach().abs().max())) if expected.numel() else least
    torch.testing.assert_close(torch.as_tensor(actual), expected, rtol=0, atol=share * scale)


def assert_close_but_for_ties(actual: torch.Tensor, expected: torch.Tensor, share: float = FORWARD, images: int = 1) -> None:
    """Asserts that logits (images, classes) agree, but for those of a few images.

    A layer's input that lies between two codes of its grid goes to either side, as the last place has it. That
    moves the logits of one image.
    """
    apart = (actual - expected).abs().amax(1) > share * max(1.0, float(expected.abs().max()))
    assert int(apart.sum()) <= images, (actual - expected).abs().max()


def assert_close_losses(actual: Any, expected: Any, samples: int = 1) -> None:
    """Asserts that losses, or sums over samples, agree within 1e-5 · max(1, loss) a sample; what is NaN is so in both."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    share = np.abs(actual - expected) / (LOSS * np.maximum(samples, np.abs(expected)))
    assert np.nanmax(share, initial=0.0) <= 1, f"{np.nanmax(share):.3g} times what rounding explains"


def of_no_change(logits: float = FORWARD) -> float:
    """Largest KL divergence of a sample whose logits differ by rounding.

    It is half the square of the difference, and the rounding of that difference's exponential.
    """
    return logits**2 / 2 + 4 * eps() * logits


def of_gram(diagonal: np.ndarray, samples: int, terms: int, logits: float = FORWARD) -> np.ndarray:
    """Bound of each entry ⟨v_k, v_l⟩ of a Gram matrix with this diagonal, (K, K), of v = √q (u − qᵀu).

    u is a difference of two logits, each off by `logits`. So v is off by at most 2 · √samples · `logits`. Each
    entry adds up to `terms` products in float32.
    """
    norms = np.sqrt(np.maximum(diagonal, 0))
    off = 2 * samples**0.5 * logits
    return off * (norms[:, None] + norms[None, :]) + off**2 + of_sum(terms) * np.outer(norms, norms)


def of_eigenvalue(diagonal: np.ndarray, terms: int) -> float:
    """How far below zero rounding takes an eigenvalue of a Gram matrix with this diagonal.

    Each entry is off by a share `of_sum(terms)` of the two norms, so that the Frobenius norm of all errors is
    that share of the trace.
    """
    return of_sum(terms) * float(np.maximum(diagonal, 0).sum())


def assert_close_tile(
    kind: str, actual: np.ndarray, expected: np.ndarray, samples: int, classes: int = 4, logits: float = FORWARD
) -> None:
    """Asserts that two measurements of a tile of losses, or of a Gram tile, agree: sums over the samples of a block."""
    if kind != "gram":
        assert_close_losses(actual, expected, samples)
        return
    assert_close_losses(actual[0], expected[0], samples)
    # |p − y| is at most √2, and u is a difference of two logits
    np.testing.assert_allclose(actual[1], expected[1], rtol=0, atol=samples * 2**0.5 * 2 * logits)
    k = expected.shape[1] - 1
    for start in range(2, len(expected), k):
        measured_sums, form = (sums[start : start + k, 1:] for sums in (actual, expected))
        bound = of_gram(np.diag(form), samples, samples * classes, logits)
        assert (np.abs(measured_sums - form) <= bound).all(), np.abs(measured_sums - form).max()
    assert actual.shape == expected.shape
    assert (actual[1:, 0] == 0).all()
