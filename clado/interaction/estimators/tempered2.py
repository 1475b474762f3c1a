"""The Gauss–Newton form at twice the temperature: Ω = mean_n u_kᵀ F_n u_l with F = diag(q) − q qᵀ of q = softmax(z / 2).

The float network is nearly sure of most images. So F at its own softmax hardly sees what moves their logits. That changes when
an assignment has moved them far. There the loss grows with the change of the logits, not with its square. The exact remainder of
`kl_to_float` holds F averaged along the way, ½ uᵀ ∫ 2 (1 − t) F(z + t u) dt u. The softmax averaged over changes of the logits
of variance s² is close to the softmax at temperature √(1 + π s² / 8). (MacKay, Neural Computation 4, 1992, "The evidence
framework applied to classification networks".) So a higher temperature fits lower budgets, whose logits move further. It is 2 for
a variance of about 8, 4 for 38 (`tempered4`), and 8 for 160 (`tempered8`). Measuring the proposals shows which one fits a budget.
The matrix ranks assignments and predicts no loss. It is positive semidefinite.

It uses the 1 + K forward passes of gauss_newton, and costs nothing more.
"""

from clado.interaction.estimators import Estimator, Measured
from clado.interaction.estimators.gauss_newton import at_temperature
from clado.interaction.matrix import InteractionMatrix


def estimate(measured: Measured) -> InteractionMatrix:
    """Full matrix, positive semidefinite under `kl_to_float`."""
    return at_temperature(measured, 2)


estimator = Estimator(estimate, kinds=("gram",), proposes_always=True, interaction_order=3)
