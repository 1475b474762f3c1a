"""The Gauss–Newton form with the softmax at temperature 8. For its purpose, source and cost see tempered2.py."""

from clado.interaction.estimators import Estimator, Measured
from clado.interaction.estimators.gauss_newton import at_temperature
from clado.interaction.matrix import InteractionMatrix


def estimate(measured: Measured) -> InteractionMatrix:
    """Full matrix, positive semidefinite under `kl_to_float`."""
    return at_temperature(measured, 8)


estimator = Estimator(estimate, kinds=("gram",), proposes_always=True, interaction_order=5)
