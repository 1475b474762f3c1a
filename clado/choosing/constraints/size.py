"""Bytes of the searched weights, each tensor packed as one bit stream: Σ ceil(n b / 8), the integer of `Layer.weight_bytes`."""

from collections.abc import Mapping

from clado.choosing.constraints import Constraint, ConstraintKind, whole
from clado.errors import ConfigurationError
from clado.space import SearchSpace


def _build(space: SearchSpace, budget_bytes: float, overhead_bytes: Mapping[str, int] | None = None) -> Constraint:
    """At most `budget_bytes` of weights.

    `overhead_bytes` (layer name to bytes) adds scales and zero points when they are to count.
    """
    overhead = dict(overhead_bytes or {})
    unknown = sorted(set(overhead) - set(space.names))
    if unknown:
        raise ConfigurationError(f"constraint size: overhead_bytes names {unknown}, which are not searched layers")
    costs = tuple(float(space.layers[i].weight_bytes(b) + overhead.get(space.layers[i].name, 0)) for i, b, _ in space.options)
    return Constraint("size", "bytes", costs, whole(budget_bytes))


constraint = ConstraintKind(_build, counts_bytes=True, text=lambda bound: f"{bound / 1000:.12g} kB")
