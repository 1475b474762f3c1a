"""Layers two at a time: the full matrix of CLADO (arXiv 2307.05657, equations 7 to 9).

    Ĝ[(i,a),(i,a)] = 2 ℓ({i:a})
    Ĝ[(i,a),(i,a')] = 0
    Ĝ[(i,a),(j,b)] = ℓ({i:a, j:b}) − ℓ({i:a}) − ℓ({j:b})

½ αᵀĜα is the measured increase of any assignment of at most two layers. Costs 1 + K forward passes of the sensitivity set, and
one for every pair of options of different layers.
"""

import numpy as np
from numpy.typing import NDArray

from clado.interaction.estimators import Estimator, Measured, quarantine
from clado.interaction.matrix import InteractionMatrix
from clado.measuring.kinds import pairs


def estimate(measured: Measured) -> InteractionMatrix:
    """Full matrix; standard errors from the per-block combination on the same images."""
    return of_pairs(measured, "pairs", pairs.kind.mask(measured.space))


def of_pairs(measured: Measured, kind: str, upper: NDArray[np.bool_]) -> InteractionMatrix:
    """The matrix of measured pairs: those of `kind` where the mask `upper` (K, K) is True, and 0 for all others."""
    space = measured.space
    singles = measured.increases()
    baseline = measured.block_means("singles")[:, :1, None]
    per_block = measured.block_means(kind) - baseline - singles[:, :, None] - singles[:, None, :]
    per_block = np.where(upper, per_block, 0.0)
    quarantined, increases = quarantine(measured, measured.mean(singles))
    interactions = measured.mean(per_block)
    bad = ~np.isfinite(interactions)
    alone = np.zeros(space.num_options, dtype=bool)
    alone[list(quarantined)] = True
    forbidden = tuple((int(k), int(m)) for k, m in np.argwhere(bad & ~alone[:, None] & ~alone[None, :]))
    interactions = np.where(bad, 0.0, interactions)
    values = interactions + interactions.T + np.diag(2 * increases)
    errors = measured.standard_error(np.where(np.isfinite(per_block), per_block, 0.0))
    single_errors = measured.standard_error(np.where(np.isfinite(singles), singles, 0.0))
    return InteractionMatrix(
        space=space,
        values=values,
        estimator="",  # `estimators.estimate` sets it
        criterion=measured.criterion,
        baseline=measured.baseline(),
        num_samples=measured.num_images,
        standard_error=None if errors is None or single_errors is None else errors + errors.T + np.diag(2 * single_errors),
        quarantined=quarantined,
        forbidden=forbidden,
    )


estimator = Estimator(estimate, kinds=("singles", "pairs"), convexity="clip_psd", prediction_order=1, interaction_order=0)
