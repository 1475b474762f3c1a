"""Layers two at a time within a block: the matrix of `pairwise`, and 0 for two layers of different blocks.

BRECQ (arXiv 2102.05426, section 3.2) observes that errors depend on one another within a residual block or an encoder layer, and
little beyond it. Blocks follow from the module tree (`blocks.py`), or are `layers.blocks` in the settings.

Costs 1 + K forward passes of the sensitivity set, and one for every pair of options of different layers of one block. It costs
nothing more if `pairwise` is measured, which includes these pairs.
"""

from clado.interaction.estimators import Estimator, Measured
from clado.interaction.estimators.pairwise import of_pairs
from clado.interaction.matrix import InteractionMatrix
from clado.measuring.kinds import block_pairs


def estimate(measured: Measured) -> InteractionMatrix:
    """Block matrix, up to the order of layers."""
    kind = "pairs" if "pairs" in measured.sums else "block_pairs"
    return of_pairs(measured, kind, block_pairs.kind.mask(measured.space))


estimator = Estimator(estimate, kinds=("singles", "block_pairs"), convexity="clip_psd", interaction_order=2)
