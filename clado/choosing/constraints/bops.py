"""Bit operations of one image: Σ MACs · weight bits · activation bits."""

from clado.bits import FLOAT_BITS
from clado.choosing.constraints import Constraint, ConstraintKind
from clado.errors import ConfigurationError
from clado.space import SearchSpace


def _build(space: SearchSpace, budget_bops: float, activation_bits: int = 8) -> Constraint:
    """At most `budget_bops` bit operations per image; the MACs are those that the exported graph counted (`Layer.macs`).

    `activation_bits` is used for activations that the space leaves in float. Quantized ones have their own bits. If the space
    quantizes activations, the input of a layer in float has 32 bits.
    """
    unknown = [layer.name for layer in space.layers if layer.macs <= 0]
    if unknown:
        raise ConfigurationError(
            f"constraint bops: the MACs of {', '.join(unknown)} are unknown; expected a space from a network's graph"
        )
    if activation_bits < 1:
        raise ConfigurationError(f"constraint bops: activation_bits is {activation_bits}; expected at least 1")
    in_float = FLOAT_BITS if space.has_activations else activation_bits
    costs = tuple(float(space.layers[i].macs * (b or FLOAT_BITS) * (a or in_float)) for i, b, a in space.options)
    return Constraint("bops", "bit operations", costs, float(budget_bops))


constraint = ConstraintKind(_build, text=lambda bound: f"{bound / 1e9:.12g} GBOP")
