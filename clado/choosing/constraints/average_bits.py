"""Bits per searched weight, exact in bits: Σ n b ≤ floor(average · Σ n), so uniform b bits always fit an average of b."""

from clado.bits import FLOAT_BITS
from clado.choosing.constraints import Constraint, ConstraintKind, whole
from clado.space import SearchSpace


def _build(space: SearchSpace, average: float) -> Constraint:
    """At most `average` bits per weight, weighted by the layers' parameters.

    2.3 means the decimal 2.3, not the nearest binary number.
    """
    costs = tuple(float(space.layers[i].num_weights * (b or FLOAT_BITS)) for i, b, _ in space.options)
    count = space.num_weights
    return Constraint("average_bits", "bits in all", costs, whole(average, count), "average bits a weight", float(count))


constraint = ConstraintKind(_build, text=lambda bound: f"{bound:.12g} bits")
