"""Squared first-order change of each sample's log-likelihood: mean ⟨Δ_i(b), ∂ log p_y / ∂w_i⟩², on the diagonal.

MPQCO is by Chen, Wang and Cheng, "Towards Mixed-Precision Quantization of Neural Networks via Constrained Optimization", ICCV
2021, arXiv 2110.06554. It is the second order of −log p_y with its Hessian in Gauss–Newton form, which is never written out. The
error Δ holds the change of the layer's bias too, if a correction makes one.

With `kl_to_float` y is drawn from the float network's own softmax, so no label is needed. The mean then estimates Δᵀ F Δ with
the Fisher information F. That is twice KL's second order, a loss. With `cross_entropy` y is the label, as in the paper. That
matrix is not the Hessian (Kunstner, Balles and Hennig, arXiv 1905.12558), and the first order is left out. So the values only
rank assignments. Activations are not covered. Costs one forward and one backward pass of the sensitivity set, sample by sample.
"""

from clado.interaction.estimators import Estimator, Measured, diagonal_matrix
from clado.interaction.matrix import InteractionMatrix


def estimate(measured: Measured) -> InteractionMatrix:
    """The diagonal matrix. With `kl_to_float` it has twice the losses. With `cross_entropy` it only ranks assignments."""
    per_block = measured.block_means("gradients")[:, 0, 1:]
    return diagonal_matrix(measured, per_block, ranking_only=measured.criterion != "kl_to_float")


estimator = Estimator(estimate, kinds=("gradients",), sees_weights_only=True)
