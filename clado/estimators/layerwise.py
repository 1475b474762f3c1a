"""Layers one at a time: the diagonal 2 ℓ({i:a}) and nothing else.

The baseline that CLADO calls CLADO* (arXiv 2307.05657, section 5), and with `kl_to_float` ZeroQ's sensitivity (arXiv 2001.00281).
Costs 1 + K forwards of the sensitivity set.
"""

import numpy as np

from clado.estimators import Measured, quarantine
from clado.interaction import InteractionMatrix

KINDS = ("singles",)


def estimate(measured: Measured) -> InteractionMatrix:
    """Diagonal matrix of twice the measured increases."""
    per_block = measured.increases()
    quarantined, increases = quarantine(measured, measured.mean(per_block))
    errors = measured.standard_error(np.nan_to_num(per_block, nan=0.0, posinf=0.0, neginf=0.0))
    return InteractionMatrix(
        space=measured.space,
        values=np.diag(2 * increases),
        estimator="layerwise",
        criterion=measured.criterion,
        baseline=measured.baseline(),
        num_samples=measured.num_images,
        standard_error=None if errors is None else np.diag(2 * errors),
        quarantined=quarantined,
    )
