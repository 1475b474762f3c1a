"""Average Hessian trace times squared error: tr(H_ii) / n_i · ‖Δ_i(b)‖², on the diagonal.

HAWQ-V2 (arXiv 1911.03852, section 3.2), kept by HAWQ-V3 (arXiv 2011.10680). H_ii is the Hessian of the loss in the n_i weights
of layer i at the float network. Its trace is Hutchinson's estimate. `gradients.vectors` says how many random vectors each sample
block takes. With `kl_to_float` H is the Gauss–Newton matrix, and no label is needed. With `cross_entropy` H is that of the
labels' loss. A negative trace then counts as 0, because otherwise more error would look like a gain.

It would be a loss if errors had no direction. Rounding errors have one, so the values only rank assignments. A layer's bias and
its activations are not covered. Costs one forward pass of the sensitivity set, and 1 + `vectors` backward passes.
"""

from dataclasses import replace

import numpy as np

from clado.interaction.estimators import Estimator, Measured, diagonal_matrix
from clado.interaction.matrix import InteractionMatrix


def estimate(measured: Measured) -> InteractionMatrix:
    """The diagonal matrix. It only ranks assignments. Standard errors include the noise of images and of random vectors."""
    matrix = diagonal_matrix(measured, measured.block_means("trace")[:, 1:], ranking_only=True)
    return replace(matrix, values=np.maximum(matrix.values, 0.0))


estimator = Estimator(estimate, kinds=("trace",), sees_weights_only=True)
