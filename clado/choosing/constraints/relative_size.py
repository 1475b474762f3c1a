"""Percent of the 8-bit size: Σ ceil(n b / 8) ≤ floor(percent / 100 · Σ n), in bytes."""

from fractions import Fraction

from clado.choosing.constraints import Constraint, ConstraintKind, whole
from clado.space import SearchSpace


def _build(space: SearchSpace, percent: float) -> Constraint:
    """At most `percent` of the bytes that 8 bits everywhere would take (50 is the size of 4 bits everywhere)."""
    costs = tuple(float(space.layers[i].weight_bytes(b)) for i, b, _ in space.options)
    full = sum(layer.weight_bytes(8) for layer in space.layers)
    return Constraint("relative_size", "bytes", costs, whole(percent, Fraction(full, 100)), "% of the size at 8 bits", full / 100)


constraint = ConstraintKind(_build, text=lambda bound: f"{bound:.12g} % of 8-bit")
