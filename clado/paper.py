"""CLADO in its plainest form (arXiv 2307.05657): whole forward passes, a dense matrix, exhaustive search.

    options = [(name, quantize(weight, bits)) for name, weight in weights.items() for bits in (2, 4, 8)]
    matrix = interaction_matrix(model, options, cross_entropy(images, labels))
    chosen = solve(clip(matrix), [name for name, _ in options], sizes, budget)

An option is one layer at one bit-width: its name and its quantized weight. K options make a matrix
(K, K). This file imports nothing of clado, and clado never imports it. It is the oracle of the
tests, and the place to start reading. The estimator `pairwise` of the library computes the same
matrix faster.
"""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]
Loss = Callable[[nn.Module], float]
"""The mean loss of a network on some images, the sensitivity set."""


def quantize(weight: Tensor, bits: int) -> Tensor:
    """Q(w, b): rounds to the nearest code of a symmetric grid, at 2 bits or more.

    One range serves the whole weight. It has the least squared error of 100 ranges (section 5).
    """
    weight, top = weight.detach(), int(2 ** (bits - 1)) - 1  # the codes are -top .. top: at 2 bits -1, 0, 1
    scales = [weight.abs().max() * share / 100 / top for share in range(100, 0, -1)]
    roundings = [(weight / scale).round().clamp(-top, top) * scale for scale in scales]
    errors = [float((rounding - weight).square().sum()) for rounding in roundings]
    return roundings[errors.index(min(errors))]


def replaced(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the network in eval mode, in which the tensors of these names have other values."""
    network = copy.deepcopy(model).eval()
    state = network.state_dict()
    for name, tensor in tensors.items():
        state[name].copy_(tensor)
    return network


def cross_entropy(images: Tensor, labels: Tensor) -> Loss:
    """The paper's loss: mean cross entropy on images (n, C, H, W) with labels (n,), in nats; clado's default is KL."""

    def loss(network: nn.Module) -> float:
        return float(nn.functional.cross_entropy(forward(network, images).double(), labels))

    return loss


def forward(network: nn.Module, images: Tensor) -> Tensor:
    """The logits (n, classes) of a network as it is."""
    with torch.no_grad():
        logits: Tensor = network(images)
    return logits


def interaction_matrix(model: nn.Module, options: Sequence[tuple[str, Tensor]], loss: Loss) -> Array:
    """Ĝ, (K, K), by equations 7 to 9.

    The diagonal is twice the loss increase of each option, because ½ αᵀ Ĝ α counts it once. The other
    entries are what two options together add to the sum of their increases.
    """
    float_loss = loss(replaced(model, {}))

    def increase(*chosen: int) -> float:  # ℓ(S) = L(S) − L(∅)
        return loss(replaced(model, dict(options[k] for k in chosen))) - float_loss

    singles = [increase(k) for k in range(len(options))]
    matrix = np.diag(np.array(singles) * 2)
    for k, m in itertools.combinations(range(len(options)), 2):
        if options[k][0] != options[m][0]:  # two options of one layer are never chosen together
            matrix[k, m] = matrix[m, k] = increase(k, m) - singles[k] - singles[m]
    return matrix


def clip(matrix: Array) -> Array:
    """The nearest positive semidefinite matrix in the Frobenius norm (section 4.2).

    With few images many eigenvalues are negative by noise, and a solver would exploit them.
    """
    eigenvalues, vectors = np.linalg.eigh(matrix)
    return np.asarray(vectors @ np.diag(eigenvalues.clip(min=0)) @ vectors.T)


def predicted_increase(matrix: Array, chosen: Sequence[int]) -> float:
    """½ αᵀ Ĝ α (equation 8), where α is 1 at the chosen options and 0 elsewhere."""
    return 0.5 * float(matrix[np.ix_(chosen, chosen)].sum())


def solve(matrix: Array, layers: Sequence[str], sizes: Sequence[float], budget: float) -> tuple[int, ...] | None:
    """The integer quadratic program: the least predicted increase within a budget.

    One option is chosen for each layer. `layers` and `sizes` say the layer and the size of each of the
    K options. The answer is None if nothing fits the budget.
    """
    distinct = dict.fromkeys(layers)
    options_of = [[k for k, owner in enumerate(layers) if owner == layer] for layer in distinct]
    affordable = (chosen for chosen in itertools.product(*options_of) if sum(sizes[k] for k in chosen) <= budget)
    return min(affordable, key=lambda chosen: predicted_increase(matrix, chosen), default=None)
