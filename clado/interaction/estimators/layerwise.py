"""Layers one at a time: the diagonal 2 ℓ({i:a}) and nothing else.

The baseline that CLADO calls CLADO* (arXiv 2307.05657, section 5), and with `kl_to_float` ZeroQ's sensitivity (arXiv 2001.00281).
Costs 1 + K forward passes of the sensitivity set.
"""

from clado.interaction.estimators import Estimator, Measured, diagonal_matrix
from clado.interaction.matrix import InteractionMatrix


def estimate(measured: Measured) -> InteractionMatrix:
    """Diagonal matrix of twice the measured increases."""
    return diagonal_matrix(measured, 2 * measured.increases())


estimator = Estimator(estimate, kinds=("singles",), is_safe=True, proposes_always=True, prediction_order=2)
