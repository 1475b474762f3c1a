"""Diagonal of the Fisher information times squared errors: mean Σ_w Δ_w² (∂ log p_y / ∂w)², on the diagonal.

FIT (Zandonati et al., arXiv 2210.08502), weight by weight; also the gradient score of NVIDIA ModelOpt's `auto_quantize`.
With `cross_entropy` y is the label: the empirical Fisher information; with `kl_to_float` y is drawn from the float network's
softmax: the true one, by one draw an image.

Errors of two weights of a layer are taken as unrelated, which they are not: the values rank assignments only. A layer's bias
and its activations are not seen. Costs one forward and one backward of the sensitivity set, sample by sample; nothing beside
`mpqco`.
"""

from clado.interaction.estimators import Estimator, Measured, diagonal_matrix
from clado.interaction.matrix import InteractionMatrix


def estimate(measured: Measured) -> InteractionMatrix:
    """Diagonal matrix that ranks assignments."""
    return diagonal_matrix(measured, measured.block_means("gradients")[:, 1, 1:], ranking_only=True)


estimator = Estimator(estimate, kinds=("gradients",), sees_weights_only=True)
