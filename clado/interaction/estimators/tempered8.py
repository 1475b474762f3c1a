"""The Gauss–Newton form with the softmax at temperature 8; what that is for, its source and its cost: tempered2.py."""

from clado.interaction.estimators import Measured
from clado.interaction.estimators.gauss_newton import at_temperature
from clado.interaction.matrix import InteractionMatrix

KINDS = ("gram",)


def estimate(measured: Measured) -> InteractionMatrix:
    """Full matrix, positive semidefinite under `kl_to_float`."""
    return at_temperature("tempered8", measured, 8)
