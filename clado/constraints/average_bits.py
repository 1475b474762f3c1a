"""Bits per searched weight, exact in bits: Σ n b ≤ floor(average · Σ n), so uniform b bits always fit an average of b."""

from fractions import Fraction
from math import floor

from clado.constraints import Constraint
from clado.space import SearchSpace


def constraint(space: SearchSpace, average: float) -> Constraint:
    """At most `average` bits per weight, weighted by the layers' parameters; 2.3 means the decimal 2.3, not its binary
    neighbour.
    """
    costs = tuple(float(space.layers[i].num_weights * b) for i, b, _ in space.options)
    return Constraint("average_bits", "bits in all", costs, float(floor(Fraction(repr(float(average))) * space.num_weights)))
