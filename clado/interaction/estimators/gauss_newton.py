"""The Gauss–Newton form of the loss in the logits: Ω = mean_n u_kᵀ F_n u_l over every two options k, l.

u_k is the change of a sample's logits under option k alone, and F = diag(p) − p pᵀ of the float softmax. This is the second
order of `kl_to_float` (Martens, arXiv 1412.1193, section 9.2, for the generalised Gauss–Newton matrix). Ω is a Gram matrix,
so it is positive semidefinite up to rounding. In-layer entries are kept as computed. With `cross_entropy` the first-order term
mean (p − y)ᵀ u_k, measured too, is added to the diagonal (twice, as every entry is on the scale of twice a loss).

Costs 1 + K forward passes of the sensitivity set, instead of about K² / 2.
"""

import numpy as np

from clado.interaction.estimators import Estimator, Measured, quarantine
from clado.interaction.matrix import InteractionMatrix
from clado.measuring.kinds.gram import TEMPERATURES


def estimate(measured: Measured) -> InteractionMatrix:
    """Full matrix, positive semidefinite under `kl_to_float`."""
    return at_temperature(measured, 1)


def at_temperature(measured: Measured, temperature: float) -> InteractionMatrix:
    """The matrix from the Gram matrices at one temperature. Any temperature but 1 makes it `ranking_only`."""
    k = measured.space.num_options
    rows = measured.block_means("gram")[:, 1:, 1:]
    first = 1 + k * TEMPERATURES.index(temperature)
    values = rows[:, first : first + k] + 2 * rows[:, 0, :, None] * np.eye(k)
    mean = measured.mean(values)
    quarantined, _ = quarantine(measured, np.diag(mean))
    mean = np.where(np.isfinite(mean), mean, 0.0)
    return InteractionMatrix(
        space=measured.space,
        values=(mean + mean.T) / 2,
        estimator="",  # `estimators.estimate` sets it
        criterion=measured.criterion,
        baseline=measured.baseline(),
        num_samples=measured.num_images,
        standard_error=measured.standard_error(np.where(np.isfinite(values), values, 0.0)),
        ranking_only=temperature != 1,
        quarantined=quarantined,
    )


estimator = Estimator(estimate, kinds=("gram",), prediction_order=0, interaction_order=1)
