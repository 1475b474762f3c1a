"""Diagonal of the Fisher information times squared errors: mean Σ_w Δ_w² (∂ log p_y / ∂w)², on the diagonal.

FIT (Zandonati et al., arXiv 2210.08502), weight by weight; also the gradient score of NVIDIA ModelOpt's `auto_quantize`.
With `cross_entropy` y is the label, which gives the empirical Fisher information. With `kl_to_float` y is drawn from the float
network's softmax, once for each image, which gives the true Fisher information.

Errors of two weights of a layer are assumed to be unrelated, which is not true. So the values only rank assignments. A layer's
bias and its activations are not covered. Costs one forward and one backward pass of the sensitivity set, sample by sample. It
costs nothing more if `mpqco` is measured.
"""

from clado.interaction.estimators import Estimator, Measured, diagonal_matrix
from clado.interaction.matrix import InteractionMatrix


def estimate(measured: Measured) -> InteractionMatrix:
    """The diagonal matrix. It only ranks assignments."""
    return diagonal_matrix(measured, measured.block_means("gradients")[:, 1, 1:], ranking_only=True)


estimator = Estimator(estimate, kinds=("gradients",), sees_weights_only=True)
